"""Files that released versions saved load, and training goes on from them with the same numbers."""

import json
import math
import pathlib

import keras
import numpy as np
import pytest
from wide import swept

import keras_rgd

FOLDERS = sorted(p for p in (pathlib.Path(__file__).parent / "data").iterdir() if p.is_dir())


def files(pattern, always=None):
    paths = [p for folder in FOLDERS for p in sorted(folder.glob(pattern))]
    often = paths if always is None else [p for p in paths if _name(p) in always]
    return pytest.mark.parametrize("path", swept(paths, often), ids=_name)


def _name(path):
    return f"{path.parent.name}-{path.stem}"


@keras.saving.register_keras_serializable(package="saved_files")
class Classifier(keras_rgd.RGDModel):
    """A class of the user's own, of which some files hold a model."""


def flat(variables):
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)) for v in variables])


def of_optimizer(optimizer):
    rgd = keras_rgd.inner_rgd(optimizer)
    values = (rgd.iterations, rgd.lambda_max, rgd.chosen_epsilon, rgd.step_weak_field_error)
    return np.array([float(v) for v in values])


def of_a_later_keras(folder):
    """Whether the files were saved with a later Keras, of which an earlier one cannot load them."""
    saved = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["versions"]["keras"]
    saved, now = (tuple(map(int, v.split(".")[:2])) for v in (saved, keras.__version__))
    return now < saved


ALWAYS = ["0.1.0-window", "0.1.0-mixed_float16", "0.1.0-microbatches", "0.1.0-keras-3.8-dropout"]


@files("*.keras", ALWAYS)
def test_training_goes_on_from_a_model_that_was_saved(path):
    if of_a_later_keras(path.parent):
        pytest.skip("Keras does not load what a later version saved")
    expected = np.load(path.parent / "expected.npz")
    weights, values = expected[f"{path.stem}/weights"], expected[f"{path.stem}/optimizer"]
    if path.stem == "mixed_float16":
        # Of which Keras saves neither the model's policy nor that it wraps the optimizer.
        keras.config.set_dtype_policy("mixed_float16")
    model = keras.saving.load_model(path)
    np.testing.assert_array_equal(flat(model.variables), weights[0])
    np.testing.assert_array_equal(of_optimizer(model.optimizer), values[0])
    # Half precision rounds its products as the machine does.
    tolerance = 2e-3 if path.stem == "mixed_float16" else 2e-5
    for step, (x, y) in enumerate(zip(expected["x"], expected["y"], strict=True), start=1):
        model.train_on_batch(x, y)
        moved = np.linalg.norm(weights[step] - weights[0])
        assert np.linalg.norm(flat(model.variables) - weights[step]) <= tolerance * moved
        np.testing.assert_allclose(of_optimizer(model.optimizer), values[step], rtol=10 * tolerance)


@files("records_*.json")
def test_records_have_the_numbers_that_were_measured(path):
    records = keras_rgd.load_records(path)
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    assert len(records) == len(expected) == 3
    for record, fields in zip(records, expected, strict=True):
        assert_has(record, fields)


@files("spectrum_*.json")
def test_a_spectrum_has_the_numbers_that_were_measured(path):
    found = keras_rgd.Spectrum.load(path)
    assert_has(found, json.loads((path.parent / "expected.json").read_text())[path.stem])


def assert_has(record, fields):
    """Every field that the file's version knew, exactly: floats are written by `float.hex`."""
    for name, expected in fields.items():
        value = getattr(record, name)
        if isinstance(value, np.ndarray):
            assert [float(v).hex() for v in value] == expected, name
        elif isinstance(value, float):
            assert math.isnan(value) if expected == "nan" else value.hex() == expected, name
        else:
            assert (value, type(value)) == (expected, type(expected)), name


def test_there_are_files_of_each_kind():
    for folder in FOLDERS:
        assert {p.suffix for p in folder.iterdir()} == {".keras", ".json", ".npz"}
        assert sum(p.stat().st_size for p in folder.iterdir()) < 500_000
