"""Per-example gradients outside a training step: each operation one compiled function."""

import tensorflow as tf

from keras_rgd.per_example.checks import unchanged
from keras_rgd.per_example.interface import PerExampleGradients
from keras_rgd.per_example.loss import batch_size


def compiled_way(make, way):
    """`make(x, y, sample_weight)`, with its operations as graph functions.

    Each operation repeats the forward pass from the same seeds and moving statistics, and leaves
    them as they were.
    """

    @tf.function(reduce_retracing=True)
    def start(x, y, sample_weight):
        gradients = make(x, y, sample_weight)
        return gradients.loss, gradients.y_pred, gradients.gradient

    def operation(name):
        @tf.function(reduce_retracing=True)
        def run(batch, *arguments):
            return getattr(make(*batch), name)(*arguments)

        return run

    operations = {name: operation(name) for name in ("dot", "combine", "combine_many", "gram")}
    return lambda model, *batch: Compiled(way, model, batch, start, operations)


class Compiled(PerExampleGradients):
    """One batch's per-example gradients, each operation a graph function of the batch."""

    def __init__(self, way, model, batch, start, operations):
        self.way, self.gram_is_cheap = way, way == "layerwise"
        self._model, self._batch, self._operations = model, batch, operations
        self.weights = [w.value for w in model.trainable_variables]
        self.n_examples = batch_size(batch[0])
        with unchanged(model):
            self.loss, self.y_pred, self.gradient = start(*batch)

    def _run(self, name, *arguments):
        with unchanged(self._model):
            return self._operations[name](self._batch, *arguments)

    def dot(self, v):
        return self._run("dot", list(v))

    def combine(self, w):
        return self._run("combine", tf.cast(w, self.dtype))

    def combine_many(self, w):
        return self._run("combine_many", tf.cast(w, self.dtype))

    def gram(self, center=None, unit=1.0):
        return self._run("gram", center, tf.cast(unit, self.dtype))
