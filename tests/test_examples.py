"""The examples and notebooks run as a newcomer runs them, offline."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600
    )


def test_quickstart_reaches_96_percent_and_writes_its_files_below_the_current_folder(tmp_path):
    result = run(ROOT / "examples" / "quickstart.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    accuracy = re.search(r"Final test accuracy: ([\d.]+)%", result.stdout)
    assert float(accuracy.group(1)) >= 96
    out = tmp_path / "quickstart_out"
    assert (out / "quickstart.png").stat().st_size > 10_000
    assert (out / "records.json").exists()
    assert list(out.glob("logs/**/events.out.tfevents.*"))
    assert set(os.listdir(tmp_path)) == {"data", "quickstart_out"}


def test_quickstart_says_at_once_that_a_data_set_is_missing(tmp_path):
    result = run(ROOT / "examples" / "quickstart.py", "--dataset", "kmnist", cwd=tmp_path)
    assert result.returncode != 0
    assert "kmnist" in result.stderr and "--download" in result.stderr


@pytest.mark.filterwarnings("ignore")
def test_the_first_notebook_runs(tmp_path):
    for folder in ("examples", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    notebook = nbformat.read(tmp_path / "notebooks" / "01_first_run.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path / "notebooks"}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
