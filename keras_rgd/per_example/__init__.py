"""Per-example gradients: what every way answers, the choice of a way, and one file for each way."""

from keras_rgd._support.backends import ON_JAX, ON_TENSORFLOW, needs_tensorflow
from keras_rgd.per_example.gradients import PerExampleGradients, working_dtype

# ruff: noqa: F401
if ON_TENSORFLOW or ON_JAX:
    from keras_rgd.per_example.batch import Batch
    from keras_rgd.per_example.measuring import way_for
    from keras_rgd.per_example.memory import forget
    from keras_rgd.per_example.per_example_gradients import per_example_gradients
    from keras_rgd.per_example.state import seed_generators, unchanged
    from keras_rgd.per_example.way import StepWays, Wanted, Way
if ON_TENSORFLOW:
    from keras_rgd.per_example.choice import choose_way
    from keras_rgd.per_example.losses import ExampleLosses

__all__ = ["PerExampleGradients", "working_dtype"]

_BY_EXAMPLES = [
    "Batch",
    "StepWays",
    "Wanted",
    "Way",
    "forget",
    "per_example_gradients",
    "seed_generators",
    "unchanged",
    "way_for",
]
_ON_TENSORFLOW = ["ExampleLosses", "choose_way"]

if ON_TENSORFLOW or ON_JAX:
    __all__ += _BY_EXAMPLES
if ON_TENSORFLOW:
    __all__ += _ON_TENSORFLOW


def __getattr__(name):
    if name in _BY_EXAMPLES or name in _ON_TENSORFLOW:
        needs_tensorflow(f"keras_rgd.per_example.{name}", on_jax=name in _BY_EXAMPLES)
    raise AttributeError(f"module 'keras_rgd.per_example' has no attribute {name!r}")
