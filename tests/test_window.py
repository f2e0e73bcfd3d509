"""RGD with a window on TensorFlow: strategies, XLA, and models of every kind.

What does not depend on the backend is in `any_backend/test_window_anywhere.py`.
"""

import functools

import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from wide import swept

import keras_rgd


def gradient(model, x, y):
    """v of the batch as a step of `fit` sees it, float64 (d,)."""
    with reference.unchanged(model), tf.GradientTape() as tape:
        y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred)
    weights = [v.value for v in model.trainable_variables]
    zero = tf.UnconnectedGradients.ZERO
    return reference.flatten(tape.gradient(loss, weights, unconnected_gradients=zero))


KINDS = (
    "conv2d",
    "batch_normalization",
    "embedding_mask_loss",
    "lstm",
    "two_inputs_two_outputs",
    "regularizers",
    "own_compute_loss",
)


UNDER_XLA = ("conv2d", "lstm", "two_inputs_two_outputs")


@pytest.mark.parametrize("name", swept(KINDS, ["conv2d", "batch_normalization", "regularizers"]))
def test_models_of_any_kind_step_along_the_direction_of_an_explicit_D(name):
    case = BY_NAME[name]
    for mode in steps.MODES if name in UNDER_XLA else ("graph",):
        model = steps.build(case)
        optimizer = keras_rgd.RGD(0.1, window=3, batch_size=4)
        case.compile(model, optimizer, jit_compile=mode == "xla")
        rng, seen = np.random.default_rng(0), []
        for _ in range(5):
            x, y = case.data(rng)
            seen.append(gradient(model, x, y))
            step = steps.moved(model, functools.partial(model.train_on_batch, x, y)) / 0.1
            V = np.array(seen[-3:])
            centred = (V - V.mean(0)) * np.sqrt(4 / max(len(V) - 1, 1))
            epsilon = float(optimizer.chosen_epsilon)
            expected = V[-1] - epsilon * (centred.T @ (centred @ V[-1]))
            assert reference.relative_error(step, expected) < 1e-4
            assert epsilon * np.linalg.norm(centred, 2) ** 2 < 1


@pytest.mark.parametrize("known", ["rank", "nothing"])
def test_gradients_of_unknown_static_shape_take_the_step_of_known_ones(known):
    shapes = [(4, 3), (3,), (90, 100)]
    rng = np.random.default_rng(0)
    given = [[rng.normal(size=s).astype("float32") for s in shapes] for _ in range(4)]
    results = []
    for spec in (
        [tf.TensorSpec(s) for s in shapes],
        [tf.TensorSpec([None] * len(s) if known == "rank" else None) for s in shapes],
    ):
        weights = [keras.Variable(np.zeros(s)) for s in shapes]
        optimizer = keras_rgd.RGD(1.0, window=3)
        optimizer.build(weights)
        apply = tf.function(lambda *g: optimizer.apply(g, weights), input_signature=spec)  # noqa: B023
        for gradients in given:
            apply(*gradients)
        results.append(reference.flatten(weights))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)


def test_dense_over_a_time_axis_trains_where_the_batch_size_is_open():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 6, 5)).astype("float32"), rng.normal(size=(9, 1)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6, 5)),
            keras.layers.Dense(4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras_rgd.RGD(0.1, window=3)
    model.compile(optimizer, "mse")
    seen = []
    for _ in range(4):
        seen.append(gradient(model, x, y))
        before = reference.flatten(model.trainable_variables)
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(9), shuffle=False, verbose=0)
        step = (before - reference.flatten(model.trainable_variables)) / 0.1
        V = np.array(seen[-3:])
        centred = (V - V.mean(0)) / np.sqrt(max(len(V) - 1, 1))
        expected = V[-1] - float(optimizer.chosen_epsilon) * (centred.T @ (centred @ V[-1]))
        assert reference.relative_error(step, expected) < 1e-4


def test_an_rgd_model_with_a_window_is_its_parent():
    x, y = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")
    histories = []
    for Model in (keras.Sequential, keras_rgd.RGDSequential):
        keras.utils.set_random_seed(0)
        model = Model([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras_rgd.RGD(0.1, window=2), "mse")
        histories.append(model.fit(x, y, batch_size=2, epochs=3, verbose=0).history)
    assert histories[0] == histories[1]


def test_an_ordinary_model_is_told_of_the_window():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras_rgd.RGD(0.1), "mse")
    with pytest.raises(ValueError, match=r"keras_rgd.RGD\(learning_rate, window=32\)"):
        model.fit(np.ones((2, 3)), np.ones((2, 1)), verbose=0)


def test_a_tensorflow_dtype_is_taken_by_its_name():
    optimizer = keras_rgd.RGD(window=4, window_dtype=tf.bfloat16)
    optimizer.build([keras.Variable(np.zeros(3))])
    assert optimizer.window_dtype == "bfloat16"
    assert optimizer._window.rows[0].dtype == "bfloat16"


def test_a_list_of_gradients_has_no_direction():
    weights = [keras.Variable(np.zeros(3))]
    optimizer = keras_rgd.RGD()
    optimizer.build(weights)
    with pytest.raises(ValueError, match=r"per_example_gradients\(model, x, y\).*Received: list"):
        optimizer.direction([tf.ones(3)])


def test_without_a_window_there_is_no_D_to_show():
    with pytest.raises(ValueError, match=r"Expected RGD\(window=W\)"):
        keras_rgd.RGD().diffusion_matrix()


def test_double_precision_is_exact(float64):
    weights = [keras.Variable(np.zeros((3, 2))), keras.Variable(np.zeros(4))]
    optimizer = keras_rgd.RGD(1.0, window=3)
    optimizer.build(weights)
    rng, seen = np.random.default_rng(0), []
    for _ in range(6):
        given = [1 + 1e-3 * rng.normal(size=w.shape) for w in weights]
        for w in weights:
            w.assign(np.zeros(w.shape))
        optimizer.apply([tf.constant(g) for g in given], weights)
        seen.append(reference.flatten(given))
        centred = np.array(seen[-3:]) - np.mean(seen[-3:], 0)
        D = centred.T @ centred / max(len(centred) - 1, 1)
        expected = seen[-1] - float(optimizer.chosen_epsilon) * D @ seen[-1]
        assert reference.relative_error(-reference.flatten(weights), expected) < 1e-11
