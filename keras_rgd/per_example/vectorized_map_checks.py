"""Whether "vectorized_map" is exact for a model, and whether `tf.vectorized_map` can run it.

The model is left as it was: weights, seed generators, moving statistics, states and metrics.
"""

import keras
import tensorflow as tf

from keras_rgd.per_example.agreement import first_unequal
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.layer_calls import calls, named
from keras_rgd.per_example.mixing import mixing_of
from keras_rgd.per_example.not_exact import (
    NotExactError,
    gradient_differs,
    layer_mixes,
    loss_mixes,
    reason,
)
from keras_rgd.per_example.state import layers_that_change_state, unchanged
from keras_rgd.per_example.vectorized_map import VectorizedMap, quiet, rows_function, vectorized

# How many examples are looked at where a few will do.
_EXAMPLES = 32

_ADVICE = (
    "per_example='vectorized_map' runs the model on one example at a time and would not give "
    "its per-example gradients. Write per_example='double_backward' (or 'auto') instead."
)


class NotVectorizableError(ValueError):
    """`tf.vectorized_map` cannot run this model."""


def check_one_at_a_time(losses, specs, batch=None, sizes=None):
    """Raise `NotExactError` unless running one example at a time is exact for a model.

    Args:
        losses: the `ExampleLosses` of a model.
        specs: a `Batch` of specs, what the step is traced for.
        batch: a `Batch`, to see what changes in a forward pass. Defaults to `None`: the graph
            alone is asked.
        sizes: as in `check_layerwise`.

    Raises:
        NotExactError: names the layer that draws random numbers or keeps a state, or whose output
            for one example depends on the other examples, or says that the loss does.
    """
    model = losses.model
    if any(t is None for t in keras.tree.flatten(specs.x)):
        raise NotExactError("An input is None, which no example has a part of.", _ADVICE)
    if batch is not None:
        x = batch.first(_EXAMPLES).x if takes_any_size(model) else batch.x
        changed = layers_that_change_state(losses.model, lambda: losses.forward(x))
        if changed:
            raise NotExactError(
                f"Layer {named(changed)} draws random numbers or updates a state in each forward "
                f"pass.",
                _ADVICE,
            )
    mixing = mixing_of(losses, specs, batch if sizes is None else sizes)
    if mixing.random is not None:
        raise NotExactError(
            f"Layer {mixing.random.owner} draws random numbers in each forward pass.", _ADVICE
        )
    mixes = mixing.outputs or mixing.lanes
    if mixes is not None:
        raise NotExactError(layer_mixes(mixes), _ADVICE)
    if mixing.loss is not None:
        raise NotExactError(loss_mixes(model, mixing), _ADVICE)


def check_vectorized_map(losses, specs, batch=None, sizes=None, compiled=False):
    """Raise unless "vectorized_map" is exact for a model and `tf.vectorized_map` can run it.

    Args:
        losses: as in `check_one_at_a_time`, like the others.
        specs: likewise.
        batch: likewise; two of its examples are tried.
        sizes: likewise.
        compiled: whether the step is compiled with XLA. Defaults to `False`.

    Raises:
        NotExactError: as `check_one_at_a_time`.
        NotVectorizableError: names the layer that `tf.vectorized_map` cannot run.
    """
    check_one_at_a_time(losses, specs, batch, sizes)
    error = None if batch is None else error_of_trial(losses, batch, compiled)
    if error is not None:
        raise _not_vectorizable(losses, batch.x, compiled, error) from error


def error_of_trial(losses, batch, compiled=False):
    """Why `tf.vectorized_map` cannot run two examples, an exception, or `None` where it can.

    Raises:
        NotExactError: it can, and what it gives is not the gradient of the batch: the last word on
            what the graph does not show, as a `compute_loss` that uses the weights itself.
    """
    batch, received = batch.first(2), []
    rows = rows_function(losses, vectorized, compiled)

    @tf.function(jit_compile=compiled, autograph=False)
    def gradient(batch):
        return VectorizedMap(losses, batch, chunk_size=None, rows=rows).gradient

    with unchanged(losses.model):
        error = _error_of(lambda: received.extend(gradient(batch)))
    if error is not None:
        return error
    with unchanged(losses.model):
        expected = DoubleBackward(losses, batch).gradient
    wrong = first_unequal(losses.model, received, expected)
    if wrong is not None:
        raise gradient_differs(losses.model, wrong, _ADVICE)
    return None


def _error_of(function, *arguments):
    """The error of a trial of `tf.vectorized_map`, or `None`; its pages of log are not shown."""
    try:
        with quiet():
            function(*arguments)
    except (ValueError, TypeError, NotImplementedError, LookupError, tf.errors.OpError) as error:
        return error
    return None


def _not_vectorizable(losses, x, compiled, error):
    """The error that names the first layer which `tf.vectorized_map` cannot run, or the model."""

    def forward():
        with unchanged(losses.model):
            losses.forward(x)

    for call in calls(losses.model, forward):
        if not _vectorizes(call.layer, call.arguments, compiled):
            culprit = f"layer {named([call.layer])}"
            break
    else:
        culprit = f"model '{losses.model.name}'"
    under = " under XLA" if compiled else ""
    return NotVectorizableError(
        f"tf.vectorized_map cannot run {culprit}{under}, so per_example='vectorized_map' does not "
        "serve this model. Write per_example='double_backward' (or 'auto') instead. "
        f"TensorFlow's reason: {reason(error)}"
    )


def _vectorizes(layer, arguments, compiled):
    """Whether `tf.vectorized_map` runs the layer and its gradient on what it was called with."""
    weights = [w.value for w in layer.trainable_variables]
    flat = keras.tree.flatten(arguments)
    inputs = [t for t in flat if tf.is_tensor(t)]
    if not inputs:
        return True

    def lane(chunk):
        (example,) = chunk
        floating = [t for t in example if t.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            tensors = iter(example)
            called = [next(tensors)[None] if tf.is_tensor(t) else t for t in flat]
            output = layer(*keras.tree.pack_sequence_as(arguments, called))
        gradient = tape.gradient(
            output, weights + floating, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.convert_to_tensor(g) for g in gradient]

    rows = vectorized(lane, None, compiled)
    run = tf.function(lambda *a: rows(list(a)), jit_compile=compiled, autograph=False)
    return _error_of(run, *inputs) is None
