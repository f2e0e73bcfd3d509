"""What was traced for a model is remembered with it, until the model is another.

Choosing a way and tracing its operations takes far longer than running them. Both depend on what
the model is, and not on the values of its weights: so a second measurement of the same model costs
its arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import keras

from keras_rgd._keras.models import compiled_loss, layers_of

# Where a model keeps what is remembered. By its `__dict__`, as Keras would track an attribute; so
# it goes when the model goes, is not saved, and no copy of the model has it.
_PLACE = "_keras_rgd_memory"

# Each may hold the traces of a dozen operations.
_MOST = 16


def remembered(model: keras.Model, key: Hashable, make: Callable[[], Any]) -> Any:
    """`make()`, or what it returned for the same model and key before.

    Everything is forgotten where the model has other layers, weights or losses than before, others
    of them train, or they compute in another dtype. Not seen is what a layer keeps in a plain
    Python attribute, as a dropout rate: see `forget`.

    Args:
        model: a `keras.Model`.
        key: what else the result depends on, hashable.
        make: a function without arguments.
    """
    memory = vars(model).get(_PLACE)
    if memory is None or not memory.is_of(model):
        memory = vars(model)[_PLACE] = _Memory(model)
    return memory.get(key, make)


def forget(model: keras.Model) -> None:
    """Forget what was traced for a model: the next measurement looks at it anew.

    Measuring D, its spectrum or the geometry of a model a second time uses the graphs that were
    traced the first time, and the way to per-example gradients that was chosen then. What Keras
    knows to have changed is seen (weights, layers, `trainable`, `compile`, dtype policies, shapes
    of the data). What is not: plain Python attributes that a layer, a loss or a `compute_loss`
    reads when it is traced, as `dropout.rate = 0.2`. Keras's own `fit` does not see those either,
    until `compile` is called again.

    Args:
        model: a `keras.Model`.
    """
    vars(model).pop(_PLACE, None)


class _Memory:
    """What was made for one state of a model's structure."""

    def __init__(self, model: keras.Model):
        # Held, so that no other object can have the identity of one of these.
        self._objects, self._values = _structure(model)
        self._made: dict[Hashable, Any] = {}

    def is_of(self, model: keras.Model) -> bool:
        """Whether the model is what it was."""
        objects, values = _structure(model)
        same = len(objects) == len(self._objects) and values == self._values
        return same and all(a is b for a, b in zip(objects, self._objects, strict=True))

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for a key, the last ones used being kept."""
        made = self._made.pop(key) if key in self._made else make()
        self._made[key] = made
        while len(self._made) > _MOST:
            del self._made[next(iter(self._made))]
        return made


def _structure(model: keras.Model) -> tuple[list, tuple]:
    """What a trace of the model's loss depends on: objects, and values to be compared."""
    layers = list(layers_of(model))
    weights = model.variables
    objects = [type(model), compiled_loss(model), *layers, *weights]
    values = (
        keras.config.floatx(),
        tuple(v.trainable for v in weights),
        tuple(layer.trainable for layer in layers),
        tuple(layer.dtype_policy.name for layer in layers),
    )
    return objects, values
