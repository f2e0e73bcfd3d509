"""Per-example gradients outside a training step: each operation one compiled function."""

import functools

import tensorflow as tf

from keras_rgd.per_example.batch import batch_size
from keras_rgd.per_example.gradients import PerExampleGradients
from keras_rgd.per_example.state import unchanged

_OPERATIONS = ("dot", "combine", "combine_many", "gram", "rows", "squares", "images")


def compiled_way(make, way):
    """`make(x, y, sample_weight)`, with its operations as graph functions.

    Each operation repeats the forward pass from the same seeds and moving statistics, and leaves
    them as they were.
    """
    start = _graph_function(_start, make)
    operations = {name: _graph_function(_operate, make, name) for name in _OPERATIONS}
    return lambda model, *batch: Compiled(way, model, batch, start, operations)


def _graph_function(function, *arguments):
    # TensorFlow counts retracing by code object: a partial has none, and is counted alone.
    partial = functools.partial(function, *arguments)
    return tf.function(partial, reduce_retracing=True, autograph=False)


def _start(make, x, y, sample_weight):
    gradients = make(x, y, sample_weight)
    return gradients.loss, gradients.y_pred, gradients.gradient, gradients.mean()


def _operate(make, name, batch, *arguments):
    return getattr(make(*batch), name)(*arguments)


class Compiled(PerExampleGradients):
    """One batch's per-example gradients, each operation a graph function of the batch."""

    def __init__(self, way, model, batch, start, operations):
        self.way, self.gram_is_cheap = way, way == "layerwise"
        self._model, self._batch = model, batch
        self._start, self._operations = start, operations
        self.weights = [w.value for w in model.trainable_variables]
        self.n_examples = batch_size(batch[0])

    @functools.cached_property
    def _started(self):
        with unchanged(self._model):
            return self._start(*self._batch)

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
