"""What happens inside of a Keras optimizer's update, on every backend of Keras."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras

_NOT_DIRECTED = """\
Keras {keras} took an update without asking for its direction, which would have been plain SGD's: \
{name} expects `Optimizer.apply` to call `_clip_gradients` before `update_step`. No step was \
taken. Install an earlier version of Keras, and please report this with both versions."""


class DirectedOptimizer(keras.optimizers.Optimizer):
    """An optimizer whose updates may go along a direction that is made of their gradients.

    Expected of Keras: each `apply` calls `_backend_apply_gradients(gradients, variables)` with the
    gradients that are there; and each update in it calls `_clip_gradients(gradients)` once, before
    anything else and before `update_step`, when the loss scale is off the gradients and they are
    accumulated. So a direction that takes their place there is clipped and applied like one.

    A subclass overrides `_directs` and `_along`, and its `update_step` calls `_check_directed`.
    """

    _places = None
    _directed = False

    def _directs(self):
        """Whether the update at hand goes along `_along(...)` instead of its gradients."""
        raise NotImplementedError

    def _along(self, gradients, places):
        """The direction of an update, a list of tensors like its gradients.

        Args:
            gradients: a list of tensors, those of all replicas added up.
            places: for each the index of its variable among those the optimizer is built for.
        """
        raise NotImplementedError

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        # Kept between the calls that follow: with several replicas another thread makes the last.
        self._places, self._directed = None, False
        super().apply(grads, trainable_variables)

    def _backend_apply_gradients(self, grads, trainable_variables):
        # Places and not variables, which Keras would take for some of the optimizer's own.
        self._places = [place_of(self, v) for v in trainable_variables]
        super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads):
        if not self._directs():
            return super()._clip_gradients(grads)
        if self._places is None:
            raise self._not_directed()
        replicas = _replicas()
        if replicas > 1:
            grads = _added_up(grads)
        direction = super()._clip_gradients(self._along(grads, self._places))
        self._directed = True
        # Keras adds up what the replicas hand it, and each has the whole direction.
        return direction if replicas == 1 else [d / replicas for d in direction]

    def _check_directed(self):
        """Raise `RuntimeError` where an update is reached and its direction was not asked for.

        While `apply` is traced, or runs without a trace. Steps that Keras skips or accumulates
        reach no update.
        """
        if self._directs() and not self._directed:
            raise self._not_directed()

    def _not_directed(self):
        name = type(self).__name__
        return RuntimeError(_NOT_DIRECTED.format(keras=keras.__version__, name=name))


def place_of(optimizer, variable):
    """The index of a variable among those that an optimizer is built for.

    Expected: `_get_variable_index`, which knows a variable of Keras and what a backend makes of it
    (`update_step` gets a `tf.Variable` on TensorFlow, the mirrored one under a strategy).
    """
    return optimizer._get_variable_index(variable)


def track(optimizer, variable):
    """Make a variable one of the optimizer's own, which is saved with it.

    Expected: `_track_variable`. `add_variable` does it for a `keras.Variable` alone, and no
    subclass of that; an attribute would come in another order, so that saved states did not fit.
    """
    optimizer._track_variable(variable)


def layout_of_stacked(variable):
    """The arguments by which `add_variable` splits W tensors like a variable as it is split.

    Under `keras.distribution.ModelParallel`; none where it is whole on every device.

    Expected: `_layout`, where there is a distribution a `TensorLayout` that names for each axis
    the mesh's, or `None`; before Keras 3.13 or so it is JAX's own `NamedSharding`. Until Keras 3.8
    `add_variable` takes none: there a window is whole on every device.
    """
    layout = getattr(variable, "_layout", None)
    axes = getattr(layout, "axes", None) or getattr(layout, "spec", None) or ()
    accepts = inspect.signature(keras.optimizers.Optimizer.add_variable).parameters
    if not any(axes) or "layout" not in accepts:
        return {}
    if isinstance(layout, keras.distribution.TensorLayout):
        return {"layout": keras.distribution.TensorLayout((None, *axes), layout.device_mesh)}
    from jax.sharding import NamedSharding, PartitionSpec

    return {"layout": NamedSharding(layout.mesh, PartitionSpec(None, *axes))}


def unwrapped(optimizer):
    """The optimizer that takes the steps, inside of one that scales the loss.

    Expected: `compile` wraps an optimizer under "mixed_float16" in a `LossScaleOptimizer`, whose
    `inner_optimizer` it then is.
    """
    return getattr(optimizer, "inner_optimizer", optimizer)


def _replicas():
    """How many replicas take this step together, in the replica context of `tf.distribute`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def _added_up(gradients):
    """The sums of gradients over the replicas that take this step together."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients))
