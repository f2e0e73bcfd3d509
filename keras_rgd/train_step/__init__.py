"""What `fit` runs where `RGD` takes its steps by the gradients of a batch's examples."""

from keras_rgd._support.backends import ON_TENSORFLOW

if ON_TENSORFLOW:
    from keras_rgd.train_step.tensorflow import TrainStep
else:
    from keras_rgd.train_step.jax import TrainStep

__all__ = ["TrainStep"]
