"""README.md says what is so."""

import re

import keras
import layer_table
import pytest
from cases import CASES

import keras_rgd


def test_the_layer_table_has_a_row_for_every_kind_of_model():
    assert set(layer_table.written()) == set(layer_table.rows())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_table_is_what_the_steps_do(case):
    *written, auto = layer_table.written()[case.row]
    written = dict(zip(layer_table.COLUMNS, written, strict=True))
    assert auto == ("double_backward" if case.opaque else "layerwise")
    for column in layer_table.COLUMNS:
        assert layer_table.cell(case, column) in written[column].split(" or "), column


def test_the_examples_run(tmp_path, monkeypatch):
    text = layer_table.README.read_text(encoding="utf-8")
    stock, own = re.findall(r"```python\n(import keras, keras_rgd\n.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = run(stock)
    assert type(names["model"]) is keras.Sequential
    assert names["model"].optimizer.window == 32
    names = run(own)
    assert len(names["monitor"].records) == 5
    assert list((tmp_path / "logs" / "diffusion").iterdir())
    assert isinstance(names["model"].optimizer, keras_rgd.RGD)


def run(example):
    assert len(example.splitlines()) <= 14
    names = {}
    exec(EXAMPLE_DATA, names)  # noqa: S102
    layers = "[keras.Input((5,)), keras.layers.Dense(3, activation='softmax')]"
    exec(example.replace("[...]", layers), names)  # noqa: S102
    return names


EXAMPLE_DATA = """
import numpy as np
x_train = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")
y_train = np.arange(40) % 3
"""
