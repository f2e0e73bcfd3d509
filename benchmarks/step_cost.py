"""What an RGD step costs against the same model's SGD step, measured in the same run.

Milliseconds of a training step, from whole epochs of `fit`, medians of interleaved repeats, for
plain Keras SGD and for RGD by each way, uncompiled ("graph") and compiled with XLA; beside them,
where the extra `bench` is installed, the other libraries that form per-example gradients, each
doing the work of one RGD step in a process of its own right after. And the peak memory of a
process that does nothing but this one fit, above what it held before it built the model.

    python -m pip install -e ".[bench]"
    python benchmarks/step_cost.py --csv step_cost.csv --plot step_cost.png

Besides the models of `models.py`, "mlp-WIDTHxDEPTH" is one of any size, and "ConvNeXtTiny" and the
other names of `keras.applications` are those on 32x32 images. With KERAS_BACKEND=jax the
ways are "sgd", "window-W" and "linearized", compiled with XLA; with torch "sgd" and "window-W",
and its "graph" is eager.
"""

import argparse
import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time

import peers

EXAMPLE_WAYS = ("layerwise", "double_backward", "vectorized_map", "linearized")
WAYS = ("sgd", "window-16", *EXAMPLE_WAYS[:3])  # "window-W" for any W
MODES = ("graph", "xla")
PEERS = ("mlp", "cnn")  # the models that are written for them


def made(name, way, mode):
    """The compiled model."""
    import keras
    import models

    import keras_rgd

    model = models.benchmark(name).model()
    optimizer = keras.optimizers.SGD(0.01)
    if way in EXAMPLE_WAYS:
        optimizer = keras_rgd.RGD(0.01, per_example=way)
    elif way != "sgd":
        size, _, dtype = way.removeprefix("window-").partition("-")
        optimizer = keras_rgd.RGD(0.01, window=int(size), window_dtype=dtype or None)
    model.compile(optimizer, models.loss(), jit_compile=mode == "xla")
    return model


def fit_seconds(model, x, y, n, steps):
    """Seconds of one epoch of `fit` of so many steps.

    From the epoch's begin to its end: when `fit` returns, tf.data's thread may keep it waiting for
    up to as long again.
    """
    import keras

    marks = []

    def mark(*_):
        marks.append(time.perf_counter())

    clock = keras.callbacks.LambdaCallback(on_epoch_begin=mark, on_epoch_end=mark)
    x, y = x[: n * steps], y[: n * steps]
    model.fit(x, y, batch_size=n, shuffle=False, verbose=0, callbacks=[clock])
    return marks[1] - marks[0]


def measure_time(name, n, mode, ways, steps, repeats):
    """Milliseconds of a step by each way, and seconds until the first is done."""
    import models

    steps = steps or models.benchmark(name).steps
    x, y = models.benchmark(name).data(n * steps)
    runs, first = {}, {}
    for way in ways:
        try:
            model = made(name, way, mode)
            first[way] = fit_seconds(model, x, y, n, 2)
        except ValueError as error:
            print(f"{name} {n} {mode} {way}: refused, {str(error)[:100]}", file=sys.stderr)
            continue
        runs[way] = lambda model=model: fit_seconds(model, x, y, n, steps) / steps
    times = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for key, run in runs.items():
            times[key].append(run())
    return {
        key: {"ms": 1e3 * statistics.median(values), "first": first[key]}
        for key, values in times.items()
    }


def measure_peer(name, n, peer, repeats):
    """The same of one peer; in a process without TensorFlow, which torch does not bear."""
    import peers

    step = peers.INSTALLED[peer](name, *peers.data(name, n))
    times = []
    for _ in range(2 * repeats + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {peer: {"ms": 1e3 * statistics.median(times[1:]), "first": times[0]}}


def measure_memory(name, n, mode, way):
    """MiB that one fit takes at its peak, above what this process held before it."""
    import models
    import psutil

    x, y = models.benchmark(name).data(n * 4)
    before = psutil.Process().memory_info().rss
    fit_seconds(made(name, way, mode), x, y, n, 4)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before) / 2**20


def in_a_process(*arguments, script=__file__):
    """What a script prints last, told `--only` and arguments of its own, as JSON."""
    command = [sys.executable, script, "--only", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_quiet(), check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _quiet():
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


def plot(rows, path):
    """Ratio to SGD against N: a panel for each model, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names) + 1, 3.4), squeeze=False, layout="constrained"
    )
    for name, axis in zip(names, axes[0], strict=True):
        for way in [w for w in dict.fromkeys(row["way"] for row in rows) if w != "sgd"]:
            best = {}
            for row in rows:
                if row["model"] == name and row["way"] == way:
                    best[row["n"]] = min(row["best_ratio"], best.get(row["n"], float("inf")))
            if best:
                axis.plot(*zip(*sorted(best.items()), strict=True), marker="o", label=way)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=name, xlabel="examples N", xscale="log", yscale="log")
        ns = sorted({row["n"] for row in rows})
        axis.set_xticks(ns, labels=[str(n) for n in ns])
        low, high = axis.get_ylim()
        high = max(high, 2.2)
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= t <= high]
        axis.set_ylim(low, high)
        axis.set_yticks(ticks, labels=[str(t) for t in ticks])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("time of a step / SGD's")
    handles = {}
    for axis in axes[0]:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def a_way(text):
    """An argument of the command line: one of `WAYS`, "window-32" or "window-32-bfloat16"."""
    if text not in (*WAYS, "linearized") and not re.fullmatch(
        r"window-\d+(-bfloat16|-float32|-float64)?", text
    ):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(WAYS)}, or window-W or window-W-DTYPE, received {text}"
        )
    return text


def main():
    """Print a table, one row for each model, N and way; write the CSV file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mlp", "cnn", "resnet20-gn", "resnet20-bn"] + ["transformer", "lstm"],
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--ways", nargs="+", type=a_way, default=list(WAYS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="an epoch; the models have their own")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--csv", help="write the numbers here")
    parser.add_argument("--plot", help="draw the ratios here")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        kind, *rest = json.loads(args.only)
        measure = {"time": measure_time, "memory": measure_memory, "peer": measure_peer}[kind]
        print(json.dumps(measure(*rest)))
        return
    rows = []
    print("| model | N | way | graph | XLA | best / SGD's best | memory graph | XLA | first step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for n in args.batch_sizes:
            times = {
                mode: in_a_process("time", name, n, mode, args.ways, args.steps, args.repeats)
                for mode in args.modes
            }
            for peer in peers.INSTALLED if name in PEERS else ():
                # They have no modes; JAX's is compiled, torch's are not.
                times["graph" if "graph" in times else "xla"] |= in_a_process(
                    "peer", name, n, peer, args.repeats
                )
            best_sgd = min(t["sgd"]["ms"] for t in times.values() if "sgd" in t)
            for way in dict.fromkeys(key for t in times.values() for key in t):
                best = min(t[way]["ms"] for t in times.values() if way in t)
                cells, memory, firsts = {}, {}, {}
                for mode in args.modes:
                    if way not in times[mode]:
                        continue
                    ms = times[mode][way]["ms"]
                    cells[mode] = f"{ms:.2f} ms, {ms / times[mode]['sgd']['ms']:.2f} x"
                    firsts[mode] = f"{times[mode][way]['first']:.1f} s"
                    mib = None
                    if way in args.ways and not args.no_memory:
                        mib = in_a_process("memory", name, n, mode, way)
                        memory[mode] = f"{mib:.0f} MiB"
                    rows.append(
                        {
                            "model": name,
                            "n": n,
                            "way": way,
                            "mode": mode,
                            "ms": ms,
                            "ratio": ms / times[mode]["sgd"]["ms"],
                            "best_ratio": best / best_sgd,
                            "first_s": times[mode][way]["first"],
                            "memory_mib": mib,
                        }
                    )
                columns = [cells.get("graph", ""), cells.get("xla", ""), f"{best / best_sgd:.2f}"]
                columns += [memory.get("graph", ""), memory.get("xla", "")]
                columns.append(", ".join(firsts.values()))
                print(f"| {name} | {n} | {way} | {' | '.join(columns)} |", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
