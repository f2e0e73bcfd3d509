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

# One step of each case by each way (see steps.py). Always: one of each form that "layerwise" has,
# of each kind of loss and model, and of what each way refuses; zoos hold the other layers.
LAYERWISE = ["dense", "einsum_dense_prelu", "conv2d", "conv3d", "depthwise_conv2d"]
LAYERWISE += ["conv1d_groups", "conv2d_groups"]
LAYERWISE += ["conv2d_transpose", "conv3d_transpose", "batch_normalization", "layer_normalization"]
LAYERWISE += ["dropout", "embedding", "embedding_mask_loss", "transformer", "lstm"]
LAYERWISE += ["shared_layer", "two_inputs_two_outputs", "dictionaries", "sample_weight"]
LAYERWISE += ["regularizers", "frozen_layer", "loss_over_time_n_is_t", "own_compute_loss"]
BACKWARD = ["batch_normalization", "lstm", "sample_weight", "loss_over_time_n_is_t"]
BACKWARD += ["own_compute_loss"]
VECTORIZED = ["batch_normalization", "depthwise_conv2d", "transformer", "simple_rnn"]
VECTORIZED += ["dense", "conv2d", "embedding_mask_loss", "frozen_layer", "own_compute_loss"]

STEPS = [(name, way) for name in BY_NAME for way in WAYS]
ALWAYS = [(name, "layerwise") for name in LAYERWISE]
ALWAYS += [(name, "double_backward") for name in BACKWARD]
ALWAYS += [(name, "vectorized_map") for name in VECTORIZED]
