"""What the rules have in common that say where an operation leaves the examples of a batch.

A rule takes the `Follower`, the operation and a `Found` or `None` for each input, and returns the
place of the examples in the outputs: one `Place` for all, or a list; LOST where the operation
reduces, permutes, slices or contracts along the examples. It raises `UnknownError` where sizes or
indices that it would need are not known.
"""

import numpy as np

from keras_rgd.per_example.mixing.following import LOST
from keras_rgd.per_example.mixing.places import UnknownError, agreed


def registry():
    """An empty dict of rules by operation type, and a decorator that puts a rule into it."""
    rules = {}

    def rule(*names):
        def register(function):
            rules.update(dict.fromkeys(names, function))
            return function

        return register

    return rules, rule


def given(*values):
    """Raise `UnknownError` unless all values are known."""
    if any(value is None for value in values):
        raise UnknownError


def placed(inputs):
    """Which inputs have a place."""
    return [i for i, found in enumerate(inputs) if found is not None and found.place is not None]


def only(inputs, index):
    """The place of the examples in one input; LOST where another input has one and follows weights.

    For operations whose other inputs are indices, sizes or the like.
    """
    for i in placed(inputs):
        if i != index and inputs[i].follows:
            return LOST
    found = inputs[index]
    return LOST if found is None or found.place is None else found.place


def joined(places):
    """The place of the examples in an output, from (place, follows) of each input, or LOST.

    LOST where two inputs that follow weights have their examples in different places.
    """
    place, agree = agreed(places)
    return place if agree and place is not None else LOST


def all_joined(inputs):
    """The place that all inputs have in common, or LOST."""
    return joined([(inputs[i].place, inputs[i].follows) for i in placed(inputs)])


def axes_of(follower, tensor, rank):
    """The axes that a tensor names, counted from the first."""
    value = follower.value(tensor)
    given(value, rank)
    return {int(axis) % rank for axis in np.reshape(value, -1)} if rank else set()
