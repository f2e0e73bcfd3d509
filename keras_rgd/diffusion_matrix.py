"""The diffusion matrix D of one batch, on per-example gradients.

D = (1/N) G^T H G, Eq. (2) of the paper, with the rows of G the per-example gradients and
H = I - 11^T/N. It has d x d entries and is never formed: K = (1/N) H G G^T H, N x N, has the same
nonzero eigenvalues, and products with D go through the examples.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from keras import ops

from keras_rgd._support import arguments, eigensolvers, rounding, vectors
from keras_rgd._support.rounding import machine_epsilon

# Without a Gram matrix M_x is estimated from below; the margin makes misses rare. Measured:
# docs/epsilon.md.
ESTIMATE_MARGIN = 1.5

# The same where one pass over the examples was enough for the last step's vector: it still fits.
SETTLED_MARGIN = 1.2

# The estimate of the last batch stands while this batch's is within this factor of it.
_AGREEMENT = 2.0

# Where they disagree, at most so many steps, until one raises the estimate by less than this.
_MAX_STEPS = 8
_GROWTH = 0.05

# Where products are passes over a whole data set, the estimate stands with so small a residual.
_SETTLED = 0.1

# Above this the reference's cut lambda_max * d * eps32 is a sizeable part of lambda_max itself.
LARGEST_RELATIVE_CUT = 0.05

FLOAT32_EPSILON = float(np.finfo(np.float32).eps)


NOT_FINITE = (
    "The gradients of these examples are not finite (NaN or infinite), so D has no spectrum. Has "
    "the training diverged? Expected finite weights and data."
)


@dataclasses.dataclass(frozen=True)
class Image:
    """D v kept as factors, so that none of them leaves the range of the dtype.

    D v = norm * size * alpha * direction. With v / |v| = w: size = sqrt(w^T D w) and
    alpha**2 = |D w|^2 / w^T D w, at most the largest eigenvalue.
    """

    norm: Any  # |v|, ()
    size: Any  # |H G w| / sqrt(N), in units of a gradient, ()
    alpha: Any  # in units of a gradient, ()
    direction: list  # of norm 1, or 0; shaped as the weights
    examples: Any = None  # H G w normalised, (N,), where it is kept

    @property
    def unit(self):
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

    def __init__(self, gradients):
        self.gradients = gradients
        self._eigen = None

    @property
    def shape(self):
        """(d, d)."""
        return (self.n_weights, self.n_weights)

    @property
    def n_examples(self):
        """N."""
        return self.gradients.n_examples

    @property
    def n_weights(self):
        """d, the number of trainable scalars."""
        return vectors.size(self.gradients.weights)

    def matvec(self, v):
        """D v = (1/N) sum_i (k_i - mean k) g_i with k = G v, Eq. (2) applied to v.

        Args:
            v: a list of tensors shaped as the weights.

        Returns:
            A list of tensors shaped as the weights.

        Raises:
            ValueError: v is not shaped as the weights.
        """
        image = self.image(self.vector(v))
        return vectors.scale(image.direction, image.norm * image.size * image.alpha)

    def image(self, v):
        """D v as an `Image`, for v a list of tensors shaped as the weights."""
        norm = vectors.norm(v)
        centred, _ = self._dot([ops.divide_no_nan(x, norm) for x in v])
        length = vectors.norm([centred])
        examples = ops.divide_no_nan(centred, length)
        pulled = self._combine(examples)
        alpha = vectors.norm(pulled)
        return Image(
            norm=norm,
            size=length,
            alpha=alpha,
            direction=[ops.divide_no_nan(x, alpha) for x in pulled],
            examples=examples,
        )

    def estimate(self, image, last_estimate):
        """The largest eigenvalue in the unit `image.unit`**2, from below, by products with D.

        The larger of |D v|^2 / v^T D v and the last batch's estimate while the two agree within a
        factor of 2, else the Ritz value of a few more products.

        Args:
            image: `self.image(v)`.
            last_estimate: the last step's, times `ESTIMATE_MARGIN`; 0 if there is none; a scalar.
        """
        unit = image.unit
        own = ops.square(image.alpha / unit)
        last = ops.cast(last_estimate, own.dtype) / ESTIMATE_MARGIN / unit / unit
        agree = ops.logical_and(last <= _AGREEMENT * own, own <= _AGREEMENT * last)
        top = eigensolvers.golub_kahan_top(
            dot=lambda v: [t / unit for t in self._dot(v)],
            combine=lambda u: vectors.scale(self._combine(u), 1 / unit),
            alpha=image.alpha / unit,
            v=image.direction,
            u=image.examples,
            max_steps=_MAX_STEPS,
            limit=ops.cast(ops.where(agree, 1, _MAX_STEPS), "int32"),
            growth=_GROWTH,
        )
        return ops.where(agree, ops.maximum(own, last), top)

    def iterate(self, v, start):
        """D v and the largest eigenvalue, by products that are one pass over the examples each.

        The iteration begins where the last step's ended: while D changes little one pass is
        enough, which also gives D v. Where more are needed each takes the best vector of three
        (`bounds.ritz_step`), until its residual is a tenth of its eigenvalue.

        Args:
            v: a list of tensors shaped as the weights.
            start: likewise, of norm 1, or 0 for none.

        Returns:
            D v, an `Image`; the largest eigenvalue in the unit `image.unit`**2, estimated from
            below and times its margin; and where the next step may begin.
        """
        norm = vectors.norm(v)
        unit = ops.where(norm > 0, norm, ops.ones_like(norm))
        v = vectors.scale(v, 1 / unit)
        given = vectors.norm(start) > 0
        first = [ops.where(given, a, b) for a, b in zip(start, v, strict=True)]
        zeros = [ops.zeros_like(t) for t in v]

        def go_on(step, _, residual, largest, *_state):
            unsettled = residual > _SETTLED * largest
            return ops.logical_or(step == 0, ops.logical_and(step < _MAX_STEPS, unsettled))

        def one_pass(step, q, *_values_and_state):
            *_, x, dx, p, dp = _values_and_state
            image, dq = self._images_in_one_pass(v, q, unit)
            x, dx, p, dp = eigensolvers.ritz_step((x, dx), (q, dq), (p, dp))
            value = vectors.inner(x, dx)
            rest = vectors.add(dx, x, -value)
            residual = vectors.norm(rest)
            q = [ops.divide_no_nan(t, residual) for t in rest]
            largest = ops.divide_no_nan(vectors.inner(dx, dx), value)
            seen = (image.size, image.alpha, image.direction)
            return step + 1, q, residual, largest, *seen, x, dx, p, dp

        begin = (0, first, norm, norm, norm, norm, v, zeros, zeros, zeros, zeros)
        end = ops.while_loop(go_on, one_pass, begin)
        passes, _, _, largest, size, alpha, direction, top, *_ = end
        image = Image(norm=norm, size=size, alpha=alpha, direction=direction)
        own = ops.square(alpha / image.unit)
        estimate = ops.maximum(largest * ops.square(unit / image.unit), own)
        margins = estimate * SETTLED_MARGIN, estimate * ESTIMATE_MARGIN
        return image, ops.where(passes == 1, *margins), top

    def _images_in_one_pass(self, v, q, unit):
        """D v as an `Image`, and D q in the unit `unit`**2, for v and q of norm 1 or 0."""
        n = ops.maximum(ops.cast(self.n_examples, unit.dtype), 1)
        mean = self.gradients.mean()
        stacked = [ops.stack(pair) / unit for pair in zip(v, q, strict=True)]
        shift = ops.stack([vectors.inner(mean, v), vectors.inner(mean, q)]) / unit
        factors, pulled = self.gradients.images(stacked, shift)
        products, sizes = [], []
        for j in range(2):
            # What the shift left of the mean by rounding.
            left = ops.sum(factors[j]) / n
            largest = ops.abs(shift[j]) + _largest(factors[j])
            centred, _ = _above_noise(factors[j] - left, largest)
            size = vectors.norm([centred]) / ops.sqrt(n)
            product = vectors.add([t[j] / n for t in pulled], mean, -left)
            products.append([ops.where(size > 0, t / unit, ops.zeros_like(t)) for t in product])
            sizes.append(size)
        length = vectors.norm(products[0])
        image = Image(
            norm=ops.ones_like(length),
            size=sizes[0] * unit,
            alpha=ops.divide_no_nan(length, sizes[0]) * unit,
            direction=[ops.divide_no_nan(t, length) for t in products[0]],
        )
        return image, products[1]

    def _dot(self, v):
        """H G v / sqrt(N), and how long the rounding in it may be."""
        k = self.gradients.dot(v)
        centred, noise = _above_noise(k - ops.mean(k), _largest(k))
        return centred / self._root_n, noise

    def _combine(self, u):
        """G^T H u / sqrt(N)."""
        # Without H the mean gradient would enter by the rounding in u.
        return vectors.scale(self.gradients.combine(u - ops.mean(u)), 1 / self._root_n)

    @property
    def _root_n(self):
        # A batch without examples has D = 0.
        return ops.sqrt(ops.maximum(ops.cast(self.n_examples, self.gradients.dtype), 1))

    def _centered_gram(self, unit, mean):
        """K in the unit unit**2, from gradients with their mean taken off before the products."""
        k = self.gradients.gram(mean, unit)
        k = k - ops.mean(k, 0, keepdims=True)
        k = k - ops.mean(k, 1, keepdims=True)
        return k / ops.cast(self.n_examples, k.dtype)

    def gram(self):
        """<g_i, g_j>, shape (N, N), a numpy array of the weights' dtype, neither centred nor /N."""
        return ops.convert_to_numpy(self.gradients.gram())

    def centered_gram(self):
        """K = (1/N) H G G^T H, shape (N, N), numpy float64: D's nonzero eigenvalues."""
        return self._spectral()[2]

    def eigenvalues(self):
        """All min(N, d) eigenvalues that can differ from 0, descending, numpy float64.

        In squared-gradient units. Relative to the largest they are known to about the epsilon of
        the weights' dtype.
        """
        return self._spectral()[0].copy()

    def eigenvectors(self, k):
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

    def example_coordinates(self, v):
        """V's coordinates along the eigenvectors, <v, e_j>, numpy float64, shape (min(N, d),).

        0 where the eigenvalue is 0.
        """
        eigenvalues, examples, _ = self._spectral()
        k = self.products(v)
        along = examples.T @ (k - k.mean())
        root = np.sqrt(self.n_examples * eigenvalues)
        return np.divide(along, root, out=np.zeros_like(root), where=root > 0)

    def products(self, v):
        """G v, numpy float64, shape (N,), for v a list of tensors shaped as the weights."""
        return in_float64(self.gradients.dot(self.vector(v)))

    def top_eigenvalue(self):
        """lambda_max, the M_x of the paper."""
        return float(self._spectral()[0][0])

    def trace(self):
        """Tr D = (1/N) sum_i |g_i - gbar|^2."""
        return float(np.trace(self._spectral()[2]))

    def rank_cut(self, rule="gram"):
        """The eigenvalue above which an eigenvalue counts for the rank.

        Args:
            rule: "gram", lambda_max * N * epsilon of the weights' dtype, numpy's rule on the
                matrix that is decomposed; or "reference", lambda_max * d * epsilon of float32, as
                Chaudhari and Soatto (arXiv 1710.11029) measured it.

        Raises:
            ValueError: "reference" where d * epsilon >= 0.05, so that the cut would be a sizeable
                part of lambda_max; or another rule.
        """
        if rule == "gram":
            epsilon = machine_epsilon(self.gradients.dtype)
            return self.top_eigenvalue() * self.n_examples * epsilon
        if rule != "reference":
            raise ValueError(f'`rule` must be "gram" or "reference". Received: rule={rule!r}')
        relative = self.n_weights * FLOAT32_EPSILON
        if relative >= LARGEST_RELATIVE_CUT:
            raise ValueError(
                f"The reference's cut is d * epsilon = {relative:.2g} of lambda_max for "
                f"d = {self.n_weights}, and means nothing from {LARGEST_RELATIVE_CUT} on. Use "
                "the Gram matrix's cut, rank() or rank_cut('gram')."
            )
        return self.top_eigenvalue() * relative

    def rank(self, cut=None):
        """The number of eigenvalues above `cut`, at most N - 1.

        Args:
            cut: in squared-gradient units. Defaults to `None`, which is `rank_cut()`.
        """
        cut = self.rank_cut() if cut is None else cut
        return int(np.count_nonzero(self._spectral()[0] > cut))

    def linear_operator(self):
        """D as a (d, d) `scipy.sparse.linalg.LinearOperator` on flat vectors, in float64.

        Entries are in the order of the weights, each flattened row by row.
        """

        def matvec(x):
            v = vectors.unflatten(np.ravel(x), self.gradients.weights, self.gradients.dtype)
            return vectors.flatten(self.matvec(v)).astype(np.float64)

        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=matvec, rmatvec=matvec, dtype=np.float64
        )

    def _spectral(self):
        """(eigenvalues descending, their eigenvectors of K in columns, K), numpy float64."""
        if self._eigen is None:
            mean = self.gradients.mean()
            unit = self.gradients.unit(mean)
            k = in_float64(self._centered_gram(unit, mean)) * float(unit) ** 2
            if not np.all(np.isfinite(k)):
                raise NotFiniteError(NOT_FINITE)
            # Gradients that differ by rounding alone have no variance.
            noise = rounding.noise(float(vectors.norm(mean)), self.gradients.dtype)
            k *= self.n_examples * np.max(np.diag(k)) > noise**2
            # Centred again in float64: (1, ..., 1) is an exact null vector, so rank <= N - 1.
            k -= k.mean(0, keepdims=True)
            k -= k.mean(1, keepdims=True)
            k = (k + k.T) / 2
            eigenvalues, examples = scipy.linalg.eigh(k)
            count = min(self.n_examples, self.n_weights)
            descending = np.maximum(eigenvalues[::-1][:count], 0)
            self._eigen = descending, examples[:, ::-1][:, :count], k
        return self._eigen

    def vector(self, v):
        """V as a list of tensors shaped as the weights, checked."""
        return self.gradients.cast(vectors.checked(v, self.gradients.weights))


def in_float64(tensor):
    """A tensor as a numpy array of float64."""
    return ops.convert_to_numpy(tensor).astype(np.float64)


def _largest(k):
    # The 0 is for a batch without examples.
    return ops.max(ops.abs(k), initial=0)


def _above_noise(centred, largest):
    """Products k less their mean, 0 where they are rounding alone; and how large that may be.

    Equal k differ by rounding; that is no variance.

    Args:
        centred: k less its mean, shape (N,).
        largest: the largest |k|.
    """
    noise = rounding.noise(largest, centred.dtype)
    real = _largest(centred) > noise
    return ops.where(real, centred, ops.zeros_like(centred)), noise
