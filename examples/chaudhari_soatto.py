"""Measure the rank and the spectrum of D as Chaudhari and Soatto did (arXiv 1710.11029, Fig. 1).

    python examples/chaudhari_soatto.py --network small-lenet

trains one of their three networks by SGD and measures D over the whole training set, in evaluation
mode, after 20%, 40% and 100% of the epochs. It prints the rank in percent of d and the mean and
standard deviation of all d eigenvalues, raw and clipped from below at the cut of the rank, and
writes a picture and the spectra below the current folder. The data sets, mnist and cifar10, must
be on disk, or `--download` fetches them. What the paper does not say is our choice: weights that
start as He's, and a learning rate that falls tenfold in each fifth of training, so that the network
has nearly settled at the first of the three moments, as its spectra say that theirs had.
"""

import argparse
import time
from pathlib import Path

import digits
import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure

import keras_rgd
from keras_rgd.datasets import DatasetError, load_dataset

FRACTIONS = (0.2, 0.4, 1.0)

WEIGHT_DECAY = 1e-4

# Fig. 1a of arXiv 1710.11029, at the end of training.
PUBLISHED = {
    "small-lenet": "rank 1.8 % of d, eigenvalues (0.3 +- 2.11) 1e-3, errors about 0.75 %",
}


def small_lenet(dropout=0.1):
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *block(layers.Conv2D(8, 5), layers.MaxPooling2D(3), layers.Dropout(dropout)),
            *block(layers.Conv2D(16, 5), layers.MaxPooling2D(2), layers.Dropout(dropout)),
            layers.Flatten(),
            *block(layers.Dense(128), layers.Dropout(dropout)),
            layers.Dense(10),
        ],
        name="small-lenet",
    )


def small_fc():
    return keras.Sequential(
        [
            keras.Input((7, 7, 1)),
            layers.Flatten(),
            *block(layers.Dense(64)),
            layers.Dense(10),
        ],
        name="small-fc",
    )


def small_allcnn():
    decay = keras.regularizers.L2(WEIGHT_DECAY / 2)

    def convolution(filters, size=3, strides=1):
        return block(
            layers.Conv2D(filters, size, strides, padding="same", kernel_regularizer=decay)
        )

    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            *convolution(12),
            *convolution(12),
            *convolution(12, strides=2),
            *convolution(24),
            *convolution(24),
            *convolution(24, strides=2),
            *convolution(24),
            *convolution(24),
            *convolution(10, size=1),
            layers.GlobalAveragePooling2D(),
        ],
        name="small-allcnn",
    )


def block(layer, *after):
    # He's initialization, for ReLU; the paper names none.
    layer.kernel_initializer = keras.initializers.HeNormal()
    return [layer, layers.BatchNormalization(), layers.ReLU(), *after]


NETWORKS = {"small-lenet": small_lenet, "small-fc": small_fc, "small-allcnn": small_allcnn}


def load(network, download):
    """((x_train, y_train), (x_test, y_test)), as the network takes them."""
    name = "cifar10" if network == "small-allcnn" else "mnist"
    try:
        train, test = (
            load_dataset(name, split, download=download, scale=1) for split in ("train", "test")
        )
    except DatasetError as error:
        raise SystemExit(str(error)) from error
    if network == "small-fc":
        return (shrunk(train[0]), train[1]), (shrunk(test[0]), test[1])
    if network == "small-allcnn":
        whiten = zca(contrast_normalised(train[0]))
        return (whiten(train[0]), train[1]), (whiten(test[0]), test[1])
    return train, test


def shrunk(x):
    """Images of 7x7 pixels, the averages of 4x4 blocks."""
    return x.reshape(-1, 7, 4, 7, 4, 1).mean((2, 4))


def contrast_normalised(x):
    """Each image less its mean and over its standard deviation."""
    x = x - x.mean((1, 2, 3), keepdims=True)
    return x / np.maximum(x.std((1, 2, 3), keepdims=True), 1e-8)


def zca(x, regularization=0.1):
    """The function that normalises contrast, and whitens as the covariance of x says."""
    flat = x.reshape(len(x), -1)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False).astype(np.float64))
    transform = (vectors / np.sqrt(values + regularization)) @ vectors.T

    def whiten(x):
        flat = contrast_normalised(x).reshape(len(x), -1) - mean
        return (flat @ transform.astype(np.float32)).reshape(x.shape)

    return whiten


class Measure(keras.callbacks.Callback):
    """Measure D after some epochs, and keep the errors of that moment."""

    def __init__(self, args, train, epochs):
        super().__init__()
        self.args, self.train, self.epochs = args, train, epochs
        self.measured = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        print(
            f"epoch {epoch + 1}: loss {logs['loss']:.4f}, training error "
            f"{1 - logs['accuracy']:.2%}, test error {1 - logs['val_accuracy']:.2%}, "
            f"{time.perf_counter() - self.started:.0f} s",
            flush=True,
        )
        if epoch + 1 in self.epochs:
            options = dict(examples=self.args.examples, seed=self.args.seed)
            spectrum = keras_rgd.spectrum(self.model, self.train, **options)
            spectrum.save(self.args.out / f"{self.args.network}-epoch-{epoch + 1}.json")
            _, accuracy = self.model.evaluate(*self.train, batch_size=1000, verbose=0)
            print(f"rank {spectrum.rank}, {spectrum.rank_percent:.2f} % of d", flush=True)
            self.measured.append((epoch + 1, 1 - accuracy, 1 - logs["val_accuracy"], spectrum))


def main():
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    train, test = load(args.network, args.download)
    train = tuple(a[: args.training_examples] for a in train)
    options = {} if args.dropout is None else {"dropout": args.dropout}
    model = NETWORKS[args.network](**options)
    steps = args.epochs * -(-len(train[0]) // args.batch_size)
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(args.learning_rate, steps / 5, 0.1),
            momentum=0.9,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(f"{args.network}: d = {model.count_params() - frozen(model):,}, N = {len(train[0]):,}")
    epochs = sorted({max(1, round(fraction * args.epochs)) for fraction in FRACTIONS})
    args.out.mkdir(parents=True, exist_ok=True)
    measure = Measure(args, train, epochs)
    model.fit(
        *train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=test,
        callbacks=[measure],
        verbose=0,
    )

    model.save(args.out / f"{args.network}.keras")
    picture = args.out / f"{args.network}.png"
    draw(args.network, measure.measured).savefig(picture, dpi=150)
    print()
    print_table(args, measure.measured)
    print(f"\npublished: {PUBLISHED.get(args.network, 'no row at hand for this network')}")
    print(f"picture    {picture}")


def frozen(model):
    return sum(int(np.prod(w.shape)) for w in model.non_trainable_weights)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Measure D over a training set while a small network is trained by SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--network", choices=list(NETWORKS), default="small-lenet")
    parser.add_argument("--epochs", type=digits.positive_int, default=50)
    parser.add_argument("--batch-size", type=digits.positive_int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="at first")
    parser.add_argument(
        "--training-examples", type=digits.positive_int, help="train on the first ones alone"
    )
    parser.add_argument(
        "--examples", type=digits.positive_int, help="measure D on so many, drawn at random"
    )
    parser.add_argument("--dropout", type=float, help="of small-lenet, instead of its 0.1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--out", type=Path, default=Path("chaudhari_soatto_out"))
    args = parser.parse_args()
    if args.dropout is not None and args.network != "small-lenet":
        parser.error(f"{args.network} has no dropout, and takes no --dropout.")
    return args


def print_table(args, measured):
    header = (
        "| epoch | rank(D) | % of d | eigenvalues, mean ± std | clipped, mean ± std "
        "| error, training | test | seconds |"
    )
    print(header)
    print("|---:" * (header.count("|") - 1) + "|")
    for epoch, training, test, s in measured:
        print(
            f"| {epoch} ({epoch / args.epochs:.0%}) | {s.rank} | {s.rank_percent:.2f} "
            f"| {s.eigenvalue_mean:.3g} ± {s.eigenvalue_std:.3g} "
            f"| {s.clipped_mean:.3g} ± {s.clipped_std:.3g} "
            f"| {training:.2%} | {test:.2%} | {s.seconds:.0f} |"
        )


def draw(network, measured):
    """The spectra, with the cut of the rank at the end of training."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.add_subplot()
    for shade, (epoch, _, _, s) in zip((0.45, 0.7, 1.0), measured, strict=False):
        known = s.eigenvalues[: 2 * s.rank]
        ax.loglog(
            np.arange(1, len(known) + 1),
            known,
            color=(0, 0.3, 0.55, shade),
            label=f"epoch {epoch}: rank {s.rank} = {s.rank_percent:.2f} % of d",
        )
    ax.axhline(s.rank_cut, color="tab:gray", ls="--", lw=1, label="cut of the rank, at the end")
    ax.set_xlabel("index of the eigenvalue")
    ax.set_ylabel("eigenvalue of D")
    ax.set_title(f"{network}: D over N = {s.n_examples:,} examples, d = {s.n_weights:,}")
    ax.legend()
    return figure


if __name__ == "__main__":
    main()
