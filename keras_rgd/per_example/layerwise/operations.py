"""Which closed form a use of a weight has: one function for each kind of operation.

`_FORMS`, at the end of the file, is the list of what layerwise can read. Each function takes the
`uses.Use`, the operation's inputs, the gradient of the batch's loss at its output, both with the
examples along axis 0, and N to count work by; it returns a `forms.Form` or raises `NoFormError`.
"""

import math

import tensorflow as tf

from keras_rgd.per_example import single_operation
from keras_rgd.per_example.layerwise.convolutions import (
    Convolution,
    Depthwise,
    GroupedConvolution,
)
from keras_rgd.per_example.layerwise.forms import (
    Elementwise,
    Lookup,
    Mapped,
    NoFormError,
    Reshaped,
)
from keras_rgd.per_example.layerwise.functions import seen_inside
from keras_rgd.per_example.layerwise.products import contraction
from keras_rgd.per_example.vectorized_map import CRASH_UNCOMPILED, NOT_VECTORIZED, quiet

_LABELS = "abcdefghijklmopqrstuvwxyz"  # not n, which is for the examples


def form_of(use, gradient, dtype, n):
    """The `Form` of a use.

    Args:
        use: a `uses.Use`.
        gradient: of the batch's loss at `use.output`.
        dtype: in which to work.
        n: N, or a guess of it, to count work by.

    Returns:
        A `forms.Form`.

    Raises:
        NoFormError: the operation has no closed form for a weight as this one of its inputs, and
            `tf.vectorized_map` cannot run its derivative.
    """
    outer, inputs = use, list(use.op.inputs)
    if use.inside is not None:
        use, inputs, gradient = seen_inside(use, gradient)
    make = _FORMS.get(use.op.type, _mapped)
    inputs = [tf.cast(t, dtype) if t.dtype.is_floating else t for t in inputs]
    gradient = tf.cast(gradient, dtype)
    if use.blocks > 1:
        gradient = _examples_first(gradient, use.blocks)
        for number in use.example_inputs:
            inputs[number] = _examples_first(inputs[number], use.blocks)
    form = make(use, inputs, gradient, n)
    return form if use.shape == outer.shape else Reshaped(form, outer.shape)


def _examples_first(t, blocks):
    """Axis 0 from (blocks, N) to (N, blocks)."""
    t = tf.reshape(t, [blocks, -1, *t.shape[1:]])
    t = tf.transpose(t, [1, 0, *range(2, t.shape.rank)])
    return tf.reshape(t, [-1, *t.shape[2:]])


def _split(t, use):
    """The rows of each example on an axis of their own, (N * P, ...) as (N, P, ...).

    Untouched where P, `use.rows_per_example`, is 1.
    """
    if use.rows_per_example == 1:
        return t
    if None in t.shape[1:]:
        raise NoFormError("rows of unknown extent, several for each example")
    first = [use.n_examples, -1] if use.rows_per_example is None else [-1, use.rows_per_example]
    return tf.reshape(t, [*first, *t.shape[1:]])


def _matmul(use, inputs, gradient, n):
    if use.weight_input != 1 or use.op.get_attr("transpose_a"):
        raise NoFormError("a product with the weight on the left")
    t = "ba" if use.op.get_attr("transpose_b") else "ab"
    rows = use.shape[1 if t == "ba" else 0]
    x = inputs[0]
    x.set_shape([None, rows])  # the static shape after a reshape to (N * T, A) may not say A
    x, gradient = _split(x, use), _split(gradient, use)
    if use.rows_per_example == 1:
        return contraction("na", t, "nb", x, gradient, use, n)
    return contraction("npa", t, "npb", x, gradient, use, n)


def _batch_matmul(use, inputs, gradient, n):
    x = inputs[1 - use.weight_input]
    if use.rows_per_example != 1:
        raise NoFormError("several matrices of one example side by side along axis 0")
    adjoint = [use.op.get_attr("adj_x"), use.op.get_attr("adj_y")]
    ranks = [t.shape.rank for t in inputs]
    batch = max(ranks) - 2
    labels = []
    for rank, matrix, flipped in zip(ranks, ("ij", "jk"), adjoint, strict=True):
        lead = _batch_labels(batch)[batch - (rank - 2) :]
        labels.append(lead + (matrix[::-1] if flipped else matrix))
    weight, other = labels[use.weight_input], labels[1 - use.weight_input]
    return contraction(other, weight, _batch_labels(batch) + "ik", x, gradient, use, n)


def _batch_labels(count):
    return "n" + "pqrstuvw"[: count - 1] if count else ""


def _einsum(use, inputs, gradient, n):
    equation = use.op.get_attr("equation").decode()
    if "." in equation or len(inputs) != 2 or use.rows_per_example != 1:
        raise NoFormError(f"the contraction {equation}")
    labels, z = equation.replace(" ", "").split("->")
    labels = labels.split(",")
    weight, other = labels[use.weight_input], labels[1 - use.weight_input]
    rename = {z[0]: "n"}
    for label in dict.fromkeys(other + weight + z):
        if label not in rename:
            rename[label] = _LABELS[len(rename)]
    weight, other, z = ("".join(rename[c] for c in term) for term in (weight, other, z))
    return contraction(other, weight, z, inputs[1 - use.weight_input], gradient, use, n)


def _gather(use, inputs, gradient, n):
    axis = tf.get_static_value(use.op.inputs[2])
    if use.weight_input != 0 or axis != 0 or use.op.get_attr("batch_dims"):
        raise NoFormError("a lookup along another axis than 0")
    return _lookup(use, inputs[1], gradient, use.shape, n)


def _resource_gather(use, inputs, gradient, n):
    if use.op.get_attr("batch_dims"):
        raise NoFormError("a lookup along another axis than 0")
    return _lookup(use, inputs[1], gradient, use.shape, n)


def _lookup(use, index, gradient, shape, n):
    if index.shape.rank is None:
        raise NoFormError("a lookup of an unknown number of places")
    # How many entries of the table one example reads: its rows, times the rest of the index.
    places = index.shape[1:]
    known = places.is_fully_defined() and use.rows_per_example is not None
    split = [-1, use.rows_per_example * places.num_elements()] if known else [use.n_examples, -1]
    gradient = tf.reshape(gradient, [*split, math.prod(shape[1:])])
    return Lookup(tf.reshape(index, split), gradient, shape, n)


def _conv(use, inputs, gradient, n):
    if use.weight_input != 1:
        raise NoFormError("a convolution of the weight")
    return _convolution(use, inputs[0], gradient, n)


def _conv_transpose(use, inputs, gradient, n):
    if use.weight_input != 1:
        raise NoFormError("a convolution of the weight")
    return _convolution(use, gradient, inputs[2], n)


def _convolution(use, image, response, n):
    """The form of a kernel that slides over `image`, with `response` at each of its places.

    In a convolution the image is the input and the response the gradient at the output; in a
    transposed one, which is the derivative of a convolution by its input, the other way round.
    """
    op, shape = use.op, use.shape
    strides, dilations = list(op.get_attr("strides")), list(op.get_attr("dilations"))
    padding, layout = op.get_attr("padding").decode(), op.get_attr("data_format").decode()
    if padding == "EXPLICIT":
        raise NoFormError("a convolution with explicit padding")
    if layout in ("NCHW", "NCDHW"):
        last = [0, *range(2, image.shape.rank), 1]
        image, response = tf.transpose(image, last), tf.transpose(response, last)
        strides, dilations = ([a[0], *a[2:], 1] for a in (strides, dilations))
    steps_over = any(s > w for s, w in zip(strides[1:-1], shape[:-2], strict=True))
    if len(shape) == 5 and padding == "SAME" and steps_over:
        # On a CPU TensorFlow begins such a Conv3D inside the image, elsewhere at its edge.
        raise NoFormError("a convolution in three dimensions that leaves out entries")
    rest = (strides[1:-1], dilations[1:-1], padding, use.rows_per_example, n)
    groups = image.shape[-1] // shape[-2]
    if groups == 1:
        return Convolution(image, response, shape, *rest)
    if shape[-2] == 1:
        by_channel = [*shape[:-2], groups, shape[-1] // groups]
        return Reshaped(Depthwise(image, response, by_channel, *rest), shape)
    return GroupedConvolution(image, response, shape, *rest)


def _depthwise(use, inputs, gradient, n):
    op = use.op
    padding = op.get_attr("padding").decode()
    if use.weight_input != 1 or padding == "EXPLICIT" or op.get_attr("data_format") != b"NHWC":
        raise NoFormError("a depthwise convolution of this kind")
    strides, dilations = (list(op.get_attr(name))[1:-1] for name in ("strides", "dilations"))
    rest = (strides, dilations, padding, use.rows_per_example, n)
    return Depthwise(inputs[0], gradient, use.shape, *rest)


def _elementwise(derivative):
    def make(use, inputs, gradient, n):
        by_t = derivative(use.weight_input, inputs, gradient)
        if use.rows_per_example != 1:
            by_t = _split(by_t, use)
        return Elementwise(by_t, use.shape, n)

    return make


def _bias(use, inputs, gradient, n):
    if use.op.get_attr("data_format") == b"NCHW":
        gradient = tf.transpose(gradient, [0, *range(2, gradient.shape.rank), 1])
    return Elementwise(_split(gradient, use), use.shape, n)


def _by_tape(use, inputs, gradient, n):
    """Any other operation that works elementwise: its own derivative, by a tape around it."""
    function = getattr(tf.raw_ops, use.op.type)
    names = [argument.name for argument in use.op.op_def.input_arg]
    inputs[use.weight_input] = tf.broadcast_to(inputs[use.weight_input], tf.shape(use.output))
    with tf.GradientTape() as tape:
        tape.watch(inputs[use.weight_input])
        output = function(**dict(zip(names, inputs, strict=True)))
    by_t = tape.gradient(output, inputs[use.weight_input], gradient)
    by_t.set_shape(use.output.shape)
    return Elementwise(_split(by_t, use), use.shape, n)


def _the_same(weight_input, inputs, gradient):
    return gradient


def _times_other(weight_input, inputs, gradient):
    return gradient * inputs[1 - weight_input]


def _signed(weight_input, inputs, gradient):
    return -gradient if weight_input == 1 else gradient


def _mapped(use, inputs, gradient, n):
    """Any other operation: its vector-Jacobian product under `tf.vectorized_map`."""
    op = use.op
    if op.type in NOT_VECTORIZED | CRASH_UNCOMPILED or use.rows_per_example != 1:
        raise NoFormError(f"the operation {op.type}")

    def lane(example):
        own, at = example
        t = inputs[use.weight_input]
        given = list(inputs)
        for number, tensor in zip(use.example_inputs, own, strict=True):
            given[number] = tensor[None]
        with tf.GradientTape() as tape:
            tape.watch(t)
            output = single_operation.run(op, given)[0]
        return tf.convert_to_tensor(tape.gradient(output, t, at[None]))

    try:
        with quiet():
            rows = tf.vectorized_map(
                lane,
                (tuple(inputs[i] for i in use.example_inputs), gradient),
                fallback_to_while_loop=False,
            )
    except (ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise NoFormError(f"the operation {op.type}, which does not vectorize") from error
    return Mapped(tf.reshape(rows, [-1, math.prod(use.shape)]), use.shape, n)


_FORMS = {
    "MatMul": _matmul,
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "BatchMatMulV3": _batch_matmul,
    "Einsum": _einsum,
    "GatherV2": _gather,
    "ResourceGather": _resource_gather,
    "Conv2D": _conv,
    "Conv3D": _conv,
    "Conv2DBackpropInput": _conv_transpose,
    "Conv3DBackpropInputV2": _conv_transpose,
    "DepthwiseConv2dNative": _depthwise,
    "BiasAdd": _bias,
    "AddV2": _elementwise(_the_same),
    "Add": _elementwise(_the_same),
    "Sub": _elementwise(_signed),
    "Mul": _elementwise(_times_other),
    "BroadcastTo": _elementwise(_the_same),
    "Tile": _elementwise(_the_same),
    **dict.fromkeys(["RealDiv", "DivNoNan", "Maximum", "Minimum", "SquaredDifference"], _by_tape),
    **dict.fromkeys(["Pow", "SelectV2", "Xlogy", "Atan2"], _by_tape),
}
