"""On JAX the package runs where there is no TensorFlow, TensorBoard's files included."""

import subprocess
import sys

import pytest
from steps_on_jax import FLOAT64

PROGRAM = """
import sys

sys.modules["tensorflow"] = None  # an import of it fails

import keras, numpy as np, keras_rgd

x, y = np.random.default_rng(0).normal(size=(32, 4)), np.arange(32) % 3
model = keras_rgd.RGDSequential([keras.Input((4,)), keras.layers.Dense(3)])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras_rgd.RGD(0.1), loss)
monitor = keras_rgd.DiffusionMonitor((x, y), log_dir=sys.argv[1], verbose=False)
model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
s = keras_rgd.spectrum(model, (x, y), verbose=False)
assert s.rank == keras_rgd.diffusion_matrix(model, x, y).rank() == monitor.records[-1].rank_gram
keras_rgd.plot_spectrum(monitor.records)
"""


@pytest.mark.skipif(FLOAT64, reason="once is enough")
def test_it_trains_measures_and_writes(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "logs"], check=True)
    (file,) = (tmp_path / "logs").rglob("*tfevents*")
    assert b"diffusion/lambda_max" in file.read_bytes()
