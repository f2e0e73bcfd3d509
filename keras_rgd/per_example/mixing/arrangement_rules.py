"""Where operations that move entries leave the examples: reshapes, lookups, slices, lists."""

import numpy as np

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
from keras_rgd.per_example.mixing.places import reshaped

_ALONG_AN_AXIS = ["Cumsum", "Cumprod", "CumulativeLogsumexp", "ReverseV2", "Roll"]

RULES, rule = registry()


@rule("Reshape", "ExpandDims", "Squeeze")
def _reshape(follower, op, inputs):
    place, before, after = only(inputs, 0), op.inputs[0].shape, op.outputs[0].shape
    if place is LOST:
        return LOST
    given(before.rank, after.rank)
    return reshaped(place, before.as_list(), after.as_list(), follower.n) or LOST


@rule("Transpose", "ConjugateTranspose")
def _transpose(follower, op, inputs):
    place, order = only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    given(order)
    return place._replace(axis=[int(a) for a in order].index(place.axis))


@rule("GatherV2")
def _gather(follower, op, inputs):
    axis = follower.value(op.inputs[2])
    ranks = [t.shape.rank for t in op.inputs[:2]]
    given(axis, *ranks)
    batch = op.get_attr("batch_dims")
    batch, axis = batch % (ranks[1] + 1), int(axis) % ranks[0]
    places = []
    for i in placed(inputs[:2]):
        place, at = inputs[i].place, inputs[i].place.axis
        if i == 1:
            at = at if at < batch else at + axis - batch
        elif at == axis:
            return LOST
        elif at > axis:
            at += ranks[1] - batch - 1
        places.append((place._replace(axis=at), inputs[i].follows))
    return joined(places)


@rule("ResourceGather")
def _resource_gather(follower, op, inputs):
    return only(inputs, 1)


@rule("GatherNd", "ResourceGatherNd")
def _gather_nd(follower, op, inputs):
    place, rank = only(inputs, 1), op.inputs[1].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    return LOST if place.axis == rank - 1 else place


@rule("OneHot")
def _one_hot(follower, op, inputs):
    place, rank = only(inputs, 0), op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    axis = op.get_attr("axis") % rank
    return place._replace(axis=place.axis + (axis <= place.axis))


@rule("ConcatV2", "Concat")
def _concat(follower, op, inputs):
    which = len(inputs) - 1 if op.type == "ConcatV2" else 0
    axis, rank = follower.value(op.inputs[which]), op.outputs[0].shape.rank
    given(axis, rank)
    axis = int(axis) % rank
    tensors = [(t, f) for i, (t, f) in enumerate(zip(op.inputs, inputs, strict=True)) if i != which]
    place = joined([(f.place, f.follows) for _, f in tensors if f is not None and f.place])
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


@rule("Pack")
def _pack(follower, op, inputs):
    place = all_joined(inputs)
    rank = op.outputs[0].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    axis = op.get_attr("axis") % rank
    return place._replace(axis=place.axis + (axis <= place.axis))


@rule("Unpack")
def _unpack(follower, op, inputs):
    place, rank = only(inputs, 0), op.inputs[0].shape.rank
    if place is LOST:
        return LOST
    given(rank)
    axis = op.get_attr("axis") % rank
    return LOST if axis == place.axis else place._replace(axis=place.axis - (axis < place.axis))


@rule("Split", "SplitV")
def _split(follower, op, inputs):
    which, dimension = (1, 0) if op.type == "Split" else (0, 2)
    place, axis = only(inputs, which), follower.value(op.inputs[dimension])
    rank = op.inputs[which].shape.rank
    if place is LOST:
        return LOST
    given(axis, rank)
    if int(axis) % rank != place.axis:
        return place
    start, places = 0, []
    for t in op.outputs:
        length = t.shape[place.axis]
        given(length)
        places.append(_part(place, start, length, follower.n))
        start += length
    return places


def _part(place, start, length, n):
    """A slice of the axis of the examples: whole blocks of them, or LOST."""
    block = n * place.inner
    if start % block or length % block or not length:
        return LOST
    return place._replace(outer=length // block)


@rule("Slice")
def _slice(follower, op, inputs):
    place, begin = only(inputs, 0), follower.value(op.inputs[1])
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if place is LOST:
        return LOST
    given(after.rank)
    length = after[place.axis]
    given(length)
    if length == before[place.axis]:
        return place
    given(begin)
    return _part(place, int(begin[place.axis]), length, follower.n)


@rule("StridedSlice")
def _strided_slice(follower, op, inputs):
    place, shape = only(inputs, 0), op.inputs[0].shape
    begin, end, strides = (follower.value(t) for t in op.inputs[1:])
    if place is LOST:
        return LOST
    given(shape.rank, strides)
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
    given(begin, end, length)
    start = None if masks["begin"] & bit else int(begin[i])
    stop = None if masks["end"] & bit else int(end[i])
    start, stop, _ = slice(start, stop, 1).indices(length)
    part = _part(place, start, stop - start, n)
    return part if part is LOST else part._replace(axis=out)


@rule("Pad", "PadV2", "MirrorPad")
def _pad(follower, op, inputs):
    place, pads = only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    given(pads)
    return LOST if np.any(pads[place.axis]) else place


@rule("Tile")
def _tile(follower, op, inputs):
    place, multiples = only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST:
        return LOST
    given(multiples)
    return place._replace(outer=place.outer * int(multiples[place.axis]))


@rule("BroadcastTo")
def _broadcast(follower, op, inputs):
    place, ranks = only(inputs, 0), (op.inputs[0].shape.rank, op.outputs[0].shape.rank)
    if place is LOST:
        return LOST
    given(*ranks)
    return place._replace(axis=place.axis + ranks[1] - ranks[0])


@rule(*_ALONG_AN_AXIS)
def _along(follower, op, inputs):
    place, which = only(inputs, 0), 2 if op.type == "Roll" else 1
    axes = axes_of(follower, op.inputs[which], op.inputs[0].shape.rank)
    return LOST if place is LOST or place.axis in axes else place


@rule("ReverseSequence")
def _reverse_sequence(follower, op, inputs):
    place = only(inputs, 0)
    return LOST if place is LOST or place.axis != op.get_attr("batch_dim") else place


@rule("SpaceToBatchND", "BatchToSpaceND")
def _blocks(follower, op, inputs):
    place, block = only(inputs, 0), follower.value(op.inputs[1])
    if place is LOST or place.axis != 0:
        return LOST
    given(block)
    size = int(np.prod(block))
    if op.type == "SpaceToBatchND":
        return place._replace(outer=place.outer * size)
    return LOST if place.outer % size else place._replace(outer=place.outer // size)


# Lists of tensors, as loops keep them: their place is that of the examples in an element.


@rule("TensorListFromTensor")
def _list_of(follower, op, inputs):
    place = only(inputs, 0)
    return LOST if place is LOST or place.axis == 0 else place._replace(axis=place.axis - 1)


@rule("TensorListStack", "TensorListGather")
def _stacked(follower, op, inputs):
    place = only(inputs, 0)
    return LOST if place is LOST else [place._replace(axis=place.axis + 1)]


@rule("TensorListGetItem")
def _item(follower, op, inputs):
    return only(inputs, 0)


@rule("TensorListPopBack")
def _popped(follower, op, inputs):
    place = only(inputs, 0)
    return LOST if place is LOST else [place, place]


@rule("TensorListSetItem", "TensorListPushBack")
def _with_item(follower, op, inputs):
    return all_joined(inputs)


@rule("TensorListResize")
def _resized(follower, op, inputs):
    return only(inputs, 0)
