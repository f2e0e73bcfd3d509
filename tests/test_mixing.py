"""What a graph shows of a model's examples, against the Jacobian of their losses."""

import cases
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import layers as L
from keras import ops
from wide import swept

import keras_rgd
from keras_rgd.per_example import Batch, ExampleLosses
from keras_rgd.per_example.mixing import mixing_of

N, T, D = 6, 4, 4


@tf.custom_gradient
def normalised_backward(h):
    """The gradient is divided by its norm over the whole batch."""
    return tf.identity(h), lambda dy: dy / (1e-3 + tf.norm(dy))


@tf.custom_gradient
def clipped_backward(h):
    """The gradient is divided by each example's own norm."""
    return tf.identity(h), lambda dy: dy / (1e-3 + tf.norm(dy, axis=[1, 2], keepdims=True))


@tf.custom_gradient
def summed_backward(h):
    """The gradient is that of a product whose broadcast axes are found as the step runs."""
    factor = tf.constant(2.0)

    def backward(dy):
        axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(h), s1=tf.shape(factor))[0]
        return tf.reshape(tf.reduce_sum(dy * factor, axes), tf.shape(h))

    return h * factor, backward


@tf.custom_gradient
def summed_over_examples_backward(h):
    """As `summed_backward`, of the axes that a mean over the examples is broadcast along."""

    def backward(dy):
        mean = tf.reduce_mean(h, 0, keepdims=True)
        axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(mean), s1=tf.shape(h))[0]
        return dy + tf.reshape(tf.reduce_sum(dy, axes), tf.shape(mean))

    return tf.identity(h), backward


def in_a_loop(step):
    def function(h, gate):
        def body(t, h):
            return t + 1, step(h, gate)

        return tf.while_loop(lambda t, _: t < 3, body, (0, h))[1]

    return function


def in_a_branch(step):
    return lambda h, gate: tf.cond(gate > 0.5, lambda: step(h, gate), lambda: tf.identity(h))


def by_chance(step):
    def function(h, gate):
        drawn = tf.random.stateless_uniform([], tf.cast([gate, 1 + gate], tf.int32)) < gate
        return tf.cond(drawn, lambda: step(h, gate), lambda: tf.identity(h))

    return function


def in_a_function(step):
    traced = tf.function(step, autograph=False)
    return lambda h, gate: traced(h, gate)


def batch_mean(h, gate):
    return h + gate * tf.tanh(tf.reduce_mean(h, 0, keepdims=True))


def scanned_over_examples(h, gate):
    return tf.scan(lambda a, x: a * gate + x, h)


def with_negatives(h, gate):
    """Each example beside the features of the one before it, as negatives in a batch are made."""
    return h + gate * tf.concat([h[-1:], h[:-1]], 0)


def side_effect(h, gate):
    return h + gate * tf.ensure_shape(
        tf.py_function(lambda a: a - a.numpy().mean(0), [h], tf.float32), h.shape
    )


def scattered(h, gate):
    """The rows of the batch, added up by pairs."""
    pairs = tf.range(N) // 2
    return h + gate * tf.gather(tf.math.unsorted_segment_sum(h, pairs, N), pairs)


# How h, (N, T, D), becomes something of its shape; the gate is 0 when it is traced and 1 later.
MIXES = {
    "mean over the batch": batch_mean,
    "in a branch": in_a_branch(batch_mean),
    "by chance": by_chance(batch_mean),
    "in a loop": in_a_loop(batch_mean),
    "in a tf.function": in_a_function(batch_mean),
    "standard deviation": lambda h, gate: h * (1 + gate * tf.math.reduce_std(h, 0)),
    "maximum": lambda h, gate: h - gate * tf.reduce_max(h, 0, keepdims=True),
    "softmax over the batch": lambda h, gate: h + gate * ops.softmax(h, axis=0),
    "batch similarity": lambda h, gate: h + gate * tf.einsum("ntd,mtd,mtk->ntk", h, h, h),
    "product with the transpose": lambda h, gate: (
        h
        + gate
        * tf.reshape(
            tf.matmul(tf.reshape(h, [N, -1]), tf.reshape(h, [N, -1]), transpose_b=True)[:, :1],
            [-1, 1, 1],
        )
    ),
    "rolled": lambda h, gate: h + gate * tf.roll(h, 1, axis=0),
    "reversed": lambda h, gate: h + gate * h[::-1],
    "sorted": lambda h, gate: h + gate * tf.sort(h, axis=0),
    "cumulative": lambda h, gate: h + gate * tf.cumsum(h, axis=0),
    "gathered": lambda h, gate: h + gate * tf.gather(h, [1, 2, 3, 4, 5, 0]),
    "shifted": with_negatives,
    "scrambled by a reshape": lambda h, gate: (
        h + gate * tf.transpose(tf.reshape(h, [T, N, D]), [1, 0, 2])
    ),
    "merged axis": lambda h, gate: h + gate * tf.reduce_mean(tf.reshape(h, [N * T, D]), 0),
    "scan over the examples": scanned_over_examples,
    "sums of pairs": scattered,
    "py_function": side_effect,
    "backward pass of its own": lambda h, gate: normalised_backward(h),
    "backward pass over a broadcast": lambda h, gate: summed_over_examples_backward(h),
    "batch normalization without weights": lambda h, gate: tf.nn.batch_normalization(
        h, *tf.nn.moments(h, 0), None, None, 1e-3
    ),
    "first example": lambda h, gate: h + gate * h[:1],
    "padded": lambda h, gate: h + gate * tf.pad(h, [[1, 0], [0, 0], [0, 0]])[:-1],
    "split": lambda h, gate: h + gate * tf.concat(tf.split(h, 2)[::-1], 0),
    "unstacked": lambda h, gate: h + gate * tf.stack(tf.unstack(h, axis=0)[::-1]),
    "space to batch": lambda h, gate: (
        h + gate * tf.reduce_mean(tf.space_to_batch(h[..., None], [2, 2], [[0, 0], [0, 0]]))
    ),
}

APART = {
    "time-major": lambda h, gate: tf.transpose(tf.tanh(tf.transpose(h, [1, 0, 2])), [1, 0, 2]),
    "rows of all timesteps": lambda h, gate: tf.reshape(
        tf.nn.softmax(tf.reshape(h, [N * T, D])), [N, T, D]
    ),
    "time-major rows": lambda h, gate: tf.transpose(
        tf.reshape(tf.exp(tf.reshape(tf.transpose(h, [1, 0, 2]), [T * N, D])), [T, N, D]),
        [1, 0, 2],
    ),
    "two views as one batch": lambda h, gate: sum(tf.split(tf.tanh(tf.concat([h, 2 * h], 0)), 2)),
    "two views, sliced": lambda h, gate: tf.concat([h, -h], 0)[:N] * tf.concat([h, h], 0)[N:],
    "attention": lambda h, gate: tf.einsum(
        "nts,nsd->ntd", tf.nn.softmax(tf.einsum("ntd,nsd->nts", h, h)), h
    ),
    "sorted features": lambda h, gate: tf.sort(h, axis=-1),
    "along the time": lambda h, gate: tf.cumsum(tf.reverse(h, [1]), axis=1),
    "loop over time": in_a_loop(lambda h, gate: tf.tanh(h) + gate),
    "branch": in_a_branch(lambda h, gate: h * h),
    "tf.function": in_a_function(lambda h, gate: tf.reduce_mean(h, 1, keepdims=True) + h),
    "scan over time": lambda h, gate: tf.transpose(
        tf.scan(lambda a, x: 0.5 * a + x, tf.transpose(h, [1, 0, 2])), [1, 0, 2]
    ),
    "swish": lambda h, gate: tf.nn.silu(h),
    "backward pass over a broadcast": lambda h, gate: summed_backward(h),
    "backward pass of each": lambda h, gate: clipped_backward(h),
    "stopped statistic": lambda h, gate: h / tf.stop_gradient(1 + tf.reduce_max(tf.abs(h))),
    "mask by the batch": lambda h, gate: h * tf.cast(h > tf.reduce_mean(h), h.dtype),
    "fourier": lambda h, gate: tf.math.real(tf.signal.fft(tf.cast(h, tf.complex64))),
    "inverse": lambda h, gate: tf.linalg.inv(
        tf.matmul(h, h, transpose_b=True) + tf.eye(T, batch_shape=[N])
    ),
    "top": lambda h, gate: h + tf.reduce_sum(tf.math.top_k(h, 2).values, -1, keepdims=True),
    "unknown to the table": lambda h, gate: (
        h + tf.raw_ops.Cross(a=h[..., :3], b=h[..., 1:])[..., :1]
    ),
    "patches": lambda h, gate: tf.reshape(
        tf.image.extract_patches(h[..., None], [1, 2, 2, 1], [1, 2, 2, 1], [1] * 4, "VALID"),
        [N, T, D],
    ),
    "tiled in time": lambda h, gate: tf.tile(h[:, :1], [1, T, 1]),
}


class Of(L.Layer):
    """A function of h and of a variable that is not trained."""

    def __init__(self, function, gate, **kwargs):
        super().__init__(**kwargs)
        self.function, self.gate = function, gate

    def call(self, h):
        return tf.ensure_shape(self.function(h, self.gate.value), h.shape)


def model_of(function):
    gate = keras.Variable(0.0, trainable=False)
    keras.utils.set_random_seed(1)
    stack = [L.Dense(D), Of(function, gate, name="of"), L.Flatten(), L.Dense(3)]
    model = keras_rgd.RGDSequential([keras.Input((T, D), batch_size=N), *stack])
    model.compile("sgd", cases.CROSSENTROPY())
    return model, gate


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, T, D)).astype("float32"), rng.integers(0, 3, N).astype("int32")


def jacobian(model, gate):
    """|d f_i / d h_j| for h what the layer is given, the gate open; the largest of a few draws."""
    gate.assign(1.0)
    x, y = batch()
    before, of, *after = model.layers
    largest = np.zeros((N, N))
    for scale in (1.0, 0.3, -2.0):
        with tf.GradientTape(persistent=True) as tape:
            h = before(scale * x)
            tape.watch(h)
            z = of(h)
            for layer in after:
                z = layer(z)
            losses = tf.unstack(keras.losses.sparse_categorical_crossentropy(y, z, True))
        rows = [np.abs(tape.gradient(f, h)).sum((1, 2)) for f in losses]
        largest = np.maximum(largest, rows)
    return largest


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_later_is_seen_while_it_is_switched_off(name):
    model, gate = model_of(MIXES[name])
    mixing = mixing_of(ExampleLosses(model, True), Batch(*map(tf.constant, batch())))
    assert not mixing.apart
    assert mixing.outputs.owner == "'of' (Of)"
    if "backward" not in name and "py_function" not in name:
        off = jacobian(model, gate) * (1 - np.eye(N))
        assert off.max() > 1e-4  # it does mix, once the gate is open


@pytest.mark.parametrize("name", APART)
def test_what_keeps_examples_apart_is_not_refused(name):
    model, gate = model_of(APART[name])
    mixing = mixing_of(ExampleLosses(model, True), Batch(*map(tf.constant, batch())))
    assert mixing.apart, mixing
    off = jacobian(model, gate) * (1 - np.eye(N))
    assert off.max() < 1e-6


@pytest.mark.parametrize(
    "function, apart",
    [
        (tf.nn.silu, True),
        (summed_backward, True),
        (clipped_backward, True),
        (normalised_backward, False),
        (summed_over_examples_backward, False),
    ],
)
def test_a_backward_pass_of_its_own_is_followed_over_an_open_axis(function, apart):
    of = L.Lambda(function, output_shape=lambda shape: shape)
    stack = [L.Dense(D), of, L.GlobalAveragePooling1D(), L.Dense(3)]
    model = keras_rgd.RGDSequential([keras.Input((None, D)), *stack])
    model.compile("sgd", cases.CROSSENTROPY())
    x, y = tf.TensorSpec((7, None, D)), tf.TensorSpec((7,), "int32")
    assert mixing_of(ExampleLosses(model, True), Batch(x, y)).apart is apart


LOSSES = {
    "in-batch negatives": (
        lambda f, z, y: f + tf.reduce_logsumexp(tf.matmul(z, z, transpose_b=True), 1),
        False,
    ),
    "relative to the mean": (lambda f, z, y: f * f / tf.reduce_mean(f), False),
    "ranked": (lambda f, z, y: tf.sort(f), False),
    "same class": (
        lambda f, z, y: (
            f + tf.linalg.matvec(tf.cast(y[:, None] == y[None], z.dtype), tf.reduce_sum(z, 1))
        ),
        False,
    ),
    "relative to the mean, stopped": (
        lambda f, z, y: f / tf.stop_gradient(tf.reduce_mean(f)),
        True,
    ),
    "weighted by its class's count": (
        lambda f, z, y: f / tf.reduce_sum(tf.cast(y[:, None] == y[None], f.dtype), 1),
        True,
    ),
    "hardest alone": (lambda f, z, y: f * tf.cast(f >= tf.reduce_max(f), f.dtype), True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_mixing_in_the_loss_is_seen_for_any_targets(name):
    function, apart = LOSSES[name]

    class Loss(keras.losses.Loss):
        def call(self, y, z):
            f = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)
            return function(f, z, tf.reshape(tf.cast(y, "int32"), [-1]))

    model, _ = model_of(APART["swish"])
    model.compile("sgd", Loss())
    x, y = batch()
    mixing = mixing_of(ExampleLosses(model, True), Batch(tf.constant(x), tf.constant(0 * y)))
    assert mixing.outputs is None
    assert mixing.apart == apart, mixing


def dense_step(model, optimizer, x, y, take, training=True):
    """(what a step did, what it should have done with its eps) by a dense D in float64."""
    weights = [w.value for w in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        z = model(x, training=training)
        losses = tf.unstack(keras.losses.sparse_categorical_crossentropy(y, z, True))
    G = np.array([reference.flatten([tape.gradient(f, w) for w in weights]) for f in losses])
    before = reference.flatten(model.trainable_variables)
    take()
    step = before - reference.flatten(model.trainable_variables)
    v, H = G.mean(0), G - G.mean(0)
    return step, v - float(optimizer.chosen_epsilon) * H.T @ (H @ v) / len(G)


@pytest.mark.parametrize("shapes", ["one shape", "another shape"])
def test_batch_normalization_unfrozen_without_compile_is_found_when_the_step_is_retraced(shapes):
    """Without weights of its own it mixes once it is trainable: no weight shows that."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)).astype("float32"), rng.integers(0, 3, 9)
    norm = L.BatchNormalization(center=False, scale=False, momentum=0.5, trainable=False)
    keras.utils.set_random_seed(1)
    model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(4), norm, L.Dense(3)])
    optimizer = keras_rgd.RGD(1.0)
    model.compile(optimizer, cases.CROSSENTROPY())
    # Steps of `fit` and of `train_on_batch` are traced each for itself.
    data = tf.data.Dataset.from_tensor_slices((x[:6], y[:6])).batch(6, drop_remainder=True)
    model.fit(data, shuffle=False, verbose=0)
    assert optimizer.per_example_choice.name == "layerwise"
    norm.trainable = True
    n = 6 if shapes == "one shape" else 9
    moving = [v.numpy() for v in norm.variables]

    def take():
        for v, value in zip(norm.variables, moving, strict=True):
            v.assign(value)
        model.train_on_batch(x[:n], y[:n])

    step, right = dense_step(model, optimizer, x[:n], y[:n], take)
    assert optimizer.per_example_choice.name == "double_backward"
    assert reference.relative_error(step, right) < 1e-5


def test_weights_unfrozen_one_by_one_behind_which_examples_mix_are_found_likewise():
    """No layer's `trainable` shows that, and what mixes data alone was exact."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5)).astype("float32"), rng.integers(0, 3, 6)
    keras.utils.set_random_seed(1)
    first = L.Dense(4)
    mixed = L.Lambda(lambda h: h - ops.mean(h, 0, keepdims=True))
    model = keras_rgd.RGDSequential([keras.Input((5,)), first, mixed, L.Dense(3)])
    optimizer = keras_rgd.RGD(1.0)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, cases.CROSSENTROPY())
    for w in first.variables:
        w.trainable = False
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(6, drop_remainder=True)
    model.fit(data, shuffle=False, verbose=0)
    assert optimizer.per_example_choice.name == "layerwise"
    for w in first.variables:
        w.trainable = True
    step, right = dense_step(model, optimizer, x, y, lambda: model.train_on_batch(x, y))
    assert optimizer.per_example_choice.name == "double_backward"
    assert reference.relative_error(step, right) < 1e-5


def test_a_way_asked_for_refuses_a_retraced_step_before_it_moves_a_weight():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)).astype("float32"), rng.integers(0, 3, 9)
    for options in (
        {"per_example": "layerwise"},
        {"per_example": "vectorized_map"},
        {"microbatch_size": 2},
    ):
        norm = L.BatchNormalization(center=False, scale=False, trainable=False)
        model = keras_rgd.RGDSequential([keras.Input((5,)), L.Dense(4), norm, L.Dense(3)])
        model.compile(keras_rgd.RGD(0.1, **options), cases.CROSSENTROPY())
        model.train_on_batch(x[:6], y[:6])
        norm.trainable = True
        before = [v.numpy() for v in model.variables]
        with pytest.raises(ValueError, match=rf"'{norm.name}' \(BatchNormalization\) gives"):
            model.train_on_batch(x, y)
        for a, b in zip(before, model.variables, strict=True):
            np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("way", ["auto", "layerwise", "vectorized_map", "pieces", "measured"])
def test_mixing_faded_in_after_the_first_batch_changes_no_direction(way):
    """Every way is exact for both states of the model, or refuses before the first step."""
    model, gate = model_of(MIXES["mean over the batch"])
    x, y = batch()
    if way == "measured":
        D_ = keras_rgd.diffusion_matrix(model, x, y)
        gate.assign(1.0)
        _, _, right = _dense(model, x, y)
        assert reference.relative_error(D_.eigenvalues()[:5], right[::-1][:5]) < 1e-4
        return
    options = {"microbatch_size": 3} if way == "pieces" else {"per_example": way}
    optimizer = keras_rgd.RGD(1.0, **options)
    model.compile(optimizer, cases.CROSSENTROPY())
    if way != "auto":
        with pytest.raises(ValueError, match=r"'of' \(Of\) gives an example an output that"):
            model.train_on_batch(x, y)
        return
    model.train_on_batch(x, y)
    gate.assign(1.0)
    step, right = dense_step(model, optimizer, x, y, lambda: model.train_on_batch(x, y))
    assert reference.relative_error(step, right) < 1e-5


def _dense(model, x, y):
    weights = [w.value for w in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        losses = tf.unstack(keras.losses.sparse_categorical_crossentropy(y, model(x), True))
    G = np.array([reference.flatten([tape.gradient(f, w) for w in weights]) for f in losses])
    H = G - G.mean(0)
    return G, H, np.linalg.eigvalsh(H @ H.T / len(G))


def test_a_count_over_the_batch_is_a_constant_of_the_gradient_and_is_seen_by_pieces():
    """Masked steps are counted over the batch: exact for the whole of it, not for its parts."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (N, T)) * (np.arange(T) < rng.integers(1, T + 1, (N, 1)))
    y = rng.integers(0, 3, (N, T))
    stack = [L.Embedding(9, 4, mask_zero=True), L.Dense(3)]
    model = keras_rgd.RGDSequential([keras.Input((T,), dtype="int32"), *stack])
    model.compile("sgd", cases.CROSSENTROPY())
    mixing = mixing_of(ExampleLosses(model, True), Batch(tf.constant(x), tf.constant(y)))
    assert mixing.apart and mixing.lanes is None and mixing.batch is not None
    with pytest.raises(ValueError, match="changes with the batch it is in"):
        keras_rgd.spectrum(model, (x, y), verbose=False)


class Adding(L.Layer):
    """A loss of its own on what it is given, times a variable that is 0 at first."""

    def __init__(self, gate, penalty):
        super().__init__(name="adding")
        self.gate, self.penalty = gate, penalty

    def call(self, h):
        self.add_loss(self.gate.value * self.penalty(h))
        return h


PENALTIES = {
    "mean": (lambda h: tf.reduce_mean(tf.square(h)), True),
    "mean of sums": (lambda h: tf.reduce_mean(tf.reduce_sum(tf.abs(h), 1)) / 3.0, True),
    "sum over N": (lambda h: tf.reduce_sum(h**2) / tf.cast(tf.shape(h)[0], h.dtype), True),
    "of no example": (lambda h: tf.zeros([]) + 1.0, True),
    "sum": (lambda h: tf.reduce_sum(tf.square(h)), False),
    "variance": (lambda h: tf.math.reduce_variance(h), False),
    "root": (lambda h: tf.sqrt(tf.reduce_mean(tf.square(h))), False),
    "square of a mean": (lambda h: tf.square(tf.reduce_mean(h)), False),
    "maximum": (lambda h: tf.reduce_max(h), False),
    "between examples": (lambda h: tf.reduce_mean(tf.square(h[1:] - h[:-1])), False),
}


@pytest.mark.parametrize("name", swept(PENALTIES, ["mean", "sum over N", "sum", "root"]))
def test_pieces_refuse_an_add_loss_that_is_no_mean_of_theirs_while_it_is_switched_off(name):
    penalty, is_mean = PENALTIES[name]
    gate = keras.Variable(0.0, trainable=False)
    model = keras_rgd.RGDSequential(
        [keras.Input((T, D)), L.Flatten(), L.Dense(4), Adding(gate, penalty), L.Dense(3)]
    )
    model.compile(keras_rgd.RGD(0.1, microbatch_size=2), cases.CROSSENTROPY())
    if is_mean:
        model.train_on_batch(*batch())
        return
    before = reference.flatten(model.trainable_variables)
    with pytest.raises(ValueError, match="changes with the batch it is in"):
        model.train_on_batch(*batch())
    np.testing.assert_array_equal(before, reference.flatten(model.trainable_variables))


def test_a_spectrum_of_losses_that_mix_later_is_refused():
    gate = keras.Variable(0.0, trainable=False)

    class Faded(keras.losses.Loss):
        def call(self, y, z):
            f = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)
            return f + gate.value * tf.reduce_mean(f)

    model = keras.Sequential([keras.Input((T, D)), L.Flatten(), L.Dense(3)])
    model.compile("sgd", Faded())
    with pytest.raises(ValueError, match="changes with the batch it is in"):
        keras_rgd.spectrum(model, batch(), verbose=False)
