"""The geometry of the diffusion metric: sections 2 and 3 of the paper, matrix-free.

`Geometry(model, x, y)` has all of it as methods; the functions are one call each of one method.
"""

from keras_rgd.geometry.ensemble import Ensemble
from keras_rgd.geometry.flow import Flow
from keras_rgd.geometry.functions import (
    christoffel,
    diffusion_divergence,
    geodesic_flow,
    gradient_flow,
    integrability_defect,
    neglected_terms,
    probability_current,
    rgd_flow,
    sgd_ensemble,
    steady_state_residual,
)
from keras_rgd.geometry.geometry import Geometry
from keras_rgd.geometry.neglected import NeglectedTerms
from keras_rgd.geometry.steady_state import Estimate

__all__ = [
    "Ensemble",
    "Estimate",
    "Flow",
    "Geometry",
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
