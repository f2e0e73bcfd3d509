"""The wheel, installed away from the repository."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Every module of the package is there, and a model trains.
PROGRAM = """
import importlib, pathlib, pkgutil, sys
import numpy as np
import keras, keras_rgd
assert pathlib.Path(keras_rgd.__file__).is_relative_to(sys.argv[1]), keras_rgd.__file__
modules = [m.name for m in pkgutil.walk_packages(keras_rgd.__path__, "keras_rgd.")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
model = keras_rgd.RGDSequential([keras.Input((3,)), keras.layers.Dense(2)])
model.compile(keras_rgd.RGD(0.1), "mse")
model.fit(np.ones((4, 3)), np.arange(8.0).reshape(4, 2), verbose=0)
assert float(model.optimizer.lambda_max) > 0
print(*modules)
"""


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_the_whole_package_and_trains_a_model(tmp_path):
    pytest.importorskip("hatchling", reason='python -m pip install -e ".[test]"')
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("keras_rgd-*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--no-compile", "--target", site, wheel)
    # Without the current folder and an editable install, which may be that of this repository.
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + PROGRAM
    found = run("-c", code, site, cwd=tmp_path).split()
    files = (ROOT / "keras_rgd").rglob("*.py")
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    assert set(found) == {n.removesuffix(".__init__") for n in names} - {"keras_rgd"}
