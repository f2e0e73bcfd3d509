"""What DiffusionMonitor takes as data: every form that `fit` takes, and nothing else."""

import re

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from wide import swept

from keras_rgd import DiffusionMonitor


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, i):
        part = slice(i * self.size, (i + 1) * self.size)
        return self.x[part], self.y[part]


FORMS = ["arrays", "dataset", "endless dataset", "pydataset"]


@pytest.mark.parametrize("kind", swept(FORMS, ["endless dataset", "pydataset"]))
def test_data_may_have_any_form_that_fit_takes(kind):
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    data = {
        "arrays": (x, y),
        "dataset": dataset,
        "endless dataset": dataset.repeat(),
        "pydataset": Batches(x, y, 4),
    }[kind]
    monitor = DiffusionMonitor(data, examples=5)
    plain = DiffusionMonitor((x[:5], y[:5]))
    steps.fitted(case, "sgd", [monitor, plain], epochs=1)
    assert monitor.records[0].examples == 5
    np.testing.assert_allclose(
        monitor.records[0].eigenvalues, plain.records[0].eigenvalues, rtol=1e-5, atol=1e-8
    )


def test_at_most_the_examples_asked_for_are_used():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2], examples=4)
    more = DiffusionMonitor(case.batch()[:2], examples=400)
    steps.fitted(case, "sgd", [monitor, more], epochs=1)
    assert monitor.records[0].examples == 4
    assert more.records[0].examples == cases.N


def test_sample_weights_belong_to_the_data():
    case = BY_NAME["sample_weight"]
    x, y, weights = case.batch()
    monitor = DiffusionMonitor((x, y, weights))
    model, _ = steps.fitted(case, "sgd", [monitor], epochs=1)
    dense = steps.dense_now(case, model)
    assert monitor.records[0].lambda_max == pytest.approx(dense.lambda_max, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, received",
    [
        ({"data": 3}, "Received: int"),
        ({"data": iter([])}, "Received: list_iterator"),
        ({"data": np.ones((4, 5))}, "Received: ndarray"),
        ({"data": (np.ones((4, 5)), np.ones(3))}, "Received: lengths x [4], y [3]"),
        ({"data": tuple(np.ones((4, 4)))}, "Received: 4 parts"),
        ({"data": ([[1.0], [2.0]], [1, 2])}, "Received: lengths x [None], y [None]"),
        ({"data": tf.data.Dataset.range(3).map(lambda i: (i, i))}, "batched"),
        ({"examples": 0}, "examples=0"),
        ({"chunk_size": -1}, "chunk_size=-1"),
        ({"per_example": "x"}, "per_example='x'"),
        ({"epsilon": 2.0}, "epsilon=2.0"),
        ({"data": tf.data.Dataset.range(0)}, "no examples"),
    ],
)
def test_a_bad_argument_is_named(arguments, received):
    with pytest.raises(ValueError) as error:
        DiffusionMonitor(**({"data": (np.ones((4, 5)), np.ones(4))} | arguments))
    assert received in str(error.value)


@pytest.mark.parametrize(
    "data, match",
    [
        (
            (np.ones((4, 7), "float32"), np.ones(4)),
            "expected axis -1 of input shape",
        ),
        ((np.ones((4, 5), "float32"),), "Expected (x, y). Received: y=None"),
    ],
    ids=["width", "no targets"],
)
def test_data_that_do_not_fit_the_model_stop_before_the_first_epoch(data, match):
    case = BY_NAME["dense"]
    model = steps.build(case)
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match=re.escape(match)):
        steps.fitted(case, "sgd", [DiffusionMonitor(data)], model=model)
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)


def test_only_the_examples_that_are_used_are_kept_and_read():
    class Rows(np.ndarray):
        """Counts how many rows are taken out of it."""

        def __getitem__(self, key):
            taken.append(key)
            return np.asarray(self)[key]

    taken = []
    x = np.zeros((1000, 5), "float32").view(Rows)
    monitor = DiffusionMonitor((x, np.zeros(1000)), examples=3)
    assert taken == [slice(None, 3, None)]
    assert monitor._data[0].base is None and monitor._data[0].shape == (3, 5)
