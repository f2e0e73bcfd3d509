"""RGD's models: what a step leaves behind, conversion, half precision, saving, refusals."""

import subprocess
import sys
import textwrap

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME, CASES
from wide import ALWAYS, swept

import keras_rgd


def way_of(case):
    """That "auto" takes."""
    return "double_backward" if case.opaque else "layerwise"


FEW = [case.name for case in CASES if (case.name, way_of(case)) in ALWAYS]
all_cases = pytest.mark.parametrize("case", swept(CASES, FEW), ids=str)

WAYS = ("layerwise", "double_backward", "vectorized_map")
all_ways = pytest.mark.parametrize("way", WAYS)


# what the step leaves behind


STATEFUL = [
    ("dropout", "graph"),
    ("dropout", "xla"),
    ("batch_normalization", "graph"),
    ("batch_normalization", "xla"),
    ("lstm_dropout", "graph"),
    ("transformer", "graph"),
]


@pytest.mark.parametrize("name, mode", swept(STATEFUL, STATEFUL[:3]))
def test_seeds_and_moving_statistics_move_as_under_sgd(name, mode):
    case = BY_NAME[name]
    sgd = steps.take(case, steps.build(case), keras.optimizers.SGD(1.0), mode)
    step = steps.step(name, "double_backward", mode)
    for ours, theirs in zip(step.state, sgd.state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@all_cases
def test_the_reported_loss_is_that_of_the_batch(case):
    step = steps.step(case.name, way_of(case), "graph")
    if case.name == "own_compute_loss":
        return  # no loss is compiled, and Keras reports what `compute_loss` returns all the same
    assert step.logs["loss"] == pytest.approx(steps.oracle(case.name).loss, rel=1e-5)


@pytest.mark.parametrize("name", ["two_inputs_two_outputs", "sample_weight", "add_loss"])
def test_training_logs_are_those_of_sgd(name):
    case = BY_NAME[name]
    step = steps.step(name, "layerwise", "graph")
    sgd = steps.take(case, steps.build(case), keras.optimizers.SGD(1.0))
    assert set(step.logs) == set(sgd.logs)
    for key, value in sgd.logs.items():
        assert step.logs[key] == pytest.approx(value, rel=1e-5)


class Weights(keras.callbacks.Callback):
    """The weights, eps and logs after each batch."""

    def __init__(self):
        super().__init__()
        self.weights, self.epsilons = [], []

    def on_train_begin(self, logs=None):
        self.weights.append(reference.flatten(self.model.trainable_variables))

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(reference.flatten(self.model.trainable_variables))
        self.epsilons.append(float(self.model.optimizer.chosen_epsilon))


PARTIAL = [("layerwise", "xla"), *((way, "graph") for way in WAYS)]


@pytest.mark.parametrize("way, mode", swept(PARTIAL, PARTIAL[1:3]))
def test_a_last_partial_batch_equals_dense_D(way, mode):
    case = BY_NAME["loss_over_time"]
    x, y, _ = case.batch()
    model, twin = steps.build(case), steps.build(case, "float64")
    seen = Weights()
    case.compile(model, keras_rgd.RGD(1.0, per_example=way), jit_compile=mode == "xla")
    history = model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0, callbacks=[seen])
    with steps.floatx("float64"):
        case.compile(twin, "sgd")
    losses = []
    for i, part in enumerate([slice(0, 4), slice(4, 6)]):
        start = 0
        for w in twin.trainable_variables:
            size = int(np.prod(w.shape))
            w.assign(seen.weights[i][start : start + size].reshape(w.shape))
            start += size
        dense = reference.eager(
            twin, x[part].astype("float64"), y[part].astype("float64"), loss_shape=case.loss_shape
        )
        direction = seen.weights[i] - seen.weights[i + 1]
        expected = dense.direction(seen.epsilons[i])
        assert reference.relative_error(direction, expected) < 2e-5
        losses.append(dense.loss)
    # Each batch counts with its examples, as in plain Keras.
    assert history.history["loss"][0] == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6)
    means = model.optimizer.step_means()
    assert means.epsilon == pytest.approx(np.exp(np.mean(np.log(seen.epsilons))))
    assert (means.steps, means.steps_without_epsilon) == (2, 0)


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise"]))
def test_steps_per_execution_take_the_same_steps(way):
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    results = []
    for steps_per_execution in (1, 3):
        model = steps.build(case)
        optimizer = keras_rgd.RGD(0.5, per_example=way)
        case.compile(model, optimizer, steps_per_execution=steps_per_execution)
        model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
        assert int(optimizer.iterations) == 6
        results.append(reference.flatten(model.trainable_variables))
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise"]))
def test_a_dataset_with_batches_of_unknown_size_trains(way):
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    model = steps.build(case)
    case.compile(model, keras_rgd.RGD(0.5, per_example=way))
    model.fit(data, epochs=1, shuffle=False, verbose=0)
    again = steps.build(case)
    case.compile(again, keras_rgd.RGD(0.5, per_example=way))
    again.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


# evaluation and other optimizers


def test_evaluation_and_validation_logs_stay_as_they_are():
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    model = case.compile(steps.build(case), keras_rgd.RGD(0.1), metrics=["accuracy"])
    plain = case.compile(steps.build(case), "sgd", metrics=["accuracy"])
    expected = plain.evaluate(x, y, verbose=0, return_dict=True)
    assert model.evaluate(x, y, verbose=0, return_dict=True) == expected
    history = model.fit(x, y, validation_data=(x, y), epochs=2, verbose=0).history
    assert set(history) == set(expected) | {f"val_{key}" for key in expected}
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == set(expected)
    assert set(model.test_on_batch(x, y, return_dict=True)) == set(expected)
    assert len(model.evaluate(x, y, verbose=0)) == len(plain.evaluate(x, y, verbose=0))


@pytest.mark.parametrize("name", ["dropout", "batch_normalization"])
def test_with_another_optimizer_it_is_its_parent(name):
    case = BY_NAME[name]
    x, y, _ = case.batch()
    ours = steps.build(case)
    keras.utils.set_random_seed(7)
    parent = keras.Sequential.from_config(
        {k: v for k, v in ours.get_config().items() if k != "build_input_shape"}
    )
    for a, b in zip(parent.variables, ours.variables, strict=True):
        a.assign(b.numpy())
    histories = []
    for model in (ours, parent):
        case.compile(model, keras.optimizers.Adam(0.01))
        histories.append(model.fit(x, y, epochs=3, verbose=0, shuffle=False).history)
    assert histories[0] == histories[1]
    for a, b in zip(ours.variables, parent.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise"]))
def test_the_losses_of_several_outputs_are_averaged_as_under_sgd(way):
    case = BY_NAME["two_inputs_two_outputs"]
    x, y, _ = case.batch()
    histories = []
    for optimizer in (keras_rgd.RGD(0.0, per_example=way), keras.optimizers.SGD(0.0)):
        model = case.compile(steps.build(case), optimizer)
        histories.append(model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history)
    for key in ("loss", "p_loss", "q_loss"):
        assert histories[0][key] == pytest.approx(histories[1][key], rel=1e-5), key


def test_a_metric_of_the_users_named_loss_is_left_alone():
    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seen = keras.metrics.Mean(name="loss")

        def call(self, x):
            self.seen.update_state(7.0)
            return x

    model = keras_rgd.RGDSequential([keras.Input((5,)), Counts(), keras.layers.Dense(3)])
    model.compile(keras_rgd.RGD(0.1), "mse")
    model.train_on_batch(np.ones((4, 5)), np.ones((4, 3)))
    assert float(model.layers[0].seen.result()) == 7.0


def test_an_optimizer_can_be_exchanged_by_compiling_again():
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    model = steps.build(case)
    for optimizer in ("adam", keras_rgd.RGD(), "sgd", keras_rgd.RGD(window=2), keras_rgd.RGD()):
        case.compile(model, optimizer)
        assert set(model.train_on_batch(x, y, return_dict=True)) == {"loss"}
        assert steps.moved(model, lambda: model.train_on_batch(x, y)).any()


# refusals


@pytest.mark.parametrize("mode", ["graph", "xla", "eager"])
def test_an_ordinary_model_is_refused_before_a_weight_changes(mode):
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    flags = {"run_eagerly": True} if mode == "eager" else {"jit_compile": mode == "xla"}
    model.compile(keras_rgd.RGD(0.1, momentum=0.9), "mse", **flags)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"model = keras_rgd.to_rgd\(model\)") as refusal:
        model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    assert "keras_rgd.RGDModel(inputs, outputs)" in str(refusal.value)
    assert "keras_rgd.RGDSequential([...])" in str(refusal.value)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_trainable_weights_is_refused():
    model = keras_rgd.RGDSequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.trainable = False
    model.compile(keras_rgd.RGD(), "mse")
    with pytest.raises(ValueError, match="no trainable weights"):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))


TWO_REPLICAS = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_rgd
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras_rgd.RGDSequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras_rgd.RGD(), "mse")
before = model.get_weights()
try:
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
except ValueError as error:
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    print(error)
"""


def test_several_replicas_are_refused():
    result = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "runs on one replica" in result.stdout
    assert "Received: 2 replicas" in result.stdout


# half precision


@all_ways
def test_half_precision_steps_are_near_dense_D(way):
    case = BY_NAME["dense_regression"]
    model, oracle = steps.build(case), steps.oracle("dense_regression")
    keras.config.set_dtype_policy("mixed_float16")
    half = case.model()
    half.set_weights(model.get_weights())
    optimizer = keras_rgd.RGD(1.0, per_example=way)
    x, y, _ = case.batch()
    case.compile(half, keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10))
    direction = steps.moved(half, lambda: half.train_on_batch(x, y))
    expected = oracle.direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < 5e-3
    assert 0.3 <= float(optimizer.chosen_epsilon) * oracle.lambda_max < 1


@all_ways
def test_an_overflowing_half_precision_step_is_skipped(way):
    case = BY_NAME["dense_regression"]
    keras.config.set_dtype_policy("mixed_float16")
    model = case.model()
    optimizer = keras_rgd.RGD(0.1, momentum=0.9, per_example=way)
    case.compile(model, keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**24))
    x, y, _ = case.batch()
    before = model.get_weights()
    model.train_on_batch(x, y)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(float(optimizer.lambda_max))
    for _ in range(12):
        model.train_on_batch(x, y)
    assert float(model.optimizer.dynamic_scale) < 2.0**24
    assert np.all(np.isfinite(reference.flatten(model.trainable_variables)))
    assert np.any(reference.flatten(model.trainable_variables) != reference.flatten(before))


# saving


def saved_model():
    model = keras_rgd.RGDSequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, "tanh"),
            keras.layers.Dropout(0.4, seed=3),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    optimizer = keras_rgd.RGD(schedule, epsilon=schedule, momentum=0.9, weight_decay=1e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


class Noisy(keras.layers.Layer):
    """Draws by generators in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generators = [keras.random.SeedGenerator(i) for i in range(2)]

    def call(self, x):
        return x + sum(keras.random.normal((5,), seed=g) for g in self.generators)


def test_random_numbers_go_on_also_where_a_layer_keeps_its_generators_in_a_list(tmp_path):
    x, y = BY_NAME["dense"].batch()[:2]
    model = keras_rgd.RGDSequential([keras.Input((5,)), Noisy(), keras.layers.Dense(3)])
    model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", {"Noisy": Noisy})
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


CONTINUE = """
import sys
import numpy as np
import keras, keras_rgd
import tensorflow as tf
tf.config.optimizer.set_experimental_options(eval(sys.argv[4]))
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
for x, y in zip(data["x"], data["y"]):
    model.train_on_batch(x, y)
values = [v.numpy() for v in model.variables + model.optimizer.variables]
np.savez(sys.argv[3], *values)
print(type(model).__name__, type(model.optimizer).__name__)
"""


def test_a_saved_model_continues_bit_for_bit_in_a_fresh_process(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 5)).astype("float32")
    y = rng.integers(0, 3, size=(4, 8))
    model = saved_model()
    for i in range(2):
        model.train_on_batch(x[i], y[i])
    model.save(tmp_path / "model.keras")
    for i in range(2, 4):
        model.train_on_batch(x[i], y[i])
    np.savez(tmp_path / "data.npz", x=x[2:], y=y[2:])
    script = tmp_path / "continue.py"
    script.write_text(textwrap.dedent(CONTINUE))
    files = [tmp_path / name for name in ("model.keras", "data.npz", "out.npz")]
    options = repr(tf.config.optimizer.get_experimental_options())
    result = subprocess.run(
        [sys.executable, script, *files, options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["RGDSequential", "RGD"]
    received = list(np.load(tmp_path / "out.npz").values())
    expected = [v.numpy() for v in model.variables + model.optimizer.variables]
    assert len(received) == len(expected)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name", swept(["dense", "dictionaries", "subclassed", "nested_model"], ["dense", "subclassed"])
)
def test_models_reload_with_class_optimizer_and_rule(name, tmp_path):
    case = BY_NAME[name]
    x, y, _ = case.batch()
    model = steps.build(case)
    optimizer = keras_rgd.RGD(0.1, keras_rgd.epsilon.WeakField(0.03), 0.9)
    case.compile(model, optimizer)
    model.train_on_batch(x, y)
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.models.load_model(path)
    assert type(again) is type(model)
    assert again.optimizer.epsilon == optimizer.epsilon
    assert again.optimizer.get_config() == optimizer.get_config()
    for a, b in zip(again.optimizer.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    model.train_on_batch(x, y)
    again.train_on_batch(x, y)
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
