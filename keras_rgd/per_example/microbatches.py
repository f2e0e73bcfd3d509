"""Per-example gradients of a batch too large to be differentiated at once, piece by piece."""

import functools

import keras
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd.per_example.batch import mapped
from keras_rgd.per_example.state import changeable
from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients
from keras_rgd.per_example.way import Way


def in_microbatches(losses, way, size):
    """A `Way` for whole batches that takes them in pieces of `size` examples by another `way`."""
    state = changeable(losses.model)
    make = functools.partial(Microbatches, losses, way=way, state=state, size=int(size))
    return Way(way.name, way.reason, make)


class Microbatches(TensorFlowGradients):
    """Each operation is one pass over pieces of `size` examples and the rest; inside a graph only.

    Memory is that of one piece, beside the batch, the model's outputs for it and a few numbers an
    example. Every pass draws the random numbers that the first drew, and leaves seeds, moving
    statistics and metrics as that left them.

    Args:
        losses: the `ExampleLosses` of a model for which no example of a piece enters another's
            loss.
        batch: a `Batch`.
        loss_scale: as for `way`.
        way: the `Way` for a piece.
        state: the variables that a forward pass may change.
        size: examples in a piece.
    """

    gram_is_cheap = False

    def __init__(self, losses, batch, loss_scale=1.0, *, way, state, size):
        self.way = way.name
        self.weights = losses.weights
        self.n_examples = batch.size
        self._way, self._size, self._scale = way, size, loss_scale
        self._batch = batch
        self._state = [(v, tf.identity(v.value)) for v in state]
        self._passed = False

        def first(gradients, _):
            # A batch without examples is one piece.
            n = tf.maximum(self.n_examples, 1)
            share = tf.cast(tf.maximum(gradients.n_examples, 1) / n, self.dtype)
            parts = [*gradients.gradient, *gradients.mean(), tf.cast(gradients.loss, self.dtype)]
            return vectors.scale(parts, share), gradients.y_pred

        sums, self.y_pred = self._pass(first)
        count = len(self.weights)
        self.gradient, self._mean, self.loss = sums[:count], sums[count:-1], sums[-1]

    def mean(self):
        return self._mean

    def _dot(self, v):
        _, k = self._pass(lambda gradients, _: ([], gradients.dot(v)))
        return k

    def _combine(self, w):
        combined, _ = self._pass(lambda gradients, w: (gradients.combine(w), []), w)
        return combined

    def images(self, v, shift):
        def of_piece(gradients, _):
            k, images = gradients.images(v, shift)
            return images, tf.transpose(k)

        images, k = self._pass(of_piece)
        return tf.transpose(k), images

    def _pass(self, function, per_example=None):
        """Go through the pieces once.

        Args:
            function: of the `PerExampleGradients` of a piece and its part of `per_example`;
                returns a list of tensors to be added up, and a structure of tensors with an axis
                0 of examples to be put together.
            per_example: a tensor (N, ...).

        Returns:
            The sums, and the structure for all N.
        """
        if self._passed:
            for variable, value in self._state:
                variable.assign(value)
        self._passed = True
        n, size, given = self.n_examples, self._size, (self._batch, per_example)

        @tf.function(autograph=False)
        def of_piece(batch, part):
            return function(self._way(batch, self._scale), part)

        if isinstance(n, int) and n <= size:
            return of_piece(*given)
        count = n // size
        traced = of_piece.get_concrete_function(*mapped(lambda t: _spec(t, size), given))
        outputs = keras.tree.flatten(traced.structured_outputs[1])

        def body(i, sums, arrays):
            more, parts = of_piece(*mapped(lambda t: _taken(t, i * size, size), given))
            parts = keras.tree.flatten(parts)
            arrays = [a.write(i, t) for a, t in zip(arrays, parts, strict=True)]
            return i + 1, vectors.add(sums, more), arrays

        zeros = [tf.zeros(t.shape, t.dtype) for t in traced.structured_outputs[0]]
        arrays = [tf.TensorArray(t.dtype, count, element_shape=t.shape) for t in outputs]
        _, sums, arrays = tf.while_loop(
            lambda i, *_: i < count, body, (0, zeros, arrays), maximum_iterations=count
        )
        whole = [
            tf.reshape(a.stack(), [-1, *t.shape[1:]]) for a, t in zip(arrays, outputs, strict=True)
        ]
        rest = n - count * size

        def of_rest():
            more, parts = of_piece(*mapped(lambda t: t[count * size :], given))
            return more, keras.tree.flatten(parts)

        def nothing():
            # As long, as XLA wants it.
            return zeros, [tf.zeros([rest, *t.shape[1:]], t.dtype) for t in outputs]

        if not isinstance(n, int):
            more, parts = tf.cond((rest > 0) | (n == 0), of_rest, nothing)
        else:
            more, parts = of_rest() if rest else nothing()
        sums = vectors.add(sums, more)
        whole = [tf.concat(pair, 0) for pair in zip(whole, parts, strict=True)]
        return sums, keras.tree.pack_sequence_as(traced.structured_outputs[1], whole)


def _spec(tensor, size):
    return tf.TensorSpec([size, *tensor.shape[1:]], tensor.dtype)


def _taken(tensor, start, length):
    """`length` examples from `start` on.

    No slice: XLA compiles the loop also for a batch shorter than a piece, which never enters it.
    """
    part = tf.gather(tensor, tf.minimum(start + tf.range(length), tf.shape(tensor)[0] - 1))
    return tf.ensure_shape(part, [length, *tensor.shape[1:]])
