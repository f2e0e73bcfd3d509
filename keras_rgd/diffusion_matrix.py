"""The diffusion matrix D of one batch, on per-example gradients.

D = (1/N) G^T H G, Eq. (2) of the paper, with the rows of G the per-example gradients and
H = I - 11^T/N. It has d x d entries and is never formed: K = (1/N) H G G^T H, N x N, has the same
nonzero eigenvalues, and products with D go through the examples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from keras import ops

from keras_rgd._support import arguments, centring, rounding, vectors
from keras_rgd._support.rounding import machine_epsilon
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.per_example.gradients import PerExampleGradients

# Above this the reference's cut lambda_max * d * eps32 is a sizeable part of lambda_max itself.
LARGEST_RELATIVE_CUT = 0.05

NOT_FINITE = (
    "The gradients of these examples are not finite (NaN or infinite), so D has no spectrum. Has "
    "the training diverged? Expected finite weights and data."
)


@dataclasses.dataclass(frozen=True)
class Product:
    """D v kept as factors, so that none of them leaves the range of the dtype.

    D v = norm * size * alpha * direction. With v / |v| = w: size = sqrt(w^T D w) and
    alpha**2 = |D w|^2 / w^T D w, at most the largest eigenvalue.
    """

    norm: Tensor  # |v|, ()
    size: Tensor  # |H G w| / sqrt(N), in units of a gradient, ()
    alpha: Tensor  # in units of a gradient, ()
    direction: Vector  # of norm 1, or 0; shaped as the weights
    examples: Tensor | None = None  # H G w normalised, (N,), where it is kept

    @property
    def unit(self) -> Tensor:
        """A positive number of the order of the square root of D's eigenvalues."""
        return ops.where(self.alpha > 0, self.alpha, ops.ones_like(self.alpha))


class NotFiniteError(ValueError):
    """Gradients are NaN or infinite, so their D has no spectrum."""


class DiffusionMatrix:
    """D of one batch as an operator, with its spectrum.

    Products work on tensors, also inside a graph. What returns numpy arrays computes in float64
    from the N x N matrix and works outside a graph only.

    Args:
        gradients: the batch's `PerExampleGradients`.
    """

    def __init__(self, gradients: PerExampleGradients):
        self.gradients = gradients
        self._eigen: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self.n_weights, self.n_weights)

    @property
    def n_examples(self) -> int | Tensor:
        """N."""
        return self.gradients.n_examples

    @property
    def n_weights(self) -> int:
        """d, the number of trainable scalars."""
        return vectors.size(self.gradients.weights)

    def matvec(self, v: Vector) -> Vector:
        """D v = (1/N) sum_i (k_i - mean k) g_i with k = G v, Eq. (2) applied to v.

        Args:
            v: a list of tensors shaped as the weights.

        Returns:
            A list of tensors shaped as the weights.

        Raises:
            ValueError: v is not shaped as the weights.
        """
        product = self.factored_product(self.vector(v))
        return vectors.scale(product.direction, product.norm * product.size * product.alpha)

    def factored_product(self, v: Vector) -> Product:
        """D v as a `Product`, for v a list of tensors shaped as the weights."""
        norm = vectors.norm(v)
        centred, noise = self.to_examples([ops.divide_no_nan(x, norm) for x in v])
        length = vectors.norm([centred], noise)  # no smaller than that, or 0
        examples = ops.divide_no_nan(centred, length)
        pulled = self.to_weights(examples)
        alpha = vectors.norm(pulled, length)  # alpha >= length
        return Product(
            norm=norm,
            size=length,
            alpha=alpha,
            direction=[ops.divide_no_nan(x, alpha) for x in pulled],
            examples=examples,
        )

    def to_examples(self, v: Vector) -> tuple[Tensor, Tensor]:
        """F v for D = F^T F, F = H G / sqrt(N), shape (N,); and how long the rounding in it is."""
        k = self.gradients.dot(v)
        centred, noise = rounding.above_noise(centring.centred(k), vectors.largest_of(k))
        return centred / self._root_n, noise

    def to_weights(self, u: Tensor) -> Vector:
        """F^T u for D = F^T F, F = H G / sqrt(N), a list of tensors shaped as the weights."""
        # Without H the mean gradient would enter by the rounding in u.
        return vectors.scale(self.gradients.combine(centring.centred(u)), 1 / self._root_n)

    @property
    def _root_n(self) -> Tensor:
        # A batch without examples has D = 0.
        return ops.sqrt(ops.maximum(ops.cast(self.n_examples, self.gradients.dtype), 1))

    def gram(self) -> np.ndarray:
        """<g_i, g_j>, shape (N, N), a numpy array of the weights' dtype, neither centred nor /N."""
        return ops.convert_to_numpy(self.gradients.gram())

    def centered_gram(self) -> np.ndarray:
        """K = (1/N) H G G^T H, shape (N, N), numpy float64: D's nonzero eigenvalues."""
        return self._spectral()[2]

    def eigenvalues(self) -> np.ndarray:
        """All min(N, d) eigenvalues that can differ from 0, descending, numpy float64.

        In squared-gradient units. Relative to the largest they are known to about the epsilon of
        the weights' dtype.
        """
        return self._spectral()[0].copy()

    def eigenvectors(self, k: int) -> Vector:
        """The k leading eigenvectors of D, normalised.

        Args:
            k: how many, at most the number of positive eigenvalues.

        Returns:
            A list of tensors of shape (k, *weight shape).
        """
        eigenvalues, examples, _ = self._spectral()
        positive = np.count_nonzero(eigenvalues > 0)
        if not arguments.is_count(k) or k > positive:
            raise ValueError(
                "`k` must be an integer between 1 and the number of positive eigenvalues, "
                f"{positive}. Received: k={k!r}"
            )
        weights = examples[:, :k].T / np.sqrt(self.n_examples * eigenvalues[:k, None])
        return self.gradients.combine_many(ops.cast(weights, self.gradients.dtype))

    def example_coordinates(self, v: Vector) -> np.ndarray:
        """The coordinates <v, e_j> along the eigenvectors, numpy float64, shape (min(N, d),).

        0 where the eigenvalue is 0.
        """
        eigenvalues, examples, _ = self._spectral()
        along = examples.T @ centring.centred(self.products(v))
        root = np.sqrt(self.n_examples * eigenvalues)
        return np.divide(along, root, out=np.zeros_like(root), where=root > 0)

    def products(self, v: Vector) -> np.ndarray:
        """G v, numpy float64, shape (N,), for v a list of tensors shaped as the weights."""
        return _in_float64(self.gradients.dot(v))

    def top_eigenvalue(self) -> float:
        """lambda_max, the M_x of the paper."""
        return float(self._spectral()[0][0])

    def trace(self) -> float:
        """tr D = (1/N) sum_i |g_i - gbar|^2."""
        return float(np.trace(self._spectral()[2]))

    def rank_cut(self, rule: str = "gram") -> float:
        """The eigenvalue above which an eigenvalue counts for the rank.

        Args:
            rule: "gram", lambda_max * N * epsilon of the weights' dtype, numpy's rule on the
                matrix that is decomposed; or "reference", lambda_max * d * epsilon of float32, as
                Chaudhari and Soatto (arXiv 1710.11029) measured it.

        Raises:
            ValueError: "reference" where d * epsilon >= 0.05, so that the cut would be a sizeable
                part of lambda_max; or another rule.
        """
        if rule not in ("gram", "reference"):
            raise ValueError(f'`rule` must be "gram" or "reference". Received: rule={rule!r}')
        if rule == "reference" and not has_reference_cut(self.n_weights):
            relative = rank_cut(1.0, self.n_examples, self.n_weights, rule)
            raise ValueError(
                f"The reference's cut is d * epsilon = {relative:.2g} of lambda_max for "
                f"d = {self.n_weights}, and means nothing from {LARGEST_RELATIVE_CUT} on. Use "
                "the Gram matrix's cut, rank() or rank_cut('gram')."
            )
        top, dtype = self.top_eigenvalue(), self.gradients.dtype
        return rank_cut(top, self.n_examples, self.n_weights, rule, dtype)

    def rank(self, cut: float | None = None) -> int:
        """The number of eigenvalues above `cut`, at most N - 1.

        Args:
            cut: in squared-gradient units. Defaults to `None`, which is `rank_cut()`.
        """
        cut = self.rank_cut() if cut is None else cut
        return int(np.count_nonzero(self._spectral()[0] > cut))

    def linear_operator(self) -> scipy.sparse.linalg.LinearOperator:
        """D as a (d, d) `scipy.sparse.linalg.LinearOperator` on flat vectors, in float64.

        Entries are in the order of the weights, each flattened row by row.
        """

        def matvec(x: np.ndarray) -> np.ndarray:
            v = vectors.unflatten(np.ravel(x), self.gradients.weights, self.gradients.dtype)
            return vectors.flatten(self.matvec(v)).astype(np.float64)

        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=matvec, rmatvec=matvec, dtype=np.float64
        )

    def _spectral(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(eigenvalues descending, their eigenvectors of K in columns, K), numpy float64."""
        if self._eigen is None:
            mean = self.gradients.mean()
            unit = self.gradients.unit(mean)
            # The mean is taken off before the products, which keeps their digits.
            k = centring.centred_gram(self.gradients.gram(mean, unit))
            k = _in_float64(k / ops.cast(self.n_examples, k.dtype)) * float(unit) ** 2
            if not np.all(np.isfinite(k)):
                raise NotFiniteError(NOT_FINITE)
            # Gradients that differ by rounding alone have no variance.
            distance = np.sqrt(self.n_examples * max(np.max(np.diag(k)), 0))
            k *= rounding.differ(distance, float(vectors.norm(mean)), self.gradients.dtype)
            # Centred again in float64: (1, ..., 1) is an exact null vector, so rank <= N - 1.
            centring.center_in_place(k)
            k = (k + k.T) / 2
            eigenvalues, examples = scipy.linalg.eigh(k)
            count = min(self.n_examples, self.n_weights)
            descending = np.maximum(eigenvalues[::-1][:count], 0)
            self._eigen = descending, examples[:, ::-1][:, :count], k
        return self._eigen

    def vector(self, v: Any) -> Vector:
        """v as a list of tensors shaped as the weights, checked."""
        return self.gradients.vector(v)


def rank_cut(
    lambda_max: float, n: int, d: int, rule: str = "gram", dtype: Any = "float32"
) -> float:
    """The eigenvalue above which an eigenvalue counts for the rank: lambda_max * rows * epsilon.

    Args:
        lambda_max: the largest eigenvalue, squared gradient.
        n: N.
        d: the number of trainable scalars.
        rule: which rows and which epsilon.
            "gram", N and that of `dtype`: numpy's rule for K, which is the matrix decomposed.
            "reference", d and that of float32, as Chaudhari and Soatto (arXiv 1710.11029) measured
            D; see `has_reference_cut`.
            "gram_of_dataset", min(N, d) and that of float32: over a data set K or D is decomposed,
            whichever is smaller, and all methods are to find one rank; float32 as in "reference",
            of which this takes the place where d is too large.
        dtype: of the gradients.
    """
    rows = {"gram": n, "reference": d, "gram_of_dataset": min(n, d)}[rule]
    return lambda_max * rows * machine_epsilon(dtype if rule == "gram" else "float32")


def has_reference_cut(d: int) -> bool:
    """Whether the reference's cut is a small part of lambda_max; not so from 420,000 weights on."""
    return rank_cut(1.0, 1, d, "reference") < LARGEST_RELATIVE_CUT


def _in_float64(tensor: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor).astype(np.float64)
