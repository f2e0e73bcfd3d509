"""What the benchmarks lower for an accelerator is what TensorFlow computes, by XLA alone."""

import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A folder with the lowered steps of three models."""
    folder = tmp_path_factory.mktemp("lowered")
    models = ["--models", "mlp", "cnn", "transformer", "--batch-sizes", "8"]
    script = str(BENCHMARKS / "xla_device.py")
    subprocess.run([sys.executable, script, "--out", str(folder), *models], check=True)
    return folder


def test_the_lowered_steps_run_outside_tensorflow_and_agree_with_it(lowered):
    script = str(BENCHMARKS / "xla_device_run.py")
    command = [sys.executable, script, str(lowered), "--repeats", "1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in rows] == [["cnn", "8"], ["mlp", "8"], ["transformer", "8"]]
    for row in rows:
        assert float(row[header.index("difference")]) < 1e-5


@pytest.mark.parametrize(
    "operation", ["custom_call @eigh", "dynamic_reshape", "set_dimension_size", "infeed"]
)
def test_what_not_every_device_compiles_is_refused(operation, monkeypatch):
    """`xla_device.py` asks this of every step that it lowers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from xla_device import check_portable

    check_portable("%0 = stablehlo.dot_general %a, %b")
    with pytest.raises(ValueError, match=operation.split()[0]):
        check_portable(f"%0 = stablehlo.{operation}(%a)")
