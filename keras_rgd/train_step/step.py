"""One training step along (I - eps D) v, on any backend that has per-example gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_rgd._keras import models as keras_models
from keras_rgd.optimizer import RGD, inner_rgd
from keras_rgd.per_example.batch import Batch


def by_example(optimizer: Any) -> RGD | None:
    """The `RGD` in `optimizer` that takes D from the batch's examples, or `None`."""
    rgd = inner_rgd(optimizer)
    return None if rgd is None or rgd.window is not None else rgd


def take_step(
    model: Any, rgd: RGD, batch: Batch, gradients_of: Callable, apply: Callable
) -> dict[str, Any]:
    """Move the weights of a model along (I - eps D) v, Eq. (10); its logs.

    Args:
        model: a model.
        rgd: the `RGD` by examples that its optimizer is or wraps.
        batch: a `Batch`.
        gradients_of: a function of the batch and a loss scale that returns its
            `PerExampleGradients`.
        apply: the function of a direction and variables by which the model's optimizer moves them.
    """
    one = ops.ones([])
    scale = model.optimizer.scale_loss(one)
    gradients = gradients_of(batch, scale)
    direction = rgd.direction(gradients)
    if scale is not one:
        # The optimizer divides by the loss scale, and skips the step where this overflows.
        direction = [d * ops.cast(scale, d.dtype) for d in direction]
    variables = model.trainable_variables
    direction = [ops.cast(d, v.dtype) for d, v in zip(direction, variables, strict=True)]
    with rgd.applying_direction():
        apply(direction, variables)
    keras_models.track_loss(model, gradients.loss, gradients.n_examples)
    x, y, sample_weight = batch
    return model.compute_metrics(x, y, gradients.y_pred, sample_weight=sample_weight)


def hidden_train_step(cls: type, mixin: type) -> type | None:
    """The class behind the mixin whose `train_step` the mixin's hides, or `None`."""
    behind = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    owner = next(c for c in behind if "train_step" in vars(c))
    return None if owner.__module__.startswith("keras.") else owner


def check_is_not_hidden(cls: type, mixin: type) -> None:
    """Raise `ValueError` where the mixin's `train_step` would run in place of another class's."""
    hidden = hidden_train_step(cls, mixin)
    if hidden is not None:
        raise ValueError(_HIDDEN.format(mine=cls.__name__, theirs=hidden.__name__))


_HIDDEN = """\
`{mine}` puts RGDMixin before `{theirs}`, which overrides `train_step`: RGDMixin's would run in \
its place and minimise the loss of `compile` instead of its own. No weight was changed. Write what \
`{theirs}.train_step` minimises as `compute_loss` and drop that `train_step`, or use \
keras_rgd.RGD(..., window=32) with `{theirs}` as it is, or, in a training loop of your own, \
keras_rgd.per_example_gradients."""
