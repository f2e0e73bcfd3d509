"""Per-example gradients outside a training step: each operation one graph function."""

import functools

import tensorflow as tf

from keras_rgd.per_example.state import unchanged
from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients
from keras_rgd.per_example.way import Way

_OPERATIONS = ("dot", "combine", "combine_many", "gram", "rows", "squares", "images")


def measured(losses, way):
    """A way inside a graph as one outside of it, with its operations as graph functions.

    Each operation repeats the forward pass from the same seeds and moving statistics, and leaves
    them as they were.

    Args:
        losses: the `ExampleLosses` that `way` is of.
        way: a `Way`.
    """
    start = _graph_function(_start, way)
    operations = {name: _graph_function(_operate, way, name) for name in _OPERATIONS}

    model, weights = losses.model, losses.weights

    def make(batch, loss_scale):
        return Measured(model, weights, batch, way.name, start, operations)

    return Way(way.name, way.reason, make)


def _graph_function(function, *arguments):
    # TensorFlow counts retracing by code object: a partial has none, and is counted alone.
    partial = functools.partial(function, *arguments)
    return tf.function(partial, reduce_retracing=True, autograph=False)


def _start(way, batch):
    gradients = way(batch)
    return gradients.loss, gradients.y_pred, gradients.gradient, gradients.mean()


def _operate(way, name, batch, *arguments):
    return getattr(way(batch), name)(*arguments)


class Measured(TensorFlowGradients):
    """One batch's per-example gradients, each operation a graph function of the batch.

    Args:
        model: the model.
        weights: those that are trained.
        batch: a `Batch`.
        way: the name of the way.
        start: the graph function from a batch to what all operations share.
        operations: the graph functions of the operations, by their names.
    """

    def __init__(self, model, weights, batch, way, start, operations):
        self.way, self.gram_is_cheap = way, way == "layerwise"
        self._model, self._batch = model, batch
        self._start, self._operations = start, operations
        self.weights, self.n_examples = weights, batch.size

    @functools.cached_property
    def _started(self):
        with unchanged(self._model):
            return self._start(self._batch)

    @property
    def loss(self):
        return self._started[0]

    @property
    def y_pred(self):
        return self._started[1]

    @property
    def gradient(self):
        return self._started[2]

    def mean(self):
        return self._started[3]

    def _run(self, name, *arguments):
        with unchanged(self._model):
            return self._operations[name](self._batch, *arguments)

    def _dot(self, v):
        return self._run("dot", list(v))

    def _combine(self, w):
        return self._run("combine", tf.cast(w, self.dtype))

    def combine_many(self, w):
        return self._run("combine_many", tf.cast(w, self.dtype))

    def gram(self, center=None, unit=1.0):
        return self._run("gram", center, tf.cast(unit, self.dtype))

    def rows(self):
        return self._run("rows")

    def squares(self, center):
        return self._run("squares", list(center))

    def images(self, v, shift):
        return self._run("images", list(v), tf.cast(shift, self.dtype))
