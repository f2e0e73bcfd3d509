"""What Eq. (10) neglects, against the same integrals over dense arrays."""

import keras
import numpy as np
import pytest
from networks import LABELS, TIMES, C, X, finite_differences, followed, on, same
from wide import swept, wide

import keras_rgd
from keras_rgd import geometry
from keras_rgd.epsilon import Fraction, WeakField

pytestmark = pytest.mark.usefixtures("float64")


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


@on("mlp")
@pytest.mark.parametrize("exact", swept([False, True], [False]))
def test_the_neglected_terms_of_a_geodesic_are_all_that_there_is(network, exact):
    dense, d, epsilon = network.dense, network.d, network.epsilon
    flow = geometry.geodesic_flow(*network.data, TIMES[-1], epsilon, exact=exact, times=TIMES)
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
    for times in ([0.0, 0.2, 0.4], [0.2, 0.4]):
        flow = geometry.geodesic_flow(*network.data, 0.4, network.epsilon, times=times)
        results.append(geometry.neglected_terms(flow))
    whole, late = results
    assert whole.constants[0] > 1e-3
    assert np.all(late.imbalance < 1e-8)
    for name in whole.names:
        expected = getattr(whole, name)[1:]
        np.testing.assert_allclose(getattr(late, name), expected, rtol=1e-6, atol=1e-9)


@wide
@on("mlp")
def test_the_neglected_terms_along_rgd_are_those_of_dense_arrays(network):
    dense, epsilon = network.dense, network.epsilon

    def acceleration(x, x1):
        H, v = dense.loss_hessian(x), dense.v(x)
        change = np.einsum("rsz,z->rs", dense.dD(x), x1)
        return -H @ x1 + epsilon * (dense.D(x) @ H @ x1 + change @ v)

    flow = geometry.rgd_flow(*network.data, TIMES[-1], epsilon, times=TIMES)
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
    dense, T = network.dense, TIMES[-1]

    def epsilon(x):
        return C / dense.lambda_max(x)

    def R(x):
        x1, D = dense.rgd(x, epsilon(x)), dense.D(x)
        slope = finite_differences(epsilon, x)
        f, H = dense.losses(x), dense.H(x)
        moved = (f - f.mean()) @ (H @ x1) / len(f)
        return x1 @ D @ x1 * slope / 2 - slope @ x1 * moved

    flow = geometry.rgd_flow(*network.data, T, Fraction(C), times=[0.0, T])
    terms = geometry.neglected_terms(flow)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    integral = sum(
        w * T / 2 * R(flow.position(T * (1 + t) / 2)) for t, w in zip(nodes, weights, strict=True)
    )
    assert terms.epsilon_derivative[-1] == pytest.approx(np.linalg.norm(integral), rel=1e-6)
    # Along another flow, for this rule.
    other = geometry.neglected_terms(
        geometry.gradient_flow(*network.data, T, times=[0.0, T]), epsilon=Fraction(C)
    )
    assert other.epsilon_derivative[-1] > 1e-3
    assert other.departure[0] == pytest.approx(
        network.epsilon * np.linalg.norm(dense.D(network.start) @ dense.v(network.start)), rel=1e-9
    )


# In the monitor


@on("mlp")
@pytest.mark.parametrize("rule", swept([Fraction(C), WeakField(0.05)], [Fraction(C)]))
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
