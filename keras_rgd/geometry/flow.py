"""Trajectories in weight space: of gradient descent, of RGD, of geodesics.

Time is that of Eq. (1), in which a step of learning rate eta takes the time eta. SciPy's
integrators do the integration, in float64; the derivatives are in the weights' dtype.
"""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable

import numpy as np
import scipy.integrate
import tensorflow as tf

from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.diffusion_matrix import NotFiniteError
from keras_rgd.geometry.equations import Equation, Geodesic, GradientDescent, RelativisticDescent
from keras_rgd.geometry.point import Point

# Tolerances of the integrator: what the derivatives' own rounding lets be reached.
_TOLERANCES = {tf.float64: (1e-9, 1e-11), tf.float32: (1e-4, 1e-6)}


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """One trajectory, at the moments `times`; d weights, flat in the order of the model's."""

    kind: str  # "gradient", "rgd" or "geodesic"
    times: np.ndarray  # (T,), increasing, from 0
    positions: np.ndarray  # (T, d), float64
    velocities: np.ndarray  # (T, d), dx/dt
    losses: np.ndarray  # (T,), L = r + mean f_i
    epsilons: np.ndarray  # (T,), one over squared gradient; 0 for gradient descent
    epsilon_lambda_max: np.ndarray  # (T,), eps lambda_max; below 1 by Eq. (6)
    equation: Equation  # what was integrated
    solution: Callable  # dense output: t -> (d,), for a geodesic (2 d,) with the velocity
    diverged: bool  # stopped before the end
    message: str  # why it stopped
    evaluations: int  # of the right-hand side
    seconds: float

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if f.type is np.ndarray:
                getattr(self, f.name).flags.writeable = False

    def position(self, t):
        """The weights at time t, by the integrator's own interpolation, shape (d,).

        Raises:
            ValueError: t is outside of `times`.
        """
        self._check(t)
        return self.solution(t)[: self.positions.shape[1]]

    def _check(self, t):
        if not self.times[0] <= t <= self.times[-1]:
            raise ValueError(
                f"The flow is known for 0 <= t <= {self.times[-1]:.6g}. Received: t={t!r}"
            )


def gradient_flow(model, x, y, duration, *, sample_weight=None, **options):
    """dx/dt = -grad L(x) from the model's weights on, the limit of gradient descent.

    The model is left as it was. Layers are in evaluation mode.

    Args:
        model: any compiled `keras.Model`. Build it in float64 (`keras.config.set_floatx`) for more
            than four digits.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        duration: the time to follow it, in learning rates: 100 steps of rate 0.1 take 10.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        **options: of the integration.
            times: moments to report, increasing, from 0 to `duration`. Defaults to `None`, the
                integrator's own steps.
            method: of `scipy.integrate.solve_ivp`. Defaults to `"DOP853"`.
            rtol, atol: its tolerances. Default to 1e-9 and 1e-11 for weights in float64, 1e-4 and
                1e-6 else.
            max_loss: where a larger loss ends it. Defaults to 1000 times (1 + |loss at first|).
            verbose: whether work of more than two seconds shows a progress bar. Defaults to
                `True`.

    Returns:
        A `Flow`. Where the loss exceeded `max_loss`, was no longer finite, or the step became too
        small, it ends there and `diverged` is set.

    Raises:
        ValueError: an argument is not what is described here.
    """
    point = Point(model, x, y, sample_weight, compiled=True)
    with point.visiting():
        return _integrated(GradientDescent(point), duration, **options)


def rgd_flow(model, x, y, duration, epsilon, *, sample_weight=None, **options):
    """dx/dt = -(I - eps D) grad L(x), Eq. (10), from the model's weights on.

    Args:
        model: as in `gradient_flow`, like all arguments that are not described here.
        x: inputs.
        y: targets.
        duration: the time to follow it.
        epsilon: eps, a float, constant in time; or a rule of `keras_rgd.epsilon`, applied to D and
            the gradient at each point. (The optimizer's `epsilon=0.5` is here `Fraction(0.5)`.)
        sample_weight: the examples' weights in the loss.
        **options: of the integration.

    Returns:
        A `Flow`; it also ends where a constant eps is no longer below 1 / lambda_max.

    Raises:
        ValueError: as `gradient_flow`; or eps is not below 1 / lambda_max at the start.
    """
    point = Point(model, x, y, sample_weight, compiled=True)
    with point.visiting():
        return _integrated(RelativisticDescent(point, epsilon), duration, **options)


def geodesic_flow(
    model,
    x,
    y,
    duration,
    epsilon,
    *,
    velocity=None,
    exact=False,
    force=True,
    sample_weight=None,
    **options,
):
    r"""The geodesic of I + eps D under the force of the loss, Eq. (8), from the model's weights on.

    .. math:: \ddot x^k + \Gamma^k_{ij} \dot x^i \dot x^j = -\frac{d}{dt} \partial_k L

    (The right-hand side printed in Eq. (8) has the other sign, which disagrees with the lines
    before and after it.) In the weak field the index of Gamma is raised with the identity and the
    force is taken as it stands, as printed. The force is a covector by its origin, and `exact=True`
    raises both with (I + eps D)^-1, so that it is a geodesic of the metric itself. Eps is
    constant in time, as in the derivation.

    Args:
        model: as in `gradient_flow`, like all arguments that are not described here.
        x: inputs.
        y: targets.
        duration: the time to follow it.
        epsilon: eps, a float; or a rule of `keras_rgd.epsilon`, applied at the start.
        velocity: dx/dt at the start, a list of arrays shaped as the weights. Defaults to `None`,
            that of Eq. (10), -(I - eps D) grad L.
        exact: whether to raise indices with the inverse metric. Defaults to `False`.
        force: whether there is a force. Defaults to `True`.
        sample_weight: the examples' weights in the loss.
        **options: of the integration.

    Returns:
        A `Flow`; its `solution` has the velocity after the position.

    Raises:
        ValueError: as `rgd_flow`; or the velocity is not shaped as the weights.
    """
    point = Point(model, x, y, sample_weight, compiled=True)
    velocity = None if velocity is None else point.vector(velocity, "velocity")
    with point.visiting():
        equation = Geodesic(point, epsilon, velocity, exact, force)
        return _integrated(equation, duration, **options)


def _integrated(
    equation,
    duration,
    *,
    times=None,
    method="DOP853",
    rtol=None,
    atol=None,
    max_loss=None,
    verbose=True,
):
    """The `Flow` of an equation from where its point is."""
    started = time.perf_counter()
    point = equation.point
    times = _checked_times(times, duration)
    start = equation.start()
    d = point.d

    def visit(state):
        point.move_to(state[:d])

    def loss(state):
        visit(state)
        return float(point.derivatives.loss_and_gradient()[0])

    first = loss(start)
    if not np.isfinite(first):
        raise ValueError(
            f"The loss is not finite at the start. Expected finite weights and data. Received: "
            f"a loss of {first}"
        )
    limit = 1000 * (1 + abs(first)) if max_loss is None else max_loss
    relative, absolute = _TOLERANCES.get(point.dtype, _TOLERANCES[tf.float32])
    percent = 0

    with progress_bar(f"{equation.kind} flow", 100, verbose, after=SHOWN_AFTER) as advance:

        def slope(t, state):
            nonlocal percent
            visit(state)
            while percent < min(100 * t / duration, 100) - 1:
                percent += 1
                advance()
            try:
                return equation(state)
            except NotFiniteError:
                return np.full_like(state, np.nan)

        def room_for_loss(t, state):
            return limit - loss(state)

        def room_for_epsilon(t, state):
            visit(state)
            try:
                return 1 - constant * point.diffusion_matrix().top_eigenvalue()
            except NotFiniteError:
                return np.nan

        constant = equation.epsilon.constant
        events = [room_for_loss] + [room_for_epsilon] * bool(constant)
        for event in events:
            event.terminal = True
        # Trial points may lie far off; the integrator rejects them.
        with np.errstate(all="ignore"):
            solved = scipy.integrate.solve_ivp(
                slope,
                (0.0, duration),
                start,
                method,
                times,
                dense_output=True,
                events=events,
                rtol=relative if rtol is None else rtol,
                atol=absolute if atol is None else atol,
            )
    # Where it ended before the next of `times`, that moment too.
    moments = np.unique(np.append(solved.t, solved.sol.ts[-1]) if solved.status else solved.t)
    states = solved.sol(moments).T
    values = [_values(equation, visit, state) for state in states]
    return Flow(
        kind=equation.kind,
        times=moments,
        positions=states[:, :d].copy(),
        **{name: np.array([value[name] for value in values]) for name in values[0]},
        equation=equation,
        solution=solved.sol,
        diverged=solved.status != 0,
        message=_message(solved, moments[-1], limit),
        evaluations=solved.nfev,
        seconds=time.perf_counter() - started,
    )


def _values(equation, visit, state):
    """One row of a `Flow`."""
    visit(state)
    point = equation.point
    loss, v = point.derivatives.loss_and_gradient()
    try:
        D = point.diffusion_matrix()
        epsilon = equation.epsilon.at(D, v)
        product = epsilon * D.top_eigenvalue()
        velocity = equation.velocity(state)
    except NotFiniteError:
        epsilon = product = np.nan
        velocity = np.full(point.d, np.nan)
    return {
        "velocities": velocity,
        "losses": float(loss),
        "epsilons": epsilon,
        "epsilon_lambda_max": product,
    }


def _message(solved, end, limit):
    end = f"at t = {end:.6g}"
    if solved.status < 0:
        return f"{solved.message} {end}: the derivatives are not finite, or the equation is stiff"
    if solved.status == 0:
        return f"reached its end {end}"
    if len(solved.t_events[0]):
        return f"the loss exceeded {limit:.6g} {end}"
    return f"eps lambda_max reached 1 {end}, which Eq. (6) excludes; choose a smaller eps or a rule"


def _checked_times(times, duration):
    if not (isinstance(duration, numbers.Real) and 0 < duration < math.inf):
        raise ValueError(f"`duration` must be a positive number. Received: duration={duration!r}")
    if times is None:
        return None
    times = np.asarray(times, float)
    increasing = times.ndim == 1 and len(times) > 0 and np.all(np.diff(times) > 0)
    if not increasing or times[0] < 0 or times[-1] > duration:
        raise ValueError(
            f"`times` must increase from 0 on and end by duration={duration!r}. Received: {times}"
        )
    return times
