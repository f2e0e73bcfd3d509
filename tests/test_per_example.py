"""Per-example gradients: what they are, what is refused, and the facts of TensorFlow behind it."""

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from case_models import AddsLoss, MixesExamples
from cases import BY_NAME
from keras import layers as L
from wide import swept

import keras_rgd
from keras_rgd._support import arguments, vectors

CROSSENTROPY = cases.CROSSENTROPY


def compiled(*stack, shape=(5,), loss=None, cls=keras.Sequential, **kwargs):
    model = cls([keras.Input(shape), *stack])
    model.compile("sgd", CROSSENTROPY() if loss is None else loss, **kwargs)
    return model


def dense_batch(n=6, shape=(5,)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, *shape)).astype("float32"), rng.integers(0, 3, n)


# the three operations, measured (evaluation mode unless said)


MEASURED = [
    ("dense", "layerwise"),
    ("conv2d", "layerwise"),
    ("dropout", "layerwise"),
    ("batch_normalization", "layerwise"),
    ("embedding_mask_loss", "layerwise"),
    ("multi_head_attention", "layerwise"),
    ("depthwise_conv2d", "layerwise"),
    ("conv3d", "layerwise"),
    ("lstm", "one_by_one"),
    ("dictionaries", "layerwise"),
    ("weights_over_time", "layerwise"),
    ("regularizers", "layerwise"),
    ("shared_layer", "layerwise"),
    ("own_compute_loss", "layerwise"),
    ("dense", "vectorized_map"),
    ("batch_normalization", "vectorized_map"),
    ("weights_over_time", "vectorized_map"),
    ("regularizers", "double_backward"),
]


# Of the layers, whose forms have tests of their own, a few.
FEW = [("dropout", "layerwise"), ("embedding_mask_loss", "layerwise"), ("lstm", "one_by_one")]
FEW += [("weights_over_time", "vectorized_map"), ("regularizers", "double_backward")]


@pytest.mark.parametrize("name, way", swept(MEASURED, FEW))
def test_every_operation_equals_the_dense_one(name, way):
    case = BY_NAME[name]
    model, twin = steps.build(case), steps.build(case, "float64")
    x, y, weights = case.batch()
    case.compile(model, "adam")
    with steps.floatx("float64"):
        case.compile(twin, "adam")
        dense = reference.eager(
            twin, *steps.cast((x, y, weights), "float64"), case.loss_shape, training=False
        )
    state = [v.numpy() for v in model.variables]
    asked = "auto" if way in ("layerwise", "one_by_one") else way
    D = keras_rgd.diffusion_matrix(model, x, y, weights, per_example=asked)
    gradients = D.gradients
    assert gradients.way == way
    rng = np.random.default_rng(1)
    v, w = rng.normal(size=dense.G.shape[1]), rng.normal(size=len(dense.G))
    received = {
        "gradient": (reference.flatten(gradients.gradient), dense.v),
        "dot": (
            gradients.dot(D.vector(vectors.unflatten(v, gradients.weights))),
            dense.G @ v,
        ),
        "combine": (reference.flatten(gradients.combine(tf.constant(w, "float32"))), w @ dense.G),
        "gram": (D.gram(), dense.G @ dense.G.T),
        "eigenvalues": (D.eigenvalues(), np.linalg.eigvalsh(dense.K)[::-1][: len(D.eigenvalues())]),
    }
    for what, (ours, theirs) in received.items():
        assert reference.relative_error(np.asarray(ours, "float64"), theirs) < 1e-5, what
    assert float(gradients.loss) == pytest.approx(dense.loss, rel=1e-5)
    for a, b in zip(state, model.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("name", ["batch_normalization", "dropout"])
def test_training_mode_is_that_of_the_step(name):
    case = BY_NAME[name]
    model = case.compile(steps.build(case), "adam")
    x, y, _ = case.batch()
    state = [v.numpy() for v in model.variables]
    way = "auto" if name == "batch_normalization" else "double_backward"
    D = keras_rgd.diffusion_matrix(model, x, y, training=True, per_example=way)
    assert D.gradients.way == "double_backward"
    dense = steps.oracle(name, "graph")
    top = dense.lambda_max
    np.testing.assert_allclose(
        D.eigenvalues() / top, np.linalg.eigvalsh(dense.K)[::-1] / top, atol=1e-5
    )
    for a, b in zip(state, model.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize(
    "name, way, sizes",
    swept(
        [
            ("conv2d", "vectorized_map", (4,)),
            ("conv2d", "vectorized_map", (1, 100)),
            ("lstm", "auto", (4,)),
        ],
        [("conv2d", "vectorized_map", (4,))],
    ),
)
def test_chunks_change_no_number(name, way, sizes):
    case = BY_NAME[name]
    model = case.compile(steps.build(case), "adam")
    x, y, _ = case.batch()
    whole = keras_rgd.diffusion_matrix(model, x, y, per_example=way)
    v = whole.gradients.gradient
    gram, product = whole.gram(), reference.flatten(whole.matvec(v))
    for size in sizes:
        parts = keras_rgd.diffusion_matrix(model, x, y, per_example=way, chunk_size=size)
        np.testing.assert_allclose(parts.gram(), gram, rtol=1e-5, atol=1e-6)
        received = reference.flatten(parts.matvec(v))
        np.testing.assert_allclose(received, product, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_diverged_model_are_refused():
    model = compiled(L.Dense(3))
    model.set_weights([np.full((5, 3), np.nan), np.zeros(3)])
    D = keras_rgd.diffusion_matrix(model, *dense_batch())
    with pytest.raises(ValueError, match="not finite"):
        D.eigenvalues()


def test_gradients_far_from_1_keep_their_digits():
    x, y = dense_batch()
    plain = keras_rgd.diffusion_matrix(compiled(L.Dense(3, name="a")), x, y)
    weights = [w.numpy() for w in plain.gradients.weights]
    for scale in (1e-18, 1e18):
        model = compiled(L.Dense(3), loss_weights=scale)
        model.set_weights(weights)
        D = keras_rgd.diffusion_matrix(model, x, y)
        np.testing.assert_allclose(
            D.eigenvalues()[:5] / scale**2, plain.eigenvalues()[:5], rtol=1e-4
        )


# what has no per-example gradients


def scalar_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred[:, 0] - keras.ops.cast(y_true, "float32")))


class IgnoresWeights(keras_rgd.RGDSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred))


class SquaresWeights(keras_rgd.RGDSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        w = 1.0 if sample_weight is None else keras.ops.square(sample_weight)
        return keras.ops.mean(w * keras.ops.sum(keras.ops.square(y_pred), axis=-1))


MEAN_BY_WEIGHT = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, reduction="mean_with_sample_weight"
)

NOT_SUMS = [
    (keras_rgd.RGDSequential, scalar_loss, "one value for each example"),
    (keras_rgd.RGDSequential, MEAN_BY_WEIGHT, "mean_with_sample_weight"),
    (
        keras_rgd.RGDSequential,
        keras.losses.SparseCategoricalCrossentropy(reduction=None),
        "reduced to a scalar",
    ),
    (IgnoresWeights, "mse", "must use its `sample_weight` argument"),
    (SquaresWeights, "mse", "linear in the sample weights"),
]


@pytest.mark.parametrize("way", ["double_backward", "vectorized_map"])
@pytest.mark.parametrize("cls, loss, match", NOT_SUMS, ids=[m for _, _, m in NOT_SUMS])
def test_a_loss_that_is_no_sum_over_examples_is_refused(cls, loss, match, way):
    model = cls([keras.Input((5,)), L.Dense(3)])
    model.compile(keras_rgd.RGD(0.1, per_example=way), loss)
    before = reference.flatten(model.trainable_variables)
    x, y = dense_batch()
    for measure in (model.train_on_batch, lambda x, y: keras_rgd.diffusion_matrix(model, x, y)):
        with pytest.raises(ValueError, match=match):
            measure(x, y)
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)


def test_add_loss_without_a_loss_is_refused():
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(3), AddsLoss()])
    model.compile(keras_rgd.RGD(0.1))
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match="`add_loss` alone"):
        model.train_on_batch(dense_batch()[0])
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)


# one example a lane: exact or refused


def unfit(name):
    """(layers, the words of the refusal) for models that one example a lane cannot serve."""
    return {
        "dropout": ([L.Dropout(0.5, name="drop")], "'drop' (Dropout) draws random numbers"),
        "noise_without_state": ([RandomWithoutSeed(name="noise")], "'noise' (RandomWithoutSeed)"),
        "batch_normalization": ([L.BatchNormalization(name="bn")], "'bn' (BatchNormalization)"),
        "batch_mean": (
            [MixesExamples(name="mix")],
            "'mix' (MixesExamples) gives an example",
        ),
        "nested": (
            [keras.Sequential([L.Dense(4), MixesExamples(name="mix")], name="inner")],
            "'mix' (MixesExamples)",
        ),
        "depthwise": (
            [L.Reshape((5, 1, 1)), L.DepthwiseConv2D((2, 1), name="dw"), L.Flatten()],
            "'dw' (DepthwiseConv2D)",
        ),
        "recurrent": ([L.Reshape((5, 1)), L.GRU(2, name="gru")], "'gru' (GRU)"),
    }[name]


class RandomWithoutSeed(L.Layer):
    """Draws from TensorFlow's own generator, which no seed variable shows."""

    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


UNFIT = [
    "dropout",
    "noise_without_state",
    "batch_normalization",
    "batch_mean",
    "nested",
    "depthwise",
]
UNFIT = [
    *((name, "graph") for name in (*UNFIT, "recurrent")),
    ("dropout", "xla"),
    ("recurrent", "xla"),
]


@pytest.mark.parametrize("name, mode", swept(UNFIT, UNFIT[:-2]))
def test_vectorized_map_refuses_by_the_layers_name_and_changes_nothing(name, mode):
    stack, words = unfit(name)
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(5), *stack, L.Dense(3)])
    optimizer = keras_rgd.RGD(0.1, per_example="vectorized_map")
    model.compile(optimizer, CROSSENTROPY(), metrics=["accuracy"], jit_compile=mode == "xla")
    before = [v.numpy() for v in model.variables]
    with pytest.raises(ValueError) as refusal:
        model.fit(*dense_batch(), verbose=0)
    assert words in str(refusal.value)
    assert "Write per_example='double_backward'" in str(refusal.value)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_a_batch_of_one_does_not_hide_that_others_mix():
    model = keras_rgd.RGDSequential([keras.Input((5,)), MixesExamples(), L.Dense(3)])
    model.compile(keras_rgd.RGD(0.1, per_example="vectorized_map"), CROSSENTROPY())
    x, y = dense_batch()
    with pytest.raises(ValueError, match="MixesExamples"):
        model.train_on_batch(x[:1], y[:1])


class Shift(L.Layer):
    """Mixes only examples `by` apart, and leaves the first `by` alone."""

    def __init__(self, by):
        super().__init__(name="shift")
        self.by = by

    def call(self, x):
        return x + 0.5 * keras.ops.pad(x, [[self.by, 0], [0, 0]])[: keras.ops.shape(x)[0]]


@pytest.mark.parametrize("by", [1, 2, 3, 5])
def test_mixing_is_seen_between_any_two_examples(by):
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(3), Shift(by)])
    model.compile(keras_rgd.RGD(1.0, per_example="vectorized_map"), CROSSENTROPY())
    x, y = dense_batch()
    with pytest.raises(ValueError, match=r"Layer 'shift' \(Shift\) gives an example an output"):
        model.train_on_batch(x, y)
    plain = compiled(*model.layers)
    assert keras_rgd.diffusion_matrix(plain, x, y).gradients.way == "double_backward"


def contrast_all(y_true, y_pred):
    """Depends on the mean of all outputs."""
    return keras.ops.sum(keras.ops.square(y_pred - 1 - keras.ops.mean(y_pred, axis=0)), axis=-1)


def contrast_in_class(y_true, y_pred):
    """Depends on the outputs of the same class alone."""
    y = keras.ops.cast(keras.ops.reshape(y_true, (-1, 1)), y_pred.dtype)
    same = keras.ops.cast(keras.ops.equal(y, keras.ops.transpose(y)), y_pred.dtype)
    mean = keras.ops.matmul(same, y_pred) / keras.ops.sum(same, axis=1, keepdims=True)
    return keras.ops.sum(keras.ops.square(y_pred - 1 + mean), axis=-1)


@pytest.mark.parametrize("loss", [contrast_all, contrast_in_class])
@pytest.mark.parametrize("start", ["glorot_uniform", "zeros"])
def test_a_loss_that_mixes_examples_is_refused(loss, start):
    x, _ = dense_batch()
    y = np.array([0, 1, 1, 2, 2, 2])  # example 0 has no other of its class
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(3, kernel_initializer=start)])
    model.compile(keras_rgd.RGD(1.0, per_example="vectorized_map"), loss)
    with pytest.raises(ValueError, match="loss of one example depends on the outputs of other"):
        model.train_on_batch(x, y)
    plain = compiled(*model.layers, loss=loss)
    assert keras_rgd.diffusion_matrix(plain, x, y).gradients.way == "double_backward"


class Penalised(keras_rgd.RGDSequential):
    """A small part of its loss reaches the weights without the output."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 1e-3 * keras.ops.sum(keras.ops.square(self.layers[0].bias))


def test_a_small_part_of_the_loss_that_the_lanes_miss_is_refused_by_the_weights_name():
    model = Penalised([keras.Input((5,)), L.Dense(3, name="head"), L.Dense(3)])
    model.layers[0].bias.assign([1.0, 2.0, 3.0])
    model.compile(keras_rgd.RGD(1.0, per_example="vectorized_map"), CROSSENTROPY())
    with pytest.raises(ValueError, match="gradients of '.*head/bias' is not the batch's"):
        model.train_on_batch(*dense_batch())


@pytest.mark.parametrize("name", swept(["stateful", "spectral"], ["spectral"]))
def test_measuring_leaves_states_and_assigned_kernels_as_they_were(name):
    stack = {
        "stateful": [L.Reshape((2, 1)), L.SimpleRNN(2, stateful=True, name="rnn")],
        "spectral": [L.SpectralNormalization(L.Dense(4), name="norm")],
    }[name]
    model = keras.Sequential([keras.Input(batch_shape=(2, 2)), *stack, L.Dense(3)])
    model.compile("sgd", CROSSENTROPY())
    x, y = dense_batch(2, (2,))
    model.train_on_batch(x, y)
    state = list(model.variables)
    if name == "stateful":
        state += model.get_layer("rnn").states
    before = [v.numpy() for v in state]
    for training in (False, True):
        first, second = (
            keras_rgd.diffusion_matrix(model, x, y, training=training).eigenvalues()
            for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
    for a, b in zip(before, state, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


class Counting(keras.Sequential):
    """Its loss updates a metric."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        self.seen.update_state(y_pred)
        return super().compute_loss(x, y, y_pred, sample_weight, **kwargs)


@pytest.mark.parametrize("way", ["layerwise", "one_by_one"])
def test_measuring_leaves_metrics_of_a_loss_as_they_were(way):
    stack = [L.Dense(4)] if way == "layerwise" else [L.Reshape((5, 1)), L.SimpleRNN(2)]
    model = Counting([keras.Input((5,)), *stack, L.Dense(3)])
    model.seen = keras.metrics.Mean("seen")
    model.compile("sgd", CROSSENTROPY())
    D = keras_rgd.diffusion_matrix(model, *dense_batch())
    assert D.gradients.way == way
    assert D.top_eigenvalue() > 0
    assert model.seen.count == 0


class Rematerialised(L.Dense):
    """A layer whose activations are computed again in the backward pass."""

    def call(self, x):
        def forward(x):
            return L.Dense.call(self, x)

        return keras.remat(forward)(x)


@pytest.mark.skipif(not hasattr(keras, "remat"), reason="this Keras has no remat yet")
def test_a_layer_without_a_second_derivative_is_refused():
    model = keras_rgd.RGDSequential([keras.Input((5,)), Rematerialised(4), L.Dense(3)])
    model.compile(keras_rgd.RGD(0.1), CROSSENTROPY())
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match="use per_example='vectorized_map'"):
        model.train_on_batch(*dense_batch())
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)


def test_the_memory_of_a_gram_matrix_by_double_backward_follows_chunk_size():
    """In small chunks no N x d is formed: each column is a product with D's factors."""
    case = BY_NAME["batch_normalization"]
    model = case.compile(steps.build(case), "adam")
    x, y, _ = case.batch()
    options = {"training": True, "per_example": "double_backward"}
    whole = keras_rgd.diffusion_matrix(model, x, y, **options)
    small = keras_rgd.diffusion_matrix(model, x, y, chunk_size=2, **options)
    np.testing.assert_allclose(small.gram(), whole.gram(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        small.eigenvalues(), whole.eigenvalues(), rtol=1e-4, atol=1e-5 * whole.top_eigenvalue()
    )


# dtypes


@pytest.mark.parametrize(
    "first, last", [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float32")]
)
def test_weights_may_have_several_dtypes(first, last):
    def build(a, b):
        model = compiled(L.Dense(4, "tanh", dtype=a), L.Dense(3, dtype=b))
        rng = np.random.default_rng(0)
        model.set_weights(
            [rng.normal(size=w.shape).astype("float32").astype("bfloat16") for w in model.weights]
        )
        return model

    x, y = dense_batch()
    mixed = keras_rgd.diffusion_matrix(build(first, last), x, y)
    plain = keras_rgd.diffusion_matrix(build("float32", "float32"), x, y)
    tolerance = 0.05 if first == "bfloat16" else 1e-5
    assert mixed.top_eigenvalue() == pytest.approx(plain.top_eigenvalue(), rel=tolerance)
    assert mixed.gradients.dtype == max(first, "float32", last)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="'linearized'. Received: per_example='jacobian'"):
        arguments.check_way("jacobian")


def test_a_way_of_another_backend_is_refused():
    model = keras_rgd.RGDSequential([keras.Input((2,)), L.Dense(1)])
    model.compile(keras_rgd.RGD(per_example="linearized"), "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    for measure in (
        lambda: model.fit(x, y, verbose=0),
        lambda: keras_rgd.diffusion_matrix(model, x, y, per_example="linearized"),
        lambda: keras_rgd.spectrum(model, (x, y), per_example="linearized"),
    ):
        with pytest.raises(ValueError, match="On the tensorflow backend .* set KERAS_BACKEND=jax"):
            measure()


# the facts of TensorFlow that the checks stand on


def lanes(function, x):
    return tf.function(lambda: tf.vectorized_map(function, x))()


def test_tensorflow_gives_all_lanes_one_dropout_mask():
    drop, x = L.Dropout(0.5), tf.ones([4, 200])
    apart = lanes(lambda row: drop(row[None], training=True)[0], x).numpy()
    assert np.all(apart == apart[0])
    assert np.any(drop(x, training=True).numpy() != drop(x, training=True).numpy()[0])


def test_tensorflow_normalises_a_lane_by_itself():
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 5)), tf.float32)
    normalise = L.BatchNormalization()
    normalise.build((None, 5))
    apart = lanes(lambda row: normalise(row[None], training=True)[0], x).numpy()
    np.testing.assert_array_equal(apart, np.zeros((4, 5)))


def row_gradient(layer):
    def gradient(row):
        with tf.GradientTape() as tape:
            output = tf.reduce_sum(tf.square(layer(row[None])))
        return tape.gradient(output, layer.trainable_weights[0].value)

    return gradient


@pytest.mark.parametrize(
    "layer, shape, jit_compile",
    [
        (L.DepthwiseConv2D(2), (4, 4, 1), False),
        (L.Conv3D(1, 2), (3, 3, 3, 1), False),
        (L.LSTM(2), (3, 2), True),
    ],
    ids=["DepthwiseConv2D", "Conv3D", "LSTM under XLA"],
)
def test_tensorflow_cannot_vectorize(layer, shape, jit_compile):
    layer.build((None, *shape))
    gradient = row_gradient(layer)

    @tf.function(jit_compile=jit_compile)
    def rows(x):
        return tf.vectorized_map(gradient, x, fallback_to_while_loop=False)

    with pytest.raises((ValueError, tf.errors.UnimplementedError)):
        rows(tf.ones([2, *shape]))


def test_tensorflow_has_no_forward_mode_for_recurrent_layers():
    layer, x = L.LSTM(2), tf.ones([2, 3, 2])
    layer.build(x.shape)
    kernel = layer.trainable_weights[0].value
    with pytest.raises(Exception):  # noqa: B017
        with tf.autodiff.ForwardAccumulator(kernel, tf.ones_like(kernel)) as forward:
            y = tf.function(lambda: layer(x))()
        assert forward.jvp(y) is not None


def test_two_forward_passes_draw_two_masks_and_xla_draws_others():
    drop, x = L.Dropout(0.5, seed=1), tf.ones([4, 50])
    seeds = drop.seed_generator.state

    def masks(jit_compile):
        seeds.assign([0, 1])
        run = tf.function(
            lambda: (drop(x, training=True), drop(x, training=True)), jit_compile=jit_compile
        )
        return [m.numpy() for m in run()]

    first, second = masks(False)
    assert np.any(first != second)
    assert np.any(masks(True)[0] != first)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="off only on a CPU")
def test_jit_compile_auto_is_off_on_a_cpu():
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(3)])
    model.compile(keras_rgd.RGD(), "mse", jit_compile="auto")
    assert model.jit_compile is False
