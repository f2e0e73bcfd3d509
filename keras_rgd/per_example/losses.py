"""The losses f_i of the examples, from the model's own public `compute_loss`.

Everything here follows from one definition (see `PerExampleGradients`): the loss of example i is
how much the batch's loss changes with that example's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_rgd._keras.models import (
    hang_on,
    has_training_argument,
    logits_of,
    mask_of,
)
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.layer_calls import class_name
from keras_rgd.per_example.loss_weights import (
    IGNORES_WEIGHTS,
    NOT_LINEAR,
    LossWeights,
    check_scalar,
    total_loss,
)


class ExampleLosses:
    """f_1, ..., f_N of any batch of one model, in training or in evaluation mode.

    Args:
        model: a compiled, built model.
        training: whether its layers behave as in training.
    """

    def __init__(self, model: keras.Model, training: bool):
        self.model, self.training = model, training
        self._weights = LossWeights(model, training)

    @property
    def weights(self) -> list:
        """The trainable weights, a list of `tf.Variable`."""
        return [w.value for w in self.model.trainable_variables]

    def forward(self, x: Any) -> Any:
        """The model's output; `training` only where its `call` takes it, as Keras does."""
        if has_training_argument(self.model):
            return self.model(x, training=self.training)
        return self.model(x)

    def __call__(self, batch: Batch, y_pred: Any, u: Any) -> tuple:
        """L(u) and its derivatives by the weights u of the examples.

        Args:
            batch: a `Batch`.
            y_pred: the model's output for `batch.x`, already computed.
            u: ones of shape (N,).

        Returns:
            `(loss, derivatives)`: a scalar, and dL/du = f / N of shape (N,); tapes that are open
            see both.

        Raises:
            ValueError: where the loss gives no f_i: it is one scalar for the whole batch, ignores
                the sample weights, is not linear in them, or is not reduced to a scalar.
        """
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as linearity:
            linearity.watch(u)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(u)
                loss = self.of_weighted(batch, y_pred, u)
            check_scalar(loss)
            derivatives = tape.gradient(loss, u)
        if derivatives is None:
            raise ValueError(IGNORES_WEIGHTS.format(class_name(self.model)))
        # Where the tape finds no path from dL/du back to u, L is linear in u, for every batch.
        if linearity.gradient(derivatives, u) is not None:
            raise ValueError(NOT_LINEAR.format(self.model.loss))
        return loss, derivatives

    def of_weighted(self, batch: Batch, y_pred: Any, u: Any) -> Any:
        """L(u), a scalar tensor."""
        weights = self._weights(batch, y_pred, u)
        loss = self.total(Batch(batch.x, batch.y, weights), y_pred)
        # Keras does not reduce the values of no examples.
        return tf.reduce_sum(loss) if loss.shape == (0,) else loss

    def total(self, batch: Batch, y_pred: Any) -> Any:
        """The loss that `fit` reports, a tensor; see `total_loss`."""
        return total_loss(self.model.compute_loss, self.training, batch, y_pred)


def replaced(y_pred: Any, function: Callable) -> Any:
    """A model's output with `function` applied to each floating tensor that a loss may read.

    What Keras hangs on a tensor, its logits and its mask, comes along.
    """

    def one(tensor: Any) -> Any:
        if not tf.is_tensor(tensor) or not tensor.dtype.is_floating:
            return tensor
        new, logits = function(tensor), logits_of(tensor)
        hang_on(new, logits if logits is None else function(logits), mask_of(tensor))
        return new

    return keras.tree.map_structure(one, y_pred)
