"""Models whose training step is RGD's: RGDModel, RGDSequential and a mixin for subclasses."""

import contextlib
import functools
import itertools
import os

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional  # as in type(keras.Model(inputs, outputs))

from keras_rgd import per_example
from keras_rgd.optimizer import inner_rgd

_SEEDS = "seed_generators.npz"

# Ways that not every model can take, and that nothing replaces where they were asked for.
_CHECKED = ("layerwise", "vectorized_map")


class RGDMixin:
    """A training step that hands `RGD` per-example gradients.

    `class MyModel(keras_rgd.RGDMixin, keras.Model)` trains with `RGD`; with any other optimizer,
    and with `RGD(window=W)`, it is what it was without the mixin. `compile`, `fit`, `evaluate` and
    saving are Keras's own. During training two metrics are added to the logs, the epoch's means
    over the steps: `step_epsilon` and `step_weak_field_error`.
    """

    def train_step(self, data):
        """One step along (I - eps D) v, Eq. (10); other optimizers get their plain step."""
        optimizer = _by_example(self.optimizer)
        if optimizer is None:
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        one = tf.ones([])
        scale = self.optimizer.scale_loss(one)
        gradients = self._step_state.way(x, y, sample_weight, scale)
        direction = optimizer.direction(gradients)
        if scale is not one:
            # The optimizer divides by the loss scale, and skips the step where this overflows.
            direction = [d * tf.cast(scale, d.dtype) for d in direction]
        variables = self.trainable_variables
        direction = [tf.cast(d, v.dtype) for d, v in zip(direction, variables, strict=True)]
        with optimizer.applying_direction():
            self.optimizer.apply(direction, variables)
        self._loss_tracker.update_state(gradients.loss, sample_weight=gradients.n_examples)
        epsilon, error = self._step_state.metrics
        epsilon.update_state(optimizer.chosen_epsilon)
        error.update_state(optimizer.step_weak_field_error)
        return self.compute_metrics(x, y, gradients.y_pred, sample_weight=sample_weight)

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
        """As the parent's; with RGD the first batch builds all that a traced step must not build.

        Raises:
            ValueError: more than one replica: each would have a D of its own.
        """
        if self.train_function is not None and not force:
            return
        self._step_state = None
        super().make_train_function(force)
        if _by_example(self.optimizer) is None:
            return
        replicas = self.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                "RGD with per-example gradients runs on one replica: the D of a batch that is "
                "split over several is not the mean of their D's. "
                f"Received: {replicas} replicas. Train outside the strategy's scope."
            )
        self._step_state = _StepState()
        self.train_function = self._preparing(self.train_function)

    def _preparing(self, train_function):
        """`train_function`, with what must happen on real data before its first steps."""
        state = self._step_state

        def prepared_train_function(iterator):
            if not state.checked:
                spec = getattr(iterator, "element_spec", None)
                batches = list(itertools.islice(iterator, self.steps_per_execution))
                if not batches:
                    raise StopIteration
                if state.way is None:
                    self._build_step(batches[0] if spec is None else spec)
                self._choose_way(batches, spec)
                iterator = iter(batches) if spec is None else _iterator(batches, spec)
            return train_function(iterator)

        return prepared_train_function

    def _build_step(self, data):
        """Build the model, its loss and the optimizer for data of this kind.

        A layer built inside a compiled step has given wrong numbers, and any variable made there
        has the step traced twice.
        """
        self._symbolic_build(data_batch=keras.tree.map_structure(_symbolic, data))
        if not self.trainable_variables:
            raise ValueError(f"Model '{self.name}' has no trainable weights for RGD to train.")
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _choose_way(self, batches, spec):
        """Choose the way to per-example gradients on the first batch, and check it on these."""
        rgd, state = inner_rgd(self.optimizer), self._step_state
        compiled = bool(self.jit_compile)
        dynamic = spec is not None and _first_size(spec) is None
        for data in batches:
            data = keras.tree.map_structure(lambda t: None if _absent(t) else t, data)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            x, y, sample_weight = keras.tree.map_structure(_tensor, (x, y, sample_weight))
            if rgd.microbatch_size is not None:
                # One example alone cannot show that examples mix.
                few = max(rgd.microbatch_size, 2)
                x, y, sample_weight = per_example.first_examples((x, y, sample_weight), few)
            if state.way is None or rgd.per_example in _CHECKED:
                rgd.per_example_choice = choice = per_example.choose_way(
                    self,
                    rgd.per_example,
                    x,
                    y,
                    sample_weight,
                    training=True,
                    dynamic=dynamic,
                    compiled=compiled,
                )
            if rgd.microbatch_size is not None:
                apart = choice.way == "layerwise"
                per_example.check_pieces(self, x, y, sample_weight, layers_are_apart=apart)
            # One example alone cannot show that examples mix.
            state.checked = rgd.per_example not in _CHECKED or per_example.batch_size(x) > 1
            if state.checked:
                break
        if state.way is None:
            state.way = per_example.make_way(
                self,
                choice.way,
                training=True,
                chunk_size=rgd.chunk_size,
                compiled=compiled,
                n_examples=choice.n_examples,
                repeats=choice.repeats,
                microbatch_size=rgd.microbatch_size,
            )

    def save_assets(self, path):
        """Write where the random numbers of the layers stand, which Keras does not."""
        states = {
            str(i): seed.state.numpy() for i, seed in enumerate(per_example.seed_generators(self))
        }
        np.savez(os.path.join(path, _SEEDS), **states)

    def load_assets(self, path):
        """Go on with the random numbers where `save_assets` found them."""
        states = np.load(os.path.join(path, _SEEDS))
        for i, seed in enumerate(per_example.seed_generators(self)):
            seed.state.assign(states[str(i)])


def _iterator(batches, spec):
    """The batches from a tf.data iterator of `spec`, so that their step is traced as the others.

    The batch size of a tensor is known when the step is traced, and Keras weights the loss of
    each of several outputs by it where it is.
    """

    def relaxed(tensor, spec):
        if isinstance(spec, tf.TensorSpec):
            return tf.compat.v1.placeholder_with_default(tensor, spec.shape)
        return tensor

    @tf.autograph.experimental.do_not_convert
    def all_relaxed(*batch):
        return keras.tree.map_structure(relaxed, batch, tuple(spec))

    datasets = [tf.data.Dataset.from_tensors(batch).map(all_relaxed) for batch in batches]
    return iter(functools.reduce(lambda a, b: a.concatenate(b), datasets))


def _symbolic(leaf):
    if _absent(leaf):
        return None
    return keras.KerasTensor(tuple(leaf.shape), keras.backend.standardize_dtype(leaf.dtype))


def _tensor(leaf):
    return None if leaf is None else tf.convert_to_tensor(leaf)


def _first_size(spec):
    """Axis 0 of the first tensor of an iterator's element; `None` where it is open."""
    first = next(s for s in keras.tree.flatten(spec) if isinstance(s, tf.TensorSpec))
    return first.shape[0] if first.shape.rank else None


def _absent(leaf):
    # Keras passes a missing target or weight through tf.data as an empty optional.
    return leaf is None or isinstance(leaf, tf.experimental.Optional | tf.OptionalSpec)


class _StepState:
    """What a training step needs and no saved model should hold; Keras does not track it."""

    def __init__(self):
        self.way = None
        self.checked = False
        self.hidden = False
        self.metrics = [
            keras.metrics.Mean(name="step_epsilon"),
            keras.metrics.Mean(name="step_weak_field_error"),
        ]


def _by_example(optimizer):
    """The `RGD` in `optimizer` that takes D from the batch's examples, or `None`."""
    rgd = inner_rgd(optimizer)
    return None if rgd is None or rgd.window is not None else rgd


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDModel(RGDMixin, keras.Model):
    """`keras.Model` whose training step is RGD's: `RGDModel(inputs, outputs)`, or subclass it."""

    def __new__(cls, *args, **kwargs):
        if cls is RGDModel and _is_functional(args, kwargs):
            cls = RGDFunctional
        return super().__new__(cls, *args, **kwargs)

    # By these names of its arguments Keras sees that a functional model can be reloaded so.
    def __init__(self, *args, **kwargs):
        cls = type(self)
        if _is_functional(args, kwargs) and not isinstance(self, Functional):
            # Keras would exchange the base of every class above this one, `RGDModel` too, and no
            # model with layers of its own could be a subclass of `RGDModel` any more.
            cls.__bases__ = tuple(RGDFunctional if b is RGDModel else b for b in cls.__bases__)
        super().__init__(*args, **kwargs)


def _is_functional(args, kwargs):
    given = [*args[:2], *(kwargs[name] for name in ("inputs", "outputs") if name in kwargs)]
    leaves = keras.tree.flatten(given)
    return len(given) == 2 and all(isinstance(t, keras.KerasTensor) for t in leaves)


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDFunctional(RGDModel, Functional):
    """What `RGDModel(inputs, outputs)` makes, as `keras.Model(inputs, outputs)` a `Functional`."""


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDSequential(RGDMixin, keras.Sequential):
    """`keras.Sequential` whose training step is RGD's: `RGDSequential([...])`."""
