"""Fixtures: every test starts from the same seeds and in float32."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What is compiled here runs a few times: XLA takes a third less without its optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras  # noqa: E402
import pytest  # noqa: E402
import steps  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests of one case go to one process, which takes each of its steps once."""
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        case = parameters and (parameters.get("case") or parameters.get("name"))
        if case is not None:
            item.add_marker(pytest.mark.xdist_group(str(case)))


@pytest.fixture(autouse=True)
def _fresh():
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def float64():
    """The test runs under `keras.config.set_floatx("float64")`."""
    with steps.floatx("float64"):
        yield
