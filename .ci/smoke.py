"""Uses an installed keras_rgd: a step by the gradients of examples, steps by a window, records."""

import importlib.metadata
import importlib.resources
import math
import sys

import keras
import numpy as np

import keras_rgd

rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 5)).astype("float32"), rng.integers(0, 3, 32)
layers = [keras.Input((5,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trains(model, steps):
    """Whether a model trains, measured by a DiffusionMonitor."""
    before = [w.numpy() for w in model.trainable_variables]
    monitor = keras_rgd.DiffusionMonitor((x, y), verbose=False)
    model.fit(x[: 8 * steps], y[: 8 * steps], batch_size=8, verbose=0, callbacks=[monitor])
    (record,) = monitor.records
    assert record.examples == 32 and 0 < record.rank_gram < 32, record
    assert math.isfinite(record.epsilon * record.lambda_max), record
    after = [w.numpy() for w in model.trainable_variables]
    return all(np.any(a != b) for a, b in zip(after, before, strict=True))


by_examples = keras_rgd.RGDSequential(layers)
by_examples.compile(keras_rgd.RGD(0.1), loss)
assert trains(by_examples, steps=1)
assert by_examples.optimizer.per_example_choice is not None
assert float(by_examples.optimizer.lambda_max) > 0

by_window = keras.Sequential(layers)
by_window.compile(keras_rgd.RGD(0.1, window=4), loss)
assert trains(by_window, steps=3)
assert by_window.optimizer.stored_gradients == 3

files = importlib.resources.files("keras_rgd")
# Imported from where it was installed, and of the version that pip knows.
assert str(files).startswith(sys.prefix), files
assert importlib.metadata.version("keras-rgd") == keras_rgd.__version__
print(f"keras_rgd {keras_rgd.__version__} works from {files}")
