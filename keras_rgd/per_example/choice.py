"""Which way to per-example gradients is taken for a model, and why."""

import dataclasses
import functools

import tensorflow as tf

from keras_rgd._support.arguments import check_way
from keras_rgd.per_example import checks, vectorized_map_checks
from keras_rgd.per_example.batch import (
    batch_size,
    first_examples,
    known_size,
    specs_of,
    with_any_size,
)
from keras_rgd.per_example.measured import compiled_way
from keras_rgd.per_example.state import unchanged
from keras_rgd.per_example.vectorized_map import Lanes, one_by_one, rows_function, vectorized
from keras_rgd.per_example.way import chunk_of, make_way


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way that a model's training steps take, and why."""

    way: str
    reason: str
    n_examples: int
    repeats: int = 0  # see `Layerwise`

    def __str__(self):
        return f"{self.way}: {self.reason}"


def choose_way(
    model, per_example, specs, *, batch=None, sizes=None, training, compiled, microbatch_size=None
):
    """The way for a model's training steps.

    "auto" takes "layerwise" where that is exact for the model, else "double_backward", which is
    for every model. What is exact is read off the model's graph; with a batch it is tried as well.
    The model is left as it was.

    Args:
        model: a compiled, built model.
        per_example: one of `keras_rgd._support.arguments.WAYS`.
        specs: (x, y, sample_weight) that the step is traced for, tensors or a spec of each.
        batch: the first batch. Defaults to `None`: by the graph alone, as where a step is traced
            once more.
        sizes: a batch that says what open sizes in `specs` may be. Defaults to `None`, `batch`.
        training: whether layers behave as in training.
        compiled: whether the step is compiled with XLA.
        microbatch_size: examples that are differentiated together, or `None` for all.

    Returns:
        A `Choice`.

    Raises:
        ValueError: the way that was asked for is not exact for this model; names the layer.
    """
    sizes = batch if sizes is None else sizes
    if batch is not None and not batch_size(batch[0]):
        batch = None  # no examples show nothing
    if microbatch_size is not None:
        checks.check_pieces(model, batch, specs, sizes)
        # What is differentiated is a piece, or the rest.
        batch = None if batch is None else first_examples(batch, microbatch_size)
        specs = with_any_size(specs)
        n = microbatch_size
    else:
        n = known_size(specs[0]) or (None if sizes is None else known_size(sizes[0]))
    if per_example == "vectorized_map":
        check_lanes(model, batch, specs, training=training, compiled=compiled, sizes=sizes)
    if per_example in ("double_backward", "vectorized_map"):
        return Choice(per_example, "as asked for", n)
    try:
        if model.run_eagerly:
            raise checks.NotExactError(
                "With run_eagerly=True there is no traced step to read.",
                "Compile without it, or write per_example='double_backward' (or 'auto').",
            )
        traced = checks.check_layerwise(model, batch, specs, training, sizes=sizes, n=n)
    except checks.NotExactError as error:
        if per_example == "layerwise":
            raise
        return Choice("double_backward", error.reason, n)
    if traced.gram_is_cheap:
        reason = "examples do not mix; M_x is bounded by a Gram matrix"
    else:
        reason = (
            f"examples do not mix; M_x is estimated, as at N = {n} a Gram matrix would take "
            f"{traced.gram_work:.1f} times the products of an SGD step"
        )
    return Choice("layerwise", reason, n, traced.repeats)


def check_lanes(model, batch, specs, *, training, compiled=False, sizes=None):
    """Raise unless "vectorized_map" is exact for this model.

    Raises:
        ValueError: names the layer that makes it inexact or impossible.
    """
    checks.check_lanes(model, batch, specs, training, sizes)
    error = None if batch is None else _trial_error(model, batch, training, compiled)
    if error is not None:
        raise vectorized_map_checks.not_vectorizable(
            model, batch[0], training, compiled, error
        ) from error


def _trial_error(model, batch, training, compiled):
    """Run the lanes on two examples: why they cannot run, or None; they must be exact."""
    batch = first_examples(batch, 2)
    way = make_way(model, "vectorized_map", training=training, compiled=compiled)
    received = []

    @tf.function(jit_compile=compiled, autograph=False)
    def gradient(*batch):
        return way(*batch).gradient

    with unchanged(model):
        error = vectorized_map_checks.trial_fails(lambda: received.extend(gradient(*batch)))
    if error is None:
        checks.check_gradient(model, *batch, training, received)
    return error


def measuring_way(
    model,
    x,
    y,
    sample_weight,
    *,
    training,
    per_example="auto",
    chunk_size=None,
    precise=True,
):
    """A function (x, y, sample_weight) -> `PerExampleGradients` for use outside a graph.

    "auto" takes "layerwise" where that is exact for this model; else one example a lane where
    that is, with `tf.vectorized_map` where it can run it, or one backward pass an example
    ("one_by_one"); else "double_backward", whose Gram matrix costs N backward passes over the
    batch.

    Args:
        model: a compiled, built model.
        x: a batch on which the choice is made, and to which the function may be applied.
        y: its targets.
        sample_weight: its sample weights or `None`.
        training: whether layers behave as in training.
        per_example: one of `keras_rgd._support.arguments.WAYS`.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, as many as fit
            in 1 GiB.
        precise: whether "layerwise" works in float64, as the Gram matrix of one batch should.
            Defaults to `True`.

    Raises:
        ValueError: the way that was asked for is not exact or not possible.
    """
    check_way(per_example, chunk_size)
    batch, way, repeats = (x, y, sample_weight), per_example, 0
    if way in ("auto", "layerwise"):
        way, repeats = _layerwise_if_exact(model, batch, training, precise, asked=way)
    if way == "auto":
        way = _measuring_choice(model, batch, training)
    elif way == "vectorized_map":
        check_lanes(model, batch, specs_of(batch), training=training)
    if way == "layerwise":
        make = make_way(model, way, training=training, n_examples=batch_size(x), repeats=repeats)
        return functools.partial(compiled_way(functools.partial(make, precise=precise), way), model)
    chunk_size = chunk_of(model) if chunk_size is None else chunk_size
    if way == "double_backward":
        make = make_way(model, way, training=training, chunk_size=chunk_size)
        return functools.partial(compiled_way(make, way), model)
    mapping = one_by_one if way == "one_by_one" else vectorized
    rows = rows_function(model, training, mapping)

    def measure(x, y, sample_weight=None):
        whole = chunk_size >= batch_size(x)
        options = dict(chunk_size=None if whole else chunk_size, rows=rows, way=way)
        with unchanged(model):
            return Lanes(model, x, y, sample_weight, training, 1.0, **options)

    return measure


def _layerwise_if_exact(model, batch, training, precise, asked):
    """("layerwise", its repeats) where that is exact; else `asked`, or the refusal of it."""
    try:
        shown = checks.check_layerwise(model, batch, specs_of(batch), training, precise=precise)
        return "layerwise", shown.repeats
    except checks.NotExactError:
        if asked == "layerwise":
            raise
        return asked, 0


def _measuring_choice(model, batch, training):
    """The way where "layerwise" is not exact."""
    try:
        checks.check_lanes(model, batch, specs_of(batch), training)
        error = _trial_error(model, batch, training, compiled=False)
    except checks.NotExactError:
        return "double_backward"
    return "vectorized_map" if error is None else "one_by_one"
