"""DiffusionMonitor: every number against dense numpy, and a training that it does not disturb."""

import csv
import dataclasses
import math
import time

import cases
import keras
import numpy as np
import pytest
import steps
from cases import BY_NAME
from keras import layers as L
from wide import swept

import keras_rgd
from keras_rgd import DiffusionMonitor
from keras_rgd import monitor as monitor_module
from keras_rgd._support import vectors

CROSSENTROPY = cases.CROSSENTROPY


def expected_record(dense, c):
    """The fields that follow from dense D and v by their definitions, with eps = c / M_x."""
    n, d = dense.G.shape
    D, v = dense.D, dense.v
    eigenvalues, E = np.linalg.eigh(D)
    eigenvalues, E = np.maximum(eigenvalues[::-1], 0), E[:, ::-1]
    M, eps32 = eigenvalues[0], np.finfo(np.float32).eps
    cut = M * d * eps32
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    epsilon = c / M
    exact, weak = np.linalg.inv(np.eye(d) + epsilon * D), np.eye(d) - epsilon * D
    squares = np.sum(dense.G**2, axis=1).mean()
    mean_square = np.sum(dense.G.mean(0) ** 2)
    signal = (n * mean_square - squares) / (n - 1)
    return {
        "examples": n,
        "n_weights": d,
        "lambda_max": M,
        "trace": np.trace(D),
        "rank": np.sum(eigenvalues > cut),
        "rank_cut": cut,
        "rank_gram": np.sum(eigenvalues > M * n * eps32),
        "rank_gram_cut": M * n * eps32,
        "rank_bound": n - 1,
        "eigenvalue_mean": eigenvalues.mean(),
        "eigenvalue_std": eigenvalues.std(),
        "clipped_mean": np.maximum(eigenvalues, cut).mean(),
        "clipped_std": np.maximum(eigenvalues, cut).std(),
        "participation_ratio": np.trace(D) ** 2 / np.trace(D @ D),
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "epsilon": epsilon,
        "epsilon_lambda_max": c,
        "weak_field_error": np.linalg.norm(exact - weak, 2),
        "weak_field_error_gradient": dense.error_on_step(epsilon),
        "descent_ratio": 1 - epsilon * v @ D @ v / (v @ v),
        "cosine_top": abs(E[:, 0] @ v) / np.linalg.norm(v),
        "gradient_norm": np.linalg.norm(v),
        "noise_scale": n / (n - 1) * (squares - mean_square) / signal if signal > 0 else math.nan,
    }


# the numbers


NAMES = [
    "dense",
    "conv2d",
    "depthwise_conv2d",
    "dropout",
    "batch_normalization",
    "regularizers",
    "embedding_mask_loss",
    "lstm",
    "dictionaries",
]


@pytest.mark.parametrize("name", swept(NAMES, ["dense", "batch_normalization", "regularizers"]))
def test_records_equal_dense_numpy(name):
    case = BY_NAME[name]
    x, y, _ = case.batch()
    monitor = DiffusionMonitor((x, y), epsilon=0.3)
    model, _ = steps.fitted(case, keras.optimizers.Adam(0.01), [monitor])
    record = monitor.records[-1]
    dense = steps.dense_now(case, model)
    for field, value in expected_record(dense, 0.3).items():
        assert getattr(record, field) == pytest.approx(value, rel=2e-4, nan_ok=True), field
    M = dense.lambda_max
    theirs = np.linalg.eigvalsh(dense.K)[::-1][: min(dense.G.shape)]
    np.testing.assert_allclose(record.eigenvalues / M, theirs / M, atol=1e-6)
    assert record.rank_gram <= record.rank_bound
    assert (record.epoch, record.step, record.mode) == (1, 2, "evaluation")
    assert math.isnan(record.step_epsilon)
    assert record.rank_reason is None
    assert record.seconds > 0


def test_the_noise_scale_is_that_of_the_losses_without_the_regularizer():
    rng = np.random.default_rng(0)
    x, y = 1 + 0.1 * rng.normal(size=(8, 3)), 5 + rng.normal(size=(8, 1))
    scales = []
    for regularizer in (None, keras.regularizers.L2(1.0)):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                L.Dense(1, kernel_initializer="ones", kernel_regularizer=regularizer),
            ]
        )
        model.compile(keras.optimizers.SGD(0.0), "mse")
        monitor = DiffusionMonitor((x, y), epsilon=0.3)
        model.fit(x, y, verbose=0, callbacks=[monitor])
        scales.append(monitor.records[0].noise_scale)
    assert scales[0] > 0
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)


def test_records_in_training_mode_are_of_the_batch_itself():
    case = BY_NAME["batch_normalization"]
    monitor = DiffusionMonitor(case.batch()[:2], training=True)
    model, _ = steps.fitted(case, "sgd", [monitor], epochs=1)
    expected = expected_record(steps.dense_now(case, model, training=True), 0.5)
    record = monitor.records[0]
    assert record.mode == "training"
    for field in ("lambda_max", "trace", "cosine_top", "weak_field_error_gradient"):
        assert getattr(record, field) == pytest.approx(expected[field], rel=1e-3)


SIZES = [("conv2d", (4,)), ("conv2d", (1, 50)), ("lstm", (4,))]


@pytest.mark.parametrize("name, sizes", swept(SIZES, SIZES[:1]))
def test_chunks_change_no_record(name, sizes):
    case = BY_NAME[name]
    monitors = [DiffusionMonitor(case.batch()[:2], chunk_size=size) for size in (None, *sizes)]
    steps.fitted(case, "sgd", monitors)
    whole, *others = (m.records for m in monitors)
    for parts in others:
        for a, b in zip(whole, parts, strict=True):
            for field in dataclasses.fields(a):
                if field.type is float and field.name != "seconds":
                    expected = pytest.approx(getattr(a, field.name), rel=1e-3, nan_ok=True)
                    assert getattr(b, field.name) == expected, field.name


def test_with_rgd_the_rule_is_the_optimizers_and_the_steps_are_averaged():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2], epsilon=0.1)
    optimizer = keras_rgd.RGD(0.01, keras_rgd.epsilon.WeakField(0.02))
    seen = []
    spy = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(optimizer.chosen_epsilon))
    )
    model = steps.build(case)
    x, y, _ = case.batch()
    case.compile(model, optimizer)
    model.fit(x, y, batch_size=2, epochs=1, verbose=0, callbacks=[spy, monitor])
    record = monitor.records[0]
    error = steps.dense_now(case, model).error_on_step(record.epsilon)
    assert error == pytest.approx(0.02, rel=1e-3) or record.epsilon_lambda_max > 0.99
    assert record.weak_field_error_gradient == pytest.approx(error, rel=1e-3)
    assert len(seen) == 3
    geometric = np.exp(np.mean(np.log(seen)))
    assert record.step_epsilon == pytest.approx(geometric, rel=1e-5)
    assert np.mean(seen) > 1.001 * geometric
    assert record.step_epsilon_lambda_max == pytest.approx(geometric * record.lambda_max, rel=1e-5)
    assert record.steps_without_epsilon == 0


def test_steps_are_averaged_over_their_own_epoch_and_those_without_an_epsilon_are_counted():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    optimizer = keras_rgd.RGD(0.01, window=3)
    model.compile(optimizer, "mse")
    rng, seen = np.random.default_rng(0), []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            values = (optimizer.chosen_epsilon, optimizer.step_weak_field_error)
            seen.append([float(v) for v in values])

    x, y = rng.normal(size=(24, 4)), rng.normal(size=(24, 3))
    monitor = DiffusionMonitor((x, y))
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[Spy(), monitor])
    # The window's first step has no D yet.
    assert [r.steps_without_epsilon for r in monitor.records] == [1, 0, 0]
    epochs = np.array(seen).reshape(3, 6, 2)
    for record, (epsilons, errors) in zip(monitor.records, epochs.transpose(0, 2, 1), strict=True):
        logs = np.log(epsilons[epsilons > 0])
        assert record.step_epsilon == pytest.approx(np.exp(logs.mean()), rel=1e-5)
        assert record.step_weak_field_error == pytest.approx(errors.mean(), rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_with_a_window_its_D_is_recorded_beside_the_measured_one(frozen):
    case = BY_NAME["dense"]
    model = steps.build(case)
    x, y, _ = case.batch()
    optimizer = keras_rgd.RGD(0.01, window=3, batch_size=2)
    monitor = DiffusionMonitor((x, y))
    case.compile(model, optimizer)
    if frozen:
        optimizer.build(model.trainable_variables)
        next(layer for layer in reversed(model.layers) if layer.weights).trainable = False
        case.compile(model, optimizer)
    logs = model.fit(x, y, batch_size=2, epochs=2, verbose=0, callbacks=[monitor]).history
    record = monitor.records[-1]
    dense = steps.dense_now(case, model)
    rows = optimizer._window.rows[0].numpy().astype("float64")
    d = vectors.size(model.trainable_variables)
    assert rows.shape[1] == len(dense.v)
    assert (d < len(dense.v)) == frozen
    centred = rows - rows.mean(0)
    D = 2 / 2 * (centred.T @ centred)[:d, :d]
    a, b = D @ dense.v[:d], dense.D[:d, :d] @ dense.v[:d]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert record.window_cosine == pytest.approx(expected, rel=1e-4)
    assert logs["window_cosine"][-1] == record.window_cosine
    assert record.window_rank == 2
    assert record.step_lambda_max == float(optimizer.lambda_max)
    assert record.step_lambda_max >= np.linalg.norm(centred, 2) ** 2 * 0.999
    assert record.step_epsilon > 0


def test_without_a_window_its_fields_are_empty():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    steps.fitted(case, "sgd", [monitor], epochs=1)
    record = monitor.records[0]
    assert record.window_rank is None
    assert math.isnan(record.window_cosine)
    assert math.isnan(record.step_lambda_max)
    assert record.steps_without_epsilon is None


def test_overlap_compares_the_top_eigenspaces_of_two_epochs():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    spaces = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            dense = steps.dense_now(case, self.model)
            spaces.append(np.linalg.eigh(dense.D)[1][:, ::-1][:, :5])

    steps.fitted(case, keras.optimizers.Adam(0.05), [Keep(), monitor], epochs=3)
    received = [record.overlap for record in monitor.records]
    assert math.isnan(received[0])
    for i in (1, 2):
        P, Q = (E @ E.T for E in spaces[i - 1 : i + 1])
        assert received[i] == pytest.approx(np.trace(P @ Q) / 5, rel=1e-3)


def test_the_reference_rank_is_none_with_its_reason_for_many_weights():
    model = keras.Sequential([keras.Input((700,)), L.Dense(700), L.Dense(3)])
    model.compile("sgd", CROSSENTROPY())
    x = np.random.default_rng(0).normal(size=(3, 700)).astype("float32")
    y = np.arange(3)
    monitor = DiffusionMonitor((x, y))
    history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
    record = monitor.records[0]
    assert record.rank is None and math.isnan(record.rank_cut)
    assert f"d = {model.count_params()}" in record.rank_reason
    assert record.rank_gram == 2
    assert math.isnan(history["rank"][0])


def test_a_diverged_training_is_recorded_as_such():
    """A callback must not end a training that Keras would carry on."""
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    _, history = steps.fitted(case, keras.optimizers.SGD(float("inf")), [monitor])
    assert len(monitor.records) == len(history["loss"]) == 2
    record = monitor.records[-1]
    assert np.all(np.isnan(record.eigenvalues)) and math.isnan(record.lambda_max)
    assert record.rank is None and "not finite" in record.rank_reason


# beside the training


LOGGED = {
    "rank",
    "rank_gram",
    "lambda_max",
    "epsilon",
    "weak_field_error",
    "weak_field_error_gradient",
}


def test_its_main_numbers_reach_the_callbacks_behind_it(tmp_path):
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    table = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    stop = keras.callbacks.EarlyStopping("lambda_max", min_delta=1e9, patience=2, mode="min")
    _, history = steps.fitted(case, "sgd", [monitor, table, stop], epochs=5, metrics=["accuracy"])
    assert set(history) == LOGGED | {"loss", "accuracy"}
    assert history["lambda_max"] == [record.lambda_max for record in monitor.records]
    assert len(monitor.records) == 3  # EarlyStopping saw that lambda_max does not fall by 1e9
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lambda_max"]) for row in rows] == pytest.approx(history["lambda_max"])


@pytest.mark.parametrize(
    "name, training",
    swept(
        [(name, t) for name in ("dropout", "batch_normalization") for t in (False, True)],
        [("dropout", True)],
    ),
)
def test_measuring_changes_nothing_in_the_training(name, training):
    case = BY_NAME[name]
    x, y, _ = case.batch()
    results = []
    for monitored in (False, True):
        model = steps.build(case)
        callbacks = [DiffusionMonitor((x, y), training=training)] if monitored else []
        case.compile(model, keras.optimizers.Adam(0.01), metrics=["accuracy"])
        keras.utils.set_random_seed(5)
        history = model.fit(
            x, y, batch_size=4, epochs=3, verbose=0, validation_data=(x, y), callbacks=callbacks
        ).history
        kept = {k: v for k, v in history.items() if k not in LOGGED}
        results.append((kept, [v.numpy() for v in model.variables + model.optimizer.variables]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_records_go_on_over_several_fits_and_frozen_layers():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    model, _ = steps.fitted(case, "sgd", [monitor], epochs=1)
    model.layers[0].trainable = False
    steps.fitted(case, "sgd", [monitor], epochs=2, model=model)
    assert [record.epoch for record in monitor.records] == [0, 0, 1]
    assert [record.n_weights for record in monitor.records] == [39, 15, 15]
    assert math.isnan(monitor.records[1].overlap)


def test_layers_frozen_during_a_fit_are_left_out_from_then_on():
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])

    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.layers[0].trainable = epoch == 0

    steps.fitted(case, "sgd", [Freeze(), monitor])
    assert [record.n_weights for record in monitor.records] == [39, 15]


def test_records_are_saved_and_loaded(tmp_path):
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    steps.fitted(case, "sgd", [monitor])
    monitor.save(tmp_path / "records.json")
    for loaded in (
        DiffusionMonitor.load(tmp_path / "records.json"),
        keras_rgd.load_records(tmp_path / "records.json"),
    ):
        assert [r.lambda_max for r in loaded] == [r.lambda_max for r in monitor.records]


@pytest.mark.parametrize("seconds, shown", [(1.5, True), (0.0, False)])
def test_a_measurement_of_more_than_a_second_says_that_it_runs(seconds, shown, monkeypatch, capsys):
    case = BY_NAME["dense"]
    monitor = DiffusionMonitor(case.batch()[:2])
    steps.fitted(case, "sgd", [monitor], epochs=1)  # nothing is left to be traced
    measure = monitor_module.Measurement.__call__

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(monitor_module.Measurement, "__call__", slow)
    capsys.readouterr()
    with monitor._showing_progress():
        time.sleep(seconds)
    received = capsys.readouterr()
    assert (f"measuring D on {cases.N} examples" in received.out + received.err) is shown


def test_a_quiet_monitor_prints_nothing(capsys):
    monitor = DiffusionMonitor(BY_NAME["dense"].batch()[:2], verbose=False)
    with monitor._showing_progress():
        time.sleep(1.5)
    received = capsys.readouterr()
    assert received.out == received.err == ""
