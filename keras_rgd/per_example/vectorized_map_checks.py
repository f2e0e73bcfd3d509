"""Whether `tf.vectorized_map` can run a model, and which layer it cannot."""

import functools

import keras
import tensorflow as tf

from keras_rgd.per_example import vectorized_map
from keras_rgd.per_example.layer_calls import calls, named
from keras_rgd.per_example.layerwise.trial import reason
from keras_rgd.per_example.losses import call_model
from keras_rgd.per_example.state import unchanged


class NotVectorizableError(ValueError):
    """`tf.vectorized_map` cannot run this model."""


def trial_fails(function, *arguments):
    """The error of a trial of `tf.vectorized_map`, or None; its pages of log are not shown."""
    try:
        with vectorized_map.quiet():
            function(*arguments)
    except (ValueError, TypeError, NotImplementedError, LookupError, tf.errors.OpError) as error:
        return error
    return None


def not_vectorizable(model, x, training, compiled, error):
    """The error that names the first layer which `tf.vectorized_map` cannot run, or the model."""
    for call in calls(model, functools.partial(_call, model, x, training)):
        if not _vectorizes(call.layer, call.arguments, compiled):
            culprit = f"layer {named([call.layer])}"
            break
    else:
        culprit = f"model '{model.name}'"
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

    rows = vectorized_map.vectorized(lane, None, compiled)
    run = tf.function(lambda *a: rows(list(a)), jit_compile=compiled, autograph=False)
    return trial_fails(run, *inputs) is None


def _call(model, x, training):
    with unchanged(model):
        call_model(model, x, training)
