"""Spectrum: what is known of D over a whole data set, frozen, saved and loaded as JSON."""

import dataclasses
import os

import numpy as np

from keras_rgd._support.json_files import load_json, plain, revived, save_json

# The first entry of a file names what it is and its version.
_SPECTRUM, _VERSION = "keras_rgd_spectrum", 1


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """D of a model over a data set of N examples.

    "Squared gradient" is the unit of eigenvalues: the loss's unit over the weights', squared.
    """

    eigenvalues: np.ndarray  # (k,), float64, descending, squared gradient
    residuals: np.ndarray  # (k,), |D u - lambda u| of each, squared gradient; 0 of a dense solver
    lambda_max: float  # squared gradient
    trace: float  # tr D, exact also where only the leading eigenvalues are known
    rank: int  # eigenvalues above rank_cut
    rank_is_lower_bound: bool  # of the leading eigenvalues all are above it; there may be more
    rank_cut: float  # by rank_rule, squared gradient
    rank_rule: (
        str  # "reference", lambda_max d eps32 (arXiv 1710.11029); else "gram", min(N, d) for d
    )
    rank_bound: int  # min(N - 1, d), Eq. (3) of the paper
    eigenvalue_mean: float  # over all d, tr D / d
    eigenvalue_std: float  # over all d; NaN where not all eigenvalues are known
    clipped_mean: float  # over all d, from below at rank_cut; NaN where the rank is a lower bound
    clipped_std: float  # likewise
    gradient_norm: float  # |v|, v the gradient of the loss over the data set
    noise_scale: float  # tr S / |G|^2, unbiased (arXiv 1812.06162), in examples; NaN if |G|^2 <= 0
    n_examples: int  # N
    n_weights: int  # d
    mode: str  # "evaluation" or "training"
    method: str  # "gram", "covariance" or "iterative"
    per_example: str  # how the gradients were had
    seconds: float
    products_dtype: str | None = None  # of the inner products that D is made of; None before 0.2

    def __post_init__(self):
        self.eigenvalues.flags.writeable = False
        self.residuals.flags.writeable = False

    @property
    def rank_percent(self) -> float:
        """The rank in percent of d, as the literature gives it."""
        return 100 * self.rank / self.n_weights

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a JSON file, whole or not at all.

        Raises:
            FileNotFoundError: the file's folder does not exist.
        """
        fields = {k: plain(v) for k, v in vars(self).items()}
        save_json({_SPECTRUM: _VERSION, "spectrum": fields}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Spectrum":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no spectrum, or one of another version of this package.
        """
        content = load_json(path, _SPECTRUM, _VERSION, writer="Spectrum.save")
        return revived(cls, content.get("spectrum", {}), path)
