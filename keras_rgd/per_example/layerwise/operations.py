"""Which closed form a use of a weight has: one function for each kind of operation.

`_FORMS`, at the end of the file, is the list of what layerwise can read. Each function takes the
`uses.Use`, the operation's inputs, the gradient of the batch's loss at its output, both with the
examples along axis 0, and N to count work by; it returns a `forms.Form` or raises `NoFormError`.
"""

import math

import tensorflow as tf

from keras_rgd.per_example import single_operation
from keras_rgd.per_example.layerwise.convolutions import Convolution, Depthwise
from keras_rgd.per_example.layerwise.forms import Elementwise, Lookup, Mapped, NoFormError
from keras_rgd.per_example.layerwise.products import Contraction
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
    make = _FORMS.get(use.op.type, _mapped)
    inputs = [tf.cast(t, dtype) if t.dtype.is_floating else t for t in use.op.inputs]
    gradient = tf.cast(gradient, dtype)
    if use.blocks > 1:
        gradient = _examples_first(gradient, use.blocks)
        for number in use.example_inputs:
            inputs[number] = _examples_first(inputs[number], use.blocks)
    return make(use, inputs, gradient, n)


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
        return _contraction("na", t, "nb", x, gradient, use, n)
    return _contraction("npa", t, "npb", x, gradient, use, n)


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
    return _contraction(other, weight, _batch_labels(batch) + "ik", x, gradient, use, n)


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
    return _contraction(other, weight, z, inputs[1 - use.weight_input], gradient, use, n)


def _contraction(x_labels, t_labels, z_labels, x, gradient, use, n):
    """The form of z = einsum(x, T), T the weight: as `Contraction` needs its factors.

    Each label falls in one of five groups: with "npa,ab->npb" (a dense layer over time) a is
    `left`, b is `right` and p is one of `places`; labels of all three tensors are `in_all` (a
    matrix of its own for each), and labels of x alone are `summed` first.
    """
    terms = (x_labels, t_labels, z_labels)
    name = f"the contraction {x_labels},{t_labels}->{z_labels}"
    if any(len(set(term)) != len(term) for term in terms) or "n" in t_labels:
        raise NoFormError(name)
    if x_labels[0] != "n" or z_labels[0] != "n":
        raise NoFormError("examples along another axis than 0")
    size = dict(zip(t_labels, use.shape, strict=True))
    for labels, t in ((x_labels, x), (z_labels, gradient)):
        for label, extent in zip(labels, t.shape, strict=True):
            if size.get(label) not in (None, extent):
                raise NoFormError("a weight that is broadcast in the product")
    in_all = [c for c in t_labels if c in x_labels and c in z_labels]
    left = [c for c in t_labels if c in x_labels and c not in z_labels]
    right = [c for c in t_labels if c in z_labels and c not in x_labels]
    places = [c for c in z_labels[1:] if c in x_labels and c not in t_labels]
    summed = [c for c in x_labels if c not in t_labels and c not in z_labels]
    seen = len(in_all) + len(left) + len(right)
    if seen != len(t_labels) or set(z_labels) - {"n", *t_labels, *x_labels}:
        raise NoFormError(name)
    if summed:
        x = tf.reduce_sum(x, [x_labels.index(c) for c in summed])
        x_labels = "".join(c for c in x_labels if c not in summed)
    arranged = [
        _arrange(t, labels, [in_all, places, last])
        for t, labels, last in ((x, x_labels, left), (gradient, z_labels, right))
    ]
    order = [*in_all, *left, *right]
    permutation = [order.index(c) for c in t_labels]
    straight = permutation == sorted(permutation)
    return Contraction(
        *arranged,
        use.shape,
        n,
        order=None if straight else permutation,
        split=None if straight else [size[c] for c in order],
    )


def _arrange(t, labels, groups):
    """A tensor with its axes as (N, *in_all, P, last), P and `last` each flattened to one axis.

    Without P where neither `places` nor `in_all` has a label.
    """
    in_all, places, last = groups
    order = [labels.index(c) for c in ["n", *in_all, *places, *last]]
    if order != sorted(order):
        t = tf.transpose(t, order)
    kept, rest = t.shape[1 : 1 + len(in_all)], t.shape[1 + len(in_all) :]
    p, flat = rest[: len(places)], rest[len(places) :].num_elements()
    if flat is None or not kept.is_fully_defined():
        raise NoFormError("a product over axes of unknown extent")
    if len(last) == 1 and (len(places) == 1 or not places and not in_all):
        return t
    if not places:
        return tf.reshape(t, [-1, *kept, 1, flat] if in_all else [-1, flat])
    if p.is_fully_defined():
        return tf.reshape(t, [-1, *kept, p.num_elements(), flat])
    return tf.reshape(t, [tf.shape(t)[0], *kept, -1, flat])


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
    if image.shape[-1] != shape[-2] or response.shape[-1] != shape[-1]:
        raise NoFormError("a convolution in groups")
    steps_over = any(s > w for s, w in zip(strides[1:-1], shape[:-2], strict=True))
    if len(shape) == 5 and padding == "SAME" and steps_over:
        # On a CPU TensorFlow begins such a Conv3D inside the image, elsewhere at its edge.
        raise NoFormError("a convolution in three dimensions that leaves out entries")
    return Convolution(
        image, response, shape, strides[1:-1], dilations[1:-1], padding, use.rows_per_example, n
    )


def _depthwise(use, inputs, gradient, n):
    op = use.op
    padding = op.get_attr("padding").decode()
    if use.weight_input != 1 or padding == "EXPLICIT" or op.get_attr("data_format") != b"NHWC":
        raise NoFormError("a depthwise convolution of this kind")
    arguments = dict(strides=list(op.get_attr("strides")), padding=padding)
    arguments["dilations"] = list(op.get_attr("dilations"))
    return Depthwise(inputs[0], gradient, use.shape, arguments, use.rows_per_example, n)


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
    if any(attr.type == "func" for attr in op.op_def.attr):
        raise NoFormError(f"an operation whose inside cannot be seen ({op.type})")
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
