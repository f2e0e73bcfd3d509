"""The monitor on models whose train_step is their own: refused at once, or by `losses=` exact."""

import copy

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import layers as L
from keras import ops
from wide import swept

from keras_rgd import DiffusionMonitor

REAL = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
NOISE = np.random.default_rng(1).normal(size=(7, 2)).astype("float32")


def bce(label, logits):
    """Binary cross-entropy of each example, shape (N,)."""
    return keras.losses.binary_crossentropy(label * ops.ones_like(logits), logits, from_logits=True)


class Gan(keras.Model):
    """No `call`, no loss, two optimizers, a step of its own."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), L.Dense(5, "tanh"), L.Dense(4)])
        self.discriminator = keras.Sequential(
            [keras.Input((4,)), L.Dense(5, "tanh"), L.Dropout(0.5), L.Dense(1)]
        )

    def losses_of(self, batch):
        real, noise = batch
        d = self.discriminator
        return bce(1.0, d(real)) + bce(0.0, d(self.generator(noise)))

    def train_step(self, data):
        weights = self.discriminator.trainable_variables
        with tf.GradientTape() as tape:
            loss = ops.mean(self.losses_of(data))
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


class Denoiser(keras.Model):
    """A `train_step` that draws noise, and no loss but in it."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([L.Dense(6, "tanh"), L.BatchNormalization(), L.Dense(4)])
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x):
        return self.net(x)

    def losses_of(self, x):
        noise = keras.random.normal(ops.shape(x), seed=self.seed)
        return ops.mean(ops.square(self.net(x + noise) - noise), axis=-1)

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = ops.mean(self.losses_of(x))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def dense_D(model, weights, losses):
    """D in float64 from the gradient of each loss, one after the other, and the mean gradient."""
    with reference.unchanged(model), tf.GradientTape(persistent=True) as tape:
        values = tf.unstack(losses())
    weights = [w.value for w in weights]
    zero = tf.UnconnectedGradients.ZERO
    G = [reference.flatten(tape.gradient(f, weights, unconnected_gradients=zero)) for f in values]
    return reference.Dense(np.array(G), np.mean(G, 0))


def assert_records(record, dense):
    top = dense.lambda_max
    np.testing.assert_allclose(
        record.eigenvalues / top, dense.eigenvalues[: len(record.eigenvalues)] / top, atol=1e-5
    )
    assert record.gradient_norm == pytest.approx(np.linalg.norm(dense.v), rel=1e-4)
    assert record.epsilon * top == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("part", swept(["discriminator", "generator", None], ["generator"]))
def test_a_gan_is_watched_by_its_losses_and_the_weights_they_are_about(part):
    model = Gan()
    model.compile("adam")
    weights = None if part is None else getattr(model, part).trainable_variables
    monitor = DiffusionMonitor(
        (REAL, NOISE), losses=model.losses_of, weights=weights, verbose=False
    )
    model.fit(REAL, NOISE, epochs=2, verbose=0, callbacks=[monitor])
    weights = model.trainable_variables if part is None else weights
    dense = dense_D(model, weights, lambda: model.losses_of((REAL, NOISE)))
    assert monitor.records[-1].n_weights == len(dense.v) == sum(np.prod(w.shape) for w in weights)
    assert_records(monitor.records[-1], dense)


def test_a_diffusion_model_is_watched_and_trains_as_if_it_were_not():
    results = []
    for watched in (False, True):
        keras.utils.set_random_seed(0)
        model = Denoiser()
        model.compile("adam")
        monitor = DiffusionMonitor((REAL,), losses=model.losses_of, verbose=False)
        callbacks = [monitor] if watched else []
        model.fit(REAL, epochs=2, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
        results.append([v.numpy() for v in model.variables])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    dense = dense_D(model, model.trainable_variables, lambda: model.losses_of(REAL))
    assert_records(monitor.records[-1], dense)


@pytest.mark.parametrize(
    "make, message", [(Gan, "has no `call`, and class Gan"), (Denoiser, "and class Denoiser")]
)
def test_a_model_without_losses_is_refused_before_it_trains(make, message):
    model = make()
    model.compile("sgd")
    steps = []
    spy = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *_: steps.append(1))
    monitor = DiffusionMonitor((REAL, NOISE), verbose=False)
    with pytest.raises(ValueError, match=message) as error:
        model.fit(REAL, NOISE, verbose=0, callbacks=[spy, monitor])
    assert not steps
    for way_out in ("overrides `train_step`", "`compute_loss", "losses=", "RGD(window=32)"):
        assert way_out in str(error.value)


def test_an_unbuilt_model_is_refused_before_it_trains_and_built_as_its_first_step_would():
    x, y = REAL, np.zeros((7, 3), "float32")

    def trained(callbacks):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([L.Dense(5, "tanh"), L.Dropout(0.5), L.Dense(3)])
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks)
        return [v.numpy() for v in model.variables]

    for a, b in zip(trained([]), trained([DiffusionMonitor((x, y))]), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = []
    spy = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *_: steps.append(1))
    with pytest.raises(ValueError, match="which needs targets"):
        trained([spy, DiffusionMonitor((x,))])
    assert not steps


@pytest.mark.parametrize("losses, shape", [(ops.mean, "()"), (lambda x: x, "(None, 4)")])
def test_losses_of_another_shape_are_refused(losses, shape):
    model = Denoiser()
    model.compile("sgd")
    monitor = DiffusionMonitor((REAL,), losses=losses, verbose=False)
    with pytest.raises(ValueError) as error:
        model.fit(REAL, verbose=0, callbacks=[monitor])
    assert "one number for each example, shape (N,)" in str(error.value)
    assert f"Received: shape {shape}" in str(error.value)


@pytest.mark.parametrize(
    "arguments, received",
    [
        ({"losses": 3}, "losses=3"),
        ({"weights": []}, "losses=None"),
        ({"training": "no"}, "training='no'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, received):
    with pytest.raises(ValueError, match=f"Received: {received}"):
        DiffusionMonitor((REAL,), **arguments)


def test_a_copied_monitor_is_a_monitor_of_its_own():
    """As keras_tuner copies callbacks before each trial."""
    monitor = DiffusionMonitor((REAL, NOISE[:, :1]), epsilon=0.3, verbose=False)
    records = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), L.Dense(1)])
        model.compile("sgd", "mse")
        again = copy.deepcopy(monitor)
        model.fit(REAL, NOISE[:, :1], verbose=0, callbacks=[again])
        records.append(again.records)
    assert monitor.records == []
    assert [len(r) for r in records] == [1, 1]
    assert records[0][0].lambda_max == records[1][0].lambda_max > 0
    assert records[0][0].epsilon_lambda_max == pytest.approx(0.3)
