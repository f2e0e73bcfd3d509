"""Layerwise per-example gradients: layers of the user's own, what is refused, what is counted."""

import gc

import cases
import hypothesis
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from hypothesis import strategies as st
from keras import layers as L
from wide import swept, wide

import keras_rgd
from keras_rgd import per_example as ways
from keras_rgd._support import vectors
from keras_rgd.per_example.layerwise import forms, layerwise
from keras_rgd.per_example.layerwise.convolutions import Convolution

ops = keras.ops
N, T, D = 6, 4, 3


class Own(L.Layer):
    """A layer of the user's: weights of the given shapes, and a function of them and x."""

    def __init__(self, function, *shapes, **kwargs):
        super().__init__(**kwargs)
        self.function, self.shapes = function, shapes

    def build(self, shape):
        self.own = [
            self.add_weight(shape=s, initializer="random_normal", name=f"w{i}")
            for i, s in enumerate(self.shapes)
        ]

    def call(self, x):
        return self.function(x, *self.own)


def tf_function(x, w):
    return tf.function(lambda x: tf.matmul(x, tf.convert_to_tensor(w)))(x)


def looped(x, w):
    """The product, one timestep after another in a loop."""
    return tf.transpose(
        tf.map_fn(lambda t: tf.matmul(t, tf.convert_to_tensor(w)), tf.transpose(x, [1, 0, 2])),
        [1, 0, 2],
    )


@tf.custom_gradient
def reversed_gradient(x, w):
    return tf.matmul(x, w), lambda g: (
        tf.matmul(g, w, transpose_b=True),
        -tf.einsum("nta,ntb->ab", x, g),
    )


def class_token(x, w):
    token = ops.broadcast_to(w, (ops.shape(x)[0], 1, D))
    return ops.concatenate([token, x], axis=1)


def solved(x, w):
    """Each example solves with the weight: an operation without a closed form here."""
    lower = tf.convert_to_tensor(w) + 3 * tf.eye(T, dtype=x.dtype)
    return tf.linalg.triangular_solve(lower, x)


def weight_normalized(x, v, g):
    return ops.matmul(x, g * v / ops.norm(v, axis=0))


def low_rank(x, w, a, b):
    return ops.matmul(x, w + ops.matmul(a, b))


# name: (function, shapes of the weights); x is (N, T, D)
OWN = {
    "matmul": (ops.matmul, (D, 5)),
    "transposed": (lambda x, w: ops.matmul(x, ops.transpose(w)), (5, D)),
    "on the left": (lambda x, w: ops.matmul(w, x), (5, T)),
    "flattened": (lambda x, w: ops.matmul(ops.reshape(x, (-1, T * D)), w), (T * D, 5)),
    "steps side by side": (
        lambda x, w: ops.reshape(ops.matmul(ops.reshape(x, (-1, D)), w), (-1, T, 5)),
        (D, 5),
    ),
    "einsum over heads": (lambda x, w: tf.einsum("ntd,hde->nhte", x, w), (2, D, 5)),
    "einsum for each step": (lambda x, w: tf.einsum("ntd,tde->nte", x, w), (T, D, 5)),
    "einsum to a scalar": (lambda x, w: tf.einsum("ntd,td->n", x, w)[:, None], (T, D)),
    "scale and shift": (lambda x, a, b: x * a + b, (D,), (T, 1)),
    "scalar": (lambda x, a: a * x - a, ()),
    "divided": (lambda x, a: x / (2 + a), (D,)),
    "maximum": (lambda x, a: ops.maximum(x, a), (T, D)),
    "where": (lambda x, a, b: ops.where(x > 0, a * x, b), (D,), (D,)),
    "power": (lambda x, a: ops.power(ops.abs(x) + 1, a), (D,)),
    "class token": (class_token, (1, 1, D)),
    "positions": (lambda x, w: x + ops.take(w, ops.arange(T), axis=0), (7, D)),
    "used twice": (lambda x, w: ops.matmul(ops.tanh(ops.matmul(x, w)), w), (D, D)),
    "used in two ways": (lambda x, w: ops.matmul(x, w) + w[0], (D, D)),
    "function of a weight": (lambda x, w: ops.matmul(x, ops.tanh(w)), (D, 5)),
    "weight normalized": (weight_normalized, (D, 5), (5,)),
    "low rank": (low_rank, (D, 5), (D, 2), (2, 5)),
    "symmetric": (lambda x, w: ops.matmul(x, w + ops.transpose(w)), (D, D)),
    "cumulative": (lambda x, w: x * ops.cumsum(w), (D,)),
    "solve": (solved, (T, T)),
    "convolution to one place": (
        lambda x, w: tf.nn.conv1d(x, w, 1, "VALID"),
        (T, D, 40),
    ),
    "dilated convolution": (
        lambda x, w: ops.conv(x, w, padding="same", dilation_rate=2),
        (3, D, 5),
    ),
    "strided convolution": (lambda x, w: ops.conv(x, w, 2, padding="same"), (3, D, 5)),
}


def own_model(function, *shapes, cls=keras_rgd.RGDSequential):
    keras.utils.set_random_seed(3)
    stack = [L.Dense(D, activation="tanh"), Own(function, *shapes, name="own"), L.Flatten()]
    return cls([keras.Input((T, D)), *stack, L.Dense(3)])


def own_batch(dtype="float32"):
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, T, D)).astype(dtype), rng.integers(0, 3, N)


FEW = ["transposed", "on the left", "einsum for each step", "scale and shift", "scalar", "where"]
FEW += ["class token", "positions", "used in two ways", "low rank", "convolution to one place"]


@pytest.mark.parametrize("name", swept(OWN, FEW))
def test_layers_of_ones_own_are_exact(name, float64):
    model = own_model(*OWN[name])
    model.compile("sgd", cases.CROSSENTROPY())
    x, y = own_batch("float64")
    dense = reference.eager(model, x, y)
    D = keras_rgd.diffusion_matrix(model, x, y, training=True, per_example="layerwise")
    rng = np.random.default_rng(1)
    v, w = rng.normal(size=dense.G.shape[1]), rng.normal(size=N)
    gradients = D.gradients
    received = {
        "gradient": (reference.flatten(gradients.gradient), dense.v),
        "dot": (gradients.dot(vectors.unflatten(v, gradients.weights)), dense.G @ v),
        "combine": (reference.flatten(gradients.combine(tf.constant(w))), w @ dense.G),
        "gram": (D.gram(), dense.G @ dense.G.T),
    }
    for what, (ours, theirs) in received.items():
        assert reference.relative_error(np.asarray(ours), theirs) < 1e-11, what


@pytest.mark.parametrize("mode", steps.MODES)
def test_a_training_step_through_layers_of_ones_own_is_exact(mode):
    """All of them that keep the shape of x, one after the other."""
    keep = ["scale and shift", "used twice", "positions", "cumulative", "solve", "symmetric"]

    def build():
        keras.utils.set_random_seed(3)
        return keras_rgd.RGDSequential(
            [keras.Input((T, D)), *(Own(*OWN[name]) for name in keep), L.Flatten(), L.Dense(3)]
        )

    x, y = own_batch()
    with steps.floatx("float64"):
        twin = build()
        twin.compile("sgd", cases.CROSSENTROPY())
    model = build()
    for a, b in zip(twin.variables, model.variables, strict=True):
        a.assign(b.numpy())
    with steps.floatx("float64"):
        dense = reference.eager(twin, x.astype("float64"), y)
    optimizer = keras_rgd.RGD(1.0)
    model.compile(optimizer, cases.CROSSENTROPY(), jit_compile=mode == "xla")
    before = reference.flatten(model.trainable_variables)
    model.train_on_batch(x, y)
    direction = before - reference.flatten(model.trainable_variables)
    assert optimizer.per_example_choice.name == "layerwise"
    expected = dense.direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < 1e-5


# what is refused, and what "auto" does then


REFUSED = {
    "batch statistics": (
        lambda x, w: x * w - ops.mean(x * w, axis=0),
        (D,),
        "gives an example an",
    ),
    "loop": (looped, (D, D), "own/w0' in the operation"),
    "tf.function": (tf_function, (D, D), "own/w0' in a function with the operation"),
    "other gradient": (
        lambda x, w: reversed_gradient(x, w.value),
        (D, D),
        "own/w0' in the operation IdentityN",
    ),
    "examples along axis 1": (
        lambda x, w: ops.transpose(ops.matmul(w, ops.reshape(ops.transpose(x), (D * T, -1)))),
        (5, T * D),
        "'own' (Own) has examples along another axis than 0",
    ),
}


@pytest.mark.parametrize("name", swept(REFUSED, ["batch statistics", "other gradient"]))
def test_what_cannot_be_read_off_is_refused_by_name_and_auto_goes_another_way(name):
    function, shape, words = REFUSED[name]
    x, y = own_batch()
    model = own_model(function, shape)
    model.compile(keras_rgd.RGD(0.1, per_example="layerwise"), cases.CROSSENTROPY())
    before = [v.numpy() for v in model.variables]
    with pytest.raises(ValueError, match="per_example='double_backward'") as refusal:
        model.fit(x, y, verbose=0)
    assert words in str(refusal.value)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    optimizer = keras_rgd.RGD(0.1)
    model.compile(optimizer, cases.CROSSENTROPY())
    model.fit(x, y, verbose=0)
    assert optimizer.per_example_choice.name == "double_backward"
    assert words in str(optimizer.per_example_choice)


@pytest.mark.parametrize("head", ["zeros", "glorot_uniform"])
def test_a_head_that_starts_at_zero_hides_no_mixing(head):
    """Its input's gradient is 0 on the first batch, and so is all that mixing would do."""
    x, y = own_batch()
    stack = [L.Flatten(), L.Dense(4), L.BatchNormalization(name="bn"), L.Activation("tanh")]
    model = keras_rgd.RGDSequential(
        [keras.Input((T, D)), *stack, L.Dense(3, kernel_initializer=head)]
    )
    model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
    model.train_on_batch(x, y)
    choice = str(model.optimizer.per_example_choice)
    assert choice.startswith("double_backward: Layer 'bn' (BatchNormalization) gives an example")


def test_one_example_first_is_enough_as_the_graph_shows_what_mixes():
    x, y = own_batch()
    for function, way in (
        (ops.matmul, "layerwise"),
        (lambda x, w: ops.matmul(x, w) - ops.mean(ops.matmul(x, w), axis=0), "double_backward"),
    ):
        model = own_model(function, (D, 5))
        model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
        model.train_on_batch(x[:1], y[:1])
        assert model.optimizer.per_example_choice.name == way


def test_eager_steps_have_no_trace_to_read():
    x, y = own_batch()
    model = own_model(ops.matmul, (D, 5))
    model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY(), run_eagerly=True)
    model.train_on_batch(x, y)
    assert "run_eagerly=True" in str(model.optimizer.per_example_choice)
    asked = keras_rgd.RGD(0.1, per_example="layerwise")
    model.compile(asked, cases.CROSSENTROPY(), run_eagerly=True)
    with pytest.raises(ValueError, match="run_eagerly=True"):
        model.train_on_batch(x, y)


def any_size(batch):
    """What a step is traced for whose batches are of any size."""
    return batch.mapped(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype))


def chosen(model, batch):
    """The way that "auto" takes for steps of any size."""
    losses = ways.ExampleLosses(model, training=True)
    return ways.choose_way(losses, ways.Wanted("auto"), any_size(batch), batch)


@pytest.mark.parametrize("name", ["dropout", "batch_normalization", "lstm_dropout"])
def test_choosing_moves_no_seed_no_statistic_and_no_weight(name):
    case = BY_NAME[name]
    model = case.compile(steps.build(case), keras_rgd.RGD(0.1), metrics=["accuracy"])
    x, y, _ = case.batch()
    model.evaluate(x, y, verbose=0)  # builds the metrics
    variables = [*model.variables, *(v for m in model.metrics for v in m.variables)]
    before = [v.numpy() for v in variables]
    chosen(model, ways.Batch(tf.constant(x), tf.constant(y)))
    for a, b in zip(before, variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("name", ["dense", "conv2d_groups"])
def test_no_trace_of_choosing_stays_in_memory_until_the_step_is_traced(name):
    def graphs():
        return {id(o) for o in gc.get_objects() if isinstance(o, tf.Graph)}

    case = BY_NAME[name]
    model = case.compile(steps.build(case), keras_rgd.RGD(0.1))
    x, y, _ = case.batch()
    batch = ways.Batch(tf.constant(x), tf.constant(y))
    gc.unfreeze()
    gc.collect()
    before = graphs()
    gc.disable()  # nothing but the choice itself collects
    try:
        choice = chosen(model, batch)
        after = graphs()
    finally:
        gc.enable()
    assert choice.name == "layerwise"
    assert after <= before  # those of other tests may go meanwhile
    assert gc.get_freeze_count() == 0


# sizes that coincide, and sizes that are not known


def directions(build, x, y, n=None, auto="layerwise"):
    """The steps by "auto" and by "double_backward" with one epsilon, on batches of n."""
    results = []
    for way in ("auto", "double_backward"):
        keras.utils.set_random_seed(3)
        model = build()
        rule = keras_rgd.epsilon.Fixed(1e-2)
        model.compile(keras_rgd.RGD(1.0, rule, per_example=way), cases.CROSSENTROPY())
        before = reference.flatten(model.trainable_variables)
        model.fit(x, y, batch_size=n or len(x), shuffle=False, verbose=0)
        results.append(before - reference.flatten(model.trainable_variables))
        if way == "auto":
            assert model.optimizer.per_example_choice.name == auto
            assert float(model.optimizer.chosen_epsilon) > 0
    return results


def called(function):
    """A layer's function whose operations are those of a `tf.function`."""
    traced = tf.function(function, autograph=False)
    return lambda x, *weights: traced(x, *map(tf.convert_to_tensor, weights))


def convolved(x, w):
    return tf.nn.conv2d(x, w, 1, "SAME")


def over_time(x, w):
    return called(lambda x, w: tf.nn.conv1d(x, w, 1, "SAME"))(x[:, 0], w)


def twice(function):
    def layer(x, *weights):
        first, second = called(function)(x, *weights)
        return first + second

    return layer


KERNEL = (2, 2, D, D)
IN_FUNCTIONS = {
    "a convolution": (called(convolved), [KERNEL], "layerwise"),
    "a convolution of two kernels": (
        lambda x, a, b: called(convolved)(x, a * b),
        [KERNEL, KERNEL],
        "layerwise",
    ),
    "a convolution over time": (over_time, [(2, D, D)], "layerwise"),
    "one over time of a scaled kernel": (
        lambda x, w: over_time(x, 2 * w),
        [(2, D, D)],
        "layerwise",
    ),
    "with more than that": (called(lambda x, w: 2 * convolved(x, w)), [KERNEL], "double_backward"),
    "another operation": (called(lambda x, w: tf.matmul(x, w)), [(D, D)], "double_backward"),
    "two outputs": (
        twice(lambda x, w: (convolved(x, w), tf.tanh(convolved(x, w)))),
        [KERNEL],
        "double_backward",
    ),
}


@pytest.mark.parametrize(
    "name", swept(IN_FUNCTIONS, ["one over time of a scaled kernel", "two outputs"])
)
def test_a_convolution_in_a_function_is_seen_and_what_else_is_in_one_is_not(name):
    function, shapes, way = IN_FUNCTIONS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, T, T, D)).astype("float32")

    def build():
        stack = [Own(function, *shapes), L.Activation("tanh"), L.Flatten(), L.Dense(3)]
        return keras_rgd.RGDSequential([keras.Input((T, T, D)), *stack])

    ours, other = directions(build, x, rng.integers(0, 3, N), auto=way)
    assert reference.relative_error(ours, other) < 1e-6


def test_as_many_examples_as_timesteps_are_told_apart():
    """A weight repeated over the timesteps looks as one repeated for each example."""

    def build():
        repeated = Own(lambda x, w: x + ops.tanh(ops.broadcast_to(w, (T, D))), (1, D))
        return keras_rgd.RGDSequential([keras.Input((T, D)), repeated, L.Flatten(), L.Dense(3)])

    x, y = own_batch()
    for n in (T, N):
        auto, other = directions(build, x[:n], y[:n])
        assert reference.relative_error(auto, other) < 1e-6
    # Also where the step is traced once more, with no batch to try.
    directions_after = []
    for way in ("auto", "double_backward"):
        keras.utils.set_random_seed(3)
        model = build()
        optimizer = keras_rgd.RGD(1.0, keras_rgd.epsilon.Fixed(1e-2), per_example=way)
        model.compile(optimizer, cases.CROSSENTROPY())
        model.train_on_batch(x[:N], y[:N])
        before = reference.flatten(model.trainable_variables)
        model.train_on_batch(x[:T], y[:T])
        directions_after.append(before - reference.flatten(model.trainable_variables))
        assert way != "auto" or optimizer.per_example_choice.name == "layerwise"
    assert reference.relative_error(*directions_after) < 1e-5
    model = build()
    model.compile("sgd", cases.CROSSENTROPY())
    dense = reference.eager(model, x[:T], y[:T])
    D_ = keras_rgd.diffusion_matrix(model, x[:T], y[:T])
    assert D_.gradients.way == "layerwise"
    assert reference.relative_error(D_.gram(), dense.G @ dense.G.T) < 1e-5


@pytest.mark.parametrize("order", ["examples first", "time first"])
@pytest.mark.parametrize("n", swept([1, N], [N]))
def test_rows_of_all_timesteps_are_read_where_each_example_has_its_own_together(order, n):
    """One example alone cannot show in which order they are."""

    def function(x, w):
        if order == "examples first":
            return ops.reshape(ops.matmul(ops.reshape(x, (-1, D)), w), (-1, T, 5))
        rows = ops.reshape(ops.transpose(x, (1, 0, 2)), (-1, D))
        return ops.transpose(ops.reshape(ops.matmul(rows, w), (T, -1, 5)), (1, 0, 2))

    x, y = own_batch()
    model = own_model(function, (D, 5))
    model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
    model.train_on_batch(x[:n], y[:n])
    choice = model.optimizer.per_example_choice
    assert choice.name == ("layerwise" if order == "examples first" else "double_backward")
    if order == "time first":
        assert "has examples along another axis than 0" in str(choice)


@wide
def test_more_timesteps_than_examples_in_an_unrolled_layer():
    def build():
        stack = [keras.Input((5, D)), L.SimpleRNN(4, unroll=True), L.Dense(3)]
        return keras_rgd.RGDSequential(stack)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, D)).astype("float32"), rng.integers(0, 3, 4)
    for n in (2, 3):  # of a size that is known, and of one that is not
        auto, other = directions(build, x, y, n)
        assert reference.relative_error(auto, other) < 1e-5


UNKNOWN_SIZE = ["used in two ways", "class token", "strided convolution"]


@pytest.mark.parametrize("name", swept(UNKNOWN_SIZE, UNKNOWN_SIZE[:1]))
def test_batches_of_unknown_size(name):
    x, y = own_batch()
    auto, other = directions(lambda: own_model(*OWN[name]), x, y, 4)
    assert reference.relative_error(auto, other) < 1e-5


@pytest.mark.parametrize("policy", swept(["mixed_float16", "mixed_bfloat16"], ["mixed_float16"]))
def test_half_precision_hides_no_mixing(policy):
    keras.config.set_dtype_policy(policy)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5)).astype("float32"), rng.integers(0, 3, 16)
    for layer, way in (
        (L.BatchNormalization, "double_backward"),
        (L.LayerNormalization, "layerwise"),
    ):
        stack = [L.Dense(8), layer(name="norm"), L.Activation("tanh"), L.Dense(3)]
        model = keras_rgd.RGDSequential([keras.Input((5,)), *stack])
        model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
        model.train_on_batch(x, y)
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        assert optimizer.per_example_choice.name == way, optimizer.per_example_choice


@pytest.mark.parametrize("where", ["bias", "x"])
def test_numbers_that_are_not_finite_change_no_choice(where):
    x, y = own_batch()
    model = own_model(ops.matmul, (D, 5))
    if where == "bias":
        model.layers[-1].bias.assign([np.nan, 0, 0])
    else:
        x[1] = np.nan
    model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
    model.train_on_batch(x, y)
    assert model.optimizer.per_example_choice.name == "layerwise"


# M_x


COSTLY = [("conv2d", "graph"), ("conv2d", "xla"), ("embedding", "graph"), ("shared_layer", "graph")]


@pytest.mark.parametrize("name, mode", swept(COSTLY, [COSTLY[0], COSTLY[2]]))
def test_where_a_gram_matrix_would_cost_too_much_the_factors_are_iterated(name, mode, monkeypatch):
    monkeypatch.setattr(layerwise, "_GRAM_STEPS", 0)
    monkeypatch.setattr(layerwise, "_GRAM_FLOOR", 0)
    case = BY_NAME[name]
    model = steps.build(case)
    optimizer = keras_rgd.RGD(1.0, per_example="layerwise")
    step = steps.take(case, model, optimizer, mode)
    dense = steps.oracle(name, mode)
    assert reference.relative_error(step.direction, dense.direction(step.epsilon)) < 1e-5
    assert 0.3 <= step.epsilon * dense.lambda_max <= 0.5
    assert "M_x is estimated, as at N = 6" in step.choice


def test_the_choice_follows_the_batch_size():
    """2 x 10 x 10 weights: at N = 2000 the Gram matrix is more work than two SGD steps."""
    for n, words in ((8, "bounded by a Gram matrix"), (2000, "M_x is estimated")):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(n, 10)).astype("float32"), rng.integers(0, 3, n)
        model = keras_rgd.RGDSequential([keras.Input((10,)), L.Dense(10), L.Dense(3)])
        model.compile(keras_rgd.RGD(0.1), cases.CROSSENTROPY())
        model.fit(x, y, batch_size=n, verbose=0)
        assert words in str(model.optimizer.per_example_choice)


# large tables


@pytest.mark.parametrize("vocabulary", [5, 3000])
def test_a_table_is_exact_by_its_rows_and_by_matching_tokens(vocabulary, float64):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (N, T)), rng.integers(0, 3, N)
    model = keras_rgd.RGDSequential(
        [keras.Input((T,), dtype="int32"), L.Embedding(vocabulary, D), L.Flatten(), L.Dense(3)]
    )
    model.compile("sgd", cases.CROSSENTROPY())
    dense = reference.eager(model, x, y)
    D_ = keras_rgd.diffusion_matrix(model, x, y, training=True, per_example="layerwise")
    assert reference.relative_error(D_.gram(), dense.G @ dense.G.T) < 1e-12


@st.composite
def convolutions(draw):
    """The extents, window, strides, dilations, padding, channels and places of a convolution."""
    rank = draw(st.integers(2, 3))
    several = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    window, steps, dilated = draw(several), draw(several), draw(st.booleans())
    ones = [1] * rank
    strides, dilations = (ones, steps) if dilated and rank == 2 else (steps, ones)
    reach = [(w - 1) * d + 1 for w, d in zip(window, dilations, strict=True)]
    one_place = st.just([0] * rank)  # with VALID, and a Gram matrix without rows
    spare = draw(one_place | st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
    extents = [r + s for r, s in zip(reach, spare, strict=True)]
    channels = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding, places = draw(st.sampled_from(["SAME", "VALID"])), draw(st.integers(1, 2))
    # For these there is no form (see `operations`).
    steps_over = any(s > w for s, w in zip(strides, window, strict=True))
    hypothesis.assume(not (rank == 3 and padding == "SAME" and steps_over))
    return extents, window, strides, dilations, padding, channels, places


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(convolutions())
def test_any_convolution_has_the_rows_of_its_derivative(convolution):
    extents, window, strides, dilations, padding, channels, places = convolution
    rng, n = np.random.default_rng(0), 3
    image = tf.constant(rng.normal(size=(n * places, *extents, channels[0])))
    kernel = tf.constant(rng.normal(size=(*window, *channels)))
    operation = tf.raw_ops.Conv2D if len(window) == 2 else tf.raw_ops.Conv3D
    arguments = dict(strides=[1, *strides, 1], dilations=[1, *dilations, 1], padding=padding)
    output = operation(input=image, filter=kernel, **arguments)
    response = tf.constant(rng.normal(size=output.shape))
    # The operation is linear: what it makes of each unit kernel.
    size = kernel.shape.num_elements()
    units = tf.reshape(tf.eye(size, dtype=tf.float64), [*kernel.shape[:-1], -1])
    answers = operation(input=image, filter=units, **arguments)
    answers = tf.reshape(answers, [*output.shape, size]) * response[..., None]
    expected = tf.reduce_sum(tf.reshape(answers, [n, -1, size]), 1)

    for has_rows in (True, False):
        form = Convolution(image, response, kernel.shape, strides, dilations, padding, places, n)
        form.has_rows = has_rows
        rows = tf.reshape(form.shaped_rows(), [n, -1])
        np.testing.assert_allclose(rows, expected, atol=1e-12)
        along = expected @ tf.reshape(kernel, [-1, 1])
        np.testing.assert_allclose(form.dot(kernel)[:, None], along, atol=1e-11)
        if dilations != [1] * len(window) and not form._keeps_rows:
            continue  # TensorFlow has no such gradient on a CPU
        w = tf.constant(rng.normal(size=(1, n)))
        combined = tf.reshape(form.combine(w), [1, -1])
        np.testing.assert_allclose(combined, w @ expected, atol=1e-11)
        gram = form.gram(forms.Outer())
        if gram is not None:
            np.testing.assert_allclose(gram, expected @ tf.transpose(expected), atol=1e-10)
