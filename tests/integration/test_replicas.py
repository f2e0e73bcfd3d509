"""Several replicas, by `tf.distribute`: each program has a process of its own, with two devices."""

import subprocess
import sys

WINDOW = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_rgd

def trained(strategy, options):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "tanh"),
                                  keras.layers.Dense(1)])
        model.compile(keras_rgd.RGD(0.1, window=4, batch_size=8, **options), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 5)), rng.normal(size=(96, 1))
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    optimizer = model.optimizer
    values = [*model.get_weights(), optimizer.lambda_max, optimizer.chosen_epsilon]
    return [np.array(v) for v in values], optimizer.diffusion_matrix().eigenvalues()[:3]

for options in ({}, {"momentum": 0.9, "global_clipnorm": 0.5}):
    one, spectrum = trained(tf.distribute.get_strategy(), options)
    two, spectra = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), options)
    for a, b in zip([*one, spectrum], [*two, spectra]):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-5)
    print("equal", float(one[-1]) > 0)

class Elsewhere(keras_rgd.RGD):
    # As of a Keras that clips elsewhere.
    def _clip_gradients(self, grads):
        return grads

keras_rgd.RGD = Elsewhere
try:
    trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), {})
except RuntimeError as error:
    print("refused" if "took an update without asking" in str(error) else error)
"""


def test_two_replicas_take_the_steps_of_one():
    result = subprocess.run(
        [sys.executable, "-c", WINDOW], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["equal", "True"] * 2 + ["refused"]


MONITOR = """
import dataclasses, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_rgd
x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
y = np.arange(64) % 3

def records(strategy, Model, make):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = Model([keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(make(), loss, jit_compile=False)
    monitor = keras_rgd.DiffusionMonitor((x, y), verbose=False)
    model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0, callbacks=[monitor])
    if hasattr(model.optimizer, "lambda_max"):
        assert float(model.optimizer.lambda_max) == monitor.records[-1].step_lambda_max > 0
        assert 0 < float(model.optimizer.chosen_epsilon)
        assert int(model.optimizer.epsilon_cuts) == int(model.optimizer.rounded_steps) == 0
    return monitor.records

window = (keras.Sequential, lambda: keras_rgd.RGD(0.1, window=4))
plain = (keras.Sequential, lambda: keras.optimizers.SGD(0.1))
examples = (keras_rgd.RGDSequential, lambda: keras_rgd.RGD(0.1))
for devices, programs in ((1, (window, plain, examples)), (2, (window, plain))):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
    for program in programs:
        one, many = (records(s, *program) for s in (tf.distribute.get_strategy(), strategy))
        assert [r.step for r in many] == [4, 8]
        for a, b in zip(one, many, strict=True):
            for field in dataclasses.fields(a):
                if field.type is float and field.name != "seconds":
                    values = getattr(b, field.name), getattr(a, field.name)
                    np.testing.assert_allclose(*values, rtol=1e-3, err_msg=field.name)
            assert a.steps_without_epsilon == b.steps_without_epsilon
        print("equal")
"""


def test_records_under_a_strategy_are_those_of_one_device():
    result = subprocess.run(
        [sys.executable, "-c", MONITOR], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["equal"] * 5
