"""Where operations that compute leave the examples: elementwise, reductions, products, images."""

from keras_rgd.per_example.mixing.following import LOST
from keras_rgd.per_example.mixing.following_rules import (
    all_joined,
    axes_of,
    given,
    joined,
    only,
    placed,
    registry,
)

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

RULES, rule = registry()


@rule(*_ELEMENTWISE)
def _elementwise(follower, op, inputs):
    rank = op.outputs[0].shape.rank
    places = []
    for i in placed(inputs):
        found, shape = inputs[i], op.inputs[i].shape
        if len(inputs) > 1:
            given(rank, shape.rank)
            moved = found.place._replace(axis=found.place.axis + rank - shape.rank)
            places.append((moved, found.follows))
        else:
            places.append((found.place, found.follows))
    return joined(places)


@rule("BiasAdd", "BiasAddV1")
def _bias(follower, op, inputs):
    return only(inputs, 0)


@rule("Select")
def _select(follower, op, inputs):
    # A condition of one axis chooses along axis 0.
    return all_joined(inputs)


@rule("LookupTableFindV2", "LookupTableFind")
def _table(follower, op, inputs):
    return only(inputs, 1)


@rule(*_REDUCTIONS)
def _reduction(follower, op, inputs):
    place, axes = only(inputs, 0), axes_of(follower, op.inputs[1], op.inputs[0].shape.rank)
    if place is LOST or place.axis in axes:
        return LOST
    if op.type not in ("ArgMax", "ArgMin") and op.get_attr("keep_dims"):
        return place
    return place._replace(axis=place.axis - sum(axis < place.axis for axis in axes))


def _matrix_labels(op, ranks, flips):
    """A product of matrices as an einsum: labels of both inputs and of the output."""
    batch = max(ranks) - 2
    lead = [f"b{i}" for i in range(batch)]
    labels = []
    for rank, matrix, flipped in zip(ranks, (["i", "j"], ["j", "k"]), flips, strict=True):
        labels.append(lead[batch - (rank - 2) :] + (matrix[::-1] if flipped else matrix))
    return labels, [*lead, "i", "k"]


@rule("MatMul")
def _matmul(follower, op, inputs):
    flips = [op.get_attr("transpose_a"), op.get_attr("transpose_b")]
    return _contracted(inputs, *_matrix_labels(op, [2, 2], flips))


@rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(follower, op, inputs):
    ranks = [t.shape.rank for t in op.inputs]
    given(*ranks)
    flips = [op.get_attr("adj_x"), op.get_attr("adj_y")]
    return _contracted(inputs, *_matrix_labels(op, ranks, flips))


@rule("Einsum")
def _einsum(follower, op, inputs):
    terms, out = op.get_attr("equation").decode().replace(" ", "").split("->")
    terms = terms.split(",")
    ranks = [t.shape.rank for t in op.inputs]
    given(*ranks)
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
    for i in placed(inputs):
        found = inputs[i]
        label = terms[i][found.place.axis]
        if terms[i].count(label) > 1 or label not in out:
            return LOST
        places.append((found.place._replace(axis=out.index(label)), found.follows))
    return joined(places)


@rule(*_ALONG_AXIS_0)
def _images(follower, op, inputs):
    place = only(inputs, 0)
    return place if place is not LOST and place.axis == 0 else LOST


@rule("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput")
def _transposed_convolution(follower, op, inputs):
    place = only(inputs, 2)
    return place if place is not LOST and place.axis == 0 else LOST


@rule("AvgPoolGrad", "AvgPool3DGrad")
def _average_gradient(follower, op, inputs):
    place = only(inputs, 1)
    return place if place is not LOST and place.axis == 0 else LOST


@rule("MaxPoolGrad", "MaxPool3DGrad", "MaxPoolGradGrad", "MaxPool3DGradGrad")
def _maximum_gradient(follower, op, inputs):
    place = all_joined(inputs)
    return place if place is not LOST and place.axis == 0 else LOST


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_normalization(follower, op, inputs):
    return (
        LOST if op.get_attr("is_training") else [only(inputs, 0)] + [None] * (len(op.outputs) - 1)
    )


@rule("MatrixSolve", "MatrixTriangularSolve", "BandedTriangularSolve")
def _solved(follower, op, inputs):
    place, rank = _elementwise(follower, op, inputs), op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    return LOST if place.axis >= rank - 2 else place


@rule(*_LAST)
def _last_axes(follower, op, inputs):
    place = all_joined(inputs)
    rank = op.inputs[0].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    return LOST if place.axis >= rank - _LAST[op.type] else place


@rule("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
def _cross_entropy(follower, op, inputs):
    place = all_joined(inputs)
    return place if place is not LOST and place.axis == 0 else LOST


@rule("L2Loss", "SegmentSum", "SegmentMean", "SegmentMax", "SegmentMin", "SegmentProd")
def _all(follower, op, inputs):
    return LOST


@rule("CTCLoss", "CTCLossV2")
def _ctc(follower, op, inputs):
    place = only(inputs, 0)
    return LOST if place is LOST or place.axis != 1 else [place._replace(axis=0), place]
