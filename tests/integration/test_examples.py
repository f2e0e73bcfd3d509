"""The examples and notebooks run as a newcomer runs them, offline."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_rgd import datasets

ROOT = pathlib.Path(__file__).parents[2]


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


@pytest.fixture
def examples(monkeypatch):
    """The folder of the examples, to import from."""
    monkeypatch.syspath_prepend(ROOT / "examples")


def weights(model):
    return sum(math.prod(w.shape) for w in model.trainable_weights)


def test_the_networks_of_table_1_have_their_weights(examples):
    import architectures

    assert weights(architectures.resnet110()) == 1_727_962
    assert weights(architectures.wide_resnet_16_8()) == 10_961_370
    assert weights(architectures.densenet(depth=40, growth=12)) == 1_019_722
    assert weights(architectures.densenet(depth=100, growth=24)) == 27_249_082
    small = architectures.densenet(depth=7, growth=3, input_shape=(16, 16, 1), classes=4)
    assert (small.input_shape, small.output_shape) == ((None, 16, 16, 1), (None, 4))
    with pytest.raises(ValueError, match="3 n . 4.*depth=12"):
        architectures.densenet(depth=12, growth=3)


def test_new_channels_of_a_shortcut_are_zero(examples):
    import architectures

    x = architectures.ChannelPadding(2)(tf.ones([1, 2, 2, 3]))
    np.testing.assert_array_equal(x[0, 0, 0], [0, 0, 1, 1, 1, 0, 0])
    layer = architectures.ChannelPadding(2)
    assert architectures.ChannelPadding.from_config(layer.get_config()).count == 2


def test_the_networks_of_chaudhari_and_soatto_have_their_weights(examples):
    import chaudhari_soatto

    counts = {name: weights(build()) for name, build in chaudhari_soatto.NETWORKS.items()}
    assert counts == {"small-lenet": 13_338, "small-fc": 3_978, "small-allcnn": 26_982}


def test_zca_makes_pixels_uncorrelated(examples):
    import chaudhari_soatto

    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12))
    x = x.reshape(500, 2, 2, 3).astype("float32")
    flat = chaudhari_soatto.zca(chaudhari_soatto.contrast_normalised(x), 1e-6)(x).reshape(500, -1)
    covariance = np.cov(flat, rowvar=False)
    # Contrast normalisation leaves one direction without variance.
    values = np.sort(np.linalg.eigvalsh(covariance))
    np.testing.assert_allclose(values[1:], 1, rtol=1e-2)
    assert values[0] < 0.1


def test_table_1_runs_on_svhn_by_its_name(examples, monkeypatch, capsys):
    import architectures
    import table1

    networks = {"small": lambda: architectures.densenet(depth=7, growth=3)}
    monkeypatch.setattr(table1, "NETWORKS", networks)
    monkeypatch.setattr(
        table1, "in_a_process", lambda args, name, part: table1.PARTS[part](args, name)
    )
    # It is not on this machine; what follows is the example's own code on TFDS's mocks.
    monkeypatch.setattr(datasets, "_require_on_disk", lambda *_: None)
    # The mocks have no sizes.
    monkeypatch.setattr(
        table1,
        "dataset_size",
        lambda name, splits, **_: sum(len(datasets.load_dataset(name, s)[0]) for s in splits),
    )
    command = "table1.py --dataset svhn_cropped --batch-size 6 --repeats 1 --examples 12"
    monkeypatch.setattr(sys, "argv", command.split())
    with tfds.testing.mock_data(num_examples=12):
        table1.main()
    shown = capsys.readouterr().out
    d = weights(networks["small"]())
    assert f"| small | {d:,} | {599_999 / d:.3%} | {23 / d:.3%} |" in shown
    step, spectrum = (line for line in shown.splitlines()[5:] if line.startswith("| small"))
    assert "double_backward" in step and " of 11 |" in spectrum


def test_three_trajectories_are_compared(tmp_path):
    arguments = "--steps 2 --every 1 --seeds 2 --examples 100 --microbatch-size 700".split()
    result = run(ROOT / "examples" / "gd_sgd_rgd.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| SGD - RGD |" in result.stdout
    out = tmp_path / "gd_sgd_rgd_out"
    assert (out / "digits.png").stat().st_size > 10_000
    series = np.load(out / "digits.npz")
    assert series["RGD loss"].shape == (2, 3)
    assert np.all(series["RGD-GD distance"][:, 0] == 0)
    assert np.all(series["RGD-GD distance"][:, 1:] > 0)
    assert np.all(np.diff(series["GD loss"]) < 0)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_a_window_comes_near_the_D_of_all_examples(
    network, tmp_path, monkeypatch, examples, capsys
):
    import estimators

    monkeypatch.setattr(estimators, "MOMENTS", (100,))
    monkeypatch.setattr(estimators, "AROUND", (-10, 0))
    monkeypatch.setattr(estimators, "DRAWS", 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", f"estimators.py --seeds 1 --network {network}".split())
    estimators.main()
    (row,) = re.findall(r"^\| 100 \| (.*) \|$", capsys.readouterr().out, re.M)
    batch, *windows = map(float, row.split(" | "))
    assert len(windows) == 4
    assert 0.5 < batch <= 1
    assert 0.85 < windows[-1] <= 1
    picture = tmp_path / "estimators_out" / f"estimators_digits_{network}.png"
    assert picture.stat().st_size > 10_000


def test_ways_of_centring_are_compared(tmp_path, monkeypatch, examples, capsys):
    import estimators

    monkeypatch.setattr(estimators, "MOMENTS", (40,))
    monkeypatch.setattr(estimators, "AROUND", (0,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["estimators.py", "--centrings"])
    estimators.main()
    rows = re.findall(r"^\| (\d+ \| [\d.]+ \| \d+) \| (.*) \|$", capsys.readouterr().out, re.M)
    assert len(rows) == 3 * 3 * 2
    assert all(-1 <= float(value) <= 1 for _, cells in rows for value in cells.split(" | "))


def test_centrings_leave_no_mean_and_keep_the_covariance_of_noise(examples):
    import estimators

    noise = np.random.default_rng(0).normal(size=(32, 20_000))
    for name, matrix in estimators.centrings(32).items():
        np.testing.assert_allclose(matrix @ np.ones(32), 0, atol=1e-12)
        # tr of what is left of white noise, over what would be without centring.
        assert 0.9 < np.sum((matrix @ noise) ** 2) / noise.size < 1.0, name


def test_optimizers_are_compared(tmp_path):
    options = "--dataset digits --steps 20 --every 10 --seeds 2 --rates 0.003 0.1".split()
    result = run(ROOT / "examples" / "compare_optimizers.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = re.findall(r"^\| ([^|]*) \| (\S+) \| ([\d.]+)% .* \|$", result.stdout, re.M)
    assert [row[0] for row in rows] == [
        "SGD",
        "SGD, momentum 0.9",
        "RGD, examples",
        "RGD, window 32",
        "Adam",
    ]
    assert all(float(row[2]) > 20 for row in rows)
    runs = json.loads((tmp_path / "compare_optimizers_out" / "digits.json").read_text())
    assert len(runs) == 5 * 3
    assert (tmp_path / "compare_optimizers_out" / "digits.png").stat().st_size > 10_000


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


def test_the_two_layer_network_is_that_of_its_closed_form(tmp_path):
    script = ROOT / "examples" / "two_layer_network.py"
    result = run(script, "--duration", "0.5", "--runs", "5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    differences = re.findall(
        r"^\| (D|g|inverse of g|Christoffel symbols) .*\| (\S+) \|$", result.stdout, re.M
    )
    assert len(differences) == 4
    assert all(float(value) < 1e-12 for _, value in differences), differences
    assert (tmp_path / "two_layer_network_out" / "two_layer_network.png").stat().st_size > 10_000


def test_the_limit_cycle_turns_where_descent_on_the_potential_rests(tmp_path):
    result = run(ROOT / "examples" / "limit_cycle.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = re.findall(
        r"^\| ([\d.]+) \| ([^|]*(?:\|x\|)?[^|]*) \| (\S+) \| (at rest) \| 0.0 \| (\S+) \|$",
        result.stdout,
        re.M,
    )
    assert [row[0] for row in rows] == ["0", "0.5", "1.5"]
    assert rows[0][1] == rows[1][1] == "at rest" and rows[2][1].startswith("moving")
    assert float(rows[2][2]) > 20
    turning = [float(row[4]) for row in rows]
    assert abs(turning[0]) < 1 < 4 < turning[1] < turning[2]
    assert (tmp_path / "limit_cycle_out" / "limit_cycle.png").stat().st_size > 10_000


def test_the_chain_of_approximations_is_measured(tmp_path):
    options = ["--networks", "softmax_regression", "--fractions", "0.5", "--examples", "20"]
    options += ["--duration", "0.5", "--runs", "5", "--steps", "2"]
    result = run(ROOT / "examples" / "geometry_chain.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    (cells,) = re.findall(r"^\| softmax_regression \| (.*) \|$", result.stdout, re.M)
    d, fraction, to_gd, to_geodesic, to_metric, *_ = cells.split(" | ")
    assert (d, fraction) == ("650", "0.5")
    assert 0 < float(to_metric) <= float(to_geodesic) < float(to_gd)
    off = re.search(r"off by at most (\S+)", result.stdout)
    assert float(off.group(1)) < 1e-6
    assert (tmp_path / "geometry_chain_out" / "geometry_chain.png").stat().st_size > 10_000
