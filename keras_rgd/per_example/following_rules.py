"""Where each kind of operation leaves the examples of a batch.

A rule takes the `Follower`, the operation and a `Found` or `None` for each input, and returns the
place of the examples in the outputs: one `Place` for all, or a list; LOST where the operation
reduces, permutes, slices or contracts along the examples. It raises `UnknownError` where sizes or
indices that it would need are not known.
"""

import numpy as np

from keras_rgd.per_example.following import LOST
from keras_rgd.per_example.places import UnknownError, agreed, reshaped

_ELEMENTWISE = """
Abs Acos Acosh Add AddN AddV2 Angle ApproximateEqual Asin Asinh Atan Atan2 Atanh Betainc BitwiseAnd
BitwiseOr BitwiseXor Cast Ceil CheckNumerics ClipByValue Complex ComplexAbs Conj Cos Cosh Digamma
Div DivNoNan Elu EluGrad EnsureShape Equal Erf Erfc Erfinv Exp Expm1 FakeQuantWithMinMaxArgs Floor
FloorDiv FloorMod Greater GreaterEqual Igamma Igammac Imag Inv InvGrad Invert IsFinite IsInf IsNan
LeakyRelu LeakyReluGrad LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot LogicalOr
Maximum Minimum Mod Mul MulNoNan Ndtri Neg NextAfter NotEqual Polygamma Pow PreventGradient Real
RealDiv Reciprocal ReciprocalGrad Relu Relu6 Relu6Grad ReluGrad RightShift Rint Round Rsqrt
RsqrtGrad SelectV2 Selu SeluGrad Sigmoid SigmoidGrad Sign Sin Sinh Softplus SoftplusGrad Softsign
SoftsignGrad Sqrt SqrtGrad Square SquaredDifference Sub Tan Tanh TanhGrad TruncateDiv TruncateMod
Xdivy Xlog1py Xlogy Zeta
AsString StaticRegexReplace StringLower StringStrip StringToHashBucketFast StringToNumber
StringUpper
""".split()

# Images (N, ...): each is worked on alone.
_ALONG_AXIS_0 = """
AvgPool AvgPool3D Conv2D Conv3D DepthwiseConv2dNative DepthToSpace Dilation2D ExtractImagePatches
LRN MaxPool MaxPool3D ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor SpaceToDepth
AdjustContrastv2 AdjustHue AdjustSaturation ExtractVolumePatches FractionalAvgPool
FractionalMaxPool HSVToRGB ImageProjectiveTransformV3 RGBToHSV
""".split()

# The last axes are a matrix or a vector.
_LAST = {
    **dict.fromkeys(["LogSoftmax", "Softmax", "FFT", "IFFT", "RFFT", "IRFFT", "TopKV2"], 1),
    **dict.fromkeys(["MatrixDiag", "MatrixDiagV3"], 1),
    **dict.fromkeys(["FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D", "MatrixBandPart"], 2),
    **dict.fromkeys(["MatrixDiagPart", "MatrixDiagPartV3", "MatrixSetDiag", "Cholesky"], 2),
    **dict.fromkeys(["MatrixDeterminant", "LogMatrixDeterminant", "MatrixExponential"], 2),
    **dict.fromkeys(["MatrixInverse", "MatrixSquareRoot", "Qr", "SelfAdjointEigV2", "Svd"], 2),
}

_REDUCTIONS = """
All Any ArgMax ArgMin EuclideanNorm Max Mean Min Prod Sum
""".split()

_ALONG_AN_AXIS = ["Cumsum", "Cumprod", "CumulativeLogsumexp", "ReverseV2", "Roll"]

RULES = {}


def _rule(*names):
    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _given(*values):
    """Raise `UnknownError` unless all values are known."""
    if any(value is None for value in values):
        raise UnknownError


def _placed(inputs):
    return [i for i, found in enumerate(inputs) if found is not None and found.place is not None]


def _only(inputs, index):
    """The place of one input where no other follows weights with a place of its own, or LOST."""
    for i in _placed(inputs):
        if i != index and inputs[i].follows:
            return LOST
    found = inputs[index]
    return LOST if found is None or found.place is None else found.place


def _joined(places):
    place, agree = agreed(places)
    return place if agree and place is not None else LOST


def _all_joined(inputs):
    return _joined([(inputs[i].place, inputs[i].follows) for i in _placed(inputs)])


@_rule(*_ELEMENTWISE)
def _elementwise(follower, op, inputs):
    rank = op.outputs[0].shape.rank
    places = []
    for i in _placed(inputs):
        found, shape = inputs[i], op.inputs[i].shape
        if len(inputs) > 1:
            _given(rank, shape.rank)
            moved = found.place._replace(axis=found.place.axis + rank - shape.rank)
            places.append((moved, found.follows))
        else:
            places.append((found.place, found.follows))
    return _joined(places)


@_rule("BiasAdd", "BiasAddV1")
def _bias(follower, op, inputs):
    return _only(inputs, 0)


@_rule("Select")
def _select(follower, op, inputs):
    # A condition of one axis chooses along axis 0.
    return _all_joined(inputs)


@_rule("LookupTableFindV2", "LookupTableFind")
def _table(follower, op, inputs):
    return _only(inputs, 1)


def _axes(follower, tensor, rank):
    value = follower.value(tensor)
    _given(value, rank)
    return {int(axis) % rank for axis in np.reshape(value, -1)} if rank else set()


@_rule(*_REDUCTIONS)
def _reduction(follower, op, inputs):
    place, axes = _only(inputs, 0), _axes(follower, op.inputs[1], op.inputs[0].shape.rank)
    if place is LOST or place.axis in axes:
        return LOST
    if op.type not in ("ArgMax", "ArgMin") and op.get_attr("keep_dims"):
        return place
    return place._replace(axis=place.axis - sum(axis < place.axis for axis in axes))


@_rule("Reshape", "ExpandDims", "Squeeze")
def _reshape(follower, op, inputs):
    place, before, after = _only(inputs, 0), op.inputs[0].shape, op.outputs[0].shape
    if place is LOST:
        return LOST
    _given(before.rank, after.rank)
    return reshaped(place, before.as_list(), after.as_list(), follower.n) or LOST


@_rule("Transpose", "ConjugateTranspose")
def _transpose(follower, op, inputs):
    place, order = _only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    _given(order)
    return place._replace(axis=[int(a) for a in order].index(place.axis))


def _matrix_labels(op, ranks, flips):
    """A product of matrices as an einsum: labels of both inputs and of the output."""
    batch = max(ranks) - 2
    lead = [f"b{i}" for i in range(batch)]
    labels = []
    for rank, matrix, flipped in zip(ranks, (["i", "j"], ["j", "k"]), flips, strict=True):
        labels.append(lead[batch - (rank - 2) :] + (matrix[::-1] if flipped else matrix))
    return labels, [*lead, "i", "k"]


@_rule("MatMul")
def _matmul(follower, op, inputs):
    flips = [op.get_attr("transpose_a"), op.get_attr("transpose_b")]
    return _contracted(inputs, *_matrix_labels(op, [2, 2], flips))


@_rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(follower, op, inputs):
    ranks = [t.shape.rank for t in op.inputs]
    _given(*ranks)
    flips = [op.get_attr("adj_x"), op.get_attr("adj_y")]
    return _contracted(inputs, *_matrix_labels(op, ranks, flips))


@_rule("Einsum")
def _einsum(follower, op, inputs):
    terms, out = op.get_attr("equation").decode().replace(" ", "").split("->")
    terms = terms.split(",")
    ranks = [t.shape.rank for t in op.inputs]
    _given(*ranks)
    # As many labels as the longest ellipsis has axes, counted from the right.
    longest = max(r - len(t.replace("...", "")) for r, t in zip(ranks, terms, strict=True))

    def labels(term, rank):
        before, dots, after = term.partition("...")
        width = rank - len(before) - len(after) if dots else 0
        return [*before, *(f"dot{longest - width + i}" for i in range(width)), *after]

    out_rank = len(out.replace("...", "")) + (longest if "..." in out else 0)
    terms = [labels(t, r) for t, r in zip(terms, ranks, strict=True)]
    return _contracted(inputs, terms, labels(out, out_rank))


def _contracted(inputs, terms, out):
    """Where the examples lie in a product summed over the labels that the output has not."""
    places = []
    for i in _placed(inputs):
        found = inputs[i]
        label = terms[i][found.place.axis]
        if terms[i].count(label) > 1 or label not in out:
            return LOST
        places.append((found.place._replace(axis=out.index(label)), found.follows))
    return _joined(places)


@_rule(*_ALONG_AXIS_0)
def _images(follower, op, inputs):
    place = _only(inputs, 0)
    return place if place is not LOST and place.axis == 0 else LOST


@_rule("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput")
def _transposed_convolution(follower, op, inputs):
    place = _only(inputs, 2)
    return place if place is not LOST and place.axis == 0 else LOST


@_rule("AvgPoolGrad", "AvgPool3DGrad")
def _average_gradient(follower, op, inputs):
    place = _only(inputs, 1)
    return place if place is not LOST and place.axis == 0 else LOST


@_rule("MaxPoolGrad", "MaxPool3DGrad", "MaxPoolGradGrad", "MaxPool3DGradGrad")
def _maximum_gradient(follower, op, inputs):
    place = _all_joined(inputs)
    return place if place is not LOST and place.axis == 0 else LOST


@_rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_normalization(follower, op, inputs):
    return (
        LOST if op.get_attr("is_training") else [_only(inputs, 0)] + [None] * (len(op.outputs) - 1)
    )


@_rule("MatrixSolve", "MatrixTriangularSolve", "BandedTriangularSolve")
def _solved(follower, op, inputs):
    place, rank = _elementwise(follower, op, inputs), op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    return LOST if place.axis >= rank - 2 else place


@_rule(*_LAST)
def _last_axes(follower, op, inputs):
    place = _all_joined(inputs)
    rank = op.inputs[0].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    return LOST if place.axis >= rank - _LAST[op.type] else place


@_rule("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
def _cross_entropy(follower, op, inputs):
    place = _all_joined(inputs)
    return place if place is not LOST and place.axis == 0 else LOST


@_rule("L2Loss", "SegmentSum", "SegmentMean", "SegmentMax", "SegmentMin", "SegmentProd")
def _all(follower, op, inputs):
    return LOST


@_rule("GatherV2")
def _gather(follower, op, inputs):
    axis = follower.value(op.inputs[2])
    ranks = [t.shape.rank for t in op.inputs[:2]]
    _given(axis, *ranks)
    batch = op.get_attr("batch_dims")
    batch, axis = batch % (ranks[1] + 1), int(axis) % ranks[0]
    places = []
    for i in _placed(inputs[:2]):
        place, at = inputs[i].place, inputs[i].place.axis
        if i == 1:
            at = at if at < batch else at + axis - batch
        elif at == axis:
            return LOST
        elif at > axis:
            at += ranks[1] - batch - 1
        places.append((place._replace(axis=at), inputs[i].follows))
    return _joined(places)


@_rule("ResourceGather")
def _resource_gather(follower, op, inputs):
    return _only(inputs, 1)


@_rule("GatherNd", "ResourceGatherNd")
def _gather_nd(follower, op, inputs):
    place, rank = _only(inputs, 1), op.inputs[1].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    return LOST if place.axis == rank - 1 else place


@_rule("OneHot")
def _one_hot(follower, op, inputs):
    place, rank = _only(inputs, 0), op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    axis = op.get_attr("axis") % rank
    return place._replace(axis=place.axis + (axis <= place.axis))


@_rule("ConcatV2", "Concat")
def _concat(follower, op, inputs):
    which = len(inputs) - 1 if op.type == "ConcatV2" else 0
    axis, rank = follower.value(op.inputs[which]), op.outputs[0].shape.rank
    _given(axis, rank)
    axis = int(axis) % rank
    tensors = [(t, f) for i, (t, f) in enumerate(zip(op.inputs, inputs, strict=True)) if i != which]
    place = _joined([(f.place, f.follows) for _, f in tensors if f is not None and f.place])
    if place is LOST or place.axis != axis:
        return place
    # The same examples again, block after block.
    outer = 0
    for _, found in tensors:
        same = found is not None and found.place is not None
        if not same or found.place._replace(outer=1) != place._replace(outer=1):
            return LOST
        outer += found.place.outer
    return place._replace(outer=outer)


@_rule("Pack")
def _pack(follower, op, inputs):
    place = _all_joined(inputs)
    rank = op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    axis = op.get_attr("axis") % rank
    return place._replace(axis=place.axis + (axis <= place.axis))


@_rule("Unpack")
def _unpack(follower, op, inputs):
    place, rank = _only(inputs, 0), op.inputs[0].shape.rank
    if place is LOST:
        return LOST
    _given(rank)
    axis = op.get_attr("axis") % rank
    return LOST if axis == place.axis else place._replace(axis=place.axis - (axis < place.axis))


@_rule("Split", "SplitV")
def _split(follower, op, inputs):
    which, dimension = (1, 0) if op.type == "Split" else (0, 2)
    place, axis = _only(inputs, which), follower.value(op.inputs[dimension])
    rank = op.inputs[which].shape.rank
    if place is LOST:
        return LOST
    _given(axis, rank)
    if int(axis) % rank != place.axis:
        return place
    start, places = 0, []
    for t in op.outputs:
        length = t.shape[place.axis]
        _given(length)
        places.append(_part(place, start, length, follower.n))
        start += length
    return places


def _part(place, start, length, n):
    """A slice of the axis of the examples: whole blocks of them, or LOST."""
    block = n * place.inner
    if start % block or length % block or not length:
        return LOST
    return place._replace(outer=length // block)


@_rule("Slice")
def _slice(follower, op, inputs):
    place, begin = _only(inputs, 0), follower.value(op.inputs[1])
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if place is LOST:
        return LOST
    _given(after.rank)
    length = after[place.axis]
    _given(length)
    if length == before[place.axis]:
        return place
    _given(begin)
    return _part(place, int(begin[place.axis]), length, follower.n)


@_rule("StridedSlice")
def _strided_slice(follower, op, inputs):
    place, shape = _only(inputs, 0), op.inputs[0].shape
    begin, end, strides = (follower.value(t) for t in op.inputs[1:])
    if place is LOST:
        return LOST
    _given(shape.rank, strides)
    masks = {
        name: int(op.get_attr(f"{name}_mask"))
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    axis, out = 0, 0
    for i in range(len(strides)):
        bit = 1 << i
        if masks["ellipsis"] & bit:
            rest = range(i + 1, len(strides))
            width = shape.rank - axis - sum(not masks["new_axis"] & (1 << j) for j in rest)
            if axis <= place.axis < axis + width:
                return place._replace(axis=out + place.axis - axis)
            axis, out = axis + width, out + width
        elif masks["new_axis"] & bit:
            out += 1
        elif masks["shrink_axis"] & bit:
            if axis == place.axis:
                return LOST
            axis += 1
        elif axis == place.axis:
            return _range_of(place, shape[axis], begin, end, strides, masks, i, follower.n, out)
        else:
            axis, out = axis + 1, out + 1
    return place._replace(axis=out + place.axis - axis)


def _range_of(place, length, begin, end, strides, masks, i, n, out):
    bit, stride = 1 << i, int(strides[i])
    if stride != 1:
        return LOST
    if masks["begin"] & bit and masks["end"] & bit:
        return place._replace(axis=out)
    _given(begin, end, length)
    start = None if masks["begin"] & bit else int(begin[i])
    stop = None if masks["end"] & bit else int(end[i])
    start, stop, _ = slice(start, stop, 1).indices(length)
    part = _part(place, start, stop - start, n)
    return part if part is LOST else part._replace(axis=out)


@_rule("Pad", "PadV2", "MirrorPad")
def _pad(follower, op, inputs):
    place, pads = _only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    _given(pads)
    return LOST if np.any(pads[place.axis]) else place


@_rule("Tile")
def _tile(follower, op, inputs):
    place, multiples = _only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    _given(multiples)
    return place._replace(outer=place.outer * int(multiples[place.axis]))


@_rule("BroadcastTo")
def _broadcast(follower, op, inputs):
    place, ranks = _only(inputs, 0), (op.inputs[0].shape.rank, op.outputs[0].shape.rank)
    if place is LOST:
        return LOST
    _given(*ranks)
    return place._replace(axis=place.axis + ranks[1] - ranks[0])


@_rule(*_ALONG_AN_AXIS)
def _along(follower, op, inputs):
    place, which = _only(inputs, 0), 2 if op.type == "Roll" else 1
    axes = _axes(follower, op.inputs[which], op.inputs[0].shape.rank)
    return LOST if place is LOST or place.axis in axes else place


@_rule("ReverseSequence")
def _reverse_sequence(follower, op, inputs):
    place = _only(inputs, 0)
    return LOST if place is LOST or place.axis != op.get_attr("batch_dim") else place


@_rule("SpaceToBatchND", "BatchToSpaceND")
def _blocks(follower, op, inputs):
    place, block = _only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST or place.axis != 0:
        return LOST
    _given(block)
    size = int(np.prod(block))
    if op.type == "SpaceToBatchND":
        return place._replace(outer=place.outer * size)
    return LOST if place.outer % size else place._replace(outer=place.outer // size)


@_rule("CTCLoss", "CTCLossV2")
def _ctc(follower, op, inputs):
    place = _only(inputs, 0)
    return LOST if place is LOST or place.axis != 1 else [place._replace(axis=0), place]


# Lists of tensors, as loops keep them: the place is that of an element.


@_rule("TensorListFromTensor")
def _list_of(follower, op, inputs):
    place = _only(inputs, 0)
    return LOST if place is LOST or place.axis == 0 else place._replace(axis=place.axis - 1)


@_rule("TensorListStack", "TensorListGather")
def _stacked(follower, op, inputs):
    place = _only(inputs, 0)
    return LOST if place is LOST else [place._replace(axis=place.axis + 1)]


@_rule("TensorListGetItem")
def _item(follower, op, inputs):
    return _only(inputs, 0)


@_rule("TensorListPopBack")
def _popped(follower, op, inputs):
    place = _only(inputs, 0)
    return LOST if place is LOST else [place, place]


@_rule("TensorListSetItem", "TensorListPushBack")
def _with_item(follower, op, inputs):
    return _all_joined(inputs)


@_rule("TensorListResize")
def _resized(follower, op, inputs):
    return _only(inputs, 0)
