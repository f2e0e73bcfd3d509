"""Whether one example a lane is exact for a model: asked of the model, not of its layers' names.

All of it runs eagerly on one batch and leaves every variable as it was: seed generators, moving
statistics and metrics.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_rgd import vectors
from keras_rgd.per_example import lanes
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.loss import batch_size, call_model, example_losses


class NotExactError(ValueError):
    """One example a lane would not give this model's per-example gradients."""


class NotVectorizableError(ValueError):
    """`tf.vectorized_map` cannot run this model."""


def trial_fails(function, *arguments):
    """The error of a trial of `tf.vectorized_map`, or None; its pages of log are not shown."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("CRITICAL")
    try:
        function(*arguments)
    except (ValueError, TypeError, NotImplementedError, LookupError, tf.errors.OpError) as error:
        return error
    finally:
        logger.setLevel(level)
    return None


@contextlib.contextmanager
def unchanged(model):
    """Whatever runs inside, the model's seeds, moving statistics and metrics end as they began."""
    variables = _state(model)
    before = [v.numpy() for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _state(model):
    metrics = [v for metric in model.metrics for v in metric.variables]
    return model.non_trainable_variables + metrics


def check_exact(model, x, y, sample_weight, training):
    """Raise `NotExactError` unless one example a lane is exact on this batch.

    Raises:
        NotExactError: names the layer that draws random numbers or keeps a state, or whose output
            for one example depends on the other examples, or says that the loss does.
    """
    advice = (
        "per_example='vectorized_map' runs the model on one example at a time and would not give "
        "its per-example gradients. Write per_example='double_backward' (or 'auto') instead."
    )
    changed = _layers_that_change_state(model, x, training)
    if changed:
        raise NotExactError(
            f"Layer {_names(changed)} draws random numbers or updates a state in each forward "
            f"pass. {advice}"
        )
    mixing = _layer_that_mixes(model, x, training)
    if mixing is not None:
        raise NotExactError(
            f"Layer {_names([mixing])} gives an example an output that depends on the other "
            f"examples of the batch, or on random numbers. {advice}"
        )
    if _loss_mixes(model, x, y, sample_weight, training):
        raise NotExactError(
            f"The loss of one example depends on the outputs of other examples: loss={model.loss}."
            f" {advice}"
        )


def check_gradient(model, x, y, sample_weight, training, received):
    """Raise `NotExactError` unless `received`, the lanes' gradient, is the batch's gradient.

    The last word on what `check_exact` cannot see, as a `compute_loss` that uses the weights or
    the inputs itself.
    """
    with unchanged(model):
        expected = DoubleBackward(model, x, y, sample_weight, training).gradient
    error = vectors.norm(vectors.add(received, expected, -1.0))
    if error > 10 * _tolerance(model) * vectors.norm(expected):
        raise NotExactError(
            f"`{type(model).__name__}` has a loss that does not reach the weights through the "
            "model's output alone (a `compute_loss` of its own?): the mean of the per-example "
            f"gradients is {float(error):.2g} away from the batch's gradient. Write "
            "per_example='double_backward' (or 'auto') instead."
        )


def not_vectorizable(model, x, training, compiled, error):
    """The error that names the first layer which `tf.vectorized_map` cannot run, or the model."""
    for layer, arguments, _ in _calls(model, x, training):
        if not _vectorizes(layer, arguments, compiled):
            culprit = f"layer {_names([layer])}"
            break
    else:
        culprit = f"model '{model.name}'"
    under = " under XLA" if compiled else ""
    return NotVectorizableError(
        f"tf.vectorized_map cannot run {culprit}{under}, so per_example='vectorized_map' does not "
        "serve this model. Write per_example='double_backward' (or 'auto') instead. "
        f"TensorFlow's reason: {_reason(error)}"
    )


def _reason(error):
    """The telling line of TensorFlow's many, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ValueError: ")]
    return (told or lines or [type(error).__name__])[-1].removeprefix("ValueError: ")[:200]


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

    rows = lanes.vectorized(lane, None, compiled)
    run = tf.function(lambda *a: rows(list(a)), jit_compile=compiled, autograph=False)
    return trial_fails(run, *inputs) is None


def _layers_that_change_state(model, x, training):
    variables = model.non_trainable_variables
    before = [v.numpy() for v in variables]
    with unchanged(model):
        call_model(model, x, training)
        after = [v.numpy() for v in variables]
    changed = {
        v.path for v, a, b in zip(variables, before, after, strict=True) if not np.array_equal(a, b)
    }
    owners = [
        layer
        for layer in model._flatten_layers(include_self=True)
        if changed & {v.path for v in layer.non_trainable_variables}
    ]
    # A container holds its layers' variables too; the innermost owner is the one to name.
    return [a for a in owners if not any(b is not a and b in a._flatten_layers() for b in owners)]


def _layer_that_mixes(model, x, training):
    """The innermost layer whose output for example 0 changes with the other examples."""
    if not isinstance(batch_size(x), int) or batch_size(x) < 2:
        return None
    alone = keras.tree.map_structure(lambda t: tf.repeat(t[:1], batch_size(x), 0), x)
    together, apart = (_calls(model, batch, training) for batch in (x, alone))
    for (layer, _, a), (_, _, b) in zip(together, apart, strict=False):
        for s, t in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
            if _per_example(s, x) and _differ(s[0], t[0], _tolerance(model)):
                return layer
    return None


def _loss_mixes(model, x, y, sample_weight, training):
    n = batch_size(x)
    if n < 2:
        return False
    with unchanged(model):
        y_pred = call_model(model, x, training)
        u = tf.ones([n], model.trainable_weights[0].value.dtype)
        _, ours = example_losses(model, x, y, y_pred, sample_weight, u, training)
        changed = keras.tree.map_structure(lambda t: _others_replaced(t, x), y_pred)
        _, theirs = example_losses(model, x, y, changed, sample_weight, u, training)
    return bool(_differ(ours[0], theirs[0], _tolerance(model)))


def _others_replaced(tensor, x):
    if not _per_example(tensor, x):
        return tensor
    replaced = tf.concat([tensor[:1], tf.reverse(tensor[1:] * 0.5, [0])], 0)
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        replaced._keras_mask = mask
    return replaced


def _calls(model, x, training):
    """What each layer was called with and returned in one forward pass, innermost first."""
    record = []

    def observed(layer, call):
        def recording_call(*args, **kwargs):
            output = call(*args, **kwargs)
            record.append((layer, args, output))
            return output

        return recording_call

    layers = list(model._flatten_layers(include_self=False))
    for layer in layers:
        layer.__dict__["call"] = observed(layer, layer.call)
    try:
        with unchanged(model):
            call_model(model, x, training)
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
    return record


def _per_example(tensor, x):
    shape = getattr(tensor, "shape", None)
    floating = shape is not None and tf.as_dtype(tensor.dtype).is_floating
    return floating and len(shape) > 0 and shape[0] == batch_size(x)


def _differ(a, b, tolerance):
    a, b = tf.cast(a, tf.float64), tf.cast(b, tf.float64)
    size = tf.reduce_max(tf.abs(tf.stack([a, b])))
    return bool(tf.reduce_max(tf.abs(a - b)) > tolerance * size)


def _tolerance(model):
    # Rounding differs with the batch; mixing shows in the leading half of the digits.
    return float(np.sqrt(float(np.finfo(_numpy_dtype(model)).eps)))


def _numpy_dtype(model):
    dtype = model.compute_dtype
    return "float16" if dtype == "bfloat16" else dtype


def _names(layers):
    return ", ".join(f"'{layer.name}' ({type(layer).__name__})" for layer in layers)
