"""Which way to per-example gradients is taken in the training steps of a model, and why."""

from __future__ import annotations

import dataclasses

from keras_rgd._support.arguments import check_way_is_here
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.double_backward import double_backward_way
from keras_rgd.per_example.layerwise import layerwise_way
from keras_rgd.per_example.layerwise.check import check_layerwise
from keras_rgd.per_example.layerwise.options import LayerwiseOptions
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.microbatches import in_microbatches
from keras_rgd.per_example.not_exact import NotExactError
from keras_rgd.per_example.smaller_batches import check_microbatches
from keras_rgd.per_example.traces import with_any_size
from keras_rgd.per_example.vectorized_map import vectorized_map_way
from keras_rgd.per_example.vectorized_map_checks import check_vectorized_map
from keras_rgd.per_example.way import Wanted, Way


def choose_way(
    losses: ExampleLosses,
    wanted: Wanted,
    specs: Batch,
    batch: Batch | None = None,
    sizes: Batch | None = None,
) -> Way:
    """The `Way` for a model's training steps.

    "auto" takes "layerwise" where that is exact for the model, else "double_backward", which is
    for every model. What is exact is read off the model's graph; with a batch it is tried as well.
    The model is left as it was.

    Args:
        losses: the `ExampleLosses` of a compiled, built model.
        wanted: a `Wanted`.
        specs: a `Batch` of what the step is traced for, tensors or a spec of each.
        batch: the first `Batch`. Defaults to `None`: by the graph alone, as where a step is traced
            once more.
        sizes: a batch that says what open sizes in `specs` may be. Defaults to `None`, `batch`.

    Raises:
        ValueError: the way that was asked for is not exact for this model; names the layer.
    """
    check_way_is_here(wanted.per_example)
    sizes = batch if sizes is None else sizes
    if batch is not None and not batch.size:
        batch = None  # no examples show nothing
    if wanted.microbatch_size is None:
        return _way(losses, wanted, specs, batch, sizes)
    check_microbatches(losses, specs, batch, sizes)
    # What is differentiated is a piece, or the rest.
    size = wanted.microbatch_size
    batch = None if batch is None else batch.first(size)
    way = _way(losses, wanted, with_any_size(specs), batch, sizes, n=size)
    return in_microbatches(losses, way, size)


def _way(
    losses: ExampleLosses,
    wanted: Wanted,
    specs: Batch,
    batch: Batch | None,
    sizes: Batch | None,
    n: int | None = None,
) -> Way:
    """As `choose_way`, for batches that are taken whole; N where `specs` leaves it open."""
    n = n or specs.known_size or (None if sizes is None else sizes.known_size)
    if wanted.per_example == "vectorized_map":
        check_vectorized_map(losses, specs, batch, sizes, wanted.compiled)
        return vectorized_map_way(losses, "as asked for", wanted.chunk_size, wanted.compiled)
    if wanted.per_example == "double_backward":
        return double_backward_way(losses, "as asked for", wanted.chunk_size)
    try:
        return _layerwise(losses, wanted, specs, batch, sizes, n)
    except NotExactError as error:
        if wanted.per_example == "layerwise":
            raise
        return double_backward_way(losses, error.reason, wanted.chunk_size)


def _layerwise(
    losses: ExampleLosses,
    wanted: Wanted,
    specs: Batch,
    batch: Batch | None,
    sizes: Batch | None,
    n: int | None,
) -> Way:
    if losses.model.run_eagerly:
        raise NotExactError(
            "With run_eagerly=True there is no traced step to read.",
            "Compile without it, or write per_example='double_backward' (or 'auto').",
        )
    options = LayerwiseOptions(n=n or LayerwiseOptions.n)
    shown = check_layerwise(losses, specs, options, batch, sizes)
    if shown.gram_is_cheap:
        reason = "examples do not mix; M_x is bounded by a Gram matrix"
    else:
        reason = (
            f"examples do not mix; M_x is estimated, as at N = {n} a Gram matrix would take "
            f"{shown.gram_work:.1f} times the products of an SGD step"
        )
    options = dataclasses.replace(options, compiled=wanted.compiled, repeats=shown.repeats)
    return layerwise_way(losses, options, reason)
