"""The fields of records of D: what both kinds hold, and what only one of them does.

Each function returns some fields of a `DiffusionRecord` or of a `Spectrum`, by their names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_rgd._support import vectors
from keras_rgd.diffusion_matrix import DiffusionMatrix, has_reference_cut, rank_cut
from keras_rgd.diffusion_metric import DiffusionMetric, choose_epsilon
from keras_rgd.epsilon import Rule
from keras_rgd.records.diffusion_record import DiffusionRecord

if TYPE_CHECKING:
    from keras_rgd.optimizer import RGD


def eigenvalues(D: DiffusionMatrix) -> dict[str, Any]:
    """The fields of a `DiffusionRecord` that follow from the eigenvalues."""
    found, d = D.eigenvalues(), D.n_weights
    try:
        cut, rank_reason = D.rank_cut("reference"), None
        rank = D.rank(cut)
    except ValueError as error:
        cut, rank, rank_reason = math.nan, None, str(error)
    gram_cut = D.rank_cut("gram")
    mean, std = mean_std(found, d)
    clipped_mean, clipped_std = clipped_mean_std(found, d, gram_cut if rank is None else cut)
    return {
        "eigenvalues": found,
        "lambda_max": float(found[0]),
        "trace": D.trace(),
        "rank": rank,
        "rank_reason": rank_reason,
        "rank_cut": cut,
        "rank_gram": D.rank(gram_cut),
        "rank_gram_cut": gram_cut,
        "eigenvalue_mean": mean,
        "eigenvalue_std": std,
        "clipped_mean": clipped_mean,
        "clipped_std": clipped_std,
        "participation_ratio": participation_ratio(found),
        "effective_rank": effective_rank(found),
    }


def dataset_eigenvalues(
    found: np.ndarray, trace: float, n: int, d: int, whole: bool
) -> dict[str, Any]:
    """The fields of a `Spectrum` that follow from the eigenvalues, but for these themselves.

    Args:
        found: eigenvalues, descending, squared gradient.
        trace: tr D.
        n: N.
        d: the number of trainable scalars.
        whole: whether all min(N, d) eigenvalues are given, or only the leading ones.
    """
    lambda_max = float(found[0])
    by_d = has_reference_cut(d)
    cut = rank_cut(lambda_max, n, d, "reference" if by_d else "gram_of_dataset")
    rank = int(np.count_nonzero(found > cut))
    open_ended = not whole and rank == len(found)
    clipped = (math.nan, math.nan) if open_ended else clipped_mean_std(found, d, cut)
    return {
        "lambda_max": lambda_max,
        "trace": trace,
        "rank": rank,
        "rank_is_lower_bound": open_ended,
        "rank_cut": cut,
        "rank_rule": "reference" if by_d else "gram",
        "rank_bound": min(n - 1, d),
        "eigenvalue_mean": trace / d,
        "eigenvalue_std": mean_std(found, d)[1] if whole else math.nan,
        "clipped_mean": clipped[0],
        "clipped_std": clipped[1],
    }


def gradient(D: DiffusionMatrix, rule: Rule, step: int) -> dict[str, Any]:
    """The fields of a `DiffusionRecord` that need the gradient v."""
    v = D.gradients.gradient
    norm = float(vectors.norm(v))
    along = D.example_coordinates(v) / norm if norm > 0 else np.full(1, math.nan)
    epsilon = choose_epsilon(D, rule, v, step)
    metric = DiffusionMetric(D, epsilon)
    return {
        "epsilon": epsilon,
        "epsilon_lambda_max": epsilon * D.top_eigenvalue(),
        "weak_field_error": metric.weak_field_error(),
        "weak_field_error_gradient": metric.weak_field_error(v),
        "descent_ratio": float(1 - epsilon * np.sum(D.eigenvalues() * along**2)),
        "cosine_top": float(abs(along[0])),
        "gradient_norm": norm,
        "noise_scale": noise_scale(
            D.n_examples, D.trace(), float(vectors.norm(D.gradients.mean())) ** 2
        ),
    }


def undefined(D: DiffusionMatrix, error: Exception) -> dict[str, Any]:
    """The fields where gradients are not finite: training goes on, and so do the records."""
    values = {f.name: math.nan for f in dataclasses.fields(DiffusionRecord) if f.type is float}
    del values["seconds"]
    return values | {
        "eigenvalues": np.full(min(D.shape[0], D.n_examples), math.nan),
        "rank": None,
        "rank_reason": str(error),
        "rank_gram": 0,
    }


def steps(rgd: RGD | None, lambda_max: float) -> dict[str, Any]:
    """The fields of a `DiffusionRecord` that are about the steps of `RGD`."""
    if rgd is None or not rgd.built:
        return {"step_epsilon": math.nan}
    means = rgd.step_means()
    return {
        "step_epsilon": means.epsilon,
        "steps_without_epsilon": means.steps_without_epsilon,
        "step_epsilon_lambda_max": means.epsilon * lambda_max,
        "step_weak_field_error": means.weak_field_error,
        "step_lambda_max": float(rgd.lambda_max),
    }


def window(D: DiffusionMatrix, rgd: RGD | None, weights: Sequence[Any]) -> dict[str, Any]:
    """The fields of a `DiffusionRecord` that compare the window's D with the measured one.

    Args:
        D: as measured.
        rgd: the optimizer, or `None`.
        weights: of which `D` is, in its order.
    """
    if rgd is None or rgd.window is None or rgd.stored_gradients < 2:
        return {}
    of_window, v = rgd.diffusion_matrix(), D.gradients.gradient
    # Layers may have been frozen since the optimizer was built.
    given = dict(zip(map(id, weights), v, strict=True))
    whole = [given.get(id(w), np.zeros(w.shape)) for w in of_window.gradients.weights]
    products = dict(zip(map(id, of_window.gradients.weights), of_window.matvec(whole), strict=True))
    a, b = D.matvec(v), [products[id(w)] for w in weights]
    lengths = float(vectors.norm(a)) * float(vectors.norm(b))
    cosine = float(vectors.inner(a, b)) / lengths if lengths > 0 else math.nan
    return {"window_rank": of_window.rank(), "window_cosine": cosine}


def mean_std(values: np.ndarray, d: int, rest: float = 0.0) -> tuple[float, float]:
    """Mean and standard deviation of `values` and of d - len(values) numbers equal to `rest`."""
    others = d - len(values)
    mean = (values.sum() + others * rest) / d
    variance = (np.sum((values - mean) ** 2) + others * (rest - mean) ** 2) / d
    return float(mean), float(np.sqrt(variance))


def clipped_mean_std(eigenvalues: np.ndarray, d: int, cut: float) -> tuple[float, float]:
    """Mean and standard deviation over all d eigenvalues, none of them taken below `cut`."""
    return mean_std(np.maximum(eigenvalues, cut), d, rest=cut)


def participation_ratio(eigenvalues: np.ndarray) -> float:
    """tr(D)^2 / tr(D^2), in [1, rank]; NaN for D = 0."""
    squares = np.sum(eigenvalues**2)
    return float(eigenvalues.sum() ** 2 / squares) if squares > 0 else math.nan


def effective_rank(eigenvalues: np.ndarray) -> float:
    """exp of the entropy of eigenvalues / trace (Roy and Vetterli 2007); NaN for D = 0."""
    total = eigenvalues.sum()
    p = eigenvalues[eigenvalues > 0] / total if total > 0 else np.array([])
    return float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan


def noise_scale(n: int, trace: float, mean_square: float) -> float:
    """tr S / |G|^2 of McCandlish et al. (arXiv 1812.06162), both unbiased, without grad r.

    Args:
        n: N.
        trace: tr D.
        mean_square: |gbar|^2.

    Returns:
        A float, in examples; NaN for one example, or where |G|^2 is not positive.
    """
    if n == 1:
        return math.nan
    # mean |g_i|^2 = tr D + |gbar|^2
    covariance = n / (n - 1) * trace
    signal = mean_square - trace / (n - 1)
    return covariance / signal if signal > 0 else math.nan
