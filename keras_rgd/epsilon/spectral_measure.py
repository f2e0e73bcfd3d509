"""What a rule for eps sees of D along one vector v: a bound on M_x, and v's spectral measure."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd._support import eigensolvers
from keras_rgd._support.vectors import Tensor


class InUnits:
    """What is kept in a unit, `unit`**2 for eigenvalues."""

    unit: Tensor

    def in_true_units(self, epsilon: Tensor) -> Tensor:
        """`epsilon` times unit**-2, at most the largest number of the dtype."""
        return ops.minimum(epsilon / self.unit / self.unit, largest_number(epsilon.dtype))


@dataclasses.dataclass(frozen=True)
class SpectralMeasure(InUnits):
    """What a rule knows of D and a vector v, in the unit `unit`**2 for eigenvalues.

    Attributes:
        lambda_max: a bound on (or estimate of) the largest eigenvalue, divided by unit**2; a
            scalar tensor, 0 where D is 0.
        nodes: points lam_j of a quadrature rule, divided by unit**2, shape (m,).
        weights: its weights, shape (m,), non-negative, sum 1: for a function f,
            v^T f(D) v / |v|^2 = sum_j weights_j f(lam_j).
        unit: the square root of the unit of eigenvalues, a scalar tensor. It keeps squares of
            tiny and huge gradients in range.
        mean_lambda_max: the running mean of `lambda_max` over the steps before, divided by unit**2;
            0 at first, and `None` where there is no training.
    """

    lambda_max: Tensor
    nodes: Tensor
    weights: Tensor
    unit: Tensor
    mean_lambda_max: Tensor | None = None

    def weak_field_error(self, epsilon: Tensor) -> Tensor:
        """|((I + eps D)^-1 - (I - eps D)) v| / |(I + eps D)^-1 v|, after Eq. (6) of the paper.

        Args:
            epsilon: in the unit unit**-2, a scalar tensor.
        """
        t = epsilon * self.nodes
        error = ops.sum(self.weights * ops.square(ops.square(t) / (1 + t)))
        size = ops.sum(self.weights / ops.square(1 + t))
        return ops.sqrt(ops.divide_no_nan(error, size))

    def quadrature(self) -> SpectralMeasure:
        """A `SpectralMeasure` whose weak-field error is cheap for many eps: this one."""
        return self


@dataclasses.dataclass(frozen=True)
class GramSpectrum(InUnits):
    """A spectrum known by its matrix in example space; everything in the unit `unit`**2.

    Attributes:
        lambda_max: an upper bound on the largest eigenvalue, a scalar tensor, 0 where D is 0.
        gram: K = (1/N) H G G^T H, shape (N, N).
        products: H G v / sqrt(N), shape (N,).
        square: |v|^2, a scalar tensor.
        unit: as in `SpectralMeasure`.
        mean_lambda_max: as in `SpectralMeasure`.
    """

    lambda_max: Tensor
    gram: Tensor
    products: Tensor
    square: Tensor
    unit: Tensor
    mean_lambda_max: Tensor | None = None

    def weak_field_error(self, epsilon: Tensor) -> Tensor:
        """As `SpectralMeasure.weak_field_error`, for eps < 1/lambda_max, by products with K.

        (I + eps D)^-1 v = v - eps B y with B^T B = K, y = (I + eps K)^-1 B^T v, and the difference
        to (I - eps D) v is eps B (B^T v - y). As `diffusion_metric.inverse_product`, but for the
        solution of the system, which a compiled step iterates.
        """
        y = eigensolvers.solve_shifted(self.gram, epsilon, self.products)
        product = ops.matmul(self.gram, y)
        rest = epsilon * product  # B^T v - y
        error = ops.square(epsilon) * ops.sum(rest * ops.matmul(self.gram, rest))
        size = self.square - epsilon * (
            2 * ops.sum(self.products * y) - epsilon * ops.sum(y * product)
        )
        # (I + eps D)^-1 halves v at most.
        size = ops.maximum(size, self.square / 4)
        return ops.sqrt(ops.divide_no_nan(ops.maximum(error, 0), size))

    def quadrature(self) -> SpectralMeasure:
        """A `SpectralMeasure` whose weak-field error is cheap for many eps."""
        length = ops.norm(self.products)
        mass = ops.divide_no_nan(ops.square(length), self.square)
        start = ops.divide_no_nan(self.products, length)
        nodes, weights = eigensolvers.lanczos_measure(
            self.gram, start, ops.minimum(mass, self.lambda_max)
        )
        return SpectralMeasure(self.lambda_max, nodes, weights, self.unit)


def largest_number(dtype: Any) -> float:
    """The largest finite number of a floating dtype."""
    return float(np.finfo(keras.backend.standardize_dtype(dtype)).max)
