"""The steady state: Eq. (11) and (12) of the paper, and whether grad_D f has a potential.

With layers in evaluation mode, at the model's weights. Beta^-1 = eta / (2 |B|), of the learning
rate eta and the batch size |B| (Chaudhari and Soatto, arXiv 1710.11029).
"""

import dataclasses

import numpy as np
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd._support.arguments import is_count
from keras_rgd._support.progress import SHOWN_AFTER, progress_bar
from keras_rgd.geometry.epsilon_field import EpsilonField
from keras_rgd.geometry.equations import flat
from keras_rgd.geometry.point import Point


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A vector in weight space with its error bars: lists of arrays shaped as the weights."""

    value: list
    standard_error: list  # of each entry; 0 where the value is exact
    probes: int | None  # how many random vectors it is a mean over; None where it is exact

    @property
    def norm(self):
        """The length of `value`."""
        return float(np.linalg.norm(vectors.flatten(self.value)))


def steady_state_residual(model, x, y, epsilon, *, sample_weight=None):
    """The left-hand side of Eq. (11) for grad Phi = (I - eps D) grad L: -eps^2 D^2 grad L.

    0 would be a steady state. It is the square of what the weak field drops, and not 0 unless
    D grad L is.

    Args:
        model: any compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        epsilon: eps, a float with 0 <= eps * lambda_max < 1; or a rule of `keras_rgd.epsilon`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.

    Returns:
        A list of tensors shaped as the weights.

    Raises:
        ValueError: eps is not below 1 / lambda_max.
    """
    point = Point(model, x, y, sample_weight)
    with point.visiting():
        return _residual(point, EpsilonField(epsilon, point, held=True).constant)


def diffusion_divergence(model, x, y, *, sample_weight=None, probes=None, seed=0, verbose=True):
    """The divergence of D, (nabla . D)_r = sum_s d D_rs / d x_s, which Eq. (12) takes for 0.

    It is Cov_i(tr H_i, g_i) + (1/N) sum_i (H_i - H) (g_i - gbar): 0 where all H_i are equal, not
    where the third derivatives vanish.

    Args:
        model: any compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        probes: how many pairs of random sign vectors to estimate the traces and the sum from
            (Hutchinson). Defaults to `None`: exactly, by d + N second derivatives.
        seed: of the signs. Defaults to `0`.
        verbose: whether work of more than two seconds shows a progress bar. Defaults to `True`.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: `probes` is not an integer above 1.
    """
    point = Point(model, x, y, sample_weight, compiled=True)
    with point.visiting():
        return _divergence(point, probes, seed, verbose)


def probability_current(
    model,
    x,
    y,
    epsilon,
    *,
    learning_rate,
    batch_size,
    sample_weight=None,
    constant_epsilon=True,
    probes=None,
    seed=0,
    verbose=True,
):
    r"""The current j of Eq. (12) for grad Phi = (I - eps D) grad L.

    .. math:: j = -\nabla L + (I + \mathcal{E} D) \nabla\Phi
        - \frac{\eta}{2 |B|} \nabla \cdot (I + \mathcal{E} D)

    Args:
        model: any compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        epsilon: as in `steady_state_residual`.
        learning_rate: eta.
        batch_size: |B|.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        constant_epsilon: `False` for the divergence of eps(x) D, as in `christoffel`. Defaults to
            `True`.
        probes: as in `diffusion_divergence`, like `seed` and `verbose`.
        seed: of the probes.
        verbose: as there.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: as `steady_state_residual`, `diffusion_divergence` and `christoffel`; or the
            learning rate or batch size is not positive.
    """
    if not learning_rate > 0 or not is_count(batch_size):
        raise ValueError(
            "`learning_rate` must be positive and `batch_size` a positive integer. Received: "
            f"learning_rate={learning_rate!r}, batch_size={batch_size!r}"
        )
    temperature = learning_rate / (2 * batch_size)
    point = Point(model, x, y, sample_weight, compiled=True)
    with point.visiting():
        D, v = point.diffusion_matrix(), point.gradient()
        field = EpsilonField(epsilon, point, held=constant_epsilon)
        eps, slope = field.at(D, v), field.gradient(D, v)
        current = _residual(point, eps)
        if slope is not None:
            current = vectors.add(current, point.product(slope), -temperature)
        divergence = _divergence(point, probes, seed, verbose)
    factor = temperature * eps
    return Estimate(
        value=[t.numpy() for t in vectors.add(current, divergence.value, -factor)],
        standard_error=vectors.scale(divergence.standard_error, factor),
        probes=probes,
    )


def integrability_defect(model, x, y, u, w, epsilon, *, sample_weight=None, constant_epsilon=True):
    """<u, J w> - <w, J u> for the Jacobian J of grad_D L = (I - eps D) grad L, a float.

    A potential Phi with grad Phi = grad_D L, as Eq. (11) supposes, exists only where this is 0 for
    all u and w.

    Args:
        model: any compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        u: a list of arrays shaped as the trainable weights.
        w: likewise.
        epsilon: as in `steady_state_residual`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        constant_epsilon: `False` for the Jacobian with eps(x), as in `christoffel`. Defaults to
            `True`.

    Raises:
        ValueError: as `christoffel`.
    """
    point = Point(model, x, y, sample_weight)
    with point.visiting():
        u, w = point.vector(u, "u"), point.vector(w, "w")
        D, v = point.diffusion_matrix(), point.gradient()
        field = EpsilonField(epsilon, point, held=constant_epsilon)
        eps, slope = field.at(D, v), field.gradient(D, v)

        def half(a, b):
            """Of <a, (I - eps D) grad L> the derivative along b, less what is symmetric."""
            slope = vectors.inner(point.product(a), point.derivatives.loss_hessian(b))
            return slope + vectors.inner(a, point.product_change(b, v))

        defect = -eps * float(half(u, w) - half(w, u))
        if slope is not None:
            Dv = point.product(v)
            turned = vectors.inner(slope, w) * vectors.inner(u, Dv)
            defect -= float(turned - vectors.inner(slope, u) * vectors.inner(w, Dv))
        return defect


def _residual(point, epsilon):
    """-eps^2 D^2 grad L."""
    return vectors.scale(point.product(point.product(point.gradient())), -(epsilon**2))


def _divergence(point, probes, seed, verbose):
    if probes is None:
        return _exact_divergence(point, verbose)
    if not is_count(probes) or probes < 2:
        raise ValueError(
            f"`probes` must be an integer above 1, or None to be exact. Received: probes={probes!r}"
        )
    rng = np.random.default_rng(seed)
    mean, square = np.zeros(point.d), np.zeros(point.d)
    with progress_bar("divergence of D", probes, verbose, after=SHOWN_AFTER) as advance:
        for count in range(1, probes + 1):
            signs = vectors.unflatten(rng.choice((-1.0, 1.0), point.d), point.weights, point.dtype)
            traces = point.covariance(point.derivatives.second(signs, signs))
            mixed = _mixed(point, rng.choice((-1.0, 1.0), point.n_examples))
            one = flat(traces) + mixed / point.n_examples
            # Welford's update: no difference of large numbers.
            change = one - mean
            mean += change / count
            square += change * (one - mean)
            advance()
    return _estimate(point, mean, np.sqrt(square / (probes - 1) / probes), probes)


def _exact_divergence(point, verbose):
    n, d = point.n_examples, point.d
    traces, total = np.zeros(n), np.zeros(d)
    with progress_bar("divergence of D", n + d, verbose, after=SHOWN_AFTER) as advance:
        for k in range(d):
            unit = (np.arange(d) == k).astype(float)
            e = vectors.unflatten(unit, point.weights, point.dtype)
            traces += point.derivatives.second(e, e).numpy()
            advance()
        for i in range(n):
            total += _mixed(point, (np.arange(n) == i).astype(float))
            advance()
    total = flat(point.covariance(tf.constant(traces, point.dtype))) + total / n
    return _estimate(point, total, np.zeros(d), None)


def _mixed(point, z):
    """(sum_i z_i (H_i - H)) (sum_j z_j (g_j - gbar)), a flat vector."""
    z = tf.constant(z - z.mean(), point.dtype)
    return flat(point.derivatives.hessian(z, point.derivatives.combine(z)))


def _estimate(point, value, error, probes):
    value, error = (
        [t.numpy() for t in vectors.unflatten(a, point.weights, point.dtype)]
        for a in (value, error)
    )
    return Estimate(value=value, standard_error=error, probes=probes)
