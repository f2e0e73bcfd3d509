"""Layerwise products: weights that are combined before their use, and numbers far from 1."""

import functools

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from keras import layers as L
from test_layerwise import Own
from wide import swept

import keras_rgd
from keras_rgd.direction import direction_of
from keras_rgd.per_example import Batch, ExampleLosses
from keras_rgd.per_example.layerwise import layerwise
from keras_rgd.per_example.layerwise.layerwise import Layerwise

ops = keras.ops
N, T, D = 6, 4, 3


def models(build):
    """A float32 model and its float64 twin of the same weights."""
    keras.utils.set_random_seed(3)
    model = build()
    with steps.floatx("float64"):
        twin = build()
        for a, b in zip(twin.variables, model.variables, strict=True):
            a.assign(b.numpy())
    return model, twin


def dense(twin, x, y, weights=None, loss=cases.CROSSENTROPY):
    with steps.floatx("float64"):
        twin.compile(
            "sgd", loss() if isinstance(loss, type) or loss is cases.CROSSENTROPY else loss
        )
        return reference.eager(twin, *steps.cast((x, y, weights), "float64"))


def step(model, x, y, weights=None, mode="graph", way="layerwise", loss=None):
    """The direction of one step, and its optimizer."""
    optimizer = keras_rgd.RGD(1.0, per_example=way)
    loss = cases.CROSSENTROPY() if loss is None else loss
    model.compile(optimizer, loss, jit_compile=mode == "xla")
    return steps.moved(model, lambda: model.train_on_batch(x, y, weights)), optimizer


# weights combined before they meet the examples


class Tied(L.Layer):
    """A table that is read and, transposed, multiplied with."""

    def __init__(self, entries, width):
        super().__init__()
        self.size = entries, width

    def build(self, shape):
        self.table = self.add_weight(shape=self.size, initializer="random_normal", name="table")

    def call(self, x):
        return ops.matmul(ops.mean(ops.take(self.table, x, axis=0), 1), ops.transpose(self.table))


def tied(entries=7, width=D):
    return keras_rgd.RGDSequential([keras.Input((T,), dtype="int32"), Tied(entries, width)])


COMBINED = {
    "low rank": (lambda x, w, a, b: ops.matmul(x, w + ops.matmul(a, b)), (D, 5), (D, 2), (2, 5)),
    "weight normalized": (
        lambda x, v, g: ops.matmul(x, g * v / ops.norm(v, axis=0)),
        (D, 5),
        (5,),
    ),
    "product of three": (
        lambda x, a, b, c: ops.matmul(x, ops.matmul(ops.matmul(a, b), c)),
        (D, 2),
        (2, 4),
        (4, 5),
    ),
    "product and transpose": (
        lambda x, w: ops.matmul(ops.tanh(ops.matmul(x, w)), ops.transpose(w)),
        (D, 5),
    ),
    "two functions": (
        lambda x, w: ops.matmul(ops.tanh(ops.matmul(x, ops.tanh(w))), ops.sin(w)),
        (D, D),
    ),
}


MODES = [*((name, "graph") for name in (*COMBINED, "tied")), ("low rank", "xla")]


@pytest.mark.parametrize("name, mode", swept(MODES, MODES[:3]))
def test_weights_combined_before_their_use_are_exact_without_rows(name, mode, monkeypatch):
    monkeypatch.setattr(layerwise, "_GRAM_STEPS", 0)
    monkeypatch.setattr(layerwise, "_GRAM_FLOOR", 0)

    def build():
        if name == "tied":
            return tied()
        own = Own(*COMBINED[name])
        return keras_rgd.RGDSequential([keras.Input((T, D)), own, L.Flatten(), L.Dense(3)])

    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (N, T)) if name == "tied" else rng.normal(size=(N, T, D))
    x, y = x.astype("int32" if name == "tied" else "float32"), rng.integers(0, 3, N)
    model, twin = models(build)
    direction, optimizer = step(model, x, y, mode=mode)
    assert "M_x is estimated" in str(optimizer.per_example_choice)
    expected = dense(twin, x, y).direction(float(optimizer.chosen_epsilon))
    assert reference.relative_error(direction, expected) < 1e-5


def test_the_work_of_rows_of_combined_weights_is_counted():
    """A tied table and a merged kernel so large that their rows would be most of a step's work."""
    rng = np.random.default_rng(0)
    n, d = 64, 150

    def merged():
        shapes = (d, d), (d, 4), (4, d)
        own = Own(lambda x, w, a, b: ops.matmul(x, w + ops.matmul(a, b)), *shapes)
        return keras_rgd.RGDSequential([keras.Input((d,)), own])

    tokens = rng.integers(0, 999, (n, T)).astype("int32")
    inputs = rng.normal(size=(n, d)).astype("float32")
    for model, x in ((tied(1000, 16), tokens), (merged(), inputs)):
        y = rng.integers(0, 100, n)
        _, optimizer = step(model, x, y, way="auto")
        assert optimizer.per_example_choice.name == "layerwise"
        assert "M_x is estimated" in str(optimizer.per_example_choice)
        batch = tf.constant(x), tf.constant(y)
        rows = n * sum(int(np.prod(w.shape)) for w in model.trainable_variables)
        trace = tf.function(lambda x, y, m=model: m.train_step((x, y))).get_concrete_function(
            *batch
        )
        outputs = [t for op in trace.graph.get_operations() for t in op.outputs]
        sizes = [t.shape.num_elements() or 0 for t in outputs if t.shape.rank is not None]
        assert max(sizes) < rows / 4


# numbers far from 1


def own(*given):
    return lambda: Own(*given)


LAYERS = {
    "dense": ((D,), lambda: L.Dense(4)),
    "dense over time, products of places": ((2, 9), lambda: L.Dense(9)),
    "dense over time, rows": ((9, 2), lambda: L.Dense(2)),
    "conv2d": ((4, 4, 2), lambda: L.Conv2D(3, 2)),
    "conv2d of one place": ((2, 2, 2), lambda: L.Conv2D(5, 2)),
    "conv3d": ((2, 3, 3, 1), lambda: L.Conv3D(2, 2)),
    "conv2d transposed": ((3, 3, 2), lambda: L.Conv2DTranspose(2, 2)),
    "depthwise": ((4, 4, 2), lambda: L.DepthwiseConv2D(2)),
    "conv2d in groups": ((4, 4, 4), lambda: L.Conv2D(4, 2, groups=2)),
    "conv2d of each channel": ((4, 4, 3), lambda: L.Conv2D(6, 2, groups=3)),
    "conv1d in groups": ((6, 4), lambda: L.Conv1D(4, 2, groups=2)),
    "einsum": ((T, D), lambda: L.EinsumDense("abc,cd->abd", (T, 5))),
    "scale": ((T, D), own(lambda x, a, b: a * x + b, (D,), (D,))),
    "low rank": ((T, D), own(*COMBINED["low rank"])),
    "used twice": ((T, D), own(lambda x, w: ops.matmul(ops.tanh(ops.matmul(x, w)), w), (D, D))),
}


def masked_batch(shape, fill):
    """Random examples, two of them filled and of weight 0."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(N, *shape)).astype("float32"), np.ones(N, "float32")
    x[[1, 4]], weights[[1, 4]] = fill, 0
    return x, rng.integers(0, 3, N), weights


# By the Gram matrix, and by products.
BOTH = [(name, gram) for name in LAYERS for gram in (True, False)]
FEW = [("dense", True), ("used twice", True), ("conv2d", False), ("low rank", False)]
FEW += [("conv2d in groups", False)]


@pytest.mark.parametrize("name, gram", swept(BOTH, FEW))
def test_an_example_of_weight_0_may_hold_any_finite_number(name, gram, monkeypatch):
    if not gram:
        monkeypatch.setattr(layerwise, "_GRAM_STEPS", 0)
        monkeypatch.setattr(layerwise, "_GRAM_FLOOR", 0)
    shape, layer = LAYERS[name]

    def build():
        stack = [layer(), L.Activation("tanh"), L.Flatten(), L.Dense(3)]
        return keras_rgd.RGDSequential([keras.Input(shape), *stack])

    compiled = gram and name == "conv2d" or not gram and name == "dense"
    model, twin = models(build)
    batch = masked_batch(shape, 1e20)
    expected = dense(twin, *batch)
    optimizer = keras_rgd.RGD(1.0, per_example="layerwise")
    model.compile(optimizer, cases.CROSSENTROPY(), jit_compile=compiled)
    restart = steps.restarting(model)
    for fill in (1e20, 9.97e36):
        restart()
        x, y, weights = masked_batch(shape, fill)
        take = functools.partial(model.train_on_batch, x, y, weights)
        direction, epsilon = steps.moved(model, take), float(optimizer.chosen_epsilon)
        assert reference.relative_error(direction, expected.direction(epsilon)) < 1e-4
        assert 0.3 <= epsilon * expected.lambda_max < 1


@pytest.mark.parametrize(
    "scales, mode", [((1e-22, 1e15, 1e22), "graph"), ((1e-20,), "xla")], ids=["graph", "xla"]
)
@pytest.mark.parametrize("back", swept([False, True], [True]), ids=["from 1", "and back"])
def test_the_direction_follows_the_scale_of_the_inputs(scales, mode, back):
    """Gradients as large as the inputs; or of order 1, with inputs and cotangents far from it."""

    def linear(y_true, y_pred):
        return ops.sum(y_true * y_pred, axis=-1)

    keras.utils.set_random_seed(3)
    factor = tf.Variable(1.0)
    layer = Own(lambda x, w: ops.matmul(x, w) * factor, (D, 5))
    model = keras_rgd.RGDSequential([keras.Input((D,)), layer])
    # A start at 0, so that the step is the direction to the last digit.
    model.set_weights([0 * w for w in model.get_weights()])
    model.compile(keras_rgd.RGD(1.0), linear, jit_compile=mode == "xla")
    restart = steps.restarting(model)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, D)).astype("float32"), rng.normal(size=(N, 5)).astype("float32")

    def direction(scale):
        restart()
        factor.assign(1 / scale if back else 1.0)
        taken = steps.moved(model, lambda: model.train_on_batch(x * np.float32(scale), y))
        return taken if back else taken / scale

    one = direction(1.0)
    G = np.einsum("na,nb->nab", x, y).reshape(N, -1).astype("float64")
    assert np.linalg.norm(one - G.mean(0)) > 0.1 * np.linalg.norm(G.mean(0))
    for scale in scales:
        assert reference.relative_error(direction(scale), one) < 1e-4


# gradients that differ in their last digits


def nearly_equal(shape, spread, dtype="float32"):
    rng = np.random.default_rng(0)
    x = np.ones((16, *shape), dtype)
    y = (1000 * (1 + spread * rng.normal(size=(16, 1)))).astype(dtype)
    return x, y


@pytest.mark.parametrize(
    "way, name, mode",
    [
        ("layerwise", "dense", "xla"),
        ("layerwise", "dense over time, products of places", "graph"),
        ("layerwise", "conv2d", "graph"),
        ("vectorized_map", "dense", "graph"),
        ("double_backward", "dense", "graph"),
    ],
)
def test_gradients_that_differ_by_little_keep_their_D(way, name, mode):
    shape, layer = LAYERS[name]

    def build():
        return keras_rgd.RGDSequential([keras.Input(shape), layer(), L.Flatten(), L.Dense(1)])

    model, twin = models(build)
    optimizer = keras_rgd.RGD(1.0, per_example=way)
    model.compile(optimizer, "mse", jit_compile=mode == "xla")
    restart = steps.restarting(model)
    for spread in (1e-2, 1e-4):
        restart()
        x, y = nearly_equal(shape, spread)
        direction = steps.moved(model, functools.partial(model.train_on_batch, x, y))
        expected = dense(twin, x, y, loss="mse")
        epsilon, size = float(optimizer.chosen_epsilon), np.linalg.norm(expected.v)
        assert 0.3 <= epsilon * expected.lambda_max < 1
        error = np.linalg.norm(direction - expected.direction(epsilon))
        assert error < (1e-6 / spread + 1e-5) * size


def test_the_step_says_so_where_float64_has_lost_the_digits(float64):
    """Products of float64 gradients lose what float64 still sees of a spread of 1e-9."""
    found = []
    for spread, n in ((1e-5, 16), (1e-9, 16), (1e-5, 1)):
        x, y = nearly_equal((D,), spread)
        model = keras_rgd.RGDSequential([keras.Input((D,)), L.Dense(1)])
        model.compile("sgd", "mse")

        @tf.function
        def lost(x, y, model=model):
            layerwise = Layerwise(ExampleLosses(model, True), Batch(x, y))
            return direction_of(layerwise, 0.0).lost_digits

        found.append(bool(lost(x[:n].astype("float64"), y[:n].astype("float64"))))
    assert found == [False, True, False]


SPREADS = [(name, s) for name in ("dense", "conv2d", "used twice") for s in (1e-5, 1e-9, 0.0)]


@pytest.mark.parametrize("name, spread", swept(SPREADS, [SPREADS[1], SPREADS[4], SPREADS[-1]]))
def test_a_measured_D_in_float64_keeps_its_digits(name, spread, float64):
    shape, layer = LAYERS[name]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(shape), layer(), L.Flatten(), L.Dense(1)])
    model.compile("sgd", "mse")
    x, y = nearly_equal(shape, spread, "float64")
    D = keras_rgd.diffusion_matrix(model, x, y, per_example="layerwise")
    # All gradients are multiples of one vector. Equal ones differ in the oracle by rounding.
    expected = dense(model, x, y, loss="mse").lambda_max if spread else 0
    assert D.top_eigenvalue() == pytest.approx(expected, rel=1e-4)
    assert D.trace() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("way", ["layerwise", "vectorized_map", "double_backward"])
def test_equal_gradients_give_a_plain_step(way):
    x, y = nearly_equal((D,), 0.0)
    model, twin = models(lambda: keras_rgd.RGDSequential([keras.Input((D,)), L.Dense(1)]))
    direction, optimizer = step(model, x, y, way=way, loss="mse")
    assert reference.relative_error(direction, dense(twin, x, y, loss="mse").v) < 1e-6
    assert float(optimizer.lambda_max) == 0


# what a trial of exactness asks


def test_noise_at_the_outputs_enters_both_sides_alike():
    model = keras_rgd.RGDSequential([keras.Input((D,)), L.Dense(4, activation="tanh"), L.Dense(2)])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, N, D)).astype("float32")
    m, r = rng.normal(size=N).astype("float32"), rng.normal(size=(N, 2)).astype("float32")

    @tf.function
    def both(x, y, noise=None):
        way = Layerwise(ExampleLosses(model, True), Batch(x, y), cotangent_noise=noise)
        squares = way.reweighted_and_squares(m)
        return squares[0], way.reweighted_ordinarily(m), squares[1]

    batch = tf.constant(x), tf.constant(y[:, :2])
    plain, _, _ = both(*batch)
    ours, ordinary, (left, right) = both(*batch, lambda output: tf.constant(r))
    ours, ordinary, plain = (reference.flatten(t) for t in (ours, ordinary, plain))
    assert reference.relative_error(ours, ordinary) < 1e-6
    assert reference.relative_error(ours, plain) > 0.1
    assert float(left) == pytest.approx(float(right), rel=1e-5)


# lengths that are open when the step is traced


def attending():
    x = keras.Input((None,), dtype="int32")
    h = L.Embedding(11, 4)(x)
    h = L.LayerNormalization()(h + L.MultiHeadAttention(2, 3)(h, h))
    return keras_rgd.RGDModel(x, L.Dense(3)(L.GlobalAveragePooling1D()(h)))


OPEN = {
    "text": lambda: keras_rgd.RGDSequential(
        [
            keras.Input((None,), dtype="int32"),
            L.Embedding(11, 4),
            L.Dense(5, activation="tanh"),
            L.GlobalMaxPooling1D(),
            L.Dense(3),
        ]
    ),
    "attention": attending,
    "steps side by side": lambda: keras_rgd.RGDSequential(
        [
            keras.Input((None, D)),
            Own(
                lambda x, w, b: ops.reshape(
                    ops.matmul(ops.reshape(x, (-1, D)), w) + b, (-1, ops.shape(x)[1], 5)
                ),
                (D, 5),
                (5,),
            ),
            L.GlobalAveragePooling1D(),
            L.Dense(3),
        ]
    ),
}


@pytest.mark.parametrize(
    "name, n",
    swept([(name, n) for name in OPEN for n in (6, None)], [("text", None)]),
)
def test_lengths_that_are_open_are_served(name, n):
    rng = np.random.default_rng(0)
    batches, shape = [], [n, None] if name != "steps side by side" else [n, None, D]
    for length in (5, 8, 3):
        x = rng.integers(1, 11, (6, length)).astype("int32")
        if len(shape) == 3:
            x = rng.normal(size=(6, length, D)).astype("float32")
        batches.append((x, rng.integers(0, 3, 6).astype("int32")))
    signature = tf.TensorSpec(shape, batches[0][0].dtype), tf.TensorSpec([n], "int32")
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    results = []
    for way in ("layerwise", "double_backward"):
        keras.utils.set_random_seed(3)
        model = OPEN[name]()
        rule = keras_rgd.epsilon.Fixed(3e-4)
        model.compile(keras_rgd.RGD(0.01, rule, per_example=way), cases.CROSSENTROPY())
        before = reference.flatten(model.trainable_variables)
        model.fit(data.repeat(), steps_per_epoch=3, shuffle=False, verbose=0)
        results.append(before - reference.flatten(model.trainable_variables))
        assert int(model.optimizer.epsilon_cuts) == 0
    assert reference.relative_error(*results) < 1e-5
