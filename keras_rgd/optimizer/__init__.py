"""RGD, the optimizer."""

from keras_rgd.optimizer.checks import NotADirectionError
from keras_rgd.optimizer.optimizer import RGD, inner_rgd
from keras_rgd.optimizer.step_values import StepMeans

__all__ = ["RGD", "NotADirectionError", "StepMeans", "inner_rgd"]
