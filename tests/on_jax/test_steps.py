"""RGD by examples on JAX: each case against a dense D, and all that `fit` does around a step."""

import cases
import dense_on_jax
import jax
import keras
import layer_table
import numpy as np
import pytest
import steps_on_jax
from keras import layers as L
from steps_on_jax import CROSSENTROPY, FLOAT64, TOLERANCE, X, Y, classifier, fitted, flat

import keras_rgd
from keras_rgd.epsilon import Fixed, Fraction, FractionOfMean, WeakField
from keras_rgd.per_example import linearized, unmixed

in_float32 = pytest.mark.skipif(FLOAT64, reason="once is enough")


# `jax.nn.dot_product_attention` takes its softmax in float32, whatever it is given.
IN_FLOAT32 = {"multi_head_attention": 1e-6}


@pytest.fixture(autouse=True, scope="module")
def _dtype():
    steps_on_jax.use_dtype()


@pytest.mark.parametrize("name", cases.BY_NAME)
def test_a_step_is_that_of_a_dense_D(name):
    error, epsilon_lambda = steps_on_jax.error(name)
    assert error <= max(TOLERANCE, IN_FLOAT32.get(name, 0))
    assert 0.04 < epsilon_lambda < 1  # the estimate of a first step is far above
    # As the README's table has it; tests/layer_table.py writes it.
    assert layer_table.written()[cases.BY_NAME[name].row][-1] == "exact"
    _, logs, _, _, (_, _, loss) = steps_on_jax.step(name)
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)


@in_float32
@pytest.mark.parametrize(
    "name, takes_apart",
    [("transformer", True), ("group_normalization", True), ("batch_normalization", False)],
)
def test_fewer_passes_are_taken_where_examples_do_not_mix(name, takes_apart, monkeypatch):
    taken = []

    def seen(*args):
        taken.append(unmixed.unmixed(*args))
        return taken[-1]

    monkeypatch.setattr(linearized, "unmixed", seen)
    steps_on_jax.new_step(name)
    assert [apart is not None for apart in taken] == [takes_apart]


@pytest.mark.parametrize("name", ["dropout", "batch_normalization", "lstm_dropout", "transformer"])
def test_seeds_and_moving_statistics_move_as_under_sgd(name):
    case = cases.BY_NAME[name]
    model = steps_on_jax.built(case, keras.optimizers.SGD(1.0))
    _, _, theirs = steps_on_jax.take(model, case)
    for ours, states in zip(steps_on_jax.step(name)[2], theirs, strict=True):
        np.testing.assert_allclose(ours, states, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dense", "lstm", "batch_normalization", "embedding_mask_loss"])
def test_a_gram_matrix_in_chunks_bounds_the_largest_eigenvalue(name):
    for size in (4, 100):
        error, epsilon_lambda = steps_on_jax.error(name, chunk_size=size)
        assert error <= TOLERANCE
        # A guaranteed bound, at most 1.49 times the eigenvalue.
        assert 0.5 / 1.5 < epsilon_lambda <= 0.5 * (1 + 1e-5)


RULES = [Fraction(0.3), FractionOfMean(0.3), Fixed(1e-3), Fixed(1e9), WeakField(0.05)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_is_followed(rule):
    step = steps_on_jax.new_step("dense", epsilon=rule)
    error, epsilon_lambda = steps_on_jax.error_of(step)
    assert error <= TOLERANCE
    assert epsilon_lambda < 1
    _, _, _, optimizer, (G, v, _) = step
    assert int(optimizer.epsilon_cuts) == (rule == Fixed(1e9))
    if isinstance(rule, WeakField):
        centred, epsilon = G - G.mean(0), float(optimizer.chosen_epsilon)
        D = centred.T @ centred / len(G)
        exact = np.linalg.solve(np.eye(len(v)) + epsilon * D, v)
        weak = np.linalg.norm(exact - v + epsilon * D @ v) / np.linalg.norm(exact)
        assert weak <= 0.05 * 1.001


OPTIONS = [
    {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"clipnorm": 0.05},
    {"global_clipnorm": 0.05},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    {"loss_scale_factor": 64.0},
    {"gradient_accumulation_steps": 2, "momentum": 0.9},
]


@in_float32
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_act_on_the_direction_as_sgds_do_on_a_gradient(options):
    """Keras's SGD, handed the dense direction at the eps that RGD chose, goes the same way."""
    options = {"learning_rate": 0.1} | options
    rgd, sgd = keras_rgd.RGD(epsilon=0.7, **options), keras.optimizers.SGD(**options)
    model, twin = classifier(rgd), classifier(sgd)
    sgd.build(twin.trainable_variables)
    scale = options.get("loss_scale_factor", 1.0)
    for t in range(4):
        x, y = X[12 * t : 12 * t + 12], Y[12 * t : 12 * t + 12]
        if t == 0:
            twin.predict(x, verbose=0)
            twin.evaluate(x, y, verbose=0)
        G, v, _ = dense_on_jax.per_example(twin, x, y)
        model.train_on_batch(x, y)
        centred = G - G.mean(0)
        direction = v - float(rgd.chosen_epsilon) * centred.T @ (centred @ v) / len(G)
        parts = np.split(direction, np.cumsum([np.prod(w.shape) for w in twin.weights])[:-1])
        pairs = zip(parts, twin.trainable_variables, strict=True)
        sgd.apply([scale * np.reshape(p, w.shape).astype("float32") for p, w in pairs])
        np.testing.assert_allclose(
            flat(model.trainable_variables), flat(twin.trainable_variables), atol=2e-6
        )


@in_float32
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_steps_are_near_those_of_float32(policy):
    single = fitted(keras_rgd.RGD(0.1))
    keras.config.set_dtype_policy(policy)
    try:
        half = fitted(keras_rgd.RGD(0.1))
    finally:
        keras.config.set_dtype_policy("float32")
    start = flat(classifier("sgd").trainable_variables)
    moved = flat(single.trainable_variables) - start
    error = np.linalg.norm(flat(half.trainable_variables) - flat(single.trainable_variables))
    assert error < 0.02 * np.linalg.norm(moved)


@in_float32
def test_an_overflowing_step_is_skipped():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = classifier(keras_rgd.RGD(0.1))
        before = flat(model.trainable_variables)
        model.train_on_batch(1e6 * X[:8], Y[:8])
        np.testing.assert_array_equal(flat(model.trainable_variables), before)
        assert float(model.optimizer.inner_optimizer.lambda_max) == 0
        model.train_on_batch(X[:8], Y[:8])
    finally:
        keras.config.set_dtype_policy("float32")


@in_float32
def test_a_saved_model_goes_on_bit_for_bit(tmp_path):
    model = fitted(keras_rgd.RGD(0.1, momentum=0.9), lambda: [L.Dense(5), L.Dropout(0.3)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for m in (model, loaded):
        m.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    for a, b in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
    assert float(model.optimizer.lambda_max) == float(loaded.optimizer.lambda_max)


@in_float32
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_other_ways_to_run_take_the_same_steps(options):
    if "run_eagerly" in options:
        options["jit_compile"] = False
    usual, other = fitted(keras_rgd.RGD(0.1)), fitted(keras_rgd.RGD(0.1), **options)
    np.testing.assert_allclose(*(flat(m.trainable_variables) for m in (usual, other)), atol=1e-6)


class OwnGradient(L.Layer):
    """tanh, with its gradient written out."""

    def call(self, h):
        @jax.custom_vjp
        def tanh(z):
            return jax.numpy.tanh(z)

        tanh.defvjp(lambda z: (tanh(z), tanh(z)), lambda y, c: (c * (1 - y**2),))
        return tanh(h)


@in_float32
def test_a_layer_with_a_gradient_of_its_own_is_pulled_back_twice():
    usual = fitted(keras_rgd.RGD(0.1), lambda: [L.Dense(5), L.Activation("tanh")])
    other = fitted(keras_rgd.RGD(0.1), lambda: [L.Dense(5), OwnGradient()])
    np.testing.assert_allclose(*(flat(m.trainable_variables) for m in (usual, other)), atol=1e-6)


class Kernel(L.Layer):
    """tanh, by a kernel that has one derivative, as those of cuDNN."""

    def call(self, h):
        @jax.custom_vjp
        def tanh(z):
            return jax.numpy.tanh(z)

        def back(y, c):
            return (
                jax.pure_callback(lambda y, c: c * (1 - y**2), c, y, c, vmap_method="sequential"),
            )

        tanh.defvjp(lambda z: (tanh(z), tanh(z)), back)
        return tanh(h)


@in_float32
def test_kernels_with_one_derivative_are_refused_by_name():
    model = classifier(keras_rgd.RGD(0.1), lambda: [L.Dense(5), Kernel(name="mine")])
    before = flat(model.trainable_variables)
    with pytest.raises(ValueError, match=r"Layers 'mine' compute with kernels.*use_cudnn=False"):
        model.fit(X, Y, batch_size=16, verbose=0)
    np.testing.assert_array_equal(flat(model.trainable_variables), before)
    nested = keras.Sequential([L.Dense(5), Kernel(name="mine")], name="block")
    model = classifier(keras_rgd.RGD(0.1), lambda: [nested])
    with pytest.raises(ValueError, match="Layers 'block/mine' compute"):
        keras_rgd.diffusion_matrix(model, X, Y).eigenvalues()


class PreparesData(keras_rgd.RGDModel):
    """A `train_step` of its own that doubles the inputs."""

    def train_step(self, state, data):
        x, y = data
        return super().train_step(state, (2 * x, y))


@in_float32
def test_a_train_step_may_prepare_the_data():
    i = keras.Input((6,))
    weights = []
    for cls, x in ((PreparesData, X), (keras_rgd.RGDModel, 2 * X)):
        keras.utils.set_random_seed(1)
        model = cls(i, L.Dense(3)(i))
        model.compile(keras_rgd.RGD(0.1), CROSSENTROPY())
        model.fit(x, Y, batch_size=16, shuffle=False, verbose=0)
        weights.append(flat(model.trainable_variables))
    np.testing.assert_allclose(*weights, atol=1e-6)


# what is refused


class Ignores(keras_rgd.RGDModel):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(y_pred**2)


class Normalizes(Ignores):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        losses = keras.ops.mean(y_pred**2, 1)
        return keras.ops.sum(losses * sample_weight) / keras.ops.sum(sample_weight)


class Hidden(keras.Model):
    def train_step(self, state, data):
        return super().train_step(state, data)


class Hides(keras_rgd.RGDMixin, Hidden):
    pass


@in_float32
@pytest.mark.parametrize(
    "cls, loss, options, words",
    [
        (Ignores, None, {}, "does not depend on the sample weights.*Ignores.compute_loss"),
        (Normalizes, None, {}, "not linear in the sample weights"),
        (keras_rgd.RGDModel, lambda a, b: keras.ops.mean(b**2), {}, "one value for each example"),
        (Hides, CROSSENTROPY(), {}, "`Hides` puts RGDMixin before `Hidden`"),
        (keras.Model, CROSSENTROPY(), {}, "this model hands it only their mean"),
        (
            keras_rgd.RGDModel,
            CROSSENTROPY(),
            {"per_example": "layerwise"},
            "must be 'linearized' or 'auto'",
        ),
        (keras_rgd.RGDModel, CROSSENTROPY(), {"microbatch_size": 4}, "batches are taken whole"),
    ],
    ids=lambda a: getattr(a, "__name__", None),
)
def test_what_has_no_gradients_of_examples_is_refused(cls, loss, options, words):
    i = keras.Input((6,))
    model = cls(i, L.Dense(3)(i))
    model.compile(keras_rgd.RGD(0.1, **options), loss)
    with pytest.raises(ValueError, match=words):
        model.fit(X, Y, batch_size=16, verbose=0)
