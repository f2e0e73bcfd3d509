"""Per-example gradients: what every way answers, the choice of a way, and one file for each way."""

from keras_rgd._support import backends

backends.needs_tensorflow(__name__)

from keras_rgd.per_example.batch import Batch  # noqa: E402
from keras_rgd.per_example.choice import StepWays, Wanted, choose_way  # noqa: E402
from keras_rgd.per_example.gradients import PerExampleGradients, working_dtype  # noqa: E402
from keras_rgd.per_example.losses import ExampleLosses  # noqa: E402
from keras_rgd.per_example.measuring import measuring_way  # noqa: E402
from keras_rgd.per_example.memory import forget  # noqa: E402
from keras_rgd.per_example.per_example_gradients import (  # noqa: E402
    check_model,
    per_example_gradients,
)
from keras_rgd.per_example.smaller_batches import check_smaller_batches  # noqa: E402
from keras_rgd.per_example.state import seed_generators, unchanged  # noqa: E402
from keras_rgd.per_example.way import Way  # noqa: E402

__all__ = [
    "Batch",
    "ExampleLosses",
    "PerExampleGradients",
    "StepWays",
    "Wanted",
    "Way",
    "check_model",
    "check_smaller_batches",
    "choose_way",
    "forget",
    "measuring_way",
    "per_example_gradients",
    "seed_generators",
    "unchanged",
    "working_dtype",
]
