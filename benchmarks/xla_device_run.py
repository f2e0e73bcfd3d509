"""Compile, check and time the steps of `xla_device.py` on the device that JAX sees.

Needs JAX and numpy alone, so it runs where TensorFlow does not.

    python benchmarks/xla_device_run.py FOLDER
"""

import argparse
import pathlib
import statistics
import time

import jax
import numpy as np
from entries import drawn
from jax.extend import backend
from jaxlib import xla_client

# Classes and step counts are 64 bits wide; what is float32 stays so.
jax.config.update("jax_enable_x64", True)


def load(stem):
    """(module, inputs, entries of the outputs) of one step."""
    arrays = np.load(stem.with_suffix(".npz"))
    inputs = [np.load(stem.parent / "inputs" / f"{name}.npy") for name in arrays["inputs"]]
    outputs = [arrays[f"out{i}"] for i in range(len(arrays) - 1)]
    return stem.with_suffix(".stablehlo").read_bytes(), inputs, outputs


def compiled(module, inputs):
    """The module on JAX's first device, and a function that runs it: (results, seconds)."""
    device = jax.devices()[0]
    executable = backend.get_backend().compile_and_load(
        module, xla_client.DeviceList((device,)), xla_client.CompileOptions()
    )

    def run():
        # Put there anew each time: a step takes over the buffers of what it updates.
        arguments = [jax.device_put(array, device) for array in inputs]
        jax.block_until_ready(arguments)
        start = time.perf_counter()
        results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
        results = [result[0] for result in results]
        jax.block_until_ready(results)
        return results, time.perf_counter() - start

    return executable, run


def relative_error(received, expected):
    """Of the entries of all outputs together, in the Euclidean norm."""
    pairs = [(drawn(np.asarray(a, "float64")), b) for a, b in zip(received, expected, strict=False)]
    error = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return float(np.sqrt(error / sum(np.sum(b.astype("float64") ** 2) for _, b in pairs)))


def measure(stem, repeats):
    """Milliseconds, relative error to TensorFlow's outputs, and XLA's own counts, of one step."""
    module, inputs, outputs = load(stem)
    start = time.perf_counter()
    executable, run = compiled(module, inputs)
    compile_seconds = time.perf_counter() - start
    error = relative_error(run()[0], outputs)
    times = [run()[1] for _ in range(repeats)]
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "ms": 1e3 * statistics.median(times),
        "error": error,
        "compile_s": compile_seconds,
        "gflop": cost.get("flops", float("nan")) / 1e9,
        "gbyte": cost.get("bytes accessed", float("nan")) / 1e9,
    }


def main():
    """Print a table, one row for each model and N."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    stems = {path.with_suffix("") for path in args.folder.glob("*.stablehlo")}
    groups = sorted({stem.name.rsplit("_", 1)[0] for stem in stems}, key=_model_then_n)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, medians of {args.repeats}")
    print("| model | N | SGD | RGD | ratio | difference | Gflop | GB accessed | compile |")
    print("|---|---|---|---|---|---|---|---|---|")
    for group in groups:
        name, n = group.rsplit("_", 1)
        sgd, rgd = (measure(args.folder / f"{group}_{way}", args.repeats) for way in ("sgd", "rgd"))
        print(
            f"| {name} | {n} | {sgd['ms']:.3f} ms | {rgd['ms']:.3f} ms "
            f"| {rgd['ms'] / sgd['ms']:.2f} | {rgd['error']:.1e} "
            f"| {sgd['gflop']:.2f}, {rgd['gflop']:.2f} | {sgd['gbyte']:.3f}, {rgd['gbyte']:.3f} "
            f"| {sgd['compile_s']:.1f} s, {rgd['compile_s']:.1f} s |",
            flush=True,
        )


def _model_then_n(group):
    name, n = group.rsplit("_", 1)
    return name, int(n)


if __name__ == "__main__":
    main()
