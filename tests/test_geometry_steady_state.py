"""Where flows rest and SGD wanders: divergence, current, defect and ensembles, in closed form."""

import keras
import numpy as np
import pytest
import reference
from keras import layers as L
from networks import CROSSENTROPY, CURVED, LABELS, C, X, built, finite_differences, lists, on, same

from keras_rgd import geometry
from keras_rgd.epsilon import Fraction

pytestmark = pytest.mark.usefixtures("float64")


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
    estimate = geometry.diffusion_divergence(*network.data, probes=100, seed=1)
    error = reference.flatten(estimate.standard_error)
    deviation = (reference.flatten(estimate.value) - exact) / error
    assert np.sqrt(np.mean(deviation**2)) == pytest.approx(1, abs=0.5)
    more = geometry.diffusion_divergence(*network.data, probes=400, seed=1)
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
    network = built("linear")
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


RUNS = 1000


@on("points")
def test_the_covariance_of_one_step_is_D_over_the_batch_size(network):
    ensemble = geometry.sgd_ensemble(
        *network.data, 1, learning_rate=0.3, batch_size=4, runs=RUNS, seed=3
    )
    expected = 0.3**2 * network.dense.D(network.start) / 4
    covariance = ensemble.covariance(1)
    assert np.linalg.norm(covariance - expected) <= 0.15 * np.linalg.norm(expected)
    assert ensemble.spread[1] == pytest.approx(np.trace(covariance), rel=1e-9)
    mean = network.start - 0.3 * network.dense.v(network.start)
    error = np.sqrt(np.diag(expected) / RUNS)
    assert np.all(np.abs(ensemble.mean[1] - mean) < 5 * error)
    # Without replacement it is less, by (N - B) / (N - 1).
    other = geometry.sgd_ensemble(
        *network.data, 1, learning_rate=0.3, batch_size=4, runs=RUNS, replacement=False
    )
    assert other.spread[1] / ensemble.spread[1] == pytest.approx(5 / 8, rel=0.1)
    assert ensemble.deviations(1).shape == (RUNS, 3)
