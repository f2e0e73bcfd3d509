"""DiffusionMonitor: a Keras callback that records D after each epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import rich.console

from keras_rgd import epsilon as epsilon_rules
from keras_rgd._support import arguments, batches
from keras_rgd._support.backends import needs_tensorflow
from keras_rgd.measurement import Measurement
from keras_rgd.optimizer import inner_rgd
from keras_rgd.per_example.losses_model import LossesModel, as_given
from keras_rgd.per_example.measuring import as_batch
from keras_rgd.records import DiffusionRecord, load_records, save_records

# Into `logs`, and so to the progress bar, History and CSVLogger; the rest is in the records.
_LOGGED = (
    "rank",
    "rank_gram",
    "lambda_max",
    "epsilon",
    "weak_field_error",
    "weak_field_error_gradient",
)


class DiffusionMonitor(keras.callbacks.Callback):
    """Record the diffusion matrix of a model after each epoch, with any optimizer.

    The same examples are measured each time. Put it before callbacks that read `logs`
    (TensorBoard, CSVLogger, EarlyStopping): `rank`, `rank_gram`, `lambda_max`, `epsilon`,
    `weak_field_error` and `weak_field_error_gradient` are there. With `RGD(window=W)` also
    `window_cosine`, of D v by the window and D v as measured here: 1 where they agree. Measuring
    changes nothing in the training: no seed, moving statistic or metric.

    Args:
        data: the examples to measure on: a tuple `(x, y)` or `(x, y, sample_weight)` of arrays, a
            batched `tf.data.Dataset`, or a `keras.utils.PyDataset`. It is read once, here; a
            dataset that shuffles should not be the one that `fit` gets, whose order would change.
        log_dir: a folder for TensorBoard; scalars, the histogram of log10 eigenvalues and a
            picture of the spectrum go to the run `diffusion` in it. Defaults to `None`, none.
        examples: how many examples are used at most, from the first on. Defaults to `512`.
        chunk_size: how many examples' gradients are held at once; it changes no number. Defaults
            to `None`, as many as fit in 1 GiB.
        training: `True` measures with layers in training mode. Defaults to `False`, evaluation
            mode, as D is measured in the literature.
        epsilon: the rule for eps where the optimizer is not `RGD`, whose own rule is used
            otherwise; as `RGD`'s argument. Defaults to `0.5`.
        per_example: as in `keras_rgd.diffusion_matrix`. Defaults to `"auto"`.
        losses: for a model that has no `call` or no loss, as a GAN or a diffusion model with a
            `train_step` of its own: a function of a batch, x, (x, y) or (x, y, sample_weight) as
            `data` gives it, that returns the loss of each example, shape (N,). Its layers are in
            evaluation mode unless it says otherwise. Random numbers should be drawn by a
            `keras.random.SeedGenerator` of the model, which a measurement puts back. Defaults to
            `None`, the model's own loss.
        weights: with `losses`, the list of variables that D is about. Defaults to `None`, all that
            the model trains.
        neglected_terms: whether to record what Eq. (10) neglects at each measured point as well
            (`neglected_curvature` and three more; `keras_rgd.geometry.neglected_terms` has them
            along a whole flow). In evaluation mode. Defaults to `False`.
        verbose: whether a measurement of more than a second shows that it runs. Defaults to
            `True`.

    Attributes:
        records: a list of `DiffusionRecord`, one an epoch.

    Raises:
        ValueError: an argument is not what is described here.
    """

    def __init__(
        self,
        data: Any,
        *,
        log_dir: str | os.PathLike | None = None,
        examples: int = 512,
        chunk_size: int | None = None,
        training: bool = False,
        epsilon: Any = 0.5,
        per_example: str = "auto",
        losses: Callable | None = None,
        weights: list | None = None,
        neglected_terms: bool = False,
        verbose: bool = True,
    ):
        super().__init__()
        if not arguments.is_count(examples):
            raise ValueError(
                f"`examples` must be a positive integer. Received: examples={examples!r}"
            )
        arguments.check_way(per_example, chunk_size)
        arguments.check_training(training)
        if losses is not None and not callable(losses):
            raise ValueError(f"`losses` must be a function. Received: losses={losses!r}")
        if weights is not None and losses is None:
            raise ValueError("`weights` are those of `losses`. Received: losses=None")
        if neglected_terms and training:
            raise ValueError(
                "`neglected_terms` are those of evaluation mode. Received: neglected_terms=True, "
                "training=True"
            )
        if neglected_terms:
            needs_tensorflow("DiffusionMonitor(neglected_terms=True)")
        self.records: list[DiffusionRecord] = []
        self._data = _first_examples(data, int(examples))
        self._rule = epsilon_rules.get(epsilon)
        self._log_dir = None if log_dir is None else os.path.join(log_dir, "diffusion")
        self._options = (training, per_example, chunk_size)
        self._losses, self._weights = losses, weights
        self._neglected = neglected_terms
        self._verbose = verbose
        # While a model trains: what is measured, its `Measurement`, and the `Geometry` if wanted.
        self._measured: Any = None
        self._measurement: Any = None
        self._geometry: Any = None
        self._writer: Any = None  # a `RecordWriter`, with `log_dir`

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find out how this model is measured, and whether it can be, before it trains."""
        if self._log_dir is not None and self._writer is None:
            from keras_rgd.tensorboard import RecordWriter

            self._writer = RecordWriter(self._log_dir)
        with self._showing_progress():
            self._prepare()

    def _prepare(self):
        if self._losses is None:
            self._measured, data = self.model, self._data
        else:
            self._measured = LossesModel(self.model, self._losses, self._weights)
            data = (as_given(*self._data),)
        batch = as_batch(self._measured, *data)
        self._measurement = Measurement(self._measured, batch, *self._options)
        self._geometry = _geometry_of(self._measured, batch) if self._neglected else None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin anew with what RGD keeps of an epoch's steps."""
        rgd = inner_rgd(self.model.optimizer)
        if rgd is not None and rgd.built:
            rgd.reset_step_means()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure, record, and put the main numbers into `logs`."""
        logs = {} if logs is None else logs
        optimizer = self.model.optimizer
        rgd = inner_rgd(optimizer)
        with self._showing_progress():
            # Layers may have been frozen since.
            if not self._measurement.is_of(self._measured):
                self._prepare()
            rule = self._rule if rgd is None else rgd.epsilon
            record = self._measurement(
                rule,
                epoch=epoch,
                # int() of a mirrored variable raises.
                step=int(keras.ops.convert_to_numpy(optimizer.iterations)),
                rgd=rgd,
            )
            if self._neglected and math.isfinite(record.epsilon):
                from keras_rgd.geometry.neglected import pointwise_terms

                terms = pointwise_terms(self._geometry, rule, record.epsilon)
                record = dataclasses.replace(record, **terms)
        self.records.append(record)
        windowed = rgd is not None and rgd.window is not None
        logged = (*_LOGGED, "window_cosine") if windowed else _LOGGED
        logs.update({name: _number(getattr(record, name)) for name in logged})
        if self._writer is not None:
            self._writer.write(record)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the TensorBoard file."""
        self._measured = self._measurement = self._geometry = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the records to a JSON file; see `keras_rgd.save_records`."""
        save_records(self.records, path)

    @staticmethod
    def load(path: str | os.PathLike) -> list[DiffusionRecord]:
        """The list of records in a file that `save` wrote."""
        return load_records(path)

    @contextlib.contextmanager
    def _showing_progress(self):
        """Say that measuring runs once it has taken a second: a spinner, or a line in a log."""
        if not self._verbose:
            yield
            return
        n = len(keras.tree.flatten(self._data[0])[0])
        message = f"measuring D on {n} examples"
        console = rich.console.Console()
        # In a notebook rich wants a widget, which is not everywhere.
        spins = console.is_terminal and not console.is_jupyter
        status = console.status(message) if spins else None
        timer = threading.Timer(1.0, status.start if spins else lambda: print(f"{message} ..."))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            if spins:
                status.stop()


def _geometry_of(model, batch):
    # Which TensorFlow alone has.
    from keras_rgd.geometry.geometry import Geometry

    return Geometry(model, *batch)


def _number(value):
    return math.nan if value is None else value


def _first_examples(data, examples):
    """(x, y, sample_weight) of the first `examples` examples of arrays or of a data set."""
    parts, missing = [], examples
    for batch in batches.read(data):
        # Of views of its arrays the whole data set would stay in memory.
        parts.append(batches.mapped(lambda a, n=missing: _copy(a[:n]), batch))
        missing -= batches.length(parts[-1])
        if missing <= 0:
            break
    if not parts:
        raise ValueError("`data` has no examples.")
    return batches.joined(*parts)


def _copy(array):
    return np.array(batches.as_array(array))
