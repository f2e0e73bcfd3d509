"""A model of keras.applications, as it is."""

import keras
import numpy as np

import keras_rgd


def test_a_model_of_keras_applications_trains_as_it_is():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(keras_rgd.RGD(0.05, window=8), loss)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 48)
    x = (rng.normal(size=(48, 32, 32, 3)) + y[:, None, None, None]).astype("float32")
    losses = model.fit(x, y, batch_size=16, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.optimizer.diffusion_matrix().rank() == 7
