"""Where the examples of a batch lie in a tensor."""

import math
import typing

import numpy as np


class UnknownError(Exception):
    """What is known of a graph does not tell where the examples lie."""


class Place(typing.NamedTuple):
    """An axis of length `outer` * N * `inner`; an entry at (a, n, b) of it is of example n.

    The plain axis of the examples has outer = inner = 1; a time-major sequence as one axis of
    T * N rows has outer = T, one of N * T rows inner = T.
    """

    axis: int
    outer: int = 1
    inner: int = 1


def agreed(places):
    """The place of the examples in an output, from where each of several inputs would have them.

    Only inputs that depend on weights must agree: no gradient passes through the others, so that
    it does not matter where their examples lie.

    Args:
        places: (place or `None`, whether the input depends on weights) of each input.

    Returns:
        (place or `None`, whether those that must agree do).
    """
    following = {place for place, follows in places if follows and place is not None}
    if following:
        return (following.pop(), True) if len(following) == 1 else (None, False)
    return next((place for place, _ in places if place is not None), None), True


def reshaped(place, before, after, n):
    """Where the examples lie after a reshape; `None` if along no axis.

    Args:
        place: where they lay before.
        before: the shape before, a list.
        after: the shape after, a list.
        n: N.

    Raises:
        UnknownError: sizes are open, and it depends on them.
    """
    if None in before or None in after:
        rest = before[1:], after[1:]
        if place != Place(0) or None in rest[0] or None in rest[1]:
            raise UnknownError
        return place if math.prod(rest[0]) == math.prod(rest[1]) else None
    stride = int(np.prod(before[place.axis + 1 :], dtype=np.int64)) * place.inner
    for axis, length in enumerate(after):
        step = int(np.prod(after[axis + 1 :], dtype=np.int64))
        if step <= stride < step * length:
            whole = stride % step == 0 and (step * length) % (stride * n) == 0
            return Place(axis, step * length // (stride * n), stride // step) if whole else None
    return None


def of_examples(place, shape, kept):
    """Which entries of a tensor belong to the examples that are kept, a boolean array.

    Args:
        place: where the examples lie.
        shape: the tensor's.
        kept: which examples, booleans of shape (N,).
    """
    along = np.tile(np.repeat(kept, place.inner), place.outer)
    along = along.reshape([-1 if axis == place.axis else 1 for axis in range(len(shape))])
    return np.broadcast_to(along, tuple(shape))
