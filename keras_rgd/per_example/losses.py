"""The losses f_i of the examples, from the model's own public `compute_loss`.

Everything here follows from one definition (see `PerExampleGradients`): the loss of example i is
how much the batch's loss changes with that example's weight.
"""

import inspect

import keras
import tensorflow as tf

from keras_rgd.per_example.layer_calls import class_name


def call_model(model, x, training):
    """The model's output; `training` only where its `call` takes it, as Keras does."""
    if model._call_has_training_arg:
        return model(x, training=training)
    return model(x)


def what_losses_read(y_pred):
    """The tensors of a model's output that a loss may read, a flat list.

    Keras lets a softmax or a sigmoid carry its logits, and its losses then read those instead.
    """
    outputs = [t for t in keras.tree.flatten(y_pred) if t.dtype.is_floating]
    return outputs + [t._keras_logits for t in outputs if hasattr(t, "_keras_logits")]


def replaced(y_pred, function):
    """A model's output with `function` applied to each floating tensor that a loss may read.

    What Keras hangs on a tensor, its logits and its mask, comes along.
    """

    def one(tensor):
        if not tf.is_tensor(tensor) or not tensor.dtype.is_floating:
            return tensor
        new = function(tensor)
        if hasattr(tensor, "_keras_logits"):
            new._keras_logits = function(tensor._keras_logits)
        mask = getattr(tensor, "_keras_mask", None)
        if mask is not None:
            new._keras_mask = mask
        return new

    return keras.tree.map_structure(one, y_pred)


def example_losses(model, x, y, y_pred, sample_weight, u, training):
    """L(u) and its derivatives by the weights u of the examples.

    Args:
        model: a compiled model.
        x: the batch's inputs.
        y: the batch's targets.
        y_pred: the model's output for `x`, already computed.
        sample_weight: the user's sample weights (class weights included) or `None`.
        u: ones of shape (N,).
        training: passed to `compute_loss`.

    Returns:
        `(loss, derivatives)`: a scalar, and dL/du = f / N of shape (N,); tapes that are open
        see both.

    Raises:
        ValueError: where the loss gives no f_i: it is one scalar for the whole batch, ignores the
            sample weights, is not linear in them, or is not reduced to a scalar.
    """
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as linearity:
        linearity.watch(u)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(u)
            weights = _weights(model, x, y, y_pred, sample_weight, u, training)
            loss = compute_loss(model, x, y, y_pred, weights, training)
            if loss.shape == (0,):
                loss = tf.reduce_sum(loss)  # Keras does not reduce the values of no examples
        if loss.shape.rank != 0:
            raise ValueError(
                "The loss must be reduced to a scalar over the batch. Expected a loss with "
                "reduction='sum_over_batch_size' (the default) or 'sum'. "
                f"Received: a loss of shape {tuple(loss.shape)} (reduction=None?)."
            )
        derivatives = tape.gradient(loss, u)
    if derivatives is None:
        raise ValueError(
            "The loss does not depend on the sample weights, so it has no per-example losses: "
            f"`{class_name(model)}.compute_loss` must use its `sample_weight` argument, and "
            "the model must be compiled with a `loss` (`add_loss` alone gives one number for the "
            "whole batch)."
        )
    # No path from dL/du back to u: L is linear in u, for every batch.
    if linearity.gradient(derivatives, u) is not None:
        raise ValueError(
            "The loss is not linear in the sample weights, so it is not a sum of per-example "
            "losses. Expected a loss with reduction='sum_over_batch_size' or 'sum' and a "
            f"`compute_loss` linear in `sample_weight`. Received: loss={model.loss}."
        )
    return loss, derivatives


def compute_loss(model, x, y, y_pred, sample_weight, training):
    """What `model.compute_loss` returns, a tensor."""
    # `training` came to compute_loss in Keras 3.3; models written before do not take it.
    arguments = dict(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = training
    return tf.convert_to_tensor(model.compute_loss(**arguments))


def _weights(model, x, y, y_pred, sample_weight, u, training):
    """U times the user's weights, for each loss in the rank of that loss's values.

    A loss over time has values (N, T): weights of shape (N,) would not broadcast, or at N = T
    would weight the timesteps.
    """
    ranks = _loss_ranks(model, x, y, y_pred, training)
    if not ranks:
        # A `compute_loss` of the user's own: weights as the user gives them.
        given = u if sample_weight is None else sample_weight
        return keras.tree.map_structure(lambda s: u if s is u else _times(u, s, 1), given)
    if list(ranks) == [()]:
        return _times(u, sample_weight, ranks[()])
    nested = {}
    for path, rank in ranks.items():
        user = sample_weight
        if user is not None and keras.tree.is_nested(user):
            for key in path:
                user = user[key]
        place = nested
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = _times(u, user, rank)
    return nested


def _times(u, user, rank):
    if user is not None:
        user = tf.convert_to_tensor(user)
        rank = max(rank, user.shape.rank)
        user = tf.cast(tf.reshape(user, _expanded(user, rank)), u.dtype)
    u = tf.reshape(u, _expanded(u, rank))
    return u if user is None else u * user


def _expanded(tensor, rank):
    shape = [s if s is not None else tf.shape(tensor)[i] for i, s in enumerate(tensor.shape)]
    return shape + [1] * (rank - tensor.shape.rank)


def _loss_ranks(model, x, y, y_pred, training):
    """The rank of each compiled loss's values, by its path in the model's output.

    The losses are asked themselves, in a graph that is never run, so no metric moves.
    """
    ranks = {}
    if model._compile_loss is None:
        return ranks
    trace = _tracer(model, x, y, y_pred, training)
    if not model._compile_loss.built:
        trace()
    if not model._compile_loss.built:
        return ranks  # a `compute_loss` of the user's own that never asks the compiled losses
    losses = compiled_losses(model)
    calls = []
    for loss in losses:
        _check_reduction(loss)
        loss.call = _recording(loss, calls)
    try:
        trace()
    finally:
        for loss in losses:
            loss.__dict__.pop("call", None)
    # One loss object may serve several outputs, so it is the order of the calls that tells.
    for path, loss, _, _ in model._compile_loss._flat_losses:
        first = next((i for i, (called, _) in enumerate(calls) if called is loss), None)
        if first is not None:
            path = tuple(path)
            ranks[path] = max(ranks.get(path, 0), calls.pop(first)[1])
    return ranks


def compiled_losses(model):
    """The losses that a model was compiled with, once `compute_loss` has built them."""
    return [loss for _, loss, _, _ in getattr(model._compile_loss, "_flat_losses", None) or []]


def _recording(loss, calls):
    def recording_call(y_true, y_pred):
        values = type(loss).call(loss, y_true, y_pred)
        _check_values(loss, values)
        calls.append((loss, len(values.shape)))
        return values

    return recording_call


def _tracer(model, x, y, y_pred, training):
    arguments = (x, y, y_pred)
    flat = keras.tree.flatten(arguments)
    specs = [tf.type_spec_from_value(t) for t in flat if t is not None]

    def compute(*tensors):
        tensors = iter(tensors)
        packed = [None if t is None else next(tensors) for t in flat]
        packed = keras.tree.pack_sequence_as(arguments, packed)
        return compute_loss(model, *packed, None, training)

    def trace():
        tf.function(compute, autograph=False).get_concrete_function(*specs)

    return trace


def _check_reduction(loss):
    if getattr(loss, "reduction", None) == "mean_with_sample_weight":
        raise ValueError(
            "reduction='mean_with_sample_weight' divides by the sum of the sample weights, so the "
            "loss is not a sum of per-example losses. Expected reduction='sum_over_batch_size'. "
            f"Received: loss '{loss.name}' with reduction='mean_with_sample_weight'."
        )


def _check_values(loss, values):
    if len(values.shape) == 0:
        raise ValueError(
            "A loss must return one value for each example, shape (N, ...); one scalar for the "
            "batch makes all examples' losses equal and the diffusion matrix zero. "
            f"Received: loss '{loss.name}' with values of shape (). Drop the mean over the batch "
            "axis in it; Keras takes that mean."
        )
