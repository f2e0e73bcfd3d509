"""The rules that choose eps below 1/M_x."""

import keras
import numpy as np
import pytest
import reference
import steps
import tensorflow as tf
from cases import BY_NAME
from rows import random_rows
from wide import swept

import keras_rgd
from keras_rgd import DiffusionMatrix
from keras_rgd import epsilon as rules
from keras_rgd.diffusion_metric import choose_epsilon
from keras_rgd.epsilon import Fixed, Fraction, FractionOfMean, SpectralMeasure, WeakField


def spectrum(lambda_max, nodes=(0.0,), weights=(1.0,), unit=1.0, dtype="float64"):
    return SpectralMeasure(*(tf.constant(t, dtype) for t in (lambda_max, nodes, weights, unit)))


@pytest.fixture
def gradients():
    return random_rows()


def chosen(gradients, rule, iteration=0):
    """eps times the independent M_x."""
    epsilon = choose_epsilon(DiffusionMatrix(gradients), rule, gradients.gradient, iteration)
    return epsilon * gradients.dense.lambda_max


# the rules


@pytest.mark.parametrize("c", [0.1, 0.5, 0.999])
def test_fraction_is_a_fraction_of_the_bound(gradients, c):
    assert chosen(gradients, Fraction(c)) == pytest.approx(c)


def test_fraction_follows_its_schedule(gradients):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.2, 0.4, 0.8])
    received = [chosen(gradients, Fraction(schedule), i) for i in (0, 2, 3, 5)]
    assert received == pytest.approx([0.2, 0.2, 0.4, 0.8], rel=1e-6)


@pytest.mark.parametrize("value, expected", [(3.0, 1.0), (-1.0, 0.0)])
def test_a_schedule_that_leaves_its_bounds_is_cut(gradients, value, expected):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [value, value])
    received = chosen(gradients, Fraction(schedule))
    assert received == pytest.approx(expected, abs=2e-3)
    assert 0 <= received < 1


def test_fixed_is_its_value_below_the_bound(gradients):
    value = 0.4 / gradients.dense.lambda_max
    assert chosen(gradients, Fixed(value)) == pytest.approx(0.4)


@pytest.mark.parametrize("factor", [1.0, 1.5, 1e6])
def test_fixed_is_cut_just_under_the_bound(gradients, factor):
    received = chosen(gradients, Fixed(factor / gradients.dense.lambda_max))
    assert 0.99 < received < 1


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
def test_fixed_is_in_true_units(unit):
    value = 0.25
    s = spectrum(0.5 / unit**2, unit=unit)
    assert float(s.in_true_units(Fixed(value)(s, 0))) == pytest.approx(value)
    assert not bool(Fixed(value).was_cut(s, Fixed(value)(s, 0)))
    told = Fixed(4.0)
    assert bool(told.was_cut(s, told(s, 0)))


@pytest.mark.parametrize("tolerance", [1e-4, 0.01, 0.05, 0.2])
def test_weak_field_meets_its_tolerance(gradients, tolerance):
    epsilon = chosen(gradients, WeakField(tolerance)) / gradients.dense.lambda_max
    error = gradients.dense.error_on_step(epsilon)
    assert error <= tolerance * (1 + 1e-6)
    assert (
        error == pytest.approx(tolerance, rel=1e-4) or epsilon * gradients.dense.lambda_max > 0.99
    )


def test_weak_field_takes_all_it_can_where_the_error_is_small(gradients):
    assert 0.99 < chosen(gradients, WeakField(0.9)) < 1


def test_weak_field_error_of_a_spectrum_is_that_of_its_functions():
    nodes, weights = np.array([0.0, 0.3, 1.0]), np.array([0.2, 0.5, 0.3])
    D, v = np.diag(nodes), np.sqrt(weights)
    received = float(spectrum(1.0, nodes, weights).weak_field_error(tf.constant(0.7, tf.float64)))
    exact = np.linalg.solve(np.eye(3) + 0.7 * D, v)
    expected = np.linalg.norm(exact - (v - 0.7 * D @ v)) / np.linalg.norm(exact)
    assert received == pytest.approx(expected)


@pytest.mark.parametrize("rule", [Fraction(0.5), Fixed(1.0), WeakField(0.1)])
def test_no_diffusion_gives_finite_numbers(rule):
    s = spectrum(0.0, dtype="float32")
    epsilon = rule(s, 0)
    assert np.isfinite(float(epsilon))
    assert np.isfinite(float(s.in_true_units(epsilon)))
    assert float(s.weak_field_error(epsilon)) == 0


def test_an_epsilon_beyond_the_dtype_is_its_largest_number():
    s = spectrum(1.0, unit=1e-25, dtype="float32")
    received = s.in_true_units(Fraction(0.5)(s, 0))
    assert float(received) == pytest.approx(np.finfo(np.float32).max)


# in a training step


def take(rule, way="vectorized_map", mode="graph", name="dense"):
    case = BY_NAME[name]
    optimizer = keras_rgd.RGD(1.0, rule, per_example=way)
    step = steps.take(case, steps.build(case), optimizer, mode)
    return step, steps.oracle(name), optimizer


MET = [(tolerance, mode) for tolerance in (0.01, 0.05) for mode in steps.MODES]


@pytest.mark.parametrize("tolerance, mode", swept(MET, [(0.05, "xla")]))
def test_weak_field_meets_its_tolerance_on_the_step(tolerance, mode):
    step, dense, _ = take(WeakField(tolerance), mode=mode)
    error = dense.error_on_step(step.epsilon)
    assert error <= tolerance * 1.001
    assert error >= tolerance * 0.98 or step.epsilon * dense.lambda_max > 0.93
    assert step.weak_field_error == pytest.approx(error, rel=1e-2)
    assert reference.relative_error(step.direction, dense.direction(step.epsilon)) < 1e-4


def test_weak_field_without_a_gram_matrix_stays_within_its_tolerance():
    step, dense, _ = take(WeakField(0.02), "double_backward")
    assert 0 < dense.error_on_step(step.epsilon) <= 0.02 * 1.001
    assert step.epsilon * dense.lambda_max < 1


@pytest.mark.parametrize("way", ["double_backward", "vectorized_map"])
def test_cuts_of_a_fixed_epsilon_are_counted(way):
    M = steps.oracle("dense").lambda_max
    for factor, cuts in [(0.3, 0), (2.0, 1)]:
        step, dense, optimizer = take(Fixed(factor / M), way)
        assert int(optimizer.epsilon_cuts) == cuts
        assert step.epsilon * M < 1
        if not cuts:
            assert step.epsilon * M == pytest.approx(factor, rel=1e-5)
        assert reference.relative_error(step.direction, dense.direction(step.epsilon)) < 1e-5


def test_a_schedule_is_followed_over_the_steps():
    case = BY_NAME["dense"]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.2, 0.4, 0.8])
    optimizer = keras_rgd.RGD(0.01, schedule, per_example="vectorized_map")
    model = case.compile(steps.build(case), optimizer)
    x, y, _ = case.batch()
    received = []
    for _ in range(3):
        model.train_on_batch(x, y)
        received.append(float(optimizer.chosen_epsilon) * float(optimizer.lambda_max))
    assert received == pytest.approx([0.2, 0.4, 0.8], rel=1e-5)


class Told(keras_rgd.epsilon.Rule):
    """A rule of the user's own: `factor` / M_x, unchecked."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, spectrum, iteration):
        return self.factor / spectrum.lambda_max

    def get_config(self):
        return {"factor": self.factor}


OWN = [(0.5, 0.3, 0), (5.0, 0.6, 1), (-1.0, 0, 1), (float("nan"), 0, 1)]
OWN = [(way, *told) for way in ("double_backward", "vectorized_map") for told in OWN]


@pytest.mark.parametrize("way, factor, least, cuts", swept(OWN, [OWN[1], OWN[-2]]))
def test_what_a_rule_of_ones_own_returns_stays_below_the_bound(way, factor, least, cuts):
    step, dense, optimizer = take(Told(factor), way)
    assert least <= step.epsilon * dense.lambda_max < 1
    assert (step.epsilon == 0) == (least == 0)
    assert int(optimizer.epsilon_cuts) == cuts
    assert reference.relative_error(step.direction, dense.direction(step.epsilon)) < 1e-5


def test_what_a_rule_of_ones_own_returns_stays_below_the_bound_of_a_window():
    for factor, cuts in [(0.5, 0), (5.0, 4), (-1.0, 4)]:
        weights = [keras.Variable(np.zeros(6))]
        optimizer = keras_rgd.RGD(1.0, Told(factor), window=3)
        optimizer.build(weights)
        rng, seen = np.random.default_rng(0), []
        for t in range(5):
            weights[0].assign(np.zeros(6))
            seen.append(rng.normal(size=6))
            optimizer.apply([tf.constant(seen[-1], "float32")], weights)
            epsilon = float(optimizer.chosen_epsilon)
            if t > 0:  # without a D there is nothing to be below
                D = np.cov(np.array(seen[-3:]).T)
                expected = seen[-1] - epsilon * D @ seen[-1]
                assert reference.relative_error(-weights[0].numpy(), expected) < 1e-5
                assert 0 <= epsilon * np.linalg.eigvalsh(D)[-1] < 1
                assert (epsilon > 0) == (factor > 0)
        # On the first step M_x is 0, and 1 / 0 is cut to 0.
        assert int(optimizer.epsilon_cuts) == cuts + 1


def test_a_rule_of_ones_own_is_cut_for_a_measured_D_as_well(gradients):
    assert 0.99 < chosen(gradients, Told(5.0)) < 1
    assert chosen(gradients, Told(-1.0)) == 0


def test_a_fraction_near_1_is_not_cut():
    assert bool(rules.choose(Fraction(0.9999), spectrum(2.0), 0)[1]) is False
    assert float(rules.choose(Fraction(0.9999), spectrum(2.0), 0)[0]) == pytest.approx(0.49995)


@pytest.mark.parametrize("scale", swept([1.0, 1e-10, 1e10], [1e-10]))
@pytest.mark.parametrize("source", ["window", "examples"])
def test_a_fraction_of_the_mean_is_below_the_mean_of_the_batches_before(source, scale):
    c, decay = 0.6, 0.9
    case = BY_NAME["dense"]
    rule = FractionOfMean(c, decay)
    options = {"window": 3} if source == "window" else {"per_example": "vectorized_map"}
    optimizer = keras_rgd.RGD(1e-3 / scale, rule, **options)
    model = steps.build(case)
    model.compile(optimizer, lambda y, p: scale * keras.losses.mean_squared_error(y, p))
    rng, mean, held = np.random.default_rng(0), 0.0, 0
    for _ in range(12):
        x, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 3)) * rng.choice([0.1, 1.0])
        model.train_on_batch(x.astype("float32"), y.astype("float32"))
        M = float(optimizer.lambda_max)
        held += M < mean
        if M > 0:
            assert float(optimizer.chosen_epsilon) * max(M, mean) == pytest.approx(c, rel=1e-5)
        mean = decay * mean + (1 - decay) * M if mean > 0 else M
        assert float(optimizer.mean_lambda_max) == pytest.approx(mean, rel=1e-5)
    assert held > 2  # the batch's own M_x would have given another eps


# arguments and serialization


SCHEDULE = keras.optimizers.schedules.CosineDecay(0.9, 100, alpha=0.1)
RULES = [
    Fraction(0.3),
    Fraction(SCHEDULE),
    FractionOfMean(0.4, 0.9),
    FractionOfMean(SCHEDULE),
    Fixed(2.5),
    Fixed(0),
    WeakField(0.01),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_survives_serialization(rule, gradients):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rule))
    assert type(again) is type(rule)
    assert again == rule
    assert chosen(gradients, again, 7) == chosen(gradients, rule, 7)


def test_rules_differ_by_type_and_arguments():
    assert Fraction(0.5) == Fraction()
    assert Fraction(0.5) != Fraction(0.4)
    assert Fixed(0.5) != Fraction(0.5)
    assert WeakField(0.5) != 0.5


def test_a_rule_shows_how_it_is_made():
    assert repr(Fraction(0.25)) == "Fraction(c=0.25)"
    assert repr(Fixed(2)) == "Fixed(value=2.0)"
    assert repr(WeakField()) == "WeakField(tolerance=0.05)"


def test_short_forms_stand_for_fractions():
    assert rules.get(0.5) == Fraction(0.5)
    assert rules.get(SCHEDULE) == Fraction(SCHEDULE)
    assert rules.get(keras.saving.serialize_keras_object(WeakField(0.1))) == WeakField(0.1)
    rule = Fixed(1.0)
    assert rules.get(rule) is rule


@pytest.mark.parametrize("epsilon", [None, "0.5", 1, 0, [0.5], object()])
def test_what_is_no_rule_is_refused(epsilon):
    with pytest.raises(ValueError, match="`epsilon` must be a float in .* Received: epsilon="):
        rules.get(epsilon)


@pytest.mark.parametrize("c", [0.0, 1.0, -0.5, 2.0, float("nan"), "half", None])
def test_fractions_outside_0_and_1_are_refused(c):
    with pytest.raises(ValueError, match="`c` must be .* Received: c="):
        Fraction(c)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan"), "x"])
def test_decays_outside_0_and_1_are_refused(decay):
    with pytest.raises(ValueError, match="`decay` must be .* Received: decay="):
        FractionOfMean(0.5, decay)


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan"), "x", None])
def test_fixed_values_that_are_negative_or_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="`value` must be .* Received: value="):
        Fixed(value)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, float("nan"), "x"])
def test_tolerances_outside_0_and_1_are_refused(tolerance):
    with pytest.raises(ValueError, match="`tolerance` must be .* Received: tolerance="):
        WeakField(tolerance)
