"""Whether parts of a batch give what the whole gives, by the numbers of one batch."""

import numpy as np
from keras import ops

from keras_rgd._keras.models import has_training_argument, losses_by_path
from keras_rgd._support import vectors
from keras_rgd._support.backends import ERRORS
from keras_rgd.per_example.agreement import first_unequal
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.loss_weights import has_mask
from keras_rgd.per_example.not_exact import NotExactError
from keras_rgd.per_example.state import layers_that_change_state, unchanged

# How many examples are looked at where a few will do.
FEW = 32

CHANGES = (
    "The loss of an example changes with the batch it is in ({}): a loss with reduction='sum', a "
    "masked output, whose valid steps are counted over the batch, or an add_loss that sums over "
    "it. Its gradient over all examples cannot be had from parts."
)

EXPECTED = (
    "Expected a loss with the default reduction, 'sum_over_batch_size', and no mask. "
    "Received: loss={!r}."
)


def check_parts(model, batch, gradients_of):
    """Raise `NotExactError` where two halves of a batch do not give what the whole gives.

    Args:
        model: a compiled, built model, looked at in evaluation mode.
        batch: a `Batch` of some examples, two at least.
        gradients_of: a function of a batch that returns its `PerExampleGradients`.
    """

    def forward():
        kwargs = {"training": False} if has_training_argument(model) else {}
        return model(batch.x, **kwargs)

    if layers_that_change_state(model, forward):
        # Parts would draw other random numbers than the whole: the losses' word must do.
        agree = not _is_summed(model)
    else:
        with unchanged(model):
            masked = has_mask(forward())
        # Signs, as a plain sum is nearly 0 at a minimum.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], batch.size)
        agree = not masked and _parts_agree(model, batch, signs, gradients_of)
    if not agree:
        expected = EXPECTED.format(model.loss)
        raise NotExactError(CHANGES.format("as some examples show"), expected)


def _is_summed(model):
    """Whether a model's loss is a sum over its batch, by what its losses say."""
    losses = losses_by_path(model) or []
    return any(getattr(loss, "reduction", None) == "sum" for _, loss in losses)


def _parts_agree(model, batch, signs, gradients_of):
    n = len(signs)
    half = n // 2

    def signed_sum(part, signs, count):
        """(sum_i s_i g_i over the first `count`, grad L) of a batch."""
        with unchanged(model):
            gradients = gradients_of(part)
            w = np.where(np.arange(len(signs)) < count, signs, 0)
            w = ops.convert_to_tensor(w, gradients.dtype)
            return gradients.combine(w), gradients.gradient

    whole = signed_sum(batch, signs, half)
    try:
        first = signed_sum(batch.part(0, half), signs[:half], half)
        rest = signed_sum(batch.part(half, n), signs[half:], 0)
    except ERRORS:
        if takes_any_size(model):
            raise
        # A model for one size alone, whose batches are all of that: its losses' word must do.
        return not _is_summed(model)
    if not all(bool(ops.isfinite(vectors.norm(t))) for t in (*whole, *first, *rest)):
        return True  # said by its own error, once D is formed
    means = [(half * a + (n - half) * b) / n for a, b in zip(first[1], rest[1], strict=True)]
    pairs = ((whole[0], first[0]), (whole[1], means))
    return all(first_unequal(model, a, b) is None for a, b in pairs)
