"""The steady state: Eq. (11) and (12) of the paper, and whether grad_D f has a potential.

With layers in evaluation mode, at the model's weights. beta^-1 = eta / (2 |B|), of the learning
rate eta and the batch size |B| (Chaudhari and Soatto, arXiv 1710.11029).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd._support.arguments import is_count
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.geometry.epsilon_field import EpsilonField
from keras_rgd.geometry.equations import flat


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A vector in weight space with its error bars: lists of arrays shaped as the weights."""

    value: list[np.ndarray]
    standard_error: list[np.ndarray]  # of each entry; 0 where the value is exact
    probes: int | None  # how many random vectors it is a mean over; None where it is exact

    @property
    def norm(self) -> float:
        """The length of `value`."""
        return float(np.linalg.norm(vectors.flatten(self.value)))


def residual(geometry, epsilon):
    """-eps^2 D^2 grad L, a list of tensors; see `Geometry.steady_state_residual`."""
    v = geometry.gradient()
    return vectors.scale(geometry.product(geometry.product(v)), -(epsilon**2))


def current(geometry, epsilon, temperature, constant_epsilon, probes, seed, verbose):
    """The j of Eq. (12), an `Estimate`; see `Geometry.probability_current`.

    Args:
        geometry: a `Geometry`.
        epsilon: eps, a float or a rule.
        temperature: beta^-1, a float.
        constant_epsilon: whether a rule's eps(x) counts as constant.
        probes: as in `divergence`.
        seed: as in `divergence`.
        verbose: as in `divergence`.
    """
    field = EpsilonField(epsilon, geometry, held=constant_epsilon)
    eps, grad_epsilon = field.with_gradient(geometry.diffusion_matrix())
    exact = residual(geometry, eps)
    if grad_epsilon is not None:
        exact = vectors.add(exact, geometry.product(grad_epsilon), -temperature)
    estimate = divergence(geometry, probes, seed, verbose)
    factor = temperature * eps
    return Estimate(
        value=[t.numpy() for t in vectors.add(exact, estimate.value, -factor)],
        standard_error=vectors.scale(estimate.standard_error, factor),
        probes=probes,
    )


def defect(geometry, u, w, epsilon, constant_epsilon):
    """<u, J w> - <w, J u>, a float; see `Geometry.integrability_defect`."""
    field = EpsilonField(epsilon, geometry, held=constant_epsilon)
    eps, grad_epsilon = field.with_gradient(geometry.diffusion_matrix())
    v = geometry.gradient()

    def half(a, b):
        """The derivative along b of <a, D grad L>."""
        moved = vectors.inner(geometry.product(a), geometry.derivatives.loss_hessian(b))
        return moved + vectors.inner(a, geometry.product_change(b, v))

    result = -eps * float(half(u, w) - half(w, u))
    if grad_epsilon is not None:
        Dv = geometry.product(v)
        turned = vectors.inner(grad_epsilon, w) * vectors.inner(u, Dv)
        result -= float(turned - vectors.inner(grad_epsilon, u) * vectors.inner(w, Dv))
    return result


def divergence(geometry, probes, seed, verbose):
    """The divergence of D, an `Estimate`; see `Geometry.diffusion_divergence`."""
    if probes is None:
        return _exact_divergence(geometry, verbose)
    if not is_count(probes) or probes < 2:
        raise ValueError(
            f"`probes` must be an integer above 1, or None to be exact. Received: probes={probes!r}"
        )
    rng = np.random.default_rng(seed)
    mean, square = np.zeros(geometry.d), np.zeros(geometry.d)
    with progress_bar("divergence of D", probes, verbose, after=SHOWN_AFTER) as advance:
        for count in range(1, probes + 1):
            signs = vectors.unflatten(
                rng.choice((-1.0, 1.0), geometry.d), geometry.weights, geometry.dtype
            )
            traces = geometry.covariance(geometry.derivatives.second(signs, signs))
            mixed = _mixed(geometry, rng.choice((-1.0, 1.0), geometry.n_examples))
            one = flat(traces) + mixed / geometry.n_examples
            # Welford's update: no difference of large numbers.
            change = one - mean
            mean += change / count
            square += change * (one - mean)
            advance()
    return _estimate(geometry, mean, np.sqrt(square / (probes - 1) / probes), probes)


def _exact_divergence(geometry, verbose):
    n, d = geometry.n_examples, geometry.d
    traces, total = np.zeros(n), np.zeros(d)
    with progress_bar("divergence of D", n + d, verbose, after=SHOWN_AFTER) as advance:
        for k in range(d):
            unit = (np.arange(d) == k).astype(float)
            e = vectors.unflatten(unit, geometry.weights, geometry.dtype)
            traces += geometry.derivatives.second(e, e).numpy()
            advance()
        for i in range(n):
            total += _mixed(geometry, (np.arange(n) == i).astype(float))
            advance()
    total = flat(geometry.covariance(tf.constant(traces, geometry.dtype))) + total / n
    return _estimate(geometry, total, np.zeros(d), None)


def _mixed(geometry, z):
    """(sum_i z_i (H_i - H)) (sum_j z_j (g_j - gbar)), a flat vector."""
    z = tf.constant(z - z.mean(), geometry.dtype)
    return flat(geometry.derivatives.hessian(z, geometry.derivatives.combine(z)))


def _estimate(geometry, value, error, probes):
    value, error = (
        [t.numpy() for t in vectors.unflatten(a, geometry.weights, geometry.dtype)]
        for a in (value, error)
    )
    return Estimate(value=value, standard_error=error, probes=probes)
