"""What the benchmarks lower for an accelerator is what TensorFlow computes; their script runs."""

import os
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
    sized = "%c = stablehlo.constant dense<{}> : tensor<i32> loc(#l)\n    %0 = "
    sized += "stablehlo.set_dimension_size %x, %c, dim = 1 : (tensor<5x7xf32>, tensor<i32>) -> y"
    check_portable(sized.format(7))
    with pytest.raises(ValueError, match="set_dimension_size"):
        check_portable(sized.format(6))
    with pytest.raises(ValueError, match=operation.split()[0]):
        check_portable(f"%0 = stablehlo.{operation}(%a)")


def test_the_script_for_an_accelerator_prints_its_tables(tmp_path):
    """Whole, by `--tiny`, on the CPU."""
    script = str(BENCHMARKS / "accelerator.sh")
    subprocess.run([script, "prepare", tmp_path, "--tiny", "--no-wheels"], check=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [script, "run", tmp_path, "--tiny", "--minutes", "30"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    tables = [t for t in done.stdout.split("\n\n") if "|---" in t]
    rows = [[line.strip("| ").split(" | ") for line in t.splitlines()[2:]] for t in tables[1:]]
    steps, moved, (spectrum,) = rows
    assert [row[4] for row in steps] == ["sgd", "rgd", "window-4", *["sgd", "rgd"] * 2]
    assert all(float(row[5]) > 0 and float(row[8]) > 0 for row in steps), done.stdout
    exact, half = ([float(cell) for cell in row[3:]] for row in moved)
    # A CPU computes in float32 what it is asked for in TensorFloat-32.
    assert max(exact) < 1e-5 and 1e-5 < max(half) < 0.2
    assert float(spectrum[-2]) > 0


def test_the_script_begins_no_row_that_it_has_no_time_for(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "on_accelerator.py", "run", tmp_path, "--tiny"]
        + ["--until", "0"],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    missing = ("mlp, N = 16, tensorfloat32, sgd, and after it", "cnn, float32, and", "the spectrum")
    assert all(f"No time was left for {what}" in done.stdout for what in missing)


SMALLEST = {
    "epsilon_misses.py": "--models mlp --batch-sizes 16 --fractions 0.5 --steps 2",
    "step_cost.py": "--models lstm --batch-sizes 8 --ways sgd double_backward --modes graph"
    " --steps 2 --repeats 1 --no-memory",
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_its_table(name):
    command = [sys.executable, BENCHMARKS / name, *SMALLEST[name].split()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len([line for line in output.splitlines() if line.startswith("| ")]) >= 2
