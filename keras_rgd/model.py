"""Models whose training step is RGD's: RGDModel, RGDSequential and a mixin for subclasses."""

import contextlib
import itertools

import keras
import tensorflow as tf

from keras_rgd import per_example, vectors
from keras_rgd.optimizer import RGD


class RGDMixin:
    """A training step that hands `RGD` per-example gradients.

    `class MyModel(keras_rgd.RGDMixin, keras.Model)` trains with `RGD`; with any other optimizer
    it is what it was without the mixin. `compile`, `fit`, `evaluate` and saving are Keras's own.
    During training two metrics are added to the logs, the epoch's means over the steps:
    `step_epsilon` and `step_weak_field_error`.
    """

    def train_step(self, data):
        """One step along (I - eps D) v, Eq. (10); other optimizers get their plain step.

        Raises:
            ValueError: more than one replica: each would have a D of its own.
        """
        optimizer = inner_rgd(self.optimizer)
        if optimizer is None:
            return super().train_step(data)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "RGD with per-example gradients runs on one replica: the D of a batch that is "
                "split over several is not the mean of their D's. "
                f"Received: {tf.distribute.get_strategy().num_replicas_in_sync} replicas. Train "
                "outside the strategy's scope."
            )
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.trainable_variables:
            raise ValueError(f"Model '{self.name}' has no trainable weights for RGD to train.")
        scale = self.optimizer.scale_loss(tf.ones([], self.trainable_variables[0].dtype))
        gradients = self._step_state.way(x, y, sample_weight, scale)
        direction = optimizer.direction(gradients)
        with optimizer.applying_direction():
            # The optimizer divides by the loss scale, and skips the step where this overflows.
            scaled = vectors.scale(direction, scale)
            self.optimizer.apply(scaled, self.trainable_variables)
        self._update_metrics(optimizer, gradients)
        return self.compute_metrics(x, y, gradients.y_pred, sample_weight=sample_weight)

    def _update_metrics(self, optimizer, gradients):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(gradients.loss, sample_weight=gradients.n_examples)
        epsilon, error = self._step_state.metrics
        epsilon.update_state(optimizer.chosen_epsilon)
        error.update_state(optimizer.step_weak_field_error)

    def test_step(self, data):
        """As the parent's; the metrics of the training steps are not shown."""
        with self._hiding_step_metrics():
            return super().test_step(data)

    def evaluate(self, *args, **kwargs):
        """As the parent's; the metrics of the training steps are not shown."""
        with self._hiding_step_metrics():
            return super().evaluate(*args, **kwargs)

    @property
    def metrics(self):
        """The parent's metrics and, in training with RGD, those of its steps."""
        state = self.__dict__.get("_step_state")
        if state is None or state.hidden:
            return super().metrics
        return super().metrics + state.metrics

    @contextlib.contextmanager
    def _hiding_step_metrics(self):
        state = self.__dict__.get("_step_state")
        if state is None:
            yield
            return
        before, state.hidden = state.hidden, True
        try:
            yield
        finally:
            state.hidden = before

    def make_train_function(self, force=False):
        """As the parent's; with "vectorized_map" the first batch is checked to be exact."""
        if self.train_function is not None and not force:
            return
        optimizer = inner_rgd(self.optimizer)
        self._step_state = None
        if optimizer is not None:
            if not self.optimizer.built:
                # Variables made while tracing would have the step traced twice.
                self.optimizer.build(self.trainable_variables)
            way = per_example.make_way(
                self,
                optimizer.per_example,
                training=True,
                chunk_size=optimizer.chunk_size,
                compiled=bool(self.jit_compile),
            )
            self._step_state = _StepState(way)
        super().make_train_function(force)
        if optimizer is not None and optimizer.per_example == "vectorized_map":
            self.train_function = self._checking_first(self.train_function)

    def _checking_first(self, train_function):
        """`train_function`, but the first batches with two examples are checked before it runs."""
        checked = False

        def checked_train_function(iterator):
            nonlocal checked
            if checked:
                return train_function(iterator)
            batches = list(itertools.islice(iterator, self.steps_per_execution))
            if not batches:
                raise StopIteration
            for data in batches:
                x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
                per_example.check_batch(
                    self, x, y, sample_weight, training=True, compiled=bool(self.jit_compile)
                )
                checked = checked or keras.tree.flatten(x)[0].shape[0] > 1
            return train_function(iter(batches))

        return checked_train_function


class _StepState:
    """What a training step needs and no saved model should hold; Keras does not track it."""

    def __init__(self, way):
        self.way = way
        self.hidden = False
        self.metrics = [
            keras.metrics.Mean(name="step_epsilon"),
            keras.metrics.Mean(name="step_weak_field_error"),
        ]


def inner_rgd(optimizer):
    """The `RGD` that `optimizer` is or wraps (mixed precision wraps it), or `None`."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner if isinstance(inner, RGD) else None


# Neither class has an __init__: Keras then reloads it from .keras with class and optimizer.


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDModel(RGDMixin, keras.Model):
    """`keras.Model` whose training step is RGD's: `RGDModel(inputs, outputs)`, or subclass it."""


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDSequential(RGDMixin, keras.Sequential):
    """`keras.Sequential` whose training step is RGD's: `RGDSequential([...])`."""


def to_rgd(model):
    """An existing functional or Sequential model as one that RGD trains, sharing its layers.

    Compile the result; the weights are the same variables, so training one trains the other.

    Args:
        model: a built functional or Sequential `keras.Model`, as those of `keras.applications`
            or what `keras.models.clone_model` returns.

    Returns:
        An `RGDSequential` for a `keras.Sequential`, else an `RGDModel`.

    Raises:
        ValueError: a subclassed model, whose class must take the mixin itself.
    """
    if isinstance(model, RGDMixin):
        return model
    if isinstance(model, keras.Sequential):
        converted = RGDSequential(model.layers, name=model.name)
        if model.built and not converted.built:
            converted.build(model.input_shape)
        return converted
    if hasattr(model, "inputs") and model.inputs:
        outputs = keras.tree.pack_sequence_as(model.output, keras.tree.flatten(model.output))
        return RGDModel(model.input, outputs, name=model.name)
    raise ValueError(
        f"`{type(model).__name__}` is a subclassed model (or not built), so its layers cannot be "
        "taken over. Expected a built functional or Sequential model. Write instead "
        f"class {type(model).__name__}(keras_rgd.RGDMixin, keras.Model)."
    )
