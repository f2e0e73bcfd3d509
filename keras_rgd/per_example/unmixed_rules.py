"""Which axis is that of the examples, before and after each of JAX's primitives.

`RULES`, at the end, has a function for each primitive that can keep examples apart. It takes the
equation, the axis of the examples in its output, N, and the operands that depend on the vector that
is pushed, by their places; and gives the axis in each of those, or `ENTERS`.
"""

import math

# What a rule says of an operand that an equation repeats for every example, or of an equation
# from which on examples can be followed, and not before it: it is an output of A.
ENTERS = object()


def _elementwise(equation, axis, n, linear):
    shape, axes = equation.outvars[0].aval.shape, {}
    for j, operand in linear.items():
        given = operand.aval.shape
        if len(given) not in (0, len(shape)):
            return ENTERS
        axes[j] = axis if given and given[axis] == n else ENTERS
    return axes


def _transposed(equation, axis, n, linear):
    return {0: equation.params["permutation"][axis]}


def _reshaped(equation, axis, n, linear):
    shape, given = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
    before = math.prod(shape[:axis])
    same = [j for j, size in enumerate(given) if size == n and math.prod(given[:j]) == before]
    return {0: same[0]} if same else ENTERS


def _broadcast(equation, axis, n, linear):
    places = equation.params["broadcast_dimensions"]
    operand = equation.invars[0].aval.shape
    repeats = axis not in places or operand[places.index(axis)] != n
    return ENTERS if repeats else {0: places.index(axis)}


def _without(name):
    """An equation that takes axes of its operand away, those of its parameter `name`."""

    def rule(equation, axis, n, linear):
        gone = equation.params[name]
        return {0: [j for j in range(equation.invars[0].aval.ndim) if j not in gone][axis]}

    return rule


def _along_others(name):
    """An equation that works along other axes: that, or those, of its parameter `name`."""

    def rule(equation, axis, n, linear):
        along = equation.params[name]
        along = along if isinstance(along, tuple) else (along,)
        return ENTERS if axis in along else dict.fromkeys(linear, axis)

    return rule


def _whole(equation, axis, n, linear):
    """A piece of an operand, or one put into it, that has all of the examples."""
    shapes = [v.aval.shape for v in [*equation.invars, *equation.outvars] if v.aval.ndim]
    return dict.fromkeys(linear, axis) if all(s[axis] == n for s in shapes) else ENTERS


def _stacked(equation, axis, n, linear):
    new = equation.params["axis"]
    return ENTERS if axis == new else dict.fromkeys(linear, axis - (axis > new))


def _unstacked(equation, axis, n, linear):
    return {0: axis + (axis >= equation.params["axis"])}


def _tiled(equation, axis, n, linear):
    return {0: axis} if equation.params["reps"][axis] == 1 else ENTERS


def _padded(equation, axis, n, linear):
    kept = tuple(equation.params["padding_config"][axis]) == (0, 0, 0)
    return {0: axis} if kept and list(linear) == [0] else ENTERS


def _pooled(equation, axis, n, linear):
    alone = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0)}
    alone |= {"base_dilation": 1, "window_dilation": 1}
    given = {name: equation.params[name][axis] for name in alone}
    given["padding"] = tuple(given["padding"])
    return dict.fromkeys(linear, axis) if given == alone else ENTERS


def _dot_general(equation, axis, n, linear):
    sums, batches = equation.params["dimension_numbers"]
    if axis < len(batches[0]):
        return {j: batch[axis] for j, batch in enumerate(batches)}
    left, right = (
        [j for j in range(v.aval.ndim) if j not in (*s, *b)]
        for v, s, b in zip(equation.invars, sums, batches, strict=True)
    )
    place = axis - len(batches[0])
    side = 0 if place < len(left) else 1
    return {side: [*left, *right][place]} if list(linear) == [side] else ENTERS


def _convolution(equation, axis, n, linear):
    numbers = equation.params["dimension_numbers"]
    by_example = axis == numbers.out_spec[0] and equation.params["batch_group_count"] == 1
    return {0: numbers.lhs_spec[0]} if by_example and list(linear) == [0] else ENTERS


def _gather(equation, axis, n, linear):
    numbers = equation.params["dimension_numbers"]
    if axis not in numbers.offset_dims:
        return ENTERS
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    place = [j for j in range(len(shape)) if j not in gone][numbers.offset_dims.index(axis)]
    return {0: place} if sizes[place] == n == shape[place] else ENTERS


_ELEMENTWISE = """add add_any convert_element_type copy copy_p device_put div layout_constraint
mul name neg reduce_precision reshard select_n sharding_constraint sub"""

RULES = dict.fromkeys(_ELEMENTWISE.split(), _elementwise) | {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along_others("dimension"),
    "conv_general_dilated": _convolution,
    "cumsum": _along_others("axis"),
    "dot_general": _dot_general,
    "dynamic_slice": _whole,
    "dynamic_update_slice": _whole,
    "gather": _gather,
    "pad": _padded,
    "reduce_sum": _without("axes"),
    "reduce_window_sum": _pooled,
    "reshape": _reshaped,
    "rev": _along_others("dimensions"),
    "select_and_gather_add": _pooled,
    "slice": _whole,
    "split": _along_others("axis"),
    "squeeze": _without("dimensions"),
    "stack": _stacked,
    "tile": _tiled,
    "transpose": _transposed,
    "unstack": _unstacked,
}
