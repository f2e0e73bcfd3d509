"""Per-example gradients outside a training step: each operation one compiled function."""

import functools

from keras import ops

from keras_rgd._support.backends import ON_TENSORFLOW
from keras_rgd.per_example.way import Way

if ON_TENSORFLOW:
    from keras_rgd.per_example.compiled_on_tensorflow import compiled
    from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients as Gradients
else:
    from keras_rgd.per_example.compiled_on_jax import compiled
    from keras_rgd.per_example.gradients import PerExampleGradients as Gradients  # type: ignore

_OPERATIONS = ("dot", "combine", "combine_many", "gram", "rows", "squares", "images")


def measured(model, weights, way, products_dtype=None, kind=None, more=()):
    """A way inside a compiled function as one outside of it, each operation such a function.

    Each operation repeats the forward pass from the same seeds and moving statistics, and leaves
    them as they were.

    Args:
        model: the model.
        weights: those that are trained.
        way: a `Way`.
        products_dtype: the dtype in which `gram` is computed, where it is not that of the weights.
            Defaults to `None`.
        kind: the class of the result. Defaults to `None`, `Measured`.
        more: names of more operations that the way has.
    """
    start = compiled(model, functools.partial(_start, way))
    operations = {
        name: compiled(model, functools.partial(_operate, way, name))
        for name in (*_OPERATIONS, *more)
    }

    def make(batch, loss_scale):
        return (kind or Measured)(weights, batch, way.name, start, operations, products_dtype)

    return Way(way.name, way.reason, make)


def _start(way, batch):
    gradients = way(batch)
    return gradients.loss, gradients.y_pred, gradients.gradient, gradients.mean()


def _operate(way, name, batch, *arguments):
    return getattr(way(batch), name)(*arguments)


class Measured(Gradients):
    """One batch's per-example gradients, each operation a compiled function of the batch.

    Args:
        weights: those that are trained.
        batch: a `Batch`.
        way: the name of the way.
        start: the function from a batch to what all operations share.
        operations: the functions of the operations, by their names.
        products_dtype: as in `measured`.
    """

    def __init__(self, weights, batch, way, start, operations, products_dtype=None):
        self._products_dtype = products_dtype
        self.way, self.gram_is_cheap = way, way == "layerwise"
        self._batch, self._start, self._operations = batch, start, operations
        self.weights, self.n_examples = weights, batch.size

    @property
    def products_dtype(self):
        return self._products_dtype or self.dtype

    @functools.cached_property
    def _started(self):
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
        return self._operations[name](self._batch, *arguments)

    def _dot(self, v):
        return self._run("dot", list(v))

    def _combine(self, w):
        return self._run("combine", ops.cast(w, self.dtype))

    def combine_many(self, w):
        return self._run("combine_many", ops.cast(w, self.dtype))

    def gram(self, center=None, unit=1.0):
        return self._run("gram", center, ops.cast(unit, self.dtype))

    def rows(self):
        return self._run("rows")

    def squares(self, center):
        return self._run("squares", list(center))

    def images(self, v, shift):
        return self._run("images", list(v), ops.cast(shift, self.dtype))
