"""A batch of examples: how many there are, some of them, and what is known of it in a trace."""

import keras
import tensorflow as tf


def batch_size(x):
    """N, from axis 0 of the first input: an int where it is known, else a scalar tensor."""
    first = next(t for t in keras.tree.flatten(x) if t is not None)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def known_size(x):
    """N where the trace (or a spec) tells it, else `None`."""
    first = next(t for t in keras.tree.flatten(x) if t is not None)
    return first.shape[0] if first.shape.rank else None


def mapped(function, *batches):
    """`function` of each tensor of a batch; `None` stays."""
    return keras.tree.map_structure(lambda *t: None if t[0] is None else function(*t), *batches)


def specs_of(batch):
    """A batch's tensors as a `tf.TensorSpec` each."""
    return mapped(lambda t: tf.TensorSpec(t.shape, t.dtype), batch)


def with_any_size(specs):
    """Specs of a batch of any number of examples."""
    return mapped(lambda s: tf.TensorSpec([None, *s.shape[1:]], s.dtype), specs)


def first_examples(tree, n):
    """The first n examples of a nested structure of tensors."""
    return keras.tree.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t)[:n], tree
    )


def takes_any_size(model):
    """Whether a model takes batches of any size, so that a few examples will do."""
    return all(t.shape[0] is None for t in getattr(model, "inputs", None) or [])
