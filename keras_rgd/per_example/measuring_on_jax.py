"""Per-example gradients where D is measured, on JAX: rows by `jax.vmap` where that gives them."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.per_example.batch import Batch, takes_any_size
from keras_rgd.per_example.gradients import centered, examples_that_fit, squares_of_rows
from keras_rgd.per_example.linearized import linearized_way
from keras_rgd.per_example.measured import Measured, measured
from keras_rgd.per_example.parts import FEW, check_parts
from keras_rgd.per_example.way import Way

_SEPARATE = ("separate_rows", "separate_gram", "separate_products")


def choose_measuring_way(
    model: keras.Model,
    batch: Batch,
    training: bool,
    per_example: str,
    chunk_size: int | None,
    precise: bool,
) -> Way:
    """The `Way` of `measuring.way_for`, whose arguments these are."""
    del precise
    weights = model.trainable_variables
    chunk_size = chunk_size or examples_that_fit(weights)
    way = linearized_way(model, training, chunk_size)
    block = min(chunk_size, batch.size)

    return measured(model, weights, way, None, functools.partial(MeasuredOnJax, block), _SEPARATE)


def check_smaller_batches(model: keras.Model, batch: Batch) -> None:
    """Raise `NotExactError` where the loss of an example is another in a smaller batch.

    By numbers alone, of the examples that are there.

    Args:
        model: a compiled, built model, looked at in evaluation mode.
        batch: a `Batch` of some examples, two at least.
    """
    if takes_any_size(model):
        batch = batch.first(FEW)
    check_parts(model, batch, linearized_way(model, training=False))


class MeasuredOnJax(Measured):
    """As `Measured`; its rows are those of each example alone where these are the batch's.

    The gradient of each example alone, by `jax.vmap`, costs one pass over the examples; that of
    each in its batch, N. So the former are taken where they are the latter, see
    `Linearized.separate_rows`.

    Args:
        block: how many examples' gradients are held at once.
        *others: as in `Measured`.
    """

    def __init__(self, block: int, *others: Any):
        super().__init__(*others)
        self._block = block

    def rows(self) -> Vector:
        rows, wrong = self._run("separate_rows")
        return super().rows() if wrong else rows

    def squares(self, center: Vector) -> Tensor:
        return sum(squares_of_rows(rows) for rows in centered(self.rows(), center, 1.0))

    def gram(self, center: Vector | None = None, unit: Any = 1.0) -> Tensor:
        n, block, unit = self.n_examples, self._block, ops.cast(unit, self.dtype)
        if block >= n:
            gram, wrong = self._run("separate_gram", center, unit)
            return super().gram(center, unit) if wrong else gram
        gram = np.empty((n, n), self.dtype)
        starts = [min(start, n - block) for start in range(0, n, block)]
        for i, a in enumerate(starts):
            for b in starts[i:]:
                part, wrong = self._run("separate_products", a, b, center, unit)
                if wrong:
                    return super().gram(center, unit)
                gram[a : a + block, b : b + block] = part
                gram[b : b + block, a : a + block] = np.transpose(part)
        return ops.convert_to_tensor(gram)
