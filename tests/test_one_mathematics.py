"""D v and (I - eps D) v by everything that forms them, and what each takes for rounding.

A step, the window, the spectrum of a data set and the geometry have forms of their own, each for
the reason in its docstring. Here they are held equal to `DiffusionMatrix`, and that to a dense D.
"""

import hypothesis
import hypothesis.extra.numpy as arrays
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from rows import SHAPES, Rows

import keras_rgd
from keras_rgd import DiffusionMatrix, DiffusionMetric
from keras_rgd._support import vectors
from keras_rgd.diffusion_metric import inverse_product
from keras_rgd.direction import GramDirection, direction_by_passes, direction_of
from keras_rgd.geometry import Geometry

D = sum(int(np.prod(s)) for s in SHAPES)


def by_matrix(gradients, epsilon):
    v = gradients.gradient
    return vectors.add(v, DiffusionMatrix(gradients).matvec(v), -epsilon)


def by_metric(gradients, epsilon):
    return DiffusionMetric(DiffusionMatrix(gradients), epsilon).weak_inverse(gradients.gradient)


def by_gram(gradients, epsilon):
    return along(GramDirection(gradients), epsilon)


def by_products(gradients, epsilon):
    gradients.gram_is_cheap = False
    return along(direction_of(gradients, 0.0), epsilon)


def by_passes(gradients, epsilon):
    start = vectors.scale(gradients.gradient, 0.0)
    return along(direction_by_passes(gradients, start)[0], epsilon)


def along(direction, epsilon):
    return direction.at(epsilon * direction.seen_by_rule.unit**2)


def by_window(rows, epsilon, dtype):
    """The step along the last of the rows, and D of them all as the optimizer shows it."""
    weights = [keras.Variable(np.zeros(s), dtype=dtype) for s in SHAPES]
    optimizer = keras_rgd.RGD(1.0, window=len(rows))
    optimizer.build(weights)
    for row in rows:
        v = vectors.unflatten(row, weights, dtype)
        direction = optimizer._window.direction_of(v, 1)
        result = along(direction, epsilon)
        direction.store()
    return result, direction, optimizer.diffusion_matrix()


FORMS = [by_matrix, by_metric, by_gram, by_products, by_passes]
examples = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
matrices = arrays.arrays(
    np.float64, st.tuples(st.integers(2, 7), st.just(D)), elements=st.integers(-9, 9).map(float)
)


@pytest.mark.parametrize("form", FORMS)
@examples
@hypothesis.given(G=matrices)
def test_every_form_of_the_direction_is_that_of_a_dense_D(form, G):
    gradients = Rows(G, r=np.arange(D) / D)
    epsilon = 0.5 / max(gradients.dense.lambda_max, 1)
    expected = gradients.dense.direction(epsilon)
    np.testing.assert_allclose(vectors.flatten(form(gradients, epsilon)), expected, atol=1e-10)


@examples
@hypothesis.given(G=matrices)
def test_the_window_has_the_D_of_its_rows(G):
    dense, scale = Rows(G).dense, len(G) / (len(G) - 1)
    epsilon = 0.5 / max(scale * dense.lambda_max, 1)
    received, _, shown = by_window(G, epsilon, "float64")
    v = vectors.unflatten(G[-1], shown.gradients.weights, "float64")
    by_shown = vectors.flatten(vectors.add(v, shown.matvec(v), -epsilon))
    expected = G[-1] - epsilon * scale * dense.D @ G[-1]
    np.testing.assert_allclose(by_shown, expected, atol=1e-10)
    np.testing.assert_allclose(vectors.flatten(received), expected, atol=1e-10)


@examples
@hypothesis.given(G=matrices)
def test_the_inverse_metric_undoes_the_metric(G):
    gradients = Rows(G)
    matrix, v = DiffusionMatrix(gradients), gradients.gradient
    raised = inverse_product(matrix, 0.1, v)
    lowered = vectors.add(raised, matrix.matvec(raised), 0.1)
    np.testing.assert_allclose(vectors.flatten(lowered), vectors.flatten(v), atol=1e-10)


@pytest.fixture
def regression(float64):
    """A model and a batch, whose D has 5 weights."""
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model, rng.normal(size=(9, 4)), rng.normal(size=(9, 1))


def test_the_geometry_and_the_spectrum_of_a_data_set_have_the_same_D(regression):
    model, x, y = regression
    matrix, point = keras_rgd.diffusion_matrix(model, x, y), Geometry(model, x, y)
    v = matrix.gradients.gradient
    np.testing.assert_allclose(
        vectors.flatten(point.product(v)), vectors.flatten(matrix.matvec(v)), rtol=1e-10
    )
    for method in ("gram", "covariance", "iterative"):
        s = keras_rgd.spectrum(model, (x, y), k=3, batch_size=4, method=method, verbose=False)
        np.testing.assert_allclose(s.eigenvalues, matrix.eigenvalues()[:3], rtol=1e-6)
        np.testing.assert_allclose(s.trace, matrix.trace(), rtol=1e-10)


@pytest.mark.parametrize("spread, seen", [(3e-7, False), (1e-4, True)])
def test_what_is_rounding_is_rounding_to_all(spread, seen):
    """Float32 gradients that differ in the last digit, and in the fourth before it."""
    rng = np.random.default_rng(0)
    G = (1 + spread * rng.uniform(-1, 1, size=(6, D))).astype("float32")

    def rows(**options):
        return Rows(G, dtype="float32", **options)

    assert (DiffusionMatrix(rows()).top_eigenvalue() > 0) == seen
    _, window, shown = by_window(G, 0.1, "float32")
    assert (shown.top_eigenvalue() > 0) == seen
    passes, _ = direction_by_passes(rows(), vectors.scale(rows().gradient, 0.0))
    products = direction_of(rows(gram_is_cheap=False), 0.0)
    for direction in (window, passes, products, direction_of(rows(), 0.0)):
        assert (float(direction.seen_by_rule.lambda_max) > 0) == seen
        assert bool(direction.lost_digits) != seen
