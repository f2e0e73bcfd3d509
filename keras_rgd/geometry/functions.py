"""Each method of `Geometry` as a function of the model and its data, for one call.

The arguments `model`, `x`, `y` and `sample_weight` are those of `Geometry`; all others, what is
returned and what is raised are those of its method of the same name.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_rgd.epsilon import Rule
from keras_rgd.geometry.ensemble import Ensemble
from keras_rgd.geometry.flow import Flow
from keras_rgd.geometry.geometry import Geometry
from keras_rgd.geometry.neglected import NeglectedTerms
from keras_rgd.geometry.steady_state import Estimate


def christoffel(
    model: keras.Model,
    x: Any,
    y: Any,
    u: list,
    v: list,
    epsilon: float | Rule,
    *,
    sample_weight: Any = None,
    exact: bool = False,
    constant_epsilon: bool = True,
) -> list[tf.Tensor]:
    """Gamma^k_ij u^i v^j of I + eps D, Eq. (5) and (7); see `Geometry.christoffel`."""
    return Geometry(model, x, y, sample_weight).christoffel(
        u, v, epsilon, exact=exact, constant_epsilon=constant_epsilon
    )


def gradient_flow(
    model: keras.Model,
    x: Any,
    y: Any,
    duration: float,
    *,
    sample_weight: Any = None,
    **options: Any,
) -> Flow:
    """dx/dt = -grad L(x) from the model's weights on; see `Geometry.gradient_flow`."""
    return Geometry(model, x, y, sample_weight).gradient_flow(duration, **options)


def rgd_flow(
    model: keras.Model,
    x: Any,
    y: Any,
    duration: float,
    epsilon: float | Rule,
    *,
    sample_weight: Any = None,
    **options: Any,
) -> Flow:
    """dx/dt = -(I - eps D) grad L(x), Eq. (10); see `Geometry.rgd_flow`."""
    return Geometry(model, x, y, sample_weight).rgd_flow(duration, epsilon, **options)


def geodesic_flow(
    model: keras.Model,
    x: Any,
    y: Any,
    duration: float,
    epsilon: float | Rule,
    *,
    velocity: list | None = None,
    exact: bool = False,
    force: bool = True,
    sample_weight: Any = None,
    **options: Any,
) -> Flow:
    """The geodesic of I + eps D under the loss's force, Eq. (8); see `Geometry.geodesic_flow`."""
    return Geometry(model, x, y, sample_weight).geodesic_flow(
        duration, epsilon, velocity=velocity, exact=exact, force=force, **options
    )


def neglected_terms(
    flow: Flow, *, epsilon: float | Rule | None = None, nodes: int = 5, verbose: bool = True
) -> NeglectedTerms:
    """The terms that Eq. (10) lacks, along any flow; see `Geometry.neglected_terms`."""
    return flow.equation.geometry.neglected_terms(
        flow, epsilon=epsilon, nodes=nodes, verbose=verbose
    )


def steady_state_residual(
    model: keras.Model, x: Any, y: Any, epsilon: float | Rule, *, sample_weight: Any = None
) -> list[tf.Tensor]:
    """-eps^2 D^2 grad L, the left-hand side of Eq. (11); see `Geometry.steady_state_residual`."""
    return Geometry(model, x, y, sample_weight).steady_state_residual(epsilon)


def diffusion_divergence(
    model: keras.Model,
    x: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    probes: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Estimate:
    """The divergence of D, which Eq. (12) takes for 0; see `Geometry.diffusion_divergence`."""
    return Geometry(model, x, y, sample_weight).diffusion_divergence(
        probes=probes, seed=seed, verbose=verbose
    )


def probability_current(
    model: keras.Model,
    x: Any,
    y: Any,
    epsilon: float | Rule,
    *,
    learning_rate: float,
    batch_size: int,
    sample_weight: Any = None,
    constant_epsilon: bool = True,
    probes: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Estimate:
    """The current j of Eq. (12); see `Geometry.probability_current`."""
    return Geometry(model, x, y, sample_weight).probability_current(
        epsilon,
        learning_rate=learning_rate,
        batch_size=batch_size,
        constant_epsilon=constant_epsilon,
        probes=probes,
        seed=seed,
        verbose=verbose,
    )


def integrability_defect(
    model: keras.Model,
    x: Any,
    y: Any,
    u: list,
    w: list,
    epsilon: float | Rule,
    *,
    sample_weight: Any = None,
    constant_epsilon: bool = True,
) -> float:
    """<u, J w> - <w, J u>, J the Jacobian of (I - eps D) grad L.

    See `Geometry.integrability_defect`.
    """
    return Geometry(model, x, y, sample_weight).integrability_defect(
        u, w, epsilon, constant_epsilon=constant_epsilon
    )


def sgd_ensemble(
    model: keras.Model,
    x: Any,
    y: Any,
    steps: int,
    *,
    learning_rate: float,
    batch_size: int,
    runs: int = 20,
    every: int = 1,
    replacement: bool = True,
    seed: int = 0,
    sample_weight: Any = None,
    verbose: bool = True,
) -> Ensemble:
    """Many runs of SGD from the model's weights, Eq. (1); see `Geometry.sgd_ensemble`."""
    return Geometry(model, x, y, sample_weight).sgd_ensemble(
        steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        runs=runs,
        every=every,
        replacement=replacement,
        seed=seed,
        verbose=verbose,
    )
