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

from keras_rgd._keras.graphs import new_graph, placeholder
from keras_rgd.per_example.agreement import first_unequal, tolerance
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.gradients import working_dtype
from keras_rgd.per_example.layerwise.layerwise import Layerwise
from keras_rgd.per_example.not_exact import reason
from keras_rgd.per_example.state import seed_generators, unchanged
from keras_rgd.per_example.traces import forgotten, with_any_size

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


def traced(losses, specs, options):
    """What a trace of "layerwise" for these specs shows, a `Traced`; nothing is run.

    Args:
        losses: the `ExampleLosses` of a model.
        specs: a `Batch` of specs.
        options: `LayerwiseOptions`; of `repeats` the answer tells.

    Raises:
        NotVisibleError: a weight is used where that cannot be seen, or has no closed form there.
        NotApartError: an axis that is as long as the batch may be taken for that of the examples.
    """

    def shown(specs, repeats):
        with forgotten(), new_graph("layerwise").as_default():
            batch = specs.mapped(placeholder)
            asked = dataclasses.replace(options, repeats=repeats)
            return _shown(Layerwise(losses, batch, options=asked))

    found = shown(specs, True)
    if not found.repeats or specs.known_size is None or not takes_any_size(losses.model):
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


def tried(losses, batch, specs, options):
    """Where a step by "layerwise" is wrong on a batch, or `None`; and what its trace shows.

    Args:
        losses: the `ExampleLosses` of a model.
        batch: a `Batch`.
        specs: a `Batch` of specs, what the step is traced for.
        options: as in `traced`.

    Returns:
        The path of the first weight whose gradient is wrong, or a reason, or `None` where all is
        right; and a `Traced`.

    Raises:
        NotVisibleError: as `traced`.
    """
    with forgotten():
        wrong, shown = _compare(losses, batch, specs, dataclasses.replace(options, repeats=True))
    if wrong is not None and shown is not None and shown.repeats:
        # An axis that is as long as the batch may have been taken for that of the examples.
        with forgotten():
            none = dataclasses.replace(options, repeats=False)
            wrong, shown = _compare(losses, batch, specs, none)
    return wrong, shown


def _compare(losses, batch, specs, options):
    model, shown = losses.model, []

    def both(batch, m):
        noise = functools.partial(_noise, batch.known_size)
        way = Layerwise(losses, batch, options=options, cotangent_noise=noise)
        shown.append(_shown(way))
        try:
            ours, squares = way.reweighted_and_squares(m)
            return ours, way.reweighted_ordinarily(m), squares
        except (ValueError, TypeError) as error:
            raise NotApartError(reason(error)) from error

    trial = _traced_for(both, batch, specs)
    rng = np.random.default_rng(0)
    dtype = working_dtype(losses.weights)
    wrong = None
    try:
        for noise in _MOVES:
            m = tf.constant(1 + rng.normal(size=batch.size), dtype)
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
    flat = keras.tree.flatten(batch)
    tensors = [tf.convert_to_tensor(t) for t in batch.tensors()]
    signature = specs.tensors()

    def packed(tensors, m):
        tensors = iter(tensors)
        given = [None if t is None else next(tensors) for t in flat]
        return function(keras.tree.pack_sequence_as(batch, given), m)

    graph_function = tf.function(packed, autograph=False)

    def run(m):
        of_m = tf.TensorSpec(signature[0].shape[:1], m.dtype)
        return graph_function.get_concrete_function(signature, of_m)(tensors, m)

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


def _differ(a, b, accuracy):
    a, b = float(a), float(b)
    return abs(a - b) > accuracy * max(abs(a), abs(b))  # NaN shows nothing
