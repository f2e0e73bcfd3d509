"""What one measurement of `DiffusionMonitor` costs, against an epoch of training.

Seconds of an epoch of `fit` with plain SGD and of the monitor's `on_epoch_end` after it, each in
the same process, medians of the epochs after the first, which traces; and MiB of memory that both
take at their peak.

    python -m pip install -e ".[bench]"
    python benchmarks/monitor_cost.py
"""

import argparse
import json
import resource
import statistics
import time

import keras
import models
import psutil
from step_cost import in_a_process

import keras_rgd


class Timed(keras_rgd.DiffusionMonitor):
    """The monitor, with the seconds that each measurement took."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.seconds.append(time.perf_counter() - start)


class EpochSeconds(keras.callbacks.Callback):
    """Seconds of training, without what callbacks do after an epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


def measure(name, examples, epoch_examples, epochs, per_example):
    """Seconds of an epoch, of a measurement, of the first one, and the memory they took."""
    benchmark = models.benchmark(name)
    model = benchmark.model()
    model.compile(keras.optimizers.SGD(0.01), models.loss())
    x, y = benchmark.data(max(examples, epoch_examples))
    monitor = Timed((x, y), examples=examples, per_example=per_example, verbose=False)
    epoch = EpochSeconds()
    data = x[:epoch_examples], y[:epoch_examples]
    before = psutil.Process().memory_info().rss / 2**20
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0, callbacks=[epoch, monitor])
    return {
        "way": monitor.records[-1].per_example,
        "epoch": statistics.median(epoch.seconds[1:]),
        "measurement": statistics.median(monitor.seconds[1:]),
        "first": monitor.seconds[0],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
    }


def main():
    """Print a table, one row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.MODELS))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--epoch-examples", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--per-example", default="auto")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*json.loads(args.only))))
        return
    print(
        f"| model | way | epoch of {args.epoch_examples} examples | measurement of "
        f"{args.examples} | share | the first | memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        r = in_a_process(
            name,
            args.examples,
            args.epoch_examples,
            args.epochs,
            args.per_example,
            script=__file__,
        )
        print(
            f"| {name} | {r['way']} | {r['epoch']:.2f} s | {r['measurement']:.2f} s "
            f"| {r['measurement'] / r['epoch']:.0%} | {r['first']:.1f} s "
            f"| {r['peak_mib']:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
