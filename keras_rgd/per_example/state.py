"""What a forward pass may change in a model, and leaving it as it was."""

import contextlib

import numpy as np

from keras_rgd._keras import models as keras_models
from keras_rgd._keras.models import layers_of, recurrent_states
from keras_rgd._support.backends import ON_TENSORFLOW


@contextlib.contextmanager
def unchanged(model):
    """Whatever runs inside, the model's weights, states and metrics end as they began."""
    before = [(v, _read(v)) for v in state_of(model)]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _read(variable):
    # A tensor read from a variable is no copy; an assignment gives the variable a new one.
    return variable.value.read_value() if ON_TENSORFLOW else variable.value


def changeable(model):
    """The variables that a forward pass and its loss may change, but the weights themselves."""
    weights = {id(v) for v in model.trainable_variables}
    return [v for v in state_of(model) if id(v) not in weights]


def state_of(model):
    """All that a forward pass may change.

    Seeds, moving statistics, kernels that SpectralNormalization assigns, metrics; and the states
    of recurrent layers, which Keras does not list among a model's variables.
    """
    states = [s for layer in layers_of(model) for s in recurrent_states(layer)]
    return model.variables + [v for m in model.metrics for v in m.variables] + states


def seed_generators(model):
    """The generators of a model's random numbers."""
    generators = [g for layer in layers_of(model) for g in keras_models.seed_generators(layer)]
    # A shared layer is met more than once.
    return list(dict.fromkeys(generators))


def layers_that_change_state(model, forward, concerns=lambda variable: True):
    """The layers that change a variable in a forward pass, which is undone.

    Args:
        model: the model.
        forward: a function without arguments that runs it.
        concerns: which variables count, a function of one. Defaults to all.
    """
    variables = [v for v in state_of(model) if concerns(v)]
    before = [v.numpy() for v in variables]
    with unchanged(model):
        forward()
        after = [v.numpy() for v in variables]
    changed = {
        id(v) for v, a, b in zip(variables, before, after, strict=True) if not np.array_equal(a, b)
    }
    owners = [layer for layer in layers_of(model) if changed & {id(v) for v in _own_state(layer)}]
    # A container holds its layers' variables too; the innermost owner is the one to name.
    return [a for a in owners if not any(b is not a and b in layers_of(a) for b in owners)]


def _own_state(layer):
    return layer.variables + recurrent_states(layer)
