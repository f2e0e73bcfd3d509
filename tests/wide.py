"""Sweeps over many layers, losses or sizes: a few of their members run always, all in a second run.

`python -m pytest` runs the few, one of each kind; `python -m pytest -m wide` runs the others.
"""

import pytest
from cases import BY_NAME

wide = pytest.mark.wide


def swept(values, always):
    """Values for `pytest.mark.parametrize`, of which all but those in `always` are wide.

    Args:
        values: the members of the sweep.
        always: those that run always, or their names.
    """
    left = [a for a in always if a not in values and a not in map(str, values)]
    assert not left, f"not among the members of the sweep: {left}"
    return [v if v in always or str(v) in always else _param(v) for v in values]


def _param(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=wide)


WAYS = ("layerwise", "double_backward", "vectorized_map")

# One step of each case by each way (see steps.py). Always: "layerwise" for each case that is not
# much like others; "double_backward" where "auto" takes it, and for one of each kind of loss and
# model, as zoos hold the layers; of "vectorized_map" what it refuses, which costs little, and one
# of each kind that it serves.
BACKWARD = ["batch_normalization", "batch_normalization_conv", "embedding_mask_lstm", "lstm"]
BACKWARD += ["simple_rnn", "sample_weight", "loss_over_time_n_is_t", "frozen_layer", "subclassed"]
BACKWARD += ["own_compute_loss"]
LIKE_OTHERS = ["depthwise_conv1d", "separable_conv1d", "conv1d_transpose", "loss_over_time"]
LIKE_OTHERS += ["weighted_examples_over_time", "gru", "bidirectional"]
LIKE_OTHERS += ["lstm_dropout", "lstm_unrolled", "small_sigmoid", "nested_model"]
VECTORIZED = ["batch_normalization", "conv3d", "depthwise_conv2d", "separable_conv1d", "dropout"]
VECTORIZED += ["spatial_dropout", "lstm_dropout", "transformer", "own_compute_loss"]
VECTORIZED += ["dense", "conv2d", "embedding_mask_loss", "layer_normalization", "simple_rnn"]
VECTORIZED += ["regularizers", "loss_over_time_n_is_t", "frozen_layer", "subclassed"]

STEPS = [(name, way) for name in BY_NAME for way in WAYS]
ALWAYS = [(name, "layerwise") for name in BY_NAME if name not in LIKE_OTHERS]
ALWAYS += [(name, "double_backward") for name in BACKWARD]
ALWAYS += [(name, "vectorized_map") for name in VECTORIZED]
