"""D over a whole data set: its spectrum, its rank, its trace.

D(x) of the paper is over all N examples, and has d x d entries. Its rank is at most N - 1, and the
published measurement (Chaudhari and Soatto, arXiv 1710.11029) found it far below that.
"""

import dataclasses
import math
import time

import numpy as np

from keras_rgd import per_example as ways
from keras_rgd import spectrum_methods
from keras_rgd._support import arguments
from keras_rgd._support.batches import Batches
from keras_rgd.diffusion_matrix import FLOAT32_EPSILON, LARGEST_RELATIVE_CUT
from keras_rgd.measurement import mean_std, noise_scale
from keras_rgd.per_example.measuring import as_batch, way_for
from keras_rgd.records import load_json, plain, revived, save_json

METHODS = ("auto", "gram", "covariance", "iterative")

# What "auto" spends on all eigenvalues: rows of a matrix to decompose (13,338 take a minute on two
# cores), multiply-adds, blocks of a Gram matrix, each a pass over the examples after it.
_LARGEST_MATRIX = 30_000
_MOST_WORK = 1e14
_MOST_BLOCKS = 20

# What "iterative" finds where the caller does not say, and what is kept of a whole spectrum.
_LEADING, _KEPT = 32, 4096

_KEY, _VERSION = "keras_rgd_spectrum", 1


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """D of a model over a data set of N examples.

    "Squared gradient" is the unit of eigenvalues: the loss's unit over the weights', squared.
    """

    eigenvalues: np.ndarray  # (k,), float64, descending, squared gradient
    residuals: np.ndarray  # (k,), |D u - lambda u| of each, squared gradient; 0 of a dense solver
    lambda_max: float  # squared gradient
    trace: float  # tr D, exact also where only the leading eigenvalues are known
    rank: int  # eigenvalues above rank_cut
    rank_is_lower_bound: bool  # of the leading eigenvalues all are above it; there may be more
    rank_cut: float  # by rank_rule, squared gradient
    rank_rule: str  # "reference", lambda_max d eps32 as in arXiv 1710.11029; else "gram", N for d
    rank_bound: int  # min(N - 1, d), Eq. (3) of the paper
    eigenvalue_mean: float  # over all d, tr D / d
    eigenvalue_std: float  # over all d; NaN where not all eigenvalues are known
    clipped_mean: float  # over all d, from below at rank_cut; NaN where the rank is a lower bound
    clipped_std: float  # likewise
    gradient_norm: float  # |v|, v the gradient of the loss over the data set
    noise_scale: float  # tr S / |G|^2, unbiased (arXiv 1812.06162), in examples; NaN if |G|^2 <= 0
    n_examples: int  # N
    n_weights: int  # d
    mode: str  # "evaluation" or "training"
    method: str  # "gram", "covariance" or "iterative"
    per_example: str  # how the gradients were had
    seconds: float

    def __post_init__(self):
        self.eigenvalues.flags.writeable = False
        self.residuals.flags.writeable = False

    @property
    def rank_percent(self):
        """The rank in percent of d, as the literature gives it."""
        return 100 * self.rank / self.n_weights

    def save(self, path):
        """Write it to a JSON file, whole or not at all.

        Raises:
            FileNotFoundError: the file's folder does not exist.
        """
        save_json({_KEY: _VERSION, "spectrum": {k: plain(v) for k, v in vars(self).items()}}, path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no spectrum, or one of another version of this package.
        """
        content = load_json(path, _KEY, _VERSION, writer="Spectrum.save")
        return revived(cls, content.get("spectrum", {}), path)


def spectrum(
    model,
    data,
    *,
    k=None,
    examples=None,
    batch_size=128,
    training=False,
    per_example="auto",
    seed=0,
    method="auto",
    memory_limit=6 * 2**30,
    verbose=True,
):
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
    ways.check_model(model)
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, METHODS))}. Received: method={method!r}"
        )
    batches = Batches(data, examples=examples, batch_size=batch_size, seed=seed)
    # One example alone does not show what depends on others.
    first = as_batch(model, *batches.first(max(batch_size, 2)))
    way = way_for(model, first, training, per_example, None, precise=False)
    if first.size > 1:
        ways.check_smaller_batches(ways.ExampleLosses(model, training=False), first)
    passes = spectrum_methods.Passes(model, batches, way, training, verbose)
    if k is not None and k > min(passes.n, passes.d):
        raise ValueError(
            f"D has at most min(N, d) = {min(passes.n, passes.d)} eigenvalues that differ from 0. "
            f"Received: k={k}"
        )
    plan = _Plan(passes, min(batch_size, passes.n), k, memory_limit)
    method = plan.method if method == "auto" else method
    plan.check(method)
    if method == "gram":
        found = spectrum_methods.gram(passes, plan.block)
    elif method == "covariance":
        found = spectrum_methods.covariance(passes)
    else:
        found = spectrum_methods.iterative(passes, plan.leading, seed)
    v, mean = passes.means
    return Spectrum(
        **_values(found, passes, whole=method != "iterative", k=_KEPT if k is None else k),
        gradient_norm=float(np.linalg.norm(v)),
        noise_scale=noise_scale(passes.n, found.trace, float(mean @ mean)),
        n_examples=passes.n,
        n_weights=passes.d,
        mode="training" if training else "evaluation",
        method=method,
        per_example=passes.way,
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
        # A batch's gradients by weight, as one array, and in TensorFlow's hands.
        batch = 3 * batch_size * d * entry
        gram = 2 * 8 * n * n + batch
        room = max(memory_limit - gram, 0) // (entry * d)
        # Whole batches, so that none is cut.
        self.block = min(max(room // batch_size, 1) * batch_size, n)
        self.leading = min(_LEADING, n, max(d - 1, 1)) if k is None else k
        trace_rows = entry * d * min(max(spectrum_methods.ROW_BYTES // (entry * d), 1), batch_size)
        krylov = spectrum_methods.krylov_size(self.leading, d)
        self.bytes = {
            "gram": gram + entry * d * min(batch_size, n),
            "covariance": entry * d * (d + spectrum_methods.ROWS) + batch,
            "iterative": 8 * d * (krylov + 3 * self.leading) + 3 * trace_rows,
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


def _values(found, passes, whole, k):
    """The fields of a record that follow from the eigenvalues."""
    n, d, eigenvalues = passes.n, passes.d, found.eigenvalues
    lambda_max = float(eigenvalues[0])
    by_d = d * FLOAT32_EPSILON < LARGEST_RELATIVE_CUT
    cut = lambda_max * FLOAT32_EPSILON * (d if by_d else min(n, d))
    rank = int(np.count_nonzero(eigenvalues > cut))
    open_ended = not whole and rank == len(eigenvalues)
    clipped = (math.nan, math.nan)
    if not open_ended:
        clipped = mean_std(np.maximum(eigenvalues, cut), d, rest=cut)
    return {
        "eigenvalues": eigenvalues[:k].copy(),
        "residuals": found.residuals[:k].copy(),
        "lambda_max": lambda_max,
        "trace": found.trace,
        "rank": rank,
        "rank_is_lower_bound": open_ended,
        "rank_cut": cut,
        "rank_rule": "reference" if by_d else "gram",
        "rank_bound": min(n - 1, d),
        "eigenvalue_mean": found.trace / d,
        "eigenvalue_std": mean_std(eigenvalues, d)[1] if whole else math.nan,
        "clipped_mean": clipped[0],
        "clipped_std": clipped[1],
    }
