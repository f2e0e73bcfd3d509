"""What a forward pass may change in a model, and leaving it as it was."""

import contextlib

import keras


@contextlib.contextmanager
def unchanged(model):
    """Whatever runs inside, the model's weights, states and metrics end as they began."""
    # A tensor read from a variable is no copy; an assignment gives the variable a new one.
    before = [(v, v.value.read_value()) for v in state_of(model)]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def changeable(model):
    """The variables that a forward pass and its loss may change, but the weights themselves."""
    weights = {id(v) for v in model.trainable_variables}
    return [v for v in state_of(model) if id(v) not in weights]


def state_of(model):
    """All that a forward pass may change.

    Seeds, moving statistics, kernels that SpectralNormalization assigns, metrics; and the states
    of recurrent layers, which Keras does not list among a model's variables.
    """
    recurrent = [layer.states for layer in model._flatten_layers() if hasattr(layer, "states")]
    states = [s for s in keras.tree.flatten(recurrent) if isinstance(s, keras.Variable)]
    return model.variables + [v for m in model.metrics for v in m.variables] + states


def seed_generators(model):
    """The generators of a model's random numbers."""
    generators = [
        value
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        if isinstance(value, keras.random.SeedGenerator)
    ]
    # A shared layer is met more than once.
    return list(dict.fromkeys(generators))
