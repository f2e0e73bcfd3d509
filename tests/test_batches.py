"""What data may be: strings of every make are one, and what is not dense is refused by its name."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

import keras_rgd
from keras_rgd._support import batches

WORDS = np.array(["sand", "clay", "löss"])


def soil_model():
    """A compiled model of one string and one number an example, and 12 examples."""
    soil, slope = keras.Input((), dtype="string", name="soil"), keras.Input((), name="slope")
    index = L.StringLookup(vocabulary=list(WORDS), mask_token=None, num_oov_indices=0)(soil)
    joined = L.concatenate([L.Embedding(3, 2)(index), L.Reshape((1,))(slope)])
    model = keras.Model({"soil": soil, "slope": slope}, L.Dense(2)(joined))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x = {"soil": WORDS[rng.integers(0, 3, 12)], "slope": rng.normal(size=12).astype("float32")}
    return model, x, rng.integers(0, 2, 12)


def test_strings_of_every_make_are_measured_alike():
    model, x, y = soil_model()
    column = x | {"soil": x["soil"].astype(object)}  # as pandas holds it
    tensors = x | {"soil": tf.constant(x["soil"].tolist())}
    dataset = tf.data.Dataset.from_tensor_slices((tensors, y)).batch(5)
    expected = keras_rgd.diffusion_matrix(model, x, y).eigenvalues()
    assert expected[0] > 1e-3
    for data in ((x, y), (column, y), (tensors, y), dataset):
        spectrum = keras_rgd.spectrum(model, data, verbose=False)
        np.testing.assert_allclose(spectrum.eigenvalues, expected, atol=1e-6)
        monitor = keras_rgd.DiffusionMonitor(data, verbose=False)
        monitor.set_model(model)
        monitor.on_train_begin()
        monitor.on_epoch_end(0)
        np.testing.assert_allclose(monitor.records[0].eigenvalues, expected, atol=1e-6)
    for other in (column, tensors):
        D = keras_rgd.diffusion_matrix(model, other, y)
        np.testing.assert_allclose(D.eigenvalues(), expected, atol=1e-6)


def test_bytes_keep_what_they_end_with():
    given = np.array([b"ab\0", "c"], dtype=object)
    assert batches.as_array(given).tolist() == [b"ab\0", b"c"]
    assert batches.as_array(tf.constant([b"ab\0", b"c"])).tolist() == [b"ab\0", b"c"]


@pytest.mark.parametrize("value", [[1, "a"], [None, "a"], [[1], [2, 3]]])
def test_objects_that_are_no_strings_are_refused(value):
    array = np.empty(2, object)
    array[:] = value
    with pytest.raises(ValueError, match=r"numbers or strings.*dtype object, shape \(2,\)"):
        batches.as_array(array)


def test_a_data_set_of_strings_that_changes_is_noticed():
    model, x, y = soil_model()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(12, seed=1).batch(12)
    with pytest.raises(ValueError, match="other examples than before"):
        keras_rgd.spectrum(model, dataset, method="gram", verbose=False)


SPARSE = tf.sparse.from_dense(np.eye(4, 5, dtype="float32"))
RAGGED = tf.ragged.constant([[1], [2, 3], [4], [5]])
DENSE = np.ones((4, 5), "float32")


@pytest.mark.parametrize(
    "batch, name, kind",
    [
        ((SPARSE,), "x", "sparse"),
        (({"a": DENSE, "b": SPARSE},), "x['b']", "sparse"),
        (([DENSE, RAGGED],), "x[1]", "ragged"),
        ((DENSE, RAGGED), "y", "ragged"),
        ((DENSE, None, SPARSE), "sample_weight", "sparse"),
        ((tf.SparseTensorSpec((None, 5)),), "x", "sparse"),
        (({"b": tf.RaggedTensorSpec((None, None))}, None), "x['b']", "ragged"),
    ],
)
def test_what_is_not_dense_is_named(batch, name, kind):
    expected = f"A step needs dense inputs, and {name} is {kind}."
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        batches.check_dense(*batch, what="A step")
    assert "RGD(..., window=32)" in str(error.value)
    assert ("to_tensor()" if kind == "ragged" else "tf.sparse.to_dense") in str(error.value)


def test_what_is_dense_is_not():
    assert batches.check_dense({"a": DENSE}, [tf.constant(1), None], tf.TensorSpec([2])) is None


def sparse_model(optimizer="sgd"):
    inputs = keras.Input((5,), sparse=True)
    model = keras.Model(inputs, L.Dense(3)(inputs))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_sparse_inputs_are_refused_by_all_that_measures_and_taken_once_dense():
    model, y = sparse_model(), np.array([0, 1, 2, 0])
    dataset = tf.data.Dataset.from_tensor_slices((SPARSE, y)).batch(2)
    for measure in (
        lambda: keras_rgd.DiffusionMonitor(dataset),
        lambda: keras_rgd.DiffusionMonitor((SPARSE, y)),
        lambda: keras_rgd.spectrum(model, dataset),
        lambda: keras_rgd.spectrum(model, (SPARSE, y)),
        lambda: keras_rgd.diffusion_matrix(model, SPARSE, y),
    ):
        with pytest.raises(ValueError, match="Measuring D needs dense inputs, and x is sparse"):
            measure()
    dense = dataset.map(lambda x, y: (tf.sparse.to_dense(x), y))
    monitor = keras_rgd.DiffusionMonitor(dense, verbose=False)
    model = sparse_model(keras_rgd.RGD(0.1, window=2))
    model.fit(dataset, shuffle=False, verbose=0, callbacks=[monitor])
    expected = keras_rgd.diffusion_matrix(model, tf.sparse.to_dense(SPARSE), y).eigenvalues()
    np.testing.assert_allclose(monitor.records[0].eigenvalues, expected, atol=1e-6)
