"""Many runs of SGD from one start: Eq. (1) of the paper as the random process that it is."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import tensorflow as tf

from keras_rgd._support.arguments import is_count, is_real
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.smaller_batches import check_smaller_batches

# A covariance of more entries than this is not formed.
_LARGEST_COVARIANCE = 5_000


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """S runs of SGD from one start, seen T times; d weights, flat in the order of the model's."""

    times: np.ndarray  # (T,), from 0, the learning rate times the number of steps
    positions: np.ndarray  # (S, T, d), of the weights' dtype
    learning_rate: float
    batch_size: int
    seconds: float

    def __post_init__(self):
        self.times.flags.writeable = self.positions.flags.writeable = False

    @property
    def mean(self) -> np.ndarray:
        """The mean over the runs, shape (T, d), float64."""
        return self.positions.mean(0, dtype=np.float64)

    @property
    def spread(self) -> np.ndarray:
        """The trace of the covariance, shape (T,): the mean squared distance from the mean."""
        runs = len(self.positions)
        square = np.square(self.positions - self.mean, dtype=np.float64)
        return square.sum((0, 2)) / (runs - 1)

    def deviations(self, instant: int) -> np.ndarray:
        """The runs less their mean at one of `times` (its index), shape (S, d), float64.

        The covariance is their product with themselves over S - 1; its eigenvectors are their right
        singular vectors.
        """
        now = self.positions[:, instant].astype(np.float64)
        return now - now.mean(0)

    def covariance(self, instant: int) -> np.ndarray:
        """The covariance over the runs at one of `times` (its index), shape (d, d).

        Its rank is at most S - 1.

        Raises:
            ValueError: d is larger than 5,000.
        """
        d = self.positions.shape[2]
        if d > _LARGEST_COVARIANCE:
            raise ValueError(
                f"The covariance would have d x d = {d:,} x {d:,} entries; expected d <= "
                f"{_LARGEST_COVARIANCE:,}. Use deviations(instant), its factor."
            )
        deviations = self.deviations(instant)
        return deviations.T @ deviations / (len(deviations) - 1)


def run_ensemble(
    geometry, steps, *, learning_rate, batch_size, runs, every, replacement, seed, verbose
):
    """The `Ensemble` of a `Geometry` from the present weights on; see `Geometry.sgd_ensemble`."""
    started = time.perf_counter()
    counts = dict(steps=steps, batch_size=batch_size, runs=runs, every=every)
    for name, value in counts.items():
        if not is_count(value):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if not is_real(learning_rate) or not learning_rate > 0:
        raise ValueError(
            f"`learning_rate` must be a positive number. Received: learning_rate={learning_rate!r}"
        )
    n, d = geometry.n_examples, geometry.d
    if batch_size > n:
        raise ValueError(f"`batch_size` must be at most N = {n}. Received: batch_size={batch_size}")
    if n > 1:
        check_smaller_batches(geometry.model, geometry.batch)
    walk = _walk(geometry, batch_size)
    rng = np.random.default_rng(seed)
    taken = [min(every * k, steps) for k in range(1 - (-steps // every))]
    start = geometry.flat_weights()
    positions = np.empty((runs, len(taken), d), geometry.dtype.as_numpy_dtype)
    rate = tf.constant(learning_rate, tf.float64)
    with progress_bar("SGD", runs, verbose, after=SHOWN_AFTER) as advance:
        for run in range(runs):
            geometry.move_to(start)
            positions[run, 0] = start
            for k, count in enumerate(np.diff(taken), 1):
                indices = _batches(rng, n, batch_size, count, replacement)
                walk(geometry.batch, tf.constant(indices), rate)
                positions[run, k] = geometry.flat_weights()
            advance()
    return Ensemble(
        times=learning_rate * np.array(taken),
        positions=positions,
        learning_rate=float(learning_rate),
        batch_size=int(batch_size),
        seconds=time.perf_counter() - started,
    )


def _batches(rng, n, size, count, replacement):
    """Indices of the examples of some batches, shape (count, size)."""
    if replacement:
        return rng.integers(0, n, (count, size))
    return np.stack([rng.choice(n, size, replace=False) for _ in range(count)])


def _walk(geometry, batch_size):
    """A graph function that takes one step for each row of indices, remembered with the model."""
    key = ("SGD", int(batch_size), geometry.batch.signature)
    return remembered(geometry.model, key, lambda: _traced_walk(geometry.model))


def _traced_walk(model):
    losses = ExampleLosses(model, training=False)
    weights = losses.weights

    def take_step(batch, learning_rate):
        with tf.GradientTape() as tape:
            loss = losses.total(batch, losses.forward(batch.x))
        for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
            if g is not None:
                gradient = tf.cast(tf.convert_to_tensor(g), w.dtype)
                w.assign_sub(tf.cast(learning_rate, w.dtype) * gradient)

    def walk(batch, indices, learning_rate):
        def one_step(step):
            take_step(batch.mapped(lambda t: tf.gather(t, indices[step])), learning_rate)
            return step + 1

        tf.while_loop(lambda step: step < tf.shape(indices)[0], one_step, [0])

    return tf.function(walk, autograph=False, reduce_retracing=True)
