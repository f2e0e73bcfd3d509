"""One `Geometry` for many questions: the same answers, nothing traced twice, nothing stale."""

import gc
import inspect
import weakref

import keras
import numpy as np
import pytest
import steps
from keras import layers as L
from wide import wide

from keras_rgd import geometry
from keras_rgd._support import vectors
from keras_rgd.epsilon import Fraction
from keras_rgd.geometry import Geometry

EPSILON = 1e-3
OF_NO_METHOD = {"model", "x", "y", "sample_weight"}


class Counted(L.Dense):
    """A dense layer that counts how often Python passes through it."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return super().call(x)


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 3)), rng.normal(size=(7, 2))


def stack():
    return [L.Dense(3, "tanh"), Counted(2)]


def built(layers, loss="mse"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile("sgd", loss)
    return model


def vector(model, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=w.shape) for w in model.trainable_variables]


def answers(model, x, y, g=None):
    """What the way to D gives and what derivatives do, of a `Geometry` or of a new one."""
    g = Geometry(model, x, y) if g is None else g
    symbols = g.christoffel(vector(model, 1), vector(model, 2), EPSILON)
    return {"D": g.diffusion_matrix().eigenvalues(), "christoffel": vectors.flatten(symbols)}


def same(received, expected, of="", rtol=1e-6):
    for name, value in expected.items():
        size = rtol * np.linalg.norm(value)
        np.testing.assert_allclose(received[name], value, rtol, size, err_msg=f"{name} {of}")


# Methods and functions


def test_functions_take_what_their_methods_take():
    for name in geometry.__all__:
        function = getattr(geometry, name)
        if not inspect.isfunction(function):
            continue
        method = inspect.signature(getattr(Geometry, name)).parameters
        own = inspect.signature(function).parameters
        shared = [p for p in own if p not in OF_NO_METHOD]
        assert shared == [p for p in method if p != "self"], name
        assert all(own[p].default == method[p].default for p in shared), name


def test_functions_give_what_their_methods_give():
    x, y = data()
    model = built(stack())
    g, given = Geometry(model, x, y), (model, x, y)
    u, v = vector(model, 1), vector(model, 2)
    sgd = dict(learning_rate=0.1, batch_size=2, runs=2)
    noise = dict(learning_rate=0.1, batch_size=2, probes=2)
    flow = geometry.geodesic_flow(*given, 0.1, EPSILON, velocity=u, exact=True, force=False)
    own = g.geodesic_flow(0.1, EPSILON, velocity=u, exact=True, force=False)
    pairs = {
        "christoffel": (
            geometry.christoffel(*given, u, v, EPSILON, exact=True),
            g.christoffel(u, v, EPSILON, exact=True),
        ),
        "gradient_flow": (
            geometry.gradient_flow(*given, 0.1).positions,
            g.gradient_flow(0.1).positions,
        ),
        "geodesic_flow": (flow.positions, own.positions),
        "neglected_terms": (
            geometry.neglected_terms(flow, nodes=2).condition_9,
            g.neglected_terms(own, nodes=2).condition_9,
        ),
        "steady_state_residual": (
            geometry.steady_state_residual(*given, EPSILON),
            g.steady_state_residual(EPSILON),
        ),
        "diffusion_divergence": (
            geometry.diffusion_divergence(*given, probes=3).value,
            g.diffusion_divergence(probes=3).value,
        ),
        "probability_current": (
            geometry.probability_current(*given, EPSILON, **noise).value,
            g.probability_current(EPSILON, **noise).value,
        ),
        "integrability_defect": (
            geometry.integrability_defect(*given, u, v, EPSILON),
            g.integrability_defect(u, v, EPSILON),
        ),
        "sgd_ensemble": (
            geometry.sgd_ensemble(*given, 3, **sgd).positions,
            g.sgd_ensemble(3, **sgd).positions,
        ),
    }
    for name, (function, method) in pairs.items():
        for a, b in (
            zip(function, method, strict=True) if isinstance(method, list) else [(function, method)]
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert np.any(np.asarray(a) != 0), name
    u, w = vector(model, 1), vector(model, 2)
    same(
        {"metric": g.metric(EPSILON).inner(u, w)},
        {"metric": vectors.flatten(u) @ vectors.flatten(g.metric(EPSILON).apply(w))},
    )


def test_sample_weights_count():
    x, y = data()
    weights = np.arange(7.0)
    model = built(stack())
    u, v = vector(model, 1), vector(model, 2)
    received = Geometry(model, x, y, weights).christoffel(u, v, EPSILON)
    function = geometry.christoffel(model, x, y, u, v, EPSILON, sample_weight=weights)
    np.testing.assert_array_equal(vectors.flatten(received), vectors.flatten(function))
    other = Geometry(model, x, y).christoffel(u, v, EPSILON)
    assert not np.allclose(vectors.flatten(received), vectors.flatten(other))


# What is remembered


def test_nothing_is_traced_again():
    x, y = data()
    model = built(stack())
    g = Geometry(model, x, y)

    def flow(g):
        return g.rgd_flow(0.1, Fraction(0.5), times=[0.1], rtol=1e-4).positions

    first = answers(model, x, y, g) | {"flow": flow(g)}
    Counted.calls = 0
    model.set_weights([w + 0.1 for w in model.get_weights()])
    moved = answers(model, x, y, g) | {"flow": flow(g)}
    # Other numbers of the same shapes, of another object.
    new = Geometry(model, x + 1, y)
    other = answers(model, x, y, new) | {"flow": flow(new)}
    assert Counted.calls == 0
    for name, value in first.items():
        assert not np.allclose(value, moved[name]), name
        assert not np.allclose(moved[name], other[name]), name


def test_the_model_is_collected_with_all_that_is_remembered():
    x, y = data()
    model = built(stack())
    g = Geometry(model, x, y)
    answers(model, x, y, g)
    g.sgd_ensemble(1, learning_rate=0.1, batch_size=2, runs=1)
    held = weakref.ref(model)
    del model, g
    gc.collect()
    assert held() is None


# Each changes a model and returns new layers like those that it then has. Thawing and taking off a
# layer undo what the ones before them did.


def assign(model):
    model.set_weights([w * 1.5 for w in model.get_weights()])
    return stack()


def freeze(model):
    model.layers[0].trainable = False
    return stack()


def thaw(model):
    model.layers[0].trainable = True
    return stack()


def recompile(model):
    model.compile("sgd", "mean_squared_logarithmic_error")
    return stack()


def add(model):
    model.add(L.Dense(2, "tanh"))
    model.compile("sgd", "mse")
    return [*stack(), L.Dense(2, "tanh")]


def pop(model):
    model.pop()
    model.compile("sgd", "mse")
    return stack()


@wide
def test_a_changed_model_is_as_one_built_so():
    x, y = data()
    model = built(stack())
    kept = Geometry(model, x, y)
    before, seen = answers(model, x, y, kept), {}
    for change in (assign, freeze, thaw, recompile, add, pop):
        layers = change(model)
        if change in (thaw, pop):
            expected = seen[assign]
        else:
            other = built(layers, loss=model.loss)
            other.set_weights(model.get_weights())
            other.layers[0].trainable = model.layers[0].trainable
            expected = seen[change] = answers(other, x, y)
        same(answers(model, x, y, kept), expected, change.__name__)
        same(answers(model, x, y), expected, change.__name__)
        assert not np.allclose(before["D"], expected["D"]), change.__name__
        before = expected


def test_other_data_of_one_model():
    rng = np.random.default_rng(0)

    def over_time():
        model = keras.Sequential([keras.Input((None, 3)), L.Dense(2, "tanh")])
        model.compile("sgd", "mse")
        return model

    model = over_time()
    first = Geometry(model, rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2, 2)))
    expected = answers(model, None, None, first)
    for n, time in [(6, 2), (5, 4)]:
        x, y = rng.normal(size=(n, time, 3)), rng.normal(size=(n, time, 2))
        other = over_time()
        other.set_weights(model.get_weights())
        same(answers(model, x, y), answers(other, x, y))
    same(answers(model, None, None, first), expected)


def test_another_precision_is_another_model():
    x, y = data()
    single = built(stack())
    low = answers(single, x, y)
    with steps.floatx("float64"):
        double = built(stack())
        double.set_weights(single.get_weights())
        high = answers(double, x, y)
        assert Geometry(double, x, y).dtype == "float64"
    same(low, high, rtol=1e-3)
    same(answers(single, x, y), low)
    assert low["christoffel"].dtype == np.float32 and high["christoffel"].dtype == np.float64


# What is refused


def test_a_flow_of_another_geometry_or_of_other_weights_is_refused():
    x, y = data()
    model = built(stack())
    g = Geometry(model, x, y)
    flow = g.gradient_flow(0.1, times=[0.05, 0.1])
    with pytest.raises(ValueError, match="not made by this Geometry"):
        Geometry(model, x, y).neglected_terms(flow, epsilon=EPSILON)
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match="trains other weights than when the flow was made"):
        g.neglected_terms(flow, epsilon=EPSILON)


def test_a_flow_is_known_from_0_on():
    x, y = data()
    model = built(stack())
    flow = Geometry(model, x, y).gradient_flow(0.1, times=[0.05, 0.1])
    np.testing.assert_allclose(flow.position(0), vectors.flatten(model.get_weights()), rtol=1e-6)
    np.testing.assert_array_equal(flow.times, [0.05, 0.1])
    with pytest.raises(ValueError, match="known for 0 <= t"):
        flow.position(-0.01)
