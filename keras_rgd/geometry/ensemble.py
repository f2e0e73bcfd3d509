"""Many runs of SGD from one start: Eq. (1) of the paper as the random process that it is."""

import dataclasses
import numbers
import time

import numpy as np
import tensorflow as tf

from keras_rgd import per_example as ways
from keras_rgd._support.arguments import is_count
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.geometry.point import Point
from keras_rgd.per_example.losses import ExampleLosses

# A covariance of more entries than this is not formed.
_LARGEST_COVARIANCE = 5_000


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """S runs of SGD from one start; T moments, d weights, flat in the order of the model's."""

    times: np.ndarray  # (T,), from 0, the learning rate times the number of steps
    positions: np.ndarray  # (S, T, d), of the weights' dtype
    learning_rate: float
    batch_size: int
    seconds: float

    def __post_init__(self):
        self.times.flags.writeable = self.positions.flags.writeable = False

    @property
    def mean(self):
        """The mean over the runs, shape (T, d), float64."""
        return self.positions.mean(0, dtype=np.float64)

    @property
    def spread(self):
        """The trace of the covariance, shape (T,): the mean squared distance from the mean."""
        runs = len(self.positions)
        square = np.square(self.positions - self.mean, dtype=np.float64)
        return square.sum((0, 2)) / (runs - 1)

    def deviations(self, moment):
        """The runs less their mean at a moment, shape (S, d), float64.

        The covariance is their product with themselves over S - 1; its eigenvectors are their right
        singular vectors.
        """
        now = self.positions[:, moment].astype(np.float64)
        return now - now.mean(0)

    def covariance(self, moment):
        """The covariance over the runs at a moment (an index), shape (d, d), of rank <= S - 1.

        Raises:
            ValueError: d is larger than 5,000.
        """
        d = self.positions.shape[2]
        if d > _LARGEST_COVARIANCE:
            raise ValueError(
                f"The covariance would have d x d = {d:,} x {d:,} entries; expected d <= "
                f"{_LARGEST_COVARIANCE:,}. Use deviations(moment), its factor."
            )
        deviations = self.deviations(moment)
        return deviations.T @ deviations / (len(deviations) - 1)


def sgd_ensemble(
    model,
    x,
    y,
    steps,
    *,
    learning_rate,
    batch_size,
    runs=20,
    every=1,
    replacement=True,
    seed=0,
    sample_weight=None,
    verbose=True,
):
    """SGD from the model's weights, again and again with other mini-batches, Eq. (1).

    Plain steps x <- x - eta grad_B L, whatever the model's optimizer, with layers in evaluation
    mode: the batches are all that is random. The model is left as it was.

    Args:
        model: any compiled `keras.Model` whose examples do not mix.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        steps: how many each run takes.
        learning_rate: eta.
        batch_size: |B|, at most N.
        runs: how many there are, S. Defaults to `20`.
        every: how many steps apart the moments are that are kept. Defaults to `1`.
        replacement: `True` draws the examples of a batch with replacement, so that the gradient's
            covariance is D / |B|; `False` draws each batch without. Defaults to `True`.
        seed: of all runs' batches. Defaults to `0`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        verbose: whether work of more than two seconds shows a progress bar. Defaults to `True`.

    Returns:
        An `Ensemble`.

    Raises:
        ValueError: an argument is not what is described here, or the loss of an example depends on
            the batch it is in.
    """
    started = time.perf_counter()
    counts = dict(steps=steps, batch_size=batch_size, runs=runs, every=every)
    for name, value in counts.items():
        if not is_count(value):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if not isinstance(learning_rate, numbers.Real) or not learning_rate > 0:
        raise ValueError(
            f"`learning_rate` must be a positive number. Received: learning_rate={learning_rate!r}"
        )
    point = Point(model, x, y, sample_weight)
    n = point.n_examples
    if batch_size > n:
        raise ValueError(f"`batch_size` must be at most N = {n}. Received: batch_size={batch_size}")
    if n > 1:
        ways.check_smaller_batches(ways.ExampleLosses(model, training=False), point.batch)
    walk = _compiled_walk(model, point.batch, learning_rate)
    rng = np.random.default_rng(seed)
    moments = -(-steps // every)
    start = point.flat_weights()
    positions = np.empty((runs, 1 + moments, point.d), point.dtype.as_numpy_dtype)
    with point.visiting(), progress_bar("SGD", runs, verbose, after=SHOWN_AFTER) as advance:
        for run in range(runs):
            point.move_to(start)
            positions[run, 0] = start
            for moment in range(moments):
                count = min(every, steps - moment * every)
                walk(tf.constant(_batches(rng, n, batch_size, count, replacement)))
                positions[run, moment + 1] = point.flat_weights()
            advance()
    taken = np.minimum(every * np.arange(1 + moments), steps)
    return Ensemble(
        times=learning_rate * taken,
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


def _compiled_walk(model, batch, learning_rate):
    """A function that takes one step for each row of indices."""
    losses = ExampleLosses(model, training=False)
    weights = losses.weights

    def one_step(step, indices):
        chosen = batch.mapped(lambda t: tf.gather(t, indices[step]))
        with tf.GradientTape() as tape:
            loss = losses.total(chosen, losses.forward(chosen.x))
        for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
            if g is not None:
                w.assign_sub(learning_rate * tf.cast(tf.convert_to_tensor(g), w.dtype))
        return step + 1, indices

    def walk(indices):
        count = tf.shape(indices)[0]
        tf.while_loop(lambda step, _: step < count, one_step, (0, indices))

    return tf.function(walk, autograph=False, reduce_retracing=True)
