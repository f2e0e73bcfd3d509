"""Trajectories in weight space: of gradient descent, of RGD, of geodesics.

Time is that of Eq. (1), in which a step of learning rate eta takes the time eta. SciPy's
integrators do the integration, in float64; the derivatives are in the weights' dtype.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import scipy.integrate
import tensorflow as tf

from keras_rgd._support.arguments import is_real
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.diffusion_matrix import NotFiniteError
from keras_rgd.geometry.equations import Equation

# Tolerances of the integrator: what the derivatives' own rounding lets be reached.
_TOLERANCES = {tf.float64: (1e-9, 1e-11), tf.float32: (1e-4, 1e-6)}


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """One trajectory from t = 0 on, seen at `times`; d weights, flat in the order of the model's.

    It holds the `Geometry` it was made with, and so the model and the data.
    """

    kind: str  # "gradient", "rgd" or "geodesic"
    times: np.ndarray  # (T,), increasing: those asked for, which may begin after 0, or all steps
    positions: np.ndarray  # (T, d), float64
    velocities: np.ndarray  # (T, d), dx/dt
    losses: np.ndarray  # (T,), L = r + mean f_i
    epsilons: np.ndarray  # (T,), one over squared gradient; 0 for gradient descent
    epsilon_lambda_max: np.ndarray  # (T,), eps lambda_max; below 1 by Eq. (6)
    equation: Equation  # what was integrated
    solution: Callable  # dense output: t -> (d,), for a geodesic (2 d,) with the velocity
    diverged: bool  # stopped before the end; the last of `times` is then where
    message: str  # why it stopped
    evaluations: int  # of the right-hand side
    seconds: float

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def position(self, t: float) -> np.ndarray:
        """The weights at time t, by the integrator's own interpolation, shape (d,).

        Raises:
            ValueError: t is not between 0 and the last of `times`.
        """
        if not 0 <= t <= self.times[-1]:
            raise ValueError(
                f"The flow is known for 0 <= t <= {self.times[-1]:.6g}. Received: t={t!r}"
            )
        return self.solution(t)[: self.positions.shape[1]]


def integrate(
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
    """The `Flow` of an `Equation` from the present weights on; see `Geometry.gradient_flow`."""
    started = time.perf_counter()
    times = _checked_times(times, duration)
    start = equation.start()
    limit = _loss_limit(_loss(equation, start), max_loss)
    relative, absolute = _TOLERANCES.get(equation.geometry.dtype, _TOLERANCES[tf.float32])
    with (
        progress_bar(f"{equation.kind} flow", 100, verbose, after=SHOWN_AFTER) as advance,
        # Trial points may lie far off; the integrator rejects them.
        np.errstate(all="ignore"),
    ):
        solved = scipy.integrate.solve_ivp(
            _right_hand_side(equation, duration, advance),
            (0.0, duration),
            start,
            method,
            times,
            dense_output=True,
            events=_ends(equation, limit),
            rtol=relative if rtol is None else rtol,
            atol=absolute if atol is None else atol,
        )
    # Where it ended before the next of `times`, that too.
    seen = np.unique(np.append(solved.t, solved.sol.ts[-1]) if solved.status else solved.t)
    states = solved.sol(seen).T
    rows = [_row(equation, state) for state in states]
    return Flow(
        kind=equation.kind,
        times=seen,
        positions=states[:, : equation.geometry.d].copy(),
        **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        equation=equation,
        solution=solved.sol,
        diverged=solved.status != 0,
        message=_message(solved, seen[-1], limit),
        evaluations=solved.nfev,
        seconds=time.perf_counter() - started,
    )


def _right_hand_side(equation, duration, advance):
    """The derivative by time as SciPy asks for it; calls `advance` at each hundredth of the way."""
    percent = 0

    def right_hand_side(t, state):
        nonlocal percent
        equation.visit(state)
        while percent < min(100 * t / duration, 100) - 1:
            percent += 1
            advance()
        try:
            return equation(state)
        except NotFiniteError:
            return np.full_like(state, np.nan)

    return right_hand_side


def _ends(equation, limit):
    """What ends the integration where it is no longer positive, as SciPy's events."""
    constant = equation.epsilon.constant

    def room_for_loss(t, state):
        return limit - _loss(equation, state)

    def room_for_epsilon(t, state):
        equation.visit(state)
        try:
            return 1 - constant * equation.geometry.diffusion_matrix().top_eigenvalue()
        except NotFiniteError:
            return np.nan

    # A rule keeps eps below 1 / lambda_max by itself.
    events = [room_for_loss, room_for_epsilon] if constant else [room_for_loss]
    for event in events:
        event.terminal = True
    return events


def _loss(equation, state):
    equation.visit(state)
    return float(equation.geometry.derivatives.loss_and_gradient()[0])


def _loss_limit(first, max_loss):
    if not np.isfinite(first):
        raise ValueError(
            f"The loss is not finite at the start. Expected finite weights and data. Received: "
            f"a loss of {first}"
        )
    return 1000 * (1 + abs(first)) if max_loss is None else max_loss


def _row(equation, state):
    """What a `Flow` has at one of its times."""
    equation.visit(state)
    geometry = equation.geometry
    loss, v = geometry.derivatives.loss_and_gradient()
    try:
        D = geometry.diffusion_matrix()
        epsilon = equation.epsilon.at(D, v)
        product = epsilon * D.top_eigenvalue()
        velocity = equation.velocity(state)
    except NotFiniteError:
        epsilon = product = np.nan
        velocity = np.full(geometry.d, np.nan)
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
    if not (is_real(duration) and 0 < duration < math.inf):
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
