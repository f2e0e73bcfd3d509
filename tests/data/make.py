"""Writes a folder of files as the imported version of keras_rgd saves them, and what they hold.

    git worktree add ../released 1c6001b  # whose keras_rgd is 0.1.0
    PYTHONPATH=../released python tests/data/make.py tests/data/0.1.0

Beside each model stand the next steps of its training, `expected.npz`; beside records and spectra
their fields as exact numbers, `expected.json`. Neither is written by keras_rgd's own means.
"""

import json
import pathlib
import platform
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L

import keras_rgd
from keras_rgd import epsilon

BATCH, FEATURES, CLASSES = 8, 6, 3
STEPS_BEFORE, STEPS_AFTER = 3, 2
LOSS = "sparse_categorical_crossentropy"


@keras.saving.register_keras_serializable(package="saved_files")
class Classifier(keras_rgd.RGDModel):
    """A functional model's class of the user's own."""


def dense():
    return [L.Dense(4, activation="tanh"), L.Dense(CLASSES, activation="softmax")]


def sequential(*stack, cls=keras_rgd.RGDSequential):
    return cls([keras.Input((FEATURES,)), *stack, *dense()])


def functional(cls=keras_rgd.RGDModel):
    x = keras.Input((FEATURES,))
    h = L.LayerNormalization()(L.Dense(4, activation="tanh")(x))
    return cls(x, L.Dense(CLASSES, activation="softmax")(h))


def convolution(cls):
    x = keras.Input((FEATURES,))
    h = L.Conv1D(3, 3, activation="tanh")(L.Reshape((FEATURES, 1))(x))
    return cls(x, L.Dense(CLASSES, activation="softmax")(L.Flatten()(h)))


def decay(start):
    return keras.optimizers.schedules.ExponentialDecay(start, 10, 0.5)


# name: (a model, its optimizer), each made when its turn comes.
MODELS = {
    "fraction_schedule": lambda: (
        sequential(),
        keras_rgd.RGD(decay(0.2), epsilon.Fraction(decay(0.8)), momentum=0.9),
    ),
    "fixed": lambda: (
        functional(),
        keras_rgd.RGD(0.2, epsilon.Fixed(0.3), momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "weak_field": lambda: (convolution(Classifier), keras_rgd.RGD(0.2, epsilon.WeakField(0.02))),
    "fraction_of_mean": lambda: (
        functional(Classifier),
        keras_rgd.RGD(0.2, epsilon.FractionOfMean(0.5, decay=0.9), clipnorm=0.5, use_ema=True),
    ),
    "window": lambda: (
        sequential(cls=keras.Sequential),
        keras_rgd.RGD(0.2, window=4, batch_size=BATCH, momentum=0.5),
    ),
    "window_bfloat16": lambda: (
        sequential(),
        keras_rgd.RGD(0.2, 0.7, window=3, window_dtype="bfloat16"),
    ),
    "microbatches": lambda: (sequential(), keras_rgd.RGD(0.2, microbatch_size=4)),
    "dropout": lambda: (sequential(L.Dropout(0.3), L.GaussianNoise(0.2)), keras_rgd.RGD(0.2)),
    "double_backward": lambda: (
        sequential(L.BatchNormalization()),
        keras_rgd.RGD(0.2, per_example="double_backward", chunk_size=4),
    ),
    "mixed_float16": lambda: (mixed(sequential), keras_rgd.RGD(0.2)),
}


def mixed(build):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return build()
    finally:
        keras.config.set_dtype_policy("float32")


def batches(steps):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(steps, BATCH, FEATURES)).astype("float32")
    return x, rng.integers(0, CLASSES, (steps, BATCH)).astype("int32")


def flat(variables):
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)) for v in variables])


def of_optimizer(optimizer):
    rgd = keras_rgd.inner_rgd(optimizer)
    values = (rgd.iterations, rgd.lambda_max, rgd.chosen_epsilon, rgd.step_weak_field_error)
    return np.array([float(v) for v in values])


def write_models(folder):
    """Each model after some steps, and what its next steps are, by its name."""
    xs, ys = batches(STEPS_BEFORE + STEPS_AFTER)
    expected = {"x": xs[STEPS_BEFORE:], "y": ys[STEPS_BEFORE:]}
    for name, make in MODELS.items():
        keras.utils.set_random_seed(3)
        model, optimizer = make()
        model.compile(optimizer, loss=LOSS, jit_compile=False)
        for x, y in zip(xs[:STEPS_BEFORE], ys[:STEPS_BEFORE], strict=True):
            model.train_on_batch(x, y)
        model.save(folder / f"{name}.keras")
        weights, values = [flat(model.variables)], [of_optimizer(model.optimizer)]
        for x, y in zip(expected["x"], expected["y"], strict=True):
            model.train_on_batch(x, y)
            weights.append(flat(model.variables))
            values.append(of_optimizer(model.optimizer))
        expected |= {f"{name}/weights": np.array(weights), f"{name}/optimizer": np.array(values)}
    np.savez_compressed(folder / "expected.npz", **expected)


# name: (the optimizer, the monitor's options).
MONITORS = {
    "records_rgd": (lambda: keras_rgd.RGD(0.2), {}),
    "records_sgd": (lambda: keras.optimizers.SGD(0.2), {"epsilon": epsilon.Fixed(0.1)}),
    "records_window": (lambda: keras_rgd.RGD(0.2, window=4, batch_size=BATCH), {}),
    "records_neglected_terms": (lambda: keras_rgd.RGD(0.2), {"neglected_terms": True}),
}


def write_records(folder, data):
    """Records of three epochs by each monitor; a name's fields as exact numbers."""
    expected = {}
    for name, (optimizer, options) in MONITORS.items():
        keras.utils.set_random_seed(5)
        model = sequential()
        model.compile(optimizer(), loss=LOSS, jit_compile=False)
        monitor = keras_rgd.DiffusionMonitor(data, examples=12, verbose=False, **options)
        model.fit(*data, batch_size=BATCH, epochs=3, callbacks=[monitor], verbose=0)
        keras_rgd.save_records(monitor.records, folder / f"{name}.json")
        expected[name] = [exact(record) for record in monitor.records]
    return expected


def write_spectra(folder, data):
    """The spectrum by each method; a name's fields as exact numbers."""
    keras.utils.set_random_seed(5)
    model = sequential()
    model.compile("sgd", loss=LOSS)
    expected = {}
    for method in ("gram", "covariance", "iterative"):
        k = 5 if method == "iterative" else None
        found = keras_rgd.spectrum(model, data, method=method, k=k, batch_size=8, verbose=False)
        found.save(folder / f"spectrum_{method}.json")
        expected[f"spectrum_{method}"] = exact(found)
    return expected


def exact(record):
    """The fields of a record, with each float as `float.hex` writes it."""
    return {name: _exact(value) for name, value in vars(record).items()}


def _exact(value):
    if isinstance(value, np.ndarray):
        return [float(v).hex() for v in value]
    return float(value).hex() if isinstance(value, float) else value


def main(folder):
    folder.mkdir(parents=True)
    write_models(folder)
    xs, ys = batches(3)
    data = xs.reshape(-1, FEATURES), ys.reshape(-1)
    versions = {
        "keras_rgd": keras_rgd.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    expected = {"versions": versions} | write_records(folder, data) | write_spectra(folder, data)
    text = json.dumps(expected, indent=1)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
