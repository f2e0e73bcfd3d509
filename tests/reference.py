"""The slow oracle: per-example gradients from their definition, and dense D, in float64 numpy.

Nothing here uses keras_rgd. L(u) is what `compute_loss` returns when example i's weight is
multiplied by u_i; it is linear in u, so f_i = N (L(e_i) - L(0)), and g_i is its gradient, one
example and one backward pass at a time.
"""

import contextlib
import dataclasses

import keras
import numpy as np
import tensorflow as tf

_ZERO = tf.UnconnectedGradients.ZERO


@dataclasses.dataclass(frozen=True)
class Dense:
    """Per-example gradients and everything that follows from them, dense."""

    G: np.ndarray  # (N, d), float64
    v: np.ndarray  # (d,), the gradient of the loss that `fit` reports
    loss: float = np.nan  # that loss

    @property
    def D(self):
        """Eq. (2), d x d: the covariance of the rows of G, divided by N."""
        centred = self.G - self.G.mean(0)
        return centred.T @ centred / len(self.G)

    @property
    def K(self):
        """(1/N) H G G^T H, N x N."""
        n = len(self.G)
        H = np.eye(n) - np.ones((n, n)) / n
        return H @ self.G @ self.G.T @ H / n

    @property
    def eigenvalues(self):
        """All d eigenvalues of D, descending."""
        return np.linalg.eigvalsh(self.D)[::-1]

    @property
    def lambda_max(self):
        return self.eigenvalues[0]

    def direction(self, epsilon):
        """Eq. (10): (I - eps D) v."""
        return self.v - epsilon * (self.D @ self.v)

    def metric(self, epsilon):
        """Eq. (6): I + eps D."""
        return np.eye(len(self.v)) + epsilon * self.D

    def error_on_step(self, epsilon):
        """|((I + eps D)^-1 - (I - eps D)) v| / |(I + eps D)^-1 v|."""
        exact = np.linalg.solve(self.metric(epsilon), self.v)
        return np.linalg.norm(exact - self.direction(epsilon)) / np.linalg.norm(exact)


def eager(model, x, y, sample_weight=None, loss_shape=(), training=True):
    """`Dense` of a compiled model: one eager forward pass, one backward pass an example.

    Args:
        model: a compiled, built Keras model.
        x, y: the batch.
        sample_weight: the user's weights, structured as the outputs, or `None`.
        loss_shape: the shape of each loss's values behind the batch axis, structured as the
            outputs: () or (T,).
        training: whether layers behave as in training.
    """
    n = len(keras.tree.flatten(x)[0])
    variables = [v.value for v in model.trainable_variables]
    with unchanged(model), tf.GradientTape(persistent=True) as tape:
        y_pred = _call(model, x, training)

        def loss(weights):
            return _loss(model, x, y, y_pred, weights, training)

        whole = loss(sample_weight)
        rest = loss(_weights(np.zeros(n), sample_weight, loss_shape))
        alone = [loss(_weights(e, sample_weight, loss_shape)) for e in np.eye(n)]

    def gradient(target):
        return _flat(tape.gradient(target, variables, unconnected_gradients=_ZERO))

    r = gradient(rest)
    G = np.array([n * (gradient(a) - r) for a in alone])
    return Dense(G, gradient(whole), float(whole))


def compiled(model, x, y, sample_weight=None, loss_shape=(), training=True, jit_compile=False):
    """As `eager`, but one compiled forward pass for each example, all from the same seeds.

    For layers that draw random numbers: which ones depends on the dtype and on XLA.
    """
    return traced(model, loss_shape, training, jit_compile)(x, y, sample_weight)


def traced(model, loss_shape=(), training=True, jit_compile=False):
    """A function (x, y, sample_weight) -> `Dense`, as `compiled`, at the model's weights of then.

    It is traced once for each shape of batch: where `eager` would be called for many points.
    """
    variables = [v.value for v in model.trainable_variables]

    @tf.function(jit_compile=jit_compile, autograph=False)
    def gradient(x, y, weights):
        with tf.GradientTape() as tape:
            y_pred = _call(model, x, training)
            loss = _loss(model, x, y, y_pred, weights, training)
        return tape.gradient(loss, variables, unconnected_gradients=_ZERO), loss

    def dense(x, y, sample_weight=None):
        n = len(keras.tree.flatten(x)[0])
        x, y = _tensors(x), _tensors(y)

        def restarted(e):
            with unchanged(model):
                gradients, loss = gradient(x, y, _weights(e, sample_weight, loss_shape))
            return _flat(gradients), float(loss)

        v, loss = restarted(np.ones(n))
        r, _ = restarted(np.zeros(n))
        return Dense(np.array([n * (restarted(e)[0] - r) for e in np.eye(n)]), v, loss)

    return dense


@contextlib.contextmanager
def unchanged(model):
    """Seed generators and moving statistics end as they began."""
    before = [(v, v.numpy()) for v in model.non_trainable_variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def flatten(tensors):
    """One float64 vector from a list of arrays or tensors."""
    return _flat(tensors)


def relative_error(actual, expected):
    """|actual - expected| / |expected|."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def _tensors(structure):
    """The same with tensors; targets that a model has not are `None`."""
    return tf.nest.map_structure(lambda t: t if t is None else tf.convert_to_tensor(t), structure)


def _call(model, x, training):
    return model(x, training=training) if model._call_has_training_arg else model(x)


def _loss(model, x, y, y_pred, weights, training):
    # A `compute_loss` of the user's own may not take `training`; Keras knows.
    return model._compute_loss(x, y, y_pred, weights, training=training)


def _weights(e, sample_weight, loss_shape):
    """e_i times the user's weights, in the full shape of each loss's values."""
    if isinstance(loss_shape, dict):
        user = sample_weight or dict.fromkeys(loss_shape)
        return {k: _weights(e, user[k], shape) for k, shape in loss_shape.items()}
    if isinstance(loss_shape, list):
        user = sample_weight or [None] * len(loss_shape)
        return [_weights(e, s, shape) for s, shape in zip(user, loss_shape, strict=True)]
    full = _expand(e, len(loss_shape)) * np.ones((len(e), *loss_shape))
    if sample_weight is not None:
        user = np.asarray(sample_weight, np.float64)
        full = full * _expand(user, len(loss_shape) + 1 - user.ndim)
    return tf.constant(full, keras.config.floatx())


def _expand(a, axes):
    return a.reshape(a.shape + (1,) * axes)


def _flat(tensors):
    arrays = [np.asarray(tf.convert_to_tensor(t)) for t in tensors]
    return np.concatenate([a.astype(np.float64).ravel() for a in arrays])
