"""More than one device and more than one process on JAX: the D of the global batch."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import keras
import numpy as np
import pytest
from jax import export
from keras import layers as L
from steps_on_jax import FLOAT64, X, Y, classifier, fitted, flat

import keras_rgd

pytestmark = pytest.mark.skipif(FLOAT64, reason="once is enough")


def mixed():
    return [L.Dense(5), L.BatchNormalization(), L.Activation("tanh")]


@pytest.fixture
def distributed():
    """A function that sets a distribution, which is gone when the test ends."""
    yield keras.distribution.set_distribution
    keras.distribution.set_distribution(None)


@pytest.mark.parametrize("count", [2, 4])
def test_several_devices_take_the_steps_of_one(distributed, count):
    """Keras shards the batch, and XLA adds up what is shared."""
    devices = keras.distribution.list_devices()
    assert len(devices) == 4  # XLA_FLAGS of tests/integration/test_backends.py
    one = fitted(keras_rgd.RGD(0.1), mixed)
    distributed(keras.distribution.DataParallel(devices=devices[:count]))
    several = fitted(keras_rgd.RGD(0.1), mixed)
    np.testing.assert_allclose(flat(several.variables), flat(one.variables), rtol=1e-5, atol=1e-6)


def test_two_processes_take_the_steps_of_one():
    """Each has half of every batch; the collectives go over the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = pathlib.Path(__file__).parent / "one_of_two_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], told
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in told)
    assert first == second
    one = fitted(keras_rgd.RGD(0.1), mixed)
    monitor = keras_rgd.DiffusionMonitor((X, Y))
    one.fit(X, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[monitor])
    np.testing.assert_allclose(first["weights"], flat(one.variables), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first["eigenvalues"], monitor.records[0].eigenvalues[:10], rtol=1e-4)


WIDE = 128


def wide():
    return [L.Dense(WIDE, "tanh", name=f"wide_{i}") for i in range(2)]


def wide_classifier(**options):
    """Of a weight that is large enough to be stored alone, and smaller ones."""
    return classifier(keras_rgd.RGD(0.1, window=3, **options), wide)


def split_by_model(devices):
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*wide.*kernel"] = (None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


needs_layouts = pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 12),
    reason="Keras's optimizers take no layout",
)


@needs_layouts
def test_a_window_lies_split_over_devices_as_its_weights_do(distributed, tmp_path):
    whole = wide_classifier()
    whole.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    distributed(split_by_model(keras.distribution.list_devices()))
    split = wide_classifier()
    split.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    kernel = split.trainable_variables[2]
    (row,) = (v for v in split.optimizer.variables if tuple(v.shape) == (3, WIDE, WIDE))
    shard = row.value.addressable_shards[0].data.shape
    assert shard == (3, WIDE, WIDE // 2)
    assert kernel.value.addressable_shards[0].data.shape == (WIDE, WIDE // 2)
    np.testing.assert_allclose(
        flat(split.trainable_variables), flat(whole.trainable_variables), rtol=1e-4, atol=1e-6
    )
    D, other = split.optimizer.diffusion_matrix(), whole.optimizer.diffusion_matrix()
    np.testing.assert_allclose(
        *(np.asarray(d.eigenvalues()) for d in (D, other)), rtol=1e-4, atol=1e-9
    )
    # And its file is for any number of devices.
    split.save(tmp_path / "split.keras")
    whole.save(tmp_path / "whole.keras")
    for name, model in (("split", split), ("whole", whole)):
        for parallel in (None, split_by_model(keras.distribution.list_devices())):
            distributed(parallel)
            loaded = keras.models.load_model(tmp_path / f"{name}.keras")
            for a, b in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
                np.testing.assert_array_equal(np.ravel(a.value), np.ravel(b.value))


@needs_layouts
def test_weights_that_are_split_over_devices_take_the_same_steps_by_examples(distributed):
    whole = fitted(keras_rgd.RGD(0.1), wide)
    distributed(split_by_model(keras.distribution.list_devices()))
    split = fitted(keras_rgd.RGD(0.1), wide)
    np.testing.assert_allclose(
        flat(split.trainable_variables), flat(whole.trainable_variables), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 8}, {"window": 3}], ids=str)
def test_the_step_is_lowered_for_accelerators(platform, options):
    model = classifier(keras_rgd.RGD(0.1, **options), lambda: [L.Dense(5), L.BatchNormalization()])
    model.train_on_batch(X[:8], Y[:8])
    state = tuple(
        [v.value for v in some]
        for some in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    exported = export.export(jax.jit(model.train_step), platforms=[platform])(state, (X[:8], Y[:8]))
    assert exported.platforms == (platform,)
