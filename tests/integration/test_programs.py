"""Programs in the manner of keras.io and keras_hub, with all that the package offers for them."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from programs import BATCH, PROGRAMS

import keras_rgd

EVERY = pytest.mark.parametrize("program", PROGRAMS, ids=str)
BY_EXAMPLES = pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p.has_example_losses], ids=str
)
NO_EXAMPLE_LOSSES = "loss does not depend on the sample weights"
NOT_ALONE = "loss of an example changes with the batch"


class Following(keras.callbacks.Callback):
    """The gradient of each batch before its step, float64 (d,)."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.gradients = batches, []

    def on_train_batch_begin(self, batch, logs=None):
        self.gradients.append(gradient(self.model, *self.batches[batch]))


def gradient(model, x, y, sample_weight):
    """v of a batch as the next step sees it, float64 (d,)."""
    with reference.unchanged(model), tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model._compute_loss(x, y, y_pred, sample_weight)
    weights = [w.value for w in model.trainable_variables]
    zero = tf.UnconnectedGradients.ZERO
    return reference.flatten(tape.gradient(loss, weights, unconnected_gradients=zero))


def dense(program, model, batch, training):
    """`reference.Dense` of a batch, drawing what the next step draws."""
    x, y, sample_weight = batch
    shape = program.loss_shape(y)
    return reference.compiled(model, x, y, sample_weight, shape, training=training)


def next_direction(program, model, **options):
    """What the step on the first batch, of learning rate 1, takes off the weights: (d,)."""
    model.optimizer.learning_rate = 1.0
    before = reference.flatten(model.trainable_variables)
    program.fit(model, steps_per_epoch=1, **options)
    return before - reference.flatten(model.trainable_variables)


def trained(program, model, optimizer, epochs, callbacks=()):
    """Fitted, to losses that are finite."""
    program.compile(model, optimizer)
    history = program.fit(model, epochs=epochs, callbacks=list(callbacks)).history
    assert len(history["loss"]) == epochs
    assert np.all(np.isfinite(history["loss"]))
    return model


@EVERY
def test_a_window_steps_along_the_direction_of_an_explicit_D(program):
    optimizer = keras_rgd.RGD(0.01, window=8, batch_size=BATCH)
    follow = Following(program.batches())
    model = trained(program, program.model(), optimizer, 2, [follow])
    step = next_direction(program, model, callbacks=[follow])
    V = np.array(follow.gradients[-8:])
    centred = (V - V.mean(0)) * np.sqrt(BATCH / 7)
    epsilon = float(optimizer.chosen_epsilon)
    expected = V[-1] - epsilon * (centred.T @ (centred @ V[-1]))
    assert reference.relative_error(step, expected) <= 1e-4
    assert 0 < epsilon * np.linalg.norm(centred, 2) ** 2 < 1


@BY_EXAMPLES
def test_a_step_by_examples_takes_the_direction_of_a_dense_D(program):
    optimizer = keras_rgd.RGD(0.01, per_example="auto")
    model = trained(program, program.by_examples(program.model()), optimizer, 1)
    oracle = dense(program, model, program.batches()[0], training=True)
    step = next_direction(program, model)
    epsilon = float(optimizer.chosen_epsilon)
    assert reference.relative_error(step, oracle.direction(epsilon)) <= 1e-4
    assert 0 < epsilon * np.linalg.eigvalsh(oracle.K)[-1] < 1
    choice = optimizer.per_example_choice
    assert program.way in (None, choice.name), str(choice)


@BY_EXAMPLES
def test_the_monitor_measures_a_dense_D(program):
    monitor = keras_rgd.DiffusionMonitor(program.measured_data(), verbose=False)
    model = trained(program, program.model(), keras.optimizers.SGD(0.01), 1, [monitor])
    (record,) = monitor.records
    (batch,) = program.batches(record.examples)
    oracle = dense(program, model, batch, training=False)
    expected = np.linalg.eigvalsh(oracle.K)[::-1]
    assert expected[0] > 0
    np.testing.assert_allclose(
        record.eigenvalues, expected[: len(record.eigenvalues)], rtol=1e-3, atol=1e-5 * expected[0]
    )
    np.testing.assert_allclose(record.gradient_norm, np.linalg.norm(oracle.v), rtol=1e-3)
    assert np.isfinite(record.epsilon) and 0 < record.epsilon_lambda_max < 1


@BY_EXAMPLES
def test_spectrum_is_of_a_dense_D_or_refused_where_an_example_is_not_alone(program):
    model = program.compile(program.model(), "sgd")
    if not program.alone:
        with pytest.raises(ValueError, match=NOT_ALONE):
            keras_rgd.spectrum(model, program.measured_data(), verbose=False)
        return
    found = keras_rgd.spectrum(model, program.measured_data(), verbose=False)
    (batch,) = program.batches(found.n_examples)
    oracle = dense(program, model, batch, training=False)
    expected = np.linalg.eigvalsh(oracle.K)[::-1]
    assert expected[0] > 0
    np.testing.assert_allclose(
        found.eigenvalues, expected[: len(found.eigenvalues)], rtol=1e-3, atol=1e-5 * expected[0]
    )


@pytest.mark.parametrize("program", [p for p in PROGRAMS if not p.has_example_losses], ids=str)
def test_losses_added_by_a_layer_alone_are_refused_before_any_weight_changes(program):
    """`add_loss` gives one number for the batch, whose examples have no losses of their own."""
    model, data = program.model(), program.measured_data()
    before = reference.flatten(model.trainable_variables)
    program.compile(model, "sgd")
    monitor = keras_rgd.DiffusionMonitor(data, verbose=False)
    with pytest.raises(ValueError, match=NO_EXAMPLE_LOSSES):
        program.fit(model, callbacks=[monitor])
    with pytest.raises(ValueError, match=NO_EXAMPLE_LOSSES):
        keras_rgd.spectrum(model, data, verbose=False)
    by_examples = program.compile(program.by_examples(model), keras_rgd.RGD())
    with pytest.raises(ValueError, match=NO_EXAMPLE_LOSSES):
        program.fit(by_examples)
    np.testing.assert_array_equal(reference.flatten(model.trainable_variables), before)
