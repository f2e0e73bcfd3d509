"""Models whose training step is RGD's: RGDModel, RGDSequential and a mixin for subclasses."""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_rgd import per_example
from keras_rgd._keras import models as keras_models
from keras_rgd._keras.data import given, iterator_of, specs_of_given, symbols_of
from keras_rgd._support import batches
from keras_rgd.optimizer import NotADirectionError, inner_rgd

Functional: Any = keras_models.functional_class()

# What the mixin asks of the class that it is mixed into.
if TYPE_CHECKING:
    from keras import Model as _Model
else:
    _Model = object

_SEEDS = "seed_generators.npz"


class RGDMixin(_Model):
    """A training step that hands `RGD` per-example gradients.

    `class MyModel(keras_rgd.RGDMixin, keras.Model)` trains with `RGD`; with any other optimizer,
    and with `RGD(window=W)`, it is what it was without the mixin. `compile`, `fit`, `evaluate`,
    logs and saving are Keras's own. A `train_step` of one's own may prepare the data, and ends with
    `return super().train_step((x, y, sample_weight))`.
    """

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step along (I - eps D) v, Eq. (10); other optimizers get their plain step."""
        optimizer = _by_example(self.optimizer)
        if optimizer is None:
            return super().train_step(data)
        if self._step_state.preparing:
            raise _PreparedError(data)
        batch = per_example.Batch(*keras.utils.unpack_x_y_sample_weight(data))
        one = tf.ones([])
        scale = self.optimizer.scale_loss(one)
        gradients = self._step_state.ways.gradients(batch, scale)
        direction = optimizer.direction(gradients)
        if scale is not one:
            # The optimizer divides by the loss scale, and skips the step where this overflows.
            direction = [d * tf.cast(scale, d.dtype) for d in direction]
        variables = self.trainable_variables
        direction = [tf.cast(d, v.dtype) for d, v in zip(direction, variables, strict=True)]
        with optimizer.applying_direction():
            self.optimizer.apply(direction, variables)
        keras_models.track_loss(self, gradients.loss, gradients.n_examples)
        x, y, sample_weight = batch
        return self.compute_metrics(x, y, gradients.y_pred, sample_weight=sample_weight)

    def make_train_function(self, force: bool = False) -> None:
        """As the parent's; with RGD the first batch builds all that a traced step must not build.

        Raises:
            ValueError: more than one replica: each would have a D of its own; or the `train_step`
                of another class, which this one's would replace.
        """
        if self.train_function is not None and not force:
            return
        self._step_state: Any = None  # a `_StepState`, with RGD
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
        hidden = _hidden_train_step(type(self))
        if hidden is not None:
            raise ValueError(_HIDDEN.format(mine=type(self).__name__, theirs=hidden.__name__))
        self._step_state = _StepState(self)
        self.train_function: Any = self._preparing(self.train_function)

    def _preparing(self, train_function):
        """`train_function`, with what must happen on real data before its first step."""
        state = self._step_state

        def prepared_train_function(iterator):
            if state.ways.last is None:
                spec = getattr(iterator, "element_spec", None)
                first = list(itertools.islice(iterator, self.steps_per_execution))
                if not first:
                    raise StopIteration
                self._choose_way(*self._prepared(first[0], spec))
                iterator = iter(first) if spec is None else iterator_of(first, spec)
            return train_function(iterator)

        return prepared_train_function

    def _prepared(self, data, spec):
        """What `train_step` above gets of a batch, and the specs of it, by its own preparation."""
        _check_dense(data)
        if spec is None:
            spec = specs_of_given(data)
        mine = next(c for c in type(self).__mro__ if "train_step" in vars(c))
        if mine is RGDMixin:
            return data, spec
        state = self._step_state

        def prepare(data):
            try:
                state.preparing = True
                self.train_step(data)
            except _PreparedError as prepared:
                return prepared.data
            except NotADirectionError as error:
                raise ValueError(_OWN_STEP.format(name=mine.__name__)) from error
            finally:
                state.preparing = False
            raise ValueError(_OWN_STEP.format(name=mine.__name__))

        function = tf.function(prepare, autograph=False)
        traced = function.get_concrete_function(spec)
        with per_example.unchanged(self):
            prepared = function(data)
        _check_dense(prepared)
        return prepared, specs_of_given(traced.structured_outputs)

    def _choose_way(self, data, spec):
        """Build the model for its data, and choose the way to per-example gradients.

        A layer built inside a compiled step has given wrong numbers, and any variable made there
        has the step traced twice.
        """
        keras_models.build_by_symbols(self, symbols_of(spec))
        if not self.trainable_variables:
            raise ValueError(f"Model '{self.name}' has no trainable weights for RGD to train.")
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        batch, specs = (
            per_example.Batch(*keras.utils.unpack_x_y_sample_weight(given(t))) for t in (data, spec)
        )
        self._step_state.ways.choose(specs, batch.mapped(tf.convert_to_tensor))

    def save_assets(self, path: str | os.PathLike) -> None:
        """Write where the random numbers of the layers stand, which Keras does not."""
        states = {
            str(i): seed.state.numpy() for i, seed in enumerate(per_example.seed_generators(self))
        }
        np.savez(os.path.join(path, _SEEDS), **states)

    def load_assets(self, path: str | os.PathLike) -> None:
        """Go on with the random numbers where `save_assets` found them."""
        states = np.load(os.path.join(path, _SEEDS))
        for i, seed in enumerate(per_example.seed_generators(self)):
            if str(i) in states:  # 0.1.0 did not save those that a layer keeps in lists
                seed.state.assign(states[str(i)])


def _check_dense(data):
    batch = keras.utils.unpack_x_y_sample_weight(given(data))
    batches.check_dense(*batch, what="RGD by the gradients of examples")


class _PreparedError(Exception):
    """Raised with the data that the mixin's `train_step` was called with, to look at them."""

    def __init__(self, data):
        super().__init__()
        self.data = data


class _StepState:
    """What a training step needs and no saved model should hold; Keras does not track it."""

    def __init__(self, model):
        rgd = inner_rgd(model.optimizer)
        wanted = per_example.Wanted(
            rgd.per_example, rgd.chunk_size, rgd.microbatch_size, bool(model.jit_compile)
        )
        told = functools.partial(setattr, rgd, "per_example_choice")
        self.ways = per_example.StepWays(model, wanted, per_example.choose_way, told)
        self.preparing = False


_OWN_STEP = """\
`{name}.train_step` takes a step of its own, so RGD does not get the gradients of the batch's \
examples. No weight was changed. Either let it prepare the data and end with
    return super().train_step((x, y, sample_weight))
with what it minimises in `compute_loss` (or in `loss=`), or use keras_rgd.RGD(..., window=32), \
which takes the gradients that it applies. In a training loop of your own:
    gradients = keras_rgd.per_example_gradients(model, x, y)
    optimizer.apply_direction(optimizer.direction(gradients), model.trainable_variables)"""

_HIDDEN = """\
`{mine}` puts RGDMixin before `{theirs}`, which overrides `train_step`: RGDMixin's would run in \
its place and minimise the loss of `compile` instead of its own. No weight was changed. Write what \
`{theirs}.train_step` minimises as `compute_loss` and drop that `train_step`, or use \
keras_rgd.RGD(..., window=32) with `{theirs}` as it is, or, in a training loop of your own, \
keras_rgd.per_example_gradients."""


def _hidden_train_step(cls):
    """The class behind the mixin whose `train_step` the mixin's hides, or `None`."""
    behind = cls.__mro__[cls.__mro__.index(RGDMixin) + 1 :]
    owner = next(c for c in behind if "train_step" in vars(c))
    return None if owner.__module__.startswith("keras.") else owner


def _by_example(optimizer):
    """The `RGD` in `optimizer` that takes D from the batch's examples, or `None`."""
    rgd = inner_rgd(optimizer)
    return None if rgd is None or rgd.window is not None else rgd


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDModel(RGDMixin, keras.Model):
    """`keras.Model` whose training step is RGD's: `RGDModel(inputs, outputs)`, or subclass it."""

    def __new__(cls, *args, **kwargs):
        if cls is RGDModel and keras_models.makes_functional(args, kwargs):
            cls = RGDFunctional
        return super().__new__(cls, *args, **kwargs)

    # By these names of its arguments Keras sees that a functional model can be reloaded so.
    def __init__(self, *args, **kwargs):
        cls = type(self)
        if keras_models.makes_functional(args, kwargs) and not isinstance(self, Functional):
            # Keras would exchange the base of every class above this one, `RGDModel` too, and no
            # model with layers of its own could be a subclass of `RGDModel` any more.
            cls.__bases__ = tuple(RGDFunctional if b is RGDModel else b for b in cls.__bases__)
        super().__init__(*args, **kwargs)


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDFunctional(RGDModel, Functional):
    """What `RGDModel(inputs, outputs)` makes, as `keras.Model(inputs, outputs)` a `Functional`."""


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDSequential(RGDMixin, keras.Sequential):
    """`keras.Sequential` whose training step is RGD's: `RGDSequential([...])`."""


def to_rgd(model: keras.Model) -> RGDMixin:
    """An existing functional or Sequential model as one that RGD trains, sharing its layers.

    Compile the result; the weights are the same variables, so training one trains the other.

    Args:
        model: a functional or Sequential `keras.Model`, as those of `keras.applications` or what
            `keras.models.clone_model` returns.

    Returns:
        An `RGDSequential` for a `keras.Sequential`, else an `RGDModel`.

    Raises:
        ValueError: no model; or one of a class of one's own, which must take the mixin itself:
            what it overrides would be lost.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a keras.Model, such as keras.models.load_model returns for a file. "
            f"Received: {model!r}"
        )
    if isinstance(model, RGDMixin):
        return model
    if type(model) is keras.Sequential:
        layers = list(model.layers)
        if model.built:
            (inputs,) = model.inputs
            shape, dtype = inputs.shape, inputs.dtype
            layers.insert(
                0,
                keras.Input(batch_shape=shape, dtype=dtype, name=inputs.name, sparse=inputs.sparse),
            )
        converted = RGDSequential(layers, name=model.name)
    elif type(model) is Functional:
        outputs = keras.tree.pack_sequence_as(model.output, keras.tree.flatten(model.output))
        converted = RGDModel(model.input, outputs, name=model.name)
    else:
        name = type(model).__name__
        raise ValueError(
            f"`{name}` is a class of its own, and what it overrides would be lost. Expected a "
            "functional model or a keras.Sequential. Make the model by a class that adds RGD's "
            "step to this one, with the same arguments,\n"
            f"    class RGD{name}(keras_rgd.RGDMixin, {name}): ...\n"
            "or, for a functional model that overrides nothing,\n"
            "    model = keras_rgd.RGDModel(model.inputs, model.outputs)"
        )
    # The policy decides whether `compile` scales the loss for half precision.
    converted.dtype_policy = model.dtype_policy
    return converted
