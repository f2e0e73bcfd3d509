"""SGD, momentum, Adam and both kinds of RGD on one small network: which trains, and how fast?

    python examples/compare_optimizers.py --dataset mnist

trains the same convolutional network from the same weights by each optimizer with each learning
rate of one grid, and again from other weights with the rate that gave the best test accuracy. It
prints a table, one row an optimizer, and writes a picture and every number below the current
folder. The data set, mnist, cifar10 or another of TensorFlow Datasets, must be on disk, or
`--download` fetches it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import digits
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import keras_rgd

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

OPTIMIZERS = {
    "SGD": keras.optimizers.SGD,
    "SGD, momentum 0.9": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "RGD, examples": keras_rgd.RGD,
    "RGD, window 32": lambda rate: keras_rgd.RGD(rate, window=32),
    "Adam": keras.optimizers.Adam,
}

# A rate trains where it ends so near to the optimizer's best test accuracy.
NEAR = 0.05


def build(shape, classes):
    return keras_rgd.RGDSequential(
        [
            keras.Input(shape),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(classes),
        ]
    )


class Stopwatch(keras.callbacks.Callback):
    """Seconds of each epoch, without what is spent on the test examples."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.model.seconds.append(time.perf_counter() - self.start)


def train(args, data, name, rate, seed):
    """What one run showed: losses and accuracies after every `--every` steps."""
    (x, y), test = data
    keras.utils.set_random_seed(seed)
    model = build(x.shape[1:], int(y.max()) + 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[name](rate), loss, metrics=["accuracy"])
    model.seconds = []
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed)
    history = model.fit(
        batches.repeat().batch(args.batch_size).prefetch(2),
        steps_per_epoch=args.every,
        epochs=args.steps // args.every,
        validation_data=tf.data.Dataset.from_tensor_slices(test).batch(1000),
        callbacks=[Stopwatch()],
        shuffle=False,  # the data set shuffles by itself
        verbose=0,
    ).history
    # The first epoch traces the step.
    ms = 1e3 * float(np.median(model.seconds[1:] or model.seconds)) / args.every
    return {"optimizer": name, "rate": rate, "seed": seed, "ms": ms} | history


def grid(args, data):
    """All runs: each optimizer with each rate, then its best rate from other weights.

    The optimizers take turns, so that a machine that slows down slows all of them.
    """
    runs = []
    for rate in args.rates:
        for name in OPTIMIZERS:
            runs.append(train(args, data, name, rate, args.seed))
        print(f"rate {rate:g}: {len(OPTIMIZERS)} runs", flush=True)
    best = {name: best_rate(runs, name) for name in OPTIMIZERS}
    for seed in range(args.seed + 1, args.seed + args.seeds):
        for name in OPTIMIZERS:
            runs.append(train(args, data, name, best[name], seed))
        print(f"seed {seed}: {len(OPTIMIZERS)} runs", flush=True)
    return runs


def best_rate(runs, name):
    ours = [run for run in runs if run["optimizer"] == name]
    return max(ours, key=lambda run: (final(run, "val_accuracy"), -run["rate"]))["rate"]


def final(run, key):
    value = run[key][-1]
    return value if math.isfinite(value) else (0.0 if "accuracy" in key else math.inf)


def at_best(runs, name):
    rate = best_rate(runs, name)
    return [run for run in runs if run["optimizer"] == name and run["rate"] == rate]


def rates_that_train(runs, name, seed):
    ours = [run for run in runs if run["optimizer"] == name and run["seed"] == seed]
    top = max(final(run, "val_accuracy") for run in ours)
    return sorted(run["rate"] for run in ours if final(run, "val_accuracy") >= top - NEAR)


def table(runs, seed):
    print(
        "| optimizer | best rate | test accuracy | test loss | training loss | ms a step |", end=""
    )
    print(" rates that train |")
    print("|---" * 7 + "|")
    for name in OPTIMIZERS:
        best = at_best(runs, name)
        cells = [f"{best[0]['rate']:g}"]
        for key, form in (("val_accuracy", "{:.2%}"), ("val_loss", "{:.3f}"), ("loss", "{:.3f}")):
            values = [final(run, key) for run in best]
            cells.append(f"{form.format(np.mean(values))} +- {form.format(np.std(values))}")
        cells.append(f"{np.median([run['ms'] for run in runs if run['optimizer'] == name]):.1f}")
        rates = rates_that_train(runs, name, seed)
        cells.append(f"{rates[0]:g} to {rates[-1]:g}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw(runs, args):
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    by_rate, by_step, by_second = figure.subplots(1, 3)
    for i, name in enumerate(OPTIMIZERS):
        look = {"color": f"C{i}", "label": name, "lw": 1.3}
        first = [r for r in runs if r["optimizer"] == name and r["seed"] == args.seed]
        first.sort(key=lambda run: run["rate"])
        accuracies = [100 * final(run, "val_accuracy") for run in first]
        by_rate.semilogx([run["rate"] for run in first], accuracies, "o-", ms=4, **look)
        best = at_best(runs, name)
        steps = args.every * np.arange(1, len(best[0]["loss"]) + 1)
        by_step.semilogy(steps, np.mean([run["loss"] for run in best], 0), **look)
        seconds = steps * np.median([run["ms"] for run in best]) / 1e3
        curve = 100 * np.mean([run["val_accuracy"] for run in best], 0)
        by_second.plot(seconds, curve, **look)
    by_rate.set(xlabel="learning rate", ylabel="test accuracy at the end, %")
    by_step.set(xlabel="step", ylabel="training loss, best rate")
    by_second.set(xlabel="seconds of training", ylabel="test accuracy, %, best rate")
    by_step.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_step.yaxis.set_major_formatter("{x:g}")
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_second.legend(loc="lower right", fontsize="small")
    figure.suptitle(f"{args.dataset}, mini-batches of {args.batch_size}", fontsize="medium")
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", help="digits, or a name of TFDS")
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--steps", type=digits.positive_int, default=1000)
    parser.add_argument("--every", type=digits.positive_int, default=100, help="steps an epoch")
    parser.add_argument("--batch-size", type=digits.positive_int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid")
    parser.add_argument("--seeds", type=digits.positive_int, default=3, help="at the best rate")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--out", type=Path, default=Path("compare_optimizers_out"))
    args = parser.parse_args()
    if args.steps < args.every:
        parser.error(f"--steps {args.steps} is less than --every {args.every}.")
    args.out.mkdir(parents=True, exist_ok=True)
    runs = grid(args, digits.load(args.dataset, download=args.download))
    table(runs, args.seed)
    (args.out / f"{args.dataset}.json").write_text(json.dumps(runs, indent=1))
    picture = args.out / f"{args.dataset}.png"
    draw(runs, args).savefig(picture, dpi=150)
    print(f"\npicture  {picture}")


if __name__ == "__main__":
    main()
