"""Whether the loss of an example is the same in a smaller batch, so that parts give the whole.

For `microbatch_size`, and for passes over a data set. The model is left as it was.
"""

import numpy as np
import tensorflow as tf

from keras_rgd._keras.models import layers_of
from keras_rgd._support import vectors
from keras_rgd.per_example.agreement import first_unequal
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.layer_calls import named
from keras_rgd.per_example.losses import ExampleLosses, has_mask
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.mixing import mixing_of
from keras_rgd.per_example.not_exact import NotExactError, layer_mixes, loss_mixes
from keras_rgd.per_example.state import layers_that_change_state, unchanged
from keras_rgd.per_example.traces import specs_of

# How many examples are looked at where a few will do.
_EXAMPLES = 32

_ADVICE = "So a batch in pieces would be another than the whole batch. Write microbatch_size=None."

_CHANGES = (
    "The loss of an example changes with the batch it is in ({}): a loss with reduction='sum', a "
    "masked output, whose valid steps are counted over the batch, or an add_loss that sums over "
    "it. Its gradient over all examples cannot be had from parts."
)

_EXPECTED = (
    "Expected a loss with the default reduction, 'sum_over_batch_size', and no mask. "
    "Received: loss={!r}."
)


def check_microbatches(losses, specs, batch=None, sizes=None):
    """Raise `NotExactError` where a training batch in pieces is another than the whole batch.

    Args:
        losses: the `ExampleLosses` of a model in training mode.
        specs: a `Batch` of specs, what the step is traced for.
        batch: a `Batch` of some examples. Defaults to `None`: the graph alone is asked.
        sizes: as in `check_layerwise`.

    Raises:
        NotExactError: names the layer that mixes examples or changes a weight in its forward pass;
            or the loss.
    """
    model = losses.model
    mixing = mixing_of(losses, specs, batch if sizes is None else sizes)
    mixes = mixing.outputs or _if_known(mixing.lanes)
    if mixes is not None:
        raise NotExactError(layer_mixes(mixes), _ADVICE)
    if mixing.loss is not None:
        raise NotExactError(loss_mixes(model, mixing), _ADVICE)
    if _if_known(mixing.batch) is not None:
        raise _changes(model, mixing)
    if batch is None or batch.size < 2:
        return
    if takes_any_size(model):
        batch = batch.first(_EXAMPLES)
    weights = {id(v) for v in model.trainable_variables}
    changed = layers_that_change_state(losses, batch.x, lambda v: id(v) in weights)
    if changed:
        outer = [a for a in model.layers if any(b in layers_of(a) for b in changed)]
        raise NotExactError(
            f"Layer {named(outer or changed)} changes a trainable weight in each forward pass.",
            _ADVICE,
        )
    check_smaller_batches(model, batch)


def check_smaller_batches(model, batch):
    """Raise `NotExactError` where the loss of an example is another in a smaller batch.

    What the graph shows is remembered for the model; where that leaves it open, numbers are asked
    of each data set.

    Args:
        model: a compiled, built model, looked at in evaluation mode, where layers mix no examples.
        batch: a `Batch` of some examples, two at least.

    Raises:
        NotExactError: says which kinds of loss are so.
    """
    asked = []
    if takes_any_size(model):
        batch = batch.first(_EXAMPLES)

    def ask():
        losses = ExampleLosses(model, training=False)
        mixing = mixing_of(losses, specs_of(batch))
        if _if_known(mixing.batch) is not None:
            raise _changes(model, mixing)
        _check_numbers(losses, batch)
        asked.append(mixing)
        return mixing

    mixing = remembered(model, (check_smaller_batches, batch.signature), ask)
    if mixing.batch is not None and not asked:
        _check_numbers(ExampleLosses(model, training=False), batch)


def _check_numbers(losses, batch):
    """Raise `NotExactError` where two halves of a batch do not give what the whole gives."""
    if layers_that_change_state(losses, batch.x):
        # Parts would draw other random numbers than the whole: the losses' word must do.
        agree = not _is_summed(losses)
    else:
        # Signs, as a plain sum is nearly 0 at a minimum.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], batch.size)
        whole, masked = _signed_sum(losses, batch, signs, batch.size // 2)
        agree = not masked and _parts_agree(losses, batch, signs, whole)
    if not agree:
        expected = _EXPECTED.format(losses.model.loss)
        raise NotExactError(_CHANGES.format("as some examples show"), expected)


def _if_known(spot):
    """What is known to come from the whole batch; of the rest numbers decide."""
    return spot if spot is not None and spot.known else None


def _changes(model, mixing):
    where = f"by {mixing.batch.operation} of {mixing.batch.owner}"
    return NotExactError(_CHANGES.format(where), _EXPECTED.format(model.loss))


def _is_summed(losses):
    """Whether a model's loss is a sum over its batch, by what its losses say."""
    return any(getattr(loss, "reduction", None) == "sum" for loss in losses.compiled_losses())


def _parts_agree(losses, batch, signs, whole):
    """Whether the two halves of a batch give what `_signed_sum` gave for the whole."""
    n = len(signs)
    half = n // 2
    try:
        first, _ = _signed_sum(losses, batch.part(0, half), signs[:half], half)
        rest, _ = _signed_sum(losses, batch.part(half, n), signs[half:], 0)
    except (ValueError, tf.errors.OpError):
        if takes_any_size(losses.model):
            raise
        # A model for one size alone, whose batches are all of that: its losses' word must do.
        return not _is_summed(losses)
    if not all(bool(tf.math.is_finite(vectors.norm(t))) for t in (*whole, *first, *rest)):
        return True  # said by its own error, once D is formed
    means = [(half * a + (n - half) * b) / n for a, b in zip(first[1], rest[1], strict=True)]
    pairs = ((whole[0], first[0]), (whole[1], means))
    return all(first_unequal(losses.model, a, b) is None for a, b in pairs)


def _signed_sum(losses, batch, signs, count):
    """(sum_i s_i g_i over the first `count`, grad L) of a batch; whether an output has a mask."""
    with unchanged(losses.model):
        gradients = DoubleBackward(losses, batch)
        w = np.where(np.arange(len(signs)) < count, signs, 0)
        sums = gradients.combine(tf.constant(w, gradients.dtype)), gradients.gradient
    return sums, has_mask(gradients.y_pred)
