"""The slow oracle of `reference.py` on JAX: one gradient of L(u) an example, in float64 numpy.

Nothing here uses keras_rgd: f_i = N (L(e_i) - L(0)), and g_i is its gradient by `jax.grad`.
"""

import jax
import keras
import numpy as np


def per_example(model, x, y, sample_weight=None, loss_shape=(), training=True):
    """(G, v, loss) of a compiled, built model; G of shape (N, d).

    Args:
        model: a compiled, built Keras model.
        x, y: the batch.
        sample_weight: the user's weights, structured as the outputs, or `None`.
        loss_shape: the shape of each loss's values behind the batch axis, structured as the
            outputs.
        training: whether layers behave as in training.
    """
    n = len(keras.tree.flatten(x)[0])
    states = [
        [v.value for v in vs] for vs in (model.non_trainable_variables, model.metrics_variables)
    ]
    trainable = [v.value for v in model.trainable_variables]

    @jax.jit
    @jax.value_and_grad
    def loss(trainable, weights):
        kwargs = {"training": training} if model._call_has_training_arg else {}
        y_pred, non_trainable, losses = model.stateless_call(
            trainable, states[0], x, return_losses=True, **kwargs
        )
        model._losses_override.clear()
        model._losses_override = losses
        loss, _ = model.stateless_compute_loss(
            trainable, non_trainable, states[1], x, y, y_pred, weights, training=training
        )
        model._losses_override.clear()
        return loss

    value, v = loss(trainable, _weights(np.ones(n), sample_weight, loss_shape))
    rest = _flat(loss(trainable, _weights(np.zeros(n), sample_weight, loss_shape))[1])
    alone = [loss(trainable, _weights(e, sample_weight, loss_shape))[1] for e in np.eye(n)]
    return np.array([n * (_flat(a) - rest) for a in alone]), _flat(v), float(value)


def _weights(e, sample_weight, loss_shape):
    """e_i times the user's weights, in the full shape of each loss's values."""
    if isinstance(loss_shape, dict):
        user = sample_weight or dict.fromkeys(loss_shape)
        return {k: _weights(e, user[k], shape) for k, shape in loss_shape.items()}
    if isinstance(loss_shape, list):
        user = sample_weight or [None] * len(loss_shape)
        return [_weights(e, s, shape) for s, shape in zip(user, loss_shape, strict=True)]
    full = e.reshape(e.shape + (1,) * len(loss_shape)) * np.ones((len(e), *loss_shape))
    if sample_weight is not None:
        user = np.asarray(sample_weight, np.float64)
        full = full * user.reshape(user.shape + (1,) * (len(loss_shape) + 1 - user.ndim))
    return full.astype(keras.config.floatx())


def _flat(tensors):
    return np.concatenate([np.asarray(t).astype(np.float64).ravel() for t in tensors])
