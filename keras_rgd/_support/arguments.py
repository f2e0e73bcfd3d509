"""Checks of arguments that more than one part takes."""

from __future__ import annotations

import numbers
from typing import Any

import keras

from keras_rgd._support.backends import ON_JAX

# The ways to per-example gradients, on TensorFlow and on JAX.
_ON_TENSORFLOW: tuple[str, ...] = ("layerwise", "double_backward", "vectorized_map")
_ON_JAX: tuple[str, ...] = ("linearized",)
WAYS = ("auto", *_ON_TENSORFLOW, *_ON_JAX)


def check_way(per_example: Any, chunk_size: Any = None) -> None:
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


def check_way_is_here(per_example: str) -> None:
    """Raise `ValueError` unless Keras's backend has a way; a saved model may name another's."""
    here, other = (_ON_JAX, "tensorflow") if ON_JAX else (_ON_TENSORFLOW, "jax")
    if per_example not in ("auto", *here):
        raise ValueError(
            f"On the {keras.backend.backend()} backend `per_example` must be "
            f"{', '.join(map(repr, here))} or 'auto'. For {per_example!r} set "
            f"KERAS_BACKEND={other}. Received: per_example={per_example!r}"
        )


def check_training(training: Any) -> None:
    """Raise `ValueError` unless `training` is True or False."""
    if not isinstance(training, bool):
        raise ValueError(f"`training` must be True or False. Received: training={training!r}")


def check_model(model: keras.Model) -> None:
    """Raise `ValueError` unless the model is a compiled `keras.Model`."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a compiled keras.Model. Received: {type(model).__name__}")
    if not model.compiled:
        raise ValueError(
            f"Model '{model.name}' is not compiled, so it has no loss. Call "
            "model.compile(optimizer, loss=...) first."
        )


def is_count(value: Any) -> bool:
    """Whether `value` is a positive integer."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and value > 0


def is_real(value: Any) -> bool:
    """Whether `value` is a real number: a Python float or integer, or one of numpy's."""
    # Type checkers do not know that a float is a `numbers.Real`.
    return isinstance(value, numbers.Real)
