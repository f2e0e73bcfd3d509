"""Where no example enters another's loss: the Jacobian of the losses as a product of two.

The weights enter the examples by what layers make of them and of their inputs: x_i W, or a bias
that is repeated for every example. A is the derivative of those along the weights. From there on
row i reaches the loss f_i and no other, so that one backward pass through the rest, of all losses
at once, gives the cotangent of every row, delta_i. Then with the examples' rows of A v

    <g_i, v> = <(A v)_i, delta_i>,    sum_i w_i g_i = A^T (w_i delta_i),

and neither takes another pass through the rest. Which axis of a tensor is that of the examples is
followed through the traced linear function, back from the losses. What an equation is not known
to keep apart is put into A: that is as exact, and costs no more while A and B share no equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_rgd._support import jaxprs
from keras_rgd._support.vectors import Tensor, Vector


class Unmixed:
    """J = B A for a batch whose examples do not mix.

    Args:
        linear: the function v -> J v, traced, without calls.
        axes: the axis of the examples in each output of A, see `_axes`.
        n_examples: N.
    """

    def __init__(self, linear: Any, axes: dict[Any, int], n_examples: int):
        self._equations = linear.jaxpr.eqns
        self._weights, (self._losses,) = linear.jaxpr.invars, linear.jaxpr.outvars
        self._known = dict(zip(linear.jaxpr.constvars, linear.consts, strict=True))
        self._outputs, self._axes = list(axes), list(axes.values())
        self._n = n_examples
        reached = _reached(linear.jaxpr)
        for equation in self._equations:
            if not any(v in reached for v in equation.outvars):
                self._run(equation, self._known, {})
        self._before, self._after = self._split(reached)

    @property
    def saves_passes(self) -> bool:
        """Whether A and B share no equation, so that both take no longer than J."""
        return not set(self._before) & set(self._after)

    def _split(self, reached):
        """The places of the equations of A and of those of B, in their order."""
        before, after = [], []
        ours, theirs = set(self._outputs), {self._losses} - set(self._outputs)
        for place in range(len(self._equations))[::-1]:
            equation = self._equations[place]
            linear = jaxprs.operands_in(equation, reached)
            if theirs.intersection(equation.outvars):
                after.append(place)
                for j, v in linear.items():
                    if (place, j) in self._outputs:
                        ours.add(v)
                    elif v not in self._outputs:
                        theirs.add(v)
            if ours.intersection(equation.outvars):
                before.append(place)
                ours.update(linear.values())
        return before[::-1], after[::-1]

    def before(self, *v: Tensor) -> list[Tensor]:
        """A v."""
        env = self._known | dict(zip(self._weights, v, strict=True))
        for place in self._before:
            self._run(self._equations[place], env, {})
        return [self._output(key, env) for key in self._outputs]

    def _output(self, key, env):
        if not isinstance(key, tuple):
            return env[key]
        place, j = key
        equation = self._equations[place]
        return jnp.broadcast_to(env[equation.invars[j]], equation.outvars[0].aval.shape)

    def after(self, *rows: Tensor) -> Tensor:
        """B of what A gives, shape (N,)."""
        given = dict(zip(self._outputs, rows, strict=True))
        env = self._known | given
        for place in self._after:
            equation = self._equations[place]
            places = range(len(equation.invars))
            self._run(equation, env, {j: given[place, j] for j in places if (place, j) in given})
        return env[self._losses]

    def _run(self, equation, env, instead):
        def read(j, v):
            return instead[j] if j in instead else v.val if jaxprs.is_literal(v) else env[v]

        outputs = jaxprs.bind(equation, [read(j, v) for j, v in enumerate(equation.invars)])
        env.update(zip(equation.outvars, outputs, strict=True))

    def linearized(self, weights: Vector, cotangent: Tensor) -> UnmixedGradients:
        """What a step needs, with the cotangents of the losses all `cotangent`, a scalar."""
        like = jax.eval_shape(self.before, *weights)
        pull = jax.linear_transpose(self.after, *like)
        deltas = pull(jnp.full(self._losses.aval.shape, cotangent, self._losses.aval.dtype))
        back = jax.linear_transpose(self.before, *weights)
        return UnmixedGradients(self.before, back, list(deltas), self._axes, self._n)


class UnmixedGradients:
    """<g_i, v> and sum_i w_i g_i of one batch, with g_i in units of the cotangents of the losses.

    Args:
        push: v -> A v.
        pull: its transpose.
        deltas: the cotangents of A v.
        axes: the axis of the examples in each.
        n_examples: N.
    """

    def __init__(
        self, push: Callable, pull: Callable, deltas: Vector, axes: list[int], n_examples: int
    ):
        self._push, self._pull, self._deltas, self._axes = push, pull, deltas, axes
        self._n = n_examples

    def dot(self, v: Vector, dtype: str) -> Tensor:
        """<g_i, v>, shape (N,), its sums in `dtype`."""
        sums: dict[int, tuple] = {}  # what is added up in a layer has one cotangent
        for row, delta, axis in zip(self._push(*v), self._deltas, self._axes, strict=True):
            before = sums[id(delta)][0] if id(delta) in sums else 0
            sums[id(delta)] = before + row.astype(dtype), delta, axis
        total = jnp.zeros([self._n], dtype)
        for row, delta, axis in sums.values():
            others = [j for j in range(row.ndim) if j != axis]
            total += jnp.sum(row * delta.astype(dtype), others)
        return total

    def combine(self, w: Tensor) -> Vector:
        """sum_i w_i g_i, for w of shape (N,)."""
        weighted = []
        for delta, axis in zip(self._deltas, self._axes, strict=True):
            shape = [self._n if j == axis else 1 for j in range(delta.ndim)]
            weighted.append((delta * jnp.reshape(w, shape)).astype(delta.dtype))
        return list(self._pull(weighted))


def unmixed(linear: Any, n_examples: int) -> Unmixed | None:
    """J = B A for v -> J v, traced, whose output has the shape (N,); `None` where examples mix.

    Examples that do not are sometimes not seen not to, as in a layer that scans over time.
    """
    linear = jaxprs.inlined(linear)
    axes = _axes(linear.jaxpr, n_examples)
    apart = None if axes is None else Unmixed(linear, axes, n_examples)
    return apart if apart is not None and apart.saves_passes else None


def _reached(jaxpr):
    """The variables that depend on the inputs."""
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if jaxprs.operands_in(equation, reached):
            reached.update(equation.outvars)
    return reached


# What a rule says of an operand that an equation repeats for every example, or of an equation
# from which on examples can be followed, and not before it: it is an output of A.
_ENTERS = object()


def _axes(jaxpr, n):
    """The axis of the examples in each output of A; `None` where they cannot be followed.

    An output of A is a variable; or the operand of an equation that repeats it along the axis of
    the examples, (place of the equation, place of the operand).
    """
    (losses,) = jaxpr.outvars
    reached = _reached(jaxpr)
    if n == 1 or jaxprs.is_literal(losses) or losses not in reached:
        return None
    axes, outputs = {losses: 0}, {}
    for place in range(len(jaxpr.eqns))[::-1]:
        equation = jaxpr.eqns[place]
        found = {axes[v] for v in equation.outvars if v in axes}
        if not found:
            continue
        if len(found) > 1:
            return None
        (axis,) = found
        linear = jaxprs.operands_in(equation, reached)
        rule = _RULES.get(equation.primitive.name)
        operands = _ENTERS if rule is None else rule(equation, axis, n, linear)
        if operands is _ENTERS:
            outputs |= {v: axis for v in equation.outvars if v in axes}
            continue
        for j, v in linear.items():
            if operands[j] is _ENTERS:
                outputs[place, j] = axis
            elif axes.setdefault(v, operands[j]) != operands[j]:
                return None
    outputs |= {v: axes[v] for v in jaxpr.invars if v in axes}
    is_complex = [np.issubdtype(v.aval.dtype, np.complexfloating) for v in axes]
    return None if any(is_complex) else outputs


# One rule for each primitive: the axis of the examples in each operand, for that in the outputs.
# `linear` are the operands that depend on v, by their places.


def _elementwise(equation, axis, n, linear):
    shape, axes = equation.outvars[0].aval.shape, {}
    for j, operand in linear.items():
        given = operand.aval.shape
        if len(given) not in (0, len(shape)):
            return _ENTERS
        axes[j] = axis if given and given[axis] == n else _ENTERS
    return axes


def _transposed(equation, axis, n, linear):
    return {0: equation.params["permutation"][axis]}


def _reshaped(equation, axis, n, linear):
    shape, given = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
    before = math.prod(shape[:axis])
    same = [j for j, size in enumerate(given) if size == n and math.prod(given[:j]) == before]
    return {0: same[0]} if same else _ENTERS


def _broadcast(equation, axis, n, linear):
    places = equation.params["broadcast_dimensions"]
    operand = equation.invars[0].aval.shape
    repeats = axis not in places or operand[places.index(axis)] != n
    return _ENTERS if repeats else {0: places.index(axis)}


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
        return _ENTERS if axis in along else dict.fromkeys(linear, axis)

    return rule


def _whole(equation, axis, n, linear):
    """A piece of an operand, or one put into it, that has all of the examples."""
    shapes = [v.aval.shape for v in [*equation.invars, *equation.outvars] if v.aval.ndim]
    return dict.fromkeys(linear, axis) if all(s[axis] == n for s in shapes) else _ENTERS


def _stacked(equation, axis, n, linear):
    new = equation.params["axis"]
    return _ENTERS if axis == new else dict.fromkeys(linear, axis - (axis > new))


def _unstacked(equation, axis, n, linear):
    return {0: axis + (axis >= equation.params["axis"])}


def _tiled(equation, axis, n, linear):
    return {0: axis} if equation.params["reps"][axis] == 1 else _ENTERS


def _padded(equation, axis, n, linear):
    kept = tuple(equation.params["padding_config"][axis]) == (0, 0, 0)
    return {0: axis} if kept and list(linear) == [0] else _ENTERS


def _pooled(equation, axis, n, linear):
    alone = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0)}
    alone |= {"base_dilation": 1, "window_dilation": 1}
    given = {name: equation.params[name][axis] for name in alone}
    given["padding"] = tuple(given["padding"])
    return dict.fromkeys(linear, axis) if given == alone else _ENTERS


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
    return {side: [*left, *right][place]} if list(linear) == [side] else _ENTERS


def _convolution(equation, axis, n, linear):
    numbers = equation.params["dimension_numbers"]
    by_example = axis == numbers.out_spec[0] and equation.params["batch_group_count"] == 1
    return {0: numbers.lhs_spec[0]} if by_example and list(linear) == [0] else _ENTERS


def _gather(equation, axis, n, linear):
    numbers = equation.params["dimension_numbers"]
    if axis not in numbers.offset_dims:
        return _ENTERS
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    place = [j for j in range(len(shape)) if j not in gone][numbers.offset_dims.index(axis)]
    return {0: place} if sizes[place] == n == shape[place] else _ENTERS


_ELEMENTWISE = """add add_any convert_element_type copy copy_p device_put div layout_constraint
mul name neg reduce_precision reshard select_n sharding_constraint sub"""

_RULES = dict.fromkeys(_ELEMENTWISE.split(), _elementwise) | {
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
