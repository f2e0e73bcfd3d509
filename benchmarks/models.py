"""The models that the benchmarks time, and random data for them."""

import dataclasses
import re
from collections.abc import Callable

import keras
import numpy as np

import keras_rgd

layers = keras.layers
CLASSES = 10
VOCABULARY = 1000


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A classifier of `CLASSES` classes and how long an epoch of it is."""

    shape: tuple
    outputs: Callable  # from the input tensor to the logits
    steps: int  # an epoch
    tokens: bool = False

    def model(self):
        """A new model, the same weights each time."""
        keras.utils.set_random_seed(0)
        inputs = keras.Input(self.shape, dtype="int32" if self.tokens else None)
        # On torch RGD has windows alone, for any model.
        kind = keras.Model if keras.backend.backend() == "torch" else keras_rgd.RGDModel
        return kind(inputs, self.outputs(inputs))

    def data(self, count):
        """Random examples and classes, numpy arrays."""
        rng = np.random.default_rng(0)
        if self.tokens:
            x = rng.integers(0, VOCABULARY, (count, *self.shape)).astype("int32")
        else:
            x = rng.normal(size=(count, *self.shape)).astype("float32")
        return x, rng.integers(0, CLASSES, count)


def loss():
    """The classifiers' loss."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(width, depth):
    """784, `depth` layers of `width` units, 10."""

    def outputs(x):
        for _ in range(depth):
            x = layers.Dense(width, "relu")(x)
        return layers.Dense(CLASSES)(x)

    return outputs


def cnn(x):
    """conv32-pool-conv64-pool-dense128-10 on 28x28."""
    for filters in (32, 64):
        x = layers.MaxPooling2D()(layers.Conv2D(filters, 3, activation="relu")(x))
    x = layers.Dense(128, "relu")(layers.Flatten()(x))
    return layers.Dense(CLASSES)(x)


def resnet20(normalization):
    """Resnet-20 of He et al. for 32x32x3 with a normalization layer of one's choice."""

    def convolved(x, filters, size, strides=1):
        conv = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)
        return normalization()(conv(x))

    def outputs(x):
        x = layers.ReLU()(convolved(x, 16, 3))
        for filters in (16, 32, 64):
            for block in range(3):
                strides = 2 if block == 0 and filters > 16 else 1
                y = layers.ReLU()(convolved(x, filters, 3, strides))
                y = convolved(y, filters, 3)
                if strides == 2:
                    x = convolved(x, filters, 1, strides)
                x = layers.ReLU()(layers.Add()([x, y]))
        return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))

    return outputs


def transformer(tokens):
    """An encoder of two blocks of width 128 with four heads, mean pooling on top."""
    x = layers.Embedding(VOCABULARY, 128)(tokens)
    for _ in range(2):
        attended = layers.MultiHeadAttention(4, 32)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, attended]))
        fed = layers.Dense(128)(layers.Dense(512, "gelu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, fed]))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))


def lstm(x):
    """64 units over 32 timesteps."""
    return layers.Dense(CLASSES)(layers.LSTM(64)(x))


MODELS = {
    "mlp": Benchmark((784,), mlp(256, 2), steps=100),
    "cnn": Benchmark((28, 28, 1), cnn, steps=100),
    "resnet20-gn": Benchmark((32, 32, 3), resnet20(lambda: layers.GroupNormalization(4)), steps=10),
    "resnet20-bn": Benchmark((32, 32, 3), resnet20(layers.BatchNormalization), steps=10),
    "transformer": Benchmark((64,), transformer, steps=10, tokens=True),
    "lstm": Benchmark((32, 16), lstm, steps=50),
}


def application(name):
    """A model of `keras.applications` on 32x32x3, without its weights."""
    make = getattr(keras.applications, name)

    def outputs(x):
        rest = dict(weights=None, classes=CLASSES, classifier_activation=None)
        return make(input_tensor=x, **rest).output

    return Benchmark((32, 32, 3), outputs, steps=5)


def benchmark(name):
    """The `Benchmark` of one of `MODELS`, of "mlp-WIDTHxDEPTH", or of a `keras.applications`."""
    if name in MODELS:
        return MODELS[name]
    if name[0].isupper() and hasattr(keras.applications, name):
        return application(name)
    sizes = re.fullmatch(r"mlp-(\d+)x(\d+)", name)
    if sizes is None:
        raise ValueError(
            f"Expected one of {', '.join(MODELS)}, mlp-WIDTHxDEPTH, or a model of "
            f"keras.applications by its name. Received: {name!r}"
        )
    return Benchmark((784,), mlp(*map(int, sizes.groups())), steps=50)
