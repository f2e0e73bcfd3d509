"""The diffusion metric g = I + eps D, Eq. (6) of the paper, its inverses and their distance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
from keras import ops

from keras_rgd._support import centring, vectors
from keras_rgd._support.arguments import is_real
from keras_rgd._support.vectors import Vector
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.epsilon import Rule, SpectralMeasure, choose


class DiffusionMetric:
    """The diffusion metric g = I + eps D, Eq. (6) of the paper.

    Args:
        diffusion_matrix: D, a `DiffusionMatrix` outside a graph.
        epsilon: eps, a float with 0 <= eps * lambda_max < 1; or a rule of `keras_rgd.epsilon`,
            applied to D along the batch's gradient.

    Raises:
        ValueError: eps * lambda_max is not in [0, 1), or the first argument is no
            `DiffusionMatrix`.
    """

    def __init__(self, diffusion_matrix: DiffusionMatrix, epsilon: float | Rule):
        if not isinstance(diffusion_matrix, DiffusionMatrix):
            raise ValueError(
                "`diffusion_matrix` must be a DiffusionMatrix, as keras_rgd.diffusion_matrix("
                "model, x, y) returns it. Received: diffusion_matrix of type "
                f"{type(diffusion_matrix).__name__}"
            )
        self.diffusion_matrix = diffusion_matrix
        if isinstance(epsilon, Rule):
            gradient = diffusion_matrix.gradients.gradient
            epsilon = choose_epsilon(diffusion_matrix, epsilon, gradient)
        top = diffusion_matrix.top_eigenvalue()
        if not is_real(epsilon) or not 0 <= epsilon * top < 1:
            largest = 1 / top if top > 0 else math.inf
            raise ValueError(
                "`epsilon` must satisfy 0 <= epsilon * lambda_max < 1 (Eq. 6 of the paper), here "
                f"epsilon < {largest:.6g}; for a fraction c of that bound write "
                f"keras_rgd.epsilon.Fraction(c). Received: epsilon={epsilon!r}"
            )
        self.epsilon = float(epsilon)

    def apply(self, v: Vector) -> Vector:
        """(I + eps D) v, which lowers v's index, for v a list of tensors shaped as the weights."""
        return self._plus(v, self.epsilon)

    def weak_inverse(self, v: Vector) -> Vector:
        """(I - eps D) v, the inverse metric in the weak field: the direction of Eq. (10)."""
        return self._plus(v, -self.epsilon)

    def inverse(self, v: Vector) -> Vector:
        """(I + eps D)^-1 v, which raises v's index exactly, by the N x N system.

        v - (eps/N) G^T H (I + eps K)^-1 H G v (Woodbury), solved in float64.
        """
        return inverse_product(self.diffusion_matrix, self.epsilon, v)

    def inner(self, u: Vector, v: Vector) -> float:
        """<u, (I + eps D) v>, the inner product in the metric, a float.

        Args:
            u: a list of tensors shaped as the weights.
            v: likewise.
        """
        u = self.diffusion_matrix.vector(u)
        return float(vectors.inner(u, self.apply(v)))

    def norm(self, v: Vector) -> float:
        """The length of v in the metric, a float, for v a list of tensors shaped as the weights."""
        D = self.diffusion_matrix
        v = D.vector(v)
        centred = centring.centred(D.products(v))
        # A sum of squares: no difference of large numbers.
        return math.sqrt(float(vectors.norm(v)) ** 2 + self.epsilon * np.mean(centred**2))

    def weak_field_error(self, v: Vector | None = None) -> float:
        """How far the weak-field inverse is from the exact one.

        Args:
            v: a list of tensors shaped as the weights. Defaults to `None`.

        Returns:
            For `None` the operator norm ||(I + eps D)^-1 - (I - eps D)||, in [0, 1/2); for v the
            norm of that difference applied to v, over |(I + eps D)^-1 v|.
        """
        D = self.diffusion_matrix
        if v is None:
            return weak_field_error(D.eigenvalues(), self.epsilon)
        seen = _measure_along(D, v)
        return float(seen.weak_field_error(self.epsilon * seen.unit**2))

    def _plus(self, v: Vector, factor: float) -> Vector:
        D = self.diffusion_matrix
        v = D.vector(v)
        return vectors.add(v, D.matvec(v), factor)


def inverse_product(diffusion_matrix: DiffusionMatrix, epsilon: float, v: Vector) -> Vector:
    """(I + eps D)^-1 v exactly, for any eps >= 0; see `DiffusionMetric.inverse`."""
    D = diffusion_matrix
    v = D.vector(v)
    n = D.n_examples
    system = np.eye(n) + epsilon * D.centered_gram()
    solution = scipy.linalg.solve(system, centring.centred(D.products(v)), assume_a="pos")
    weights = ops.cast(centring.centred(solution), D.gradients.dtype)
    return vectors.add(v, D.gradients.combine(weights), -epsilon / n)


def weak_field_error(eigenvalues: Any, epsilon: float) -> float:
    """Distance between the exact inverse metric and its weak-field form.

    ||(I + eps D)^-1 - (I - eps D)||_2 = max_k (eps lam_k)^2 / (1 + eps lam_k), after Eq. (6).

    Args:
        eigenvalues: eigenvalues of D, shape (r,), in squared-gradient units.
        epsilon: the metric's parameter, 0 <= epsilon * max(eigenvalues) < 1.

    Returns:
        A float in [0, 1/2).
    """
    t = epsilon * np.asarray(eigenvalues)
    return float(np.max(t**2 / (1 + t)))


def choose_epsilon(
    diffusion_matrix: DiffusionMatrix, rule: Rule, v: Vector, iteration: int = 0
) -> float:
    """eps by `rule` for the exact spectrum of D along v, a float.

    Args:
        diffusion_matrix: a `DiffusionMatrix` outside a graph.
        rule: a rule of `keras_rgd.epsilon`.
        v: a list of tensors shaped as the weights.
        iteration: number of steps taken, for a schedule.
    """
    seen = _measure_along(diffusion_matrix, v)
    epsilon, _ = choose(rule, seen, iteration)
    return float(seen.in_true_units(epsilon))


def _measure_along(diffusion_matrix: DiffusionMatrix, v: Vector) -> SpectralMeasure:
    """The exact `SpectralMeasure` of D along v, in float64."""
    eigenvalues = diffusion_matrix.eigenvalues()
    top = eigenvalues[0]
    unit = np.sqrt(top) if top > 0 else 1.0
    norm = float(vectors.norm(v))
    weights = (diffusion_matrix.example_coordinates(v) / (norm if norm > 0 else 1.0)) ** 2
    rest = max(1 - weights.sum(), 0)
    return SpectralMeasure(
        lambda_max=ops.convert_to_tensor(top / unit**2),
        nodes=ops.convert_to_tensor(np.append(eigenvalues / unit**2, 0)),
        weights=ops.convert_to_tensor(np.append(weights, rest)),
        unit=ops.convert_to_tensor(np.float64(unit)),
    )
