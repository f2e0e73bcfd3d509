"""Fixtures: every test starts from the same seeds and in float32."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What is compiled here runs a few times: XLA takes a third less without its optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import cases  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402
import steps  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402


class CaseScheduling(LoadScopeScheduling):
    """Tests of one case go to one process, which takes each of its steps once.

    By the parameters in a test's name: marks of groups do nothing with pytest 9.2 and xdist 3.8.
    """

    def _split_scope(self, nodeid):
        parameters = nodeid.partition("[")[2].rstrip("]").split("-")
        return next((p for p in parameters if p in cases.BY_NAME), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return CaseScheduling(config, log)


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
