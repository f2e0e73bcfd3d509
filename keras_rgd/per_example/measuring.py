"""Which way to per-example gradients is taken where D is measured, outside a training step."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np

from keras_rgd._support import vectors
from keras_rgd._support.arguments import check_model, check_way
from keras_rgd.per_example.batch import Batch, mapped
from keras_rgd.per_example.double_backward import double_backward_way
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.layerwise import layerwise_way
from keras_rgd.per_example.layerwise.check import check_layerwise
from keras_rgd.per_example.layerwise.options import LayerwiseOptions
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.measured import measured
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.not_exact import NotExactError
from keras_rgd.per_example.state import unchanged
from keras_rgd.per_example.traces import specs_of
from keras_rgd.per_example.vectorized_map import (
    VectorizedMap,
    one_by_one,
    rows_function,
    vectorized,
)
from keras_rgd.per_example.vectorized_map_checks import (
    check_one_at_a_time,
    check_vectorized_map,
    error_of_trial,
)
from keras_rgd.per_example.way import Way

# One chunk of gradients is held in memory; this is what it may take, in bytes.
_CHUNK_BYTES = 2**30


def way_for(
    model: keras.Model,
    batch: Batch,
    *,
    training: bool,
    per_example: str = "auto",
    chunk_size: int | None = None,
    precise: bool = True,
) -> Way:
    """The `Way` for use outside a graph, remembered for the model and batches like this one.

    "auto" takes "layerwise" where that is exact for this model; else one example at a time where
    that is, with `tf.vectorized_map` where it can run it, or one backward pass an example
    ("one_by_one"); else "double_backward", whose Gram matrix costs N backward passes over the
    batch.

    Args:
        model: a compiled model; built here if it is not.
        batch: a `Batch`, on which the choice is made.
        training: whether layers behave as in training.
        per_example: one of `keras_rgd._support.arguments.WAYS`. Defaults to `"auto"`.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, as many as fit
            in 1 GiB.
        precise: whether "layerwise" works in float64, as the Gram matrix of one batch should.
            Defaults to `True`.

    Raises:
        ValueError: the way that was asked for is not exact or not possible, or nothing is trained.
    """
    if not model.built:
        build(model, batch.x)
    if not model.trainable_variables:
        raise ValueError(f"Model '{model.name}' has no trainable weights, so it has no D.")
    check_way(per_example, chunk_size)

    def choose() -> Way:
        losses = ExampleLosses(model, training)
        return _chosen(losses, batch, per_example, chunk_size, precise)

    key = (way_for, training, per_example, chunk_size, precise, batch.signature)
    return remembered(model, key, choose)


def _chosen(
    losses: ExampleLosses,
    batch: Batch,
    per_example: str,
    chunk_size: int | None,
    precise: bool,
) -> Way:
    specs = specs_of(batch)
    if per_example == "layerwise":
        return _layerwise(losses, batch, specs, precise)
    if chunk_size is None:
        chunk_size = _examples_that_fit(losses)
    if per_example == "auto":
        try:
            return _layerwise(losses, batch, specs, precise)
        except NotExactError as error:
            return _without_layerwise(losses, batch, specs, chunk_size, error.reason)
    if per_example == "vectorized_map":
        check_vectorized_map(losses, specs, batch)
        return _one_at_a_time(losses, per_example, "as asked for", chunk_size)
    return measured(losses, double_backward_way(losses, "as asked for", chunk_size))


def _layerwise(losses: ExampleLosses, batch: Batch, specs: Batch, precise: bool) -> Way:
    options = LayerwiseOptions(n=batch.size, precise=precise)
    repeats = check_layerwise(losses, specs, options, batch).repeats
    options = LayerwiseOptions(n=batch.size, precise=precise, repeats=repeats)
    return measured(losses, layerwise_way(losses, options, "examples do not mix"))


def _without_layerwise(
    losses: ExampleLosses, batch: Batch, specs: Batch, chunk_size: int, reason: str
) -> Way:
    """The way where "layerwise" is not exact, for a reason."""
    try:
        check_one_at_a_time(losses, specs, batch)
        error = error_of_trial(losses, batch)
    except NotExactError:
        return measured(losses, double_backward_way(losses, reason, chunk_size))
    name = "vectorized_map" if error is None else "one_by_one"
    return _one_at_a_time(losses, name, reason, chunk_size)


def _one_at_a_time(losses: ExampleLosses, name: str, reason: str, chunk_size: int) -> Way:
    """One example after the other, each run of the model a graph function."""
    rows = rows_function(losses, one_by_one if name == "one_by_one" else vectorized)
    make = functools.partial(VectorizedMap, losses, rows=rows, way=name)

    def measure(batch: Batch, loss_scale: Any) -> VectorizedMap:
        whole = chunk_size >= batch.size
        with unchanged(losses.model):
            return make(batch, loss_scale, chunk_size=None if whole else chunk_size)

    return Way(name, reason, measure)


def _examples_that_fit(losses: ExampleLosses) -> int:
    """How many examples' gradients fit in the memory that is meant for them."""
    weights = losses.weights
    entry = np.dtype(working_dtype(weights)).itemsize
    return max(1, _CHUNK_BYTES // (entry * vectors.size(weights)))


def check_measurable(model: keras.Model) -> None:
    """Raise `ValueError` where nothing that a measurement could read gives the examples' losses."""
    check_model(model)
    own = _overriding(model, "train_step")
    ways_out = (
        "Override `compute_loss(self, x, y, y_pred, sample_weight)` and let the training use it; "
        "or give DiffusionMonitor(data, losses=...) a function that returns the losses of a "
        "batch's examples, shape (N,). To train such a model by D, keras_rgd.RGD(window=32) takes "
        "it as it is; keras_rgd.per_example_gradients is for a training loop of one's own."
    )
    step = "" if own is None else f", and class {own.__name__} overrides `train_step`"
    if type(model).call is keras.Model.call:
        raise ValueError(
            f"Model '{model.name}' has no `call`{step}, so there is no output to take losses of. "
            + ways_out
        )
    no_loss = model.loss is None and type(model).compute_loss is keras.Model.compute_loss
    if own is not None and no_loss:
        raise ValueError(
            f"Model '{model.name}' is compiled without a loss{step}, which alone knows what is "
            f"minimised. {ways_out}"
        )


def _overriding(model: keras.Model, name: str) -> type | None:
    """The class of the user's that has a method of its own by this name, or `None`."""
    cls = next(c for c in type(model).__mro__ if name in vars(c))
    return None if cls.__module__.split(".")[0] in ("keras", "keras_rgd") else cls


def as_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None) -> Batch:
    """A `Batch` of tensors of the dtypes that `fit` would use, checked to be one of this model's.

    Raises:
        ValueError: nothing gives the examples' losses, or arrays are missing or of unlike lengths.
    """
    check_measurable(model)
    keras_reads_y = model.loss is not None and type(model).compute_loss is keras.Model.compute_loss
    batch = Batch.of_arrays(x, y, sample_weight)
    if y is None and keras_reads_y:
        raise ValueError(
            f"Model '{model.name}' is compiled with a loss, which needs targets. Expected (x, y). "
            "Received: y=None"
        )
    return batch


def build(model: keras.Model, x: Any) -> None:
    """Make a model's weights as its first step would; nothing is computed, and no seed goes on."""
    model(mapped(lambda a: keras.KerasTensor((None, *a.shape[1:]), a.dtype), x))
