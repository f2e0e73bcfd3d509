"""The geometry against dense arrays in float64 (JAX), closed forms and finite differences."""

import cases
import dense_geometry
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import reference
import scipy.integrate
import steps
import tensorflow as tf
from keras import layers as L

import keras_rgd
from keras_rgd import geometry
from keras_rgd._support import vectors
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.diffusion_metric import DiffusionMetric
from keras_rgd.epsilon import Fixed, Fraction, WeakField
from keras_rgd.geometry import flow as flows
from keras_rgd.geometry import steady_state

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy

RNG = np.random.default_rng(0)
X, LABELS = RNG.normal(size=(9, 3)), RNG.integers(0, 3, 9)
IMAGES, TARGETS = RNG.normal(size=(6, 5, 5, 1)), RNG.normal(size=(6, 2))
C = 0.4

pytestmark = pytest.mark.usefixtures("float64")


class Network:
    """A Keras model with its data, and the same written out with dense arrays."""

    def __init__(self, stack, shape, loss, x, y, losses, rest=lambda w: 0.0):
        keras.utils.set_random_seed(1)
        self.model = keras_rgd.RGDSequential([keras.Input(shape), *stack])
        self.model.compile("sgd", loss)
        for w in self.model.trainable_variables:
            w.assign(w.numpy() + 0.2 * np.random.default_rng(3).normal(size=w.shape))
        self.data = (self.model, x, y)
        self.shapes = [tuple(w.shape) for w in self.model.trainable_variables]
        self.start = reference.flatten(self.model.get_weights())
        self.d = len(self.start)
        self.dense = dense_geometry.DenseGeometry(
            lambda w: losses(self.split(w)), lambda w: rest(self.split(w))
        )
        self.epsilon = C / self.dense.lambda_max(self.start)
        self.u, self.v = np.random.default_rng(4).normal(size=(2, self.d))

    def split(self, w):
        ends = np.cumsum([int(np.prod(s)) for s in self.shapes])
        pieces = [w[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        return [p.reshape(s) for p, s in zip(pieces, self.shapes, strict=True)]


def crossentropy(z):
    return jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(z)), LABELS]


def mlp():
    """Tanh, cross-entropy, a regularizer."""

    def losses(w):
        return crossentropy(jnp.tanh(X @ w[0] + w[1]) @ w[2] + w[3])

    hidden = L.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))
    return Network(
        [hidden, L.Dense(3)],
        (3,),
        CROSSENTROPY(from_logits=True),
        X,
        LABELS,
        losses,
        lambda w: 0.01 * jnp.sum(w[0] ** 2),
    )


def convolution():
    """A convolution, softplus, squared errors."""

    def losses(w):
        z = jax.lax.conv_general_dilated(
            jnp.asarray(IMAGES), w[0], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = jax.nn.softplus(z + w[1]).reshape(len(IMAGES), -1) @ w[2] + w[3]
        return jnp.mean((z - TARGETS) ** 2, axis=1)

    stack = [L.Conv2D(2, 3, 2, activation="softplus"), L.Flatten(), L.Dense(2)]
    return Network(stack, (5, 5, 1), "mse", IMAGES, TARGETS, losses)


def linear():
    """Linear regression of one number: f_i = (<w, x_i> + b - y_i)^2."""

    def losses(w):
        return (X @ w[0][:, 0] + w[1] - LABELS) ** 2

    return Network([L.Dense(1)], (3,), "mse", X, LABELS[:, None].astype(float), losses)


def points():
    """Biases only: f_i = |b - c_i|^2 / 3, whose Hessians are all alike."""

    def losses(w):
        return jnp.mean((w[0] - X) ** 2, axis=1)

    class Bias(L.Layer):
        def build(self, shape):
            self.b = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x):
            return 0 * x + self.b

    return Network([Bias()], (3,), "mse", X, X, losses)


BUILDERS = {f.__name__: f for f in (mlp, convolution, linear, points)}
CURVED = ["mlp", "convolution", "linear"]
BUILT = {}


@pytest.fixture
def network(request):
    name = request.param
    if name not in BUILT:
        BUILT[name] = BUILDERS[name]()
    network = BUILT[name]
    yield network
    # Whatever was asked of it, the model was left as it was.
    np.testing.assert_array_equal(reference.flatten(network.model.get_weights()), network.start)


def on(*names):
    return pytest.mark.parametrize("network", names, indirect=True)


def same(actual, expected, tolerance=1e-9):
    if isinstance(actual, list):
        actual = reference.flatten(actual)
    assert reference.relative_error(actual, expected) <= tolerance


def lists(network, *flat):
    """Flat vectors as lists of arrays shaped as the weights."""
    return [[np.asarray(p) for p in network.split(v)] for v in flat]


# D, two ways, and the metric


@on("mlp", "convolution")
def test_D_is_the_covariance_and_the_sum_over_pairs_of_differences(network):
    """Eq. (2) and Eq. (3)."""
    G = network.dense.G(network.start)
    n = len(G)
    pairs = np.array([G[i] - G[j] for i in range(n) for j in range(i + 1, n)])
    assert len(pairs) == n * (n - 1) / 2
    same(pairs.T @ pairs / n**2, network.dense.D(network.start))
    D = keras_rgd.diffusion_matrix(*network.data)
    (v,) = lists(network, network.v)
    same(D.matvec(v), pairs.T @ (pairs @ network.v) / n**2)
    assert D.rank() <= n - 1
    assert np.linalg.matrix_rank(pairs) <= n - 1


@on("mlp")
def test_indices_are_lowered_and_raised_by_the_metric(network):
    metric = DiffusionMetric(keras_rgd.diffusion_matrix(*network.data), network.epsilon)
    g = network.dense.g(network.start, network.epsilon)
    u, v = lists(network, network.u, network.v)
    same(metric.apply(v), g @ network.v)
    same(metric.inverse(v), np.linalg.solve(g, network.v))
    same(metric.inverse(metric.apply(v)), network.v)
    same(metric.weak_inverse(v), 2 * network.v - g @ network.v)
    assert metric.inner(u, v) == pytest.approx(network.u @ g @ network.v, rel=1e-12)
    assert metric.norm(v) == pytest.approx(np.sqrt(network.v @ g @ network.v), rel=1e-12)


# Christoffel symbols


@on(*CURVED)
@pytest.mark.parametrize("exact", [False, True])
def test_christoffel_symbols_are_those_of_dense_arrays(network, exact):
    u, v = lists(network, network.u, network.v)
    ours = geometry.christoffel(*network.data, u, v, network.epsilon, exact=exact)
    symbols = network.dense.christoffel(network.start, network.epsilon, exact)
    same(ours, np.einsum("wuv,u,v->w", symbols, network.u, network.v))
    same(
        ours, reference.flatten(geometry.christoffel(*network.data, v, u, Fraction(C), exact=exact))
    )


def finite_differences(function, x, h=1e-4):
    """The derivatives of an array by x, along the last axis, of fourth order."""

    def one(e):
        near, far = (function(x + k * h * e) - function(x - k * h * e) for k in (1, 2))
        return (8 * near - far) / (12 * h)

    return np.stack([one(e) for e in np.eye(len(x))], axis=-1)


@on("mlp", "convolution")
@pytest.mark.parametrize("constant", [True, False])
def test_christoffel_symbols_are_finite_differences_of_the_metric(network, constant):
    """Eq. (5), for constant eps and for eps(x) = c / lambda_max(x)."""

    def g(x):
        epsilon = network.epsilon if constant else C / network.dense.lambda_max(x)
        return network.dense.g(x, epsilon)

    dg = finite_differences(g, network.start)
    lowered = (dg.transpose(1, 2, 0) + dg.transpose(1, 0, 2) - dg.transpose(2, 0, 1)) / 2
    expected = np.einsum("wuv,u,v->w", lowered, network.u, network.v)
    u, v = lists(network, network.u, network.v)
    options = dict(constant_epsilon=constant)
    same(geometry.christoffel(*network.data, u, v, Fraction(C), **options), expected, 1e-6)
    exact = geometry.christoffel(*network.data, u, v, Fraction(C), exact=True, **options)
    same(exact, np.linalg.solve(g(network.start), expected), 1e-6)


@on("mlp")
def test_the_weak_field_approaches_the_exact_symbols_as_epsilon_squared(network):
    u, v = lists(network, network.u, network.v)

    def distance(epsilon):
        weak, exact = (
            reference.flatten(geometry.christoffel(*network.data, u, v, epsilon, exact=exact))
            for exact in (False, True)
        )
        return np.linalg.norm(weak - exact)

    ratio = distance(network.epsilon / 100) / distance(network.epsilon / 200)
    assert ratio == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(
    "name",
    ["conv2d", "lstm", "embedding", "multi_head_attention", "group_normalization", "transformer"]
    + ["two_inputs_two_outputs", "weights_over_time", "frozen_layer"],
)
def test_derivatives_of_any_layer_are_those_of_per_example_gradients(name):
    case = cases.BY_NAME[name]
    model = steps.build(case, "float64")
    case.compile(model, "sgd")
    x, y, sample_weight = case.batch()
    point = geometry.Geometry(model, x, y, sample_weight)
    rng = np.random.default_rng(0)
    start = point.flat_weights()
    u, v = rng.normal(size=(2, point.d))
    z = rng.normal(size=point.n_examples)
    as_list = [vectors.unflatten(a, point.weights) for a in (u, v)]
    shape = case.loss_shape

    def G(w):
        point.move_to(w)
        return reference.eager(model, x, y, sample_weight, shape, training=False).G

    def along(function, w, direction, h=1e-4):
        near, far = (
            function(w + k * h * direction) - function(w - k * h * direction) for k in (1, 2)
        )
        return (8 * near - far) / (12 * h)

    derivatives = point.derivatives
    with point.visiting():
        Hu, Hv = (along(G, start, a) for a in (u, v))
        T = along(lambda w: along(G, w, u), start, v)
        first = G(start)
        point.move_to(start)
        same(derivatives.dot(as_list[0]).numpy(), first @ u)
        same(derivatives.combine(tf.constant(z)), z @ first)
        same(derivatives.hessian(tf.constant(z), as_list[0]), z @ Hu, 1e-6)
        same(derivatives.second(*as_list).numpy(), Hv @ u, 1e-6)
        same(derivatives.third(tf.constant(z), *as_list), z @ T, 1e-4)


# Flows

TIMES = np.linspace(0, 1, 4)


def followed(slope, state, times=TIMES):
    """By another integrator than the package's."""
    solved = scipy.integrate.solve_ivp(
        lambda t, s: slope(s), (0, times[-1]), state, "LSODA", times, rtol=1e-11, atol=1e-13
    )
    return solved.y.T


@on("mlp", "convolution")
@pytest.mark.parametrize("rule", ["constant", Fraction(C)])
def test_flows_are_those_of_dense_arrays(network, rule):
    dense, d = network.dense, network.d
    constant = rule == "constant"

    def epsilon(w):
        return network.epsilon if constant else C / dense.lambda_max(w)

    flow = geometry.rgd_flow(*network.data, 1.0, network.epsilon if constant else rule, times=TIMES)
    expected = followed(lambda w: dense.rgd(w, epsilon(w)), network.start)
    same(flow.positions, expected, 1e-7)
    same(flow.velocities, np.array([dense.rgd(w, epsilon(w)) for w in expected]), 1e-6)
    same(flow.losses, np.array([dense.loss(w) for w in expected]), 1e-7)
    same(flow.epsilons, np.array([epsilon(w) for w in expected]), 1e-6)
    np.testing.assert_allclose(
        flow.epsilon_lambda_max,
        [epsilon(w) * dense.lambda_max(w) for w in expected],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(flow.times, TIMES)
    assert not flow.diverged
    same(flow.position(TIMES[3]), expected[3], 1e-7)
    assert flow.positions.shape == (4, d)


@on("mlp", "convolution")
@pytest.mark.parametrize("exact", [False, True])
def test_geodesics_are_those_of_dense_arrays(network, exact):
    dense, d = network.dense, network.d

    def slope(state):
        x, x1 = state[:d], state[d:]
        return np.concatenate([x1, dense.geodesic(x, x1, network.epsilon, exact)])

    flow = geometry.geodesic_flow(*network.data, 1.0, network.epsilon, exact=exact, times=TIMES)
    begin = np.concatenate([network.start, dense.rgd(network.start, network.epsilon)])
    expected = followed(slope, begin)
    same(flow.positions, expected[:, :d], 1e-7)
    same(flow.velocities, expected[:, d:], 1e-7)


@on("mlp")
def test_gradient_flow_is_rgd_without_epsilon(network):
    flow = geometry.gradient_flow(*network.data, 1.0, times=TIMES)
    same(flow.positions, followed(lambda w: -network.dense.v(w), network.start), 1e-7)
    other = geometry.rgd_flow(*network.data, 1.0, 0.0, times=TIMES)
    same(other.positions, flow.positions)


def test_without_noise_rgd_flow_is_gradient_flow():
    network = mlp()
    x, y = np.repeat(X[:1], 5, 0), np.repeat(LABELS[:1], 5)
    flows = (
        geometry.gradient_flow(network.model, x, y, 1.0, times=[1.0]),
        geometry.rgd_flow(network.model, x, y, 1.0, Fraction(0.9), times=[1.0]),
    )
    assert np.linalg.norm(flows[0].positions - network.start) > 0.1
    same(flows[1].positions, flows[0].positions)


@on("mlp", "points")
def test_geodesics_without_force_are_straight_where_the_metric_is_constant(network):
    (v,) = lists(network, network.v)
    epsilon = 0.0 if network.d > 3 else network.epsilon
    for exact in (False, True):
        flow = geometry.geodesic_flow(
            *network.data, 1.0, epsilon, velocity=v, exact=exact, force=False, times=TIMES
        )
        same(flow.positions, network.start + TIMES[:, None] * network.v)


@on("mlp", "convolution")
def test_the_length_of_the_velocity_is_conserved_along_an_exact_geodesic(network):
    (v,) = lists(network, network.v)
    flow = geometry.geodesic_flow(
        *network.data, 0.3, network.epsilon, velocity=v, exact=True, force=False
    )
    lengths = [
        v @ network.dense.g(x, network.epsilon) @ v
        for x, v in zip(flow.positions, flow.velocities, strict=True)
    ]
    euclidean = np.sum(flow.velocities**2, 1)
    assert np.ptp(euclidean) > 1e-3 * euclidean[0]  # the metric is not flat here
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-6)


@on("mlp")
def test_steps_of_the_optimizer_approach_the_flow(network):
    model = network.model

    def after(learning_rate):
        model.compile(keras_rgd.RGD(learning_rate, Fixed(network.epsilon)), network.data[0].loss)
        for _ in range(round(1 / learning_rate)):
            model.train_on_batch(X, LABELS)
        result = reference.flatten(model.get_weights())
        for w, value in zip(model.trainable_variables, network.split(network.start), strict=True):
            w.assign(value)
        return result

    flow = geometry.rgd_flow(*network.data, 1.0, network.epsilon, times=[1.0])
    errors = [np.linalg.norm(after(r) - flow.positions[-1]) for r in (0.05, 0.025)]
    assert errors[0] < 0.05 * np.linalg.norm(flow.positions[-1] - network.start)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@on("mlp")
def test_a_flow_that_leaves_its_bounds_ends_there_and_keeps_what_it_has(network):
    flow = geometry.geodesic_flow(
        *network.data, 50.0, network.epsilon, velocity=lists(network, 5 * network.v)[0], force=False
    )
    assert flow.diverged
    assert "eps lambda_max reached 1" in flow.message
    assert flow.epsilon_lambda_max[-1] == pytest.approx(1, rel=1e-6)
    flow = geometry.geodesic_flow(
        *network.data, 50.0, 0.0, velocity=lists(network, 5 * network.v)[0], force=False, max_loss=4
    )
    assert flow.diverged
    assert "the loss exceeded 4" in flow.message
    assert flow.losses[-1] == pytest.approx(4, rel=1e-6)
    assert np.all(np.isfinite(flow.positions))


def test_a_flow_into_infinity_ends_where_the_numbers_do():
    network = linear()
    model = keras.Sequential([keras.Input((3,)), L.Dense(1)])

    def runaway(y, p):
        return -keras.ops.exp(p[:, 0] ** 2)

    model.compile("sgd", runaway)
    flow = geometry.gradient_flow(model, network.data[1], network.data[2], 100.0, max_loss=np.inf)
    assert flow.diverged
    assert flow.times[-1] < 100
    assert len(flow.times) > 3


# What Eq. (10) neglects


def dense_terms(network, flow_slope, acceleration, begin, epsilon, exact):
    """The terms at TIMES, each integral one more component of the differential equation."""
    dense, d = network.dense, network.d

    def cov(a, b):
        return (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)

    def at(x, x1):
        f, G, H, T = dense.losses(x), dense.G(x), dense.H(x), dense.T(x)
        x2, D = acceleration(x, x1), dense.D(x)
        symbols = dense.christoffel(x, epsilon, True) - dense.christoffel(x, epsilon, False)
        integrands = (
            epsilon * cov(f[:, None], np.einsum("iabc,b,c->ia", T, x1, x1))[0],
            epsilon * cov(f[:, None], H @ x2)[0],
            epsilon * D @ x2,
            np.einsum("wuv,u,v->w", symbols, x1, x1),
        )
        return integrands, epsilon * cov(f[:, None], H @ x1)[0], cov(G, G)

    def slope(state):
        x, x1 = flow_slope(state[: len(begin)])
        moved = np.concatenate([x1, acceleration(x, x1)])[: len(begin)]
        return np.concatenate([moved, *at(x, x1)[0]])

    states = followed(slope, np.concatenate([begin, np.zeros(4 * d)]))
    rows = []
    for state in states:
        x, x1 = flow_slope(state[: len(begin)])
        third, acc, total, christoffel = np.split(state[len(begin) :], 4)
        _, curvature, D = at(x, x1)
        v = dense.v(x)
        left = x1 + epsilon * D @ x1 + v
        constants = left - curvature if not rows else constants  # noqa: F821
        right = constants + curvature - third - acc + (0 if exact else total)
        weak = v - epsilon * D @ v
        inverse = np.linalg.solve(np.eye(d) + epsilon * D, v)
        vectors_ = dict(
            gradient=v,
            curvature=curvature,
            third_derivatives=third,
            acceleration=acc,
            condition_9=third + acc,
            total_derivative=total,
            constants=constants,
            christoffel=christoffel,
            inverse=inverse - weak,
            departure=x1 + weak,
            imbalance=left - right,
        )
        rows.append({name: np.linalg.norm(value) for name, value in vectors_.items()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    "network, exact",
    [("mlp", False), ("mlp", True)],
    indirect=["network"],
)
def test_the_neglected_terms_of_a_geodesic_are_all_that_there_is(network, exact):
    dense, d, epsilon = network.dense, network.d, network.epsilon
    flow = geometry.geodesic_flow(*network.data, 1.0, epsilon, exact=exact, times=TIMES)
    terms = geometry.neglected_terms(flow)
    expected = dense_terms(
        network,
        lambda s: (s[:d], s[d:]),
        lambda x, x1: dense.geodesic(x, x1, epsilon, exact),
        np.concatenate([network.start, dense.rgd(network.start, epsilon)]),
        epsilon,
        exact,
    )
    for name in expected:
        np.testing.assert_allclose(
            getattr(terms, name), expected[name], rtol=1e-6, atol=1e-9, err_msg=name
        )
    # Eq. (8), with nothing dropped.
    assert np.all(terms.imbalance < 1e-8)
    assert terms.total_derivative[-1] > 0.001
    np.testing.assert_array_equal(terms.epsilon_derivative, 0)
    same(terms.relative("curvature"), expected["curvature"] / expected["gradient"], 1e-6)
    assert "gradient" not in terms.names and "imbalance" in terms.names


@pytest.mark.parametrize("network", ["mlp"], indirect=True)
def test_the_constants_are_those_of_the_flows_start_whichever_moments_it_reports(network):
    results = []
    for times in ([0.0, 0.5, 1.0], [0.5, 1.0]):
        flow = geometry.geodesic_flow(*network.data, 1.0, network.epsilon, times=times)
        results.append(geometry.neglected_terms(flow))
    whole, late = results
    assert whole.constants[0] > 1e-3
    assert np.all(late.imbalance < 1e-8)
    for name in whole.names:
        expected = getattr(whole, name)[1:]
        np.testing.assert_allclose(getattr(late, name), expected, rtol=1e-6, atol=1e-9)


@on("mlp")
def test_the_neglected_terms_along_rgd_are_those_of_dense_arrays(network):
    dense, epsilon = network.dense, network.epsilon

    def acceleration(x, x1):
        H, v = dense.loss_hessian(x), dense.v(x)
        change = np.einsum("rsz,z->rs", dense.dD(x), x1)
        return -H @ x1 + epsilon * (dense.D(x) @ H @ x1 + change @ v)

    flow = geometry.rgd_flow(*network.data, 1.0, epsilon, times=TIMES)
    terms = geometry.neglected_terms(flow)
    expected = dense_terms(
        network,
        lambda s: (s, dense.rgd(s, epsilon)),
        acceleration,
        network.start,
        epsilon,
        exact=False,
    )
    for name in expected:
        np.testing.assert_allclose(
            getattr(terms, name), expected[name], rtol=1e-6, atol=1e-9, err_msg=name
        )
    np.testing.assert_allclose(terms.departure, 0, atol=1e-12)


@on("mlp")
def test_the_derivative_of_epsilon_is_that_of_its_rule(network):
    """R = <x', D x'> grad eps / 2 - (d eps/dt) Cov_i(f_i, H_i x'), integrated."""
    dense = network.dense

    def epsilon(x):
        return C / dense.lambda_max(x)

    def R(x):
        x1, D = dense.rgd(x, epsilon(x)), dense.D(x)
        slope = finite_differences(epsilon, x)
        f, H = dense.losses(x), dense.H(x)
        moved = (f - f.mean()) @ (H @ x1) / len(f)
        return x1 @ D @ x1 * slope / 2 - slope @ x1 * moved

    flow = geometry.rgd_flow(*network.data, 1.0, Fraction(C), times=[0.0, 1.0])
    terms = geometry.neglected_terms(flow)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    integral = sum(
        w / 2 * R(flow.position((1 + t) / 2)) for t, w in zip(nodes, weights, strict=True)
    )
    assert terms.epsilon_derivative[-1] == pytest.approx(np.linalg.norm(integral), rel=1e-6)
    # Along another flow, for this rule.
    other = geometry.neglected_terms(
        geometry.gradient_flow(*network.data, 1.0, times=[0.0, 1.0]), epsilon=Fraction(C)
    )
    assert other.epsilon_derivative[-1] > 1e-3
    assert other.departure[0] == pytest.approx(
        network.epsilon * np.linalg.norm(dense.D(network.start) @ dense.v(network.start)), rel=1e-9
    )


# The steady state


@on(*CURVED, "points")
def test_the_divergence_of_D_is_that_of_dense_arrays(network):
    expected = np.einsum("rss->r", network.dense.dD(network.start))
    ours = geometry.diffusion_divergence(*network.data)
    scale = np.linalg.norm(network.dense.D(network.start))
    assert np.linalg.norm(reference.flatten(ours.value) - expected) <= 1e-9 * scale
    assert ours.norm == pytest.approx(np.linalg.norm(expected), abs=1e-9 * scale)
    assert ours.probes is None
    np.testing.assert_array_equal(reference.flatten(ours.standard_error), 0)


@on("mlp")
def test_probes_estimate_the_divergence_within_their_error_bars(network):
    exact = reference.flatten(geometry.diffusion_divergence(*network.data).value)
    estimate = geometry.diffusion_divergence(*network.data, probes=300, seed=1)
    error = reference.flatten(estimate.standard_error)
    deviation = (reference.flatten(estimate.value) - exact) / error
    assert np.sqrt(np.mean(deviation**2)) == pytest.approx(1, abs=0.5)
    more = geometry.diffusion_divergence(*network.data, probes=1200, seed=1)
    ratio = np.median(error / reference.flatten(more.standard_error))
    assert ratio == pytest.approx(2, rel=0.2)


@on("mlp", "linear", "points")
def test_the_residual_and_the_current_are_those_of_dense_arrays(network):
    D, v = network.dense.D(network.start), network.dense.v(network.start)
    eps = network.epsilon
    residual = -(eps**2) * D @ D @ v
    same(geometry.steady_state_residual(*network.data, eps), residual)
    # Eq. (11) itself.
    phi = v - eps * D @ v
    same(residual, -v + phi + eps * D @ phi, 1e-7)
    options = dict(learning_rate=0.1, batch_size=4)
    current = geometry.probability_current(*network.data, eps, **options)
    divergence = np.einsum("rss->r", network.dense.dD(network.start))
    same(current.value, residual - 0.1 / 8 * eps * divergence)


@on("mlp")
def test_the_current_with_the_derivative_of_epsilon(network):
    dense = network.dense

    def metric(x):
        return dense.g(x, C / dense.lambda_max(x))

    divergence = np.einsum("rss->r", finite_differences(metric, network.start))
    options = dict(learning_rate=0.1, batch_size=4, constant_epsilon=False)
    current = geometry.probability_current(*network.data, Fraction(C), **options)
    residual = reference.flatten(geometry.steady_state_residual(*network.data, Fraction(C)))
    same(reference.flatten(current.value) - residual, -0.1 / 8 * divergence, 1e-6)


@on(*CURVED, "points")
@pytest.mark.parametrize("constant", [True, False])
def test_the_integrability_defect_is_that_of_the_jacobian(network, constant):
    dense = network.dense

    def field(x):
        return -dense.rgd(x, network.epsilon if constant else C / dense.lambda_max(x))

    J = finite_differences(field, network.start)
    u, v = lists(network, network.u, network.v)
    ours = geometry.integrability_defect(
        *network.data, u, v, Fraction(C), constant_epsilon=constant
    )
    expected = network.u @ J @ network.v - network.v @ J @ network.u
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-8)


@on("points")
def test_where_all_hessians_are_one_multiple_of_the_identity_the_steady_state_holds(network):
    """f_i = |b - c_i|^2 / 3: D is 4/9 of the covariance of the c_i, everywhere."""
    D = 4 / 9 * np.cov(X, rowvar=False, bias=True)
    same(np.stack([network.dense.D(network.start)]), D[None])
    u, v = lists(network, network.u, network.v)
    assert abs(geometry.integrability_defect(*network.data, u, v, network.epsilon)) < 1e-12
    assert geometry.diffusion_divergence(*network.data).norm < 1e-12
    symbols = geometry.christoffel(*network.data, u, v, network.epsilon, exact=True)
    assert np.linalg.norm(reference.flatten(symbols)) < 1e-12
    terms = geometry.neglected_terms(
        geometry.rgd_flow(*network.data, 1.0, network.epsilon, times=[0.0, 1.0])
    )
    for name in ("curvature", "third_derivatives", "acceleration", "christoffel"):
        assert np.all(getattr(terms, name) < 1e-12), name
    # The residual of Eq. (11) does not vanish, here neither.
    gradient = 2 / 3 * (network.start - X.mean(0))
    expected = -(network.epsilon**2) * D @ D @ gradient
    same(geometry.steady_state_residual(*network.data, network.epsilon), expected)


def test_equal_hessians_that_do_not_commute_with_D_have_a_defect():
    """Logits of biases alone: all H_i are diag(p) - p p^T, and D is that of the labels."""

    class Logits(L.Layer):
        def build(self, shape):
            self.b = self.add_weight(shape=(3,), initializer=keras.initializers.Constant(0))
            self.b.assign([0.5, -1.0, 0.2])

        def call(self, x):
            return 0 * x[:, :3] + self.b

    model = keras.Sequential([keras.Input((3,)), Logits()])
    model.compile("sgd", CROSSENTROPY(from_logits=True))
    p = np.exp([0.5, -1.0, 0.2]) / np.sum(np.exp([0.5, -1.0, 0.2]))
    q = np.bincount(LABELS, minlength=3) / len(LABELS)
    H, D = np.diag(p) - np.outer(p, p), np.diag(q) - np.outer(q, q)
    u, w = np.eye(3)[:2]
    ours = geometry.integrability_defect(model, X, LABELS, [u], [w], 0.5)
    assert ours == pytest.approx(-0.5 * (u @ D @ H @ w - w @ D @ H @ u), rel=1e-9)
    assert abs(ours) > 1e-3
    assert geometry.diffusion_divergence(model, X, LABELS).norm < 1e-12


def test_linear_regression_in_closed_form():
    """Third derivatives vanish; condition (9) and the divergence of D do not."""
    network = linear()
    w = network.start
    A = np.column_stack([X, np.ones(len(X))])
    residuals = A @ w - LABELS
    G, H = 2 * residuals[:, None] * A, 2 * np.einsum("ia,ib->iab", A, A)
    traces = 2 * np.sum(A**2, 1)
    centred = G - G.mean(0)
    divergence = ((traces - traces.mean()) @ G) / len(G)
    divergence += np.einsum("iab,ib->a", H - H.mean(0), centred) / len(G)
    same(geometry.diffusion_divergence(*network.data).value, divergence)
    assert np.linalg.norm(divergence) > 0.1
    flow = geometry.rgd_flow(*network.data, 0.2, network.epsilon, times=[0.0, 0.2])
    terms = geometry.neglected_terms(flow)
    assert np.all(terms.third_derivatives < 1e-10)
    f = residuals**2
    velocity = network.dense.rgd(w, network.epsilon)
    curvature = network.epsilon * (f - f.mean()) @ (H @ velocity) / len(f)
    assert terms.curvature[0] == pytest.approx(np.linalg.norm(curvature), rel=1e-9)
    assert terms.acceleration[-1] > 1e-3


# SGD


@on("mlp")
def test_an_ensemble_of_whole_batches_is_gradient_descent(network):
    ensemble = geometry.sgd_ensemble(
        *network.data, 7, learning_rate=0.1, batch_size=9, runs=2, every=3, replacement=False
    )
    w, kept = network.start, [network.start]
    for step in range(1, 8):
        w = w - 0.1 * network.dense.v(w)
        if step % 3 == 0 or step == 7:
            kept.append(w)
    same(ensemble.mean, np.array(kept))
    np.testing.assert_allclose(ensemble.times, [0, 0.3, 0.6, 0.7])
    assert np.all(ensemble.spread < 1e-20)


@on("points")
def test_the_covariance_of_one_step_is_D_over_the_batch_size(network):
    ensemble = geometry.sgd_ensemble(
        *network.data, 1, learning_rate=0.3, batch_size=4, runs=4000, seed=3
    )
    expected = 0.3**2 * network.dense.D(network.start) / 4
    covariance = ensemble.covariance(1)
    assert np.linalg.norm(covariance - expected) <= 0.08 * np.linalg.norm(expected)
    assert ensemble.spread[1] == pytest.approx(np.trace(covariance), rel=1e-9)
    mean = network.start - 0.3 * network.dense.v(network.start)
    error = np.sqrt(np.diag(expected) / 4000)
    assert np.all(np.abs(ensemble.mean[1] - mean) < 5 * error)
    # Without replacement it is less, by (N - B) / (N - 1).
    other = geometry.sgd_ensemble(
        *network.data, 1, learning_rate=0.3, batch_size=4, runs=4000, replacement=False
    )
    assert other.spread[1] / ensemble.spread[1] == pytest.approx(5 / 8, rel=0.1)
    assert ensemble.deviations(1).shape == (4000, 3)


# What is refused


@on("mlp")
@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda n, u: geometry.christoffel(*n.data, u[:-1], u, 0.1),
            "`u` must be a list of arrays",
        ),
        (lambda n, u: geometry.christoffel(*n.data, u, u, 1e9), "epsilon \\* lambda_max < 1"),
        (
            lambda n, u: geometry.christoffel(
                *n.data, u, u, WeakField(0.1), constant_epsilon=False
            ),
            "derivative of eps",
        ),
        (lambda n, u: geometry.gradient_flow(*n.data, -1.0), "`duration` must be a positive"),
        (
            lambda n, u: geometry.gradient_flow(*n.data, 1.0, times=[0.5, 2.0]),
            "`times` must increase",
        ),
        (lambda n, u: geometry.rgd_flow(*n.data, 1.0, 1e9), "epsilon \\* lambda_max < 1"),
        (lambda n, u: geometry.geodesic_flow(*n.data, 1.0, 0.1, velocity=[1]), "`velocity` must"),
        (lambda n, u: geometry.diffusion_divergence(*n.data, probes=1), "`probes` must be"),
        (
            lambda n, u: geometry.probability_current(
                *n.data, 0.1, learning_rate=0.1, batch_size=0
            ),
            "batch_size=0",
        ),
        (
            lambda n, u: geometry.sgd_ensemble(*n.data, 0, learning_rate=0.1, batch_size=2),
            "`steps` must be",
        ),
        (
            lambda n, u: geometry.sgd_ensemble(*n.data, 2, learning_rate=0, batch_size=2),
            "`learning_rate` must be",
        ),
        (
            lambda n, u: geometry.sgd_ensemble(*n.data, 2, learning_rate=0.1, batch_size=10),
            "at most N = 9",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(network, call, message):
    (u,) = lists(network, network.u)
    with pytest.raises(ValueError, match=message):
        call(network, u)


@on("mlp")
def test_a_moment_outside_of_the_flow_and_a_large_covariance_are_refused(network):
    flow = geometry.gradient_flow(*network.data, 1.0)
    with pytest.raises(ValueError, match="known for 0 <= t <= 1"):
        flow.position(1.5)
    with pytest.raises(ValueError, match="read-only"):
        flow.positions[0] = 0
    ensemble = geometry.Ensemble(np.zeros(1), np.zeros((2, 1, 6000)), 0.1, 2, 0.0)
    with pytest.raises(ValueError, match="expected d <= 5,000"):
        ensemble.covariance(0)


def test_epsilon_has_no_derivative_where_two_eigenvalues_are_equal():
    """Points on the corners of a square: D is a multiple of the identity."""
    corners = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])

    class Bias(L.Layer):
        def build(self, shape):
            self.b = self.add_weight(shape=(2,), initializer="zeros")

        def call(self, x):
            return 0 * x + self.b

    model = keras.Sequential([keras.Input((2,)), Bias()])
    model.compile("sgd", "mse")
    u = [np.array([1.0, 2.0])]
    with pytest.raises(ValueError, match="not a simple eigenvalue"):
        geometry.christoffel(model, corners, corners, u, u, Fraction(0.5), constant_epsilon=False)
    assert DiffusionMatrix is type(keras_rgd.diffusion_matrix(model, corners, corners))


def test_second_derivatives_that_tensorflow_does_not_know_are_refused():
    class Hides(L.Layer):
        def call(self, x):
            mean = tf.reduce_mean(x, 1, keepdims=True)
            variance = tf.reduce_mean((x - tf.stop_gradient(mean)) ** 2, 1, keepdims=True)
            return (x - mean) / tf.sqrt(variance + 0.1)

    model = keras.Sequential([keras.Input((3,)), L.Dense(4), Hides(), L.Dense(3)])
    model.compile("sgd", CROSSENTROPY(from_logits=True))
    with pytest.raises(
        ValueError,
        match="uses tf.stop_gradient on what depends on its weights .*hides_1/StopGradient",
    ):
        geometry.gradient_flow(model, X, LABELS, 1.0)


def test_half_precision_is_refused():
    with steps.floatx("float32"):
        stack = [L.Dense(4, "tanh", dtype="mixed_float16"), L.Dense(3, dtype="float32")]
        model = keras.Sequential([keras.Input((3,)), *stack])
        model.compile("sgd", CROSSENTROPY(from_logits=True))
        with pytest.raises(ValueError, match="Received: float16"):
            geometry.gradient_flow(model, X, LABELS, 1.0)


def test_float32_models_flow_within_their_own_precision():
    with steps.floatx("float32"):
        single = mlp()
    double = mlp()
    double.model.set_weights(single.model.get_weights())
    flows = [
        geometry.rgd_flow(n.model, X, LABELS, 1.0, double.epsilon, times=[1.0])
        for n in (single, double)
    ]
    same(flows[0].positions, flows[1].positions, 1e-4)
    assert flows[0].evaluations < 2000


# What is shown


@on("mlp")
def test_only_long_work_shows_a_bar(network, monkeypatch, capsys):
    geometry.gradient_flow(*network.data, 0.1)
    assert capsys.readouterr().out == ""
    for module in (flows, steady_state):
        monkeypatch.setattr(module, "SHOWN_AFTER", 0.0)
    geometry.gradient_flow(*network.data, 0.1, verbose=False)
    assert capsys.readouterr().out == ""
    geometry.gradient_flow(*network.data, 0.1)
    geometry.diffusion_divergence(*network.data, probes=2)
    shown = capsys.readouterr().out
    assert "gradient flow" in shown and "divergence of D" in shown and "remaining" in shown


# In the monitor


@on("mlp")
@pytest.mark.parametrize("rule", [Fraction(C), WeakField(0.05)])
def test_the_monitor_records_what_equation_10_neglects(network, rule):
    dense, model = network.dense, network.model
    model.compile(keras.optimizers.SGD(0.0), model.loss)
    monitor = keras_rgd.DiffusionMonitor((X, LABELS), epsilon=rule, neglected_terms=True)
    model.fit(X, LABELS, epochs=1, verbose=0, callbacks=[monitor])
    (record,) = monitor.records
    x, eps = network.start, record.epsilon
    varies = isinstance(rule, Fraction)

    def velocity(w):
        return dense.rgd(w, C / dense.lambda_max(w) if varies else eps)

    x1, f, H, D = velocity(x), dense.losses(x), dense.H(x), dense.D(x)
    x2 = (velocity(x + 1e-5 * x1) - velocity(x - 1e-5 * x1)) / 2e-5
    change = np.linalg.norm(dense.loss_hessian(x) @ x1)
    moved = (f - f.mean()) @ (H @ x1) / len(f)
    symbols = dense.christoffel(x, eps, True) - dense.christoffel(x, eps, False)
    expected = {
        "curvature": np.linalg.norm(eps * moved) / np.linalg.norm(dense.v(x)),
        "acceleration": np.linalg.norm(eps * D @ x2) / change,
        "christoffel": np.linalg.norm(np.einsum("wuv,u,v->w", symbols, x1, x1)) / change,
    }
    for name, value in expected.items():
        assert getattr(record, f"neglected_{name}") == pytest.approx(value, rel=1e-6), name
    if not varies:
        assert np.isnan(record.neglected_epsilon)
        return
    slope = finite_differences(lambda w: C / dense.lambda_max(w), x)
    R = x1 @ D @ x1 * slope / 2 - slope @ x1 * moved
    assert record.neglected_epsilon == pytest.approx(np.linalg.norm(R) / change, rel=1e-6)


def test_the_monitor_neglects_in_evaluation_mode_alone():
    with pytest.raises(ValueError, match="neglected_terms=True, training=True"):
        keras_rgd.DiffusionMonitor((X, LABELS), neglected_terms=True, training=True)
