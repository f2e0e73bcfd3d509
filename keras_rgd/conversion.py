"""An existing Keras model as one that RGD trains."""

import keras
from keras.src.models.functional import Functional

from keras_rgd.model import RGDMixin, RGDModel, RGDSequential


def to_rgd(model):
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
