"""eps of each step, chosen by the rule and kept with the step's other numbers, in variables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.epsilon import Rule, choose


class Scalar(keras.Variable):
    """A number that `float()` and `int()` read also where `tf.distribute` mirrors it."""

    def __float__(self):
        return float(ops.convert_to_numpy(self))

    def __int__(self):
        return int(ops.convert_to_numpy(self))


@dataclasses.dataclass(frozen=True)
class StepMeans:
    """Over the steps since `RGD.reset_step_means()`, but for those that were not finite."""

    epsilon: float  # geometric mean over the steps with eps > 0, one over squared gradient; or NaN
    weak_field_error: float  # mean of the error on the step; NaN without a step
    steps: int
    steps_without_epsilon: int  # of them, with eps = 0: plain gradient descent


class StepValues:
    """The variables, and how a step chooses its eps and is recorded in them.

    Args:
        add_variable: a function of shape, dtype and name that makes one.
        add_scalar: a function of dtype and name that makes a `Scalar`.
    """

    def __init__(self, add_variable: Callable[..., Any], add_scalar: Callable[..., Any]):
        self.lambda_max = add_scalar(None, "lambda_max")
        self.mean_lambda_max = add_scalar(None, "mean_lambda_max")
        self.chosen_epsilon = add_scalar(None, "chosen_epsilon")
        self.step_weak_field_error = add_scalar(None, "step_weak_field_error")
        self.epsilon_cuts = add_scalar("int", "epsilon_cuts")
        self.rounded_steps = add_scalar("int", "rounded_steps")
        # Rows: the sums of log eps and of the error, and what they lost to rounding (Kahan).
        self._sums = add_variable((2, 2), None, "step_sums")
        self._steps = add_variable((2,), "int", "step_counts")

    def choose_epsilon(
        self, rule: Rule, direction: Any, iteration: Tensor
    ) -> tuple[Tensor, Tensor]:
        """eps of a step, by a rule that is told of the steps before; recorded.

        Args:
            rule: the optimizer's.
            direction: what the step goes along, with `seen_by_rule` and `lost_digits`; see
                `keras_rgd.direction`.
            iteration: the number of steps taken, for schedules.

        Returns:
            eps in the unit of `seen_by_rule`; what `record` returns.
        """
        spectrum = direction.seen_by_rule
        unit = ops.cast(spectrum.unit, spectrum.lambda_max.dtype)
        mean = ops.cast(self.mean_lambda_max.value, unit.dtype) / unit / unit
        spectrum = dataclasses.replace(spectrum, mean_lambda_max=mean)
        epsilon, cut = choose(rule, spectrum, iteration)
        return epsilon, self.record(direction, epsilon, cut, rule.decay)

    def record(self, direction: Any, epsilon: Tensor, cut: Tensor, decay: float) -> Tensor:
        """Record a step.

        Args:
            direction: as in `choose_epsilon`.
            epsilon: its eps in the unit of `seen_by_rule`.
            cut: whether the rule was cut, a bool tensor.
            decay: the rule's.

        Returns:
            Whether the numbers are finite, a bool tensor; where not, nothing changes.
        """
        spectrum, unit = direction.seen_by_rule, direction.seen_by_rule.unit
        error = spectrum.weak_field_error(epsilon)
        values = [
            (self.lambda_max, spectrum.lambda_max * unit * unit),
            (self.chosen_epsilon, spectrum.in_true_units(epsilon)),
            (self.step_weak_field_error, error),
        ]
        # A batch that overflowed (half precision skips it) must not become the next estimate.
        finite = ops.all(ops.stack([ops.isfinite(value) for _, value in values]))
        mean, new = self.mean_lambda_max.value, _as(values[0][1], self.mean_lambda_max)
        mean = ops.where(mean > 0, decay * mean + (1 - decay) * new, new)
        for variable, value in [*values, (self.mean_lambda_max, mean)]:
            variable.assign(ops.where(finite, _as(value, variable), variable.value))
        events = ((self.epsilon_cuts, cut), (self.rounded_steps, direction.lost_digits))
        for counter, event in events:
            counter.assign_add(_as(ops.logical_and(finite, event), counter))
        self._add(ops.log(epsilon) - 2 * ops.log(_as(unit, epsilon)), error, finite)
        return finite

    def _add(self, log_epsilon, error, finite):
        some = ops.logical_and(finite, ops.isfinite(log_epsilon))
        new = ops.stack([ops.where(some, log_epsilon, 0), ops.where(finite, error, 0)])
        sums, lost = self._sums.value[0], self._sums.value[1]
        new = _as(new, self._sums) - lost
        total = sums + new
        self._sums.assign(ops.stack([total, (total - sums) - new]))
        none = ops.logical_and(finite, ops.logical_not(some))
        self._steps.assign_add(_as(ops.stack([finite, none]), self._steps))

    def reset_means(self) -> None:
        """Begin anew with `means`; outside a graph."""
        for variable in (self._sums, self._steps):
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    def means(self) -> StepMeans:
        """The `StepMeans`; outside a graph."""
        log_epsilon, error = ops.convert_to_numpy(self._sums)[0].astype("float64")
        steps, without = map(int, ops.convert_to_numpy(self._steps))
        some = steps - without
        return StepMeans(
            epsilon=float(np.exp(log_epsilon / some)) if some else math.nan,
            weak_field_error=float(error / steps) if steps else math.nan,
            steps=steps,
            steps_without_epsilon=without,
        )


def _as(value, like):
    return ops.cast(value, like.dtype)


class Iteration:
    """Where a step's iteration for M_x ended, which is where the next one begins.

    Args:
        add_variable: a function of a weight and a name that makes a variable like it.
        weights: those that the optimizer is built for.
    """

    def __init__(self, add_variable: Callable[..., Any], weights: Sequence[Any]):
        self._weights = list(weights)
        self.variables = [add_variable(w, name="top_direction") for w in self._weights]

    def start(self, weights: Sequence[Any], dtype: Any) -> Vector:
        """Tensors of a dtype for the weights of a step; 0 at first, and for a weight unknown."""
        return [
            ops.zeros(w.shape, dtype) if slot is None else ops.cast(slot.value, dtype)
            for slot, w in zip(self._slots(weights), weights, strict=True)
        ]

    def store(self, weights: Sequence[Any], top: Vector, finite: Tensor) -> None:
        """Store tensors for the weights of a step, if `finite`."""
        for variable, value in zip(self._slots(weights), top, strict=True):
            if variable is not None:
                value = ops.cast(value, variable.dtype)
                variable.assign(ops.where(finite, value, variable.value))

    def _slots(self, weights):
        # Fewer weights may be trained than the optimizer was built for; of one more Keras says so.
        pairs = zip(self._weights, self.variables, strict=True)
        of = {id(variable.value): slot for variable, slot in pairs}
        return [of.get(id(w)) for w in weights]
