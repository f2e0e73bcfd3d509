"""A batch of examples: its inputs, targets and sample weights, which travel together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rgd._support.backends import spec_of
from keras_rgd._support.batches import as_array, check_dense, check_lengths


class Batch(NamedTuple):
    """N examples. A tuple: `x, y, sample_weight = batch`.

    Each part is a tensor, a nested structure of tensors with the examples along axis 0 of each, or
    `None` where there is none; or of the same structure a spec of each tensor.

    Attributes:
        x: the inputs.
        y: the targets.
        sample_weight: the weights of the examples in the loss, class weights included.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None

    @classmethod
    def of_arrays(cls, x: Any, y: Any = None, sample_weight: Any = None) -> Batch:
        """A batch of tensors, of the dtypes that `fit` would use.

        Args:
            x: inputs: arrays or tensors, dense and of one length along axis 0.
            y: targets, likewise. Defaults to `None`.
            sample_weight: likewise. Defaults to `None`.

        Raises:
            ValueError: they are not of one positive length, or not dense.
        """
        check_dense(x, y, sample_weight)
        check_lengths(x, y, sample_weight)
        return cls(x, y, sample_weight).mapped(_tensor)

    @property
    def size(self) -> Any:
        """N: an int where it is known, else (inside a graph) a scalar tensor."""
        known = self.known_size
        return ops.shape(self._first)[0] if known is None else known

    @property
    def known_size(self) -> int | None:
        """N where the trace (or a spec) tells it, else `None`."""
        return self._first.shape[0] if len(self._first.shape or ()) else None

    @property
    def signature(self) -> tuple:
        """What a trace depends on of a batch: shapes and dtypes, hashable."""
        leaves = keras.tree.flatten(tuple(self))
        return tuple(None if t is None else (str(t.shape), t.dtype) for t in leaves)

    def specs(self) -> Batch:
        """The same with the shape and dtype of each tensor in its place."""
        return self.mapped(spec_of)

    @property
    def _first(self) -> Any:
        return next(t for t in keras.tree.flatten(self.x) if t is not None)

    def tensors(self) -> list:
        """All that is not `None`, a flat list."""
        return [t for t in keras.tree.flatten(tuple(self)) if t is not None]

    def mapped(self, function: Callable) -> Batch:
        """`function` of each tensor; `None` stays."""
        return Batch(*(mapped(function, part) for part in self))

    def first(self, n: int) -> Batch:
        """The first n examples."""
        return self.part(0, n)

    def part(self, start: int, end: int) -> Batch:
        """The examples from `start` to before `end`."""
        return self.mapped(lambda t: t[start:end])


def mapped(function: Callable, *trees: Any) -> Any:
    """`function` of each leaf of structures of tensors; `None` stays."""
    return keras.tree.map_structure(lambda *t: None if t[0] is None else function(*t), *trees)


def takes_any_size(model: keras.Model) -> bool:
    """Whether a model takes batches of any size, so that a few examples will do."""
    return all(t.shape[0] is None for t in getattr(model, "inputs", None) or [])


def _tensor(value: Any) -> Any:
    is_tensor = keras.ops.is_tensor(value)
    tensor = ops.convert_to_tensor(value if is_tensor else as_array(value))
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
    return ops.cast(tensor, keras.config.floatx()) if is_float else tensor
