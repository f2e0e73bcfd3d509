"""The largest eigenvalue of D and the spectral measure of v, by matrix products alone.

XLA's eigensolver does not belong in a compiled step: on a CPU it takes 1.5 s at N = 512, where
three squarings take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from keras import ops
from numpy.polynomial import Chebyshev, Polynomial

from keras_rgd._support import vectors
from keras_rgd._support.rounding import machine_epsilon
from keras_rgd._support.vectors import Tensor, Vector

# A vector and D times it.
Pair: TypeAlias = tuple[Vector, Vector]

# In a step, where each costs 2 N^3 operations.
_SQUARINGS = 3

# Nodes of the quadrature rule for v's spectral measure. The weak-field error is a function so
# smooth on [0, 1/eps) that eight give it to about six digits.
_LANCZOS_STEPS = 8


def _inverse_of_shifted(degree):
    """Coefficients of a polynomial in s = 1 - 2x that is about 1 / (1 + x) for x in [0, 1]."""
    residual = Chebyshev.basis(degree + 1).convert(kind=Polynomial)
    return ((1 - residual / residual(3)) // Polynomial([1.5, -0.5])).coef


# Each degree is worth a factor of 5.8.
_INVERSE = _inverse_of_shifted(6)


def trace_power_bound(k: Tensor, squarings: int = _SQUARINGS) -> Tensor:
    """An upper bound on the largest eigenvalue of a positive semi-definite matrix.

    From the traces s_1 = tr K^q and s_2 = tr K^(2q), q = 2^squarings, by repeated squaring: the
    largest of N numbers of that sum and that sum of squares is at most
    s_1/N + sqrt((1 - 1/N) (s_2 - s_1^2/N)) (Samuelson; Wolkowicz and Styan 1980), its q-th root
    at most N^(1/(2q)) M. It is M itself where one eigenvalue stands out of equal others.

    Args:
        k: K, shape (N, N), symmetric.
        squarings: an int. Defaults to `3`: at most 1.31 M at N = 256, 1.49 M at N = 2048.

    Returns:
        A scalar tensor, 0 for K = 0.
    """
    n = k.shape[0] or ops.cast(ops.shape(k)[0], k.dtype)
    trace = trace_of(k)
    power, traces = ops.divide_no_nan(k, trace), [trace]
    for _ in range(squarings):
        # Of trace 1 each time: high powers would leave the range of the dtype.
        traces.append(ops.sum(ops.square(power)))  # the trace of its square, as it is symmetric
        power = ops.divide_no_nan(power @ power, traces[-1])
    exponents = 0.5 ** np.arange(squarings + 1)
    logs = ops.log(ops.stack(traces)) * ops.convert_to_tensor(exponents, k.dtype)
    spread = ops.maximum(ops.sum(ops.square(power)) - 1 / n, 0)
    last = 1 / n + ops.sqrt((1 - 1 / n) * spread)
    log_bound = ops.sum(logs) + float(exponents[-1]) * ops.log(last)
    # Rounding may not take the bound below M.
    rounding = 1 + 4 * n * machine_epsilon(k.dtype)
    return ops.where(trace > 0, ops.exp(log_bound) * rounding, ops.zeros_like(trace))


def trace_of(k: Tensor) -> Tensor:
    """tr K, a scalar tensor; `ops.trace` is 27 operations of TensorFlow."""
    return ops.sum(ops.diagonal(k))


def lanczos_measure(k: Tensor, u: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Radau quadrature, one node at 0, for the spectral measure of v.

    With u along H G v, Lanczos on K gives Gauss quadrature for lam dmu(lam), mu the spectral
    measure of v / |v|; dividing its weights by the nodes and giving the rest to 0 gives mu
    (Golub and Meurant, Matrices, Moments and Quadrature).

    Args:
        k: K, shape (N, N).
        u: H G v normalised, shape (N,), or 0.
        mass: v^T D v / |v|^2, a scalar tensor.

    Returns:
        `(nodes, weights)`, each of shape (m + 1,), the weights summing to 1.
    """
    alphas, betas, basis = [], [], [u]
    tiny = 8 * machine_epsilon(k.dtype) * trace_of(k)
    for step in range(_LANCZOS_STEPS):
        product = ops.matmul(k, basis[-1])
        alphas.append(ops.sum(basis[-1] * product))
        if step == _LANCZOS_STEPS - 1:
            break
        # Twice is enough to keep the basis orthogonal.
        for _ in range(2):
            for q in basis:
                product = product - ops.sum(q * product) * q
        beta = ops.norm(product)
        # The Krylov space may end before N; the rest of T is then zero and has no weight.
        beta = ops.where(beta > tiny, beta, ops.zeros_like(beta))
        betas.append(beta)
        basis.append(ops.divide_no_nan(product, beta))
    t = _tridiagonal(alphas, betas)
    # eigh raises on what half precision overflowed; such a step is skipped later.
    finite = ops.all(ops.isfinite(t))
    nodes, ritz = ops.eigh(ops.where(finite, t, ops.zeros_like(t)))
    nodes = ops.maximum(nodes, 0)
    weights = ops.divide_no_nan(mass * ops.square(ritz[0]), nodes)
    # A node that is rounding alone would get a weight that is.
    weights = ops.where(nodes > tiny, weights, ops.zeros_like(weights))
    total = ops.sum(weights)
    weights = weights / ops.maximum(total, 1)
    return (
        ops.append(nodes, ops.zeros_like(total)),
        ops.append(weights, ops.maximum(1 - total, 0)),
    )


def solve_shifted(k: Tensor, epsilon: Tensor, b: Tensor) -> Tensor:
    """(I + eps K)^-1 b for eps K between 0 and I, by a polynomial in K.

    That of Chebyshev iteration (Saad, Iterative Methods for Sparse Linear Systems, section 12.3):
    the eigenvalues of the system lie in [1, 2], so each degree divides the error by 3 + sqrt(8).

    Args:
        k: K, shape (N, N), symmetric positive semi-definite.
        epsilon: a scalar tensor.
        b: shape (N,).
    """
    twice = 2 * epsilon * k
    terms = ops.convert_to_tensor(_INVERSE, k.dtype)[:, None, None] * ops.expand_dims(b, 1)
    *lower, solution = ops.unstack(terms, len(_INVERSE))
    for term in reversed(lower):
        # By Horner's rule in I - 2 eps K, between -I and I.
        solution = solution - twice @ solution + term
    return ops.squeeze(solution, 1)


def moments_measure(lambda_max: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Radau quadrature with one node at `lambda_max`, from two moments of v alone.

    Exact for 1, lam and lam^2; where `lambda_max` bounds the spectrum, an upper bound for the
    functions in the weak-field error.

    Args:
        lambda_max: M, a scalar tensor.
        first: v^T D v / |v|^2.
        second: |D v|^2 / |v|^2.

    Returns:
        `(nodes, weights)`, each of shape (2,), the weights summing to 1.
    """
    rest = ops.maximum(lambda_max - first, 0)
    node = ops.maximum(ops.divide_no_nan(lambda_max * first - second, rest), 0)
    gap = lambda_max - node
    weight = ops.clip(ops.divide_no_nan(first - node, gap), 0, 1)
    return ops.stack([node, lambda_max]), ops.stack([1 - weight, weight])


def golub_kahan_top(
    dot: Callable[[Vector], tuple[Tensor, Tensor]],
    combine: Callable[[Tensor], Vector],
    alpha: Tensor,
    v: Vector,
    u: Tensor,
    max_steps: int,
    enough: Tensor,
    growth: float,
) -> Tensor:
    """The largest eigenvalue of D = F^T F from below, by Golub-Kahan bidiagonalisation of F.

    Starts from u, v and alpha with F^T u = alpha v, and goes on until one more step raises the
    estimate by less than `growth`, relatively, or `max_steps` are taken. The u are kept
    orthogonal, and what is rounding alone is no direction: the estimate stays from below also
    where the Krylov space ends, with a few examples or weights.

    Args:
        dot: the function from v to F v, and the length of the rounding in it.
        combine: the function from u to F^T u.
        alpha: the first diagonal entry, a scalar tensor.
        v: a list of tensors of norm 1.
        u: a vector of norm 1.
        max_steps: how many entries the diagonal may have, an int.
        enough: whether the first step is enough this time, a bool scalar tensor.
        growth: relative growth of the estimate at which it is settled.

    Returns:
        The largest Ritz value over alpha**2, a scalar tensor, 0 where alpha is 0.
    """
    dtype, unit = alpha.dtype, alpha

    def top(alphas, betas):
        eye, below = (ops.convert_to_tensor(np.eye(max_steps, k=k), dtype) for k in (0, -1))
        lower = eye * alphas + below * ops.expand_dims(betas, 1)
        lower = ops.divide_no_nan(lower, unit)
        return trace_power_bound(lower @ ops.transpose(lower), squarings=6)

    def go_on(step, _alphas, _betas, _basis, _v, before, now):
        unsettled = ops.logical_and(step < max_steps, now > (1 + growth) * before)
        return ops.logical_and(unsettled, ops.logical_not(enough))

    def one_step(step, alphas, betas, basis, v, _before, now):
        r, rounding = dot(v)
        # Twice is enough. Rows not yet filled are zero.
        for _ in range(2):
            r = r - ops.matmul(ops.matmul(basis, r), basis)
        beta = vectors.norm([r])
        beta = ops.where(beta > rounding, beta, ops.zeros_like(beta))
        u = ops.divide_no_nan(r, beta)
        product = vectors.add(combine(u), v, -beta)
        alpha = vectors.norm(product)
        # Where the Krylov space ends, -0 v has no direction either.
        alpha = ops.where(beta > 0, alpha, ops.zeros_like(alpha))
        v = [ops.divide_no_nan(x, alpha) for x in product]
        alphas = ops.slice_update(alphas, [step], ops.expand_dims(alpha, 0))
        betas = ops.slice_update(betas, [step], ops.expand_dims(beta, 0))
        # Indices of one dtype: 0 alone is an int64 where JAX has those.
        row = [step, ops.zeros_like(step)]
        basis = ops.slice_update(basis, row, ops.expand_dims(u, 0))
        return step + 1, alphas, betas, basis, v, now, top(alphas, betas)

    zeros, step = ops.zeros([max_steps], dtype), ops.ones([], "int32")
    alphas = ops.slice_update(zeros, [0], ops.expand_dims(alpha, 0))
    basis = ops.pad(ops.expand_dims(u, 0), [[0, max_steps - 1], [0, 0]])
    own = ops.divide_no_nan(alpha, alpha)  # 1 or 0, or NaN of what is not finite
    start = (step, alphas, zeros, basis, v, ops.zeros_like(own), own)
    return ops.while_loop(go_on, one_step, start)[-1]


def ritz_step(x: Pair, q: Pair, p: Pair) -> tuple[Vector, Vector, Vector, Vector]:
    """The vector of the largest Ritz value among three, as LOBPCG steps (Knyazev 2001) with one.

    Args:
        x: the best vector so far and D times it, each a list of tensors; of norm 1, or 0.
        q: likewise a new direction, orthogonal to x.
        p: likewise the last move, of any length.

    Returns:
        The best vector, D times it, the move to it, and D times that.
    """
    p = _orthonormal(p, x, q)
    pairs = (x, q, p)
    a = ops.stack([ops.stack([vectors.inner(s, dt) for _, dt in pairs]) for s, _ in pairs])
    finite = ops.all(ops.isfinite(a))
    # eigh raises on what half precision overflowed; such a step is skipped later.
    _, ritz = ops.eigh(ops.where(finite, (a + ops.transpose(a)) / 2, ops.zeros_like(a)))
    c = ops.unstack(ritz[:, -1], 3)
    moved = [vectors.add(vectors.scale(q[i], c[1]), p[i], c[2]) for i in range(2)]
    best = [vectors.add(moved[i], x[i], c[0]) for i in range(2)]
    return best[0], best[1], moved[0], moved[1]


def _orthonormal(p, *others):
    """p and D p less their parts along the others, and scaled to |p| = 1; 0 if nothing is left."""
    length = vectors.norm(p[0])
    p = [[ops.divide_no_nan(t, length) for t in s] for s in p]
    for _ in range(2):  # twice is enough
        for other in others:
            along = vectors.inner(p[0], other[0])
            p = [vectors.add(p[i], other[i], -along) for i in range(2)]
    length = vectors.norm(p[0])
    # What rounding alone left is no direction.
    length = ops.where(length > 1e-3, length, ops.zeros_like(length))
    return [[ops.divide_no_nan(t, length) for t in s] for s in p]


def _tridiagonal(diagonal, off_diagonal):
    # Not `ops.diag`, whose shape XLA does not know with Keras 3.8.
    m, dtype = len(diagonal), diagonal[0].dtype
    off = ops.stack([*off_diagonal, ops.zeros_like(diagonal[0])])
    off = ops.eye(m, k=-1, dtype=dtype) * off
    return ops.eye(m, dtype=dtype) * ops.stack(diagonal) + off + ops.transpose(off)
