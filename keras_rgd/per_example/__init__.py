"""Per-example gradients: what every way answers, the choice of a way, and one file for each way."""

from keras_rgd._support.backends import ON_TENSORFLOW, needs_tensorflow
from keras_rgd.per_example.gradients import PerExampleGradients, working_dtype

if ON_TENSORFLOW:
    # ruff: noqa: F401
    from keras_rgd.per_example.batch import Batch
    from keras_rgd.per_example.choice import choose_way
    from keras_rgd.per_example.losses import ExampleLosses
    from keras_rgd.per_example.measuring import way_for
    from keras_rgd.per_example.memory import forget
    from keras_rgd.per_example.per_example_gradients import per_example_gradients
    from keras_rgd.per_example.smaller_batches import check_smaller_batches
    from keras_rgd.per_example.state import seed_generators, unchanged
    from keras_rgd.per_example.way import StepWays, Wanted, Way

__all__ = ["PerExampleGradients", "working_dtype"]

_ON_TENSORFLOW = [
    "Batch",
    "ExampleLosses",
    "StepWays",
    "Wanted",
    "Way",
    "check_smaller_batches",
    "choose_way",
    "forget",
    "per_example_gradients",
    "seed_generators",
    "unchanged",
    "way_for",
]

if ON_TENSORFLOW:
    __all__ += _ON_TENSORFLOW


def __getattr__(name):
    if name in _ON_TENSORFLOW:
        needs_tensorflow(f"keras_rgd.per_example.{name}")
    raise AttributeError(f"module 'keras_rgd.per_example' has no attribute {name!r}")
