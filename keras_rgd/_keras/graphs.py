"""TensorFlow's traced graphs, and one function of TensorFlow exchanged for another."""

import contextlib

import tensorflow as tf


def new_graph(name):
    """A graph to trace in by `with graph.as_default()`, which is never run.

    Expected: `tf.__internal__.FuncGraph`, the graph of a `tf.function`: it takes variables and
    tensors from outside. Not `tf.function` itself, as the operations of one part of a forward pass
    are looked at before the next part is traced.
    """
    return tf.__internal__.FuncGraph(name)


def current_graph():
    """The graph that is traced at the moment.

    Expected: `tf.compat.v1.get_default_graph`. An operation made now has it as well, but is one.
    """
    return tf.compat.v1.get_default_graph()


def placeholder(like):
    """A tensor without a value in the graph that is traced at the moment.

    Expected: `tf.compat.v1.placeholder`, an operation without inputs, in any graph.

    Args:
        like: a tensor or a `tf.TensorSpec` of its shape and dtype.
    """
    return tf.compat.v1.placeholder(like.dtype, like.shape)


def handles_in(graph, variables):
    """The tensors by which the operations of a graph take `tf.Variable`s, one for each.

    Expected: a variable's `handle`, and `graph.capture`, which returns for it the one input by
    which all operations of the graph read and assign the variable, made now if it is new.
    """
    return [graph.capture(v.handle) for v in variables]


def function_graph(op, name):
    """The graph of a function that an operation calls by its name; `None` if it was not traced.

    Expected: `Graph._get_function`, what a graph knows of its functions; those that were traced
    have a `graph`, others, as in TensorFlow's CTC loss, have none.
    """
    return getattr(op.graph._get_function(name), "graph", None)


def has_gradient_of_its_own(op):
    """Whether an operation's gradient is another function's than its type's.

    Expected: the attribute `_gradient_op_type`, which `tf.custom_gradient` sets on the
    `IdentityN` of its outputs.
    """
    return "_gradient_op_type" in op.node_def.attr


@contextlib.contextmanager
def moments_exchanged(moments):
    """Inside, `tf.nn.moments` is another function, in every thread of this process.

    Expected: Keras's normalization layers look up `tf.nn.moments` as they are called. Where they
    would not, they hide the mean of a batch behind `tf.stop_gradient`, which
    `keras_rgd.geometry` looks for and refuses.
    """
    original = tf.nn.moments
    tf.nn.moments = moments
    try:
        yield
    finally:
        tf.nn.moments = original
