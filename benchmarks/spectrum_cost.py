"""What the spectrum of D over a data set costs: seconds, memory, and epochs of training instead.

Each measurement in a process of its own. The data sets must be on disk.

    python -m pip install -e ".[bench,examples]"
    python benchmarks/spectrum_cost.py
"""

import argparse
import json
import pathlib
import resource
import sys
import time

import keras
from step_cost import in_a_process

import keras_rgd
from keras_rgd.datasets import load_dataset

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import architectures  # noqa: E402
import chaudhari_soatto  # noqa: E402


def mlp():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


# network, data set, arguments of `spectrum`
CASES = {
    "small-fc": (chaudhari_soatto.small_fc, "mnist 7x7", {}),
    "small-lenet": (chaudhari_soatto.small_lenet, "mnist", {}),
    "small-lenet, top 32": (
        chaudhari_soatto.small_lenet,
        "mnist",
        {"method": "iterative", "batch_size": 1000},
    ),
    "MLP 784-256-256-10, top 5": (
        mlp,
        "mnist",
        {"method": "iterative", "k": 5, "batch_size": 1000},
    ),
    "resnet-110, 2,000 images": (
        architectures.resnet110,
        "cifar10",
        {"examples": 2000, "k": 20, "method": "gram", "batch_size": 64},
    ),
}


def measure(name):
    """The record's figures, the process's peak memory, and seconds of an epoch of SGD."""
    build, dataset, options = CASES[name]
    keras.utils.set_random_seed(0)
    x, y = load_dataset(dataset.split()[0], "train")
    if "7x7" in dataset:
        x = chaudhari_soatto.shrunk(x)
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    # The first epoch compiles, and sets the moving statistics that evaluation mode uses.
    examples = options.get("examples", len(x))
    train = dict(batch_size=128, verbose=0, shuffle=False)
    model.fit(x[:examples], y[:examples], epochs=1, **train)
    start = time.perf_counter()
    model.fit(x[:examples], y[:examples], epochs=1, **train)
    epoch = time.perf_counter() - start
    s = keras_rgd.spectrum(model, (x, y), verbose=False, **options)
    return {
        "n": s.n_examples,
        "d": s.n_weights,
        "method": s.method,
        "known": len(s.eigenvalues),
        "rank": s.rank,
        "seconds": s.seconds,
        "epoch": epoch,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main():
    """Print a table, one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*json.loads(args.only))))
        return
    print("| | N | d | method | seconds | in epochs of SGD | peak memory of the process |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for name in args.cases:
        row = in_a_process(name, script=__file__)
        print(
            f"| {name} | {row['n']:,} | {row['d']:,} | {row['method']} | {row['seconds']:.0f} "
            f"| {row['seconds'] / row['epoch']:.1f} | {row['memory']:.1f} GiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
