"""The calls of a model's layers in one forward pass."""

import typing

from keras_rgd._keras.models import calls_replaced, layers_of


class Call(typing.NamedTuple):
    """One call of a layer."""

    layer: typing.Any
    arguments: tuple
    start: typing.Any  # what `mark` gave before the call
    end: typing.Any  # and after it


def calls(model, forward, mark=lambda: None):
    """The calls of a model's layers while `forward()` runs, a list of `Call`, innermost first.

    Args:
        model: the model.
        forward: a function without arguments.
        mark: a function without arguments, asked before and after each call.
    """
    record = []

    def observed(layer, call):
        def observed_call(*args, **kwargs):
            start = mark()
            output = call(*args, **kwargs)
            record.append(Call(layer, args, start, mark()))
            return output

        return observed_call

    with calls_replaced(layers_of(model, include_self=False), observed):
        forward()
    return record


def named(layers):
    """Layers by their names and classes."""
    return ", ".join(f"'{layer.name}' ({class_name(layer)})" for layer in layers)


def class_name(layer):
    """The name of a layer's class, one that its user has written."""
    name = type(layer).__name__
    return {"RGDFunctional": "RGDModel", "Functional": "Model"}.get(name, name)
