"""Whether two ways to the gradient of one model agree, but for rounding."""

import keras
import numpy as np

from keras_rgd._keras.models import layers_of

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
    accuracy = tolerance(model)
    ours, ordinary = ([keras.ops.convert_to_numpy(t) for t in g] for g in (ours, ordinary))
    with np.errstate(all="ignore"):
        sizes = [_norm(b) for b in ordinary]
        whole = np.linalg.norm(sizes)
        for variable, a, b, size in zip(
            model.trainable_variables, ours, ordinary, sizes, strict=True
        ):
            # The second term is for a weight whose gradient is 0 but for rounding.
            bound = accuracy * size + 100 * accuracy**2 * whole
            if np.isfinite(bound) and not _norm(a - b) <= bound:
                return f"'{variable.path}'"
    return None


def _norm(a):
    return np.linalg.norm(a.ravel().astype("float64"))


def tolerance(model):
    """How far two ways to one number of this model may be apart by rounding, relatively."""
    # Half of the digits: rounding is in the last few, and examples that mix change the first few.
    dtypes = {keras.backend.standardize_dtype(layer.compute_dtype) for layer in layers_of(model)}
    return max((_EPSILON[d] for d in dtypes if d in _EPSILON), default=_EPSILON["float32"]) ** 0.5
