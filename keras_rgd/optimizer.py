"""RGD: relativistic gradient descent, Eq. (10) of the paper, as a Keras optimizer."""

import contextlib
import numbers

import keras
import tensorflow as tf

from keras_rgd import epsilon as epsilon_rules
from keras_rgd import per_example as per_example_gradients
from keras_rgd.step import iterated_step_of, step_of

_ORDINARY_MODEL = """\
RGD needs the gradients of the batch's examples, and this model hands it only their mean. No \
weight was changed. Use a model that takes RGD steps:
    model = keras_rgd.RGDSequential([...])      # instead of keras.Sequential([...])
    model = keras_rgd.RGDModel(inputs, outputs) # instead of keras.Model(inputs, outputs)
    model = keras_rgd.to_rgd(model)             # an existing model, sharing its weights
    class MyModel(keras_rgd.RGDMixin, keras.Model): ...
then compile and fit as before. In a training loop of your own:
    gradients = keras_rgd.per_example_gradients(model, x, y)
    optimizer.apply_direction(optimizer.direction(gradients), model.trainable_variables)"""


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGD(keras.optimizers.Optimizer):
    """Gradient descent in the diffusion metric (relativistic gradient descent).

    Each step goes along `(I - eps D) v`, Eq. (10) of Fioresi, Chaudhari and Soatto (2020): v is
    the gradient of the batch's loss and D the diffusion matrix, the covariance of the gradients
    of the batch's examples. Everything else (momentum, weight decay, clipping, averaging, loss
    scaling, schedules, constraints) acts on this direction as it would on a gradient.

    Compile a `keras_rgd.RGDModel`, `RGDSequential` or a subclass of `RGDMixin` with it; an
    ordinary `keras.Model` is refused at its first step, before a weight changes.

    Args:
        learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. Defaults to `0.01`.
        epsilon: how eps(x) is chosen below 1/M_x, M_x the largest eigenvalue of the batch's D: a
            float c in (0, 1) for eps = c / M_x, a schedule of c, or a rule of
            `keras_rgd.epsilon` (`Fraction`, `Fixed`, `WeakField`). Defaults to `0.5`.
        momentum: float in [0, 1]. Defaults to `0.0`.
        nesterov: whether momentum is Nesterov's. Defaults to `False`.
        per_example: the way to per-example gradients: "layerwise", "double_backward",
            "vectorized_map", or "auto", the cheapest that is exact for the model: "layerwise"
            where the first batch shows that no example enters another's loss, else
            "double_backward". `print(optimizer.per_example_choice)` says after the first step
            which it was and why. Defaults to `"auto"`.
        chunk_size: how many examples' gradients "vectorized_map" holds at once; `None` for the
            whole batch. Defaults to `None`.
        microbatch_size: how many examples are differentiated together. A batch, which may be the
            whole data set (`fit(batch_size=N)`: Eq. 10 as a deterministic system), is then taken
            in pieces: one pass over them for v, and one for D v and M_x, up to eight until M_x's
            residual is a tenth of it. M_x is then an estimate, from an iteration that goes on from
            step to step, times 1.2, or 1.5 where one pass was not enough. No example may enter
            another's loss. Defaults to `None`, batches are taken whole.
        weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name: as in
            every Keras optimizer.

    Raises:
        ValueError: an argument is not what is described here.
    """

    def __init__(
        self,
        learning_rate=0.01,
        epsilon=0.5,
        momentum=0.0,
        nesterov=False,
        per_example="auto",
        chunk_size=None,
        microbatch_size=None,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="rgd",
        **kwargs,
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
        if not isinstance(momentum, numbers.Real) or not 0 <= momentum <= 1:
            raise ValueError(
                f"`momentum` must be a float in [0, 1]. Received: momentum={momentum!r}"
            )
        if not isinstance(nesterov, bool):
            raise ValueError(f"`nesterov` must be True or False. Received: nesterov={nesterov!r}")
        per_example_gradients.check_way(per_example, chunk_size)
        if microbatch_size is not None and not per_example_gradients.is_count(microbatch_size):
            raise ValueError(
                "`microbatch_size` must be a positive integer, or None for the whole batch. "
                f"Received: microbatch_size={microbatch_size!r}"
            )
        self._epsilon = epsilon_rules.get(epsilon)
        self.momentum = float(momentum)
        self.nesterov = nesterov
        self.per_example = per_example
        self.chunk_size = chunk_size
        self.microbatch_size = microbatch_size
        self.per_example_choice = None
        self._applies_direction = False

    @property
    def epsilon(self):
        """The rule for eps; fixed, as it is compiled into the step. For a change use a schedule."""
        return self._epsilon

    def build(self, variables):
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
        self.top_directions = []
        if self.microbatch_size is not None:
            self.top_directions = [
                self.add_variable_from_reference(variable, name="top_direction")
                for variable in variables
            ]
        self.lambda_max = self.add_variable((), name="lambda_max")
        self.chosen_epsilon = self.add_variable((), name="chosen_epsilon")
        self.step_weak_field_error = self.add_variable((), name="step_weak_field_error")
        self.epsilon_cuts = self.add_variable((), dtype="int64", name="epsilon_cuts")

    def direction(self, gradients):
        """(I - eps D) v for one batch, Eq. (10), choosing and recording eps.

        For training loops of one's own, with `apply_direction`; `fit` calls both.

        Sets `lambda_max` (M_x of this batch as the rule saw it: an upper bound from a Gram matrix,
        or without one an estimate with a margin), `chosen_epsilon`, `step_weak_field_error` (of
        the step; without a Gram matrix an upper bound) and `epsilon_cuts` (how often `Fixed` was
        cut below 1/M_x so far).

        Args:
            gradients: what `keras_rgd.per_example_gradients` returns for the batch.

        Returns:
            A list of tensors shaped as the weights.

        Raises:
            ValueError: the optimizer is not built.
        """
        if not self.built:
            raise ValueError(
                "The optimizer has no state yet. Call optimizer.build(model.trainable_variables) "
                "before the first step."
            )
        if self.microbatch_size is None:
            step, top = step_of(gradients, self.lambda_max.value), []
        else:
            start = gradients.cast([t.value for t in self.top_directions])
            step, top = iterated_step_of(gradients, start)
        epsilon = self.epsilon(step.spectrum, self.iterations)
        self._record(step.spectrum, epsilon, top)
        return step.direction(epsilon)

    def _record(self, spectrum, epsilon, top):
        unit = spectrum.unit
        values = [
            (self.lambda_max, spectrum.lambda_max * unit * unit),
            (self.chosen_epsilon, spectrum.in_true_units(epsilon)),
            (self.step_weak_field_error, spectrum.weak_field_error(epsilon)),
        ]
        # A batch that overflowed (half precision skips it) must not become the next estimate.
        finite = tf.reduce_all([tf.math.is_finite(value) for _, value in values])
        for variable, value in [*values, *zip(self.top_directions, top, strict=True)]:
            value = tf.cast(value, variable.dtype)
            variable.assign(tf.where(finite, value, variable.value))
        cut = tf.logical_and(finite, self.epsilon.was_cut(spectrum, epsilon))
        self.epsilon_cuts.assign_add(tf.cast(cut, "int64"))

    @contextlib.contextmanager
    def applying_direction(self):
        """What is applied inside is a direction, not a plain gradient."""
        self._applies_direction = True
        try:
            yield
        finally:
            self._applies_direction = False

    def apply_direction(self, direction, trainable_variables):
        """Take a step along `direction`, as `apply` does along a gradient.

        Args:
            direction: a list of tensors, as `direction()` returns it.
            trainable_variables: the variables, in the same order.
        """
        with self.applying_direction():
            self.apply(direction, trainable_variables)

    def apply(self, grads, trainable_variables=None):
        """Apply a direction; plain gradients are refused.

        Raises:
            ValueError: called by anything that does not say that it applies a direction, as the
                `train_step` of an ordinary `keras.Model`.
        """
        if not self._applies_direction:
            raise ValueError(_ORDINARY_MODEL)
        super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """The update of `keras.optimizers.SGD`, of one variable along its direction."""
        learning_rate = keras.ops.cast(learning_rate, variable.dtype)
        step = keras.ops.cast(gradient, variable.dtype) * learning_rate
        if self.momentum == 0:
            self.assign_sub(variable, step)
            return
        momentum = keras.ops.cast(self.momentum, variable.dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, velocity * momentum - step)
        self.assign_add(variable, velocity * momentum - step if self.nesterov else velocity)

    def get_config(self):
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
            }
        )
        return config
