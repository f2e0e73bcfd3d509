"""What makes per-example gradients in a training step, one function for each way."""

import functools

from keras_rgd._support import vectors
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.layerwise.layerwise import Layerwise
from keras_rgd.per_example.microbatches import Pieces
from keras_rgd.per_example.state import changeable
from keras_rgd.per_example.vectorized_map import Lanes, rows_function, vectorized

# One chunk of gradients is held in memory; this is what it may take, in bytes.
_CHUNK_BYTES = 2**30


def chunk_of(model):
    """How many examples' gradients fit in the memory that is meant for them."""
    weights = [w.value for w in model.trainable_variables]
    return max(1, _CHUNK_BYTES // (working_dtype(weights).size * vectors.size(weights)))


def make_way(
    model,
    per_example,
    *,
    training,
    chunk_size=None,
    compiled=False,
    n_examples=64,
    repeats=True,
    microbatch_size=None,
):
    """A function (x, y, sample_weight, loss_scale) -> `PerExampleGradients` for a training step.

    Args:
        model: a compiled, built model.
        per_example: one of `arguments.WAYS` but "auto", which is for `choose_way`.
        training: whether layers behave as in training.
        chunk_size: examples whose gradients "vectorized_map" holds at once.
        compiled: whether the caller compiles what it traces with XLA.
        n_examples: N, to count work by where the trace does not know it.
        repeats: as `Choice.repeats`.
        microbatch_size: examples differentiated together, so that a batch is taken in pieces.
            Defaults to `None`, the whole batch.
    """
    if microbatch_size is not None:
        make = make_way(
            model,
            per_example,
            training=training,
            chunk_size=chunk_size,
            compiled=compiled,
            n_examples=n_examples,
            repeats=repeats,
        )
        state = changeable(model)
        return functools.partial(Pieces, model, make, per_example, state, int(microbatch_size))
    if per_example == "double_backward":
        return functools.partial(_double_backward, model, training, chunk_size)
    if per_example == "layerwise":
        return functools.partial(_layerwise, model, training, n_examples, compiled, repeats)
    return functools.partial(_lanes, model, training, chunk_size, compiled)


def _double_backward(model, training, chunk_size, x, y, sample_weight=None, loss_scale=1.0):
    return DoubleBackward(model, x, y, sample_weight, training, loss_scale, chunk_size)


def _layerwise(
    model, training, n, compiled, repeats, x, y, sample_weight=None, loss_scale=1.0, precise=False
):
    options = dict(n=n, compiled=compiled, repeats=repeats, precise=precise)
    return Layerwise(model, x, y, sample_weight, training, loss_scale, **options)


def _lanes(model, training, chunk_size, compiled, x, y, sample_weight=None, loss_scale=1.0):
    # Made in each trace, as other weights may be trained than in the one before.
    rows, way = rows_function(model, training, vectorized, compiled), "vectorized_map"
    return Lanes(model, x, y, sample_weight, training, loss_scale, chunk_size, rows, way)
