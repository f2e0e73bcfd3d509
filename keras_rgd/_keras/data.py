"""What Keras makes of the batches that `fit` is given, on TensorFlow.

Expected: batches come from an iterator of `tf.data`. Where a generator's batch has `None` for its
targets or weights, there is an empty `tf.experimental.Optional` in the iterator's batch, and a
`tf.OptionalSpec` in its `element_spec`; `train_step` gets `None` again.
"""

import functools

import keras
import tensorflow as tf


def is_absent(leaf):
    """Whether a leaf of a batch, or of its spec, stands for what was not given."""
    return leaf is None or isinstance(leaf, tf.experimental.Optional | tf.OptionalSpec)


def given(data):
    """A batch, or its spec, with `None` for what was not given, as `train_step` gets it."""
    return keras.tree.map_structure(lambda t: None if is_absent(t) else t, data)


def specs_of_given(data):
    """The `tf.TensorSpec`s of a batch, `None` for what was not given."""
    return keras.tree.map_structure(
        lambda t: None if is_absent(t) else tf.TensorSpec(t.shape, t.dtype), data
    )


def symbols_of(specs):
    """The `keras.KerasTensor`s of a batch's specs, `None` for what was not given."""

    def symbol(leaf):
        if is_absent(leaf):
            return None
        return keras.KerasTensor(tuple(leaf.shape), keras.backend.standardize_dtype(leaf.dtype))

    return keras.tree.map_structure(symbol, specs)


def iterator_of(batches, spec):
    """The batches from a tf.data iterator of `spec`, so that their step is traced as the others.

    The batch size of a tensor is known when the step is traced, and Keras weights the loss of
    each of several outputs by it where it is.

    Args:
        batches: a list of batches as an iterator gave them.
        spec: the `element_spec` of that iterator.
    """

    def relaxed(tensor, spec):
        if isinstance(spec, tf.TensorSpec):
            # An operation by which TensorFlow forgets a size that it knows.
            return tf.compat.v1.placeholder_with_default(tensor, spec.shape)
        return tensor

    @tf.autograph.experimental.do_not_convert
    def all_relaxed(*batch):
        # A data set of tuples hands out their parts.
        return keras.tree.map_structure(
            relaxed, batch if isinstance(spec, tuple) else batch[0], spec
        )

    datasets = [tf.data.Dataset.from_tensors(batch).map(all_relaxed) for batch in batches]
    return iter(functools.reduce(lambda a, b: a.concatenate(b), datasets))
