r"""What is dropped on the way from Eq. (8) to Eq. (10) of the paper, term by term.

With the covariance over the examples, Cov_i, T_i(u, v) the gradient of <u, H_i v>, x' = dx/dt:

.. math::
    \dot x + \mathcal{E} D \dot x + \nabla L = C + \mathcal{E}\,\mathrm{Cov}_i(f_i, H_i \dot x)
    - \int \mathcal{E}\,\mathrm{Cov}_i(f_i, T_i(\dot x, \dot x) + H_i \ddot x) dt
    + \int \mathcal{E} D \ddot x \, dt + \int R \, dt

is Eq. (8) integrated by parts twice, with nothing dropped. The paper keeps the left-hand side. The
last integral but one is there because d^2 f / dt^2 is <x', H_i x'> + <g_i, x''>, of which the paper
has the first; it is not there where the index of Gamma is raised by the metric. R stands for the
derivative of eps, R = <x', D x'> grad eps / 2 - (d eps/dt) Cov_i(f_i, H_i x').
"""

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
    """What the derivation of Eq. (10) drops, at each of a flow's moments.

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
    constants: np.ndarray  # (T,), |C|, the same at each moment
    epsilon_derivative: np.ndarray  # (T,), |int R dt|; 0 for constant eps
    christoffel: np.ndarray  # (T,), |int (Gamma exact - Gamma weak)(x', x') dt|, O(eps^2) of (7)
    inverse: np.ndarray  # (T,), |((I + eps D)^-1 - (I - eps D)) grad L|, O(eps^2)
    departure: np.ndarray  # (T,), |x' + (I - eps D) grad L|: how far the flow is from Eq. (10)
    imbalance: np.ndarray  # (T,), of the equation above: 0 on a geodesic, but for rounding

    def relative(self, name):
        """A term over |grad L| of the same moment, shape (T,)."""
        return getattr(self, name) / self.gradient

    @property
    def names(self):
        """The names of the terms, in the order of the derivation."""
        return [f.name for f in dataclasses.fields(self)][2:]


def neglected_terms(flow, *, epsilon=None, nodes=5, verbose=True):
    """The terms that Eq. (10) lacks, along a flow, whatever equation it follows.

    Velocities and accelerations are the flow's own. The model is left as it was.

    Args:
        flow: a `Flow`.
        epsilon: another eps than the flow's, a float or a rule of `keras_rgd.epsilon`; needed for
            gradient descent, which has none and neglects nothing. Defaults to `None`.
        nodes: of Gauss and Legendre's rule, by which the integrals go through each of the
            integrator's steps. Defaults to `5`.
        verbose: whether work of more than two seconds shows a progress bar. Defaults to `True`.

    Returns:
        A `NeglectedTerms`.

    Raises:
        ValueError: the flow's rule for eps has no derivative (see `christoffel`).
    """
    gauss, weights = np.polynomial.legendre.leggauss(nodes)
    point, times = flow.equation.point, flow.times
    steps = flow.solution.ts
    # From the flow's start, which need not be among the moments that it reports.
    ends = np.unique(np.concatenate([times, steps[steps < times[-1]], steps[:1]]))
    integrals = {name: np.zeros(point.d) for name in _INTEGRALS}
    rows = []
    with (
        point.visiting(),
        progress_bar("neglected terms", len(ends), verbose, after=SHOWN_AFTER) as advance,
    ):
        start = flow.solution(ends[0])
        point.move_to(start[: point.d])
        field = flow.equation.epsilon if epsilon is None else EpsilonField(epsilon, point)
        first = _Moment(flow.equation, field, start)
        constants = first.left() - first.curvature()
        for i, t in enumerate(ends):
            begin, half = ends[max(i - 1, 0)], (t - ends[max(i - 1, 0)]) / 2
            # No step before the first moment.
            for node, weight in zip(gauss, weights, strict=True) if half else ():
                state = flow.solution(begin + half + half * node)
                for name, value in _integrands(_Moment(flow.equation, field, state)).items():
                    integrals[name] += half * weight * value
            if t in times:
                moment = _Moment(flow.equation, field, flow.solution(t))
                rows.append(_norms(moment, integrals, constants))
            advance()
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return NeglectedTerms(times=times, **columns)


_INTEGRALS = ("third", "acceleration", "total", "epsilon", "christoffel")


class _Moment:
    """One state of a flow: what the terms are made of, as flat vectors or lists of tensors."""

    def __init__(self, equation, field, state):
        self.equation, self.point = equation, equation.point
        point = self.point
        point.move_to(state[: point.d])
        self.v = point.gradient()
        self.losses = point.derivatives.losses()
        self.D = point.diffusion_matrix()
        self.epsilon = field.at(self.D, self.v)
        self.epsilon_gradient = field.gradient(self.D, self.v)
        self.velocity = vectors.unflatten(equation.velocity(state), point.weights, point.dtype)

    def left(self):
        """X' + eps D x' + grad L."""
        moved = vectors.add(self.velocity, self.point.product(self.velocity), self.epsilon)
        return flat(vectors.add(moved, self.v))

    def curvature(self):
        """Eps Cov_i(f_i, H_i x')."""
        return self.epsilon * flat(self.point.covariance_hessian(self.losses, self.velocity))


def pointwise_terms(point, rule, epsilon):
    """What Eq. (10) neglects at the model's weights, with the velocity that it has there.

    Args:
        point: a `Point`.
        rule: a rule of `keras_rgd.epsilon`.
        epsilon: what it chose here, a float.

    Returns:
        A dictionary of floats. Relative to |grad L|: `neglected_curvature`, eps Cov_i(f_i, H_i x').
        Integrands, relative to |d/dt grad L|: `neglected_acceleration`, eps D x'';
        `neglected_christoffel`, (Gamma exact - Gamma weak)(x', x'); `neglected_epsilon`, R, NaN
        where the rule has no derivative, and eps then counts as constant in x''.
    """
    with point.visiting():
        v, D = point.gradient(), point.diffusion_matrix()
        try:
            slope, known = epsilon_gradient(point, D, rule, epsilon), True
        except ValueError:
            slope, known = None, False
        velocity = vectors.scale(vectors.add(v, point.product(v), -epsilon), -1.0)
        change = point.derivatives.loss_hessian(velocity)
        acceleration = rgd_acceleration(point, velocity, v, change, epsilon, slope)
        losses = point.derivatives.losses()
        symbols = point.christoffel(velocity, velocity, epsilon)
        raised = inverse_product(D, epsilon, symbols)
        terms = {
            "curvature": (epsilon * flat(point.covariance_hessian(losses, velocity)), v),
            "acceleration": (epsilon * flat(point.product(acceleration)), change),
            "christoffel": (flat(raised) - flat(symbols), change),
            "epsilon": (_epsilon_term(point, velocity, losses, slope), change),
        }
    sizes = {f"neglected_{name}": _ratio(term, flat(to)) for name, (term, to) in terms.items()}
    return sizes if known else sizes | {"neglected_epsilon": math.nan}


def _ratio(a, b):
    size = np.linalg.norm(b)
    return float(np.linalg.norm(a) / size) if size > 0 else math.nan


def _integrands(moment):
    """The integrals' derivatives by time, each a flat vector."""
    point, epsilon, x1 = moment.point, moment.epsilon, moment.velocity
    x2 = moment.equation.acceleration(x1)
    weak = vectors.scale(point.christoffel(x1, x1, epsilon), -1.0)
    raised = inverse_product(moment.D, epsilon, weak)
    return {
        "third": epsilon * flat(point.covariance_third(moment.losses, x1, x1)),
        "acceleration": epsilon * flat(point.covariance_hessian(moment.losses, x2)),
        "total": epsilon * flat(point.product(x2)),
        "epsilon": _epsilon_term(point, x1, moment.losses, moment.epsilon_gradient),
        "christoffel": flat(weak) - flat(raised),
    }


def _epsilon_term(point, velocity, losses, slope):
    """R, what the gradient of eps(x) adds, a flat vector; 0 where that is `None`."""
    if slope is None:
        return np.zeros(point.d)
    stretch = float(vectors.inner(velocity, point.product(velocity)))
    change = float(vectors.inner(slope, velocity))
    moved = flat(point.covariance_hessian(losses, velocity))
    return stretch / 2 * flat(slope) - change * moved


def _norms(moment, integrals, constants):
    """One row of `NeglectedTerms`."""
    equation, point, epsilon = moment.equation, moment.point, moment.epsilon
    curvature, left, v = moment.curvature(), moment.left(), flat(moment.v)
    condition_9 = integrals["third"] + integrals["acceleration"]
    right = constants + curvature - condition_9 + integrals["epsilon"]
    if not equation.exact:
        right += integrals["total"]
    weak = flat(vectors.add(moment.v, point.product(moment.v), -epsilon))
    exact = flat(inverse_product(moment.D, epsilon, moment.v))
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
        "departure": norm(flat(moment.velocity) + weak),
        "imbalance": norm(left - right),
    }
