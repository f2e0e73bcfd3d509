"""How eps(x) is chosen: the rules, and what a rule sees of D."""

from keras_rgd.epsilon.rules import (
    Fixed,
    Fraction,
    FractionOfMean,
    Measure,
    Rule,
    WeakField,
    choose,
    get,
)
from keras_rgd.epsilon.spectral_measure import GramSpectrum, SpectralMeasure

__all__ = [
    "Fixed",
    "Fraction",
    "FractionOfMean",
    "GramSpectrum",
    "Measure",
    "Rule",
    "SpectralMeasure",
    "WeakField",
    "choose",
    "get",
]
