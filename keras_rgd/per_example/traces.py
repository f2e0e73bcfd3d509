"""Traces: the specs that one is made for, and those that are made to be looked at."""

import contextlib
import gc

import tensorflow as tf


def with_any_size(specs):
    """Specs of a batch of any number of examples."""
    return specs.mapped(lambda s: tf.TensorSpec([None, *s.shape[1:]], s.dtype))


@contextlib.contextmanager
def forgotten():
    """A graph made inside is garbage in cycles: collect it, so that the step's has its memory."""
    # What was there before need not be looked through, which takes long in a large process.
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()
