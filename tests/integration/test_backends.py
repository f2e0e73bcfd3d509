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

TESTS = pathlib.Path(__file__).parents[1] / "any_backend"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_what_runs_anywhere_runs_on(backend):
    # JAX comes with the tests; torch is large, and CI has it.
    optional = backend == "torch" and not os.environ.get("CI")
    if optional and importlib.util.find_spec(backend) is None:
        pytest.skip(f'{backend} is not installed: python -m pip install -e ".[backends]"')
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-q", str(TESTS)]
    done = subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40
