"""Gradient descent, relativistic gradient descent and SGD, side by side from the same start.

    python examples/gd_sgd_rgd.py --dataset digits

Eq. (10) of the paper is a deterministic system, dx/dt = -(I - eps D) grad f, with the D of all
examples. This follows it by full-batch steps (`RGD(microbatch_size=...)`), beside full-batch
gradient descent and mini-batch SGD with the same learning rate and the same number of steps, for
several seeds. It prints what was found at the end, and draws for each moment the loss, the test
accuracy, how far the three are from one another, and how much of what separates them lies in the
top eigenspace of D. Everything is written below the current folder.
"""

import argparse
import time
from pathlib import Path

import digits
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import keras_rgd

METHODS = ("GD", "RGD", "SGD")
PAIRS = (("RGD", "GD"), ("SGD", "GD"), ("SGD", "RGD"))
TOP = 10  # eigenvectors of D
COLORS = {"GD": "black", "RGD": "tab:red", "SGD": "tab:blue"}


def main():
    args = parse_arguments()
    (x, y), test = digits.load(args.dataset, download=args.download)
    args.batch_size = min(args.batch_size, len(x))
    runs = []
    for seed in range(args.seeds):
        started = time.perf_counter()
        runs.append(follow(args, seed, (x, y), test))
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    # A list of dictionaries of series into a dictionary of arrays (seeds, moments).
    series = {name: np.array([run[name] for run in runs]) for name in runs[0]}

    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / f"{args.dataset}.npz", **series)
    picture = args.out / f"{args.dataset}.png"
    draw(args, series).savefig(picture, dpi=150)
    print_table(args, series, len(x))
    print(f"\npicture  {picture}")


def follow(args, seed, train, test):
    """One run of the three from one start: name -> a value for each moment that is looked at."""
    keras.utils.set_random_seed(seed)
    x, y = train
    classes = int(y.max()) + 1
    models = {name: build_model(x.shape[1:], classes) for name in METHODS}
    optimizers = {
        "GD": keras.optimizers.SGD(args.learning_rate),
        "RGD": keras_rgd.RGD(
            args.learning_rate, args.epsilon, microbatch_size=args.microbatch_size
        ),
        "SGD": keras.optimizers.SGD(args.learning_rate),
    }
    for name, model in models.items():
        model.set_weights(models["GD"].get_weights())
        model.compile(
            optimizers[name],
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    batches = iter(
        tf.data.Dataset.from_tensor_slices((x, y))
        .shuffle(len(x), seed=seed)
        .repeat()
        .batch(args.batch_size)
    )
    d = models["GD"].count_params()
    start = flat(models["GD"])
    series = {}

    def note(name, value):
        series.setdefault(name, []).append(value)

    for step in range(0, args.steps + 1, args.every):
        note("step", step)
        for name, model in models.items():
            if step:
                continue_training(name, model, args.every, train, batches)
            note(f"{name} loss", model.evaluate(x, y, batch_size=1000, verbose=0)[0])
            note(f"{name} accuracy", model.evaluate(*test, batch_size=1000, verbose=0)[1])
            note(f"{name} moved", np.linalg.norm(flat(model) - start))
        rgd = optimizers["RGD"]
        note("epsilon", float(rgd.chosen_epsilon) if step else np.nan)
        note("weak_field_error", float(rgd.step_weak_field_error) if step else np.nan)
        top = top_directions(models["GD"], train, args.examples, seed)
        for a, b in PAIRS:
            apart = flat(models[a]) - flat(models[b])
            note(f"{a}-{b} distance", np.linalg.norm(apart))
            note(f"{a}-{b} alignment", fraction_in(top, apart))
        note("gradient alignment", fraction_in(top, gradient(models["GD"], train)))
        note("chance", TOP / d)
    return series


def build_model(shape, classes):
    return keras_rgd.RGDSequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(classes),
        ]
    )


def continue_training(name, model, steps, train, batches):
    # As fit(batch_size=N) for the full-batch methods, whose set-up would cost more than a step.
    for _ in range(steps):
        model.train_on_batch(*(next(batches) if name == "SGD" else train))


def top_directions(model, train, examples, seed):
    """The leading eigenvectors of D at the model's weights, (TOP, d), from a sample of examples."""
    x, y = train
    chosen = np.random.default_rng(seed).permutation(len(x))[:examples]
    D = keras_rgd.diffusion_matrix(model, x[chosen], y[chosen])
    return np.concatenate([np.reshape(t, (TOP, -1)) for t in D.eigenvectors(TOP)], axis=1)


def gradient(model, train):
    """Of the training loss, (d,)."""
    x, y = train
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    weights = [w.value for w in model.trainable_variables]
    return np.concatenate([np.ravel(t) for t in tape.gradient(loss, weights)])


def fraction_in(top, vector):
    """The part of |vector|^2 in the span of the rows of `top`."""
    square = vector @ vector
    return float(np.sum((top @ vector) ** 2) / square) if square > 0 else np.nan


def flat(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def print_table(args, series, n):
    def last(name):
        values = series[name][:, -1]
        return f"{values.mean():.4g} ± {values.std():.2g}"

    print(
        f"\n{args.dataset}, N = {n:,}, {args.steps} steps, learning rate {args.learning_rate:g}, "
        f"eps = {args.epsilon:g} / lambda_max, SGD's batches {args.batch_size}, "
        f"{args.seeds} seeds (mean ± std)\n"
    )
    print("| | training loss | test accuracy | distance from the start |")
    print("|---|---:|---:|---:|")
    for name in METHODS:
        print(
            f"| {name} | {last(f'{name} loss')} | {last(f'{name} accuracy')} "
            f"| {last(f'{name} moved')} |"
        )
    print(f"\n| | distance | of its square in D's top {TOP} |")
    print("|---|---:|---:|")
    for a, b in PAIRS:
        print(f"| {a} - {b} | {last(f'{a}-{b} distance')} | {last(f'{a}-{b} alignment')} |")
    print(f"| gradient of GD | | {last('gradient alignment')} |")
    print(f"| a random direction | | {series['chance'][0, 0]:.2g} |")


def draw(args, series):
    """Four panels against the step: means over the seeds, with their range."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    steps = series["step"][0]

    def curve(ax, name, label, color, style="-"):
        # At the start they are together, which a logarithm cannot show.
        values = np.where(series[name] > 0, series[name], np.nan)
        ax.plot(steps, values.mean(0), style, color=color, label=label)
        ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)

    for name in METHODS[::-1]:
        # Gradient descent dashed and last: it may lie on the others.
        style = "--" if name == "GD" else "-"
        curve(axes[0, 0], f"{name} loss", name, COLORS[name], style)
        curve(axes[0, 1], f"{name} accuracy", name, COLORS[name], style)
    for (a, b), color in zip(PAIRS, ("tab:red", "tab:blue", "tab:purple"), strict=True):
        curve(axes[1, 0], f"{a}-{b} distance", f"{a} to {b}", color)
        curve(axes[1, 1], f"{a}-{b} alignment", f"{a} - {b}", color)
    curve(axes[1, 0], "GD moved", "GD to the start", "tab:gray", "--")
    curve(axes[1, 1], "gradient alignment", "gradient of GD", "tab:gray", "--")
    axes[1, 1].axhline(series["chance"][0, 0], color="k", lw=1, ls=":", label="by chance")
    axes[0, 0].set_ylabel("training loss")
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    axes[0, 1].set_ylabel("test accuracy")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylabel("distance in weight space")
    axes[1, 1].set_ylabel(f"part of the square in D's top {TOP}")
    axes[1, 1].set_ylim(0, 1.02)
    for ax in axes.flat:
        ax.legend(fontsize="small")
    for ax in axes[1]:
        ax.set_xlabel("step")
    figure.suptitle(
        f"{args.dataset}: learning rate {args.learning_rate:g}, eps = {args.epsilon:g} / "
        f"lambda_max, {args.seeds} seeds"
    )
    return figure


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Full-batch GD and RGD, and SGD, from the same start.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", default="digits", help="digits, or a name of TFDS")
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--steps", type=digits.positive_int, default=200)
    parser.add_argument("--every", type=digits.positive_int, default=10, help="steps between looks")
    parser.add_argument("--seeds", type=digits.positive_int, default=3, help="how many")
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--epsilon", type=float, default=0.9, help="eps times lambda_max, < 1")
    parser.add_argument("--batch-size", type=digits.positive_int, default=64, help="of SGD")
    parser.add_argument("--microbatch-size", type=digits.positive_int, default=2000)
    parser.add_argument(
        "--examples", type=digits.positive_int, default=1000, help="that D's directions are from"
    )
    parser.add_argument("--out", type=Path, default=Path("gd_sgd_rgd_out"))
    args = parser.parse_args()
    if args.examples <= TOP:
        parser.error(f"--examples must be over {TOP}, as D has fewer eigenvectors than examples.")
    return args


if __name__ == "__main__":
    main()
