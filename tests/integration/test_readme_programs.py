"""The programs in README.md run as they stand there."""

import pathlib
import re

import keras

import keras_rgd

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
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
