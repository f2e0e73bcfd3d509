"""H = I - 11^T/N of Eq. (2): numbers and Gram matrices less their means over the examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_rgd._support.vectors import Tensor


def centred(k: Any, valid: Tensor | None = None) -> Any:
    """H k, numbers less their mean.

    The rounding of the mean is left in the result. Where that would be multiplied by a gradient
    that is much longer than the rest, center twice.

    Args:
        k: a number for each example, shape (N,), a tensor or a numpy array.
        valid: where only some entries are examples, 1 for those and 0 for the others, where k is 0
            and the result is 0. Defaults to `None`, all are.
    """
    if isinstance(k, np.ndarray):
        return k - k.mean()
    if valid is None:
        return k - ops.mean(k)
    return (k - ops.sum(k) / ops.sum(valid)) * valid


def centred_gram(gram: Tensor, valid: Tensor | None = None) -> Tensor:
    """H A H for a Gram matrix A: the products of vectors less their mean.

    Args:
        gram: A, shape (N, N), a tensor.
        valid: as in `centred`.
    """
    if valid is None:
        gram = gram - ops.mean(gram, 0, keepdims=True)
        return gram - ops.mean(gram, 1, keepdims=True)
    n, pairs = ops.sum(valid), valid[:, None] * valid
    gram = (gram - ops.sum(gram, 0, keepdims=True) / n) * pairs
    return (gram - ops.sum(gram, 1, keepdims=True) / n) * pairs


def center_in_place(gram: np.ndarray) -> None:
    """A = H A H for a numpy array, of which a data set's fills the memory."""
    gram -= gram.mean(0, keepdims=True)
    gram -= gram.mean(1, keepdims=True)
