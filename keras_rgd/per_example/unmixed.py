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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_rgd._support import jaxprs
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.per_example.unmixed_rules import ENTERS, RULES


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
    """J = B A for v -> J v, traced, with an output (N,); `None` where that saves nothing.

    So it is where examples mix early and stay in what comes after: A and B would share equations.
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
        rule = RULES.get(equation.primitive.name)
        operands = ENTERS if rule is None else rule(equation, axis, n, linear)
        if operands is ENTERS:
            outputs |= {v: axis for v in equation.outvars if v in axes}
            continue
        for j, v in linear.items():
            if operands[j] is ENTERS:
                outputs[place, j] = axis
            elif axes.setdefault(v, operands[j]) != operands[j]:
                return None
    outputs |= {v: axes[v] for v in jaxpr.invars if v in axes}
    is_complex = [np.issubdtype(v.aval.dtype, np.complexfloating) for v in axes]
    return None if any(is_complex) else outputs
