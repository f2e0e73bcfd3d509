"""Models whose training step is RGD's: RGDModel, RGDSequential and a mixin for subclasses."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np

from keras_rgd._keras import models as keras_models
from keras_rgd.per_example.state import seed_generators
from keras_rgd.train_step import TrainStep

Functional: Any = keras_models.functional_class()

_SEEDS = "seed_generators.npz"


class RGDMixin(TrainStep):
    """A training step that hands `RGD` per-example gradients.

    `class MyModel(keras_rgd.RGDMixin, keras.Model)` trains with `RGD`; with any other optimizer,
    and with `RGD(window=W)`, it is what it was without the mixin. `compile`, `fit`, `evaluate`,
    logs and saving are Keras's own. A `train_step` of one's own may prepare the data, and ends with
    `return super().train_step((x, y, sample_weight))`; on JAX, where Keras's is stateless, with
    `return super().train_step(state, (x, y, sample_weight))`.
    """

    def save_assets(self, path: str | os.PathLike) -> None:
        """Write where the random numbers of the layers stand, which Keras does not."""
        states = {
            str(i): keras.ops.convert_to_numpy(seed.state)
            for i, seed in enumerate(seed_generators(self))
        }
        np.savez(os.path.join(path, _SEEDS), **states)

    def load_assets(self, path: str | os.PathLike) -> None:
        """Go on with the random numbers where `save_assets` found them."""
        states = np.load(os.path.join(path, _SEEDS))
        for i, seed in enumerate(seed_generators(self)):
            if str(i) in states:  # 0.1.0 did not save those that a layer keeps in lists
                seed.state.assign(states[str(i)])


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDModel(RGDMixin, keras.Model):
    """`keras.Model` whose training step is RGD's: `RGDModel(inputs, outputs)`, or subclass it."""

    def __new__(cls, *args, **kwargs):
        if cls is RGDModel and keras_models.makes_functional(args, kwargs):
            cls = RGDFunctional
        return super().__new__(cls, *args, **kwargs)

    # By these names of its arguments Keras sees that a functional model can be reloaded so.
    def __init__(self, *args, **kwargs):
        cls = type(self)
        if keras_models.makes_functional(args, kwargs) and not isinstance(self, Functional):
            # Keras would exchange the base of every class above this one, `RGDModel` too, and no
            # model with layers of its own could be a subclass of `RGDModel` any more.
            cls.__bases__ = tuple(RGDFunctional if b is RGDModel else b for b in cls.__bases__)
        super().__init__(*args, **kwargs)


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDFunctional(RGDModel, Functional):
    """What `RGDModel(inputs, outputs)` makes, as `keras.Model(inputs, outputs)` a `Functional`."""


@keras.saving.register_keras_serializable(package="keras_rgd")
class RGDSequential(RGDMixin, keras.Sequential):
    """`keras.Sequential` whose training step is RGD's: `RGDSequential([...])`."""


def to_rgd(model: keras.Model) -> RGDMixin:
    """An existing functional or Sequential model as one that RGD trains, sharing its layers.

    Compile the result; the weights are the same variables, so training one trains the other.

    Args:
        model: a functional or Sequential `keras.Model`, as those of `keras.applications` or what
            `keras.models.clone_model` returns.

    Returns:
        An `RGDSequential` for a `keras.Sequential`, else an `RGDModel`.

    Raises:
        ValueError: no model; or one of a class of one's own, which must take the mixin itself:
            what it overrides would be lost.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a keras.Model, such as keras.models.load_model returns for a file. "
            f"Received: {model!r}"
        )
    if isinstance(model, RGDMixin):
        return model
    if type(model) is keras.Sequential:
        layers = list(model.layers)
        if model.built:
            (inputs,) = model.inputs
            shape, dtype = inputs.shape, inputs.dtype
            layers.insert(
                0,
                keras.Input(batch_shape=shape, dtype=dtype, name=inputs.name, sparse=inputs.sparse),
            )
        converted = RGDSequential(layers, name=model.name)
    elif type(model) is Functional:
        outputs = keras.tree.pack_sequence_as(model.output, keras.tree.flatten(model.output))
        converted = RGDModel(model.input, outputs, name=model.name)
    else:
        name = type(model).__name__
        raise ValueError(
            f"`{name}` is a class of its own, and what it overrides would be lost. Expected a "
            "functional model or a keras.Sequential. Make the model by a class that adds RGD's "
            "step to this one, with the same arguments,\n"
            f"    class RGD{name}(keras_rgd.RGDMixin, {name}): ...\n"
            "or, for a functional model that overrides nothing,\n"
            "    model = keras_rgd.RGDModel(model.inputs, model.outputs)"
        )
    # The policy decides whether `compile` scales the loss for half precision.
    converted.dtype_policy = model.dtype_policy
    return converted
