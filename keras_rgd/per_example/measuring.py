"""Which way to per-example gradients is taken where D is measured, outside a training step."""

from __future__ import annotations

from typing import Any

import keras

from keras_rgd._support.arguments import check_model, check_way, check_way_is_here
from keras_rgd._support.backends import ON_TENSORFLOW
from keras_rgd.per_example.batch import Batch, mapped
from keras_rgd.per_example.memory import remembered
from keras_rgd.per_example.way import Way

if ON_TENSORFLOW:
    from keras_rgd.per_example.measuring_on_tensorflow import choose_measuring_way
    from keras_rgd.per_example.smaller_batches import check_smaller_batches
else:
    from keras_rgd.per_example.measuring_on_jax import check_smaller_batches, choose_measuring_way

__all__ = ["as_batch", "check_measurable", "check_smaller_batches", "way_for"]


def way_for(
    model: keras.Model,
    batch: Batch,
    *,
    training: bool,
    per_example: str = "auto",
    chunk_size: int | None = None,
    precise: bool = True,
) -> Way:
    """The `Way` for use outside a graph, remembered for the model and batches like this one.

    "auto" takes "layerwise" where that is exact for this model; else one example at a time where
    that is, with `tf.vectorized_map` where it can run it, or one backward pass an example
    ("one_by_one"); else "double_backward", whose Gram matrix costs N backward passes over the
    batch.

    Args:
        model: a compiled model; built here if it is not.
        batch: a `Batch`, on which the choice is made.
        training: whether layers behave as in training.
        per_example: one of `keras_rgd._support.arguments.WAYS`. Defaults to `"auto"`.
        chunk_size: examples whose gradients are held at once. Defaults to `None`, as many as fit
            in 1 GiB.
        precise: whether "layerwise" works in float64, as the Gram matrix of one batch should.
            Defaults to `True`.

    Raises:
        ValueError: the way that was asked for is not exact or not possible, or nothing is trained.
    """
    if not model.built:
        build(model, batch.x)
    if not model.trainable_variables:
        raise ValueError(f"Model '{model.name}' has no trainable weights, so it has no D.")
    check_way(per_example, chunk_size)
    check_way_is_here(per_example)

    def choose() -> Way:
        return choose_measuring_way(model, batch, training, per_example, chunk_size, precise)

    key = (way_for, training, per_example, chunk_size, precise, batch.signature)
    return remembered(model, key, choose)


def check_measurable(model: keras.Model) -> None:
    """Raise `ValueError` where nothing that a measurement could read gives the examples' losses."""
    check_model(model)
    own = _overriding(model, "train_step")
    ways_out = (
        "Override `compute_loss(self, x, y, y_pred, sample_weight)` and let the training use it; "
        "or give DiffusionMonitor(data, losses=...) a function that returns the losses of a "
        "batch's examples, shape (N,). To train such a model by D, keras_rgd.RGD(window=32) takes "
        "it as it is; keras_rgd.per_example_gradients is for a training loop of one's own."
    )
    step = "" if own is None else f", and class {own.__name__} overrides `train_step`"
    if type(model).call is keras.Model.call:
        raise ValueError(
            f"Model '{model.name}' has no `call`{step}, so there is no output to take losses of. "
            + ways_out
        )
    no_loss = model.loss is None and type(model).compute_loss is keras.Model.compute_loss
    if own is not None and no_loss:
        raise ValueError(
            f"Model '{model.name}' is compiled without a loss{step}, which alone knows what is "
            f"minimised. {ways_out}"
        )


def _overriding(model: keras.Model, name: str) -> type | None:
    """The class of the user's that has a method of its own by this name, or `None`."""
    cls = next(c for c in type(model).__mro__ if name in vars(c))
    return None if cls.__module__.split(".")[0] in ("keras", "keras_rgd") else cls


def as_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None) -> Batch:
    """A `Batch` of tensors of the dtypes that `fit` would use, checked to be one of this model's.

    Raises:
        ValueError: nothing gives the examples' losses, or arrays are missing or of unlike lengths.
    """
    check_measurable(model)
    keras_reads_y = model.loss is not None and type(model).compute_loss is keras.Model.compute_loss
    batch = Batch.of_arrays(x, y, sample_weight)
    if y is None and keras_reads_y:
        raise ValueError(
            f"Model '{model.name}' is compiled with a loss, which needs targets. Expected (x, y). "
            "Received: y=None"
        )
    return batch


def build(model: keras.Model, x: Any) -> None:
    """Make a model's weights as its first step would; nothing is computed, and no seed goes on."""
    model(mapped(lambda a: keras.KerasTensor((None, *a.shape[1:]), a.dtype), x))
