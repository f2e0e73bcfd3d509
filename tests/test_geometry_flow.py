"""Flows of Eq. (8) and Eq. (10) against dense arrays, another integrator and closed forms."""

import keras
import numpy as np
import pytest
import reference
import steps
from keras import layers as L
from networks import CROSSENTROPY, LABELS, TIMES, C, X, built, followed, lists, mlp, on, same
from wide import wide

import keras_rgd
from keras_rgd import geometry
from keras_rgd.epsilon import Fixed, Fraction
from keras_rgd.geometry import flow as flows
from keras_rgd.geometry import steady_state

pytestmark = pytest.mark.usefixtures("float64")


@on("mlp", "convolution", always=["mlp"])
@pytest.mark.parametrize("rule", ["constant", Fraction(C)])
def test_flows_are_those_of_dense_arrays(network, rule):
    dense, d = network.dense, network.d
    constant = rule == "constant"

    def epsilon(w):
        return network.epsilon if constant else C / dense.lambda_max(w)

    flow = geometry.rgd_flow(
        *network.data, TIMES[-1], network.epsilon if constant else rule, times=TIMES
    )
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


@on("mlp", "convolution", always=["mlp"])
@pytest.mark.parametrize("exact", [False, True])
def test_geodesics_are_those_of_dense_arrays(network, exact):
    dense, d = network.dense, network.d

    def slope(state):
        x, x1 = state[:d], state[d:]
        return np.concatenate([x1, dense.geodesic(x, x1, network.epsilon, exact)])

    flow = geometry.geodesic_flow(
        *network.data, TIMES[-1], network.epsilon, exact=exact, times=TIMES
    )
    begin = np.concatenate([network.start, dense.rgd(network.start, network.epsilon)])
    expected = followed(slope, begin)
    same(flow.positions, expected[:, :d], 1e-7)
    same(flow.velocities, expected[:, d:], 1e-7)


@on("mlp")
def test_gradient_flow_is_rgd_without_epsilon(network):
    flow = geometry.gradient_flow(*network.data, TIMES[-1], times=TIMES)
    same(flow.positions, followed(lambda w: -network.dense.v(w), network.start), 1e-7)
    other = geometry.rgd_flow(*network.data, TIMES[-1], 0.0, times=TIMES)
    same(other.positions, flow.positions)


def test_without_noise_rgd_flow_is_gradient_flow():
    network = built("mlp")
    x, y = np.repeat(X[:1], 5, 0), np.repeat(LABELS[:1], 5)
    flows = (
        geometry.gradient_flow(network.model, x, y, 0.3, times=[0.3]),
        geometry.rgd_flow(network.model, x, y, 0.3, Fraction(0.9), times=[0.3]),
    )
    assert np.linalg.norm(flows[0].positions - network.start) > 0.1
    same(flows[1].positions, flows[0].positions)


@on("mlp", "points", always=["points"])
def test_geodesics_without_force_are_straight_where_the_metric_is_constant(network):
    (v,) = lists(network, network.v)
    epsilon = 0.0 if network.d > 3 else network.epsilon
    for exact in (False, True):
        flow = geometry.geodesic_flow(
            *network.data, TIMES[-1], epsilon, velocity=v, exact=exact, force=False, times=TIMES
        )
        same(flow.positions, network.start + TIMES[:, None] * network.v)


@on("mlp", "convolution", always=["convolution"])
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


@wide
def test_a_flow_into_infinity_ends_where_the_numbers_do():
    model = keras.Sequential([keras.Input((3,)), L.Dense(1)])

    def runaway(y, p):
        return -keras.ops.exp(p[:, 0] ** 2)

    model.compile("sgd", runaway)
    flow = geometry.gradient_flow(model, X, LABELS[:, None], 100.0, max_loss=np.inf)
    assert flow.diverged
    assert flow.times[-1] < 100
    assert len(flow.times) > 3


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


def test_half_precision_is_refused():
    with steps.floatx("float32"):
        stack = [L.Dense(4, "tanh", dtype="mixed_float16"), L.Dense(3, dtype="float32")]
        model = keras.Sequential([keras.Input((3,)), *stack])
        model.compile("sgd", CROSSENTROPY(from_logits=True))
        with pytest.raises(ValueError, match="Received: float16"):
            geometry.gradient_flow(model, X, LABELS, 1.0)


@wide
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
