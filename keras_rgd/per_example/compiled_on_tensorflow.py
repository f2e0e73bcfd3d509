"""A function of a model and a batch as a graph function that leaves the model as it was."""

import tensorflow as tf

from keras_rgd.per_example.state import unchanged


def compiled(model, function):
    """`function`, traced; after each call the model is as before.

    Args:
        model: the model whose variables it reads and moves.
        function: a `functools.partial`. TensorFlow counts retracing by code object: a partial has
            none, and is counted alone.
    """
    traced = tf.function(function, reduce_retracing=True, autograph=False)

    def call(*arguments):
        with unchanged(model):
            return traced(*arguments)

    return call
