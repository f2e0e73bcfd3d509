"""A way to per-example gradients: what makes them for a model, and why it was chosen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_rgd._support import vectors
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.gradients import PerExampleGradients, working_dtype
from keras_rgd.per_example.layerwise import Layerwise
from keras_rgd.per_example.layerwise.options import LayerwiseOptions
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.microbatches import Microbatches
from keras_rgd.per_example.state import changeable
from keras_rgd.per_example.vectorized_map import VectorizedMap, rows_function, vectorized

# One chunk of gradients is held in memory; this is what it may take, in bytes.
_CHUNK_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Way:
    """What makes per-example gradients for a model, and why this one.

    `way(batch, loss_scale)` gives the `PerExampleGradients` of a `Batch`. The loss scale keeps
    half-precision gradients in range and cancels; it is 1 by default.

    Attributes:
        name: "layerwise", "double_backward", "vectorized_map", or where D is measured also
            "one_by_one"; as in `per_example=`.
        reason: why it was chosen, a clause.
        make: the function of a batch and a loss scale.
    """

    name: str
    reason: str
    make: Callable[..., PerExampleGradients] = dataclasses.field(repr=False)

    def __call__(self, batch: Batch, loss_scale: Any = 1.0) -> PerExampleGradients:
        return self.make(batch, loss_scale)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def layerwise(losses: ExampleLosses, options: LayerwiseOptions, reason: str) -> Way:
    """The way "layerwise", for a model that `check_layerwise` has passed."""
    make = functools.partial(Layerwise, losses, options=options)
    return Way("layerwise", reason, make)


def double_backward(losses: ExampleLosses, reason: str, chunk_size: int | None = None) -> Way:
    """The way "double_backward", for any model.

    Args:
        losses: the `ExampleLosses` of a model.
        reason: why it was chosen.
        chunk_size: examples whose gradients its Gram matrix may hold at once. Defaults to `None`,
            all.
    """
    make = functools.partial(DoubleBackward, losses, chunk_size=chunk_size)
    return Way("double_backward", reason, make)


def vectorized_map(
    losses: ExampleLosses, reason: str, chunk_size: int | None = None, compiled: bool = False
) -> Way:
    """The way "vectorized_map", for a model that `check_vectorized_map` has passed.

    Args:
        losses: the `ExampleLosses` of a model.
        reason: why it was chosen.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, all.
        compiled: whether the caller compiles what it traces with XLA. Defaults to `False`.
    """
    rows = rows_function(losses, vectorized, compiled)
    make = functools.partial(VectorizedMap, losses, chunk_size=chunk_size, rows=rows)
    return Way("vectorized_map", reason, make)


def in_microbatches(losses: ExampleLosses, way: Way, size: int) -> Way:
    """A way for whole batches that takes them in pieces of `size` examples by another way."""
    state = changeable(losses.model)
    make = functools.partial(Microbatches, losses, way=way, state=state, size=int(size))
    return Way(way.name, way.reason, make)


def examples_that_fit(losses: ExampleLosses) -> int:
    """How many examples' gradients fit in the memory that is meant for them."""
    weights = losses.weights
    entry = np.dtype(working_dtype(weights)).itemsize
    return max(1, _CHUNK_BYTES // (entry * vectors.size(weights)))
