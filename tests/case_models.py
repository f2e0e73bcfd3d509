"""The models of the layer matrix that are no plain stack of layers, and what they are made of."""

import functools

import keras
from keras import layers as L

import keras_rgd

N = 6  # examples
T = 4  # timesteps


def sequential(shape, *stack, dtype=None):
    """A builder of an RGDSequential; the layers are made anew by each entry of `stack`."""

    def build():
        return keras_rgd.RGDSequential(
            [keras.Input(shape, dtype=dtype), *(make() for make in stack)]
        )

    return build


def layer(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs)


# Losses are made when compiled: they take the floatx of that moment.
CROSSENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
BINARY = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True)
HEAD = layer(L.Dense, 3)
FLAT = layer(L.Flatten)
MEAN1D = layer(L.GlobalAveragePooling1D)
TANH = layer(L.Dense, 4, activation="tanh")


# Keras's own L1 and L2 are of float32 in every floatx in older versions.
@keras.saving.register_keras_serializable(package="tests")
class Squares(keras.regularizers.Regularizer):
    def __call__(self, weight):
        return 0.01 * keras.ops.sum(keras.ops.square(weight))

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable(package="tests")
class Sizes(Squares):
    def __call__(self, weight):
        return 0.01 * keras.ops.sum(keras.ops.abs(weight))


def attention():
    x = keras.Input((T, 4))
    h = L.MultiHeadAttention(2, 3)(x, x) + x
    y = L.Dense(3)(L.GlobalAveragePooling1D()(L.LayerNormalization()(h)))
    return keras_rgd.RGDModel(x, y)


def transformer():
    tokens = keras.Input((T,), dtype="int32")
    x = L.Embedding(10, 4, mask_zero=True)(tokens)
    h = L.LayerNormalization()(x + L.MultiHeadAttention(2, 2, dropout=0.3)(x, x))
    h = L.LayerNormalization()(h + L.Dropout(0.3)(L.Dense(4)(L.Dense(5, activation="relu")(h))))
    return keras_rgd.RGDModel(tokens, L.Dense(3)(h))


def shared():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    tower = L.Dense(4, activation="tanh")
    return keras_rgd.RGDModel([a, b], L.Dense(2)(L.concatenate([tower(a), tower(b)])))


def nested():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="tanh"), L.Dense(4)])
    x = keras.Input((4,))
    return keras_rgd.RGDModel(x, L.Dense(2)(inner(L.Dense(4, activation="tanh")(inner(x)))))


def one_loss():
    """The same object each time, as one that a user hands to several outputs."""
    return _one_loss(keras.config.floatx())


@functools.cache
def _one_loss(floatx):
    return keras.losses.MeanSquaredError()


def two_by_two():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    h = L.Dense(4, activation="tanh")(L.concatenate([a, b]))
    return keras_rgd.RGDModel([a, b], [L.Dense(2, name="p")(h), L.Dense(3, name="q")(h)])


def dictionaries():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((T, 2), name="b")}
    steps = L.Dense(3, activation="tanh")(inputs["b"])
    h = L.concatenate([inputs["a"], L.Flatten()(steps)])
    outputs = {"p": L.Dense(1, name="p")(h), "q": L.Dense(2, name="q")(steps)}
    return keras_rgd.RGDModel(inputs, outputs)


def one_output_without_loss():
    x = keras.Input((3,))
    h = L.Dense(4, activation="tanh")(x)
    return keras_rgd.RGDModel(x, {"p": L.Dense(2, name="p")(h), "q": L.Dense(3, name="q")(h)})


def small_sigmoid():
    x = keras.Input((3,))
    h = L.Dense(4, activation="tanh")(x)
    p, q = L.Dense(2, name="p")(h), L.Dense(1, activation="sigmoid", name="q")(h)
    return keras_rgd.RGDModel(x, [p, q])


def frozen():
    model = sequential((5,), layer(L.Dense, 4, activation="tanh"), TANH, HEAD)()
    model.layers[1].trainable = False
    return model


@keras.saving.register_keras_serializable(package="tests")
class AddsLoss(L.Layer):
    """Adds a loss of its output, which has nothing to do with sample weights."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(x)))
        return x


@keras.saving.register_keras_serializable(package="tests")
class MixesExamples(L.Layer):
    """Subtracts the batch's mean: the output of an example depends on the others."""

    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras_rgd.RGDMixin, keras.Model):
    """A subclassed model with the mixin."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = L.Dense(4, activation="tanh")
        self.head = L.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))


class OwnLoss(keras_rgd.RGDModel):
    """A `compute_loss` of its own, linear in the sample weights."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        values = keras.ops.sum(keras.ops.square(keras.ops.subtract(y, y_pred)), axis=-1)
        if sample_weight is not None:
            values = values * sample_weight
        return keras.ops.mean(values) + 0.1 * keras.ops.sum(keras.ops.square(self.weights[0]))


def own_loss():
    x = keras.Input((4,))
    return OwnLoss(x, L.Dense(2)(L.Dense(3, activation="tanh")(x)))
