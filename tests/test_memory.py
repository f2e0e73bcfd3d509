"""What was traced for a model is remembered, and forgotten where the model is another."""

import gc
import weakref

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import layers as L
from wide import swept

import keras_rgd
from keras_rgd.per_example import memory

N, D, CLASSES = 6, 4, 3


class Counted(L.Dense):
    """A dense layer that counts how often it is traced or run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0

    def call(self, inputs):
        self.calls += 1
        return super().call(inputs)


def data(n=N, d=D):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype("float32"), rng.integers(0, CLASSES, n)


def model_of(*layers, loss="sparse_categorical_crossentropy", d=D):
    layers = layers or (Counted(5, activation="tanh"), L.Dense(CLASSES, activation="softmax"))
    model = keras.Sequential([keras.Input((d,)), *layers])
    model.compile("sgd", loss)
    return model


def gram(model, x, y, **options):
    return keras_rgd.diffusion_matrix(model, x, y, **options).centered_gram()


def expected(model, x, y, training=False):
    """K from gradients that were had one example at a time."""
    G = reference.eager(model, x, y, training=training).G
    G = G - G.mean(0)
    return G @ G.T / len(G)


def assert_right(model, x, y, training=False, **options):
    given = gram(model, x, y, training=training, **options)
    right = expected(model, x, y, training)
    np.testing.assert_allclose(given, right, atol=2e-5 * np.abs(right).max())


WAYS = ["auto", "double_backward", "vectorized_map"]


# "vectorized_map" runs the model once on the batch, uncompiled.
@pytest.mark.parametrize("way, runs", [("auto", 0), ("double_backward", 0), ("vectorized_map", 1)])
def test_a_second_measurement_traces_nothing(way, runs):
    model, (x, y) = model_of(), data()
    first = gram(model, x, y, per_example=way)
    calls = model.layers[0].calls
    np.testing.assert_array_equal(gram(model, x, y, per_example=way), first)
    assert model.layers[0].calls == calls + runs


def test_a_second_spectrum_traces_nothing():
    model, (x, y) = model_of(), data(20)
    options = dict(batch_size=8, verbose=False)
    first = keras_rgd.spectrum(model, (x, y), **options).eigenvalues
    calls = model.layers[0].calls
    np.testing.assert_array_equal(keras_rgd.spectrum(model, (x, y), **options).eigenvalues, first)
    assert model.layers[0].calls == calls


@pytest.mark.parametrize("way", WAYS)
def test_other_values_of_the_weights_give_another_matrix(way):
    model, (x, y) = model_of(), data()
    gram(model, x, y, per_example=way)
    for weight in model.trainable_variables:
        weight.assign(0.5 * weight + 0.1)
    assert_right(model, x, y, per_example=way)


@pytest.mark.parametrize("way", swept(WAYS, WAYS[:1]))
def test_other_shapes_give_another_matrix(way):
    model = model_of()
    for n in (N, N + 3, 2, N):
        assert_right(model, *data(n), per_example=way)


def test_layers_that_are_frozen_and_thawed():
    model, (x, y) = model_of(), data()
    for trainable in (True, False, True):
        model.layers[0].trainable = trainable
        assert_right(model, x, y)
        d = keras_rgd.diffusion_matrix(model, x, y).n_weights
        assert d == sum(np.prod(w.shape) for w in model.trainable_variables)


def test_a_layer_without_weights_that_is_frozen_and_thawed():
    """Frozen it does not mix the examples; no weight shows whether it is."""
    norm = L.BatchNormalization(center=False, scale=False)
    model = model_of(L.Dense(5), norm, L.Dense(CLASSES, activation="softmax"))
    x, y = data()
    for trainable in (False, True, False):
        norm.trainable = trainable
        assert_right(model, x, y, training=True)


def test_another_loss():
    model, (x, y) = model_of(), data()
    assert_right(model, x, y)
    model.compile("sgd", "mse")
    assert_right(model, x, np.eye(CLASSES, dtype="float32")[y])


def test_layers_that_are_added_and_popped():
    model, (x, y) = model_of(), data()
    assert_right(model, x, y)
    model.add(L.Dense(CLASSES, activation="softmax"))
    model.compile("sgd", model.loss)
    assert_right(model, x, y)
    model.pop()
    model.compile("sgd", model.loss)
    assert_right(model, x, y)


def test_layers_that_are_added_without_compiling_anew():
    model, (x, y) = model_of(), data()
    assert_right(model, x, y)
    model.add(L.Dense(CLASSES, activation="softmax"))
    assert_right(model, x, y)


def test_another_dtype_policy():
    model, (x, y) = model_of(), data()
    plain = gram(model, x, y)
    model.layers[0].dtype_policy = "mixed_bfloat16"
    rounded = gram(model, x, y)
    error = reference.relative_error(rounded, plain)
    assert 1e-5 < error < 0.1


def test_what_python_attributes_say_is_seen_once_forgotten():
    model, (x, y) = model_of(), data()
    gram(model, x, y)
    model.layers[0].activation = keras.activations.relu
    keras_rgd.forget(model)
    assert_right(model, x, y)
    keras_rgd.forget(model)
    keras_rgd.forget(model)  # also where nothing is remembered


def test_seeds_and_moving_statistics_stay_where_they_are():
    layers = (L.Dense(5), L.BatchNormalization(), L.Dropout(0.5), L.Dense(CLASSES))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, (x, y) = model_of(*layers, loss=loss), data()
    before = [v.numpy() for v in model.variables]
    first, second = (gram(model, x, y, training=True) for _ in range(2))
    # Sums of several threads may differ in the last digit; another mask would in the first.
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-7)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_a_model_that_was_measured_is_collected():
    def measured():
        model, (x, y) = model_of(), data()
        for way in WAYS:
            gram(model, x, y, per_example=way)
        return weakref.ref(model)

    model = measured()
    gc.collect()
    assert model() is None


def test_what_is_remembered_is_not_saved(tmp_path):
    model, (x, y) = model_of(L.Dense(CLASSES, activation="softmax")), data()
    before = gram(model, x, y)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        gram(keras.models.load_model(tmp_path / "model.keras"), x, y), before
    )


def test_no_more_is_kept_than_a_few_shapes_of_data(monkeypatch):
    monkeypatch.setattr(memory, "_MOST", 2)
    model = model_of(L.Dense(CLASSES, activation="softmax"))
    for n in range(2, 6):
        gram(model, *data(n), per_example="double_backward")
    (kept,) = [v for k, v in vars(model).items() if "memory" in k]
    assert len(kept._made) == 2


def test_a_loss_that_sums_over_the_batch_is_refused_also_where_it_is_remembered():
    model, (x, y) = model_of(), data(20)
    keras_rgd.spectrum(model, (x, y), batch_size=8, verbose=False)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(reduction="sum"))
    for _ in range(2):
        with pytest.raises(ValueError, match="changes with the batch"):
            keras_rgd.spectrum(model, (x, y), batch_size=8, verbose=False)


def test_tensors_of_another_dtype_are_traced_anew():
    model, (x, y) = model_of(), data()
    assert_right(model, x, y)
    given = gram(model, tf.constant(x, tf.float64), y.astype("int32"))
    np.testing.assert_allclose(given, expected(model, x, y), rtol=1e-4, atol=1e-6)
