"""`spectrum`: each method against a dense D in float64, on real digits and on unlike layers."""

import dataclasses
import functools
import math

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from keras import layers as L
from sklearn.datasets import load_digits
from wide import swept

import keras_rgd

METHODS = ("gram", "covariance", "iterative")
EPS32 = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Digits:
    """A trained network with its data, and all g_i in float64."""

    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    G: np.ndarray

    @property
    def data(self):
        return self.x, self.y

    @property
    def eigenvalues(self):
        return np.maximum(np.linalg.eigvalsh(reference.Dense(self.G, None).D)[::-1], 0)


@pytest.fixture(scope="module")
def digits():
    keras.utils.set_random_seed(0)
    images, y = load_digits(return_X_y=True)
    x = (images / 16).astype("float32")
    hidden, normalization = L.Dense(12), L.BatchNormalization()
    head = L.Dense(10)
    model = keras.Sequential(
        [keras.Input((64,)), hidden, normalization, L.ReLU(), L.Dropout(0.1), head]
    )
    model.compile("adam", cases.CROSSENTROPY())
    model.fit(x, y, epochs=3, verbose=0)
    return Digits(model, x, y, logistic_gradients(x, y, hidden, normalization, head))


def logistic_gradients(x, y, hidden, normalization, head):
    """G of dense - normalization - relu - dense in evaluation mode, by hand in float64."""
    W, b = (w.astype(float) for w in hidden.get_weights())
    gamma, beta, mean, variance = (w.astype(float) for w in normalization.get_weights())
    V, c = (w.astype(float) for w in head.get_weights())
    scale = 1 / np.sqrt(variance + normalization.epsilon)
    a = (x.astype(float) @ W + b - mean) * scale
    h = np.maximum(gamma * a + beta, 0)
    logits = h @ V + c
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    r = p - np.eye(10)[y]
    s = (r @ V.T) * (h > 0)
    z = s * gamma * scale
    outer = lambda a, b: (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)  # noqa: E731
    return np.concatenate([outer(x.astype(float), z), z, s * a, s, outer(h, r), r], axis=1)


def measured(digits, **options):
    return keras_rgd.spectrum(digits.model, digits.data, verbose=False, **options)


@pytest.mark.parametrize("batch_size", swept([300, 1797], [300]))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_dense_D(method, batch_size, digits):
    s = measured(digits, method=method, batch_size=batch_size, k=20)
    expected = digits.eigenvalues
    np.testing.assert_allclose(s.eigenvalues, expected[:20], rtol=1e-4)
    np.testing.assert_allclose(s.trace, expected.sum(), rtol=1e-5)
    assert (s.n_examples, s.n_weights) == digits.G.shape
    assert (s.method, s.mode, s.per_example) == (method, "evaluation", "layerwise")
    v = digits.G.mean(0)
    np.testing.assert_allclose(s.gradient_norm, np.linalg.norm(v), rtol=1e-5)
    n, squares = len(digits.G), np.mean(np.sum(digits.G**2, 1))
    scale = n * (squares - v @ v) / (n * v @ v - squares)
    np.testing.assert_allclose(s.noise_scale, scale, rtol=1e-4)


@pytest.mark.parametrize("method", ["gram", "covariance"])
def test_what_follows_from_all_eigenvalues(method, digits):
    s = measured(digits, method=method)
    every, d = digits.eigenvalues, digits.G.shape[1]
    cut = every[0] * d * EPS32
    assert len(s.eigenvalues) == d
    assert s.rank_rule == "reference" and not s.rank_is_lower_bound
    assert s.rank == np.sum(every > cut)
    assert s.rank_bound == d  # of min(N - 1, d)
    np.testing.assert_allclose(s.rank_cut, cut, rtol=1e-5)
    np.testing.assert_allclose(
        [s.eigenvalue_mean, s.eigenvalue_std, s.clipped_mean, s.clipped_std],
        [every.mean(), every.std(), np.maximum(every, cut).mean(), np.maximum(every, cut).std()],
        rtol=1e-4,
    )


def test_the_rank_of_few_leading_eigenvalues_is_a_lower_bound(digits):
    s = measured(digits, method="iterative", batch_size=1797)
    assert len(s.eigenvalues) == 32
    assert s.rank == 32 and s.rank_is_lower_bound
    assert math.isnan(s.clipped_mean) and math.isnan(s.eigenvalue_std)
    np.testing.assert_allclose(s.eigenvalue_mean, digits.eigenvalues.mean(), rtol=1e-5)


def test_the_rank_is_known_once_an_eigenvalue_is_below_the_cut():
    # Two gradients, each of many examples, make a D of rank 1.
    model = keras.Sequential([keras.Input((30,)), L.Dense(1)])
    model.compile("sgd", "mse")
    x = np.repeat(np.random.default_rng(0).normal(size=(2, 30)), 20, axis=0).astype("float32")
    s = keras_rgd.spectrum(model, (x, np.ones(40)), method="iterative", k=3, verbose=False)
    assert s.rank == 1 and not s.rank_is_lower_bound
    cut = s.lambda_max * 31 * EPS32
    expected = np.r_[s.lambda_max, np.full(30, cut)]
    np.testing.assert_allclose([s.clipped_mean, s.clipped_std], [expected.mean(), expected.std()])


def test_residuals_bound_the_error(digits):
    s = measured(digits, method="iterative", k=5, batch_size=1797)
    assert np.all(s.residuals <= 1e-3 * s.eigenvalues)
    off = np.abs(s.eigenvalues - digits.eigenvalues[:5])
    assert np.all(off <= s.residuals + 1e-6 * s.lambda_max)


def test_a_gram_matrix_in_blocks_is_the_same(digits):
    whole = measured(digits, method="gram", examples=300, batch_size=32)
    room = 16 * 300**2 + 4 * digits.G.shape[1] * (3 * 32 + 64)
    blocks = measured(digits, method="gram", examples=300, batch_size=32, memory_limit=room)
    np.testing.assert_allclose(blocks.eigenvalues[:50], whole.eigenvalues[:50], rtol=1e-5)
    np.testing.assert_allclose(blocks.trace, whole.trace, rtol=1e-6)


def test_the_cheaper_exact_method_that_fits_is_taken(digits):
    assert measured(digits, examples=200).method == "gram"
    assert measured(digits).method == "covariance"
    assert measured(digits, k=1, batch_size=600, memory_limit=8 * 10**6).method == "iterative"


def test_a_method_that_does_not_fit_is_refused_with_the_figures(digits):
    message = "'gram' does not fit: for N = 1,797 examples and d = 934 .*GiB"
    with pytest.raises(ValueError, match=message):
        measured(digits, method="gram", memory_limit=2**20)


def test_the_model_is_left_as_it_was(digits):
    before = [v.numpy() for v in [*digits.model.variables, *digits.model.optimizer.variables]]
    measured(digits, examples=50)
    after = [v.numpy() for v in [*digits.model.variables, *digits.model.optimizer.variables]]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


# data


def as_tf_data(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(33)


class AsPyDataset(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // 50)

    def __getitem__(self, i):
        return self.x[50 * i : 50 * (i + 1)], self.y[50 * i : 50 * (i + 1)]


@pytest.mark.parametrize("kind", [as_tf_data, AsPyDataset])
def test_data_sets_give_what_their_arrays_give(kind, digits):
    x, y = digits.x[:210], digits.y[:210]
    of_arrays = keras_rgd.spectrum(digits.model, (x, y), verbose=False)
    of_dataset = keras_rgd.spectrum(digits.model, kind(x, y), batch_size=64, verbose=False)
    assert of_dataset.n_examples == 210
    np.testing.assert_allclose(of_dataset.eigenvalues[:50], of_arrays.eigenvalues[:50], rtol=1e-4)
    first = keras_rgd.spectrum(
        digits.model, kind(*digits.data), examples=210, batch_size=64, verbose=False
    )
    np.testing.assert_array_equal(first.eigenvalues, of_dataset.eigenvalues)


def test_examples_of_arrays_are_drawn_by_the_seed(digits):
    one, again, other = (measured(digits, examples=100, seed=seed).trace for seed in (1, 1, 2))
    assert one == again != other
    chosen = np.sort(np.random.default_rng(1).choice(1797, 100, replace=False))
    np.testing.assert_allclose(one, np.trace(reference.Dense(digits.G[chosen], None).D), rtol=1e-5)


def test_a_data_set_that_shuffles_is_refused(digits):
    data = tf.data.Dataset.from_tensor_slices(digits.data).shuffle(2000, seed=0).batch(64)
    with pytest.raises(ValueError, match="other examples than before.*reshuffle_each_iteration"):
        keras_rgd.spectrum(digits.model, data, verbose=False)


def test_a_data_set_without_end_needs_examples(digits):
    data = as_tf_data(*digits.data).repeat()
    with pytest.raises(ValueError, match="repeats without end.*`examples`"):
        keras_rgd.spectrum(digits.model, data, verbose=False)
    assert keras_rgd.spectrum(digits.model, data, examples=70, verbose=False).n_examples == 70


def test_a_data_set_that_ends_early_the_next_time_is_refused(digits):
    passes = iter([200, 200, 200, 100, 100])

    def examples():
        for i in range(next(passes)):
            yield digits.x[i], digits.y[i]

    signature = (tf.TensorSpec((64,), tf.float32), tf.TensorSpec((), tf.int64))
    data = tf.data.Dataset.from_generator(examples, output_signature=signature).batch(50)
    with pytest.raises(ValueError, match="other examples than before in its batch 2"):
        keras_rgd.spectrum(digits.model, data, verbose=False)


class Labelled:
    """What a pandas Series of another order than its index is to an indexing caller."""

    def __init__(self, values, index):
        self.values, self.index = values, index
        self.shape, self.dtype = values.shape, values.dtype

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def __getitem__(self, labels):
        return self.values[[np.flatnonzero(self.index == label)[0] for label in labels]]


def test_examples_are_drawn_by_position_not_by_label(digits):
    x, y = digits.x[:200], digits.y[:200]
    shuffled = Labelled(y, np.random.default_rng(0).permutation(200))
    options = dict(examples=50, verbose=False)
    expected = keras_rgd.spectrum(digits.model, (x, y), **options).trace
    assert keras_rgd.spectrum(digits.model, (x, shuffled), **options).trace == expected


def test_text_is_read_from_data_sets():
    words = np.array(["a b", "b c c", "a", "d a b", "c", "b b"])
    y = np.arange(6) % 2
    vectors = L.TextVectorization(output_mode="multi_hot", vocabulary=["a", "b", "c", "d"])
    model = keras.Sequential([keras.Input((), dtype="string"), vectors, L.Dense(2)])
    model.compile("sgd", cases.CROSSENTROPY())
    data = tf.data.Dataset.from_tensor_slices((words, y)).batch(4)
    s = keras_rgd.spectrum(model, data, batch_size=3, verbose=False)
    D = keras_rgd.diffusion_matrix(model, tf.constant(words), y)
    np.testing.assert_allclose(s.eigenvalues, D.eigenvalues(), rtol=1e-4, atol=1e-8)


def test_examples_of_unlike_shapes_are_refused():
    model = keras.Sequential([keras.Input((None, 2)), L.GlobalAveragePooling1D(), L.Dense(1)])
    model.compile("sgd", "mse")
    lengths = tf.data.Dataset.range(1, 9)
    data = lengths.map(lambda n: (tf.ones([n, 2]), 1.0)).padded_batch(2)
    with pytest.raises(ValueError, match="unlike shapes.*padded to one length"):
        keras_rgd.spectrum(model, data, batch_size=3, verbose=False)


# layers


@functools.cache
def model_and_dense(name):
    """A case's model, and D in evaluation mode."""
    case = BY_NAME[name]
    model, twin = steps.build(case), steps.build(case, "float64")
    case.compile(model, "sgd")
    with steps.floatx("float64"):
        case.compile(twin, "sgd")
        batch = steps.cast(case.batch(), "float64")
        return model, reference.eager(twin, *batch, case.loss_shape, training=False)


LAYERS = ["conv2d", "batch_normalization", "dropout", "lstm", "dictionaries", "weights_over_time"]
LAYERS += ["regularizers", "shared_layer"]
FEW = [("conv2d", "gram"), ("regularizers", "iterative"), ("lstm", "covariance")]


@pytest.mark.parametrize(
    "name, method", swept([(name, method) for name in LAYERS for method in METHODS], FEW)
)
def test_any_layer_and_loss(name, method):
    model, dense = model_and_dense(name)
    batch = BY_NAME[name].batch()
    s = keras_rgd.spectrum(model, batch, method=method, batch_size=4, k=3, verbose=False)
    keras_rgd.forget(model)  # no other test needs its traces
    assert s.rank_bound == len(dense.G) - 1
    expected = np.maximum(dense.eigenvalues, 0)
    np.testing.assert_allclose(s.eigenvalues, expected[:3], rtol=1e-4, atol=1e-6 * expected[0])
    np.testing.assert_allclose(s.trace, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(s.gradient_norm, np.linalg.norm(dense.v), rtol=1e-5)


def test_training_mode_is_that_of_the_batch():
    case = BY_NAME["batch_normalization"]
    model, twin = steps.build(case), steps.build(case, "float64")
    case.compile(model, "sgd")
    with steps.floatx("float64"):
        case.compile(twin, "sgd")
        dense = reference.eager(twin, *steps.cast(case.batch(), "float64"), case.loss_shape)
    s = keras_rgd.spectrum(model, case.batch(), training=True, verbose=False)
    assert (s.mode, s.per_example) == ("training", "double_backward")
    np.testing.assert_allclose(s.eigenvalues[:4], dense.eigenvalues[:4], rtol=1e-4)


def test_in_training_mode_each_batch_draws_its_own_masks_in_every_pass():
    model = keras.Sequential([keras.Input((6,)), L.Dropout(0.5), L.Dense(3)])
    model.compile("sgd", "mse")
    data = np.ones((64, 6), "float32"), np.ones((64, 3), "float32")
    one, again, in_batches = (
        keras_rgd.spectrum(model, data, training=True, batch_size=size, verbose=False)
        for size in (64, 64, 4)
    )
    np.testing.assert_array_equal(one.eigenvalues, again.eigenvalues)
    # All batches with the masks of the first would give 4 unlike gradients.
    assert in_batches.rank > 8
    room = 16 * 64**2 + 4 * 21 * (3 * 4 + 20)
    blocks, iterated = (
        keras_rgd.spectrum(model, data, training=True, batch_size=4, verbose=False, **options)
        for options in ({"method": "gram", "memory_limit": room}, {"method": "iterative", "k": 3})
    )
    for other in (blocks, iterated):
        np.testing.assert_allclose(other.eigenvalues[:3], in_batches.eigenvalues[:3], rtol=1e-4)
        np.testing.assert_allclose(other.trace, in_batches.trace, rtol=1e-5)
    np.testing.assert_allclose(in_batches.trace, one.trace, rtol=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_D_beside_a_large_gradient_keeps_its_digits(method):
    rng = np.random.default_rng(0)
    x = (1 + 0.01 * rng.normal(size=(200, 5))).astype("float32")
    model = keras.Sequential([keras.Input((5,)), L.Dense(1)])
    model.compile("sgd", "mse")
    w, b = (a.astype(float) for a in model.get_weights())
    r = 2 * (x @ w + b - 30)
    dense = reference.Dense(np.concatenate([r * x, r], axis=1), None)
    data = x, np.full((200, 1), 30.0)
    s = keras_rgd.spectrum(model, data, method=method, k=3, batch_size=64, verbose=False)
    assert s.gradient_norm**2 > 1000 * s.trace
    np.testing.assert_allclose(s.eigenvalues, dense.eigenvalues[:3], rtol=1e-4)
    np.testing.assert_allclose(s.trace, np.trace(dense.D), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_equal_gradients_have_no_spectrum(method):
    model = keras.Sequential([keras.Input((9,)), L.Dense(2)])
    model.compile("sgd", "mse")
    x, y = np.ones((20, 9), "float32"), np.ones((20, 2), "float32")
    s = keras_rgd.spectrum(model, (x, y), method=method, k=2, batch_size=6, verbose=False)
    assert s.lambda_max == 0 and s.rank == 0
    assert s.trace <= 1e-6 * s.gradient_norm**2


@pytest.fixture(scope="module")
def scaled(digits):
    """The network of `digits` with a factor in its loss, and that factor."""
    factor = tf.Variable(1.0)
    model = keras.Sequential(digits.model.layers)

    def loss(y, p):
        return factor * keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)

    model.compile("sgd", loss)
    return model, factor


@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_loss_scales_the_spectrum_by_its_square(method, scaled, digits):
    model, factor = scaled
    options = dict(method=method, k=5, examples=200, batch_size=200, verbose=False)
    own = keras_rgd.spectrum(digits.model, digits.data, **options)
    for scale in (1e-12, 1e12):
        factor.assign(scale)
        s = keras_rgd.spectrum(model, digits.data, **options)
        np.testing.assert_allclose(s.eigenvalues, scale**2 * own.eigenvalues, rtol=1e-4)
        np.testing.assert_allclose(s.trace, scale**2 * own.trace, rtol=1e-5)


# refusals


def test_a_loss_that_changes_with_the_batch_is_refused(digits):
    model = keras.Sequential(digits.model.layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match="changes with the batch.*'sum_over_batch_size'"):
        keras_rgd.spectrum(model, digits.data, verbose=False)


def test_a_sum_over_batches_of_one_fixed_size_is_refused():
    model = keras.Sequential([keras.Input(batch_shape=(6, 5)), L.BatchNormalization(), L.Dense(3)])
    data = np.ones((12, 5), "float32"), np.ones((12, 3), "float32")
    model.compile("sgd", "mse")
    assert keras_rgd.spectrum(model, data, batch_size=6, verbose=False).n_examples == 12
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(ValueError, match="changes with the batch"):
        keras_rgd.spectrum(model, data, batch_size=6, verbose=False)


@pytest.mark.parametrize("example", [0, 1000])
def test_gradients_that_are_not_finite_are_refused(example, digits):
    x = digits.x.copy()
    x[example] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        keras_rgd.spectrum(digits.model, (x, digits.y), verbose=False)


def test_a_masked_loss_is_refused_also_where_the_first_examples_have_no_mask():
    model = keras.Sequential([keras.Input((4,)), L.Embedding(9, 3, mask_zero=True), L.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((80, 4), "int32")
    x[40:, 2:] = 0
    with pytest.raises(ValueError, match="a masked output"):
        keras_rgd.spectrum(model, (x, np.ones((80, 4, 1))), verbose=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "`k` must be a positive integer or None"),
        ({"k": 2000}, r"at most min\(N, d\) = 934 eigenvalues.*Received: k=2000"),
        ({"batch_size": 2.5}, "`batch_size` must be a positive integer. Received: batch_size=2.5"),
        ({"examples": -1}, "`examples` must be"),
        ({"memory_limit": 0}, "`memory_limit` must be"),
        ({"method": "lanczos"}, "`method` must be one of 'auto', 'gram'"),
        ({"per_example": "hooks"}, "`per_example` must be one of"),
        ({"method": "iterative", "k": 934}, "Write method='covariance'"),
    ],
)
def test_bad_arguments_are_refused(options, message, digits):
    with pytest.raises(ValueError, match=message):
        measured(digits, **options)


def test_data_that_is_no_data_is_refused(digits):
    with pytest.raises(ValueError, match="must be a tuple.*Received: int"):
        keras_rgd.spectrum(digits.model, 3)
    with pytest.raises(ValueError, match="same positive length.*x \\[5\\], y \\[4\\]"):
        keras_rgd.spectrum(digits.model, (digits.x[:5], digits.y[:4]))
    with pytest.raises(ValueError, match="not compiled"):
        keras_rgd.spectrum(keras.Sequential([keras.Input((2,)), L.Dense(1)]), digits.data)


# the record


def test_a_spectrum_survives_its_file(digits, tmp_path):
    for s in (
        measured(digits, examples=30),
        measured(digits, method="iterative", k=1, examples=100),
    ):
        s.save(tmp_path / "spectrum.json")
        read = keras_rgd.Spectrum.load(tmp_path / "spectrum.json")
        for field in dataclasses.fields(s):
            a, b = getattr(s, field.name), getattr(read, field.name)
            np.testing.assert_array_equal(a, b)
            assert type(a) is type(b)


def test_a_spectrum_cannot_be_changed(digits):
    s = measured(digits, examples=30)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.trace = 0.0
    with pytest.raises(ValueError, match="read-only"):
        s.eigenvalues[0] = 0.0


def test_a_file_of_records_is_no_spectrum(tmp_path):
    keras_rgd.save_records([], tmp_path / "records.json")
    with pytest.raises(ValueError, match="written by Spectrum.save. Received: .*records.json"):
        keras_rgd.Spectrum.load(tmp_path / "records.json")
    (tmp_path / "cut.json").write_text('{"keras_rgd_spectrum": 1}')
    with pytest.raises(ValueError, match="Expected the fields of Spectrum. Received: .*cut.json"):
        keras_rgd.Spectrum.load(tmp_path / "cut.json")


def test_progress_is_shown_with_the_time_that_remains(digits, capsys):
    keras_rgd.spectrum(digits.model, digits.data, examples=30)
    shown = capsys.readouterr().out
    assert "Gram matrix, examples 0 to 30 of 30" in shown and "remaining" in shown
    measured(digits, examples=30)
    assert capsys.readouterr().out == ""
