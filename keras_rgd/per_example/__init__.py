"""Per-example gradients: the interface, the choice of a way, and one file for each way."""

import dataclasses
import functools

import keras
import tensorflow as tf

from keras_rgd import backends, vectors
from keras_rgd.arguments import check_way
from keras_rgd.per_example import checks, lanes
from keras_rgd.per_example.checks import (
    check_apart,
    check_pieces,
    first_examples,
    seed_generators,
)
from keras_rgd.per_example.compiled import compiled_way
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.interface import PerExampleGradients, working_dtype
from keras_rgd.per_example.lanes import Lanes
from keras_rgd.per_example.layerwise import Layerwise
from keras_rgd.per_example.loss import batch_size
from keras_rgd.per_example.pieces import Pieces

backends.needs_tensorflow(__name__)

# One chunk of gradients is held in memory; this is what it may take, in bytes.
_CHUNK_BYTES = 2**30

__all__ = [
    "Choice",
    "PerExampleGradients",
    "batch_size",
    "check_apart",
    "check_batch",
    "check_model",
    "check_pieces",
    "choose_way",
    "first_examples",
    "make_way",
    "measuring_way",
    "per_example_gradients",
    "seed_generators",
    "working_dtype",
]


def per_example_gradients(model, x, y=None, sample_weight=None, *, training=True):
    """The per-example gradients of one batch, for a training loop of one's own.

    One forward pass as in training: seeds and moving statistics go on. It works eagerly and
    inside a `tf.function`, and by "double_backward", so for any layer. To look at a model and
    leave it as it is use `keras_rgd.diffusion_matrix`, whose `gradients` are of the same kind.

    Args:
        model: a compiled, built `keras.Model` of any class; its loss is used, not its optimizer.
        x: inputs, axis 0 of length N; a nested structure of tensors for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        training: whether layers behave as in training. Defaults to `True`.

    Returns:
        A `PerExampleGradients`: `gradient`, `loss`, `y_pred` and the three operations `dot(v)`,
        `combine(w)` and `gram()`; what `RGD.direction` and `DiffusionMatrix` take.

    Raises:
        ValueError: the model is not compiled or not built, or its loss is not a weighted sum over
            the examples.
    """
    check_model(model)
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights. Call it on data first."
        )
    x, y, sample_weight = keras.tree.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t), (x, y, sample_weight)
    )
    return DoubleBackward(model, x, y, sample_weight, training)


def check_model(model):
    """Raise `ValueError` unless the model is a compiled `keras.Model`."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a compiled keras.Model. Received: {type(model).__name__}")
    if not model.compiled:
        raise ValueError(
            f"Model '{model.name}' is not compiled, so it has no loss. Call "
            "model.compile(optimizer, loss=...) first."
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way that a model's training steps take, and why."""

    way: str
    reason: str
    n_examples: int
    repeats: bool = False  # see `Layerwise`

    def __str__(self):
        return f"{self.way}: {self.reason}"


def choose_way(model, per_example, x, y, sample_weight, *, training, dynamic, compiled):
    """The way for a model's training steps, tried on the first batch.

    "auto" takes "layerwise" where that is exact for the model, else "double_backward", which is
    for every model. The model is left as it was.

    Args:
        model: a compiled, built model.
        per_example: one of `keras_rgd.arguments.WAYS`.
        x: the first batch's inputs.
        y: its targets.
        sample_weight: its sample weights or `None`.
        training: whether layers behave as in training.
        dynamic: whether the step is traced for batches of any size.
        compiled: whether it is compiled with XLA.

    Returns:
        A `Choice`.

    Raises:
        ValueError: the way that was asked for is not exact for this model; names the layer.
    """
    n = batch_size(x)
    if per_example == "vectorized_map":
        check_batch(model, x, y, sample_weight, training=training, compiled=compiled)
    if per_example in ("double_backward", "vectorized_map"):
        return Choice(per_example, "as asked for", n)
    try:
        if model.run_eagerly:
            raise checks.NotExactError(
                "With run_eagerly=True there is no traced step to read.",
                "Compile without it, or write per_example='double_backward' (or 'auto').",
            )
        if n == 1 and per_example == "auto":
            raise checks.NotExactError(
                "The first batch is one example, which cannot show whether examples mix.",
                "Let it have two or more.",
            )
        traced = checks.check_layerwise(model, x, y, sample_weight, training, dynamic)
    except checks.NotExactError as error:
        if per_example == "layerwise":
            raise
        return Choice("double_backward", error.reason, n)
    if traced.gram_is_cheap:
        return Choice(
            "layerwise", "examples do not mix; M_x is bounded by a Gram matrix", n, traced.repeats
        )
    reason = (
        f"examples do not mix; M_x is estimated, as at N = {n} a Gram matrix would take "
        f"{traced.gram_work:.1f} times the products of an SGD step"
    )
    return Choice("layerwise", reason, n, traced.repeats)


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
        per_example: one of `keras_rgd.arguments.WAYS` but "auto", which is for `choose_way`.
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
        state = checks.changeable(model)
        return functools.partial(Pieces, model, make, per_example, state, int(microbatch_size))
    if per_example == "double_backward":
        return functools.partial(_double_backward, model, training, chunk_size)
    if per_example == "layerwise":
        return functools.partial(_layerwise, model, training, n_examples, compiled, repeats)
    rows = lanes.rows_function(model, training, lanes.vectorized, compiled)
    return functools.partial(_lanes, model, training, chunk_size, rows, per_example)


def _double_backward(model, training, chunk_size, x, y, sample_weight=None, loss_scale=1.0):
    return DoubleBackward(model, x, y, sample_weight, training, loss_scale, chunk_size)


def _layerwise(
    model, training, n, compiled, repeats, x, y, sample_weight=None, loss_scale=1.0, precise=False
):
    options = dict(n=n, compiled=compiled, repeats=repeats, precise=precise)
    return Layerwise(model, x, y, sample_weight, training, loss_scale, **options)


def _lanes(model, training, chunk_size, rows, way, x, y, sample_weight=None, loss_scale=1.0):
    return Lanes(model, x, y, sample_weight, training, loss_scale, chunk_size, rows, way)


def check_batch(model, x, y, sample_weight, *, training, compiled=False):
    """Raise unless "vectorized_map" is exact for this model, measured on one batch.

    Raises:
        ValueError: names the layer that makes it inexact or impossible.
    """
    checks.check_exact(model, x, y, sample_weight, training)
    error = _trial_error(model, x, y, sample_weight, training, compiled)
    if error is not None:
        raise checks.not_vectorizable(model, x, training, compiled, error) from error


def _trial_error(model, x, y, sample_weight, training, compiled):
    """Run the lanes on two examples: why they cannot run, or None; they must be exact."""
    batch = checks.first_examples((x, y, sample_weight), 2)
    way = make_way(model, "vectorized_map", training=training, compiled=compiled)
    received = []

    @tf.function(jit_compile=compiled, autograph=False)
    def gradient(*batch):
        return way(*batch).gradient

    with checks.unchanged(model):
        error = checks.trial_fails(lambda: received.extend(gradient(*batch)))
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
        per_example: one of `keras_rgd.arguments.WAYS`.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, as many as fit
            in 1 GiB.
        precise: whether "layerwise" works in float64, as the Gram matrix of one batch should.
            Defaults to `True`.

    Raises:
        ValueError: the way that was asked for is not exact or not possible.
    """
    check_way(per_example, chunk_size)
    way = per_example
    if way == "auto":
        way = _measuring_choice(model, x, y, sample_weight, training, precise)
    elif way == "layerwise":
        checks.check_layerwise(model, x, y, sample_weight, training, dynamic=False, precise=precise)
    elif way == "vectorized_map":
        check_batch(model, x, y, sample_weight, training=training)
    if way == "layerwise":
        make = make_way(model, way, training=training, n_examples=batch_size(x))
        return functools.partial(compiled_way(functools.partial(make, precise=precise), way), model)
    if chunk_size is None:
        weights = [w.value for w in model.trainable_variables]
        row = working_dtype(weights).size * vectors.size(weights)
        chunk_size = max(1, _CHUNK_BYTES // row)
    if way == "double_backward":
        make = make_way(model, way, training=training, chunk_size=chunk_size)
        return functools.partial(compiled_way(make, way), model)
    mapping = lanes.one_by_one if way == "one_by_one" else lanes.vectorized
    rows = lanes.rows_function(model, training, mapping)

    def measure(x, y, sample_weight=None):
        whole = chunk_size >= batch_size(x)
        with checks.unchanged(model):
            return _lanes(
                model, training, None if whole else chunk_size, rows, way, x, y, sample_weight
            )

    return measure


def _measuring_choice(model, x, y, sample_weight, training, precise):
    try:
        if batch_size(x) > 1:
            checks.check_layerwise(
                model, x, y, sample_weight, training, dynamic=False, precise=precise
            )
            return "layerwise"
    except checks.NotExactError:
        pass
    try:
        checks.check_exact(model, x, y, sample_weight, training)
        error = _trial_error(model, x, y, sample_weight, training, compiled=False)
    except checks.NotExactError:
        return "double_backward"
    return "vectorized_map" if error is None else "one_by_one"
