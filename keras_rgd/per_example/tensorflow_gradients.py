"""What per-example gradients need on TensorFlow beside `keras.ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_rgd._support.vectors import Vector
from keras_rgd.per_example.gradients import PerExampleGradients


class TensorFlowGradients(PerExampleGradients):
    """A base for the ways that TensorFlow differentiates.

    A tape's gradient by an embedding is sparse, a graph forgets shapes, and a loop whose outputs
    are not described runs its body once more to see them.
    """

    def cast(self, tensors: Iterable[Any]) -> Vector:
        """A list of tensors (or of a tape's sparse gradients) as a list of tensors of `dtype`."""
        return [tf.cast(tf.convert_to_tensor(t), self.dtype) for t in tensors]

    def vector(self, v: Any) -> Vector:
        v = super().vector(v)
        return [tf.ensure_shape(t, w.shape) for t, w in zip(v, self.weights, strict=True)]

    def _mapped(self, function: Callable[[Any], Any], given: Any, like: Any) -> Any:
        signature = keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), like)
        return tf.map_fn(function, given, fn_output_signature=signature)
