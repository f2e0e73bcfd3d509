"""How good is D from a window of mini-batch gradients? Beside D of all examples, while SGD trains.

    python examples/estimators.py --dataset digits --network mlp

trains a network by SGD and compares two estimates of D with D itself, by the cosine of D v, v the
gradient of the current mini-batch: D of that batch's own examples, as `keras_rgd.RGD()` takes it,
and D of the last W mini-batch gradients, as `keras_rgd.RGD(window=W)` does. It prints a table and
writes a picture. `--network cnn` has BatchNormalization, whose f_i are not losses of single
examples; D itself is then |B| times the covariance of many mini-batches drawn at the same weights.

    python examples/estimators.py --dataset digits --network mlp --centrings

compares other ways of treating the drift of the weights with the window's plain mean, over batch
sizes and learning rates.
"""

import argparse
from pathlib import Path

import digits
import keras
import matplotlib
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure

import keras_rgd

MOMENTS = (200, 500, 1000, 2000)  # steps
AROUND = (-20, -10, 0, 10, 20)  # of which the mean is shown
WINDOWS = (8, 16, 32, 64)
CENTRED_WINDOWS = (16, 32)  # for `--centrings`
DRAWS = 1000  # mini-batches that stand for D where examples mix
CHUNK = 1000  # examples differentiated together


def build(network, shape, classes):
    if network == "mlp":
        hidden = [layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(64, "relu")]
    else:
        hidden = [
            *normalized(layers.Conv2D(8, 3, use_bias=False)),
            layers.MaxPooling2D(),
            *normalized(layers.Conv2D(16, 2, use_bias=False)),
            layers.Flatten(),
            *normalized(layers.Dense(32, use_bias=False)),
        ]
    return keras.Sequential([keras.Input(shape), *hidden, layers.Dense(classes)])


def normalized(layer):
    return layer, layers.BatchNormalization(), layers.ReLU()


class Training:
    """SGD on one network, with the gradient of each step and products with D where asked for."""

    def __init__(self, args, batch_size, learning_rate, seed):
        keras.utils.set_random_seed(seed)
        (x, y), _ = digits.load(args.dataset)
        self.x, self.y = tf.constant(x), tf.constant(y)
        self.batch_size, self.learning_rate = batch_size, learning_rate
        self.model = build(args.network, x.shape[1:], int(y.max()) + 1)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile("sgd", loss)
        self.mixes = args.network == "cnn"
        self.rng = np.random.default_rng(seed)
        self.weights = self.model.trainable_variables
        self.gradient = tf.function(self._gradient)
        self.dot, self.combine = tf.function(self._dot), tf.function(self._combine)

    def batches(self):
        while True:
            order = self.rng.permutation(len(self.x))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield self.examples(order[start : start + self.batch_size])

    def examples(self, indices):
        return tf.gather(self.x, indices), tf.gather(self.y, indices)

    def _gradient(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.model.compute_loss(x, y, self.model(x, training=True))
        return tape.gradient(loss, [w.value for w in self.weights])

    def _dot(self, x, y, v):
        return keras_rgd.per_example_gradients(self.model, x, y).dot(v)

    def _combine(self, x, y, w):
        return keras_rgd.per_example_gradients(self.model, x, y).combine(w)

    def steps(self, last):
        """(number of steps before, batch, gradient) for each step, which is taken afterwards."""
        for step, batch in zip(range(last + 1), self.batches(), strict=False):
            gradient = self.gradient(*batch)
            yield step, batch, gradient
            for w, g in zip(self.weights, gradient, strict=True):
                w.assign_sub(self.learning_rate * g)

    def product(self, v):
        """D v, D of all examples or, where they mix, of many mini-batches; flat."""
        if self.mixes:
            statistics = [w.numpy() for w in self.model.non_trainable_variables]
            drawn = (
                self.rng.choice(len(self.x), self.batch_size, replace=False) for _ in range(DRAWS)
            )
            rows = [flat(self.gradient(*self.examples(indices))) for indices in drawn]
            for w, value in zip(self.model.non_trainable_variables, statistics, strict=True):
                w.assign(value)
            return window_product(rows, flat(v))
        parts = [(self.x[i : i + CHUNK], self.y[i : i + CHUNK]) for i in self._starts()]
        k = tf.concat([self.dot(*part, v) for part in parts], 0)
        k = (k - tf.reduce_mean(k)) / len(self.x)
        pairs = zip(self._starts(), parts, strict=True)
        return sum(flat(self.combine(*part, k[i : i + CHUNK])) for i, part in pairs)

    def _starts(self):
        return range(0, len(self.x), CHUNK)

    def product_of_batch(self, batch, v):
        """D v, D of this batch's examples; flat."""
        return flat(keras_rgd.DiffusionMatrix(self.gradients(batch)).matvec(v))

    def gradients(self, batch):
        return keras_rgd.per_example_gradients(self.model, *batch)


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors]).astype(np.float64)


def window_product(rows, v, matrix=None):
    """D v but for a factor, D of the rows centred by their mean or by a matrix."""
    rows = np.asarray(rows)
    centred = rows - rows.mean(0) if matrix is None else matrix @ rows
    return centred.T @ (centred @ v)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def measured(training, estimates):
    """For each moment the cosine of each estimate's D v with D v, the mean over steps around it.

    Args:
        training: a `Training`.
        estimates: the function from (training, batch, v, gradients so far) to a dict of D v.
    """
    cosines = {moment: {} for moment in MOMENTS}
    moment_of = {moment + offset: moment for moment in MOMENTS for offset in AROUND}
    past = []
    for step, batch, gradient in training.steps(max(moment_of)):
        past = [*past[-max(WINDOWS) :], flat(gradient)]
        if step in moment_of:
            truth = training.product(gradient)
            for name, product in estimates(training, batch, gradient, past).items():
                cosines[moment_of[step]].setdefault(name, []).append(cosine(product, truth))
    return {
        moment: {name: np.mean(values) for name, values in found.items()}
        for moment, found in cosines.items()
    }


def batch_and_windows(training, batch, gradient, past):
    v = flat(gradient)
    products = {"batch": training.product_of_batch(batch, gradient)}
    return products | {f"{W}": window_product(past[-W:], v) for W in WINDOWS}


def centrings(W):
    """Matrices whose product with W gradients, oldest first, is their noise."""
    t = np.arange(W) - (W - 1) / 2
    both = np.stack([np.ones(W), t], 1)
    age = W - 1 - np.arange(W)
    weights = 0.5 ** (2 * age / W)
    weights /= weights.sum()
    return {
        "mean": np.eye(W) - 1 / W,
        "recent weigh more": np.sqrt(W * weights)[:, None] * (np.eye(W) - weights),
        "trend": np.eye(W) - both @ np.linalg.pinv(both),
        "differences": np.diff(np.eye(W), axis=0) / np.sqrt(2),
    }


def centred_otherwise(training, batch, gradient, past):
    v, products = flat(gradient), {}
    for W in CENTRED_WINDOWS:
        for name, matrix in centrings(W).items():
            products[W, name] = window_product(past[-W:], v, matrix)
            products[W, f"{name}, without v"] = window_product(past[-W - 1 : -1], v, matrix)
    return products


def average(tables):
    """The mean and the largest distance from it of tables alike."""
    mean, spread = {}, 0.0
    for moment in tables[0]:
        for name in tables[0][moment]:
            values = [table[moment][name] for table in tables]
            mean.setdefault(moment, {})[name] = np.mean(values)
            spread = max(spread, np.max(np.abs(values - np.mean(values))))
    return mean, spread


def show_windows(args):
    seeds = range(args.seed, args.seed + args.seeds)
    trainings = [Training(args, args.batch_size, args.learning_rate, seed) for seed in seeds]
    table, spread = average([measured(training, batch_and_windows) for training in trainings])
    print("| step | D of the batch's examples | " + " | ".join(f"W = {W}" for W in WINDOWS) + " |")
    print("|---" * (2 + len(WINDOWS)) + "|")
    for moment, found in table.items():
        print(f"| {moment} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")
    print(f"\nmeans of {len(seeds)} seeds, none further than {spread:.2f} from its mean")
    if trainings[-1].mixes:
        v = trainings[-1].gradient(*next(trainings[-1].batches()))
        both = (trainings[-1].product(v) for _ in range(2))
        print(f"D v of {DRAWS} mini-batches and of {DRAWS} others: cosine {cosine(*both):.2f}")
    picture = args.out / f"estimators_{args.dataset}_{args.network}.png"
    draw(table, args).savefig(picture, dpi=150)
    print(f"picture  {picture}")


def draw(table, args):
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.add_subplot()
    shades = np.linspace(0.15, 0.95, len(table))
    for shade, (moment, found) in zip(shades, table.items(), strict=True):
        color = matplotlib.colormaps["viridis_r"](shade)
        cosines = [found[f"{W}"] for W in WINDOWS]
        ax.plot(WINDOWS, cosines, "o-", color=color, label=f"step {moment}")
        ax.axhline(found["batch"], color=color, ls=":", lw=1)
    ax.set_xscale("log")
    ax.set_xticks(WINDOWS, labels=[str(W) for W in WINDOWS])
    ax.minorticks_off()
    ax.set_ylim(0.4, 1)
    ax.set_xlabel("W, mini-batch gradients in the window")
    ax.set_ylabel("cosine of D v with that of all of D")
    ax.set_title(
        f"{args.network} on {args.dataset}, |B| = {args.batch_size}, SGD {args.learning_rate}; "
        "dotted: the batch's examples",
        fontsize="medium",
    )
    ax.legend(loc="lower right")
    return figure


def show_centrings(args):
    names = [n for name in centrings(2) for n in (name, f"{name}, without v")]
    print("| size of B | rate | W | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for batch_size in (16, 64, 256):
        for learning_rate in (0.02, 0.1, 0.5):
            training = Training(args, batch_size, learning_rate, args.seed)
            table = measured(training, centred_otherwise)
            for W in CENTRED_WINDOWS:
                means = (np.mean([found[W, name] for found in table.values()]) for name in names)
                cells = " | ".join(f"{mean:.2f}" for mean in means)
                print(f"| {batch_size} | {learning_rate} | {W} | {cells} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="digits", help="digits, or a name of TFDS")
    parser.add_argument("--network", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--batch-size", type=digits.positive_int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=digits.positive_int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--centrings", action="store_true", help="compare ways of centring")
    parser.add_argument("--out", type=Path, default=Path("estimators_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (show_centrings if args.centrings else show_windows)(args)


if __name__ == "__main__":
    main()
