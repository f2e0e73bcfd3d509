"""The shape of the package: short files, and arrows that run one way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "keras_rgd"
FILES = {
    ".".join(("keras_rgd", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(name):
    """The modules that a file imports when it is loaded."""
    for node in ast.parse(FILES[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own(name):
    """As `imports`, of this package: files alone, no package's index."""
    return [m for m in imports(name) if m in FILES]


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_350_lines(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 350, f"{name} has {lines} lines"


def test_no_file_imports_its_caller():
    order, below = [], {}

    def visit(name, way):
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in below:
            below[name] = own(name)
            for other in below[name]:
                visit(other, (*way, name))
            order.append(name)

    for name in FILES:
        visit(name, ())
    assert len(order) == len(FILES)


def test_what_could_stand_in_any_package_knows_nothing_of_this_one():
    for name in FILES:
        if name.startswith("keras_rgd._support"):
            assert all(m.startswith("keras_rgd._support") for m in own(name)), name


def test_per_example_gradients_know_nothing_of_rgd():
    allowed = ("keras_rgd.per_example", "keras_rgd._support", "keras_rgd._keras")
    for name in FILES:
        if name.startswith("keras_rgd.per_example"):
            strangers = [m for m in own(name) if not m.startswith(allowed)]
            assert not strangers, f"{name} imports {strangers}"
