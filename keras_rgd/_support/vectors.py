"""Vectors in weight space, kept as lists of tensors shaped as the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from keras import ops

# Tensors with fewer entries are looked at together, as hundreds of biases would be hundreds of
# operations. Joining larger ones would cost more than it saves.
SMALL = 2**13

# A tensor of whichever backend runs Keras; a vector in weight space.
Tensor: TypeAlias = Any
Vector: TypeAlias = list[Tensor]


def checked(v: Any, weights: Sequence[Any]) -> Vector:
    """v, if it is a vector in weight space: a list of tensors shaped as the weights.

    Raises:
        ValueError: it is not.
    """
    expected = [tuple(w.shape) for w in weights]
    if not isinstance(v, list | tuple):
        raise ValueError(
            "A vector in weight space is a list of tensors shaped as the trainable weights, "
            f"{expected}; for flat vectors use linear_operator() of a DiffusionMatrix. "
            f"Received: {type(v).__name__}"
        )
    shapes = [shape_of(x) for x in v]
    if len(shapes) != len(expected) or not all(map(shapes_agree, shapes, expected)):
        raise ValueError(
            "A vector in weight space is a list of tensors shaped as the trainable weights, "
            f"{expected}. Received: shapes {shapes}"
        )
    return list(v)


def shape_of(x: Any) -> tuple | None:
    """The static shape of a tensor or an array; `None` where not even its rank is known."""
    shape = getattr(x, "shape", None)
    if shape is None:
        return np.shape(x)
    # Inside a graph a rank or a size may be unknown.
    return tuple(shape) if getattr(shape, "rank", 0) is not None else None


def shapes_agree(shape: tuple | None, expected: tuple) -> bool:
    """Whether a static shape may be the expected one; `None` stands for what is not known."""
    if shape is None:
        return True
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(None in (s, e) or s == e for s, e in pairs)


def inner(a: Vector, b: Vector) -> Tensor:
    """Euclidean inner product of two lists of tensors, a scalar tensor."""
    return sum(ops.sum(x * y) for x, y in zip(a, b, strict=True))


def norm(a: Vector, size: Tensor | None = None) -> Tensor:
    """Euclidean norm, safe where the squares of the entries leave the range of the dtype.

    Args:
        a: a list of tensors.
        size: a number of about the size of its largest entry, within a factor of 1e15, or 0.
            Defaults to `None`: it is looked for, by one more pass over the entries.
    """
    a = _few(a)
    if size is None:
        each = [largest_of(x) for x in a]
        size = each[0] if len(each) == 1 else ops.max(ops.stack(each))
    unit = ops.where(size > 0, size, ops.ones_like(size))
    return unit * ops.sqrt(sum(ops.sum(ops.square(x / unit)) for x in a))


def _few(a):
    """The entries of a vector in fewer tensors: each reduction is an operation, or a kernel."""
    known = [SMALL if None in (shape_of(x) or [None]) else size([x]) for x in a]
    small = [ops.reshape(x, [n]) for x, n in zip(a, known, strict=True) if n < SMALL]
    large = [x for x, n in zip(a, known, strict=True) if n >= SMALL]
    return [*large, ops.concatenate(small)] if len(small) > 1 else list(a)


def largest_of(x: Tensor) -> Tensor:
    """The largest absolute value in a tensor, a scalar tensor; 0 in a tensor without entries."""
    # A weight may have none, and a batch no examples.
    shape = shape_of(x)
    empty = shape is None or any(size in (None, 0) for size in shape)
    return ops.max(ops.abs(x), initial=0 if empty else None)


def scale(a: Vector, factor: Any) -> Vector:
    """The list `factor * a`."""
    return [factor * x for x in a]


def add(a: Vector, b: Vector, factor: Any = 1.0) -> Vector:
    """The list `a + factor * b`."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def size(weights: Sequence[Any]) -> int:
    """Number of scalar weights d."""
    return int(sum(np.prod(w.shape) for w in weights))


def flatten(a: Vector) -> np.ndarray:
    """One numpy vector of length d from a list of tensors."""
    return np.concatenate([np.reshape(ops.convert_to_numpy(x), -1) for x in a])


def unflatten(vector: np.ndarray, like: Sequence[Any], dtype: Any = None) -> Vector:
    """The list of tensors shaped (and where `dtype` is `None` typed) as `like`.

    From a numpy vector of length d.
    """
    ends = np.cumsum([np.prod(w.shape, dtype=int) for w in like])
    parts = np.split(np.asarray(vector), ends[:-1])
    return [
        ops.convert_to_tensor(np.reshape(p, w.shape), dtype or w.dtype)
        for p, w in zip(parts, like, strict=True)
    ]
