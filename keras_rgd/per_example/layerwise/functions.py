"""Functions that a forward pass calls, where one operation is all that they do."""

import dataclasses
import math

import tensorflow as tf

from keras_rgd._keras.graphs import function_graph
from keras_rgd.per_example.layerwise.forms import NoFormError

# Operations that call a function, and those in it that leave a tensor's entries where they are.
CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_LEAVE = {"Cast", "ExpandDims", "Identity", "ReadVariableOp", "Squeeze"}


@dataclasses.dataclass(frozen=True)
class Called:
    """The one operation of a function that computes something.

    Keras compiles convolutions in groups by themselves, as a function with one Conv2D in it.

    Attributes:
        op: the operation.
        places: for each of its inputs the number of the function's argument that it is, but for
            axes of length 1.
    """

    op: tf.Operation
    places: tuple


def holds_others(op):
    """Whether an operation runs others: a call, a loop, a branch."""
    return any("func" in attr.type for attr in op.op_def.attr)


def called(op, read):
    """The `Called` of a call whose first output is one operation of its inputs, else `None`.

    TensorFlow adds what the backward pass needs to the outputs; the forward pass must not read it.

    Args:
        op: the operation.
        read: the names of the tensors that the forward pass reads.
    """
    graph = function_graph(op, op.get_attr("f").name) if op.type in CALLS else None
    if graph is None or not graph.outputs or any(t.name in read for t in op.outputs[1:]):
        return None
    number = {t.name: i for i, t in enumerate(graph.inputs)}

    def source(t):
        while t.op.type in _LEAVE:
            t = t.op.inputs[0]
        return t

    inner = source(graph.outputs[0]).op
    sources = [source(t).name for t in inner.inputs]
    if not sources or any(name not in number for name in sources):
        return None
    return Called(inner, tuple(number[name] for name in sources))


def seen_inside(use, gradient):
    """A use by a call as that of the operation in the function.

    Args:
        use: a `uses.Use` with a `Called`.
        gradient: of the batch's loss at its output.

    Returns:
        The use, its operation's inputs and the gradient, with the axes of length 1 that they have
        inside of the function.

    Raises:
        NoFormError: the operation is no convolution.
    """
    op, places = use.inside.op, use.inside.places
    if op.type not in ("Conv2D", "Conv3D") or use.blocks > 1:
        raise NoFormError(f"a function with the operation {op.type}")
    weight_input = places.index(use.weight_input)
    shape = op.inputs[weight_input].shape.as_list()
    if None in shape or math.prod(shape) != math.prod(use.shape):
        raise NoFormError("a function of a weight of unknown shape")
    inner = dataclasses.replace(
        use,
        op=op,
        inside=None,
        weight_input=weight_input,
        shape=shape,
        example_inputs=tuple(j for j, i in enumerate(places) if i in use.example_inputs),
    )
    inputs = [_as_inside(use.op.inputs[i], t) for i, t in zip(places, op.inputs, strict=True)]
    return inner, inputs, _as_inside(gradient, op.outputs[0])


def _as_inside(t, like):
    if t.dtype == tf.resource:
        # The kernel's variable, of which a convolution's form asks the shape alone.
        return tf.zeros(like.shape)
    if t.shape.rank == like.shape.rank:
        return t
    rest = like.shape[1:] if t.shape[0] is None or like.shape[0] is None else like.shape
    if not rest.is_fully_defined():
        raise NoFormError("a function of a tensor of unknown extent")
    return tf.reshape(t, [*([-1] if rest.rank < like.shape.rank else []), *rest])
