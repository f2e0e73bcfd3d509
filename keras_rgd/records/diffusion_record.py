"""DiffusionRecord: what a measurement of D on one batch says, frozen, saved and loaded as JSON."""

import dataclasses
import math
import os

import numpy as np

from keras_rgd._support.json_files import load_json, plain, revived, save_json

# The first entry of a file names what it is and its version.
_RECORDS, _VERSION = "keras_rgd_records", 1


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionRecord:
    """D at one moment of training, on `examples` examples.

    "Squared gradient" is the unit of eigenvalues: the loss's unit over the weights', squared. NaN
    stands for what is not defined at that moment, which is all where gradients are not finite.
    """

    epoch: int  # counted from 0, as Keras passes it
    step: int  # the optimizer's iterations so far
    examples: int  # N
    n_weights: int  # d
    mode: str  # "evaluation" or "training"
    per_example: str  # how the gradients were had
    seconds: float  # what the measurement took
    eigenvalues: np.ndarray  # (min(N, d),), float64, descending, squared gradient
    lambda_max: float  # squared gradient
    trace: float  # tr D, squared gradient
    rank: int | None  # above rank_cut; None where that cut means nothing
    rank_reason: str | None  # why rank is None
    rank_cut: float  # lambda_max * d * float32 epsilon, as in arXiv 1710.11029; NaN with rank
    rank_gram: int  # above rank_gram_cut
    rank_gram_cut: float  # lambda_max * N * epsilon of the weights' dtype
    rank_bound: int  # N - 1, Eq. (3) of the paper
    eigenvalue_mean: float  # over all d, squared gradient
    eigenvalue_std: float  # over all d
    clipped_mean: float  # over all d, from below at rank_cut (rank_gram_cut where that is NaN)
    clipped_std: float  # likewise
    participation_ratio: float  # tr(D)^2 / tr(D^2), in [1, N - 1]
    effective_rank: float  # exp of the entropy of eigenvalues / trace
    epsilon: float  # by the optimizer's rule or the callback's, one over squared gradient
    epsilon_lambda_max: float  # eps * lambda_max, in [0, 1)
    weak_field_error: float  # ||(I + eps D)^-1 - (I - eps D)||, in [0, 1/2)
    weak_field_error_gradient: float  # of (I + eps D)^-1 v, relative, v the gradient
    step_epsilon: float  # geometric mean over the epoch's steps with eps > 0; NaN without RGD's
    descent_ratio: float  # 1 - eps v^T D v / |v|^2, in (0, 1]
    cosine_top: float  # |cos| of v and the top eigenvector
    overlap: float  # tr(P_t P_s) / k with the last record's top k <= 10; NaN the first time
    gradient_norm: float  # |v|
    noise_scale: float  # tr S / |G|^2, unbiased (arXiv 1812.06162), in examples; NaN if |G|^2 <= 0
    # What Eq. (10) neglects with its own velocity; NaN unless the monitor was asked for it.
    neglected_curvature: float = math.nan  # |eps Cov_i(f_i, H_i x')| / |v|
    neglected_acceleration: float = math.nan  # |eps D x''| / |dv/dt|
    neglected_christoffel: float = math.nan  # O(eps^2) of Eq. (7) / |dv/dt|
    neglected_epsilon: float = math.nan  # of the derivative of eps(x) / |dv/dt|
    # Of RGD's own steps and D; NaN or None with other optimizers.
    steps_without_epsilon: int | None = None  # the epoch's steps with eps = 0, as where D is 0
    step_epsilon_lambda_max: float = math.nan  # step_epsilon * lambda_max: of eps < 1/M_x, D above
    step_weak_field_error: float = math.nan  # mean over the epoch's steps, of each
    step_lambda_max: float = math.nan  # M_x as the last step saw it, a bound or with a margin
    window_cosine: float = math.nan  # of D v by the window and D v as measured, v the gradient
    window_rank: int | None = None  # of the window's D, at most W - 1; None without a window
    products_dtype: str | None = None  # of the inner products that D is made of; None before 0.2

    def __post_init__(self):
        self.eigenvalues.flags.writeable = False


def save_records(records: list[DiffusionRecord], path: str | os.PathLike) -> None:
    """Write records to one JSON file, whole or not at all.

    Args:
        records: a list of `DiffusionRecord`.
        path: the file; its folder must exist.

    Raises:
        FileNotFoundError: it does not.
    """
    rows = [{k: plain(v) for k, v in vars(record).items()} for record in records]
    save_json({_RECORDS: _VERSION, "records": rows}, path)


def load_records(path: str | os.PathLike) -> list[DiffusionRecord]:
    """Read what `save_records` wrote.

    Args:
        path: the file.

    Returns:
        A list of `DiffusionRecord`.

    Raises:
        ValueError: the file holds no records, or records of another version of this package.
    """
    content = load_json(path, _RECORDS, _VERSION, writer="save_records")
    return [revived(DiffusionRecord, row, path) for row in content.get("records", [None])]
