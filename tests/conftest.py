"""How the tests run: seeds, dtypes, processes, and the memory of a process."""

import ctypes
import gc
import os
import platform

try:
    import resource
except ImportError:  # on Windows
    resource = None

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What is compiled here runs a few times: XLA takes a third less without its optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# One process has one core, and small arrays.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
# Compilers' memory goes back to the machine, and not to a pool for each thread.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

import cases  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import reference  # noqa: E402
import steps  # noqa: E402
import tensorflow as tf  # noqa: E402
import zoos  # noqa: E402
from tensorflow.python.framework import ops  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

TESTS_BETWEEN_TRIMS = 25
LIBC = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


class ModelScheduling(LoadScopeScheduling):
    """Tests that use one model go to one process, which traces each of its steps once.

    Tests of a case, network or zoo go together, by its name among a test's parameters; all others
    by their file. Marks of groups would say the same, but do nothing with pytest 9.2 and xdist 3.8.
    """

    names = {*cases.BY_NAME, *zoos.ZOOS, "mlp", "convolution", "linear", "points"}

    def _split_scope(self, nodeid):
        parameters = nodeid.partition("[")[2].rstrip("]").split("-")
        return next((p for p in parameters if p in self.names), nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ModelScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process for each core, and four at most: each takes up to 3 GiB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def pytest_configure(config):
    config.tests_run = 0
    # Garbage is collected after each test, and not while its graphs grow.
    gc.disable()


@pytest.hookimpl(trylast=True)  # when -m has chosen
def pytest_collection_modifyitems(items):
    """What is traced here runs once or twice, where TensorFlow's optimization of graphs costs more.

    Sweeps, programs, examples and other backends run as users do.
    """
    here = all(item.path.parent.name != "integration" for item in items)
    if here and not any(item.get_closest_marker("wide") for item in items):
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@pytest.fixture(autouse=True)
def _fresh(request):
    """Every test starts from the same seeds and in float32."""
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    request.config.tests_run += 1
    _release_memory(trim=request.config.tests_run % TESTS_BETWEEN_TRIMS == 0)


def _release_memory(trim):
    """Give back what models that are gone have left.

    After each test, as TensorFlow takes long for graphs of which many go at once. What is still
    there is looked through again only where memory is trimmed, of which the allocator would keep
    most.
    """
    registered = ops.gradient_registry._registry
    for name in [n for n in registered if n.startswith("CustomGradient-")]:
        if _is_of_all_reduce(registered[name]["type"]):
            del registered[name]
    if trim:
        gc.unfreeze()
    gc.collect()
    gc.freeze()
    keras.utils.clear_session(free_memory=False)
    if trim and LIBC is not None:
        LIBC.malloc_trim(0)


def _is_of_all_reduce(function, depth=0):
    """Whether this is the gradient of an optimizer's sum over replicas, which nobody asks for.

    TensorFlow registers one in each trace of Keras's update, for good, and with it the graph.
    """
    cells = [c.cell_contents for c in getattr(function, "__closure__", None) or ()]
    inside = [c for c in cells if callable(c) and c is not function]
    return any(
        "all_reduce" in getattr(f, "__qualname__", "")
        or (depth < 2 and _is_of_all_reduce(f, depth + 1))
        for f in inside
    )


@pytest.fixture
def network(request):
    """A network of `networks`, by its name; whatever is asked of it, its weights stay."""
    import networks

    network = networks.built(request.param)
    yield network
    np.testing.assert_array_equal(reference.flatten(network.model.get_weights()), network.start)


@pytest.fixture
def float64():
    """The test runs under `keras.config.set_floatx("float64")`."""
    with steps.floatx("float64"):
        yield


def pytest_sessionfinish(session):
    """A process of xdist hands the most memory that it held to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["memory"] = _memory()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.memory = [*getattr(node.config, "memory", []), node.workeroutput["memory"]]


def pytest_terminal_summary(terminalreporter, config):
    memory = getattr(config, "memory", None) or [_memory()]
    held = ", ".join(f"{m:.1f}" for m in memory)
    terminalreporter.write_line(f"most memory of a process: {held} GiB")


def _memory():
    """GiB, as Linux counts."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else float("nan")
