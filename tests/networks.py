"""Networks of the geometry's tests: Keras models, and the same written out with dense arrays."""

import functools

import dense_geometry
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import reference
import scipy.integrate
import steps
from keras import layers as L
from wide import swept

import keras_rgd

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(9, 3)), RNG.integers(0, 3, 9)
IMAGES, TARGETS = RNG.normal(size=(6, 5, 5, 1)), RNG.normal(size=(6, 2))
C = 0.4  # eps lambda_max at a network's start
TIMES = np.linspace(0, 0.4, 4)


class Network:
    """A Keras model with its data, and the same written out with dense arrays."""

    def __init__(self, stack, shape, loss, x, y, losses, rest=lambda w: 0.0):
        keras.utils.set_random_seed(1)
        self.model = keras_rgd.RGDSequential([keras.Input(shape), *stack])
        self.model.compile("sgd", loss)
        for w in self.model.trainable_variables:
            w.assign(w.numpy() + 0.2 * np.random.default_rng(3).normal(size=w.shape))
        self.data = (self.model, x, y)
        self.shapes = [tuple(w.shape) for w in self.model.trainable_variables]
        self.start = reference.flatten(self.model.get_weights())
        self.d = len(self.start)
        self.dense = dense_geometry.DenseGeometry(
            lambda w: losses(self.split(w)), lambda w: rest(self.split(w))
        )
        self.epsilon = C / self.dense.lambda_max(self.start)
        self.u, self.v = np.random.default_rng(4).normal(size=(2, self.d))

    def split(self, w):
        ends = np.cumsum([int(np.prod(s)) for s in self.shapes])
        pieces = [w[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        return [p.reshape(s) for p, s in zip(pieces, self.shapes, strict=True)]


def crossentropy(z):
    return jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(z)), LABELS]


def mlp():
    """Tanh, cross-entropy, a regularizer."""

    def losses(w):
        return crossentropy(jnp.tanh(X @ w[0] + w[1]) @ w[2] + w[3])

    hidden = L.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))
    return Network(
        [hidden, L.Dense(3)],
        (3,),
        CROSSENTROPY(from_logits=True),
        X,
        LABELS,
        losses,
        lambda w: 0.01 * jnp.sum(w[0] ** 2),
    )


def convolution():
    """A convolution, softplus, squared errors."""

    def losses(w):
        z = jax.lax.conv_general_dilated(
            jnp.asarray(IMAGES), w[0], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = jax.nn.softplus(z + w[1]).reshape(len(IMAGES), -1) @ w[2] + w[3]
        return jnp.mean((z - TARGETS) ** 2, axis=1)

    stack = [L.Conv2D(2, 3, 2, activation="softplus"), L.Flatten(), L.Dense(2)]
    return Network(stack, (5, 5, 1), "mse", IMAGES, TARGETS, losses)


def linear():
    """Linear regression of one number: f_i = (<w, x_i> + b - y_i)^2."""

    def losses(w):
        return (X @ w[0][:, 0] + w[1] - LABELS) ** 2

    return Network([L.Dense(1)], (3,), "mse", X, LABELS[:, None].astype(float), losses)


def points():
    """Biases only: f_i = |b - c_i|^2 / 3, whose Hessians are all alike."""

    def losses(w):
        return jnp.mean((w[0] - X) ** 2, axis=1)

    class Bias(L.Layer):
        def build(self, shape):
            self.b = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x):
            return 0 * x + self.b

    return Network([Bias()], (3,), "mse", X, X, losses)


BUILDERS = {f.__name__: f for f in (mlp, convolution, linear, points)}
CURVED = ("mlp", "convolution", "linear")


@functools.cache
def built(name):
    """The network of a name, in float64; the same object each time, whose traces are kept."""
    with steps.floatx("float64"):
        return BUILDERS[name]()


def on(*names, always=None):
    """The test's `network` is each of these, but for some only with `-m wide`."""
    values = swept(names, names if always is None else always)
    return pytest.mark.parametrize("network", values, indirect=True)


def same(actual, expected, tolerance=1e-9):
    if isinstance(actual, list):
        actual = reference.flatten(actual)
    assert reference.relative_error(actual, expected) <= tolerance


def lists(network, *flat):
    """Flat vectors as lists of arrays shaped as the weights."""
    return [[np.asarray(p) for p in network.split(v)] for v in flat]


def finite_differences(function, x, h=1e-4):
    """The derivatives of an array by x, along the last axis, of fourth order."""
    return np.stack([along(function, x, e, h) for e in np.eye(len(x))], axis=-1)


def along(function, x, direction, h=1e-4):
    """The derivative of an array at x along a direction, of fourth order."""
    near, far = (function(x + k * h * direction) - function(x - k * h * direction) for k in (1, 2))
    return (8 * near - far) / (12 * h)


def followed(slope, state, times=TIMES):
    """By another integrator than the package's."""
    solved = scipy.integrate.solve_ivp(
        lambda t, s: slope(s), (0, times[-1]), state, "LSODA", times, rtol=1e-11, atol=1e-13
    )
    return solved.y.T
