"""The four networks of the paper's Table 1, as their authors describe them for 32x32 images.

Convolutions have no bias, BatchNormalization has scale and shift (its momentum and epsilon are
those of the authors' Torch), and the last layer, which gives logits, has a bias. For 10 classes
they have 1,727,962, 10,961,370, 1,019,722 and 27,249,082 trainable weights.
"""

import keras
from keras import layers


def resnet110(input_shape=(32, 32, 3), classes=10):
    """ResNet-110 (He et al., arXiv 1512.03385): 3 x 18 basic blocks of 16, 32 and 64 channels.

    Shortcuts have no weights (their option A): where the channels double every other place is
    taken, and the new channels are zero.
    """
    inputs = keras.Input(input_shape)
    x = activated(convolution(inputs, 16))
    for stage, width in enumerate((16, 32, 64)):
        for index in range(18):
            stride = 2 if stage and not index else 1
            shortcut = x
            if stride == 2:
                shortcut = layers.AveragePooling2D(1, strides=2)(x)
                new = (width - shortcut.shape[-1]) // 2
                shortcut = ChannelPadding(new)(shortcut)
            x = activated(convolution(x, width, stride=stride))
            x = normalized(convolution(x, width))
            x = layers.ReLU()(layers.add([x, shortcut]))
    return classifier(inputs, x, classes, "resnet110")


def wide_resnet_16_8(input_shape=(32, 32, 3), classes=10):
    """WRN-16-8 (Zagoruyko and Komodakis, arXiv 1605.07146): 3 x 2 blocks of 128, 256, 512 channels.

    Each block is BatchNormalization, ReLU, convolution, twice; where the channels change a 1x1
    convolution of the activated input is the shortcut.
    """
    inputs = keras.Input(input_shape)
    x = convolution(inputs, 16)
    for stage, width in enumerate((128, 256, 512)):
        for index in range(2):
            stride = 2 if stage and not index else 1
            shortcut, active = x, activated(x)
            if not index:
                shortcut = convolution(active, width, size=1, stride=stride)
            x = convolution(active, width, stride=stride)
            x = layers.add([convolution(activated(x), width), shortcut])
    return classifier(inputs, activated(x), classes, "wide_resnet_16_8")


def densenet(depth, growth, input_shape=(32, 32, 3), classes=10):
    """DenseNet (Huang et al., arXiv 1608.06993) without bottlenecks or compression.

    Args:
        depth: 3 n + 4 for three blocks of n layers.
        growth: channels that each layer adds, k in the paper.
        input_shape: (height, width, channels).
        classes: of the last layer.

    Raises:
        ValueError: depth is not of that form.
    """
    count, rest = divmod(depth - 4, 3)
    if rest or count < 1:
        raise ValueError(f"`depth` must be 3 n + 4, such as 40. Received: depth={depth}")
    inputs = keras.Input(input_shape)
    x = convolution(inputs, 16)
    for block in range(3):
        if block:
            x = convolution(activated(x), x.shape[-1], size=1)
            x = layers.AveragePooling2D(2)(x)
        for _ in range(count):
            x = layers.concatenate([x, convolution(activated(x), growth)])
    return classifier(inputs, activated(x), classes, f"densenet_{depth}_{growth}")


@keras.saving.register_keras_serializable(package="keras_rgd_examples")
class ChannelPadding(layers.Layer):
    """Zeros for `count` channels before and as many after."""

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def call(self, x):
        return keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [self.count, self.count]])

    def get_config(self):
        return super().get_config() | {"count": self.count}


def convolution(x, filters, size=3, stride=1):
    padding = "same"
    if stride > 1 and size > 1:
        # "same" would pad the end alone, and look at other pixels than the shortcut takes.
        x, padding = layers.ZeroPadding2D(size // 2)(x), "valid"
    return layers.Conv2D(
        filters,
        size,
        stride,
        padding=padding,
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)


def normalized(x):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def activated(x):
    return layers.ReLU()(normalized(x))


def classifier(inputs, x, classes, name):
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x), name=name)
