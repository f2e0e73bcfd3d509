"""Train a small network with relativistic gradient descent and watch its diffusion matrix.

    python examples/quickstart.py

Everything is written below the current folder. The digits need no download; `--dataset mnist`, or
any other image classification data set of TensorFlow Datasets, is used when it is on disk.
"""

import argparse
import math
import time
from pathlib import Path

import digits
import keras
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

import keras_rgd

MONITORED_EXAMPLES = 512


def main():
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    (x_train, y_train), test = digits.load(args.dataset, download=args.download)
    print(f"{args.dataset}: {len(x_train)} training and {len(test[0])} test examples")

    model = build_model(x_train.shape[1:], classes=int(y_train.max()) + 1)
    steps = args.epochs * math.ceil(len(x_train) / args.batch_size)
    learning_rate = keras.optimizers.schedules.CosineDecay(args.learning_rate, steps)
    model.compile(
        optimizer=keras_rgd.RGD(learning_rate, epsilon=args.epsilon, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    # A folder for each run, so that TensorBoard draws every run as a line of its own.
    logs = args.out / "logs" / time.strftime("%Y%m%d-%H%M%S")
    monitor = keras_rgd.DiffusionMonitor(
        (x_train[:MONITORED_EXAMPLES], y_train[:MONITORED_EXAMPLES]),
        log_dir=logs,
        examples=MONITORED_EXAMPLES,
    )
    history = model.fit(
        x_train,
        y_train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=test,
        callbacks=[monitor, keras.callbacks.TensorBoard(logs), EpochTable(monitor)],
        verbose=0,
    ).history

    records = args.out / "records.json"
    monitor.save(records)
    picture = args.out / "quickstart.png"
    draw(history["loss"], monitor.records).savefig(picture, dpi=150)
    print(f"\nFinal test accuracy: {history['val_accuracy'][-1]:.2%}\n")
    print(f"picture      {picture}")
    print(f"records      {records}")
    print(f"TensorBoard  tensorboard --logdir {args.out / 'logs'}")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network with keras_rgd.RGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", default="digits", help="digits, or a name of TFDS")
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--epochs", type=digits.positive_int, default=15)
    parser.add_argument("--batch-size", type=digits.positive_int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="at the start")
    parser.add_argument("--epsilon", type=float, default=0.5, help="eps times lambda_max, < 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"))
    return parser.parse_args()


def build_model(shape, classes):
    """A network whose examples do not mix: it has no BatchNormalization."""
    return keras_rgd.RGDSequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(classes),
        ]
    )


class EpochTable(keras.callbacks.Callback):
    """Prints a line after each epoch; listed after the monitor, whose record it prints."""

    COLUMNS = (
        "epoch",
        "loss",
        "accuracy",
        "test accuracy",
        "rank",
        "lambda_max",
        "eps",
        "weak-field error",
        "seconds",
    )

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def on_train_begin(self, logs=None):
        self.print_row(self.COLUMNS)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        record = self.monitor.records[-1]
        self.print_row(
            (
                f"{record.epoch}",
                f"{logs['loss']:.4f}",
                f"{logs['accuracy']:.2%}",
                f"{logs['val_accuracy']:.2%}",
                "-" if record.rank is None else f"{record.rank}",
                f"{record.lambda_max:.4g}",
                f"{record.epsilon:.3g}",
                f"{record.weak_field_error_gradient:.2%}",
                f"{time.perf_counter() - self.started:.1f}",
            )
        )

    def print_row(self, cells):
        columns = zip(self.COLUMNS, cells, strict=True)
        print("  ".join(cell.rjust(max(8, len(name))) for name, cell in columns), flush=True)


def draw(losses, records):
    """The spectrum of D after each epoch, beside the loss, rank and lambda_max."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["spectrum", "loss"], ["spectrum", "rank"], ["spectrum", "lambda_max"]],
        width_ratios=[3, 2],
    )
    keras_rgd.plot_spectrum(records, ax=axes["spectrum"])
    epochs = [record.epoch for record in records]
    curves = {
        "loss": losses,
        "rank": [record.rank for record in records],
        "lambda_max": [record.lambda_max for record in records],
    }
    for name, values in curves.items():
        axes[name].plot(epochs, values, "o-", markersize=4)
        axes[name].set_ylabel(name)
    for name in ("loss", "lambda_max"):
        axes[name].set_yscale("log")
        axes[name].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[name].yaxis.set_major_formatter("{x:g}")
        axes[name].yaxis.set_minor_formatter(NullFormatter())
    axes["lambda_max"].set_xlabel("epoch")
    axes["lambda_max"].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


if __name__ == "__main__":
    main()
