"""Measuring D of a compiled model on a batch, outside training."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import keras
import numpy as np

from keras_rgd._keras.models import layers_of
from keras_rgd._support import vectors
from keras_rgd._support.arguments import check_training
from keras_rgd.diffusion_matrix import DiffusionMatrix, NotFiniteError
from keras_rgd.diffusion_metric import DiffusionMetric, choose_epsilon
from keras_rgd.per_example.measuring import as_batch, way_for
from keras_rgd.records import DiffusionRecord

# How many leading eigenvectors are compared between records.
_OVERLAP = 10


def diffusion_matrix(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    training: bool = False,
    per_example: str = "auto",
    chunk_size: int | None = None,
) -> DiffusionMatrix:
    """D of a compiled model on one batch, Eq. (2) of the paper.

    The model is left as it was: no weight, moving statistic, seed or metric changes.

    Args:
        model: any compiled `keras.Model`, whatever its optimizer.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        training: `False` for evaluation mode (no Dropout, moving statistics), as D is measured
            in the literature; `True` for training mode. Defaults to `False`.
        per_example: "layerwise", "vectorized_map", "double_backward", or "auto": "layerwise" where
            that is exact for the model, else one example a lane where that is, else
            "double_backward", whose Gram matrix costs N backward passes. Defaults to `"auto"`.
        chunk_size: how many examples' gradients are held at once by the ways that hold any.
            Defaults to `None`, as many as fit in 1 GiB.

    Returns:
        A `DiffusionMatrix`.

    Raises:
        ValueError: the model is not compiled with a loss that is a weighted sum over examples, or
            the way asked for does not serve it.
    """
    check_training(training)
    batch = as_batch(model, x, y, sample_weight)
    way = way_for(model, batch, training, per_example, chunk_size)
    return DiffusionMatrix(way(batch))


class Measurement:
    """D of one model on one fixed batch, again and again while the model trains.

    Args:
        model: a compiled `keras.Model`.
        batch: `as_batch(...)`.
        training: whether layers behave as in training.
        per_example: as in `diffusion_matrix`.
        chunk_size: as in `diffusion_matrix`.
    """

    def __init__(self, model, batch, training, per_example, chunk_size):
        self._batch = batch
        self._weights, self._trained = model.trainable_variables, _trained(model)
        self._mode = "training" if training else "evaluation"
        self._way = way_for(model, batch, training, per_example, chunk_size)
        self._last_top = None

    def __call__(self, rule, *, epoch, step, rgd=None):
        """Measure now.

        Args:
            rule: a rule of `keras_rgd.epsilon`, applied to the measured D along the gradient.
            epoch: recorded.
            step: recorded, and the rule's iteration.
            rgd: the `RGD` that trains the model, whose steps and own D are recorded beside.
                Defaults to `None`.

        Returns:
            A `DiffusionRecord`.
        """
        start = time.perf_counter()
        gradients = self._way(self._batch)
        D = DiffusionMatrix(gradients)
        try:
            values = _spectral_values(D) | _gradient_values(D, rule, step)
            values["overlap"] = self._overlap(D, values["rank_gram"])
            values |= _window_values(D, rgd, self._weights)
        except NotFiniteError as error:
            self._last_top = None
            values = _undefined_values(D, error)
        values |= _step_values(rgd, values["lambda_max"])
        return DiffusionRecord(
            epoch=epoch,
            step=step,
            examples=D.n_examples,
            n_weights=D.n_weights,
            mode=self._mode,
            per_example=gradients.way,
            rank_bound=D.n_examples - 1,
            seconds=time.perf_counter() - start,
            **values,
        )

    def is_of(self, model):
        """Whether the same weights and layers of the model are trained as before."""
        # A layer without weights may behave otherwise when it is frozen, as BatchNormalization.
        now, trained = model.trainable_variables, _trained(model)
        same = len(now) == len(self._weights) and trained == self._trained
        return same and all(a is b for a, b in zip(now, self._weights, strict=True))

    def _overlap(self, D, rank):
        """tr(P_t P_s) / k of the top eigenspaces of this D and the last one measured."""
        last, self._last_top = self._last_top, None
        if rank == 0:
            return math.nan
        top = D.eigenvectors(min(_OVERLAP, rank))
        self._last_top = np.concatenate([np.reshape(t, (t.shape[0], -1)) for t in top], axis=1)
        if last is None:
            return math.nan
        k = min(len(last), len(self._last_top))
        return float(np.sum((self._last_top[:k] @ last[:k].T) ** 2) / k)


def _trained(model):
    return [layer.trainable for layer in layers_of(model)]


def _undefined_values(D, error):
    """The fields of a record of gradients that are not finite: training goes on, and so do we."""
    values = {f.name: math.nan for f in dataclasses.fields(DiffusionRecord) if f.type is float}
    del values["seconds"]
    return values | {
        "eigenvalues": np.full(min(D.shape[0], D.n_examples), math.nan),
        "rank": None,
        "rank_reason": str(error),
        "rank_gram": 0,
    }


def _spectral_values(D):
    """The fields of a record that follow from the eigenvalues."""
    eigenvalues, d = D.eigenvalues(), D.n_weights
    total, squares = eigenvalues.sum(), np.sum(eigenvalues**2)
    try:
        cut, rank_reason = D.rank_cut("reference"), None
        rank = D.rank(cut)
    except ValueError as error:
        cut, rank, rank_reason = math.nan, None, str(error)
    gram_cut = D.rank_cut("gram")
    mean, std = mean_std(eigenvalues, d)
    clip = gram_cut if rank is None else cut
    clipped_mean, clipped_std = mean_std(np.maximum(eigenvalues, clip), d, rest=clip)
    p = eigenvalues[eigenvalues > 0] / total if total > 0 else np.array([])
    return {
        "eigenvalues": eigenvalues,
        "lambda_max": float(eigenvalues[0]),
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
        "participation_ratio": float(total**2 / squares) if squares > 0 else math.nan,
        "effective_rank": float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan,
    }


def mean_std(values, d, rest=0.0):
    """Mean and standard deviation of `values` and of d - len(values) numbers equal to `rest`."""
    others = d - len(values)
    mean = (values.sum() + others * rest) / d
    variance = (np.sum((values - mean) ** 2) + others * (rest - mean) ** 2) / d
    return float(mean), float(np.sqrt(variance))


def _gradient_values(D, rule, step):
    """The fields of a record that need the gradient v."""
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


def _step_values(rgd, lambda_max):
    """The fields of a record that are about the steps of `RGD`."""
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


def _window_values(D, rgd, weights):
    """The fields of a record that compare the window's D with the measured one."""
    if rgd is None or rgd.window is None or rgd.stored_gradients < 2:
        return {}
    window, v = rgd.diffusion_matrix(), D.gradients.gradient
    # Layers may have been frozen since the optimizer was built.
    of = dict(zip(map(id, weights), v, strict=True))
    whole = [of.get(id(w), np.zeros(w.shape)) for w in window.gradients.weights]
    images = dict(zip(map(id, window.gradients.weights), window.matvec(whole), strict=True))
    a, b = D.matvec(v), [images[id(w)] for w in weights]
    lengths = float(vectors.norm(a)) * float(vectors.norm(b))
    cosine = float(vectors.inner(a, b)) / lengths if lengths > 0 else math.nan
    return {"window_rank": window.rank(), "window_cosine": cosine}


def noise_scale(n, trace, mean_square):
    """Tr S / |G|^2 of McCandlish et al. (arXiv 1812.06162), both unbiased, without grad r.

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
