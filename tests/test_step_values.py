"""What RGD keeps of its steps: counters, and means over an epoch that lose no digits."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_rgd
from keras_rgd.epsilon import Fixed, SpectralMeasure


def built(**options):
    optimizer = keras_rgd.RGD(1.0, window=3, **options)
    optimizer.build([keras.Variable(np.zeros(4))])
    return optimizer


@pytest.mark.parametrize(
    "lost, finite, count", [(True, True, 1), (False, True, 0), (True, False, 0)]
)
def test_steps_that_lost_the_digits_of_D_are_counted(lost, finite, count):
    optimizer = built()
    one = tf.constant(1.0 if finite else np.inf)
    spectrum = SpectralMeasure(one, tf.ones([1]), tf.ones([1]), tf.constant(1.0))
    direction = types.SimpleNamespace(seen_by_rule=spectrum, lost_digits=tf.constant(lost))
    optimizer._values.record(direction, tf.constant(0.5), tf.constant(False), 0.99)
    assert int(optimizer.rounded_steps) == count


@pytest.mark.parametrize("jit_compile", [False, True])
def test_step_means_keep_their_digits_over_millions_of_steps(jit_compile):
    optimizer = built(epsilon=Fixed(2.0), batch_size=1)
    values = optimizer._values
    # As after two million steps with eps = exp(-7.25).
    values._sums.assign([[-14.5e6, 0.0], [0.0, 0.0]])
    values._steps.assign([2_000_000, 0])
    logs = np.random.default_rng(0).uniform(-8, 1, 5000).astype("float32")

    def body(i):
        values._add(tf.constant(logs)[i], tf.constant(0.1), tf.constant(True))
        return (i + 1,)

    # Without autograph, which Python 3.13 has not in every version of TensorFlow.
    @tf.function(jit_compile=jit_compile, autograph=False)
    def add():
        return tf.while_loop(lambda i: i < len(logs), body, (0,))

    add()
    added = values.means()
    exact = (-14.5e6 + logs.astype("float64").sum()) / 2_005_000
    assert np.log(added.epsilon) == pytest.approx(exact, abs=1e-6)
    assert added.weak_field_error * added.steps == pytest.approx(0.1 * 5000, rel=1e-6)
    assert added.steps == 2_005_000


def test_step_means_are_those_of_the_steps_with_an_epsilon():
    weights = [keras.Variable(np.zeros(4))]
    optimizer = keras_rgd.RGD(1.0, window=3)
    optimizer.build(weights)
    assert np.isnan(optimizer.step_means().epsilon)
    rng, seen = np.random.default_rng(0), []
    given = [rng.normal(size=4) for _ in range(4)] + [np.full(4, np.inf)]
    given += [rng.normal(size=4) for _ in range(2)]
    for gradient in given:
        optimizer.apply([tf.constant(gradient, "float32")], weights)
        if np.all(np.isfinite(gradient)):
            seen.append((float(optimizer.chosen_epsilon), float(optimizer.step_weak_field_error)))
    means = optimizer.step_means()
    epsilons = np.array([e for e, _ in seen if e > 0])
    assert len(epsilons) == len(seen) - 1  # the first has no D
    assert means.epsilon == pytest.approx(np.exp(np.log(epsilons).mean()), rel=1e-5)
    assert means.weak_field_error == pytest.approx(np.mean([e for _, e in seen]), rel=1e-5)
    assert (means.steps, means.steps_without_epsilon) == (len(seen), 1)
    optimizer.reset_step_means()
    assert optimizer.step_means().steps == 0
