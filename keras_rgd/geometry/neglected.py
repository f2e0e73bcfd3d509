r"""What is dropped on the way from Eq. (8) to Eq. (10) of the paper, term by term.

Write x' = dx/dt, Cov_i for the covariance over the examples divided by N, and T_i(u, v) for the
gradient of <u, H_i v>. Eq. (8), integrated by parts twice with nothing dropped, is

.. math::
    \dot x + \mathcal{E} D \dot x + \nabla L = C + \mathcal{E}\,\mathrm{Cov}_i(f_i, H_i \dot x)
    - \int \mathcal{E}\,\mathrm{Cov}_i(f_i, T_i(\dot x, \dot x) + H_i \ddot x) dt
    + \int \mathcal{E} D \ddot x \, dt + \int R \, dt

with a constant C. The paper keeps the left-hand side alone. The integral of eps D x'' is not in the
paper, which writes d^2 f_i / dt^2 as <x', H_i x'>, where it is <x', H_i x'> + <g_i, x''>. Where the
index of Gamma is raised by the metric itself, the integral is not there. R is what a rule's eps(x)
adds by its derivative, R = <x', D x'> grad eps / 2 - (d eps/dt) Cov_i(f_i, H_i x').
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_rgd._support import vectors
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.diffusion_metric import inverse_product
from keras_rgd.geometry.epsilon_field import EpsilonField, epsilon_gradient
from keras_rgd.geometry.equations import flat, rgd_acceleration


@dataclasses.dataclass(frozen=True, eq=False)
class NeglectedTerms:
    """What the derivation of Eq. (10) drops, at each of a flow's times.

    All are norms in units of the loss's gradient, so that they can be compared with `gradient`.
    Integrals run from the flow's start.
    """

    times: np.ndarray  # (T,)
    gradient: np.ndarray  # (T,), |grad L|
    curvature: np.ndarray  # (T,), |eps Cov_i(f_i, H_i x')|, dropped as eps / N^2 is small
    third_derivatives: np.ndarray  # (T,), |int eps Cov_i(f_i, T_i(x', x')) dt|, of condition (9)
    acceleration: np.ndarray  # (T,), |int eps Cov_i(f_i, H_i x'') dt|, of condition (9)
    condition_9: np.ndarray  # (T,), |the sum of these two|
    total_derivative: np.ndarray  # (T,), |int eps D x'' dt|, of d^2 f_i/dt^2
    constants: np.ndarray  # (T,), |C|, the same at all times
    epsilon_derivative: np.ndarray  # (T,), |int R dt|; 0 for constant eps
    christoffel: np.ndarray  # (T,), |int (Gamma exact - Gamma weak)(x', x') dt|, O(eps^2) of (7)
    inverse: np.ndarray  # (T,), |((I + eps D)^-1 - (I - eps D)) grad L|, O(eps^2)
    departure: np.ndarray  # (T,), |x' + (I - eps D) grad L|: how far the flow is from Eq. (10)
    imbalance: np.ndarray  # (T,), |left - right| of Eq. (8) as above: on a geodesic rounding

    def relative(self, name: str) -> np.ndarray:
        """A term over |grad L| of the same instant, shape (T,)."""
        return getattr(self, name) / self.gradient

    @property
    def names(self) -> list[str]:
        """The names of the terms, in the order of the derivation."""
        return [f.name for f in dataclasses.fields(self)][2:]


def terms_along(geometry, flow, epsilon, nodes, verbose):
    """The `NeglectedTerms` of a flow of this geometry; see `Geometry.neglected_terms`."""
    _check_flow(geometry, flow)
    gauss, weights = np.polynomial.legendre.leggauss(nodes)
    steps = flow.solution.ts
    # From the flow's start, which need not be among the times that it reports.
    ends = np.unique(np.concatenate([flow.times, steps[steps < flow.times[-1]], steps[:1]]))
    integrals = {name: np.zeros(geometry.d) for name in _INTEGRALS}
    rows = []
    with progress_bar("neglected terms", len(ends), verbose, after=SHOWN_AFTER) as advance:
        start = flow.solution(ends[0])
        flow.equation.visit(start)
        field = flow.equation.epsilon if epsilon is None else EpsilonField(epsilon, geometry)
        first = _Instant(flow.equation, field, start)
        constants = first.left() - first.curvature()
        for begin, end in zip([ends[0], *ends], ends, strict=False):
            half = (end - begin) / 2
            # No step before the first of them.
            for node, weight in zip(gauss, weights, strict=True) if half else ():
                instant = _Instant(flow.equation, field, flow.solution(begin + half + half * node))
                for name, value in _integrands(instant).items():
                    integrals[name] += half * weight * value
            if end in flow.times:
                instant = _Instant(flow.equation, field, flow.solution(end))
                rows.append(_norms(instant, integrals, constants))
            advance()
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return NeglectedTerms(times=flow.times, **columns)


def _check_flow(geometry, flow):
    if flow.equation.geometry is not geometry:
        raise ValueError(
            "`flow` was not made by this Geometry. Use the one that made it, or "
            "keras_rgd.geometry.neglected_terms(flow)."
        )
    if flow.positions.shape[1] != geometry.d:
        raise ValueError(
            "The model trains other weights than when the flow was made. Expected "
            f"{flow.positions.shape[1]} trainable scalars. Received: {geometry.d}"
        )


_INTEGRALS = ("third", "acceleration", "total", "epsilon", "christoffel")


class _Instant:
    """One state of a flow: what the terms are made of, as flat vectors or lists of tensors."""

    def __init__(self, equation, field, state):
        self.equation, self.geometry = equation, equation.geometry
        equation.visit(state)
        geometry = self.geometry
        self.v = geometry.gradient()
        self.losses = geometry.derivatives.losses()
        self.D = geometry.diffusion_matrix()
        self.epsilon = field.at(self.D, self.v)
        self.grad_epsilon = field.gradient(self.D, self.v)
        velocity = equation.velocity(state)
        self.velocity = vectors.unflatten(velocity, geometry.weights, geometry.dtype)

    def left(self):
        """x' + eps D x' + grad L."""
        moved = vectors.add(self.velocity, self.geometry.product(self.velocity), self.epsilon)
        return flat(vectors.add(moved, self.v))

    def curvature(self):
        """eps Cov_i(f_i, H_i x')."""
        return self.epsilon * flat(self.geometry.covariance_hessian(self.losses, self.velocity))


def pointwise_terms(geometry, rule, epsilon):
    """What Eq. (10) neglects at the model's weights, with the velocity that it has there.

    Args:
        geometry: a `Geometry`.
        rule: a rule of `keras_rgd.epsilon`.
        epsilon: what it chose here, a float.

    Returns:
        A dictionary of floats. Relative to |grad L|: `neglected_curvature`, eps Cov_i(f_i, H_i x').
        Integrands, relative to |d/dt grad L|: `neglected_acceleration`, eps D x'';
        `neglected_christoffel`, (Gamma exact - Gamma weak)(x', x'); `neglected_epsilon`, R, NaN
        where the rule has no derivative, and eps then counts as constant in x''.
    """
    with geometry.visiting():
        v, D = geometry.gradient(), geometry.diffusion_matrix()
        try:
            grad_epsilon, known = epsilon_gradient(geometry, D, rule, epsilon), True
        except ValueError:
            grad_epsilon, known = None, False
        velocity = vectors.scale(vectors.add(v, geometry.product(v), -epsilon), -1.0)
        change = geometry.derivatives.loss_hessian(velocity)
        acceleration = rgd_acceleration(geometry, velocity, v, change, epsilon, grad_epsilon)
        losses = geometry.derivatives.losses()
        symbols = geometry.lowered_christoffel(velocity, velocity, epsilon)
        raised = inverse_product(D, epsilon, symbols)
        terms = {
            "curvature": (epsilon * flat(geometry.covariance_hessian(losses, velocity)), v),
            "acceleration": (epsilon * flat(geometry.product(acceleration)), change),
            "christoffel": (flat(raised) - flat(symbols), change),
            "epsilon": (_epsilon_term(geometry, velocity, losses, grad_epsilon), change),
        }
    sizes = {f"neglected_{name}": _ratio(term, flat(to)) for name, (term, to) in terms.items()}
    return sizes if known else sizes | {"neglected_epsilon": math.nan}


def _ratio(a, b):
    size = np.linalg.norm(b)
    return float(np.linalg.norm(a) / size) if size > 0 else math.nan


def _integrands(instant):
    """The integrals' derivatives by time, each a flat vector."""
    geometry, epsilon, x1 = instant.geometry, instant.epsilon, instant.velocity
    x2 = instant.equation.acceleration(x1)
    weak = vectors.scale(geometry.lowered_christoffel(x1, x1, epsilon), -1.0)
    raised = inverse_product(instant.D, epsilon, weak)
    return {
        "third": epsilon * flat(geometry.covariance_third(instant.losses, x1, x1)),
        "acceleration": epsilon * flat(geometry.covariance_hessian(instant.losses, x2)),
        "total": epsilon * flat(geometry.product(x2)),
        "epsilon": _epsilon_term(geometry, x1, instant.losses, instant.grad_epsilon),
        "christoffel": flat(weak) - flat(raised),
    }


def _epsilon_term(geometry, velocity, losses, grad_epsilon):
    """R, what the gradient of eps(x) adds, a flat vector; 0 where that is `None`."""
    if grad_epsilon is None:
        return np.zeros(geometry.d)
    stretch = float(vectors.inner(velocity, geometry.product(velocity)))
    change = float(vectors.inner(grad_epsilon, velocity))
    moved = flat(geometry.covariance_hessian(losses, velocity))
    return stretch / 2 * flat(grad_epsilon) - change * moved


def _norms(instant, integrals, constants):
    """One row of `NeglectedTerms`."""
    equation, geometry, epsilon = instant.equation, instant.geometry, instant.epsilon
    curvature, left, v = instant.curvature(), instant.left(), flat(instant.v)
    condition_9 = integrals["third"] + integrals["acceleration"]
    right = constants + curvature - condition_9 + integrals["epsilon"]
    if not equation.exact:
        right += integrals["total"]
    weak = flat(vectors.add(instant.v, geometry.product(instant.v), -epsilon))
    exact = flat(inverse_product(instant.D, epsilon, instant.v))
    norm = np.linalg.norm
    return {
        "gradient": norm(v),
        "curvature": norm(curvature),
        "third_derivatives": norm(integrals["third"]),
        "acceleration": norm(integrals["acceleration"]),
        "condition_9": norm(condition_9),
        "total_derivative": norm(integrals["total"]),
        "constants": norm(constants),
        "epsilon_derivative": norm(integrals["epsilon"]),
        "christoffel": norm(integrals["christoffel"]),
        "inverse": norm(exact - weak),
        "departure": norm(flat(instant.velocity) + weak),
        "imbalance": norm(left - right),
    }
