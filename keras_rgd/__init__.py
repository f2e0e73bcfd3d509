"""Relativistic gradient descent and the diffusion matrix of SGD's noise, for Keras."""

from keras_rgd import epsilon
from keras_rgd._support.backends import ON_JAX, ON_TENSORFLOW, needs_tensorflow
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.diffusion_metric import DiffusionMetric
from keras_rgd.optimizer import RGD, inner_rgd

# ruff: noqa: F401
if ON_TENSORFLOW or ON_JAX:
    from keras_rgd.dataset_spectrum import spectrum
    from keras_rgd.measurement import diffusion_matrix
    from keras_rgd.models import RGDMixin, RGDModel, RGDSequential, to_rgd
    from keras_rgd.monitor import DiffusionMonitor
    from keras_rgd.per_example import PerExampleGradients, forget, per_example_gradients
    from keras_rgd.plots import plot_spectrum
    from keras_rgd.records import DiffusionRecord, Spectrum, load_records, save_records
if ON_TENSORFLOW:
    from keras_rgd import geometry

__version__ = "0.1.0"

__all__ = ["RGD", "DiffusionMatrix", "DiffusionMetric", "epsilon", "inner_rgd"]

_BY_EXAMPLES = [
    "DiffusionMonitor",
    "DiffusionRecord",
    "PerExampleGradients",
    "RGDMixin",
    "RGDModel",
    "RGDSequential",
    "Spectrum",
    "diffusion_matrix",
    "forget",
    "load_records",
    "per_example_gradients",
    "plot_spectrum",
    "save_records",
    "spectrum",
    "to_rgd",
]

if ON_TENSORFLOW or ON_JAX:
    __all__ += _BY_EXAMPLES
else:
    # The file of this name, which imports leave here, where the function is named below.
    del diffusion_matrix  # noqa: F821
if ON_TENSORFLOW:
    __all__ += ["geometry"]


def __getattr__(name):
    if name in _BY_EXAMPLES or name == "geometry":
        needs_tensorflow(f"keras_rgd.{name}", on_jax=name in _BY_EXAMPLES)
    raise AttributeError(f"module 'keras_rgd' has no attribute {name!r}")
