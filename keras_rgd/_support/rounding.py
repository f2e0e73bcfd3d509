"""What counts as rounding: one rule, wherever it is asked whether gradients differ at all.

Equal gradients come out of a backward pass unequal in their last digits. That is no variance, and
what is no more than that is taken as 0; anything above it is the gradients' own.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd._support import vectors
from keras_rgd._support.vectors import Tensor

# In the last digits of the dtype.
_LAST_DIGITS = 32

# Products of gradients lose to their mean what it is longer than the rest. In the last digits of
# the dtype, the share of variance in the mean square above which four decimals are left.
_SHARE = 2.0**16


def machine_epsilon(dtype: Any) -> float:
    """Distance from 1 to the next larger number of a floating dtype."""
    return float(np.finfo(keras.backend.standardize_dtype(dtype)).eps)


def noise(size: Any, dtype: Any) -> Any:
    """How far apart equal things of this size may be by rounding alone.

    Args:
        size: the length of vectors, or the absolute value of numbers.
        dtype: of what is compared.
    """
    return _LAST_DIGITS * machine_epsilon(dtype) * size


def differ(distance: Any, size: Any, dtype: Any) -> Any:
    """Whether things of this size that are so far apart differ by more than rounding.

    Args:
        distance: in the unit of `size`, as a length and not as its square.
        size: as in `noise`.
        dtype: as in `noise`.
    """
    return distance > noise(size, dtype)


def is_real(square_distance: Tensor, square: Tensor, dtype: Any, centred: bool) -> Tensor:
    """Whether gradients that are known by their products differ by more than rounding.

    Args:
        square_distance: the largest |g_i - gbar|^2, a scalar tensor.
        square: the largest |g_i|^2.
        dtype: of the gradients.
        centred: whether the mean was taken off before products were formed. If not, the distance
            is a difference of products, in which their own rounding stands.
    """
    if not centred:
        return differ(square_distance, square, dtype)
    return differ(ops.sqrt(square_distance), ops.sqrt(square), dtype)


def above_noise(centred: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Products <g_i, v> less their mean, 0 where they are rounding alone; and how long that is.

    Args:
        centred: k less its mean, shape (N,).
        largest: the largest |k_i|.
    """
    real = differ(vectors.largest_of(centred), largest, centred.dtype)
    return ops.where(real, centred, ops.zeros_like(centred)), noise(largest, centred.dtype)


def error(variance: Tensor, square: Tensor, dtype: Any, centred: bool) -> Tensor:
    """About how far off the mean of |g_i - gbar|^2 may be; else as `is_real`."""
    known = variance if centred else square
    return machine_epsilon(dtype) * ops.sqrt(known) * ops.sqrt(square)


def keeps_digits(variance: Tensor, mean_square: Tensor, dtype: Any) -> Tensor:
    """Whether products may be centred after they were formed.

    Args:
        variance: the mean of |g_i - gbar|^2, from such products.
        mean_square: the mean of |g_i|^2.
        dtype: in which they were formed.
    """
    return variance > _SHARE * machine_epsilon(dtype) * mean_square
