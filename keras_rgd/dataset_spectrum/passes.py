"""Passes over a data set: the gradients of its examples, one batch after another.

Of G, N x d, never more than some rows are in memory. The mean gradient is known from a first pass
and taken off each row before any product, which keeps the digits that centring products would
lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd import per_example as ways
from keras_rgd._support import vectors
from keras_rgd._support.batches import Batches
from keras_rgd._support.progress import progress_bar
from keras_rgd.diffusion_matrix import NOT_FINITE, NotFiniteError
from keras_rgd.per_example.gradients import PerExampleGradients
from keras_rgd.per_example.measuring import as_batch

# Rows of the trace's pass that may be in memory, in bytes.
_ROW_BYTES = 2**28

# More draws of random numbers than a batch has.
_DRAWS = 2**16


class Passes:
    """Per-example gradients of a data set, one batch after another, as often as wanted.

    Args:
        model: the model.
        batches: a `Batches`.
        way: the `Way` for its batches.
        training: whether layers behave as in training, so that batches must be the same in all
            passes.
        verbose: whether to show progress.

    Attributes:
        n: N.
        d: the number of trainable scalars.
        weights: the model's, a list of `tf.Variable`.
        v: the gradient of the loss over the data set, (d,), float64; known after `first_pass`, as
            are the following.
        mean: gbar, v less the gradient of r, likewise.
        dtype: of the gradients, a numpy dtype.
        way: how they were had.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: Batches,
        way: ways.Way,
        training: bool,
        verbose: bool,
    ):
        self._model, self._batches, self._way = model, batches, way
        self._training = training
        self._verbose, self._advance = verbose, None
        self.n = batches.count
        self.weights = [w.value for w in model.trainable_variables]
        self.d = vectors.size(self.weights)

    def gradients(
        self, what: str, start: int = 0, batch_size: int | None = None
    ) -> Iterator[PerExampleGradients]:
        """`PerExampleGradients` of one batch after another, from example `start` on."""
        seeds = [generator.state for generator in ways.seed_generators(self._model)]
        before = [seed.numpy() for seed in seeds]
        draws = np.array([0, _DRAWS], np.uint32)
        first = start // self._batches.batch_size
        try:
            with self.progress(what, self._batches.steps(start, batch_size)) as advance:
                for i, batch in enumerate(self._batches.after(start, batch_size), first):
                    # Each batch draws random numbers of its own, in each pass the same.
                    for seed, value in zip(seeds, before, strict=True):
                        seed.assign(value + np.uint32(i) * draws)
                    yield self._way(as_batch(self._model, *batch))
                    advance()
        finally:
            for seed, value in zip(seeds, before, strict=True):
                seed.assign(value)

    @contextlib.contextmanager
    def progress(self, what: str, steps: int | None, more: int = 0) -> Iterator[Any]:
        """One bar for what is inside, also where that makes passes of its own."""
        if self._advance is not None:
            yield self._advance
            return
        with progress_bar(what, steps, self._verbose, more) as self._advance:
            try:
                yield self._advance
            finally:
                self._advance = None

    def steps(self) -> int:
        """How many batches a pass has."""
        return self._batches.steps()

    def first_pass(self) -> None:
        """Set `v`, `mean`, `dtype` and `way`, which all other passes need.

        Raises:
            NotFiniteError: gradients are not finite.
        """
        self.v, self.mean = np.zeros(self.d), np.zeros(self.d)
        for gradients in self.gradients("gradient"):
            self.dtype, self.way = np.dtype(gradients.dtype), gradients.way
            share = gradients.n_examples / self.n
            self.v += share * vectors.flatten(gradients.gradient)
            self.mean += share * vectors.flatten(gradients.mean())
        if not np.all(np.isfinite(self.mean)):
            raise NotFiniteError(NOT_FINITE)

    def centred_rows(self, what: str, start: int = 0) -> Iterator[np.ndarray]:
        """The g_i - gbar of one batch after another, each (n, d)."""
        mean = self.mean.astype(self.dtype)
        for gradients in self.gradients(what, start):
            parts = [np.reshape(r, (gradients.n_examples, -1)) for r in gradients.rows()]
            del gradients
            rows = np.concatenate(parts, axis=1)
            del parts
            rows -= mean
            yield rows
            del rows  # before the next are made

    def products(self, what: str, x: np.ndarray) -> np.ndarray:
        """D x, shape (d, m), for x of shape (d, m), in one pass; float64.

        A `DiffusionMatrix` has all examples in one batch; here H is applied by the mean that the
        first pass found. tests/test_one_mathematics.py holds the spectra equal.
        """
        shift = (self.mean @ x).astype(self.dtype)
        v = [
            ops.convert_to_tensor(np.reshape(part.T, (x.shape[1], *w.shape)), self.dtype.name)
            for part, w in zip(np.split(x, self._ends), self.weights, strict=True)
        ]
        total, left = np.zeros((x.shape[1], self.d)), np.zeros(x.shape[1])
        for gradients in self.gradients(what):
            factors, sums = gradients.images(v, shift)
            left += np.sum(np.asarray(factors), axis=1, dtype=np.float64)
            total += np.concatenate([np.reshape(t, (x.shape[1], -1)) for t in sums], axis=1)
        # What the shift left of the mean by rounding.
        total -= np.outer(left, self.mean)
        return total.T / self.n

    def trace(self) -> float:
        """tr D, from the squares of g_i - gbar, in batches small enough for their rows."""
        center = vectors.unflatten(self.mean, self.weights, self.dtype.name)
        few = rows_of_trace(self.dtype.itemsize, self.d, self._batches.batch_size)
        size = None if self._training else few
        squares = 0.0
        for gradients in self.gradients("trace", batch_size=size):
            squares += float(np.sum(np.asarray(gradients.squares(center)), dtype=np.float64))
        return squares / self.n

    @property
    def _ends(self):
        return np.cumsum([vectors.size([w]) for w in self.weights])[:-1]


def rows_of_trace(entry: int, d: int, batch_size: int) -> int:
    """How many examples' rows the trace's pass forms at once, for entries of so many bytes."""
    return min(max(_ROW_BYTES // (entry * d), 1), batch_size)
