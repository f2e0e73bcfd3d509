"""First, second and third derivatives of the examples' losses, along given directions.

By reverse mode alone, as TensorFlow's forward mode has no rule for loops and so none for recurrent
layers. A number for each example comes from cotangents z of shape (N,): sum_i z_i a_i is linear in
z, so its gradient by z holds every a_i.
"""

import functools

import tensorflow as tf

from keras_rgd._keras.graphs import handles_in, moments_exchanged
from keras_rgd._keras.models import layers_of
from keras_rgd._support import vectors
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.traces import with_any_size

_HALF = {"float16", "bfloat16"}
_LOOPS = {"While", "StatelessWhile"}

_OPERATIONS = (
    "losses",
    "loss_and_gradient",
    "loss_hessian",
    "dot",
    "combine",
    "hessian",
    "second",
    "third",
)


class Derivatives:
    """Derivatives of f_i and of L(1) = r + mean f_i at the model's weights, in evaluation mode.

    In the paper's letters g_i is the gradient of f_i and H_i its Hessian. Vectors u and v are lists
    of tensors shaped as the weights; z has shape (N,). Nothing has d x d entries.

    Args:
        model: a compiled, built model.
        batch: a `Batch` of tensors.
        often: whether the operations will be called many times. Defaults to `False`.

    Attributes:
        weights: the model's trainable weights, a list of `tf.Variable`.
        dtype: of all that is returned.

    Raises:
        ValueError: the model's second derivatives would be those of another function: it computes
            in half precision, or uses tf.stop_gradient on what depends on its weights.
    """

    def __init__(self, model, batch, often=False):
        operations = remembered(model, "derivatives", lambda: _Operations(model))
        key = ("derivatives", with_any_size(batch.specs()).signature)
        has_loops = remembered(model, key, lambda: operations.check(batch))
        self.weights, self.dtype = operations.weights, operations.dtype
        self._batch = batch
        # Three tapes around a loop take TensorFlow seconds to trace, and tenths to run eagerly.
        self._operations = operations.traced if often or not has_loops else operations.eager

    def losses(self):
        """The f_i, shape (N,)."""
        return self._run("losses")

    def loss_and_gradient(self):
        """L(1) and its gradient v."""
        return self._run("loss_and_gradient")

    def loss_hessian(self, u):
        """The Hessian of L(1) times u, that of r included."""
        return self._run("loss_hessian", u)

    def dot(self, u):
        """<g_i, u>, shape (N,)."""
        return self._run("dot", u)

    def combine(self, z):
        """sum_i z_i g_i."""
        return self._run("combine", z)

    def hessian(self, z, u):
        """sum_i z_i H_i u."""
        return self._run("hessian", z, u)

    def second(self, u, v):
        """<u, H_i v>, shape (N,)."""
        return self._run("second", u, v)

    def third(self, z, u, v):
        """sum_i z_i grad <u, H_i v>, the third derivatives with u and v in two of their places."""
        return self._run("third", z, u, v)

    def _run(self, name, *arguments):
        return self._operations[name](self._batch, *arguments)


class _Operations:
    """The operations of `Derivatives` for one model, as functions of the batch.

    Attributes:
        eager: the functions by name.
        traced: the same as graph functions, each traced when it is first called, and once more for
            data of another shape or structure.
    """

    def __init__(self, model):
        self._model, self._example_losses = model, ExampleLosses(model, training=False)
        self.weights = [w.value for w in model.trainable_variables]
        self.dtype = tf.as_dtype(working_dtype(self.weights))
        self.eager = {name: getattr(self, f"_{name}") for name in _OPERATIONS}
        self.traced = {name: _graph_function(f) for name, f in self.eager.items()}

    def check(self, batch):
        """Whether the model has loops; `ValueError` where its second derivatives would be wrong.

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
        graph = self.traced["losses"].get_concrete_function(batch).graph
        depends = {id(t) for t in handles_in(graph, self.weights)}
        hidden = []
        for operation in graph.get_operations():
            if any(id(t) in depends for t in operation.inputs):
                depends.update(id(t) for t in operation.outputs)
                if operation.type == "StopGradient":
                    hidden.append(operation.name)
        called = [n for f in graph.as_graph_def().library.function for n in f.node_def]
        hidden += [node.name for node in called if node.op == "StopGradient"]
        if hidden:
            raise ValueError(
                f"Model '{self._model.name}' uses tf.stop_gradient on what depends on its weights "
                "(or inside a loop), so its second derivatives are not those of its loss. Expected "
                f"layers and losses without it. Received: {', '.join(hidden)}"
            )
        types = {o.type for o in graph.get_operations()} | {node.op for node in called}
        return bool(types & _LOOPS)

    def _losses(self, batch):
        return self._loss_and_losses(batch)[1]

    def _loss_and_gradient(self, batch):
        with tf.GradientTape() as tape:
            loss, _ = self._loss_and_losses(batch)
        return loss, self._gradient(tape, loss)

    def _loss_hessian(self, batch, u):
        with tf.GradientTape() as tape:
            directional = vectors.inner(self._loss_and_gradient(batch)[1], u)
        return self._gradient(tape, directional)

    def _dot(self, batch, u):
        return self._by_example(batch, lambda z: self._directional(batch, z, u))

    def _combine(self, batch, z):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(z * self._losses(batch))
        return self._gradient(tape, total)

    def _hessian(self, batch, z, u):
        with tf.GradientTape() as tape:
            directional = self._directional(batch, z, u)
        return self._gradient(tape, directional)

    def _second(self, batch, u, v):
        return self._by_example(batch, lambda z: self._curvature(batch, z, u, v))

    def _third(self, batch, z, u, v):
        with tf.GradientTape() as tape:
            curvature = self._curvature(batch, z, u, v)
        return self._gradient(tape, curvature)

    def _directional(self, batch, z, u):
        """sum_i z_i <g_i, u>."""
        return vectors.inner(self._combine(batch, z), u)

    def _curvature(self, batch, z, u, v):
        """sum_i z_i <u, H_i v>."""
        return vectors.inner(self._hessian(batch, z, u), v)

    def _loss_and_losses(self, batch):
        """L(1), a scalar, and f, shape (N,)."""
        with moments_exchanged(_moments):
            y_pred = self._example_losses.forward(batch.x)
        ones = tf.ones([batch.size], self.dtype)
        loss, derivatives = self._example_losses(batch, y_pred, ones)
        n = tf.cast(batch.size, self.dtype)
        return tf.cast(loss, self.dtype), n * tf.cast(derivatives, self.dtype)

    def _by_example(self, batch, total):
        """The a_i, shape (N,), of a function z -> sum_i z_i a_i."""
        z = tf.ones([batch.size], self.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(z)
            value = total(z)
        return tape.gradient(value, z, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def _gradient(self, tape, target):
        gradient = tape.gradient(
            target, self.weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.cast(tf.convert_to_tensor(g), self.dtype) for g in gradient]


def _graph_function(operation):
    # TensorFlow counts retracing by code object: a partial has none.
    return tf.function(functools.partial(operation), autograph=False)


def _moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, but so that normalization layers have second derivatives.

    TensorFlow's own hides the mean from the variance by tf.stop_gradient, which is right for first
    derivatives only.
    """
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
    return mean if keepdims else tf.squeeze(mean, axes), variance
