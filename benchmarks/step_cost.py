"""What an RGD step costs against the same model's SGD step, measured in the same run.

Milliseconds of one training step on one batch, medians of interleaved repeats, for plain Keras SGD
and for RGD by each way, uncompiled ("graph") and compiled with XLA; and seconds of the first step,
which traces and compiles.

    python benchmarks/step_cost.py
"""

import argparse
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

import keras_rgd

layers = keras.layers


def mlp():
    """784-256-256-10."""
    return (784,), [layers.Dense(256, "relu"), layers.Dense(256, "relu"), layers.Dense(10)]


def cnn():
    """conv32-pool-conv64-pool-dense128-10 on 28x28."""
    return (28, 28, 1), [
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, "relu"),
        layers.Dense(10),
    ]


MODELS = {"mlp": mlp, "cnn": cnn}
WAYS = ("sgd", "double_backward", "vectorized_map")


def step_function(name, way, n, jit_compile):
    """A function without arguments that takes one training step; seconds of the first step."""
    keras.utils.set_random_seed(0)
    shape, stack = MODELS[name]()
    model = keras_rgd.RGDSequential([keras.Input(shape), *stack])
    if way == "sgd":
        optimizer = keras.optimizers.SGD(0.01)
    else:
        optimizer = keras_rgd.RGD(0.01, per_example=way)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit_compile)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, *shape)).astype("float32"), rng.integers(0, 10, n)
    start = time.perf_counter()
    model.train_on_batch(x, y)
    first = time.perf_counter() - start
    batch = (tf.constant(x), tf.constant(y))
    return lambda: model.train_function(iter([batch])), first


def main():
    """Print a table, one row for each model, N and compilation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print("| model | N | compiled | SGD | double_backward | vectorized_map |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        for n in args.batch_sizes:
            for jit_compile in (False, True):
                made = [step_function(name, way, n, jit_compile) for way in WAYS]
                steps, (sgd_first, *firsts) = zip(*made, strict=True)
                times = [[] for _ in WAYS]
                for _ in range(args.repeats):
                    for step, seconds in zip(steps, times, strict=True):
                        start = time.perf_counter()
                        keras.tree.map_structure(np.asarray, step())
                        seconds.append(time.perf_counter() - start)
                sgd, *others = [1e3 * statistics.median(s) for s in times]
                cells = [f"{sgd:.1f} ms, first {sgd_first:.1f} s"] + [
                    f"{ms:.1f} ms, {ms / sgd:.1f} x, first {first:.1f} s"
                    for ms, first in zip(others, firsts, strict=True)
                ]
                compiled = "XLA" if jit_compile else "graph"
                print(f"| {name} | {n} | {compiled} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
