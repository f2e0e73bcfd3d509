"""The shape of the package: short files, arrows that run one way, TensorFlow where it must be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "keras_rgd"
FILES = {
    ".".join(("keras_rgd", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}

# What the JAX backend shares with TensorFlow: the mathematics, the rules, the records, the plots.
WITHOUT_TENSORFLOW = [
    "diffusion_matrix",
    "diffusion_metric",
    "direction",
    "epsilon",
    "optimizer",
    "per_example.batch",
    "per_example.gradients",
    "plots",
    "records",
    "step_values",
    "window",
]


def imports(name, everywhere=False):
    """The modules that a file imports: when it is loaded, or everywhere in it."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
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


@pytest.mark.parametrize("name", WITHOUT_TENSORFLOW)
def test_what_two_backends_share_imports_no_tensorflow(name):
    seen, left = set(), [f"keras_rgd.{name}"]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        found = list(imports(module, everywhere=module == f"keras_rgd.{name}"))
        assert not any(m.split(".")[0] == "tensorflow" for m in found), module
        left += [m for m in found if m in FILES]
