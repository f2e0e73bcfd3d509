"""Functions as JAX has traced them: run again, also with some of their inputs at 0.

A traced function (a jaxpr) is a list of equations, each a primitive of JAX with its operands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

# Primitives that call another jaxpr and do nothing else.
_CALLS = ("jit", "pjit", "closed_call")

# What stands for a tensor of zeros.
ZERO = object()

# Linear functions of one operand, and of either of two.
_LINEAR = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "neg",
    "reduce_sum",
    "reshape",
    "slice",
    "squeeze",
    "transpose",
}
_BILINEAR = {"mul", "dot_general"}
_SUMS = {"add", "add_any"}


def called(equation: Any) -> ClosedJaxpr | None:
    """The jaxpr that an equation calls and does nothing else, or `None`."""
    return equation.params["jaxpr"] if equation.primitive.name in _CALLS else None


def layers_of(jaxpr: ClosedJaxpr, *primitives: str) -> list[str]:
    """The layers, by their paths, with an equation of such primitives, called ones included."""
    found = []

    def look(jaxpr: Any, outer: list[str]) -> None:
        for equation in jaxpr.eqns:
            stack = str(equation.source_info.name_stack)
            scope = [*outer, *re.findall(r"[\w.-]+(?=[)/]|$)", stack)]
            if equation.primitive.name in primitives:
                found.append("/".join(scope))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    look(getattr(inner, "jaxpr", inner), scope)

    look(jaxpr.jaxpr, [])
    return list(dict.fromkeys(found))


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def is_literal(operand: Any) -> bool:
    """Whether an operand is a number that stands in the equation."""
    return isinstance(operand, Literal)


def operands_in(equation: Any, variables: set[Any]) -> dict[int, Any]:
    """The operands of an equation that are among some variables, by their places."""
    given = enumerate(equation.invars)
    return {j: v for j, v in given if not is_literal(v) and v in variables}


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """What an equation gives for such operands."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # as older JAX has it
    with jax.named_scope(str(equation.source_info.name_stack)):
        given = equation.primitive.bind(*functions, *operands, **params)
    return list(given) if equation.primitive.multiple_results else [given]


def inlined(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function without calls of others."""
    if not any(called(e) for e in jaxpr.jaxpr.eqns):
        return jaxpr
    return jax.make_jaxpr(lambda *args: _run(jaxpr, args))(*jaxpr.in_avals)


def _run(jaxpr, args):
    return [value for value, _ in run_at_zero(jaxpr, [(a, a) for a in args])]


def run_at_zero(jaxpr: ClosedJaxpr, args: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The outputs of a traced function, and what they were with some of its inputs at 0.

    What is 0 then by the equations alone is left out, so that the second output depends on nothing
    but what it needs: that of sum_i u_i f_i(w) + r(w) at u = 0 is r(w), from w without the f_i.

    Args:
        jaxpr: the function.
        args: for each input its value, and the same value again or `ZERO`.

    Returns:
        Pairs of values, the second `ZERO` where it is 0; the same object twice for what those
        inputs do not reach.
    """
    env = dict(zip(jaxpr.jaxpr.constvars, [(c, c) for c in jaxpr.consts], strict=True))
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(operand):
        return (operand.val, operand.val) if is_literal(operand) else env[operand]

    for equation in jaxpr.jaxpr.eqns:
        given = [read(v) for v in equation.invars]
        inner = called(equation)
        if inner is not None:
            outputs = run_at_zero(inner, given)
        else:
            values = bind(equation, [a for a, _ in given])
            outputs = [(v, v) for v in values]
            if any(a is not b for a, b in given):
                at_zero = _bind_at_zero(equation, [b for _, b in given])
                outputs = list(zip(values, at_zero, strict=True))
        env |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _bind_at_zero(equation, operands):
    name = equation.primitive.name
    zeros = [_is_zero(x) for x in operands]
    if (
        (name in _LINEAR and all(zeros))
        or (name in _BILINEAR and any(zeros))
        or (name in _SUMS and all(zeros))
        or (name == "div" and zeros[0] and not zeros[1])
        or (name == "select_n" and not zeros[0] and all(zeros[1:]))
    ):
        return [ZERO]
    shapes = [v.aval.shape for v in equation.invars]
    if name in _SUMS and any(zeros) and shapes[0] == shapes[1]:
        return [operands[zeros.index(False)]]
    if name == "sub" and zeros[1] and shapes[0] == shapes[1]:
        return [operands[0]]
    pairs = zip(operands, equation.invars, strict=True)
    operands = [jnp.zeros(v.aval.shape, v.aval.dtype) if x is ZERO else x for x, v in pairs]
    return bind(equation, operands)


def _is_zero(x):
    return x is ZERO or (not isinstance(x, jax.Array) and np.ndim(x) == 0 and x == 0)
