"""The direction of a step and its eps: each case by each way against a dense D in float64."""

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
import zoos
from cases import BY_NAME
from wide import ALWAYS, STEPS, WAYS, swept

import keras_rgd

TOLERANCE = {"graph": 1e-5, "xla": 1e-4}

all_ways = pytest.mark.parametrize("way", WAYS)


def assert_equals_dense_D(step, dense, tolerance):
    assert step.refusal is None, step.refusal
    expected = dense.direction(step.epsilon)
    # The step is no gradient step: the term with D is seen.
    assert reference.relative_error(dense.v, expected) > 10 * tolerance
    assert reference.relative_error(step.direction, expected) <= tolerance


# the direction


all_steps = pytest.mark.parametrize("name, way", swept(STEPS, ALWAYS))


@all_steps
def test_a_way_is_exact_or_refuses_a_layer_by_name(name, way):
    case, step = BY_NAME[name], steps.step(name, way, "graph")
    if way == "layerwise":
        assert bool(step.refusal) == case.opaque, step.refusal
    if step.refusal is None or way == "double_backward":
        assert_equals_dense_D(step, steps.oracle(name), TOLERANCE["graph"])
        return
    assert case.refusable is not None, step.refusal
    assert case.refusable in str(step.refusal)
    assert "per_example='double_backward'" in str(step.refusal)
    assert np.all(step.direction == 0)


@pytest.mark.parametrize("zoo", ["kinds"])
def test_layers_side_by_side_are_exact(zoo):
    zoos.assert_equals_dense_D(zoo, "double_backward", "float32", jit_compile=False)


UNDER_XLA = [
    ("few", "layerwise", "float32"),
    ("few", "double_backward", "float64"),
    ("few", "vectorized_map", "float64"),
    ("images", "layerwise", "float64"),
    ("sequences", "layerwise", "float32"),
    ("losses", "layerwise", "float64"),
    ("recurrent", "double_backward", "float32"),
    ("kinds", "double_backward", "float64"),
    ("kinds", "vectorized_map", "float64"),
]


@pytest.mark.parametrize("zoo, way, dtype", swept(UNDER_XLA, UNDER_XLA[:1]))
def test_layers_side_by_side_are_exact_under_xla(zoo, way, dtype):
    zoos.assert_equals_dense_D(zoo, way, dtype)


def test_a_loss_of_ones_own_is_exact_under_xla():
    step = steps.step("own_compute_loss", "layerwise", "xla")
    assert_equals_dense_D(step, steps.oracle("own_compute_loss"), TOLERANCE["xla"])


IN_FLOAT64 = [
    ("dropout", "layerwise"),
    ("batch_normalization", "double_backward"),
    ("lstm", "double_backward"),
    ("own_compute_loss", "layerwise"),
]


@pytest.mark.parametrize("name, way", swept(IN_FLOAT64, IN_FLOAT64[:2]))
def test_direction_in_float64_equals_dense_D(name, way):
    step = steps.step(name, way, "graph", "float64")
    assert_equals_dense_D(step, steps.oracle(name, "graph", "float64"), 1e-10)


AUTO = ["conv2d", "dropout", "embedding_mask_loss", "own_compute_loss", "batch_normalization"]
AUTO += ["lstm"]


@pytest.mark.parametrize("name", swept(AUTO, ["conv2d", "batch_normalization", "own_compute_loss"]))
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


CHUNKED = [("regularizers", 4), ("loss_over_time", 1), ("loss_over_time", 4)]


@pytest.mark.parametrize("name, chunk_size", swept(CHUNKED, CHUNKED[:1]))
def test_chunks_of_examples_take_the_same_step(name, chunk_size):
    case = BY_NAME[name]
    whole = steps.step(name, "vectorized_map", "graph")
    optimizer = keras_rgd.RGD(1.0, per_example="vectorized_map", chunk_size=chunk_size)
    chunked = steps.take(case, steps.build(case), optimizer)
    assert reference.relative_error(chunked.direction, whole.direction) < 1e-6
    assert chunked.epsilon == pytest.approx(whole.epsilon, rel=1e-5)


def test_a_layer_that_assigns_its_kernel_before_the_step_takes_the_direction_from_there():
    """SpectralNormalization; the rows of G are plain SGD's steps with one example weighted."""
    x, y, _ = BY_NAME["dense"].batch()
    n = len(x)

    def spectral(optimizer, mode="graph"):
        keras.utils.set_random_seed(0)
        stack = [keras.layers.SpectralNormalization(keras.layers.Dense(4)), keras.layers.Dense(3)]
        model = keras_rgd.RGDSequential([keras.Input((5,)), *stack])
        model.compile(optimizer, cases.CROSSENTROPY(), jit_compile=mode == "xla")
        return model

    def after(model, start, weights=None):
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        model.train_on_batch(x, y, weights)
        return reference.flatten(model.trainable_variables)

    sgd = spectral(keras.optimizers.SGD(1.0))
    begin = [v.numpy() for v in sgd.variables]
    start, plain, *alone = (after(sgd, begin, e) for e in (np.zeros(n), np.ones(n), *np.eye(n)))
    dense = reference.Dense(np.array([n * (start - a) for a in alone]), start - plain)
    for mode in steps.MODES:
        model = spectral(keras_rgd.RGD(1.0), mode)
        direction = start - after(model, begin)
        expected = dense.direction(float(model.optimizer.chosen_epsilon))
        assert reference.relative_error(direction, expected) < TOLERANCE[mode]
        assert reference.relative_error(dense.v, expected) > 0.01  # D has a part in it


def test_eager_steps_equal_dense_D():
    case = BY_NAME["dense"]
    model = steps.build(case)
    x, y, _ = case.batch()
    optimizer = keras_rgd.RGD(1.0)
    case.compile(model, optimizer, run_eagerly=True)
    direction = steps.moved(model, lambda: model.train_on_batch(x, y))
    expected = steps.oracle("dense").direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < 1e-5


# eps


@all_steps
def test_half_of_the_bound_keeps_epsilon_below_it(name, way):
    step = steps.step(name, way, "graph")
    if step.refusal is None:
        M = steps.oracle(name).lambda_max
        assert 0.3 <= step.epsilon * M < 1
        if way != "double_backward":
            assert 0.5 * 0.95 <= step.epsilon * M <= 0.5 * (1 + 1e-5)


@all_steps
def test_recorded_weak_field_error_is_that_of_the_step_or_bounds_it(name, way):
    step = steps.step(name, way, "graph")
    if step.refusal is not None:
        return
    error = steps.oracle(name).error_on_step(step.epsilon)
    if way != "double_backward":
        assert step.weak_field_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    else:
        assert error * (1 - 1e-3) - 1e-6 <= step.weak_field_error < 0.5


SCALED = [(way, mode) for way in WAYS for mode in steps.MODES]


@pytest.mark.parametrize(
    "way, mode", swept(SCALED, [("layerwise", "xla"), ("double_backward", "graph")])
)
def test_direction_scales_with_the_loss(way, mode):
    """One traced step for every scale: the loss's factor is a variable."""
    case, factor = BY_NAME["dense"], tf.Variable(1.0)
    model, optimizer = steps.build(case), keras_rgd.RGD(1.0, per_example=way)

    def scaled(y, z):
        f = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)
        return factor * f

    model.compile(optimizer, scaled, jit_compile=mode == "xla")
    restart, received = steps.restarting(model), {}
    for scale in (1.0, 1e-14, 1e14):
        restart()
        factor.assign(scale)
        optimizer.learning_rate = 1 / scale
        direction = steps.moved(model, lambda: model.train_on_batch(*case.batch()[:2]))
        error = float(optimizer.step_weak_field_error)
        received[scale] = direction, float(optimizer.chosen_epsilon) * scale**2, error
    direction, epsilon, error = received.pop(1.0)
    expected = steps.oracle("dense").direction(epsilon)
    assert reference.relative_error(direction, expected) <= TOLERANCE[mode]
    for scaled_direction, *values in received.values():
        assert reference.relative_error(scaled_direction, direction) < 2e-6
        assert values == pytest.approx([epsilon, error], rel=1e-4)


def train(case, optimizer, batches, mode="graph"):
    model = steps.build(case)
    case.compile(model, optimizer, jit_compile=mode == "xla")
    for x, y in batches:
        model.train_on_batch(x, y)
    return model


def random_batches(case, count, n=cases.N):
    rng = np.random.default_rng(3)
    for _ in range(count):
        x, y = case.data(rng)
        yield x[:n], y[:n]


FIXED = [*((way, "graph") for way in WAYS), ("layerwise", "xla")]


@pytest.mark.parametrize("way, mode", swept(FIXED, [("double_backward", "graph"), FIXED[-1]]))
def test_a_fixed_epsilon_of_0_is_sgd(way, mode):
    case = BY_NAME["regularizers"]
    batches = list(random_batches(case, 3))
    rule = keras_rgd.epsilon.Fixed(0.0)
    ours = train(case, keras_rgd.RGD(0.3, rule, 0.9, per_example=way), batches, mode)
    sgd = train(case, keras.optimizers.SGD(0.3, 0.9), batches)
    for a, b in zip(ours.get_weights(), sgd.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


ONE_EXAMPLE = [(name, way) for name in ("dense", "regularizers") for way in WAYS]


@pytest.mark.parametrize("name, way", swept(ONE_EXAMPLE, ONE_EXAMPLE[3:]))
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


@pytest.mark.parametrize("way", swept(WAYS, ["layerwise", "double_backward"]))
def test_permuting_and_duplicating_the_batch_does_not_change_the_step(way):
    case = BY_NAME["weights_over_time"]
    index = np.tile([3, 1, 5, 0, 2, 4], 2)
    model, optimizer = steps.build(case), keras_rgd.RGD(1.0, per_example=way)
    case.compile(model, optimizer)
    direction = steps.moved(model, lambda: model.train_on_batch(*(a[index] for a in case.batch())))
    epsilon = float(optimizer.chosen_epsilon)
    plain = steps.step(case.name, way, "graph").epsilon
    assert epsilon == pytest.approx(plain, rel=4e-2)  # N^(1/16) depends on N
    expected = steps.oracle(case.name).direction(epsilon)
    assert reference.relative_error(direction, expected) < 1e-5


def followed(way):
    """For each of 20 steps, `reference.Dense` of its batch before it, and its eps."""
    case = BY_NAME["dense"]
    model, twin = steps.build(case), steps.build(case, "float64")
    optimizer = keras_rgd.RGD(0.5, epsilon=0.9, momentum=0.5, per_example=way)
    case.compile(model, optimizer)
    with steps.floatx("float64"):
        oracle = reference.traced(case.compile(twin, "sgd"))
        for x, y in random_batches(case, 20):
            twin.set_weights(model.get_weights())
            dense = oracle(x.astype("float64"), y)
            model.train_on_batch(x, y)
            yield dense, float(optimizer.chosen_epsilon)


@pytest.mark.parametrize("way", ["layerwise", "vectorized_map"])
def test_epsilon_stays_below_the_bound_on_every_step_of_a_training(way):
    shares = [epsilon * dense.lambda_max for dense, epsilon in followed(way)]
    assert max(shares) < 1
    assert min(shares) >= 0.6 * 0.9


def test_steps_without_a_gram_matrix_go_downhill():
    """1 - eps v^T D v / |v|^2 > 0, and nearly every step keeps eps below 1/M_x."""
    shares = []
    for dense, epsilon in followed("double_backward"):
        assert dense.v @ dense.direction(epsilon) > 0
        shares.append(epsilon * dense.lambda_max)
    assert np.mean(np.array(shares) >= 1) <= 0.1
