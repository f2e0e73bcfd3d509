"""Per-example gradients by differentiating the batch's gradient by the examples' weights.

One forward pass serves everything, so it is exact also where examples mix (BatchNormalization in
training), for the very Dropout masks of the step, and for recurrent layers.
"""

import functools

import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd.per_example.gradients import gram_of_rows
from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients
from keras_rgd.per_example.way import Way


def double_backward_way(losses, reason, chunk_size=None):
    """The `Way` "double_backward", for any model.

    Args:
        losses: the `ExampleLosses` of the model.
        reason: why it was chosen.
        chunk_size: examples whose gradients its Gram matrix may hold at once. Defaults to `None`,
            all.
    """
    make = functools.partial(DoubleBackward, losses, chunk_size=chunk_size)
    return Way("double_backward", reason, make)


class DoubleBackward(TensorFlowGradients):
    """k = N d/du <grad L(u), v> and sum_i w_i g_i = N grad <dL/du, w>, for one batch.

    Memory is that of two backward passes: nothing of size N x d. `gram` costs N backward passes
    and, for that while, memory N d; or with `chunk_size` below N about twice the time, and no
    more memory than the rest.

    Args:
        losses: the `ExampleLosses` of a model.
        batch: a `Batch`.
        loss_scale: factor that keeps half-precision gradients in range; it cancels from every
            result. Defaults to `1.0`.
        chunk_size: how many examples' gradients `gram` may hold at once. Defaults to `None`, all.

    Raises:
        ValueError: where the loss has no per-example losses, or a layer has no second derivative.
    """

    way = "double_backward"
    gram_is_cheap = False

    def __init__(self, losses, batch, loss_scale=1.0, chunk_size=None):
        self.weights = losses.weights
        self.n_examples = batch.size
        self._holds_all_rows = chunk_size is None or (
            isinstance(self.n_examples, int) and chunk_size >= self.n_examples
        )
        self._model = losses.model
        self._n = tf.cast(self.n_examples, self.dtype)
        self._scale = tf.cast(loss_scale, self.dtype)
        self._u = u = tf.ones([self.n_examples], self.dtype)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as by_example:
            by_example.watch(u)
            with tf.GradientTape(persistent=True) as by_weight:
                self.y_pred = losses.forward(batch.x)
                self.loss, derivatives = losses(batch, self.y_pred, u)
                scaled_loss = tf.cast(self.loss, self.dtype) * self._scale
                # f, scaled; its cotangents are the weights of `combine`.
                self._scaled_losses = self._n * self._scale * tf.cast(derivatives, self.dtype)
            self._scaled_gradient = self._by_weight_gradient(by_weight, scaled_loss)
        self._by_weight, self._by_example = by_weight, by_example
        self.gradient = vectors.scale(self._scaled_gradient, 1 / self._scale)

    def _by_weight_gradient(self, tape, target, cotangent=None):
        return self.cast(
            tape.gradient(
                target, self.weights, cotangent, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
        )

    def _dot(self, v):
        try:
            k = self._by_example.gradient(
                self._scaled_gradient,
                self._u,
                output_gradients=v,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        except (LookupError, NotImplementedError) as error:
            raise ValueError(
                "per_example='double_backward' needs the derivative of every layer's gradient, "
                f"and one is missing: {error}. For a recurrent layer on a GPU pass "
                "use_cudnn=False to it; else (as for layers under keras.remat) use "
                "per_example='vectorized_map'. Recurrent layers: "
                f"{[layer.name for layer in self._model.layers if hasattr(layer, 'use_cudnn')]}."
            ) from error
        return self._n / self._scale * k

    def _combine(self, w):
        # Cotangents no larger than those of the batch's own loss: half precision overflows.
        # The 0 is for a batch without examples.
        size = self._n * tf.reduce_max(tf.concat([tf.abs(w), tf.zeros([1], w.dtype)], 0))
        scaled = self._by_weight_gradient(
            self._by_weight, self._scaled_losses, tf.math.divide_no_nan(w, size)
        )
        return vectors.scale(scaled, size / self._scale)

    def gram(self, center=None, unit=1.0):
        if self._holds_all_rows:
            rows = self.combine_many(tf.eye(self.n_examples, dtype=self.dtype))
            return gram_of_rows(rows, center, unit)
        return super().gram(center, unit)
