"""Checks of arguments that more than one part takes."""

import numbers

import keras

from keras_rgd.epsilon import Fixed

# The ways to per-example gradients.
WAYS = ("auto", "layerwise", "double_backward", "vectorized_map")

WINDOW_DTYPES = ("bfloat16", "float32", "float64")


def check_way(per_example, chunk_size=None):
    """Raise `ValueError` unless the arguments name a way to per-example gradients."""
    if per_example not in WAYS:
        raise ValueError(
            f"`per_example` must be one of {', '.join(map(repr, WAYS))}. "
            f"Received: per_example={per_example!r}"
        )
    if chunk_size is not None and not is_count(chunk_size):
        raise ValueError(
            "`chunk_size` must be a positive integer, or None for the whole batch. "
            f"Received: chunk_size={chunk_size!r}"
        )


def check_training(training):
    """Raise `ValueError` unless `training` is True or False."""
    if not isinstance(training, bool):
        raise ValueError(f"`training` must be True or False. Received: training={training!r}")


def is_count(value):
    """Whether `value` is a positive integer."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value > 0


def checked_window_dtype(size, dtype, batch_size, rule):
    """`window_dtype` by its name, where RGD's arguments name a source of D of this backend.

    Raises:
        ValueError: they do not.
    """
    if size is None:
        for name, value in (("window_dtype", dtype), ("batch_size", batch_size)):
            if value is not None:
                raise ValueError(
                    f"`{name}` needs a `window`. Received: {name}={value!r}, no window"
                )
        backend = keras.backend.backend()
        if backend != "tensorflow":
            raise ValueError(
                "RGD without `window` takes D from the gradients of the batch's examples, which "
                "needs the TensorFlow backend of Keras. Write keras_rgd.RGD(..., window=32), or "
                f"set KERAS_BACKEND=tensorflow. Received: window=None, backend {backend!r}"
            )
        return None
    if not is_count(size) or size < 2:
        raise ValueError(
            "`window` must be an integer >= 2, the number of mini-batch gradients that D is taken "
            f"from, or None. Received: window={size!r}"
        )
    try:
        name = dtype if dtype is None else keras.backend.standardize_dtype(dtype)
    except (TypeError, ValueError):
        name = ""
    if name not in (None, *WINDOW_DTYPES):
        raise ValueError(
            f"`window_dtype` must be one of {', '.join(map(repr, WINDOW_DTYPES))}, or None for the "
            f"weights' dtype. Received: window_dtype={dtype!r}"
        )
    if batch_size is not None and not is_count(batch_size):
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}"
        )
    if batch_size is None and isinstance(rule, Fixed):
        raise ValueError(
            "An eps of a fixed value needs to know |B|, in whose units it is. Write "
            "keras_rgd.RGD(..., epsilon=keras_rgd.epsilon.Fixed(value), window=32, batch_size=64) "
            "with the number of examples in your batches. Received: batch_size=None"
        )
    return name
