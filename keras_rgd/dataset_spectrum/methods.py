"""Three methods for the spectrum of D over a data set that is streamed in batches, and their costs.

Each has a function that says what it would hold beside the data, in bytes, of which the plan in
`spectrum.py` chooses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from keras_rgd._support import centring, rounding
from keras_rgd.dataset_spectrum.passes import Passes, rows_of_trace

# Rows that enter the d x d matrix together: enough for a matrix product to pay.
_ROWS = 2048

# Columns of it that are updated together. BLAS's own product for this, syrk, ends in a segmentation
# fault with OpenBLAS 0.3.30 from some d of 24,000 on.
_COLUMNS = 2048

# ARPACK's residuals relative to each eigenvalue.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """What a method finds of the spectrum."""

    eigenvalues: np.ndarray  # (k,), descending, float64, squared gradient
    residuals: np.ndarray  # (k,), |D v - lambda v| of the vectors found; 0 of a dense solver
    trace: float  # squared gradient


def _batch_bytes(d, batch_size, entry):
    # A batch's gradients by weight, as one array, and in the backend's hands.
    return 3 * batch_size * d * entry


def gram_bytes(n: int, d: int, batch_size: int, entry: int, block: int = 0) -> int:
    """What `gram` holds for N examples with entries of `entry` bytes, and a block of their rows."""
    return 2 * 8 * n * n + _batch_bytes(d, batch_size, entry) + entry * d * block


def gram(passes: Passes, block: int) -> Eigenvalues:
    """All min(N, d) eigenvalues from K = (1/N) H G G^T H, N x N.

    The rows of `block` examples are in memory while those after them stream by.
    """
    n = passes.n
    k = np.empty((n, n))
    for start in range(0, n, block):
        end = min(start + block, n)
        held: Any = None  # an array from the first rows on
        at = start
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
    centring.center_in_place(k)
    k /= n
    return _all_eigenvalues(passes, k, np.trace(k))


def covariance_bytes(d: int, batch_size: int, entry: int) -> int:
    """What `covariance` holds, as in `gram_bytes`."""
    return entry * d * (d + _ROWS) + _batch_bytes(d, batch_size, entry)


def covariance(passes: Passes) -> Eigenvalues:
    """All min(N, d) eigenvalues from D itself, d x d."""
    d = passes.d
    D = np.zeros((d, d), passes.dtype, order="F")
    buffer, filled, trace = np.empty((min(_ROWS, passes.n), d), D.dtype), 0, 0.0

    def add(rows):
        # The lower triangle, for LAPACK, of which D.T holds the columns as rows.
        for start in range(0, d, _COLUMNS):
            block = slice(start, start + _COLUMNS)
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
    if not _differ(passes, trace):
        zeros = np.zeros(min(passes.n, passes.d))
        return Eigenvalues(zeros, zeros.copy(), float(trace))
    options = dict(lower=True, overwrite_a=True, check_finite=False)
    with passes.progress(f"eigenvalues of a matrix {len(matrix):,} x {len(matrix):,}", None):
        eigenvalues = scipy.linalg.eigvalsh(matrix, **options)
    descending = np.maximum(eigenvalues[::-1][: min(passes.n, passes.d)], 0).astype(np.float64)
    return Eigenvalues(descending, np.zeros(len(descending)), float(trace))


def iterative_bytes(d: int, batch_size: int, entry: int, k: int) -> int:
    """What `iterative` holds for k eigenvalues, as in `gram_bytes`."""
    trace_rows = entry * d * rows_of_trace(entry, d, batch_size)
    return 8 * d * (_krylov_size(k, d) + 3 * k) + 3 * trace_rows


def iterative(passes: Passes, k: int, seed: int) -> Eigenvalues:
    """The k largest eigenvalues by ARPACK's Lanczos iteration, each product with D one pass.

    Raises:
        RuntimeError: ARPACK does not converge.
    """
    trace = passes.trace()
    if not _differ(passes, trace):
        return Eigenvalues(np.zeros(k), np.zeros(k), trace)

    def matvec(x):
        norm = np.linalg.norm(x)
        return norm * passes.products("product", np.reshape(x / norm, (-1, 1)))[:, 0]

    operator = scipy.sparse.linalg.LinearOperator((passes.d, passes.d), matvec, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(passes.d)
    size = _krylov_size(k, passes.d)
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
    products = passes.products("residuals", eigenvectors)
    products -= eigenvalues * eigenvectors
    residuals = np.linalg.norm(products, axis=0)
    return Eigenvalues(np.maximum(eigenvalues, 0), residuals, trace)


def _differ(passes, trace):
    """Whether the gradients differ by more than rounding, which alone is left of equal ones."""
    return rounding.differ(np.sqrt(trace), np.linalg.norm(passes.mean), passes.dtype)


def _krylov_size(k, d):
    """How many vectors of length d ARPACK keeps for k eigenvalues."""
    return min(max(2 * k + 1, 20), d)
