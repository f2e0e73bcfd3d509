"""First, second and third derivatives of the examples' losses, along given directions.

Reverse mode alone: TensorFlow's forward mode has no rule for loops, so not for recurrent layers. A
derivative along u is had as the gradient, by a cotangent z, of an expression that is linear in z.
"""

import functools

import tensorflow as tf

from keras_rgd._keras.graphs import handles_in, moments_exchanged
from keras_rgd._keras.models import layers_of
from keras_rgd._support import vectors
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.losses import ExampleLosses

_HALF = {"float16", "bfloat16"}

OPERATIONS = ("losses", "loss_and_gradient", "loss_hessian", "dot", "combine")
OPERATIONS += ("hessian", "second", "third")


class Derivatives:
    """Derivatives of f_i and of L(1) = r + mean f_i at the model's weights, in evaluation mode.

    In the paper's letters g_i is the gradient of f_i and H_i its Hessian. Vectors u and v are lists
    of tensors shaped as the weights; z has shape (N,). Nothing has d x d entries.

    Args:
        model: a compiled, built model.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets.
        sample_weight: the user's sample weights, or `None`.
        compiled: whether to make each operation a graph function, which pays where it is called
            often. Defaults to `False`.
    """

    def __init__(self, model, x, y, sample_weight, compiled=False):
        self.weights = [w.value for w in model.trainable_variables]
        self.dtype = tf.as_dtype(working_dtype(self.weights))
        self._batch = Batch(x, y, sample_weight)
        self.n_examples = int(self._batch.size)
        self._model, self._example_losses = model, ExampleLosses(model, training=False)
        if compiled:
            for name in OPERATIONS:
                # TensorFlow counts retracing by code object: a partial has none.
                operation = functools.partial(getattr(self, name))
                setattr(self, name, tf.function(operation, autograph=False))

    def losses(self):
        """The f_i, shape (N,)."""
        return self._losses()[1]

    def loss_and_gradient(self):
        """L(1) and its gradient v."""
        with tf.GradientTape() as tape:
            loss, _ = self._losses()
        return loss, self._gradient(tape, loss)

    def loss_hessian(self, u):
        """The Hessian of L(1) times u, that of r included."""
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                loss, _ = self._losses()
            slope = vectors.inner(self._gradient(tape, loss), u)
        return self._gradient(outer, slope)

    def dot(self, u):
        """<g_i, u>, shape (N,)."""
        z = self._cotangents()
        with tf.GradientTape() as by_example:
            by_example.watch(z)
            slope = self._slope(z, u)
        return self._by_example(by_example, slope, z)

    def combine(self, z):
        """Sum_i z_i g_i."""
        return self._combined(z)

    def hessian(self, z, u):
        """Sum_i z_i H_i u."""
        with tf.GradientTape() as tape:
            slope = self._slope(z, u)
        return self._gradient(tape, slope)

    def second(self, u, v):
        """<u, H_i v>, shape (N,)."""
        z = self._cotangents()
        with tf.GradientTape() as by_example:
            by_example.watch(z)
            curvature = self._curvature(z, u, v)
        return self._by_example(by_example, curvature, z)

    def third(self, z, u, v):
        """Sum_i z_i grad <u, H_i v>, the third derivatives with u and v in two of their places."""
        with tf.GradientTape() as tape:
            curvature = self._curvature(z, u, v)
        return self._gradient(tape, curvature)

    def _slope(self, z, u):
        """Sum_i z_i <g_i, u>."""
        return vectors.inner(self._combined(z), u)

    def _curvature(self, z, u, v):
        """Sum_i z_i <u, H_i v>."""
        with tf.GradientTape() as tape:
            slope = self._slope(z, u)
        return vectors.inner(self._gradient(tape, slope), v)

    def _combined(self, z):
        # Not `combine`, which may be a graph function: tapes would see one call of it.
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(z * self._losses()[1])
        return self._gradient(tape, total)

    def check(self):
        """Raise `ValueError` where second derivatives would be those of another function.

        What hides behind tf.stop_gradient is missing from them, also where the first are right; in
        half precision they are mostly rounding.
        """
        half = {layer.compute_dtype for layer in layers_of(self._model)} & _HALF
        if half:
            raise ValueError(
                f"Model '{self._model.name}' computes in half precision, which second derivatives "
                "do not survive. Expected layers of float32 or float64 (best float64: "
                "keras.config.set_floatx and set_dtype_policy before the model is built). "
                f"Received: {', '.join(sorted(half))}"
            )
        graph = tf.function(self.losses, autograph=False).get_concrete_function().graph
        depends = {id(t) for t in handles_in(graph, self.weights)}
        hidden = []
        for operation in graph.get_operations():
            if any(id(t) in depends for t in operation.inputs):
                depends.update(id(t) for t in operation.outputs)
                if operation.type == "StopGradient":
                    hidden.append(operation.name)
        for function in graph.as_graph_def().library.function:
            hidden += [node.name for node in function.node_def if node.op == "StopGradient"]
        if hidden:
            raise ValueError(
                f"Model '{self._model.name}' uses tf.stop_gradient on what depends on its weights "
                "(or inside a loop), so its second derivatives are not those of its loss. Expected "
                f"layers and losses without it. Received: {', '.join(hidden)}"
            )

    def _losses(self):
        """L(1), a scalar, and f, shape (N,)."""
        with moments_exchanged(_moments):
            y_pred = self._example_losses.forward(self._batch.x)
        ones = tf.ones([self.n_examples], self.dtype)
        loss, derivatives = self._example_losses(self._batch, y_pred, ones)
        return tf.cast(loss, self.dtype), self.n_examples * tf.cast(derivatives, self.dtype)

    def _cotangents(self):
        return tf.ones([self.n_examples], self.dtype)

    def _gradient(self, tape, target):
        gradient = tape.gradient(
            target, self.weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.cast(tf.convert_to_tensor(g), self.dtype) for g in gradient]

    def _by_example(self, tape, target, z):
        return tape.gradient(target, z, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, but so that normalization layers have second derivatives.

    TensorFlow's own hides the mean from the variance by tf.stop_gradient, which is right for first
    derivatives only.
    """
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
    return mean if keepdims else tf.squeeze(mean, axes), variance
