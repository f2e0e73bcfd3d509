"""The per-example gradients of one batch, for a training loop of one's own."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rgd._support.arguments import check_model, check_training
from keras_rgd._support.backends import ON_TENSORFLOW
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import PerExampleGradients


def per_example_gradients(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, *, training: bool = True
) -> PerExampleGradients:
    """The per-example gradients of one batch, for a training loop of one's own.

    One forward pass as in training: seeds and moving statistics go on. It works eagerly and
    inside a `tf.function`, and by "double_backward", so for any layer. To look at a model and
    leave it as it is use `keras_rgd.diffusion_matrix`, whose `gradients` are of the same kind.

    Args:
        model: a compiled, built `keras.Model` of any class; its loss is used, not its optimizer.
        x: inputs, axis 0 of length N; a nested structure of tensors for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        training: whether layers behave as in training. Defaults to `True`.

    Returns:
        A `PerExampleGradients`: `gradient`, `loss`, `y_pred` and the three operations `dot(v)`,
        `combine(w)` and `gram()`; what `RGD.direction` and `DiffusionMatrix` take.

    Raises:
        ValueError: the model is not compiled or not built, or its loss is not a weighted sum over
            the examples.
    """
    check_model(model)
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built, so it has no weights. Call it on data first."
        )
    batch = Batch(x, y, sample_weight).mapped(ops.convert_to_tensor)
    check_training(training)
    sizes = (Batch(part).known_size for part in batch if part is not None)
    lengths = {size for size in sizes if size is not None}
    if len(lengths) > 1:
        raise ValueError(
            "Inputs, targets and sample weights must have one axis 0, of the examples. Received: "
            f"lengths {sorted(lengths)}"
        )
    if ON_TENSORFLOW:
        from keras_rgd.per_example.double_backward import DoubleBackward
        from keras_rgd.per_example.losses import ExampleLosses

        return DoubleBackward(ExampleLosses(model, training), batch)
    from keras_rgd.per_example.linearized import linearized_way

    return linearized_way(model, training)(batch)
