"""The rules that choose eps(x) < 1/M_x, M_x the largest eigenvalue of D(x).

A rule sees D along one vector v: a bound on its largest eigenvalue and a quadrature rule for the
spectral measure of v. It works on tensors, in and out of a compiled step.
"""

from __future__ import annotations

import abc
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_rgd._support.arguments import is_real
from keras_rgd._support.vectors import Tensor
from keras_rgd.epsilon.spectral_measure import GramSpectrum, SpectralMeasure, largest_number

# "Just under" 1/M_x: further below than M_x's own rounding.
_JUST_UNDER = 1 - 2.0**-10

# Halvings of the interval for eps: to the last digit of float32.
_BISECTIONS = 30


Measure: TypeAlias = SpectralMeasure | GramSpectrum


class Rule(abc.ABC):
    """Chooses eps from a `SpectralMeasure`. Subclasses are Keras-serializable.

    Whatever it returns, what is used is in [0, 1/M_x): more is cut to just under 1/M_x, a negative
    number or NaN to 0, a step of plain gradient descent. `RGD.epsilon_cuts` counts these steps.

    Attributes:
        decay: of `spectrum.mean_lambda_max`, what is left of it after one more step, in (0, 1).
    """

    decay: float = 0.99

    @abc.abstractmethod
    def __call__(self, spectrum: Measure, iteration: Any) -> Tensor:
        """The chosen eps in the unit unit**-2 of `spectrum`, a scalar tensor, below 1/lambda_max.

        Args:
            spectrum: a `SpectralMeasure`, or a `GramSpectrum`, which has the same methods.
            iteration: number of steps taken, an integer tensor, for schedules.
        """

    def was_cut(self, spectrum: Measure, epsilon: Tensor) -> Tensor:
        """Whether eps < 1/M_x made the rule choose less than it was told to; a bool tensor."""
        return ops.zeros([], "bool")

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        """The rule of `get_config`."""
        return cls(**config)

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


@keras.saving.register_keras_serializable(package="keras_rgd")
class Fraction(Rule):
    """eps = c / M_x.

    Args:
        c: the fraction, 0 < c < 1, or a `keras.optimizers.schedules.LearningRateSchedule` of the
            number of steps whose values are in (0, 1). Defaults to `0.5`.

    Raises:
        ValueError: c is not in (0, 1) and no schedule.
    """

    def __init__(self, c: Any = 0.5):
        if isinstance(c, dict):
            c = keras.saving.deserialize_keras_object(c)
        if not isinstance(c, keras.optimizers.schedules.LearningRateSchedule):
            c = _number("c", c, 0, 1, "a float in (0, 1) or a keras LearningRateSchedule")
        self.c = c

    def __call__(self, spectrum: Measure, iteration: Any) -> Tensor:
        return ops.divide_no_nan(self._fraction(spectrum, iteration), spectrum.lambda_max)

    def _fraction(self, spectrum: Measure, iteration: Any) -> Tensor:
        dtype = spectrum.lambda_max.dtype
        if isinstance(self.c, float):
            return ops.convert_to_tensor(self.c, dtype)
        # A schedule knows no bounds; the paper's eps < 1/M_x holds all the same.
        return ops.clip(ops.cast(self.c(iteration), dtype), 0, _JUST_UNDER)

    def get_config(self) -> dict[str, Any]:
        if isinstance(self.c, float):
            return {"c": self.c}
        return {"c": keras.saving.serialize_keras_object(self.c)}


@keras.saving.register_keras_serializable(package="keras_rgd")
class FractionOfMean(Fraction):
    """eps = c / M, M the larger of this batch's M_x and the running mean of those before.

    A batch may have a smaller M_x than the data set, and `Fraction` then takes an eps beyond the
    data set's 1/M_x. The mean is on its side: the largest eigenvalue is convex, so that of the
    batches' mean D is at most the mean of M_x. Of one D alone it is `Fraction`.

    Args:
        c: as in `Fraction`. Defaults to `0.5`.
        decay: what is left of the mean after each step, 0 < decay < 1: it is one over some
            1 / (1 - decay) steps. Defaults to `0.99`.

    Raises:
        ValueError: c or decay is not what is described here.
    """

    def __init__(self, c: Any = 0.5, decay: float = 0.99):
        super().__init__(c)
        self.decay = _number("decay", decay, 0, 1, "a float in (0, 1)")

    def __call__(self, spectrum: Measure, iteration: Any) -> Tensor:
        larger = spectrum.lambda_max
        if spectrum.mean_lambda_max is not None:
            larger = ops.maximum(larger, spectrum.mean_lambda_max)
        return ops.divide_no_nan(self._fraction(spectrum, iteration), larger)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"decay": self.decay}


@keras.saving.register_keras_serializable(package="keras_rgd")
class Fixed(Rule):
    """eps = value, but never more than just under 1/M_x.

    Args:
        value: eps, in units of one over squared gradients; at least 0. With 0 the step is plain
            gradient descent.

    Raises:
        ValueError: value is negative or not finite.
    """

    def __init__(self, value: float):
        self.value = _number("value", value, 0, float("inf"), "a finite float >= 0", closed=True)

    def __call__(self, spectrum: Measure, iteration: Any) -> Tensor:
        return ops.minimum(self._told(spectrum), _below_bound(spectrum))

    def was_cut(self, spectrum: Measure, epsilon: Tensor) -> Tensor:
        return self._told(spectrum) > epsilon

    def _told(self, spectrum: Measure) -> Tensor:
        value = ops.convert_to_tensor(self.value, spectrum.unit.dtype)
        return value * spectrum.unit * spectrum.unit

    def get_config(self) -> dict[str, Any]:
        return {"value": self.value}


@keras.saving.register_keras_serializable(package="keras_rgd")
class WeakField(Rule):
    """The largest eps < 1/M_x whose weak-field error on the step is at most `tolerance`.

    The error is that of (I - eps D) v for (I + eps D)^-1 v, relative to the latter; it grows with
    eps. Without a Gram matrix ("double_backward") an upper bound of it is taken, and a smaller eps.

    Args:
        tolerance: the error allowed, in (0, 1). Defaults to `0.05`.

    Raises:
        ValueError: tolerance is not in (0, 1).
    """

    def __init__(self, tolerance: float = 0.05):
        self.tolerance = _number("tolerance", tolerance, 0, 1, "a float in (0, 1)")

    def __call__(self, spectrum: Measure, iteration: Any) -> Tensor:
        spectrum = spectrum.quadrature()
        largest = _below_bound(spectrum, where_zero=0.0)
        low, high = ops.zeros_like(largest), ops.ones_like(largest)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            fits = spectrum.weak_field_error(middle * largest) <= self.tolerance
            low, high = ops.where(fits, middle, low), ops.where(fits, high, middle)
        # Bisection ends just below its upper end; where that fits too, it is the answer.
        fits = spectrum.weak_field_error(largest) <= self.tolerance
        return ops.where(fits, largest, low * largest)

    def get_config(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance}


def choose(rule: Rule, spectrum: Measure, iteration: Any) -> tuple[Tensor, Tensor]:
    """eps by a rule, in [0, 1/M_x) whatever it returns, and whether that took a cut.

    Args:
        rule: a `Rule`.
        spectrum: as a rule sees it.
        iteration: as a rule sees it.

    Returns:
        eps in the unit unit**-2 of `spectrum`, and a bool, both scalar tensors.
    """
    dtype = spectrum.lambda_max.dtype
    told = ops.reshape(ops.cast(rule(spectrum, iteration), dtype), [])
    epsilon = ops.where(told * spectrum.lambda_max < 1, told, _below_bound(spectrum, 0.0))
    # NaN is not >= 0.
    epsilon = ops.where(told >= 0, epsilon, ops.zeros_like(told))
    return epsilon, ops.logical_or(told != epsilon, rule.was_cut(spectrum, epsilon))


def get(epsilon: Any) -> Rule:
    """The rule that `epsilon` stands for.

    Args:
        epsilon: a float in (0, 1) or a Keras learning-rate schedule, short for `Fraction`; a
            rule; or a rule's serialized form.

    Raises:
        ValueError: `epsilon` is none of these.
    """
    if isinstance(epsilon, dict):
        epsilon = keras.saving.deserialize_keras_object(epsilon)
    if isinstance(epsilon, Rule):
        return epsilon
    if isinstance(epsilon, keras.optimizers.schedules.LearningRateSchedule):
        return Fraction(epsilon)
    if is_real(epsilon) and 0 < epsilon < 1:
        return Fraction(epsilon)
    raise ValueError(
        "`epsilon` must be a float in (0, 1), the fraction of 1/M_x; a keras "
        "LearningRateSchedule of that fraction; or a rule: keras_rgd.epsilon.Fraction(c), "
        f"FractionOfMean(c), Fixed(value) or WeakField(tolerance). Received: epsilon={epsilon!r}"
    )


def _below_bound(spectrum: Measure, where_zero: float | None = None) -> Tensor:
    dtype = spectrum.lambda_max.dtype
    where_zero = largest_number(dtype) if where_zero is None else where_zero
    just_under = ops.convert_to_tensor(_JUST_UNDER, dtype)
    below = ops.divide_no_nan(just_under, spectrum.lambda_max)
    return ops.where(spectrum.lambda_max > 0, below, where_zero)


def _number(
    name: str, value: Any, low: float, high: float, expected: str, closed: bool = False
) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (low < number < high or closed and number == low):
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
    return number
