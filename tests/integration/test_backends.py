"""What runs on every backend of Keras, run on those that are not TensorFlow.

Keras reads KERAS_BACKEND once, so each backend has a process of its own.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_what_runs_anywhere_runs_on(backend):
    # JAX comes with the tests; torch is large, and CI has it.
    optional = backend == "torch" and not os.environ.get("CI")
    if optional and importlib.util.find_spec(backend) is None:
        pytest.skip(f'{backend} is not installed: python -m pip install -e ".[backends]"')
    assert passed("any_backend", KERAS_BACKEND=backend) > 40


# Four devices, of which the CPU is each.
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


@pytest.mark.parametrize("options", [DEVICES, {"JAX_ENABLE_X64": "1"}], ids=["float32", "float64"])
def test_rgd_by_examples_runs_on_jax(options):
    # Half of the time is XLA's, for programs that run once; test_benchmarks.py has all it can do.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    assert passed("on_jax", KERAS_BACKEND="jax", **quick, **options) > 80


def passed(folder, **environment):
    """How many tests of a folder pass in a process of their own, where none fails."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q"]
    command += ["-o", "addopts=", "-o", f"pythonpath={FOLDER}", str(FOLDER / folder)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
