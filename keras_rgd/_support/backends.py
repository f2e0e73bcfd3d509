"""Which of Keras's backends runs, and what to say where a part needs another."""

import keras

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def needs_tensorflow(name):
    """Raise `ImportError` for a part of the package by its name, unless TensorFlow runs Keras."""
    if not ON_TENSORFLOW:
        raise ImportError(
            f"{name} needs the TensorFlow backend of Keras, and this is "
            f"{keras.backend.backend()!r}. On every backend there are keras_rgd.RGD(window=32) for "
            "any keras.Model, its diffusion_matrix() and keras_rgd.DiffusionMetric; for the rest "
            "set KERAS_BACKEND=tensorflow before Keras is imported."
        )
