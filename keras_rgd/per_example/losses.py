"""The losses f_i of the examples, from the model's own public `compute_loss`.

Everything here follows from one definition (see `PerExampleGradients`): the loss of example i is
how much the batch's loss changes with that example's weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_rgd._keras.models import (
    calls_replaced,
    hang_on,
    has_training_argument,
    logits_of,
    losses_by_path,
    mask_of,
)
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.layer_calls import class_name


class ExampleLosses:
    """f_1, ..., f_N of any batch of one model, in training or in evaluation mode.

    The ranks of the losses' values, which say what shape the examples' weights must have, are
    asked once for each shape of batch.

    Args:
        model: a compiled, built model.
        training: whether its layers behave as in training.
    """

    def __init__(self, model: keras.Model, training: bool):
        self.model, self.training = model, training
        self._ranks: dict[tuple, dict[tuple, int]] = {}

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
            _check_scalar(loss)
            derivatives = tape.gradient(loss, u)
        if derivatives is None:
            raise ValueError(_IGNORES_WEIGHTS.format(class_name(self.model)))
        # Where the tape finds no path from dL/du back to u, L is linear in u, for every batch.
        if linearity.gradient(derivatives, u) is not None:
            raise ValueError(_NOT_LINEAR.format(self.model.loss))
        return loss, derivatives

    def of_weighted(self, batch: Batch, y_pred: Any, u: Any) -> Any:
        """L(u), a scalar tensor."""
        weights = self._weights(batch, y_pred, u)
        loss = self.total(Batch(batch.x, batch.y, weights), y_pred)
        # Keras does not reduce the values of no examples.
        return tf.reduce_sum(loss) if loss.shape == (0,) else loss

    def total(self, batch: Batch, y_pred: Any) -> Any:
        """The loss that `fit` reports: what `model.compute_loss` returns, a tensor."""
        arguments = dict(x=batch.x, y=batch.y, y_pred=y_pred, sample_weight=batch.sample_weight)
        # `training` came to compute_loss in Keras 3.3; models written before do not take it.
        if "training" in inspect.signature(self.model.compute_loss).parameters:
            arguments["training"] = self.training
        return tf.convert_to_tensor(self.model.compute_loss(**arguments))

    def _weights(self, batch: Batch, y_pred: Any, u: Any) -> Any:
        """u times the user's weights, for each loss in the rank of that loss's values.

        A loss over time has values (N, T): weights of shape (N,) would not broadcast, or at N = T
        would weight the timesteps.
        """
        ranks, user = self._ranks_for(batch, y_pred), batch.sample_weight
        if not ranks:
            # A `compute_loss` of the user's own: weights as the user gives them.
            given = u if user is None else user
            return keras.tree.map_structure(lambda s: u if s is u else _times(u, s, 1), given)
        if list(ranks) == [()]:
            return _times(u, user, ranks[()])
        nested: dict = {}
        for path, rank in ranks.items():
            own = user
            if own is not None and keras.tree.is_nested(own):
                for key in path:
                    own = own[key]
            place = nested
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = _times(u, own, rank)
        return nested

    def _ranks_for(self, batch: Batch, y_pred: Any) -> dict[tuple, int]:
        """The rank of each compiled loss's values, by its path in the model's output."""
        given = (batch.x, batch.y, y_pred)
        flat = keras.tree.flatten(given)
        key = tuple(None if t is None else (str(t.shape), t.dtype) for t in flat)
        if key not in self._ranks:
            self._ranks[key] = self._asked_ranks(given, flat)
        return self._ranks[key]

    def _asked_ranks(self, given: tuple, flat: list) -> dict[tuple, int]:
        """The losses are asked themselves, in a graph that is never run, so no metric moves."""

        def compute(*tensors: Any) -> Any:
            rest = iter(tensors)
            packed = [None if t is None else next(rest) for t in flat]
            x, y, y_pred = keras.tree.pack_sequence_as(given, packed)
            return self.total(Batch(x, y), y_pred)

        def trace() -> None:
            specs = [tf.type_spec_from_value(t) for t in flat if t is not None]
            tf.function(compute, autograph=False).get_concrete_function(*specs)

        if losses_by_path(self.model) is None:
            trace()
        # Where they are still not built, a `compute_loss` of the user's own never asks them.
        return _recorded_ranks(losses_by_path(self.model) or [], trace)

    def compiled_losses(self) -> list:
        """The losses that the model was compiled with, once `compute_loss` has built them."""
        return [loss for _, loss in losses_by_path(self.model) or []]


def what_losses_read(y_pred: Any) -> list:
    """The tensors of a model's output that a loss may read, a flat list.

    Keras lets a softmax or a sigmoid carry its logits, and its losses then read those instead.
    """
    outputs = [t for t in keras.tree.flatten(y_pred) if t.dtype.is_floating]
    return outputs + [logits_of(t) for t in outputs if logits_of(t) is not None]


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


def has_mask(y_pred: Any) -> bool:
    """Whether an output that a loss may read carries a mask, whose losses count valid steps."""
    return any(mask_of(t) is not None for t in what_losses_read(y_pred))


def _times(u: Any, user: Any, rank: int) -> Any:
    if user is not None:
        user = tf.convert_to_tensor(user)
        rank = max(rank, user.shape.rank)
        user = tf.cast(tf.reshape(user, _expanded(user, rank)), u.dtype)
    u = tf.reshape(u, _expanded(u, rank))
    return u if user is None else u * user


def _expanded(tensor: Any, rank: int) -> list:
    shape = [s if s is not None else tf.shape(tensor)[i] for i, s in enumerate(tensor.shape)]
    return shape + [1] * (rank - tensor.shape.rank)


def _recorded_ranks(losses: list[tuple[tuple, Any]], trace: Callable[[], None]) -> dict[tuple, int]:
    """The ranks by path, from what the compiled losses return while `trace()` runs.

    Args:
        losses: pairs of a path in the model's output and a loss.
        trace: a function that calls the losses in that order.
    """
    calls: list[tuple[Any, int]] = []
    ranks: dict[tuple, int] = {}
    for _, loss in losses:
        _check_reduction(loss)

    def recorded(loss: Any, call: Callable) -> Callable:
        def recorded_call(y_true: Any, y_pred: Any) -> Any:
            values = call(y_true, y_pred)
            _check_values(loss, values)
            calls.append((loss, len(values.shape)))
            return values

        return recorded_call

    if losses:
        with calls_replaced([loss for _, loss in losses], recorded):
            trace()
    # One loss object may serve several outputs, so it is the order of the calls that tells.
    for path, loss in losses:
        first = next((i for i, (called, _) in enumerate(calls) if called is loss), None)
        if first is not None:
            ranks[path] = max(ranks.get(path, 0), calls.pop(first)[1])
    return ranks


_IGNORES_WEIGHTS = (
    "The loss does not depend on the sample weights, so it has no per-example losses: "
    "`{}.compute_loss` must use its `sample_weight` argument, and the model must be compiled with "
    "a `loss` (`add_loss` alone gives one number for the whole batch)."
)

_NOT_LINEAR = (
    "The loss is not linear in the sample weights, so it is not a sum of per-example losses. "
    "Expected a loss with reduction='sum_over_batch_size' or 'sum' and a `compute_loss` linear in "
    "`sample_weight`. Received: loss={}."
)


def _check_scalar(loss: Any) -> None:
    if loss.shape.rank != 0:
        raise ValueError(
            "The loss must be reduced to a scalar over the batch. Expected a loss with "
            "reduction='sum_over_batch_size' (the default) or 'sum'. "
            f"Received: a loss of shape {tuple(loss.shape)} (reduction=None?)."
        )


def _check_reduction(loss: Any) -> None:
    if getattr(loss, "reduction", None) == "mean_with_sample_weight":
        raise ValueError(
            "reduction='mean_with_sample_weight' divides by the sum of the sample weights, so the "
            "loss is not a sum of per-example losses. Expected reduction='sum_over_batch_size'. "
            f"Received: loss '{loss.name}' with reduction='mean_with_sample_weight'."
        )


def _check_values(loss: Any, values: Any) -> None:
    if len(values.shape) == 0:
        raise ValueError(
            "A loss must return one value for each example, shape (N, ...); one scalar for the "
            "batch makes all examples' losses equal and the diffusion matrix zero. "
            f"Received: loss '{loss.name}' with values of shape (). Drop the mean over the batch "
            "axis in it; Keras takes that mean."
        )
