"""The trial of "layerwise": after the graph was read (see `mixing`), a second guard by numbers.

It compares sum_i m_i grad F_i, by the closed forms, with what ordinary differentiation of
sum_i m_i F_i gives, where F_i is the loss of example i plus a random combination of its outputs. An
example on which another's loss depends, or a use of a weight that was not seen, makes them differ.
One random m is enough: both are linear in m, so that where they differ for any m, they agree on a
set of m that has probability 0.
"""

import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from keras_rgd._support import vectors
from keras_rgd.per_example.batch import (
    batch_size,
    known_size,
    mapped,
    takes_any_size,
    with_any_size,
)
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.layerwise.layerwise import Layerwise
from keras_rgd.per_example.state import seed_generators, unchanged
from keras_rgd.per_example.traces import forgotten

# NumPy's finfo does not know bfloat16.
_EPSILON = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23, "float64": 2**-52}

# How far the weights are moved in each draw, relative to their size. Those that start at zero hide
# what lies before them: a last layer of zeros passes no gradient on.
_MOVES = (0.0, 0.1, 0.1)


class NotApartError(Exception):
    """A tensor that should have one row for each example has not."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """What the trace of a step by "layerwise" shows."""

    gram_is_cheap: bool  # whether the step forms the Gram matrix
    gram_work: float  # of the Gram matrix, in SGD steps
    repeats: int  # operations that repeat a weight for each example, as a class token


def traced(model, specs, training, n, precise=False):
    """Trace "layerwise" without running it.

    Args:
        model: a compiled, built model.
        specs: (x, y, sample_weight) as specs, with open sizes where the step is traced for any.
        training: whether layers behave as in training.
        n: N, to count work by.
        precise: as in `Layerwise`. Defaults to `False`.

    Returns:
        What the trace shows, a `Traced`.

    Raises:
        NotVisibleError: a weight is used where that cannot be seen, or has no closed form there.
        NotApartError: an axis that is as long as the batch may be taken for that of the examples.
    """

    def shown(specs, repeats):
        with forgotten(), FuncGraph("layerwise").as_default():
            batch = mapped(lambda s: tf.compat.v1.placeholder(s.dtype, s.shape), specs)
            options = dict(training=training, n=n, repeats=repeats, precise=precise)
            return _shown(Layerwise(model, *batch, **options))

    found = shown(specs, True)
    if not found.repeats or known_size(specs[0]) is None or not takes_any_size(model):
        return found
    # With the number of examples open, no other axis can be taken for theirs: trace it so and see.
    repeats = shown(with_any_size(specs), True).repeats
    if repeats == found.repeats:
        return found
    if not repeats:
        return shown(specs, False)
    raise NotApartError("an axis as long as the batch may be taken for that of the examples")


def _shown(way):
    return Traced(way.gram_is_cheap, way.gram_work / max(way.step_work, 1), way.repeats)


def tried(model, batch, specs, training, n, precise):
    """Try "layerwise" on a batch: what is wrong with it, if anything, and what its trace shows.

    Args:
        model: a compiled, built model.
        batch: (x, y, sample_weight).
        specs: what the step is traced for, of the same structure.
        training: whether layers behave as in training.
        n: N, to count work by.
        precise: as in `Layerwise`.

    Returns:
        The path of the first weight whose gradient is wrong, or a reason, or `None` where all is
        right; and a `Traced`.

    Raises:
        NotVisibleError: as `traced`.
    """
    compare = functools.partial(_compare, model, batch, specs, training, n, precise)
    with forgotten():
        wrong, shown = compare()
    if wrong is not None and shown is not None and shown.repeats:
        # An axis that is as long as the batch may have been taken for that of the examples.
        with forgotten():
            wrong, shown = compare(repeats=False)
    return wrong, shown


def _compare(model, batch, specs, training, n, precise, repeats=True):
    shown = []

    def both(batch, m):
        options = dict(training=training, n=n, repeats=repeats, precise=precise)
        noise = functools.partial(_noise, known_size(batch[0]))
        way = Layerwise(model, *batch, **options, cotangent_noise=noise)
        shown.append(_shown(way))
        try:
            ours, squares = way.reweighted_and_squares(m)
            return ours, way.reweighted_ordinarily(m), squares
        except (ValueError, TypeError) as error:
            raise NotApartError(reason(error)) from error

    trial = _traced_for(both, batch, specs)
    rng = np.random.default_rng(0)
    dtype = working_dtype([w.value for w in model.trainable_variables])
    wrong = None
    try:
        for noise in _MOVES:
            m = tf.constant(1 + rng.normal(size=batch_size(batch[0])), dtype)
            with unchanged(model):
                _shake(model, noise, rng)
                ours, ordinary, squares = trial(m)
                wrong = wrong or first_unequal(model, ours, ordinary)
                if not wrong and _differ(min(squares), max(squares), 10 * tolerance(model)):
                    wrong = "a weight"
    except (NotApartError, tf.errors.OpError) as error:
        # Sizes that do not fit: something has lost its axis of examples.
        wrong = f"a weight ({reason(error)})"
    return wrong, shown[-1] if shown else None


def _noise(n, output):
    """Random numbers to add to the loss's gradient at an output, which may be 0.

    `None` where the output has no axis of examples.
    """
    if not output.shape.rank or output.shape[0] not in (None, n):
        return None
    return tf.random.normal(tf.shape(output), dtype=output.dtype)


def _traced_for(function, batch, specs):
    """`function(batch, m)` as a graph function for `specs`, of a batch's tensors."""
    flat = keras.tree.flatten(batch)
    tensors = [tf.convert_to_tensor(t) for t in flat if t is not None]
    open_n = next(s for s in keras.tree.flatten(specs) if s is not None).shape[:1]

    def packed(tensors, m):
        tensors = iter(tensors)
        given = [None if t is None else next(tensors) for t in flat]
        return function(keras.tree.pack_sequence_as(batch, given), m)

    graph_function = tf.function(packed, autograph=False)

    def run(m):
        signature = [s for s in keras.tree.flatten(specs) if s is not None]
        signature = signature, tf.TensorSpec(open_n, m.dtype)
        return graph_function.get_concrete_function(*signature)(tensors, m)

    return run


def _shake(model, noise, rng):
    """Change what a forward pass reads, so that nothing in the model is hidden by a special value.

    Weights move by about `noise` of their size, and away from 0 where they are 0. So do the floats
    that are not trained, as a factor of 0 may have switched off a layer that mixes examples; those
    that are 0 become positive, as they may be variances. Seeds become others.
    """
    if not noise:
        return
    for variable in model.trainable_variables:
        value = np.array(keras.ops.convert_to_numpy(variable), "float32")
        moves = rng.standard_normal(value.shape, "float32")
        moves *= noise
        np.multiply(moves, value, out=moves, where=value != 0)
        variable.assign(np.add(value, moves, out=value))
    for variable in model.non_trainable_variables:
        if "float" in keras.backend.standardize_dtype(variable.dtype):
            value = np.array(keras.ops.convert_to_numpy(variable), "float32")
            draw = np.abs(rng.standard_normal(value.shape, "float32"))
            variable.assign(np.where(value == 0, draw, value * (1 + noise * draw)))
    for generator in seed_generators(model):
        generator.state.assign(rng.integers(0, 2**31, generator.state.shape))


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


def _differ(a, b, accuracy):
    a, b = float(a), float(b)
    return abs(a - b) > accuracy * max(abs(a), abs(b))  # NaN shows nothing


def tolerance(model):
    """How far two ways to one number of this model may be apart by rounding, relatively."""
    # Half of the digits: rounding is in the last few, and examples that mix change the first few.
    dtypes = {
        keras.backend.standardize_dtype(layer.compute_dtype) for layer in model._flatten_layers()
    }
    return max((_EPSILON[d] for d in dtypes if d in _EPSILON), default=_EPSILON["float32"]) ** 0.5


def reason(error):
    """The line of TensorFlow's long error message that says what happened, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ValueError: ")]
    return (told or lines or [type(error).__name__])[-1].removeprefix("ValueError: ")[:200]
