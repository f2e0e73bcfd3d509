"""Whether two ways to the gradient of one model agree, but for rounding."""

import keras
import tensorflow as tf

from keras_rgd._keras.models import layers_of
from keras_rgd._support import vectors

# NumPy's finfo does not know bfloat16.
_EPSILON = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23, "float64": 2**-52}


def first_unequal(model, ours, ordinary):
    """The path of the first weight where two gradients differ by more than rounding, or `None`.

    What is not finite is passed over: a moved weight may be one that the layer cannot take, and a
    batch may hold NaN.

    Args:
        model: the model.
        ours: one gradient, a list of tensors shaped as the weights.
        ordinary: the other, which is right.
    """
    accuracy, whole = tolerance(model), vectors.norm(ordinary)
    for variable, a, b in zip(model.trainable_variables, ours, ordinary, strict=True):
        size = vectors.norm([b])
        if not bool(tf.math.is_finite(size)) or not bool(tf.math.is_finite(whole)):
            continue
        # The second term is for a weight whose gradient is 0 but for rounding.
        if not vectors.norm([a - b]) <= accuracy * size + 100 * accuracy**2 * whole:
            return f"'{variable.path}'"
    return None


def tolerance(model):
    """How far two ways to one number of this model may be apart by rounding, relatively."""
    # Half of the digits: rounding is in the last few, and examples that mix change the first few.
    dtypes = {keras.backend.standardize_dtype(layer.compute_dtype) for layer in layers_of(model)}
    return max((_EPSILON[d] for d in dtypes if d in _EPSILON), default=_EPSILON["float32"]) ** 0.5
