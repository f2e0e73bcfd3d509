"""(I - eps D) v of one batch, Eq. (10): by a Gram matrix, by products with D, or by passes.

Each form shows a rule for eps what it knows of D along v, and gives the direction at the eps that
the rule chose. A window of gradients has the fourth, `window.WindowDirection`.
"""

from __future__ import annotations

from keras import ops

from keras_rgd._support import centring, eigensolvers, rounding, vectors
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.diffusion_matrix import DiffusionMatrix, Product
from keras_rgd.epsilon import GramSpectrum, SpectralMeasure
from keras_rgd.largest_eigenvalue import (
    estimate_by_moments,
    estimate_by_passes,
    estimate_by_products,
)
from keras_rgd.per_example.gradients import PerExampleGradients


def direction_of(
    gradients: PerExampleGradients, last_estimate: Tensor | float
) -> GramDirection | ProductDirection:
    """(I - eps D) v for v = `gradients.gradient`, by what these gradients have cheap.

    Args:
        gradients: the batch's.
        last_estimate: `lambda_max` of the last step, 0 if there is none; a scalar.
    """
    if gradients.gram_is_cheap:
        return GramDirection(gradients)
    D = DiffusionMatrix(gradients)
    estimate = estimate_by_products if gradients.products_in_loops else estimate_by_moments
    product, lambda_max = estimate(D, gradients.gradient, last_estimate)
    return ProductDirection(gradients, product, lambda_max)


def direction_by_passes(
    gradients: PerExampleGradients, start: Vector
) -> tuple[ProductDirection, Vector]:
    """As `direction_of` where each operation is a pass over many examples: as few as can be.

    Args:
        gradients: the batch's.
        start: what the last step returned, a list of tensors shaped as the weights; 0 at first.

    Returns:
        The direction; where the next step may start.
    """
    product, lambda_max, top = estimate_by_passes(gradients, gradients.gradient, start)
    return ProductDirection(gradients, product, lambda_max), top


class GramDirection:
    """(I - eps D) v in example space, by a Gram matrix, which also gives an upper bound on M_x.

    It has D v = (1/N) sum_i (k_i - mean k) g_i of its own, as `DiffusionMatrix` would go through
    the examples twice: an `ExampleSpace` has k = G v from the pass that gave v, and the weights
    1 - eps (k_i - mean k) are spent in one more. tests/test_one_mathematics.py holds them equal.

    Args:
        gradients: the batch's, whose Gram matrix is cheap.

    Attributes:
        seen_by_rule: D along v, for a rule of `keras_rgd.epsilon`.
        lost_digits: whether D was taken as 0 because the gradients of several examples differ by
            no more than rounding, a bool scalar tensor.
    """

    def __init__(self, gradients: PerExampleGradients):
        self._gradients = gradients
        space = gradients.example_space()
        dtype = space.gram.dtype
        n = ops.cast(gradients.n_examples, dtype)
        k = centring.centred_gram(space.gram)
        known = (space.largest, dtype, space.centred)
        differ = rounding.is_real(ops.max(ops.diagonal(k)), *known)
        self.lost_digits = _lost(gradients, space.square, differ)
        real, k = ops.cast(differ, dtype), k / n
        error = rounding.error(ops.trace(k), *known)
        # Twice, as the weights are spent on gradients that are not centred.
        self._centred = real * centring.centred(centring.centred(space.products))
        self.seen_by_rule = GramSpectrum(
            lambda_max=real * (eigensolvers.trace_power_bound(k) + error),
            unit=space.unit,
            gram=real * k,
            products=self._centred / ops.sqrt(n),
            square=space.square,
        )

    def at(self, epsilon: Tensor) -> Vector:
        """(I - eps D) v, Eq. (10), for eps in the unit of `seen_by_rule`."""
        return self._gradients.reweighted(1 - epsilon * self._centred)


class ProductDirection:
    """(I - eps D) v by one product with D, and an estimate of M_x.

    Args:
        gradients: the batch's.
        product: D v.
        lambda_max: M_x in the unit `product.unit`**2, a scalar tensor.

    Attributes:
        seen_by_rule: D along v, for a rule of `keras_rgd.epsilon`.
        lost_digits: whether D v was taken as 0, as in `GramDirection`.
    """

    def __init__(self, gradients: PerExampleGradients, product: Product, lambda_max: Tensor):
        self._gradients, self._product = gradients, product
        self.lost_digits = _lost(gradients, product.norm, product.size > 0)
        unit = product.unit
        mass = ops.square(product.size / unit)
        nodes, weights = eigensolvers.moments_measure(
            lambda_max, mass, mass * ops.square(product.alpha / unit)
        )
        self.seen_by_rule = SpectralMeasure(
            lambda_max=lambda_max, nodes=nodes, weights=weights, unit=unit
        )

    def at(self, epsilon: Tensor) -> Vector:
        """(I - eps D) v, Eq. (10), for eps in the unit of `seen_by_rule`."""
        product, unit = self._product, self._product.unit
        # eps D v, each factor in units of the gradient: no product of them leaves the dtype.
        length = epsilon * (product.size / unit) * (product.alpha / unit) * product.norm
        return vectors.add(self._gradients.gradient, product.direction, -length)


def _lost(gradients: PerExampleGradients, size: Tensor, differ: Tensor) -> Tensor:
    """Whether what differed by no more than rounding were gradients of several examples."""
    several = ops.convert_to_tensor(gradients.n_examples) > 1
    return ops.logical_and(ops.logical_and(several, size > 0), ops.logical_not(differ))
