"""What `RGD` refuses, and what it says to write instead."""

from __future__ import annotations

from typing import Any

import keras

from keras_rgd._support.arguments import check_way, is_count, is_real
from keras_rgd._support.backends import ON_JAX, check_float64
from keras_rgd.epsilon import Fixed, Rule

WINDOW_DTYPES = ("bfloat16", "float32", "float64")

_ORDINARY_MODEL = """\
RGD needs the gradients of the batch's examples, and this model hands it only their mean. No \
weight was changed. Either take D from the last mini-batch gradients, with this model as it is:
    model.compile(keras_rgd.RGD(learning_rate, window=32), ...)
or use a model that takes RGD steps by the gradients of its examples:
    model = keras_rgd.RGDSequential([...])      # instead of keras.Sequential([...])
    model = keras_rgd.RGDModel(inputs, outputs) # instead of keras.Model(inputs, outputs)
    model = keras_rgd.to_rgd(model)             # an existing model, sharing its weights
    class MyModel(keras_rgd.RGDMixin, keras.Model): ...
then compile and fit as before. Where the model's class overrides `train_step`, the window leaves \
it as it is; the other ways have a `train_step` of their own, and need its loss in `compute_loss`. \
In a training loop of your own:
    gradients = keras_rgd.per_example_gradients(model, x, y)
    optimizer.apply_direction(optimizer.direction(gradients), model.trainable_variables)"""


_ON_JAX = """
On JAX Keras takes the weights out of a model while it trains, and an error in the first step \
leaves it without them: build this model anew, or load it."""


class NotADirectionError(ValueError):
    """`RGD` without a window was handed a gradient where it needs a direction."""

    def __init__(self):
        super().__init__(_ORDINARY_MODEL + (_ON_JAX if ON_JAX else ""))


def check_momentum(momentum: Any, nesterov: Any) -> None:
    """Raise `ValueError` unless these are the momentum of `keras.optimizers.SGD`."""
    if not is_real(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must be a float in [0, 1]. Received: momentum={momentum!r}")
    if not isinstance(nesterov, bool):
        raise ValueError(f"`nesterov` must be True or False. Received: nesterov={nesterov!r}")


def check_per_example(per_example: Any, chunk_size: Any, microbatch_size: Any) -> None:
    """Raise `ValueError` unless these say how per-example gradients are to be had."""
    check_way(per_example, chunk_size)
    if microbatch_size is not None and not is_count(microbatch_size):
        raise ValueError(
            "`microbatch_size` must be a positive integer, or None for the whole batch. "
            f"Received: microbatch_size={microbatch_size!r}"
        )


def check_one_source(window: Any, per_example: Any, chunk_size: Any, microbatch_size: Any) -> None:
    """Raise `ValueError` where a window and the gradients of examples are asked for together."""
    by_examples = (per_example, chunk_size, microbatch_size) != ("auto", None, None)
    if window is not None and by_examples:
        raise ValueError(
            "`window` takes D from mini-batch gradients, and has no use for `per_example`, "
            "`chunk_size` and `microbatch_size`, which are about the gradients of examples. "
            f"Received: window={window!r}, per_example={per_example!r}, "
            f"chunk_size={chunk_size!r}, microbatch_size={microbatch_size!r}"
        )


def checked_window_dtype(size: Any, dtype: Any, batch_size: Any, rule: Rule) -> str | None:
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
        if backend not in ("tensorflow", "jax"):
            raise ValueError(
                "RGD without `window` takes D from the gradients of the batch's examples, which "
                "needs the TensorFlow or the JAX backend of Keras. Write keras_rgd.RGD(..., "
                "window=32), or set KERAS_BACKEND=tensorflow or jax. Received: window=None, "
                f"backend {backend!r}"
            )
        return None
    if not is_count(size) or size < 2:
        raise ValueError(
            "`window` must be an integer >= 2, the number of mini-batch gradients that D is taken "
            f"from, or None. Received: window={size!r}"
        )
    try:
        dtype_name = dtype if dtype is None else keras.backend.standardize_dtype(dtype)
    except (TypeError, ValueError):
        dtype_name = ""
    if dtype_name not in (None, *WINDOW_DTYPES):
        raise ValueError(
            f"`window_dtype` must be one of {', '.join(map(repr, WINDOW_DTYPES))}, or None for the "
            f"weights' dtype. Received: window_dtype={dtype!r}"
        )
    check_float64(dtype_name, "A window")
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
    return dtype_name


def check_ready(optimizer: Any, gradients: Any) -> None:
    """Raise `ValueError` unless `gradients` are those of examples and the optimizer is built."""
    if not hasattr(gradients, "combine"):
        raise ValueError(
            "`gradients` must be those of the batch's examples, as "
            "keras_rgd.per_example_gradients(model, x, y) returns them; a list of gradients is "
            "their mean, from which only RGD(window=W) takes steps, by optimizer.apply(...). "
            f"Received: {type(gradients).__name__}"
        )
    if not optimizer.built:
        raise ValueError(
            "The optimizer has no state yet. Call optimizer.build(model.trainable_variables) "
            "before the first step."
        )


def check_window_is_filled(optimizer: Any) -> None:
    """Raise `ValueError` unless the optimizer has a window, and in it what makes a D."""
    if optimizer.window is None:
        raise ValueError(
            "This RGD has no window. Expected RGD(window=W); for the D of a model's examples "
            "use keras_rgd.diffusion_matrix(model, x, y)."
        )
    if optimizer.stored_gradients < 2:
        raise ValueError(
            f"D needs two stored gradients, so two steps. Received: {optimizer.stored_gradients}"
        )
