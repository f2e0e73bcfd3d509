"""The training step on TensorFlow, whose way to per-example gradients the first batch chooses."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_rgd import per_example
from keras_rgd._keras import models as keras_models
from keras_rgd._keras.data import given, iterator_of, specs_of_given, symbols_of
from keras_rgd._support import batches
from keras_rgd.optimizer import NotADirectionError, inner_rgd
from keras_rgd.train_step.step import by_example, check_is_not_hidden, take_step

# What the mixin asks of the class that it is mixed into.
if TYPE_CHECKING:
    from keras import Model as _Model
else:
    _Model = object


class TrainStep(_Model):
    """The training step of `keras_rgd.RGDMixin` on TensorFlow."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step along (I - eps D) v, Eq. (10); other optimizers get their plain step."""
        rgd = by_example(self.optimizer)
        if rgd is None:
            return super().train_step(data)
        if self._step_state.preparing:
            raise _PreparedError(data)
        batch = per_example.Batch(*keras.utils.unpack_x_y_sample_weight(data))
        gradients_of = self._step_state.ways.gradients
        return take_step(self, rgd, batch, gradients_of, self.optimizer.apply)

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
        if by_example(self.optimizer) is None:
            return
        replicas = self.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                "RGD with per-example gradients runs on one replica: the D of a batch that is "
                "split over several is not the mean of their D's. "
                f"Received: {replicas} replicas. Train outside the strategy's scope."
            )
        check_is_not_hidden(type(self), TrainStep)
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
        if mine is TrainStep:
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
        losses = per_example.ExampleLosses(model, training=True)
        self.ways = per_example.StepWays(losses, wanted, per_example.choose_way, told)
        self.preparing = False


_OWN_STEP = """\
`{name}.train_step` takes a step of its own, so RGD does not get the gradients of the batch's \
examples. No weight was changed. Either let it prepare the data and end with
    return super().train_step((x, y, sample_weight))
with what it minimises in `compute_loss` (or in `loss=`), or use keras_rgd.RGD(..., window=32), \
which takes the gradients that it applies. In a training loop of your own:
    gradients = keras_rgd.per_example_gradients(model, x, y)
    optimizer.apply_direction(optimizer.direction(gradients), model.trainable_variables)"""
