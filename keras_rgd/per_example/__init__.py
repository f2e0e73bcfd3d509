"""Per-example gradients: the interface, the choice of a way, and one file for each way."""

from keras_rgd._support import backends

backends.needs_tensorflow(__name__)

from keras_rgd.per_example.batch import batch_size, first_examples, specs_of  # noqa: E402
from keras_rgd.per_example.checks import check_apart  # noqa: E402
from keras_rgd.per_example.choice import Choice, choose_way, measuring_way  # noqa: E402
from keras_rgd.per_example.gradients import PerExampleGradients, working_dtype  # noqa: E402
from keras_rgd.per_example.per_example_gradients import check_model, per_example_gradients  # noqa: E402
from keras_rgd.per_example.state import seed_generators, unchanged  # noqa: E402
from keras_rgd.per_example.way import make_way  # noqa: E402

__all__ = [
    "Choice",
    "PerExampleGradients",
    "batch_size",
    "check_apart",
    "check_model",
    "choose_way",
    "first_examples",
    "make_way",
    "measuring_way",
    "per_example_gradients",
    "seed_generators",
    "specs_of",
    "unchanged",
    "working_dtype",
]
