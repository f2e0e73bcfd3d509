"""Whether a way is exact for a model: asked of its graph, and of numbers where a graph is silent.

The model is left as it was: weights, seed generators, moving statistics, states and metrics.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd.per_example.batch import (
    batch_size,
    first_examples,
    known_size,
    specs_of,
    takes_any_size,
)
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.layer_calls import class_name, named
from keras_rgd.per_example.layerwise import trial
from keras_rgd.per_example.layerwise.trial import first_unequal
from keras_rgd.per_example.layerwise.uses import NotVisibleError
from keras_rgd.per_example.losses import call_model, compiled_losses, what_losses_read
from keras_rgd.per_example.mixing.mixing import mixing_of
from keras_rgd.per_example.state import state_of, unchanged

# How many examples are looked at where a few will do.
_EXAMPLES = 32

# For how many a trial step is taken.
_FEW = 16

_ADVICE = (
    "per_example='vectorized_map' runs the model on one example at a time and would not give "
    "its per-example gradients. Write per_example='double_backward' (or 'auto') instead."
)

_LAYERWISE_ADVICE = (
    "per_example='layerwise' reads each example's gradient off one backward pass over the batch. "
    "Write per_example='double_backward' (or 'auto') instead."
)

_PIECES_ADVICE = (
    "So a batch in pieces would be another than the whole batch. Write microbatch_size=None."
)


class NotExactError(ValueError):
    """A way would not give this model's per-example gradients.

    Args:
        reason: why.
        advice: what to write instead.
    """

    def __init__(self, reason, advice):
        super().__init__(f"{reason} {advice}")
        self.reason = reason


def check_layerwise(model, batch, specs, training, *, sizes=None, n=None, precise=False):
    """Raise `NotExactError` unless "layerwise" is exact for a model.

    Args:
        model: a compiled, built model.
        batch: (x, y, sample_weight) for the trial, or `None` for the graph alone.
        specs: what the step is traced for, of the same structure.
        training: whether layers behave as in training.
        sizes: a batch that says what open sizes in `specs` may be. Defaults to `None`, `batch`.
        n: N, to count work by where `specs` leaves it open. Defaults to `None`, that of `sizes`.
        precise: as in `Layerwise`. Defaults to `False`.

    Returns:
        A `trial.Traced`.

    Raises:
        NotExactError: names the layer that mixes examples or hides what it does with its weights.
    """
    sizes = batch if sizes is None else sizes
    n = known_size(sizes[0]) if n is None else n
    mixing = mixing_of(model, specs, training, sizes)
    if mixing.outputs is not None:
        raise NotExactError(_mixes(mixing.outputs), _LAYERWISE_ADVICE)
    if mixing.loss is not None or mixing.beside is not None:
        raise NotExactError(_loss_mixes(model, mixing), _LAYERWISE_ADVICE)
    if mixing.rows is not None:
        raise NotExactError(
            f"Layer {mixing.rows.owner} has examples along another axis than 0, or not one after "
            f"the other, where they meet a weight (in {mixing.rows.operation}).",
            _LAYERWISE_ADVICE,
        )
    wrong = None
    try:
        if batch is None:
            shown = trial.traced(model, specs, training, n, precise)
        else:
            if known_size(specs[0]) is None and takes_any_size(model):
                batch = first_examples(batch, _FEW)
            wrong, shown = trial.tried(model, batch, specs, training, n, precise)
    except trial.NotApartError as error:
        raise NotExactError(f"For this batch {error}.", _LAYERWISE_ADVICE) from error
    except NotVisibleError as error:
        variable = model.trainable_variables[error.weight]
        owner = [a for a in model._flatten_layers() if any(v is variable for v in a.variables)][-1]
        raise NotExactError(
            f"Layer {named([owner])} uses its weight '{variable.path}' in {error}, where "
            f"per-example gradients cannot be read off.",
            _LAYERWISE_ADVICE,
        ) from error
    if wrong is None:
        return shown
    raise NotExactError(
        f"The gradient of {wrong} is not what the uses of the weights that can be seen give.",
        _LAYERWISE_ADVICE,
    )


def _loss_mixes(model, mixing):
    if mixing.loss is not None:
        depends = "depends" if mixing.loss.known else "may depend"
        return (
            f"The loss of one example {depends} on the outputs of other examples (by "
            f"{mixing.loss.operation}): loss={model.loss}."
        )
    return (
        f"The loss reaches {mixing.beside} by another way than the model's output: "
        f"loss={model.loss}."
    )


def check_lanes(model, batch, specs, training, sizes=None):
    """Raise `NotExactError` unless one example a lane is exact for a model.

    Args:
        model: a compiled, built model.
        batch: (x, y, sample_weight) to see what changes in a pass, or `None` for the graph alone.
        specs: what the step is traced for, of the same structure.
        training: whether layers behave as in training.
        sizes: as in `check_layerwise`.

    Raises:
        NotExactError: names the layer that draws random numbers or keeps a state, or whose output
            for one example depends on the other examples, or says that the loss does.
    """
    if any(t is None for t in keras.tree.flatten(specs[0])):
        raise NotExactError("An input is None, which no example has a part of.", _ADVICE)
    if batch is not None:
        x = first_examples(batch[0], _EXAMPLES) if takes_any_size(model) else batch[0]
        changed = _layers_that_change_state(model, x, training)
        if changed:
            raise NotExactError(
                f"Layer {named(changed)} draws random numbers or updates a state in each forward "
                f"pass.",
                _ADVICE,
            )
    mixing = mixing_of(model, specs, training, batch if sizes is None else sizes)
    if mixing.random is not None:
        raise NotExactError(
            f"Layer {mixing.random.owner} draws random numbers in each forward pass.", _ADVICE
        )
    mixes = mixing.outputs or mixing.lanes
    if mixes is not None:
        raise NotExactError(_mixes(mixes), _ADVICE)
    if mixing.loss is not None:
        raise NotExactError(_loss_mixes(model, mixing), _ADVICE)


def check_pieces(model, batch, specs, sizes=None):
    """Raise `NotExactError` where a training batch in pieces is another than the whole batch.

    Args:
        model: a compiled, built model.
        batch: some examples, (x, y, sample_weight), or `None` for the graph alone.
        specs: what the step is traced for, of the same structure.
        sizes: as in `check_layerwise`.

    Raises:
        NotExactError: names the layer that mixes examples or changes a weight in its forward pass;
            or the loss.
    """
    mixing = mixing_of(model, specs, True, batch if sizes is None else sizes)
    mixes = mixing.outputs or _if_known(mixing.lanes)
    if mixes is not None:
        raise NotExactError(_mixes(mixes), _PIECES_ADVICE)
    if mixing.loss is not None:
        raise NotExactError(_loss_mixes(model, mixing), _PIECES_ADVICE)
    if _if_known(mixing.batch) is not None:
        raise _changes(model, mixing)
    if batch is None or batch_size(batch[0]) < 2:
        return
    if takes_any_size(model):
        batch = first_examples(batch, _EXAMPLES)
    weights = {id(v) for v in model.trainable_variables}
    changed = _layers_that_change_state(model, batch[0], True, lambda v: id(v) in weights)
    if changed:
        outer = [a for a in model.layers if any(b in a._flatten_layers() for b in changed)]
        raise NotExactError(
            f"Layer {named(outer or changed)} changes a trainable weight in each forward pass.",
            _PIECES_ADVICE,
        )
    check_apart(model, *batch)


def _if_known(spot):
    """What is known to come from the whole batch; of the rest numbers decide."""
    return spot if spot is not None and spot.known else None


def _changes(model, mixing):
    where = f"by {mixing.batch.operation} of {mixing.batch.owner}"
    return NotExactError(_CHANGES.format(where), _EXPECTED.format(model.loss))


_CHANGES = (
    "The loss of an example changes with the batch it is in ({}): a loss with reduction='sum', a "
    "masked output, whose valid steps are counted over the batch, or an add_loss that sums over "
    "it. Its gradient over all examples cannot be had from parts."
)

_EXPECTED = (
    "Expected a loss with the default reduction, 'sum_over_batch_size', and no mask. "
    "Received: loss={!r}."
)


def check_apart(model, x, y, sample_weight):
    """Raise `NotExactError` where the loss of an example is another in a smaller batch.

    Asked in evaluation mode, where layers mix no examples.

    Args:
        model: a compiled, built model.
        x: some examples' inputs, two at least.
        y: their targets.
        sample_weight: their sample weights or `None`.

    Raises:
        NotExactError: says which kinds of loss are so.
    """
    batch = (x, y, sample_weight)
    if takes_any_size(model):
        batch = first_examples(batch, _EXAMPLES)
    mixing = mixing_of(model, specs_of(batch), False)
    if _if_known(mixing.batch) is not None:
        raise _changes(model, mixing)
    n = batch_size(batch[0])
    half = n // 2
    if _layers_that_change_state(model, batch[0], False):
        # Parts would draw other random numbers than the whole: the losses' word must do.
        agree = not _is_summed(model)
    else:
        # Signs, as a plain sum is nearly 0 at a minimum.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
        whole, masked = _signed_sum(model, batch, signs, half)
        agree = not masked and _parts_agree(model, batch, signs, whole)
    if not agree:
        raise NotExactError(_CHANGES.format("as some examples show"), _EXPECTED.format(model.loss))


def _is_summed(model):
    """Whether a model's loss is a sum over its batch, by what its losses say."""
    return any(getattr(loss, "reduction", None) == "sum" for loss in compiled_losses(model))


def _parts_agree(model, batch, signs, whole):
    """Whether the two halves of a batch give what `_signed_sum` gave for the whole."""
    n = len(signs)
    half = n // 2
    try:
        first, _ = _signed_sum(model, _examples(batch, 0, half), signs[:half], half)
        rest, _ = _signed_sum(model, _examples(batch, half, n), signs[half:], 0)
    except (ValueError, tf.errors.OpError):
        if takes_any_size(model):
            raise
        # A model for one size alone, whose batches are all of that: its losses' word must do.
        return not _is_summed(model)
    if not all(bool(tf.math.is_finite(vectors.norm(t))) for t in (*whole, *first, *rest)):
        return True  # said by its own error, once D is formed
    means = [(half * a + (n - half) * b) / n for a, b in zip(first[1], rest[1], strict=True)]
    unequal = (first_unequal(model, a, b) for a, b in ((whole[0], first[0]), (whole[1], means)))
    return all(name is None for name in unequal)


def _signed_sum(model, batch, signs, count):
    """(sum_i s_i g_i over the first `count`, grad L) of a batch; whether an output has a mask."""
    with unchanged(model):
        gradients = DoubleBackward(model, *batch, training=False)
        w = np.where(np.arange(len(signs)) < count, signs, 0)
        sums = gradients.combine(tf.constant(w, gradients.dtype)), gradients.gradient
    outputs = what_losses_read(gradients.y_pred)
    return sums, any(getattr(t, "_keras_mask", None) is not None for t in outputs)


def _examples(tree, start, end):
    return keras.tree.map_structure(lambda t: None if t is None else t[start:end], tree)


def _layers_that_change_state(model, x, training, concerns=lambda variable: True):
    variables = [v for v in state_of(model) if concerns(v)]
    before = [v.numpy() for v in variables]
    with unchanged(model):
        call_model(model, x, training)
        after = [v.numpy() for v in variables]
    changed = {
        id(v) for v, a, b in zip(variables, before, after, strict=True) if not np.array_equal(a, b)
    }
    owners = [
        layer
        for layer in model._flatten_layers(include_self=True)
        if changed & {id(v) for v in _own_state(layer)}
    ]
    # A container holds its layers' variables too; the innermost owner is the one to name.
    return [a for a in owners if not any(b is not a and b in a._flatten_layers() for b in owners)]


def _own_state(layer):
    return layer.variables + keras.tree.flatten(getattr(layer, "states", []))


def _mixes(spot):
    gives = "gives" if spot.known else "may give"
    return (
        f"Layer {spot.owner} {gives} an example an output that depends on the other examples of "
        f"the batch (by {spot.operation})."
    )


def check_gradient(model, x, y, sample_weight, training, received):
    """Raise `NotExactError` unless `received`, the lanes' gradient, is the batch's gradient.

    The last word on what `check_exact` cannot see, as a `compute_loss` that uses the weights or
    the inputs itself.
    """
    with unchanged(model):
        expected = DoubleBackward(model, x, y, sample_weight, training).gradient
    wrong = first_unequal(model, received, expected)
    if wrong is not None:
        raise NotExactError(
            f"`{class_name(model)}` has a loss that does not reach the weights through the "
            "model's output alone (a `compute_loss` of its own?): the mean of the per-example "
            f"gradients of {wrong} is not the batch's gradient.",
            _ADVICE,
        )
