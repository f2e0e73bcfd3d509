"""RGD with a window on whichever backend runs Keras, against an explicit D in float64 numpy.

`tests/integration/test_backends.py` runs this folder on the other backends.
"""

import re
import types

import keras
import numpy as np
import pytest
from keras import ops

import keras_rgd
from keras_rgd import per_example
from keras_rgd.epsilon import Fixed, Fraction, WeakField
from keras_rgd.window import make_window


def wide(*values):
    """A member of a sweep that the main run leaves out; see tests/wide.py."""
    return pytest.param(*values, marks=pytest.mark.wide)


SHAPES = [(4, 3), (3,), (5, 3), (1,)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    # Two of SHAPES alone, and two together.
    monkeypatch.setattr("keras_rgd._support.vectors.SMALL", 12)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


def variables(dtype="float32"):
    return [keras.Variable(np.zeros(shape), dtype=dtype) for shape in SHAPES]


def gradients(steps, mean=1.0, noise=1.0, drift=0.0, scale=1.0, seed=0):
    """A list of float32 arrays for each step: a mean that drifts, and noise."""
    rng = np.random.default_rng(seed)
    start, end = ([rng.normal(size=s) for s in SHAPES] for _ in range(2))
    for t in range(steps):
        at = [mean * (a + drift * t * (b - a)) for a, b in zip(start, end, strict=True)]
        yield [(scale * (m + noise * rng.normal(size=m.shape))).astype("float32") for m in at]


def flat(tensors):
    return np.concatenate([np.ravel(ops.convert_to_numpy(t)).astype("float64") for t in tensors])


def explicit(window, batch_size):
    """D of the stored gradients, as the issue of it in numpy."""
    V = np.array(window)
    if len(V) < 2:
        return np.zeros((V.shape[1],) * 2)
    centred = V - V.mean(0)
    return batch_size / (len(V) - 1) * centred.T @ centred


def walk(optimizer, given, size, batch_size=1):
    """For each step what it went along, what it had to be, eps M_x, and the weak-field error."""
    weights, seen = variables(), []
    optimizer.build(weights)
    for gradient in given:
        for w in weights:
            w.assign(np.zeros(w.shape))
        optimizer.apply([ops.convert_to_tensor(g) for g in gradient], weights)
        seen.append(flat(gradient))
        D = explicit(seen[-size:], batch_size)
        epsilon, v = float(optimizer.chosen_epsilon), seen[-1]
        expected, exact = v - epsilon * D @ v, np.linalg.solve(np.eye(len(v)) + epsilon * D, v)
        weak = np.linalg.norm(exact - expected) / max(np.linalg.norm(exact), 1e-30)
        yield -flat(weights), expected, epsilon * np.linalg.eigvalsh(D)[-1], weak


# the step


@pytest.mark.parametrize("size", [wide(2), 5, wide(16)])
@pytest.mark.parametrize("drift, noise", [wide(0, 1), (0.3, 1), wide(0.01, 0.01)])
def test_direction_equals_the_explicit_D_of_the_recorded_gradients(size, drift, noise):
    optimizer = keras_rgd.RGD(1.0, epsilon=0.999, window=size, batch_size=64)
    given = gradients(2 * size + 4, drift=drift, noise=noise)
    for t, (direction, expected, eps_M, _) in enumerate(walk(optimizer, given, size, 64)):
        error = np.linalg.norm(direction - expected) / np.linalg.norm(expected)
        assert error < 1e-5
        assert eps_M < 1
        assert eps_M > 0.5 or t == 0


@pytest.mark.parametrize(
    "rule", [wide(Fraction(0.3)), wide(Fixed(0.01)), Fixed(1e9), WeakField(0.05)], ids=repr
)
def test_every_rule_meets_the_window(rule):
    optimizer = keras_rgd.RGD(1.0, epsilon=rule, window=6, batch_size=8)
    for t, (direction, expected, eps_M, weak) in enumerate(walk(optimizer, gradients(20), 6, 8)):
        assert np.linalg.norm(direction - expected) < 1e-5 * np.linalg.norm(expected)
        assert eps_M < 1
        assert float(optimizer.step_weak_field_error) == pytest.approx(weak, rel=1e-3, abs=1e-6)
        if t > 0 and isinstance(rule, WeakField):
            assert float(optimizer.step_weak_field_error) < 0.05 * 1.001
            assert eps_M > 0.01
    if rule == Fixed(1e9):
        assert int(optimizer.epsilon_cuts) == 19  # without a D there is nothing to cut


def test_the_means_over_the_steps_are_kept_and_begun_anew():
    optimizer, seen = keras_rgd.RGD(1.0, window=4), []
    for _ in walk(optimizer, gradients(9), 4):
        seen.append(float(optimizer.chosen_epsilon))
    means = optimizer.step_means()
    assert means.epsilon == pytest.approx(np.exp(np.log(seen[1:]).mean()), rel=1e-5)
    assert (means.steps, means.steps_without_epsilon) == (9, 1)
    optimizer.reset_step_means()
    assert optimizer.step_means().steps == 0 and np.isnan(optimizer.step_means().epsilon)


def test_the_first_step_is_plain_gradient_descent():
    given = list(gradients(2))
    (first, *_), (second, *_) = walk(keras_rgd.RGD(1.0, window=4), given, 4)
    np.testing.assert_allclose(first, flat(given[0]), rtol=1e-6)
    assert np.linalg.norm(second - flat(given[1])) > 0.01 * np.linalg.norm(second)


def test_equal_gradients_have_no_D():
    gradient = next(gradients(1))
    optimizer = keras_rgd.RGD(1.0, window=4)
    for direction, *_ in walk(optimizer, [gradient] * 6, 4):
        np.testing.assert_allclose(direction, flat(gradient), rtol=1e-6)
    assert float(optimizer.lambda_max) == 0


def test_gradients_of_0_stay_0():
    zeros = [np.zeros(s, "float32") for s in SHAPES]
    for direction, *_ in walk(keras_rgd.RGD(1.0, window=4), [zeros] * 6, 4):
        np.testing.assert_array_equal(direction, 0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_direction_scales_with_the_loss(scale):
    plain = walk(keras_rgd.RGD(1.0, window=5), gradients(12), 5)
    scaled = walk(keras_rgd.RGD(1.0, window=5), gradients(12, scale=scale), 5)
    for (a, *_), (b, *_) in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(b / scale, a, rtol=1e-4, atol=1e-5)


def test_the_batch_size_cancels_in_the_step_and_scales_D():
    one, many = keras_rgd.RGD(1.0, window=5), keras_rgd.RGD(1.0, window=5, batch_size=64)
    for (a, *_), (b, *_) in zip(
        walk(one, gradients(9), 5), walk(many, gradients(9), 5), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert float(many.lambda_max) == pytest.approx(64 * float(one.lambda_max), rel=1e-5)


def test_a_bfloat16_window_is_near():
    optimizer = keras_rgd.RGD(1.0, window=5, window_dtype="bfloat16")
    for direction, expected, eps_M, _ in walk(optimizer, gradients(12), 5):
        assert np.linalg.norm(direction - expected) < 2e-2 * np.linalg.norm(expected)
        assert eps_M < 1.02
    assert {str(row.dtype) for row in optimizer._window.rows} == {"bfloat16"}


def test_weights_without_a_gradient_take_no_step():
    weights = variables()
    optimizer = keras_rgd.RGD(1.0, window=4)
    optimizer.build(weights)
    given, seen = list(gradients(6)), []
    for gradient in given:
        for w in weights:
            w.assign(np.zeros(w.shape))
        tensors = [ops.convert_to_tensor(g) for g in gradient]
        tensors[1] = None
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply(tensors, weights)
        seen.append(flat([gradient[0], *gradient[2:]]))
        D = explicit(seen[-4:], 1)
        expected = seen[-1] - float(optimizer.chosen_epsilon) * D @ seen[-1]
        np.testing.assert_allclose(
            -flat([weights[0], *weights[2:]]), expected, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), 0)


def test_its_D_is_a_diffusion_matrix():
    optimizer = keras_rgd.RGD(1.0, window=6, batch_size=32)
    given = list(gradients(9))
    list(walk(optimizer, given, 6, 32))
    expected = explicit([flat(g) for g in given[-6:]], 32)
    D = optimizer.diffusion_matrix()
    eigenvalues = np.linalg.eigvalsh(expected)[::-1]
    np.testing.assert_allclose(D.eigenvalues()[:5], eigenvalues[:5], rtol=1e-5)
    assert D.rank() == 5
    assert D.trace() == pytest.approx(np.trace(expected), rel=1e-5)
    v = next(gradients(1, seed=1))
    np.testing.assert_allclose(flat(D.matvec(v)), expected @ flat(v), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(flat(D.gradients.gradient), flat(given[-1]))
    along = np.array([flat([t[i] for t in D.eigenvectors(3)]) for i in range(3)])
    np.testing.assert_allclose(along @ expected @ along.T, np.diag(eigenvalues[:3]), atol=1e-3)
    metric = keras_rgd.DiffusionMetric(D, Fraction(0.5))
    assert metric.epsilon * eigenvalues[0] == pytest.approx(0.5, rel=1e-5)
    exact = np.linalg.solve(np.eye(len(expected)) + metric.epsilon * expected, flat(v))
    np.testing.assert_allclose(flat(metric.inverse(v)), exact, rtol=1e-4, atol=1e-4)


# in fit


def linear(optimizer, **flags):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(optimizer, "mse", **flags)
    return model


def data(batches, size=8):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batches * size, 3)).astype("float32")
    return x, (x @ [[1.0], [-2.0], [0.5]] + 0.5 * rng.normal(size=(len(x), 1))).astype("float32")


def by_hand(x, y, size, window, c, learning_rate=0.05):
    """The weights after linear regression by RGD, in float64."""
    weights, seen = np.zeros(4), []
    for start in range(0, len(x), size):
        X = np.c_[x[start : start + size], np.ones(size)].astype("float64")
        residual = X @ weights - y[start : start + size, 0]
        seen.append(2 * X.T @ residual / size)
        D = explicit(seen[-window:], size)
        M = np.linalg.eigvalsh(D)[-1]
        # So few are bounded exactly enough by their own spectrum that c / M_x differs by percents:
        # compared is a fixed eps.
        weights = weights - learning_rate * (seen[-1] - min(c, 0.999 / max(M, 1e-9)) * D @ seen[-1])
    return weights


@pytest.mark.parametrize("jit", [False, True])
def test_fit_is_the_descent_that_numpy_computes(jit):
    x, y = data(20)
    optimizer = keras_rgd.RGD(0.05, epsilon=Fixed(1e-3), window=4, batch_size=8)
    model = linear(
        optimizer, **({} if keras.backend.backend() == "torch" else {"jit_compile": jit})
    )
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = by_hand(x, y, 8, 4, 1e-3)
    np.testing.assert_allclose(flat(model.trainable_variables), expected, rtol=1e-5)
    assert np.linalg.norm(expected - by_hand(x, y, 8, 4, 0)) > 1e-3
    assert int(optimizer.epsilon_cuts) == 0


def stock():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.2, seed=1),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 10, 0.9)
    model.compile(
        keras_rgd.RGD(schedule, window=4, momentum=0.9, weight_decay=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def pictures(n=96):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 8, 8, 1)) + y[:, None, None, None]
    # JAX has no int64, and warns.
    return x.astype("float32"), y.astype("int32")


def test_a_stock_model_with_batch_normalization_trains():
    x, y = pictures()
    history = stock().fit(x, y, batch_size=16, epochs=8, verbose=0).history
    assert set(history) == {"loss", "accuracy"}
    assert history["loss"][-1] < 0.6 * history["loss"][0]


def test_a_saved_model_continues_bit_for_bit(tmp_path):
    x, y = pictures()
    model = stock()
    model.fit(x[:48], y[:48], batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.window == 4
    # Dropout's seed is not among what Keras saves.
    seed = ops.convert_to_numpy(model.layers[3].seed_generator.state).copy()
    again.layers[3].seed_generator.state.assign(seed)
    for m in (model, again):
        m.fit(x[48:], y[48:], batch_size=8, shuffle=False, verbose=0)
    assert len(model.optimizer.variables) == len(again.optimizer.variables)
    for a, b in zip(
        [*model.variables, *model.optimizer.variables],
        [*again.variables, *again.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": True},
        wide({"weight_decay": 0.1}),
        wide({"clipnorm": 0.5}),
        wide({"clipvalue": 0.1}),
        wide({"global_clipnorm": 0.5}),
        wide({"loss_scale_factor": 64.0}),
        wide({"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}),
        {"gradient_accumulation_steps": 2, "momentum": 0.9},
    ],
    ids=lambda o: "-".join(o),
)
def test_options_act_on_the_direction_as_sgds_do_on_a_gradient(options):
    """Keras's SGD, handed the explicit direction, goes the same way."""
    rgd = keras_rgd.RGD(0.3, epsilon=0.7, window=3, **options)
    sgd = keras.optimizers.SGD(0.3, **options)
    weights, twins = variables(), variables()
    rgd.build(weights)
    sgd.build(twins)
    seen, every, scale = [], options.get("gradient_accumulation_steps", 1), 1.0
    scale = options.get("loss_scale_factor", 1.0)
    pending = []
    for gradient in gradients(8):
        rgd.apply([ops.convert_to_tensor(scale * g) for g in gradient], weights)
        pending.append(flat(gradient))
        if len(pending) < every:
            direction = [np.zeros(s) for s in SHAPES]
        else:
            v = np.mean(pending, 0)
            pending = []
            seen.append(v)
            D = explicit(seen[-3:], 1)
            # The accumulator of SGD averages it with the zeros before it.
            whole = every * (v - float(rgd.chosen_epsilon) * D @ v)
            ends = np.cumsum([np.prod(s) for s in SHAPES])[:-1]
            parts = np.split(whole, ends)
            direction = [p.reshape(s) for p, s in zip(parts, SHAPES, strict=True)]
        tensors = [ops.convert_to_tensor((scale * d).astype("float32")) for d in direction]
        sgd.apply(tensors, twins)
        np.testing.assert_allclose(flat(weights), flat(twins), rtol=1e-4, atol=1e-5)
    assert int(rgd._window.stored) == 8 // every


def test_half_precision_trains_and_skips_what_overflows():
    keras.config.set_dtype_policy("mixed_float16")
    x, y = data(6)
    rgd = keras_rgd.RGD(0.05, window=4)
    wrapped = keras.optimizers.LossScaleOptimizer(rgd, initial_scale=2.0**20)
    model = linear(wrapped)
    history = model.fit(x, y, batch_size=8, epochs=20, verbose=0).history
    assert float(wrapped.dynamic_scale) < 2.0**20
    assert 0 < int(rgd._window.stored) == int(rgd.iterations)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert np.all(np.isfinite(rgd.diffusion_matrix().eigenvalues()))


# a Keras that updates otherwise


class Elsewhere(keras.optimizers.Optimizer):
    """As a Keras that clips elsewhere: its updates do not call `_clip_gradients`."""

    def _backend_apply_gradients(self, grads, trainable_variables):
        def update():
            self._apply_weight_decay(trainable_variables)
            self._backend_update_step(grads, trainable_variables, self.learning_rate)

        if self.gradient_accumulation_steps:
            ops.cond(self._iterations >= 0, update, lambda: None)
        else:
            update()


class OnElsewhere(keras_rgd.RGD, Elsewhere):
    """RGD on such a Keras: it stands between RGD's bases and Keras's optimizer."""


NEVER_ASKED = rf"Keras {re.escape(keras.__version__)} took an update without asking.*OnElsewhere"


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_an_update_that_passes_the_window_by_is_refused(options):
    weights, optimizer = variables(), OnElsewhere(1.0, window=2, **options)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=NEVER_ASKED):
            optimizer.apply([ops.ones(s) for s in SHAPES], weights)
    np.testing.assert_array_equal(flat(weights), 0)


def ways_to_run():
    eager = {"run_eagerly": True, "jit_compile": False}
    if keras.backend.backend() == "torch":
        return [eager]
    return [eager, {"jit_compile": False}, {"jit_compile": True}]


@pytest.mark.parametrize("flags", ways_to_run(), ids=str)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_fit_with_an_update_that_passes_the_window_by_is_refused(flags, policy):
    keras.config.set_dtype_policy(policy)
    x, y = data(2)
    model = linear(OnElsewhere(0.05, window=4), **flags)
    before = flat(model.trainable_variables)
    with pytest.raises(RuntimeError, match=NEVER_ASKED):
        model.fit(x, y, batch_size=8, verbose=0)
    # An error in fit leaves a model no weights on JAX.
    if keras.backend.backend() != "jax":
        np.testing.assert_array_equal(flat(model.trainable_variables), before)


def test_a_direction_that_is_applied_needs_no_window():
    weights, optimizer = variables(), OnElsewhere(1.0, window=2)
    optimizer.build(weights)
    optimizer.apply_direction([ops.ones(s) for s in SHAPES], weights)
    np.testing.assert_array_equal(flat(weights), -1)


# what users are told


def test_a_large_window_is_announced(capsys, monkeypatch):
    keras_rgd.RGD(window=4).build(variables())
    assert capsys.readouterr().out == ""
    # A process keeps what it once held, so none of this is allocated.
    monkeypatch.setattr("keras_rgd.window.GradientWindow", lambda *given: given)
    make_window(None, [types.SimpleNamespace(shape=(2**20, 65), dtype="float32")], 4, None)
    out = capsys.readouterr().out
    assert "stores 4 gradients of 68,157,440 weights in float32: 1.0 GiB" in out
    assert 'window_dtype="bfloat16"' in out


def test_a_window_is_announced_before_it_takes_the_memory(capsys, monkeypatch):
    def allocating(*args):
        raise MemoryError

    monkeypatch.setattr("keras_rgd.window.GradientWindow", allocating)
    with pytest.raises(ValueError, match=f"does not fit.*`window`. Received: window={2**40}"):
        keras_rgd.RGD(window=2**40).build(variables())
    assert "RGD(window=1099511627776) stores 1,099,511,627,776" in capsys.readouterr().out


def test_a_window_dtype_may_be_a_dtype_object():
    optimizer = keras_rgd.RGD(1.0, window=3, window_dtype=np.dtype("float32"))
    assert optimizer.get_config()["window_dtype"] == "float32"
    optimizer.build(variables("bfloat16"))
    assert {str(row.dtype) for row in optimizer._window.rows} == {"float32"}


@pytest.mark.parametrize(
    "arguments, received",
    [
        ({"window": 1}, "window=1"),
        ({"window": 2.0}, "window=2.0"),
        ({"window": 8, "window_dtype": "float16"}, "window_dtype='float16'"),
        ({"window": 8, "window_dtype": 3}, "window_dtype=3"),
        ({"window": 8, "window_dtype": []}, "window_dtype=[]"),
        ({"window": 8, "batch_size": 0}, "batch_size=0"),
        ({"window": 8, "epsilon": Fixed(1.0)}, "batch_size=None"),
        ({"window": 8, "per_example": "layerwise"}, "per_example='layerwise'"),
        ({"window": 8, "microbatch_size": 4}, "microbatch_size=4"),
        ({"window_dtype": "float32"}, "window_dtype='float32'"),
        ({"batch_size": 8}, "batch_size=8"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments, received):
    with pytest.raises(ValueError) as error:
        keras_rgd.RGD(**arguments)
    assert received in str(error.value)


def test_an_optimizer_survives_serialization():
    optimizer = keras_rgd.RGD(0.2, Fixed(3.0), window=8, window_dtype="bfloat16", batch_size=64)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()


def test_D_needs_two_gradients():
    optimizer = keras_rgd.RGD(window=4)
    with pytest.raises(ValueError, match="two steps. Received: 0"):
        optimizer.diffusion_matrix()


BACKEND = keras.backend.backend()
MISSING = {
    "tensorflow": [],
    "jax": ["geometry"],
    "torch": ["RGDSequential", "DiffusionMonitor", "spectrum", "geometry"],
}[BACKEND]


@pytest.mark.parametrize("name", MISSING)
def test_what_another_backend_has_says_so_by_name(name):
    needed = "TensorFlow" if name == "geometry" else "TensorFlow or the JAX"
    with pytest.raises(ImportError, match=f"keras_rgd.{name} needs the {needed} backend"):
        getattr(keras_rgd, name)
    assert name not in keras_rgd.__all__


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it is for TensorFlow")
def test_choosing_a_way_needs_tensorflow():
    with pytest.raises(ImportError, match="keras_rgd.per_example.choose_way needs"):
        per_example.choose_way  # noqa: B018


@pytest.mark.skipif(BACKEND != "torch", reason="there they are")
def test_gradients_of_examples_need_another_backend():
    with pytest.raises(ValueError, match=r"RGD\(..., window=32\).*tensorflow or jax"):
        keras_rgd.RGD()


def test_another_name_is_no_name():
    with pytest.raises(AttributeError, match="no attribute 'RDG'"):
        keras_rgd.RDG  # noqa: B018
