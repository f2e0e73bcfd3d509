"""CONTRIBUTING.md and docs/layerwise.md name files that exist, and all of the package's."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_rgd"


def test_the_layout_lists_every_file_and_folder_of_the_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (layout,) = re.findall(r"```text\nkeras_rgd/\n(.*?)```", text, re.DOTALL)
    listed = re.findall(r"^  (\S+?)/?\s", layout, re.MULTILINE)
    there = [p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "RELEASING.md", "docs/layerwise.md"])
def test_python_files_that_a_page_names_exist(page):
    names = re.findall(r"[\w/]+\.py\b", (ROOT / page).read_text(encoding="utf-8"))
    there = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if ".venv" not in p.parts}
    for name in set(names):
        assert any(f"/{path}".endswith(f"/{name}") for path in there), name
