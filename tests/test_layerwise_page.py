"""docs/layerwise.md says what its example prints."""

import importlib.util
import pathlib

import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "docs" / "layerwise_example.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("layerwise_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed(example):
    return example.sections()


def test_the_parts_add_up_to_the_gram_matrix_of_gradients_taken_one_by_one(printed):
    assert printed["sum"].endswith("equal to rounding.")
    merged, alone = printed["merged"].splitlines()
    assert merged.endswith("equal to rounding.")
    assert "different" in alone


def test_the_page_has_what_the_example_prints(example, printed):
    if example.written("versions") != printed["versions"]:
        pytest.skip(f"the page is of {example.written('versions')}")
    for name, section in printed.items():
        assert example.written(name) == section, name
