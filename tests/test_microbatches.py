"""RGD over a batch in pieces: the step of the whole batch, whatever the size of the pieces."""

import functools
import re

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from keras import layers as L
from sklearn.datasets import load_digits
from wide import swept, wide

import keras_rgd

N = 96


def digits(n=N):
    x, y = load_digits(return_X_y=True)
    return (x[:n] / 16).astype("float32"), y[:n]


def mlp(regularizer="l2"):
    keras.utils.set_random_seed(3)
    hidden = L.Dense(12, activation="relu", kernel_regularizer=regularizer)
    return keras_rgd.RGDSequential([keras.Input((64,)), hidden, L.Dense(10)])


def fitted(model, microbatch_size, *, n=N, steps=3, way="auto", xla=False, weights=None, **options):
    """(weights after some full-batch steps, the history, the optimizer)."""
    optimizer = keras_rgd.RGD(0.5, per_example=way, microbatch_size=microbatch_size, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"], jit_compile=xla)
    x, y = digits(n)
    history = model.fit(
        x, y, batch_size=n, epochs=steps, shuffle=False, verbose=0, sample_weight=weights
    )
    return reference.flatten(model.get_weights()), history.history, optimizer


def same(a, b):
    assert reference.relative_error(a, b) <= 1e-5


@functools.cache
def run(way, size, xla=False):
    """(where three weighted steps with momentum lead, the history)."""
    weights = np.linspace(0.5, 1.5, N).astype("float32")
    model = mlp()
    start = reference.flatten(model.get_weights())
    after, history, _ = fitted(model, size, way=way, xla=xla, weights=weights, momentum=0.5)
    return after - start, history


SIZES = [
    ("layerwise", 40, False),  # leaves a rest
    ("layerwise", N // 4, True),
    ("layerwise", N // 4, False),
    ("layerwise", N // 24, False),
    ("double_backward", 40, False),
    ("vectorized_map", 40, False),
]


@pytest.mark.parametrize("way, size, xla", swept(SIZES, SIZES[:1]))
def test_pieces_of_any_size_take_the_same_steps(way, size, xla):
    one, history = run(way, N)
    assert np.linalg.norm(one) > 0.01
    moved, other = run(way, size, xla)
    same(moved, one)
    for key in history:
        np.testing.assert_allclose(other[key], history[key], rtol=1e-4)


@functools.cache
def in_pieces():
    """A model with one step in pieces traced, and a function that sets it back to its start."""
    model = mlp()
    model.compile(keras_rgd.RGD(0.5, microbatch_size=40), cases.CROSSENTROPY())
    restart = steps.restarting(model)
    one_epoch(model)
    return model, restart


def one_epoch(model):
    model.fit(*digits(), batch_size=N, shuffle=False, verbose=0)


def test_the_step_is_that_of_a_dense_D():
    (trained, restart), model = in_pieces(), mlp()
    x, y = digits()
    restart()
    one_epoch(trained)
    after, optimizer = reference.flatten(trained.get_weights()), trained.optimizer
    with steps.floatx("float64"):
        twin = mlp()
        for a, b in zip(twin.variables, model.variables, strict=True):
            a.assign(b.numpy())
        twin.compile("sgd", cases.CROSSENTROPY())
        dense = reference.traced(twin)(x.astype(float), y)
    before = reference.flatten(model.get_weights())
    epsilon = float(optimizer.chosen_epsilon)
    same(after, before - 0.5 * dense.direction(epsilon))
    # Twice the regularizer is in v, not in D.
    assert np.linalg.norm(dense.v - dense.G.mean(0)) > 0.01
    assert 1.0 <= float(optimizer.lambda_max) / dense.lambda_max <= 1.5 + 1e-5
    np.testing.assert_allclose(epsilon * float(optimizer.lambda_max), 0.5, rtol=1e-5)
    error = float(optimizer.step_weak_field_error)
    assert error >= 0.999 * dense.error_on_step(epsilon)


def test_the_largest_eigenvalue_is_found_from_step_to_step():
    model, restart = in_pieces()
    restart()
    one_epoch(model)
    for _ in range(5):
        true = keras_rgd.diffusion_matrix(model, *digits()).top_eigenvalue()
        one_epoch(model)
        assert 1.0 <= float(model.optimizer.lambda_max) / true <= 1.5 + 1e-4


def test_equal_gradients_make_it_gradient_descent():
    x, y = np.ones((12, 4), "float32"), np.ones(12, "float32")

    def after(optimizer):
        keras.utils.set_random_seed(0)
        model = keras_rgd.RGDSequential([keras.Input((4,)), L.Dense(3), L.Dense(1)])
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=12, epochs=3, verbose=0)
        return reference.flatten(model.get_weights())

    same(after(keras_rgd.RGD(0.1, microbatch_size=5)), after(keras.optimizers.SGD(0.1)))


def test_a_scaled_loss_scales_the_direction():
    """One traced step for every scale: the loss's factor is a variable."""
    model, factor = mlp(regularizer=None), tf.Variable(1.0)

    def scaled(y, p):
        return factor * keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)

    optimizer = keras_rgd.RGD(1.0, microbatch_size=16)
    model.compile(optimizer, scaled)
    restart, directions = steps.restarting(model), []
    for scale in (1.0, 1e-12, 1e12):
        restart()
        factor.assign(scale)
        optimizer.learning_rate = 1 / scale
        directions.append(steps.moved(model, lambda: model.train_on_batch(*digits(60))))
    for direction in directions[1:]:
        same(direction, directions[0])


def dropout(seed=5):
    keras.utils.set_random_seed(seed)
    return keras_rgd.RGDSequential(
        [keras.Input((64,)), L.Dense(12, activation="relu"), L.Dropout(0.5), L.Dense(10)]
    )


def test_every_pass_draws_the_masks_of_the_first():
    rule = keras_rgd.epsilon.Fixed(1e-3)
    whole, in_pieces = dropout(), dropout()
    a, _, _ = fitted(whole, None, epsilon=rule)
    b, _, _ = fitted(in_pieces, N, epsilon=rule)
    same(b, a)
    for s, t in zip(whole.non_trainable_variables, in_pieces.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(s.numpy(), t.numpy())
    # In pieces each draws its own, so many an epoch as there are pieces.
    c, _, _ = fitted(dropout(), N // 4, epsilon=rule)
    assert np.all(np.isfinite(c)) and reference.relative_error(c, a) > 1e-4


@wide
def test_several_outputs_and_their_losses_are_counted_once():
    def build():
        keras.utils.set_random_seed(0)
        x = keras.Input((64,))
        h = L.Dense(8, activation="tanh")(x)
        return keras_rgd.RGDModel(x, {"p": L.Dense(10, name="p")(h), "q": L.Dense(1, name="q")(h)})

    x, y = digits(90)
    targets = {"p": y, "q": (y % 2).astype("float32")}
    logs = []
    for size in (90, 20):
        model = build()
        model.compile(
            keras_rgd.RGD(0.1, microbatch_size=size),
            loss={"p": cases.CROSSENTROPY(), "q": "mse"},
            metrics={"p": "accuracy"},
        )
        fit = dict(batch_size=90, epochs=2, shuffle=False, verbose=0)
        logs.append(model.fit(x, targets, **fit).history)
    assert {"loss", "p_loss", "q_loss", "p_accuracy"} <= set(logs[0])
    for key in logs[0]:
        np.testing.assert_allclose(logs[1][key], logs[0][key], rtol=1e-4)


def test_a_saved_model_goes_on_where_it_stopped(tmp_path):
    model, restart = in_pieces()
    restart()
    one_epoch(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.microbatch_size == 40
    after = []
    for each in (model, loaded):
        for _ in range(3):
            one_epoch(each)
        after.append(reference.flatten(each.get_weights()))
    np.testing.assert_array_equal(*after)


# refusals


def refused(model, message, loss=None, size=20):
    x, y = digits(60)
    model.compile(keras_rgd.RGD(0.1, microbatch_size=size), loss or cases.CROSSENTROPY())
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, batch_size=60, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_layer_that_mixes_examples_is_refused_by_name():
    model = keras_rgd.RGDSequential(
        [keras.Input((64,)), L.Dense(5), L.BatchNormalization(name="mixes"), L.Dense(10)]
    )
    for size in (1, 20, 60):  # a later batch may be larger than the first
        refused(model, "Layer 'mixes' .BatchNormalization.*Write microbatch_size=None", size=size)


def test_a_loss_that_changes_with_the_batch_is_refused():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    refused(mlp(), "changes with the batch", loss)


class SumsOverTheBatch(L.Layer):
    def call(self, x):
        self.add_loss(1e-3 * keras.ops.sum(x**2))
        return x


def test_an_added_loss_that_sums_over_the_batch_is_refused():
    layers = [keras.Input((64,)), L.Dense(5), SumsOverTheBatch(), L.Dense(10)]
    refused(keras_rgd.RGDSequential(layers), "an add_loss that sums over it")


def test_a_weight_that_a_forward_pass_changes_is_refused():
    normalized = L.SpectralNormalization(L.Dense(5), name="normalized")
    layers = [keras.Input((64,)), normalized, L.Dense(10)]
    refused(keras_rgd.RGDSequential(layers), "'normalized'.*changes a trainable weight")


def test_a_last_batch_may_be_smaller_than_a_piece():
    def after(size, xla=False):
        keras.utils.set_random_seed(3)
        model = keras_rgd.RGDSequential([keras.Input((64,)), L.Dense(10)])
        optimizer = keras_rgd.RGD(0.1, keras_rgd.epsilon.Fixed(0.1), microbatch_size=size)
        model.compile(optimizer, cases.CROSSENTROPY(), jit_compile=xla)
        x, y = digits(115)
        model.fit(x, y, batch_size=85, shuffle=False, verbose=0)
        return reference.flatten(model.get_weights())

    same(after(40, xla=True), after(None))


@pytest.mark.parametrize("size", [0, -5, 2.5, True, "all"])
def test_a_size_that_is_no_count_is_refused(size):
    with pytest.raises(ValueError, match="`microbatch_size` must be a positive integer, or None"):
        keras_rgd.RGD(0.1, microbatch_size=size)


def one_step(model, x, y):
    return model.train_step((x, y))


@wide
def test_memory_is_that_of_a_piece():
    """By the largest array of the compiled step, which no machine's noise enters."""
    images, labels = digits(300)
    batch = tf.constant(images.reshape(-1, 8, 8, 1)), tf.constant(labels)
    model = keras_rgd.RGDSequential(
        [keras.Input((8, 8, 1)), L.Conv2D(32, 3, activation="relu"), L.Flatten(), L.Dense(10)]
    )
    model.compile(keras_rgd.RGD(0.1, microbatch_size=10), cases.CROSSENTROPY())
    model.train_on_batch(*batch)
    step = tf.function(functools.partial(one_step, model), jit_compile=True)
    program = step.experimental_get_compiler_ir(*batch)(stage="hlo")
    shapes = re.findall(r"f32\[([\d,]+)\]", program)
    sizes = {np.prod([int(s) for s in shape.split(",")]) for shape in shapes}
    activations = 6 * 6 * 32
    assert 10 * activations in sizes  # those of a piece
    assert max(sizes) < 300 * activations / 10
