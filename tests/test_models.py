"""The training step of RGD's models, against the dense oracle and against Keras's own steps."""

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
from cases import BY_NAME, CASES, ONE_OF_EACH_KIND

import keras_rgd

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_modes = pytest.mark.parametrize("mode", steps.MODES)

TOLERANCE = {"graph": 1e-5, "xla": 1e-4}

WAYS = ("layerwise", "double_backward", "vectorized_map")
all_ways = pytest.mark.parametrize("way", WAYS)


def assert_equals_dense_D(step, dense, tolerance):
    assert step.refusal is None, step.refusal
    expected = dense.direction(step.epsilon)
    # The step is no gradient step: the term with D is seen.
    assert reference.relative_error(dense.v, expected) > 10 * tolerance
    assert reference.relative_error(step.direction, expected) <= tolerance


# the direction


@all_cases
def test_direction_equals_dense_D(case):
    for mode in steps.modes("double_backward", case.name):
        step = steps.step(case.name, "double_backward", mode)
        assert_equals_dense_D(step, steps.oracle(case.name, mode), TOLERANCE[mode])


@all_cases
@pytest.mark.parametrize("way", ["layerwise", "vectorized_map"])
def test_a_way_is_exact_or_refuses_a_layer_by_name(way, case):
    for mode in steps.modes(way, case.name):
        assert_exact_or_refused(way, case, mode)


def assert_exact_or_refused(way, case, mode):
    step = steps.step(case.name, way, mode)
    if way == "layerwise":
        assert bool(step.refusal) == case.opaque, step.refusal
    if step.refusal is None:
        assert_equals_dense_D(step, steps.oracle(case.name, mode), TOLERANCE[mode])
        return
    assert case.refusable is not None, step.refusal
    assert case.refusable in str(step.refusal)
    assert "per_example='double_backward'" in str(step.refusal)
    assert np.all(step.direction == 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_direction_in_float64_equals_dense_D(name, way):
    step = steps.step(name, way, "graph", "float64")
    if way != "double_backward" and step.refusal is not None:
        assert BY_NAME[name].refusable in str(step.refusal)
        return
    assert_equals_dense_D(step, steps.oracle(name, "graph", "float64"), 1e-10)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_auto_takes_layerwise_where_that_is_exact_and_says_why(name):
    case = BY_NAME[name]
    auto = steps.step(name, "auto", "graph")
    explicit = steps.step(name, "double_backward" if case.opaque else "layerwise", "graph")
    np.testing.assert_array_equal(auto.direction, explicit.direction)
    assert auto.epsilon == explicit.epsilon
    if case.opaque:
        assert auto.choice.startswith("double_backward: Layer '")
        assert case.refusable in auto.choice
    else:
        assert auto.choice == ("layerwise: examples do not mix; M_x is bounded by a Gram matrix")


@pytest.mark.parametrize("name", ["regularizers", "loss_over_time"])
def test_chunks_of_examples_take_the_same_step(name):
    case = BY_NAME[name]
    whole = steps.step(name, "vectorized_map", "graph")
    for chunk_size in (1, 4):
        optimizer = keras_rgd.RGD(1.0, per_example="vectorized_map", chunk_size=chunk_size)
        chunked = steps.take(case, steps.build(case), optimizer)
        assert reference.relative_error(chunked.direction, whole.direction) < 1e-6
        assert chunked.epsilon == pytest.approx(whole.epsilon, rel=1e-5)


@all_modes
def test_a_layer_that_assigns_its_kernel_before_the_step_takes_the_direction_from_there(mode):
    """SpectralNormalization; the rows of G are plain SGD's steps with one example weighted."""
    x, y, _ = BY_NAME["dense"].batch()
    n = len(x)

    def after(optimizer, weights=None):
        keras.utils.set_random_seed(0)
        stack = [keras.layers.SpectralNormalization(keras.layers.Dense(4)), keras.layers.Dense(3)]
        model = keras_rgd.RGDSequential([keras.Input((5,)), *stack])
        model.compile(optimizer, cases.CROSSENTROPY(), jit_compile=mode == "xla")
        model.train_on_batch(x, y, weights)
        return reference.flatten(model.trainable_variables)

    start = after(keras.optimizers.SGD(1.0), np.zeros(n))
    G = np.array([n * (start - after(keras.optimizers.SGD(1.0), e)) for e in np.eye(n)])
    dense = reference.Dense(G, start - after(keras.optimizers.SGD(1.0)))
    optimizer = keras_rgd.RGD(1.0)
    direction = start - after(optimizer)
    expected = dense.direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < TOLERANCE[mode]
    assert reference.relative_error(dense.v, expected) > 0.01  # D has a part in it


def test_eager_steps_equal_dense_D():
    case = BY_NAME["dense"]
    model = steps.build(case)
    x, y, _ = case.batch()
    optimizer = keras_rgd.RGD(1.0)
    case.compile(model, optimizer, run_eagerly=True)
    before = reference.flatten(model.trainable_variables)
    model.train_on_batch(x, y)
    direction = before - reference.flatten(model.trainable_variables)
    expected = steps.oracle("dense").direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < 1e-5


# eps


@all_cases
def test_half_of_the_bound_keeps_epsilon_below_it(case):
    for way in WAYS:
        for mode in steps.modes(way, case.name):
            step = steps.step(case.name, way, mode)
            if step.refusal is None:
                M = steps.oracle(case.name, mode).lambda_max
                assert 0.3 <= step.epsilon * M < 1
                if way != "double_backward":
                    assert 0.5 * 0.95 <= step.epsilon * M <= 0.5 * (1 + 1e-5)


@all_cases
def test_recorded_weak_field_error_is_that_of_the_step_or_bounds_it(case):
    for way in WAYS:
        step = steps.step(case.name, way, "graph")
        if step.refusal is not None:
            continue
        error = steps.oracle(case.name).error_on_step(step.epsilon)
        if way != "double_backward":
            assert step.weak_field_error == pytest.approx(error, rel=1e-3, abs=1e-6)
        else:
            assert error * (1 - 1e-3) - 1e-6 <= step.weak_field_error < 0.5


@all_ways
@all_modes
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_direction_scales_with_the_loss(way, mode, scale):
    case = BY_NAME["dense"]
    model = steps.build(case)
    x, y, _ = case.batch()
    optimizer = keras_rgd.RGD(1 / scale, per_example=way)
    model.compile(optimizer, case.loss(), loss_weights=scale, jit_compile=mode == "xla")
    before = reference.flatten(model.trainable_variables)
    model.train_on_batch(x, y)
    direction = before - reference.flatten(model.trainable_variables)
    plain = steps.step("dense", way, mode)
    assert reference.relative_error(direction, plain.direction) < 2e-6
    epsilon = float(optimizer.chosen_epsilon)
    assert epsilon * scale**2 == pytest.approx(plain.epsilon, rel=1e-4)


def train(case, optimizer, batches, model=None, mode="graph"):
    model = steps.build(case) if model is None else model
    case.compile(model, optimizer, jit_compile=mode == "xla")
    for x, y in batches:
        model.train_on_batch(x, y)
    return model


def random_batches(case, count, n=cases.N):
    rng = np.random.default_rng(3)
    for _ in range(count):
        x, y = case.data(rng)
        yield x[:n], y[:n]


@all_modes
@all_ways
def test_a_fixed_epsilon_of_0_is_sgd(way, mode):
    case = BY_NAME["regularizers"]
    batches = list(random_batches(case, 3))
    rule = keras_rgd.epsilon.Fixed(0.0)
    ours = train(case, keras_rgd.RGD(0.3, rule, 0.9, per_example=way), batches, mode=mode)
    sgd = train(case, keras.optimizers.SGD(0.3, 0.9), batches, mode=mode)
    for a, b in zip(ours.get_weights(), sgd.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@all_ways
@pytest.mark.parametrize("name", ["dense", "regularizers"])
def test_one_example_makes_it_plain_gradient_descent(name, way):
    case = BY_NAME[name]
    batches = list(random_batches(case, 2, n=1))
    optimizer = keras_rgd.RGD(0.5, per_example=way)
    ours = train(case, optimizer, batches)
    sgd = train(case, keras.optimizers.SGD(0.5), batches)
    assert float(optimizer.lambda_max) == float(optimizer.chosen_epsilon) == 0
    for a, b in zip(ours.get_weights(), sgd.get_weights(), strict=True):
        if way == "double_backward":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@all_ways
def test_equal_examples_make_it_plain_gradient_descent(way):
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    batch = [(np.repeat(x[:1], 8, 0), np.repeat(y[:1], 8, 0))]
    ours = train(case, keras_rgd.RGD(0.5, per_example=way), batch)
    sgd = train(case, keras.optimizers.SGD(0.5), batch)
    for a, b in zip(ours.get_weights(), sgd.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@all_ways
def test_permuting_and_duplicating_the_batch_does_not_change_the_step(way):
    case = BY_NAME["weights_over_time"]
    x, y, w = case.batch()
    order = np.array([3, 1, 5, 0, 2, 4])
    plain = steps.step(case.name, way, "graph")
    for index in (order, np.tile(np.arange(cases.N), 2)):
        model = steps.build(case)
        optimizer = keras_rgd.RGD(1.0, per_example=way)
        case.compile(model, optimizer)
        before = reference.flatten(model.trainable_variables)
        model.train_on_batch(x[index], y[index], w[index])
        direction = before - reference.flatten(model.trainable_variables)
        epsilon = float(optimizer.chosen_epsilon)
        assert epsilon == pytest.approx(plain.epsilon, rel=4e-2)  # N^(1/16) depends on N
        expected = steps.oracle(case.name).direction(epsilon)
        assert reference.relative_error(direction, expected) < 1e-5


@pytest.mark.parametrize("way", ["layerwise", "vectorized_map"])
def test_epsilon_stays_below_the_bound_on_every_step_of_a_training(way):
    case = BY_NAME["dense"]
    model, twin = steps.build(case), steps.build(case, "float64")
    optimizer = keras_rgd.RGD(0.5, epsilon=0.9, momentum=0.5, per_example=way)
    case.compile(model, optimizer)
    with steps.floatx("float64"):
        case.compile(twin, "sgd")
    shares = []
    for x, y in random_batches(case, 20):
        twin.set_weights(model.get_weights())
        M = reference.eager(twin, x.astype("float64"), y).lambda_max
        model.train_on_batch(x, y)
        shares.append(float(optimizer.chosen_epsilon) * M)
    assert max(shares) < 1
    assert min(shares) >= 0.6 * 0.9


def test_steps_without_a_gram_matrix_go_downhill():
    """1 - eps v^T D v / |v|^2 > 0, and nearly every step keeps eps below 1/M_x."""
    case = BY_NAME["dense"]
    model, twin = steps.build(case), steps.build(case, "float64")
    optimizer = keras_rgd.RGD(0.5, epsilon=0.9, per_example="double_backward")
    case.compile(model, optimizer)
    with steps.floatx("float64"):
        case.compile(twin, "sgd")
    shares = []
    for x, y in random_batches(case, 20):
        twin.set_weights(model.get_weights())
        dense = reference.eager(twin, x.astype("float64"), y)
        model.train_on_batch(x, y)
        epsilon = float(optimizer.chosen_epsilon)
        assert dense.v @ dense.direction(epsilon) > 0
        shares.append(epsilon * dense.lambda_max)
    assert np.mean(np.array(shares) >= 1) <= 0.1


# what the step leaves behind


@pytest.mark.parametrize(
    "name, mode",
    [
        ("dropout", "graph"),
        ("dropout", "xla"),
        ("batch_normalization", "graph"),
        ("batch_normalization", "xla"),
        ("lstm_dropout", "graph"),
        ("transformer", "graph"),
    ],
)
def test_seeds_and_moving_statistics_move_as_under_sgd(name, mode):
    case = BY_NAME[name]
    sgd = steps.take(case, steps.build(case), keras.optimizers.SGD(1.0), mode)
    step = steps.step(name, "double_backward", mode)
    for ours, theirs in zip(step.state, sgd.state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@all_cases
def test_the_reported_loss_is_that_of_the_batch(case):
    step = steps.step(case.name, "double_backward", "graph")
    if case.name == "own_compute_loss":
        return  # no loss is compiled, and Keras reports what `compute_loss` returns all the same
    assert step.logs["loss"] == pytest.approx(steps.oracle(case.name).loss, rel=1e-5)


@pytest.mark.parametrize("name", ["two_inputs_two_outputs", "sample_weight", "add_loss"])
def test_training_logs_are_those_of_sgd(name):
    case = BY_NAME[name]
    step = steps.step(name, "double_backward", "graph")
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


@all_modes
@all_ways
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


def test_steps_per_execution_take_the_same_steps():
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    results = []
    for steps_per_execution in (1, 3):
        for way in WAYS:
            model = steps.build(case)
            optimizer = keras_rgd.RGD(0.5, per_example=way)
            case.compile(model, optimizer, steps_per_execution=steps_per_execution)
            model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
            assert int(optimizer.iterations) == 6
            results.append(reference.flatten(model.trainable_variables))
    for one, three in zip(results[:3], results[3:], strict=True):
        np.testing.assert_allclose(one, three, rtol=1e-6, atol=1e-7)


def test_a_dataset_with_batches_of_unknown_size_trains():
    case = BY_NAME["dense"]
    x, y, _ = case.batch()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    for way in WAYS:
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


@all_ways
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
        before = reference.flatten(model.trainable_variables)
        assert set(model.train_on_batch(x, y, return_dict=True)) == {"loss"}
        assert (reference.flatten(model.trainable_variables) != before).any()


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


# conversion


def functional():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    h = keras.layers.Dense(4, "tanh")(keras.layers.concatenate([inputs["a"], inputs["b"]]))
    outputs = {"p": keras.layers.Dense(1, name="p")(h), "q": keras.layers.Dense(2, name="q")(h)}
    return keras.Model(inputs, outputs, name="functional")


def test_a_functional_model_is_converted_with_its_structure_and_weights():
    model = functional()
    converted = keras_rgd.to_rgd(model)
    assert isinstance(converted, keras_rgd.RGDModel)
    assert converted.name == "functional"
    assert all(a is b for a, b in zip(model.variables, converted.variables, strict=True))
    x = {"a": np.ones((4, 3), "float32"), "b": np.ones((4, 2), "float32")}
    before = model(x)
    assert set(converted(x)) == {"p", "q"}
    np.testing.assert_array_equal(converted(x)["q"], before["q"])
    converted.compile(keras_rgd.RGD(0.1), {"p": "mse", "q": "mse"})
    converted.train_on_batch(x, {"p": np.zeros((4, 1)), "q": np.zeros((4, 2))})
    assert np.any(model(x)["q"] != before["q"])


@pytest.mark.parametrize("built", [True, False])
def test_a_sequential_model_is_converted(built):
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers] if built else layers)
    converted = keras_rgd.to_rgd(model)
    assert type(converted) is keras_rgd.RGDSequential
    converted.compile(keras_rgd.RGD(0.1), "mse")
    converted.train_on_batch(np.ones((4, 3)), np.ones((4, 1)))
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(converted(x), model(x))


def test_a_clone_is_converted():
    case = BY_NAME["dense"]
    model = steps.build(case)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    converted = keras_rgd.to_rgd(clone)
    step = steps.take(case, converted, keras_rgd.RGD(1.0))
    np.testing.assert_array_equal(
        step.direction, steps.step("dense", "layerwise", "graph").direction
    )


def test_a_model_of_keras_applications_is_converted():
    model = keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=3)
    converted = keras_rgd.to_rgd(model)
    assert converted.count_params() == model.count_params()
    x = np.ones((1, 32, 32, 3), "float32")
    np.testing.assert_array_equal(converted(x), model(x))


def test_conversion_keeps_the_inputs_dtype_and_the_policy():
    layers = [keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
    ids = keras.Input((2,), dtype="int32", name="ids")
    keras.config.set_dtype_policy("mixed_float16")
    functional, sequential = keras.Model(ids, layers[0](ids)), keras.Sequential([ids, *layers])
    keras.config.set_dtype_policy("float32")
    for model in (functional, sequential):
        converted = keras_rgd.to_rgd(model)
        assert converted.inputs[0].dtype == "int32"
        assert converted.inputs[0].name == "ids"
        assert converted.dtype_policy.name == "mixed_float16"
        converted.compile(keras_rgd.RGD(), "mse")
        assert isinstance(converted.optimizer, keras.optimizers.LossScaleOptimizer)


def test_a_subclass_of_rgd_model_may_have_layers_or_be_functional():
    class Layers(keras_rgd.RGDModel):
        def __init__(self, units, name=None):
            super().__init__(name=name)
            self.head = keras.layers.Dense(units)

        def call(self, x):
            return self.head(x)

    class Graph(keras_rgd.RGDModel):
        def __init__(self, units):
            inputs = keras.Input((5,))
            super().__init__(inputs, keras.layers.Dense(units)(inputs))

    for make in (Graph, Layers, Graph, Layers):
        model = make(3)
        model(np.ones((1, 5)))
        assert isinstance(model, keras_rgd.RGDModel)
        model.compile(keras_rgd.RGD(1.0), "mse")
        before = reference.flatten(model.trainable_variables)
        model.train_on_batch(np.ones((4, 5)), np.ones((4, 3)))
        assert np.all(reference.flatten(model.trainable_variables) != before)


def test_a_model_that_rgd_trains_is_left_alone():
    model = steps.build(BY_NAME["subclassed"])
    assert keras_rgd.to_rgd(model) is model


@pytest.mark.parametrize("parent", ["Model", "Sequential"])
def test_a_model_that_may_override_something_is_told_to_take_the_mixin(parent):
    class Mine(getattr(keras, parent)):
        def call(self, x):
            return 2 * x

    with pytest.raises(ValueError, match=r"class RGDMine\(keras_rgd.RGDMixin, Mine\)"):
        keras_rgd.to_rgd(Mine())
    inputs = keras.Input((3,))

    class Weighted(keras.Model):
        def compute_loss(self, *args, **kwargs):
            return 100 * super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match=r"class RGDWeighted\(keras_rgd.RGDMixin, Weighted\)"):
        keras_rgd.to_rgd(Weighted(inputs, keras.layers.Dense(2)(inputs)))


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
    before = reference.flatten(half.trainable_variables)
    half.train_on_batch(x, y)
    direction = before - reference.flatten(half.trainable_variables)
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


CONTINUE = """
import sys
import numpy as np
import keras, keras_rgd
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
    result = subprocess.run(
        [sys.executable, script, *files], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["RGDSequential", "RGD"]
    received = list(np.load(tmp_path / "out.npz").values())
    expected = [v.numpy() for v in model.variables + model.optimizer.variables]
    assert len(received) == len(expected)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["dense", "dictionaries", "subclassed", "nested_model"])
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
