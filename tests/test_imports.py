"""The mathematics, the rules, the records and the plots stand on Keras alone: no TensorFlow."""

import ast
import os
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "keras_rgd"
NAMES = (
    "diffusion_matrix",
    "diffusion_metric",
    "largest_eigenvalue",
    "direction",
    "epsilon.spectral_measure",
    "epsilon.rules",
    "window",
    "optimizer.optimizer",
    "optimizer.checks",
    "optimizer.step_values",
    "records.diffusion_record",
    "records.spectrum",
    "records.values",
    "plots",
    "per_example.batch",
    "per_example.gradients",
    "_support.arguments",
    "_support.backends",
    "_support.batches",
    "_support.centring",
    "_support.eigensolvers",
    "_support.json_files",
    "_support.progress",
    "_support.rounding",
    "_support.vectors",
)


def test_the_mathematics_runs_without_tensorflow():
    # `keras_rgd` itself imports what there is on the backend that runs.
    imports = "\n".join(f"import keras_rgd.{name}" for name in NAMES)
    code = f"import sys\n{imports}\nassert 'tensorflow' not in sys.modules"
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_file_of_the_mathematics_imports_tensorflow_as_it_is_read():
    for name in NAMES:
        tree = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "tensorflow" for n in names), name
