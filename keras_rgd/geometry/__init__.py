"""The geometry of the diffusion metric: sections 2 and 3 of the paper, matrix-free."""

from keras_rgd.geometry.connection import christoffel
from keras_rgd.geometry.ensemble import Ensemble, sgd_ensemble
from keras_rgd.geometry.flow import Flow, geodesic_flow, gradient_flow, rgd_flow
from keras_rgd.geometry.neglected import NeglectedTerms, neglected_terms
from keras_rgd.geometry.steady_state import (
    Estimate,
    diffusion_divergence,
    integrability_defect,
    probability_current,
    steady_state_residual,
)

__all__ = [
    "Ensemble",
    "Estimate",
    "Flow",
    "NeglectedTerms",
    "christoffel",
    "diffusion_divergence",
    "geodesic_flow",
    "gradient_flow",
    "integrability_defect",
    "neglected_terms",
    "probability_current",
    "rgd_flow",
    "sgd_ensemble",
    "steady_state_residual",
]
