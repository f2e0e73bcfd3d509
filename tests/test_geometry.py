"""Metric, Christoffel symbols and derivatives against dense arrays and finite differences."""

import cases
import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from keras import layers as L
from networks import CROSSENTROPY, CURVED, LABELS, C, X, along, finite_differences, lists, on, same
from wide import swept

import keras_rgd
from keras_rgd import geometry
from keras_rgd._support import vectors
from keras_rgd.diffusion_metric import DiffusionMetric
from keras_rgd.epsilon import Fraction, WeakField

pytestmark = pytest.mark.usefixtures("float64")

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


LAYERS = ["conv2d", "lstm", "embedding", "multi_head_attention", "group_normalization"]
LAYERS += ["transformer", "two_inputs_two_outputs", "weights_over_time", "frozen_layer"]


@pytest.mark.parametrize("name", swept(LAYERS, ["conv2d", "embedding", "weights_over_time"]))
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
    oracle = reference.traced(model, case.loss_shape, training=False)

    def G(w):
        point.move_to(w)
        return oracle(x, y, sample_weight).G

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
        match="uses tf.stop_gradient on what depends on its weights .*hides.*/StopGradient",
    ):
        geometry.gradient_flow(model, X, LABELS, 1.0)
