"""Whether the loss of an example is the same in a smaller batch, so that parts give the whole.

For `microbatch_size`, and for passes over a data set. The model is left as it was.
"""

import functools

from keras_rgd._keras.models import layers_of
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.layer_calls import named
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.mixing import mixing_of
from keras_rgd.per_example.not_exact import NotExactError, layer_mixes, loss_mixes
from keras_rgd.per_example.parts import CHANGES, EXPECTED, FEW, check_parts
from keras_rgd.per_example.state import layers_that_change_state

_ADVICE = "So a batch in pieces would be another than the whole batch. Write microbatch_size=None."


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
        batch = batch.first(FEW)
    weights = {id(v) for v in model.trainable_variables}
    changed = layers_that_change_state(
        model, lambda: losses.forward(batch.x), lambda v: id(v) in weights
    )
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
        batch = batch.first(FEW)

    def ask():
        losses = ExampleLosses(model, training=False)
        mixing = mixing_of(losses, batch.specs())
        if _if_known(mixing.batch) is not None:
            raise _changes(model, mixing)
        check_parts(model, batch, functools.partial(_gradients, model))
        asked.append(mixing)
        return mixing

    mixing = remembered(model, (check_smaller_batches, batch.signature), ask)
    if mixing.batch is not None and not asked:
        check_parts(model, batch, functools.partial(_gradients, model))


def _if_known(spot):
    """What is known to come from the whole batch; of the rest numbers decide."""
    return spot if spot is not None and spot.known else None


def _changes(model, mixing):
    where = f"by {mixing.batch.operation} of {mixing.batch.owner}"
    return NotExactError(CHANGES.format(where), EXPECTED.format(model.loss))


def _gradients(model, batch):
    return DoubleBackward(ExampleLosses(model, training=False), batch)
