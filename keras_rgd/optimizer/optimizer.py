"""RGD: relativistic gradient descent, Eq. (10) of the paper, as a Keras optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd import epsilon as epsilon_rules
from keras_rgd._keras import optimizers as keras_optimizers
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.direction import direction_by_passes, direction_of
from keras_rgd.optimizer import checks
from keras_rgd.optimizer.checks import NotADirectionError
from keras_rgd.optimizer.step_values import Iteration, Scalar, StepMeans, StepValues
from keras_rgd.per_example.gradients import PerExampleGradients
from keras_rgd.window import WindowGradients, make_window


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGD(keras_optimizers.DirectedOptimizer):
    """Gradient descent in the diffusion metric (relativistic gradient descent).

    Each step goes along `(I - eps D) v`, Eq. (10) of Fioresi, Chaudhari and Soatto (2020): v is
    the gradient of the batch's loss and D the diffusion matrix. Everything else (momentum, weight
    decay, clipping, averaging, loss scaling, schedules, constraints) acts on this direction as it
    would on a gradient. D is taken from one of two sources:

    - `window=W`: the last W mini-batch gradients. For any `keras.Model`, on every backend of
      Keras, under `tf.distribute` as well.
    - without `window`: the gradients of the batch's examples. For a `keras_rgd.RGDModel`,
      `RGDSequential` or a subclass of `RGDMixin`, on TensorFlow. An ordinary `keras.Model` is
      refused at its first step, before a weight changes.

    Args:
        learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. Defaults to `0.01`.
        epsilon: how eps(x) is chosen below 1/M_x, M_x the largest eigenvalue of the batch's D: a
            float c in (0, 1) for eps = c / M_x, a schedule of c, or a rule of
            `keras_rgd.epsilon` (`Fraction`, `FractionOfMean`, `Fixed`, `WeakField`, or one's
            own). Defaults to `0.5`.
        momentum: float in [0, 1]. Defaults to `0.0`.
        nesterov: whether momentum is Nesterov's. Defaults to `False`.
        per_example: the way to per-example gradients: "layerwise", "double_backward",
            "vectorized_map", or "auto", the cheapest that is exact for the model: "layerwise"
            where the traced graph shows that no example enters another's loss, else
            "double_backward". `print(optimizer.per_example_choice)` says after the first step
            which it was and why. On JAX there is one, "linearized". Defaults to `"auto"`.
        chunk_size: how many examples' gradients "vectorized_map" holds at once, `None` for the
            whole batch; on JAX, how many a Gram matrix may hold, which then bounds M_x, `None` for
            an estimate. Defaults to `None`.
        microbatch_size: how many examples are differentiated together, on TensorFlow. A batch,
            which may be the whole data set (`fit(batch_size=N)`: Eq. 10 as a deterministic
            system), is then taken in pieces: one pass over them for v, and one for D v and M_x, up
            to eight until M_x's residual is a tenth of it. M_x is then an estimate, from an
            iteration that goes on from step to step, times 1.2, or 1.5 where one pass was not
            enough. No example may enter another's loss. Defaults to `None`, batches are taken
            whole.
        window: W, how many mini-batch gradients D is taken from, at least 2, the current one among
            them: D = |B| / (W - 1) sum_t (v_t - vbar) (v_t - vbar)^T. Until two are stored the
            step is plain SGD's. They take W times the memory of the weights, and are saved with
            the optimizer. Defaults to `None`, D of the batch's examples.
        window_dtype: the dtype of the stored gradients, "float32", "bfloat16" or "float64".
            Defaults to `None`, the weights' dtype, at least float32.
        batch_size: |B|, of which D is so many times the variance of the window's gradients. It
            cancels in the step, but not in `lambda_max`, `chosen_epsilon` and the rule `Fixed`.
            With several replicas or accumulated gradients it is that of all of them together.
            Defaults to `None`, which is 1: D is then that variance itself.
        weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name: as in
            every Keras optimizer.

    Raises:
        ValueError: an argument is not what is described here.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | Callable = 0.01,
        epsilon: Any = 0.5,
        momentum: float = 0.0,
        nesterov: bool = False,
        per_example: str = "auto",
        chunk_size: int | None = None,
        microbatch_size: int | None = None,
        window: int | None = None,
        window_dtype: Any = None,
        batch_size: int | None = None,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "rgd",
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        checks.check_momentum(momentum, nesterov)
        checks.check_per_example(per_example, chunk_size, microbatch_size)
        self._epsilon = epsilon_rules.get(epsilon)
        window_dtype = checks.checked_window_dtype(window, window_dtype, batch_size, self._epsilon)
        checks.check_one_source(window, per_example, chunk_size, microbatch_size)
        self.momentum = float(momentum)
        self.nesterov = nesterov
        self.per_example = per_example
        self.chunk_size = chunk_size
        self.microbatch_size = microbatch_size
        self.window = window
        self.window_dtype = window_dtype
        self.batch_size = batch_size
        self.per_example_choice = None
        self._applies_direction = False

    @property
    def epsilon(self) -> epsilon_rules.Rule:
        """The rule for eps; fixed, as it is compiled into the step. For a change use a schedule."""
        return self._epsilon

    def build(self, variables: Sequence[Any]) -> None:
        """Create the state: momenta, the last step's scalars, and where an iteration goes on.

        They depend on the weights and the configuration alone, so that a saved state always fits.
        """
        if self.built:
            return
        super().build(variables)
        self.momentums = []
        if self.momentum != 0:
            self.momentums = [
                self.add_variable_from_reference(variable, name="momentum")
                for variable in variables
            ]
        self._iteration: Any = None  # an `Iteration`, with `microbatch_size`
        if self.microbatch_size is not None:
            self._iteration = Iteration(self.add_variable_from_reference, variables)
        self._window: Any = None  # a `GradientWindow`, with `window`
        if self.window is not None:
            self._window = make_window(self.add_variable, variables, self.window, self.window_dtype)
        self._values = StepValues(self._add_shared, self._add_scalar)
        self.lambda_max = self._values.lambda_max
        self.mean_lambda_max = self._values.mean_lambda_max
        self.chosen_epsilon = self._values.chosen_epsilon
        self.step_weak_field_error = self._values.step_weak_field_error
        self.epsilon_cuts = self._values.epsilon_cuts
        self.rounded_steps = self._values.rounded_steps

    def load_own_variables(self, store: Any) -> None:
        """As the parent's; a window that was saved split over devices loads whole, and back."""
        values = {key: store[key] for key in store.keys()}
        if self._window is not None and len(values) == len(self.variables):
            rows = {id(row) for row in self._window.rows}
            for i, variable in enumerate(self.variables):
                value = values[str(i)]
                if id(variable) in rows and tuple(value.shape) != tuple(variable.shape):
                    values[str(i)] = np.reshape(value, variable.shape)
        super().load_own_variables(values)

    def _add_shared(self, shape, dtype, name):
        # Every replica finds the same.
        return self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)

    def _add_scalar(self, dtype, name):
        options = dict(trainable=False, aggregation="only_first_replica", name=name)
        with keras.name_scope(self.name):
            scalar = Scalar("zeros", (), dtype, **options)
        keras_optimizers.track(self, scalar)
        return scalar

    def direction(self, gradients: PerExampleGradients) -> Vector:
        """(I - eps D) v for one batch, Eq. (10), choosing and recording eps.

        For training loops of one's own, with `apply_direction`; `fit` calls both.

        Sets `lambda_max` (M_x of this batch as the rule saw it: an upper bound from a Gram matrix,
        or without one an estimate with a margin), `chosen_epsilon`, `step_weak_field_error` (of
        the step; without a Gram matrix an upper bound), and counts `epsilon_cuts` (steps on which
        the rule was cut below 1/M_x) and `rounded_steps` (steps on which the way's own arithmetic
        had lost the digits of D, or where what differs between examples was rounding alone).

        Args:
            gradients: what `keras_rgd.per_example_gradients` returns for the batch.

        Returns:
            A list of tensors shaped as the weights.

        Raises:
            ValueError: `gradients` are something else, or the optimizer is not built.
        """
        checks.check_ready(self, gradients)
        top = None
        if self._iteration is None:
            direction = direction_of(gradients, self.lambda_max.value)
        else:
            start = self._iteration.start(gradients.weights, gradients.dtype)
            direction, top = direction_by_passes(gradients, start)
        epsilon, finite = self._values.choose_epsilon(self.epsilon, direction, self.iterations)
        if top is not None:
            self._iteration.store(gradients.weights, top, finite)
        return direction.at(epsilon)

    def step_means(self) -> StepMeans:
        """Means over the steps since `reset_step_means()`, a `keras_rgd.optimizer.StepMeans`.

        `DiffusionMonitor` resets them as an epoch begins and records them at its end.
        """
        return self._values.means()

    def reset_step_means(self) -> None:
        """Begin anew with `step_means()`."""
        self._values.reset_means()

    @contextlib.contextmanager
    def applying_direction(self) -> Iterator[None]:
        """What is applied inside is a direction, not a plain gradient."""
        self._applies_direction = True
        try:
            yield
        finally:
            self._applies_direction = False

    def apply_direction(self, direction: Vector, trainable_variables: list[Any]) -> None:
        """Take a step along `direction`, as `apply` does along a gradient.

        Args:
            direction: a list of tensors, as `direction()` returns it.
            trainable_variables: the variables, in the same order.
        """
        with self.applying_direction():
            self.apply(direction, trainable_variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Apply gradients with `window`, and a direction without.

        Raises:
            ValueError: called without `window` by anything that does not say that it applies a
                direction, as the `train_step` of an ordinary `keras.Model`.
        """
        if self.window is None and not self._applies_direction:
            raise NotADirectionError
        super().apply(grads, trainable_variables)

    def _directs(self):
        return self.window is not None and not self._applies_direction

    def _along(self, gradients, places):
        """(I - eps D) v with the window's D, for the gradients v in `places`."""
        v = [None] * len(self._window.variables)
        for place, gradient in zip(places, gradients, strict=True):
            v[place] = gradient
        direction = self._window.direction_of(v, self.batch_size or 1)
        epsilon, _ = self._values.choose_epsilon(self.epsilon, direction, self.iterations)
        along = direction.at(epsilon)
        direction.store()
        pairs = zip(places, gradients, strict=True)
        return [ops.cast(along[place], gradient.dtype) for place, gradient in pairs]

    @property
    def stored_gradients(self) -> int:
        """How many gradients are in the window, an int; 0 without one."""
        if self.window is None or not self.built:
            return 0
        return min(self._window.count(), self.window)

    def diffusion_matrix(self) -> DiffusionMatrix:
        """D of the window as a `DiffusionMatrix`, on the gradients that are stored now.

        Raises:
            ValueError: the optimizer has no window, or one with fewer than two gradients.
        """
        checks.check_window_is_filled(self)
        return DiffusionMatrix(WindowGradients(self._window, self.batch_size or 1))

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        """The update of `keras.optimizers.SGD`, of one variable along its direction."""
        self._check_directed()
        learning_rate = keras.ops.cast(learning_rate, variable.dtype)
        step = keras.ops.cast(gradient, variable.dtype) * learning_rate
        if self.momentum == 0:
            self.assign_sub(variable, step)
            return
        momentum = keras.ops.cast(self.momentum, variable.dtype)
        velocity = self.momentums[keras_optimizers.place_of(self, variable)]
        self.assign(velocity, velocity * momentum - step)
        self.assign_add(variable, velocity * momentum - step if self.nesterov else velocity)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serializable."""
        config = super().get_config()
        config.update(
            {
                "epsilon": keras.saving.serialize_keras_object(self.epsilon),
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "per_example": self.per_example,
                "chunk_size": self.chunk_size,
                "microbatch_size": self.microbatch_size,
                "window": self.window,
                "window_dtype": self.window_dtype,
                "batch_size": self.batch_size,
            }
        )
        return config


def inner_rgd(optimizer: Any) -> RGD | None:
    """The `RGD` that `optimizer` is or wraps (mixed precision wraps it), or `None`."""
    inner = keras_optimizers.unwrapped(optimizer)
    return inner if isinstance(inner, RGD) else None
