"""The command `python -m keras_rgd spectrum`."""

import json

import cases
import keras
import numpy as np
import pytest
from keras import layers as L
from sklearn.datasets import load_digits

import keras_rgd
from keras_rgd.__main__ import main


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved model for 8x8 images, and the digits where the command finds them."""
    model = keras.Sequential([keras.Input((8, 8, 1)), L.Flatten(), L.Dense(10)])
    model.compile("sgd", cases.CROSSENTROPY())
    model.save(tmp_path / "model.keras")
    images, y = load_digits(return_X_y=True)
    images, y = images[:200].reshape(-1, 8, 8, 1).astype("float32"), y[:200]
    monkeypatch.setattr(
        "keras_rgd.__main__.load_dataset",
        lambda name, split, scale, **_: (images / scale, y),
    )
    monkeypatch.chdir(tmp_path)
    return model, (images / 16, y)


def test_the_command_prints_the_record_and_writes_json_and_a_picture(saved, tmp_path, capsys):
    main(["spectrum", "model.keras", "--dataset", "digits", "--scale", "16", "--quiet"])
    shown = capsys.readouterr().out
    s = keras_rgd.Spectrum.load(tmp_path / "model_spectrum.json")
    expected = keras_rgd.spectrum(*saved, verbose=False)
    np.testing.assert_array_equal(s.eigenvalues, expected.eigenvalues)
    assert f"rank                 {s.rank}\n" in shown and "n_examples           200" in shown
    assert (tmp_path / "model_spectrum.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "model_spectrum.json").read_text())["keras_rgd_spectrum"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.keras", "--dataset", "digits"], "There is no file missing.keras"),
        (["model.keras", "--dataset", "digits", "--k", "0"], "`k` must be a positive integer"),
        (["model.keras", "--dataset", "digits", "--out", "no/where"], "There is no folder no"),
    ],
)
def test_the_command_says_what_is_wrong(saved, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["spectrum", *arguments])
    assert {p.name for p in tmp_path.iterdir()} == {"model.keras"}
