"""Three routes to the spectrum of D over a data set that is streamed in batches.

Of G, N x d, never more than some rows are in memory. The mean gradient is known from a first pass
and taken off each row before any product, which keeps the digits that centring products would
lose.
"""

import contextlib
import dataclasses
import functools

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import tensorflow as tf

from keras_rgd import per_example as ways
from keras_rgd._support import rounding, vectors
from keras_rgd._support.progress import progress_bar
from keras_rgd.diffusion_matrix import NOT_FINITE, NotFiniteError
from keras_rgd.per_example.measuring import as_batch

# Rows that enter the d x d matrix together: enough for a matrix product to pay.
ROWS = 2048

# Columns of it that are updated together. BLAS's own product for this, syrk, ends in a segmentation
# fault with OpenBLAS 0.3.30 from some d of 24,000 on.
COLUMNS = 2048

# Rows of the trace's pass that may be in memory, in bytes.
ROW_BYTES = 2**28

# More draws of random numbers than a batch has.
_DRAWS = 2**16

# ARPACK's residuals relative to each eigenvalue.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """What a route finds of the spectrum."""

    eigenvalues: np.ndarray  # (k,), descending, float64, squared gradient
    residuals: np.ndarray  # (k,), |D v - lambda v| of the vectors found; 0 of a dense solver
    trace: float  # squared gradient


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
        dtype: of the gradients, a numpy dtype; known after `means`, as `way`, their name.
    """

    def __init__(self, model, batches, way, training, verbose):
        self._model, self._batches, self._way = model, batches, way
        self._training = training
        self._verbose, self._advance = verbose, None
        self.n = batches.count
        self.weights = [w.value for w in model.trainable_variables]
        self.d = vectors.size(self.weights)

    def gradients(self, what, start=0, batch_size=None):
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
    def progress(self, what, steps, more=0):
        """One bar for what is inside, also where that makes passes of its own."""
        if self._advance is not None:
            yield self._advance
            return
        with progress_bar(what, steps, self._verbose, more) as self._advance:
            try:
                yield self._advance
            finally:
                self._advance = None

    def steps(self):
        """How many batches a pass has."""
        return self._batches.steps()

    @functools.cached_property
    def means(self):
        """(v, gbar): the gradient of the loss and its part by the examples, (d,), float64."""
        v, mean = np.zeros(self.d), np.zeros(self.d)
        for gradients in self.gradients("gradient"):
            self.dtype, self.way = np.dtype(gradients.dtype), gradients.way
            share = gradients.n_examples / self.n
            v += share * vectors.flatten(gradients.gradient)
            mean += share * vectors.flatten(gradients.mean())
        if not np.all(np.isfinite(mean)):
            raise NotFiniteError(NOT_FINITE)
        return v, mean

    def centred_rows(self, what, start=0):
        """The g_i - gbar of one batch after another, each (n, d)."""
        _, mean = self.means
        mean = mean.astype(self.dtype)
        for gradients in self.gradients(what, start):
            rows = [np.reshape(r, (gradients.n_examples, -1)) for r in gradients.rows()]
            del gradients
            rows = np.concatenate(rows, axis=1)
            rows -= mean
            yield rows
            del rows  # before the next are made

    def products(self, what, x):
        """D x, shape (d, m), for x of shape (d, m), in one pass; float64."""
        _, mean = self.means
        shift = (mean @ x).astype(self.dtype)
        v = [
            tf.constant(np.reshape(part.T, (x.shape[1], *w.shape)), self.dtype)
            for part, w in zip(np.split(x, self._ends), self.weights, strict=True)
        ]
        total, left = np.zeros((x.shape[1], self.d)), np.zeros(x.shape[1])
        for gradients in self.gradients(what):
            factors, images = gradients.images(v, shift)
            left += np.sum(factors, axis=1, dtype=np.float64)
            total += np.concatenate([np.reshape(t, (x.shape[1], -1)) for t in images], axis=1)
        # What the shift left of the mean by rounding.
        total -= np.outer(left, mean)
        return total.T / self.n

    def trace(self):
        """Tr D, from the squares of g_i - gbar, in batches small enough for their rows."""
        _, mean = self.means
        center = vectors.unflatten(mean, self.weights, self.dtype)
        few = max(ROW_BYTES // (np.dtype(self.dtype).itemsize * self.d), 1)
        size = None if self._training else min(few, self._batches.batch_size)
        squares = 0.0
        for gradients in self.gradients("trace", batch_size=size):
            squares += float(np.sum(gradients.squares(center), dtype=np.float64))
        return squares / self.n

    @property
    def _ends(self):
        return np.cumsum([w.shape.num_elements() for w in self.weights])[:-1]


def gram(passes, block):
    """All min(N, d) eigenvalues from K = (1/N) H G G^T H, N x N.

    The rows of `block` examples are in memory while those after them stream by.
    """
    n = passes.n
    passes.means  # noqa: B018  # known before there are rows
    k = np.empty((n, n))
    for start in range(0, n, block):
        end = min(start + block, n)
        held, at = None, start
        what = f"Gram matrix, examples {start:,} to {end:,} of {n:,}"
        for rows in passes.centred_rows(what, start):
            if at < end:
                if held is None:
                    held = np.empty((end - start, passes.d), passes.dtype)
                held[at - start : at - start + len(rows)] = rows
            stop = at + len(rows)
            before = slice(start, min(end, stop))
            products = held[: before.stop - start] @ rows.T
            k[before, at:stop], k[at:stop, before] = products, products.T
            at = stop
            del rows, products
    # (1, ..., 1) is an exact null vector then, so rank <= N - 1.
    k -= k.mean(0, keepdims=True)
    k -= k.mean(1, keepdims=True)
    k /= n
    return _all_eigenvalues(passes, k, np.trace(k))


def covariance(passes):
    """All min(N, d) eigenvalues from D itself, d x d."""
    passes.means  # noqa: B018  # known before there are rows
    d = passes.d
    D = np.zeros((d, d), passes.dtype, order="F")
    buffer, filled, trace = np.empty((min(ROWS, passes.n), d), D.dtype), 0, 0.0

    def add(rows):
        # The lower triangle, for LAPACK, of which D.T holds the columns as rows.
        for start in range(0, d, COLUMNS):
            block = slice(start, start + COLUMNS)
            D.T[block, start:] += (rows[:, block].T / passes.n) @ rows[:, start:]

    for rows in passes.centred_rows(f"D, {d:,} x {d:,}"):
        trace += float(np.einsum("nd,nd->n", rows, rows).sum(dtype=np.float64)) / passes.n
        for at in range(0, len(rows), len(buffer)):
            part = rows[at : at + len(buffer)]
            if filled + len(part) > len(buffer):
                add(buffer[:filled])
                filled = 0
            buffer[filled : filled + len(part)] = part
            filled += len(part)
        del rows, part
    add(buffer[:filled])
    del buffer
    return _all_eigenvalues(passes, D, trace)


def _all_eigenvalues(passes, matrix, trace):
    options = dict(lower=True, overwrite_a=True, check_finite=False)
    with passes.progress(f"eigenvalues of a matrix {len(matrix):,} x {len(matrix):,}", None):
        eigenvalues = scipy.linalg.eigvalsh(matrix, **options)
    descending = np.maximum(eigenvalues[::-1][: min(passes.n, passes.d)], 0).astype(np.float64)
    return Eigenvalues(descending, np.zeros(len(descending)), float(trace))


def iterative(passes, k, seed):
    """The k largest eigenvalues by ARPACK's Lanczos iteration, each product with D one pass.

    Raises:
        RuntimeError: ARPACK does not converge.
    """
    _, mean = passes.means
    trace = passes.trace()
    # Of equal gradients rounding alone is left.
    if np.sqrt(trace) <= rounding.noise(np.linalg.norm(mean), passes.dtype):
        return Eigenvalues(np.zeros(k), np.zeros(k), trace)

    def matvec(x):
        norm = np.linalg.norm(x)
        return norm * passes.products("product", np.reshape(x / norm, (-1, 1)))[:, 0]

    operator = scipy.sparse.linalg.LinearOperator((passes.d, passes.d), matvec, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(passes.d)
    size = krylov_size(k, passes.d)
    # A restart keeps k vectors and makes the others anew; how many there will be nobody knows.
    restart = (size - k) * passes.steps()
    what = f"{k} leading eigenvalues of D"
    with passes.progress(what, size * passes.steps() + restart, more=restart):
        try:
            eigenvalues, eigenvectors = scipy.sparse.linalg.eigsh(
                operator, k, which="LA", v0=start, ncv=size, tol=_TOLERANCE
            )
        except scipy.sparse.linalg.ArpackNoConvergence as error:
            raise RuntimeError(
                f"ARPACK found {len(error.eigenvalues)} of the {k} largest eigenvalues. Ask for "
                "fewer (k), or write method='gram' or 'covariance'."
            ) from error
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    images = passes.products("residuals", eigenvectors)
    images -= eigenvalues * eigenvectors
    residuals = np.linalg.norm(images, axis=0)
    return Eigenvalues(np.maximum(eigenvalues, 0), residuals, trace)


def krylov_size(k, d):
    """How many vectors of length d `iterative` keeps for k eigenvalues."""
    return min(max(2 * k + 1, 20), d)
