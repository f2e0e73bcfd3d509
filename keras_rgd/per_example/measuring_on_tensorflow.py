"""Which way to per-example gradients is taken where D is measured, on TensorFlow."""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.double_backward import double_backward_way
from keras_rgd.per_example.gradients import examples_that_fit
from keras_rgd.per_example.layerwise import layerwise_way
from keras_rgd.per_example.layerwise.check import check_layerwise
from keras_rgd.per_example.layerwise.options import LayerwiseOptions
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.measured import measured
from keras_rgd.per_example.not_exact import NotExactError
from keras_rgd.per_example.state import unchanged
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


def choose_measuring_way(
    model: keras.Model,
    batch: Batch,
    training: bool,
    per_example: str,
    chunk_size: int | None,
    precise: bool,
) -> Way:
    """The `Way` of `measuring.way_for`, whose arguments these are."""
    losses, specs = ExampleLosses(model, training), batch.specs()
    if per_example == "layerwise":
        return _layerwise(losses, batch, specs, precise)
    if chunk_size is None:
        chunk_size = examples_that_fit(losses.weights)
    if per_example == "auto":
        try:
            return _layerwise(losses, batch, specs, precise)
        except NotExactError as error:
            return _without_layerwise(losses, batch, specs, chunk_size, error.reason)
    if per_example == "vectorized_map":
        check_vectorized_map(losses, specs, batch)
        return _one_at_a_time(losses, per_example, "as asked for", chunk_size)
    return measured(
        losses.model, losses.weights, double_backward_way(losses, "as asked for", chunk_size)
    )


def _layerwise(losses: ExampleLosses, batch: Batch, specs: Batch, precise: bool) -> Way:
    options = LayerwiseOptions(n=batch.size, precise=precise)
    repeats = check_layerwise(losses, specs, options, batch).repeats
    options = LayerwiseOptions(n=batch.size, precise=precise, repeats=repeats)
    way = layerwise_way(losses, options, "examples do not mix")
    return _measured(losses, way, "float64" if precise else None)


def _without_layerwise(
    losses: ExampleLosses, batch: Batch, specs: Batch, chunk_size: int, reason: str
) -> Way:
    """The way where "layerwise" is not exact, for a reason."""
    try:
        check_one_at_a_time(losses, specs, batch)
        error = error_of_trial(losses, batch)
    except NotExactError:
        return measured(
            losses.model, losses.weights, double_backward_way(losses, reason, chunk_size)
        )
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


def _measured(losses: ExampleLosses, way: Way, products_dtype: str | None = None) -> Way:
    return measured(losses.model, losses.weights, way, products_dtype)
