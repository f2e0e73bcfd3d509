"""D over a whole data set: its spectrum, its rank, its trace.

D(x) of the paper is over all N examples, and has d x d entries. Its rank is at most N - 1, and the
published measurement (Chaudhari and Soatto, arXiv 1710.11029) found it far below that.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import keras
import numpy as np

from keras_rgd import per_example as ways
from keras_rgd._support import arguments
from keras_rgd._support.batches import Batches
from keras_rgd.dataset_spectrum import methods
from keras_rgd.dataset_spectrum.passes import Passes
from keras_rgd.per_example.measuring import as_batch, check_smaller_batches, way_for
from keras_rgd.records import Spectrum
from keras_rgd.records import values as values_of

METHODS = ("auto", "gram", "covariance", "iterative")

# What "auto" spends on all eigenvalues: rows of a matrix to decompose (13,338 take a minute on two
# cores), multiply-adds, blocks of a Gram matrix, each a pass over the examples after it.
_LARGEST_MATRIX = 30_000
_MOST_WORK = 1e14
_MOST_BLOCKS = 20

# What "iterative" finds where the caller does not say, and what is kept of a whole spectrum.
_LEADING, _KEPT = 32, 4096


def spectrum(
    model: keras.Model,
    data: Any,
    *,
    k: int | None = None,
    examples: int | None = None,
    batch_size: int = 128,
    training: bool = False,
    per_example: str = "auto",
    seed: int = 0,
    method: str = "auto",
    memory_limit: int = 6 * 2**30,
    verbose: bool = True,
) -> Spectrum:
    """The spectrum of D over a whole data set, Eq. (2) of the paper, streamed in batches.

    The model is left as it was. Three methods, all on per-example gradients:

    - "gram": the N x N matrix K = (1/N) H G G^T H, which has D's nonzero eigenvalues. The
      gradients of as many examples as fit in `memory_limit` stay in memory while the others
      stream by. All min(N, d) eigenvalues.
    - "covariance": D itself, d x d, accumulated batch by batch. All min(N, d) eigenvalues.
    - "iterative": the k leading eigenvalues by SciPy's ARPACK, each product with D one pass over
      the data. It keeps about 5 k vectors of length d, in float64.

    "auto" takes the cheaper of the first two by counted work, of those that fit in `memory_limit`
    and are not out of reach (a matrix of 30,000 rows, 1e14 multiply-adds, 20 blocks); else
    "iterative". In each the trace is exact.

    Args:
        model: any compiled `keras.Model`, whatever its optimizer.
        data: a tuple `(x, y)` or `(x, y, sample_weight)` of arrays, a batched `tf.data.Dataset`
            or a `keras.utils.PyDataset`. Data sets are read in several passes, which must give
            the same examples.
        k: how many leading eigenvalues to return, at most min(N, d). Defaults to `None`: all that
            the method finds, up to 4,096; by "iterative" 32.
        examples: how many examples to take: of arrays drawn without replacement, of data sets the
            first. Defaults to `None`, all.
        batch_size: how many examples are differentiated together; it changes no number in
            evaluation mode. Methods "gram" and "covariance" hold their gradients, 4 d bytes an
            example. Defaults to `128`.
        training: `True` for layers in training mode, in batches of `batch_size`: with
            BatchNormalization and Dropout D then depends on them. Defaults to `False`, evaluation
            mode, as in arXiv 1710.11029.
        per_example: as in `diffusion_matrix`. Defaults to `"auto"`.
        seed: of the examples drawn and of the vector that "iterative" starts from. Defaults to
            `0`.
        method: "gram", "covariance", "iterative" or "auto". Defaults to `"auto"`.
        memory_limit: what the method may hold beside the data and one batch's work, in bytes.
            Defaults to 6 GiB.
        verbose: whether to show progress bars. Defaults to `True`.

    Returns:
        A `Spectrum`.

    Raises:
        ValueError: an argument is not what is described here; the method asked for would not fit;
            gradients are not finite; or the loss of an example depends on the batch it is in.
        RuntimeError: "iterative" does not converge.
    """
    started = time.perf_counter()
    _check_counts(k=k, examples=examples, batch_size=batch_size, memory_limit=memory_limit)
    arguments.check_way(per_example)
    arguments.check_training(training)
    arguments.check_model(model)
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, METHODS))}. Received: method={method!r}"
        )
    batches = Batches(data, examples=examples, batch_size=batch_size, seed=seed)
    # One example alone does not show what depends on others.
    first = as_batch(model, *batches.first(max(batch_size, 2)))
    way = way_for(model, first, training=training, per_example=per_example, precise=False)
    if first.size > 1:
        check_smaller_batches(model, first)
    passes = Passes(model, batches, way, training, verbose)
    if k is not None and k > min(passes.n, passes.d):
        raise ValueError(
            f"D has at most min(N, d) = {min(passes.n, passes.d)} eigenvalues that differ from 0. "
            f"Received: k={k}"
        )
    plan = _Plan(passes, min(batch_size, passes.n), k, memory_limit)
    method = plan.method if method == "auto" else method
    plan.check(method)
    passes.first_pass()
    if method == "gram":
        found = methods.gram(passes, plan.block)
    elif method == "covariance":
        found = methods.covariance(passes)
    else:
        found = methods.iterative(passes, plan.leading, seed)
    whole, kept = method != "iterative", _KEPT if k is None else k
    return Spectrum(
        **values_of.dataset_eigenvalues(found.eigenvalues, found.trace, passes.n, passes.d, whole),
        eigenvalues=found.eigenvalues[:kept].copy(),
        residuals=found.residuals[:kept].copy(),
        gradient_norm=float(np.linalg.norm(passes.v)),
        noise_scale=values_of.noise_scale(passes.n, found.trace, float(passes.mean @ passes.mean)),
        n_examples=passes.n,
        n_weights=passes.d,
        mode="training" if training else "evaluation",
        method=method,
        per_example=passes.way,
        products_dtype=passes.dtype.name,
        seconds=time.perf_counter() - started,
    )


def _check_counts(**counts):
    for name, value in counts.items():
        optional = name in ("k", "examples")
        if not (arguments.is_count(value) or (optional and value is None)):
            allowed = "a positive integer" + (" or None" if optional else "")
            raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}")


class _Plan:
    """What each method would take, in multiply-adds and in bytes."""

    def __init__(self, passes, batch_size, k, memory_limit):
        n, d = passes.n, passes.d
        self._n, self._d, self._limit = n, d, memory_limit
        entry = np.dtype(ways.working_dtype(passes.weights)).itemsize
        gram = functools.partial(methods.gram_bytes, n, d, batch_size, entry)
        room = max(memory_limit - gram(), 0) // (entry * d)
        # Whole batches, so that none is cut.
        self.block = min(max(room // batch_size, 1) * batch_size, n)
        self.leading = min(_LEADING, n, max(d - 1, 1)) if k is None else k
        self.bytes = {
            "gram": gram(block=min(batch_size, n)),
            "covariance": methods.covariance_bytes(d, batch_size, entry),
            "iterative": methods.iterative_bytes(d, batch_size, entry, self.leading),
        }
        self._work = {"gram": n * n * d + n**3, "covariance": n * d * d + d**3}

    @property
    def method(self):
        """The cheapest of the methods that find all eigenvalues, or "iterative"."""
        rows = {"gram": self._n, "covariance": self._d}
        blocks = {"gram": self._n / self.block, "covariance": 1}
        possible = [
            name
            for name in rows
            if rows[name] <= _LARGEST_MATRIX
            and self._work[name] <= _MOST_WORK
            and blocks[name] <= _MOST_BLOCKS
            and self.bytes[name] <= self._limit
        ]
        return min(possible, key=self._work.get, default="iterative")

    def check(self, method):
        """Raise `ValueError`, with the figures, where a method would not fit or not converge."""
        if method == "iterative" and self.leading >= self._d:
            raise ValueError(
                f"method='iterative' finds fewer than d = {self._d} eigenvalues, and "
                f"{self.leading} are wanted. Write method='covariance'."
            )
        if self.bytes[method] <= self._limit:
            return
        need = ", ".join(f"{name} {b / 2**30:.3g} GiB" for name, b in self.bytes.items())
        raise ValueError(
            f"method={method!r} does not fit: for N = {self._n:,} examples and d = {self._d:,} "
            f"weights the methods need {need}. Received: memory_limit="
            f"{self._limit / 2**30:.3g} GiB. Take fewer `examples`, a smaller `batch_size` or `k`, "
            "or raise `memory_limit` (bytes)."
        )
