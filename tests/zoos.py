"""Cases side by side in one model, whose per-example gradients are those of each case in a row.

A step that is compiled by XLA costs most of its time once for a model, so that a few models with
many layers show what one model for each layer would.
"""

import dataclasses

import keras
import numpy as np
import reference
import steps
from cases import BY_NAME

import keras_rgd

ZOOS = {
    "images": (
        "conv2d",
        "conv3d",
        "conv2d_groups",
        "depthwise_conv2d",
        "separable_conv1d",
        "conv1d_transpose",
        "conv3d_transpose",
        "pooling",
        "group_normalization",
        "loss_over_pixels",
    ),
    "sequences": (
        "conv1d",
        "einsum_dense_prelu",
        "layer_normalization",
        "embedding_mask_loss",
        "transformer",
        "lstm_unrolled",
        "time_distributed",
        "dropout",
        "spatial_dropout",
    ),
    "losses": (
        "softmax",
        "shared_layer",
        "two_inputs_two_outputs",
        "dictionaries",
        "class_weight",
        "add_loss",
        "regularizers",
        "activity_regularizer",
        "weights_over_time",
    ),
    # Two of them: XLA needs much memory for the second derivatives of loops.
    "recurrent": ("batch_normalization_conv", "embedding_mask_lstm", "simple_rnn"),
    "recurrent and random": ("lstm_dropout", "bidirectional"),  # with the programs
    "few": ("conv2d", "embedding_mask_loss", "two_inputs_two_outputs", "weights_over_time"),
    "kinds": (
        "conv2d",
        "embedding_mask_loss",
        "multi_head_attention",
        "two_inputs_two_outputs",
        "class_weight",
        "regularizers",
        "weights_over_time",
    ),
}


@dataclasses.dataclass(frozen=True)
class ZooStep:
    """One step of a zoo, of learning rate 1: what it took off each case's weights."""

    directions: dict  # of each case, the arrays of its weights
    epsilon: float
    way: str


def step(names, way, dtype, jit_compile=True):
    """The `ZooStep` of some cases."""
    members = {name: steps.build(BY_NAME[name], dtype) for name in names}
    optimizer = keras_rgd.RGD(1.0, per_example=way)
    with steps.floatx(dtype):
        model = _side_by_side(members)
        x, y, weights, options = _arguments(names)
        model.compile(optimizer, jit_compile=jit_compile, **options)
        before = {name: _values(member) for name, member in members.items()}
        model.train_on_batch(*steps.cast((x, y, weights), dtype))
    directions = {
        name: [a - b for a, b in zip(before[name], _values(member), strict=True)]
        for name, member in members.items()
    }
    return ZooStep(directions, float(optimizer.chosen_epsilon), optimizer.per_example_choice.name)


def oracle(names, dtype, jit_compile=True):
    """`reference.Dense` of the cases in a row, and the shapes of each one's weights."""
    mode = "xla" if jit_compile else "graph"
    alone = [steps.oracle(name, mode, dtype) for name in names]
    return reference.Dense(
        np.concatenate([dense.G for dense in alone], axis=1),
        np.concatenate([dense.v for dense in alone]),
    )


def assert_equals_dense_D(zoo, way, dtype, jit_compile=True):
    """The direction of each case's weights, of which the message names the wrong ones."""
    names = ZOOS[zoo]
    taken = step(names, way, dtype, jit_compile)
    dense = oracle(names, dtype, jit_compile)
    assert taken.way == way
    assert 0.3 <= taken.epsilon * np.linalg.eigvalsh(dense.K)[-1] < 1
    centred = dense.G - dense.G.mean(0)
    expected = dense.v - taken.epsilon * centred.T @ (centred @ dense.v) / len(centred)
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    wrong, start = {}, 0
    for name, arrays in taken.directions.items():
        end = start + sum(a.size for a in arrays)
        size = np.linalg.norm(expected[start:end])
        # The term with D is seen.
        assert np.linalg.norm(dense.v[start:end] - expected[start:end]) > 10 * tolerance * size
        for i, received in enumerate(arrays):
            error = np.linalg.norm(received.ravel() - expected[start : start + received.size])
            if not error <= tolerance * size:
                wrong[f"{name}, weight {i} {received.shape}"] = error / size
            start += received.size
    assert start == len(expected)
    assert not wrong


def _values(model):
    return [w.numpy().astype("float64") for w in model.trainable_variables]


def _side_by_side(members):
    inputs, outputs = {}, {}
    for name, member in members.items():
        arrays = _labelled(name, BY_NAME[name].batch()[0])
        given = {
            label: keras.Input(
                a.shape[1:], dtype="int32" if a.dtype.kind == "i" else None, name=label
            )
            for label, a in arrays.items()
        }
        inputs |= given
        outputs |= _labelled(name, member(_as_given(name, given)))
    return keras_rgd.RGDModel(inputs, outputs)


def _as_given(name, labelled):
    """The inputs of one case in the structure that it has alone."""
    x = BY_NAME[name].batch()[0]
    if isinstance(x, dict):
        return {key: labelled[f"{name}.{key}"] for key in x}
    return list(labelled.values()) if isinstance(x, list) else labelled[name]


def _labelled(name, tree):
    """A case's tensors in a flat dictionary."""
    if isinstance(tree, dict):
        return {f"{name}.{key}": value for key, value in tree.items()}
    if isinstance(tree, list):
        return {f"{name}.{i}": value for i, value in enumerate(tree)}
    return {name: tree}


def _arguments(names):
    """(x, y, sample weights, what `compile` gets) of some cases, each a flat dictionary."""
    x, y, weights, losses, loss_weights = {}, {}, {}, {}, {}
    for name in names:
        case = BY_NAME[name]
        given, targets, sample_weight = case.batch()
        targets = _labelled(name, targets)
        x |= _labelled(name, given)
        y |= targets
        losses |= {k: f() if callable(f) else f for k, f in _labelled(name, case.loss).items()}
        loss_weights |= dict.fromkeys(targets, 1.0) | (
            {} if case.loss_weights is None else _labelled(name, case.loss_weights)
        )
        shapes = _labelled(name, case.loss_shape)
        ones = {k: np.ones((len(a), *shapes[k]), "float32") for k, a in targets.items()}
        weights |= ones if sample_weight is None else _labelled(name, sample_weight)
    return x, y, weights, {"loss": losses, "loss_weights": loss_weights}
