"""D and g = I + eps D against dense numpy, SciPy and closed forms."""

import hypothesis
import keras
import numpy as np
import pytest
import reference
import scipy.sparse.linalg
import tensorflow as tf
from hypothesis import strategies as st
from rows import Rows, random_rows

import keras_rgd
from keras_rgd import DiffusionMatrix, DiffusionMetric
from keras_rgd._support import eigensolvers, vectors
from keras_rgd.diffusion_metric import choose_epsilon, weak_field_error
from keras_rgd.direction import direction_of
from keras_rgd.largest_eigenvalue import ESTIMATE_MARGIN

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def gradients():
    return random_rows()


@pytest.fixture
def D(gradients):
    return DiffusionMatrix(gradients)


@pytest.fixture
def vector():
    return np.random.default_rng(5).normal(size=10)


def as_list(vector, gradients):
    return vectors.unflatten(vector, gradients.weights)


# D


def test_matvec_equals_dense_D(D, gradients, vector):
    received = vectors.flatten(D.matvec(as_list(vector, gradients)))
    np.testing.assert_allclose(received, gradients.dense.D @ vector, **CLOSE)


def test_matvec_of_zero_is_zero(D, gradients):
    assert np.all(vectors.flatten(D.matvec(as_list(np.zeros(10), gradients))) == 0)


def test_gram_holds_the_inner_products_of_the_gradients(D, gradients):
    G = gradients.dense.G
    np.testing.assert_allclose(D.gram(), G @ G.T, **CLOSE)


def test_centered_gram_equals_dense_K(D, gradients):
    np.testing.assert_allclose(D.centered_gram(), gradients.dense.K, **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 6, 10, 15])
def test_eigenvalues_equal_those_of_dense_D(n):
    gradients = random_rows(n)
    eigenvalues = DiffusionMatrix(gradients).eigenvalues()
    assert eigenvalues.dtype == np.float64
    assert len(eigenvalues) == min(n, 10)
    expected = gradients.dense.eigenvalues[: len(eigenvalues)]
    np.testing.assert_allclose(eigenvalues, expected, atol=1e-10)


def test_top_eigenvalue_and_trace_equal_those_of_dense_D(D, gradients):
    np.testing.assert_allclose(D.top_eigenvalue(), gradients.dense.lambda_max, **CLOSE)
    np.testing.assert_allclose(D.trace(), np.trace(gradients.dense.D), **CLOSE)


def test_eigenvectors_are_those_of_dense_D(D, gradients):
    k = 4
    received = D.eigenvectors(k)
    E = np.concatenate([np.reshape(t, (k, -1)) for t in received], axis=1)
    np.testing.assert_allclose(E @ E.T, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(gradients.dense.D @ E.T, E.T * D.eigenvalues()[:k], atol=1e-10)


def test_example_coordinates_are_projections_on_the_eigenvectors(D, gradients, vector):
    E = np.concatenate([np.reshape(t, (5, -1)) for t in D.eigenvectors(5)], axis=1)
    received = D.example_coordinates(as_list(vector, gradients))
    np.testing.assert_allclose(received[:5], E @ vector, atol=1e-9)
    assert received[5] == pytest.approx(0, abs=1e-6)  # the null vector of K


@pytest.mark.parametrize("k", [0, -1, 6, 11, 2.5, "a"])
def test_more_eigenvectors_than_positive_eigenvalues_are_refused(k):
    D = DiffusionMatrix(random_rows(6))
    if k == 6 and np.count_nonzero(D.eigenvalues() > 0) == 6:
        pytest.skip("rounding left the null eigenvalue above 0")
    with pytest.raises(ValueError, match="`k` must be an integer between 1 and"):
        D.eigenvectors(k)


def test_linear_operator_serves_scipy_eigsh(D, gradients):
    operator = D.linear_operator()
    assert operator.shape == D.shape == (10, 10)
    expected = gradients.dense.eigenvalues[:3]
    received = scipy.sparse.linalg.eigsh(operator, k=3, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(received)[::-1], expected, rtol=1e-9)
    np.testing.assert_allclose(operator @ np.eye(10), gradients.dense.D, **CLOSE)


def test_rank_is_at_most_n_minus_1():
    for n in (1, 2, 3, 6, 10):
        assert DiffusionMatrix(random_rows(n)).rank() == n - 1


def test_rank_is_at_most_d():
    assert DiffusionMatrix(random_rows(30)).rank() == 10


def test_rank_is_that_of_the_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(8, 3)) @ rng.normal(size=(3, 10))
    assert DiffusionMatrix(Rows(noise + rng.normal(size=10))).rank() == 3


def test_rank_counts_the_eigenvalues_above_the_cut(D):
    eigenvalues = D.eigenvalues()
    assert D.rank(cut=(eigenvalues[1] + eigenvalues[2]) / 2) == 2


def test_rank_cuts_are_those_of_their_sources():
    D32 = DiffusionMatrix(random_rows(6, dtype="float32"))
    top, eps = D32.top_eigenvalue(), np.finfo(np.float32).eps
    assert D32.rank_cut() == D32.rank_cut("gram") == pytest.approx(top * 6 * eps)
    assert D32.rank_cut("reference") == pytest.approx(top * 10 * eps)
    D64 = DiffusionMatrix(random_rows(6))
    assert D64.rank_cut() == pytest.approx(D64.top_eigenvalue() * 6 * np.finfo(np.float64).eps)
    assert D64.rank_cut("reference") == pytest.approx(D64.top_eigenvalue() * 10 * eps)


def test_the_reference_cut_is_refused_where_it_means_nothing():
    d = 500_000
    gradients = Rows(np.ones((2, d), "float32"), shapes=[(d,)], dtype="float32")
    with pytest.raises(ValueError, match="d = 500000"):
        DiffusionMatrix(gradients).rank_cut("reference")


def test_another_rank_rule_is_refused(D):
    with pytest.raises(ValueError, match="Received: rule='numpy'"):
        D.rank_cut("numpy")


def test_one_example_has_no_diffusion(vector):
    gradients = random_rows(1)
    D = DiffusionMatrix(gradients)
    assert D.top_eigenvalue() == D.trace() == D.rank() == 0
    assert np.all(vectors.flatten(D.matvec(as_list(vector, gradients))) == 0)


def test_equal_gradients_have_no_diffusion():
    row = np.random.default_rng(0).normal(size=10)
    gradients = Rows(np.tile(row, (7, 1)).astype("float32"), dtype="float32")
    D = DiffusionMatrix(gradients)
    assert np.all(vectors.flatten(D.matvec(gradients.gradient)) == 0)
    assert D.top_eigenvalue() <= 1e-12 * row @ row


@pytest.mark.parametrize("shapes", [[(2, 3)], [(3, 2), (4,)], [(4,), (2, 3)]])
def test_a_vector_not_shaped_as_the_weights_is_refused(D, shapes):
    wrong = [np.zeros(s) for s in shapes]
    for use in (D.matvec, D.example_coordinates, DiffusionMetric(D, 0.0).inverse):
        with pytest.raises(ValueError, match="shaped as the trainable weights"):
            use(wrong)


# properties of D


@st.composite
def matrices(draw, columns=10):
    n = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = 10.0 ** draw(st.integers(-8, 8))
    offset = draw(st.sampled_from([0.0, 1.0, 100.0]))
    rng = np.random.default_rng(seed)
    return scale * (rng.normal(size=(n, columns)) + offset)


examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


def relative(eigenvalues, to):
    return eigenvalues / (to if to > 0 else 1)


@examples
@hypothesis.given(matrices(), st.randoms(use_true_random=False))
def test_D_does_not_depend_on_the_order_of_the_examples(G, random):
    order = list(range(len(G)))
    random.shuffle(order)
    ours, theirs = DiffusionMatrix(Rows(G)), DiffusionMatrix(Rows(G[order]))
    top = ours.top_eigenvalue()
    np.testing.assert_allclose(
        relative(theirs.eigenvalues(), top), relative(ours.eigenvalues(), top), atol=1e-9
    )
    x = np.arange(10.0)
    np.testing.assert_allclose(
        theirs.linear_operator() @ x, ours.linear_operator() @ x, rtol=1e-6, atol=1e-9 * top * 20
    )


@examples
@hypothesis.given(matrices(), st.integers(2, 3))
def test_D_does_not_change_when_the_batch_is_duplicated(G, times):
    once, twice = DiffusionMatrix(Rows(G)), DiffusionMatrix(Rows(np.tile(G, (times, 1))))
    top = once.top_eigenvalue()
    k = min(len(once.eigenvalues()), len(twice.eigenvalues()))
    np.testing.assert_allclose(
        relative(twice.eigenvalues()[:k], top), relative(once.eigenvalues()[:k], top), atol=1e-9
    )
    assert twice.trace() == pytest.approx(once.trace(), rel=1e-6)


@examples
@hypothesis.given(matrices(), st.integers(-10, 10))
def test_D_scales_with_the_square_of_the_loss(G, power):
    s = 2.0**power
    ours, scaled = DiffusionMatrix(Rows(G)), DiffusionMatrix(Rows(s * G))
    np.testing.assert_allclose(scaled.eigenvalues(), s**2 * ours.eigenvalues(), rtol=1e-12)


@examples
@hypothesis.given(matrices())
def test_D_is_positive_semi_definite_of_rank_below_n(G):
    D = DiffusionMatrix(Rows(G))
    eigenvalues = D.eigenvalues()
    assert np.all(eigenvalues >= 0)
    assert np.all(np.diff(eigenvalues) <= 0)
    assert D.rank() <= min(len(G) - 1, 10)
    x = np.random.default_rng(0).normal(size=10)
    assert x @ (D.linear_operator() @ x) >= 0


@examples
@hypothesis.given(st.integers(-12, 12), st.booleans())
def test_spectrum_in_float32_has_no_range_trouble(power, gram_is_cheap):
    s = 10.0**power
    gradients = random_rows(6, scale=s, dtype="float32", gram_is_cheap=gram_is_cheap)
    spectrum = direction_of(gradients, 0.0).seen_by_rule
    unit = float(spectrum.unit)
    received = float(spectrum.lambda_max) * unit * unit
    M = gradients.dense.lambda_max
    assert np.isfinite(received)
    assert 0.9 * M <= received <= (1.15 if gram_is_cheap else ESTIMATE_MARGIN * 1.001) * M


# the metric


@pytest.fixture(params=[0.0, 0.1, 0.5, 0.99])
def metric(request, D):
    return DiffusionMetric(D, request.param / D.top_eigenvalue())


def test_metric_equals_dense_I_plus_eps_D(metric, gradients, vector):
    received = vectors.flatten(metric.apply(as_list(vector, gradients)))
    np.testing.assert_allclose(received, gradients.dense.metric(metric.epsilon) @ vector, **CLOSE)


def test_weak_inverse_is_the_direction_of_equation_10(metric, gradients):
    received = vectors.flatten(metric.weak_inverse(gradients.gradient))
    np.testing.assert_allclose(received, gradients.dense.direction(metric.epsilon), **CLOSE)


def test_inverse_solves_the_dense_system(metric, gradients, vector):
    expected = np.linalg.solve(gradients.dense.metric(metric.epsilon), vector)
    received = vectors.flatten(metric.inverse(as_list(vector, gradients)))
    np.testing.assert_allclose(received, expected, **CLOSE)


def test_weak_field_error_is_the_norm_of_the_difference(metric, gradients):
    g = gradients.dense.metric(metric.epsilon)
    weak = np.eye(10) - metric.epsilon * gradients.dense.D
    expected = np.linalg.norm(np.linalg.inv(g) - weak, 2)
    assert metric.weak_field_error() == pytest.approx(expected, abs=1e-12)
    assert 0 <= metric.weak_field_error() < 0.5


def test_weak_field_error_on_a_vector_is_relative_to_the_exact_step(metric, gradients):
    expected = gradients.dense.error_on_step(metric.epsilon)
    assert metric.weak_field_error(gradients.gradient) == pytest.approx(expected, abs=1e-10)


def test_weak_field_error_of_a_fraction_is_a_constant():
    eigenvalues = np.array([3.0, 1.0, 0.5])
    assert weak_field_error(eigenvalues, 0.5 / 3) == pytest.approx(0.25 / 1.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, np.nan])
def test_a_metric_outside_the_weak_field_is_refused(D, fraction):
    with pytest.raises(ValueError, match="0 <= epsilon \\* lambda_max < 1"):
        DiffusionMetric(D, fraction / D.top_eigenvalue())


def test_a_metric_of_another_matrix_is_refused():
    with pytest.raises(ValueError, match="`diffusion_matrix` must be a DiffusionMatrix"):
        DiffusionMetric(np.eye(3), 0.1)


def test_a_metric_takes_a_rule(D, gradients):
    metric = DiffusionMetric(D, keras_rgd.epsilon.Fraction(0.3))
    assert metric.epsilon * gradients.dense.lambda_max == pytest.approx(0.3)


def test_choose_epsilon_passes_the_iteration_to_a_schedule(D, gradients):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.2, 0.6])
    rule = keras_rgd.epsilon.Fraction(schedule)
    for iteration, c in [(0, 0.2), (10, 0.6)]:
        eps = choose_epsilon(D, rule, gradients.gradient, iteration)
        assert eps * gradients.dense.lambda_max == pytest.approx(c, rel=1e-6)


# bounds


@examples
@hypothesis.given(matrices(columns=20), st.sampled_from(["float32", "float64"]))
def test_trace_power_bound_is_an_upper_bound(G, dtype):
    K = reference.Dense(G, G.mean(0)).K
    M = np.linalg.eigvalsh(K)[-1]
    received = float(eigensolvers.trace_power_bound(tf.constant(K, dtype)))
    if len(G) == 1:
        assert received == pytest.approx(0, abs=1e-9 * np.sum(G**2))
        return
    assert M * (1 - 1e-12) <= received <= M * len(G) ** (1 / 16) * 1.001


@pytest.mark.parametrize("others", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 64, 300])
def test_trace_power_bound_is_tight_where_all_other_eigenvalues_are_equal(n, others):
    k = tf.linalg.diag([3.0] + [3.0 * others] * (n - 1))
    assert float(eigensolvers.trace_power_bound(k)) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("n, most", [(64, 1.21), (256, 1.31), (2048, 1.49)])
def test_trace_power_bound_keeps_the_fraction_above_six_tenths(n, most):
    """The worst spectra have half of the eigenvalues equal to the largest and the others 0."""
    received = [
        float(eigensolvers.trace_power_bound(tf.linalg.diag([1.0] * count + [0.0] * (n - count))))
        for count in (1, 2, n // 8, n // 4, n // 2, 3 * n // 4)
    ]
    assert most - 0.02 < max(received) < most < 1 / 0.6


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.999])
def test_solve_shifted_equals_a_dense_solve(epsilon):
    rng = np.random.default_rng(0)
    G = rng.normal(size=(12, 30))
    K = G @ G.T
    K /= np.linalg.eigvalsh(K)[-1]
    b = rng.normal(size=12)
    received = eigensolvers.solve_shifted(
        tf.constant(K), tf.constant(epsilon, tf.float64), tf.constant(b)
    )
    expected = np.linalg.solve(np.eye(12) + epsilon * K, b)
    assert np.linalg.norm(received - expected) < 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_norm_is_right_where_squares_leave_float32(size):
    parts = [tf.constant([3 * size, 0]), tf.zeros([0]), tf.constant([[4 * size]])]
    assert float(vectors.norm(parts)) == pytest.approx(5 * size)
    assert float(vectors.norm(parts[:1])) == pytest.approx(3 * size)
    assert float(vectors.norm(parts[1:2])) == 0


def test_trace_power_bound_of_zero_is_zero():
    assert float(eigensolvers.trace_power_bound(tf.zeros([5, 5]))) == 0


@pytest.mark.parametrize("n", [2, 4, 8, 9, 20])
def test_lanczos_measure_integrates_functions_of_D(n):
    gradients = random_rows(n, shapes=((5, 6),))
    D, dense = DiffusionMatrix(gradients), gradients.dense
    start, _ = D.to_examples(gradients.gradient)
    mass = dense.v @ dense.D @ dense.v / (dense.v @ dense.v)
    nodes, weights = eigensolvers.lanczos_measure(
        tf.constant(dense.K), start / tf.norm(start), tf.constant(mass, tf.float64)
    )
    assert float(tf.reduce_sum(weights)) == pytest.approx(1)
    assert np.all(weights.numpy() >= 0)
    lam, E = np.linalg.eigh(dense.D)
    measure = (E.T @ dense.v) ** 2 / (dense.v @ dense.v)
    M = lam[-1]
    for f in (np.ones_like, lambda t: t, lambda t: t**2, lambda t: (t / M) ** 4 / (1 + t / M) ** 2):
        received = np.sum(weights * f(nodes.numpy()))
        assert received == pytest.approx(np.sum(measure * f(lam)), rel=1e-6)


def test_moments_measure_keeps_the_moments_and_bounds_the_error():
    for seed in range(10):
        dense = random_rows(6, seed=seed).dense
        D, v = dense.D, dense.v / np.linalg.norm(dense.v)
        M, first, second = dense.lambda_max, v @ D @ v, v @ D @ D @ v
        nodes, weights = (
            t.numpy() for t in eigensolvers.moments_measure(*map(tf.constant, (M, first, second)))
        )
        np.testing.assert_allclose(
            [weights.sum(), weights @ nodes, weights @ nodes**2], [1, first, second]
        )
        eps = 0.7 / M
        t = eps * nodes
        bound = np.sqrt(np.sum(weights * t**4 / (1 + t) ** 2) / np.sum(weights / (1 + t) ** 2))
        assert bound >= dense.error_on_step(eps) * (1 - 1e-9)


@pytest.mark.parametrize("n", [2, 6, 40])
def test_an_estimate_without_a_gram_matrix_is_within_its_margin(n):
    gradients = random_rows(n, shapes=((10, 6),), gram_is_cheap=False)
    M = gradients.dense.lambda_max
    for last in (0.0, 1e-3 * M, 1e3 * M):
        spectrum = direction_of(gradients, last).seen_by_rule
        received = float(spectrum.lambda_max * spectrum.unit**2)
        assert M < received <= ESTIMATE_MARGIN * M * (1 + 1e-9)


def test_an_estimate_that_agrees_with_the_last_one_stands():
    gradients = random_rows(6, gram_is_cheap=False)
    D = DiffusionMatrix(gradients)
    product = D.factored_product(gradients.gradient)
    own = float(product.alpha) ** 2
    for last in (0.6 * own, 1.9 * own):
        spectrum = direction_of(gradients, ESTIMATE_MARGIN * last).seen_by_rule
        received = float(spectrum.lambda_max * spectrum.unit**2)
        assert received == pytest.approx(ESTIMATE_MARGIN * max(own, last))


# closed forms


@pytest.fixture
def logistic(float64):
    """Logistic regression on 7 examples, and its g_i = (p_i - y_i) (x_i, 1)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.integers(0, 2, size=(7, 1)).astype("float64")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    w, b = rng.normal(size=(4, 1)), rng.normal(size=1)
    model.set_weights([w, b])
    p = 1 / (1 + np.exp(-(x @ w + b)))
    G = (p - y) * np.hstack([x, np.ones((7, 1))])
    return model, x, y, reference.Dense(G, G.mean(0))


@pytest.mark.parametrize("per_example", ["layerwise", "vectorized_map", "double_backward"])
def test_logistic_regression_has_its_closed_form(logistic, per_example):
    model, x, y, dense = logistic
    D = keras_rgd.diffusion_matrix(model, x, y, per_example=per_example)
    np.testing.assert_allclose(D.gram(), dense.G @ dense.G.T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(D.linear_operator() @ np.eye(5), dense.D, atol=1e-14)
    np.testing.assert_allclose(D.eigenvalues()[:5], dense.eigenvalues, atol=1e-14)
    np.testing.assert_allclose(vectors.flatten(D.gradients.gradient), dense.v, rtol=1e-10)


def test_the_oracle_itself_has_the_closed_form(logistic):
    model, x, y, dense = logistic
    received = reference.eager(model, x, y)
    np.testing.assert_allclose(received.G, dense.G, rtol=1e-10)
    np.testing.assert_allclose(received.v, dense.v, rtol=1e-10)


def test_sample_weights_multiply_the_gradients(logistic):
    model, x, y, dense = logistic
    weights = np.array([0.0, 1.0, 2.0, 0.5, 3.0, 1.0, 0.1])
    D = keras_rgd.diffusion_matrix(model, x, y, weights)
    weighted = weights[:, None] * dense.G
    np.testing.assert_allclose(D.gram(), weighted @ weighted.T, rtol=1e-10, atol=1e-13)
