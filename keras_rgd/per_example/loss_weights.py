"""The weights u of the examples as a model's losses take them, and the loss L(u) of a batch.

On `keras.ops` alone: each backend differentiates L(u) in its own way (`losses.py` on TensorFlow,
`linearized.py` on JAX).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rgd._keras.models import calls_replaced, logits_of, losses_by_path, mask_of
from keras_rgd._support.backends import traced_abstractly
from keras_rgd.per_example.batch import Batch


def total_loss(compute_loss: Callable, training: bool, batch: Batch, y_pred: Any) -> Any:
    """The loss that `fit` reports: what a model's `compute_loss` returns, a tensor."""
    arguments = dict(x=batch.x, y=batch.y, y_pred=y_pred, sample_weight=batch.sample_weight)
    # `training` came to compute_loss in Keras 3.3; models written before do not take it.
    if "training" in inspect.signature(compute_loss).parameters:
        arguments["training"] = training
    return ops.convert_to_tensor(compute_loss(**arguments))


class LossWeights:
    """u times the user's weights, for each loss in the rank of that loss's values.

    A loss over time has values (N, T): weights of shape (N,) would not broadcast, or at N = T
    would weight the timesteps. The ranks are asked once for each shape of batch.

    Args:
        model: a compiled, built model.
        training: whether its layers behave as in training.
    """

    def __init__(self, model: keras.Model, training: bool):
        self._model, self._training = model, training
        # As it is now: a step may replace it while it is traced.
        self._compute_loss = model.compute_loss
        self._ranks: dict[tuple, dict[tuple, int]] = {}

    def __call__(self, batch: Batch, y_pred: Any, u: Any) -> Any:
        """What takes the place of `sample_weight`.

        Args:
            batch: a `Batch`.
            y_pred: the model's output for `batch.x`.
            u: shape (N,).
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
        key = tuple(None if t is None else (str(t.shape), str(t.dtype)) for t in flat)
        if key not in self._ranks:
            self._ranks[key] = self._asked_ranks(given, flat)
        return self._ranks[key]

    def _asked_ranks(self, given: tuple, flat: list) -> dict[tuple, int]:
        """The losses are asked themselves, in a graph that is never run, so no metric moves."""
        model = self._model

        def compute(*tensors: Any) -> Any:
            rest = iter(tensors)
            packed = [None if t is None else next(rest) for t in flat]
            x, y, y_pred = keras.tree.pack_sequence_as(given, packed)
            return total_loss(self._compute_loss, self._training, Batch(x, y), y_pred)

        def trace() -> None:
            traced_abstractly(compute, [t for t in flat if t is not None])

        if losses_by_path(model) is None:
            trace()
        # Where they are still not built, a `compute_loss` of the user's own never asks them.
        return _recorded_ranks(losses_by_path(model) or [], trace)


def what_losses_read(y_pred: Any) -> list:
    """The tensors of a model's output that a loss may read, a flat list.

    Keras lets a softmax or a sigmoid carry its logits, and its losses then read those instead.
    """
    outputs = [t for t in keras.tree.flatten(y_pred) if _is_floating(t)]
    return outputs + [logits_of(t) for t in outputs if logits_of(t) is not None]


def has_mask(y_pred: Any) -> bool:
    """Whether an output that a loss may read carries a mask, whose losses count valid steps."""
    return any(mask_of(t) is not None for t in what_losses_read(y_pred))


def _is_floating(tensor: Any) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def _times(u: Any, user: Any, rank: int) -> Any:
    if user is not None:
        user = ops.convert_to_tensor(user)
        rank = max(rank, len(user.shape))
        user = ops.cast(_expanded(user, rank), u.dtype)
    u = _expanded(u, rank)
    return u if user is None else u * user


def _expanded(tensor: Any, rank: int) -> Any:
    return ops.reshape(tensor, [*ops.shape(tensor), *[1] * (rank - len(tensor.shape))])


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


IGNORES_WEIGHTS = (
    "The loss does not depend on the sample weights, so it has no per-example losses: "
    "`{}.compute_loss` must use its `sample_weight` argument, and the model must be compiled with "
    "a `loss` (`add_loss` alone gives one number for the whole batch)."
)

NOT_LINEAR = (
    "The loss is not linear in the sample weights, so it is not a sum of per-example losses. "
    "Expected a loss with reduction='sum_over_batch_size' or 'sum' and a `compute_loss` linear in "
    "`sample_weight`. Received: loss={}."
)


def check_scalar(loss: Any) -> None:
    """Raise `ValueError` unless a batch's loss is one number."""
    if len(loss.shape) != 0:
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
