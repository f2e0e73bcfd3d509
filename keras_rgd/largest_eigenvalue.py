"""M_x, the largest eigenvalue of D, where a step has no Gram matrix: estimates and their margins.

With a Gram matrix there is a bound, `eigensolvers.trace_power_bound`. Without one M_x is estimated
from below, by vectors that the step forms anyway and a few more, and multiplied by a margin that
makes misses rare. How rare they are is measured in docs/epsilon.md.
"""

from __future__ import annotations

from keras import ops

from keras_rgd._support import centring, eigensolvers, rounding, vectors
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.diffusion_matrix import DiffusionMatrix, Product
from keras_rgd.per_example.gradients import PerExampleGradients

# What an estimate is multiplied by.
ESTIMATE_MARGIN = 1.5

# The same where one pass over the examples was enough for the last step's vector: it still fits.
SETTLED_MARGIN = 1.2

# The estimate of the last batch stands while this batch's is within this factor of it.
_AGREEMENT = 2.0

# Where they disagree, at most so many steps, until one raises the estimate by less than this.
_MAX_STEPS = 8
_GROWTH = 0.05

# Without more products: what is taken, in units of the batch's own estimate, where that has more
# than doubled; how the last one sinks from step to step where it has fallen; and how far above it
# may be, and is at first. Larger numbers make eps smaller and misses rarer, which docs/epsilon.md
# counts with these.
_RISEN, _SINKING, _FAR = 1.2, 0.75, 8.0

# Where products are passes over a whole data set, the estimate stands with so small a residual.
_SETTLED = 0.1


def estimate_by_products(
    D: DiffusionMatrix, v: Vector, last_estimate: Tensor | float
) -> tuple[Product, Tensor]:
    """D v and M_x, by products with D.

    M_x before its margin: the larger of |D v|^2 / v^T D v and the last batch's estimate while the
    two agree within a factor of 2, else the Ritz value of a few more products.

    Args:
        D: the batch's.
        v: a list of tensors shaped as the weights.
        last_estimate: M_x of the last step, in squared gradients; 0 if there was none; a scalar.

    Returns:
        D v; M_x in the unit `Product.unit`**2, times `ESTIMATE_MARGIN`.
    """
    product = D.factored_product(v)
    alpha = product.alpha
    last = ops.cast(last_estimate, alpha.dtype) / ESTIMATE_MARGIN
    last = ops.divide_no_nan(ops.divide_no_nan(last, alpha), alpha)
    agrees = ops.logical_and(last <= _AGREEMENT, last >= 1 / _AGREEMENT)
    top = eigensolvers.golub_kahan_top(
        dot=D.to_examples,
        combine=D.to_weights,
        alpha=alpha,
        v=product.direction,
        u=product.examples,
        max_steps=_MAX_STEPS,
        enough=agrees,
        growth=_GROWTH,
    )
    return product, ops.where(agrees, ops.maximum(last, 1), top) * ESTIMATE_MARGIN


def estimate_by_moments(
    D: DiffusionMatrix, v: Vector, last_estimate: Tensor | float
) -> tuple[Product, Tensor]:
    """D v and M_x, where no product with D but that one is to be had.

    M_x before its margin, where m = |D v|^2 / v^T D v, which M_x is at least: the last batch's
    estimate while m is within a factor of 2 of it; where m is larger, 1.2 m; where it is smaller,
    three quarters of the last estimate, between 2 m and 8 m; with none before, 8 m.

    Args:
        D: the batch's.
        v: a list of tensors shaped as the weights.
        last_estimate: M_x of the last step, in squared gradients; 0 if there was none; a scalar.

    Returns:
        As `estimate_by_products`.
    """
    product = D.factored_product(v)
    alpha = product.alpha
    last = ops.cast(last_estimate, alpha.dtype) / ESTIMATE_MARGIN
    last = ops.divide_no_nan(ops.divide_no_nan(last, alpha), alpha)
    sunk = ops.clip(_SINKING * last, _AGREEMENT, _FAR)
    ratio = ops.where(last > _AGREEMENT, sunk, ops.maximum(last, 1))
    ratio = ops.where(last < 1 / _AGREEMENT, _RISEN, ratio)
    ratio = ops.where(last == 0, _FAR, ratio)
    own = ops.divide_no_nan(alpha, alpha)  # 1 or 0, or NaN of what is not finite
    return product, own * ratio * ESTIMATE_MARGIN


def estimate_by_passes(
    gradients: PerExampleGradients, v: Vector, start: Vector
) -> tuple[Product, Tensor, Vector]:
    """D v and M_x, by products that are one pass over many examples each.

    The iteration begins where the last step's ended: while D changes little one pass is enough,
    which also gives D v. Where more are needed each takes the best vector of three
    (`eigensolvers.ritz_step`), until its residual is a tenth of its eigenvalue.

    Args:
        gradients: the batch's.
        v: a list of tensors shaped as the weights.
        start: likewise, of norm 1, or 0 for none.

    Returns:
        D v; M_x in the unit `Product.unit`**2, estimated from below and times its margin; and where
        the next step may begin.
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
        product, dq = _products_in_one_pass(gradients, v, q, unit)
        x, dx, p, dp = eigensolvers.ritz_step((x, dx), (q, dq), (p, dp))
        value = vectors.inner(x, dx)
        rest = vectors.add(dx, x, -value)
        residual = vectors.norm(rest)
        q = [ops.divide_no_nan(t, residual) for t in rest]
        largest = ops.divide_no_nan(vectors.inner(dx, dx), value)
        seen = (product.size, product.alpha, product.direction)
        return step + 1, q, residual, largest, *seen, x, dx, p, dp

    begin = (0, first, norm, norm, norm, norm, v, zeros, zeros, zeros, zeros)
    end = ops.while_loop(go_on, one_pass, begin)
    passes, _, _, largest, size, alpha, direction, top, *_ = end
    product = Product(norm=norm, size=size, alpha=alpha, direction=direction)
    own = ops.square(alpha / product.unit)
    estimate = ops.maximum(largest * ops.square(unit / product.unit), own)
    margins = estimate * SETTLED_MARGIN, estimate * ESTIMATE_MARGIN
    return product, ops.where(passes == 1, *margins), top


def _products_in_one_pass(gradients, v, q, unit):
    """D v as a `Product`, and D q in the unit `unit`**2, for v and q of norm 1 or 0.

    `DiffusionMatrix` would take two passes for each: one for G v, whose mean H takes off, and one
    for the sum over the examples. Here <gbar, v> is taken off each product as it comes, and what
    that leaves of the mean by rounding afterwards.
    """
    n = ops.maximum(ops.cast(gradients.n_examples, unit.dtype), 1)
    mean = gradients.mean()
    stacked = [ops.stack(pair) / unit for pair in zip(v, q, strict=True)]
    shift = ops.stack([vectors.inner(mean, v), vectors.inner(mean, q)]) / unit
    factors, sums = gradients.images(stacked, shift)
    products, sizes = [], []
    for j in range(2):
        left = ops.sum(factors[j]) / n
        largest = ops.abs(shift[j]) + vectors.largest_of(factors[j])
        centred, _ = rounding.above_noise(centring.centred(factors[j]), largest)
        size = vectors.norm([centred]) / ops.sqrt(n)
        product = vectors.add([t[j] / n for t in sums], mean, -left)
        products.append([ops.where(size > 0, t / unit, ops.zeros_like(t)) for t in product])
        sizes.append(size)
    length = vectors.norm(products[0])
    product = Product(
        norm=ops.ones_like(length),
        size=sizes[0] * unit,
        alpha=ops.divide_no_nan(length, sizes[0]) * unit,
        direction=[ops.divide_no_nan(t, length) for t in products[0]],
    )
    return product, products[1]
