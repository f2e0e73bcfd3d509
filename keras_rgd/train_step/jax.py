"""The training step on JAX: Keras's stateless one, with every variable handed in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from keras_rgd._support.arguments import check_way_is_here
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.linearized import linearized_way
from keras_rgd.train_step.step import by_example, check_is_not_hidden, take_step

# What the mixin asks of the class that it is mixed into.
if TYPE_CHECKING:
    from keras import Model as _Model
else:
    _Model = object


class TrainStep(_Model):
    """The training step of `keras_rgd.RGDMixin` on JAX."""

    _way: Any  # the `Way` to per-example gradients, with RGD

    def train_step(self, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        """One step along (I - eps D) v, Eq. (10); other optimizers get their plain step.

        Args:
            state: the values of the trainable, the non-trainable, the optimizer's and the metrics'
                variables.
            data: a batch.

        Returns:
            The logs; the new state.
        """
        rgd = by_example(self.optimizer)
        if rgd is None:
            return super().train_step(state, data)
        batch = Batch(*keras.utils.unpack_x_y_sample_weight(data))
        with keras.StatelessScope(state_mapping=self._with_values(state)) as scope:
            logs = take_step(self, rgd, batch, self._way, self._apply)
        new = tuple([scope.get_current_value(v) for v in some] for some in self._variables())
        return logs, new

    def _variables(self):
        return (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )

    def _with_values(self, state):
        """Pairs of a variable and its value in a state."""
        both = zip(self._variables(), state, strict=True)
        return [pair for some, values in both for pair in zip(some, values, strict=True)]

    def _apply(self, direction, variables):
        # Optimizers that scale the loss have another way to skip a step where Keras is stateless.
        state = self.optimizer.variables
        weights, values = self.optimizer.stateless_apply(
            [v.value for v in state], direction, [v.value for v in variables]
        )
        for some, new in ((state, values), (variables, weights)):
            for variable, value in zip(some, new, strict=True):
                variable.assign(value)

    def make_train_function(self, force: bool = False) -> None:
        """As the parent's; with RGD the way to per-example gradients is chosen here.

        Raises:
            ValueError: the `train_step` of another class, which this one's would replace; or what
                is asked of `RGD` is not to be had on JAX.
        """
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        rgd = by_example(self.optimizer)
        if rgd is None:
            return
        check_is_not_hidden(type(self), TrainStep)
        _check_wanted(rgd)
        self._way = linearized_way(self, training=True, chunk_size=rgd.chunk_size)
        rgd.per_example_choice = self._way
        self.train_function: Any = self._keeping_state(self.train_function)

    def _keeping_state(self, train_function):
        """`train_function`, which gives the variables back what it was handed where it raises.

        While Keras trains on JAX the variables hold nothing, and after an error they would not.
        """

        def train_function_keeping_state(state, iterator):
            try:
                return train_function(state, iterator)
            except Exception:
                for variable, value in self._with_values(state):
                    if not value.is_deleted():
                        variable.assign(value)
                raise

        return train_function_keeping_state


def _check_wanted(rgd):
    check_way_is_here(rgd.per_example)
    if rgd.microbatch_size is not None:
        raise ValueError(
            "On JAX batches are taken whole. Write microbatch_size=None, or set "
            f"KERAS_BACKEND=tensorflow. Received: microbatch_size={rgd.microbatch_size}"
        )
