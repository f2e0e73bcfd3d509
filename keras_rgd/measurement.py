"""Measuring D of a compiled model on a batch, outside training."""

from __future__ import annotations

import math
import time
from typing import Any

import keras
import numpy as np

from keras_rgd._keras.models import layers_of
from keras_rgd._support.arguments import check_training
from keras_rgd.diffusion_matrix import DiffusionMatrix, NotFiniteError
from keras_rgd.per_example.measuring import as_batch, way_for
from keras_rgd.records import DiffusionRecord
from keras_rgd.records import values as values_of

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
            "double_backward", whose Gram matrix costs N backward passes. On JAX "linearized".
            Defaults to `"auto"`.
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
    way = way_for(model, batch, training=training, per_example=per_example, chunk_size=chunk_size)
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
        self._way = way_for(
            model, batch, training=training, per_example=per_example, chunk_size=chunk_size
        )
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
            values = values_of.eigenvalues(D) | values_of.gradient(D, rule, step)
            values["overlap"] = self._overlap(D, values["rank_gram"])
            values |= values_of.window(D, rgd, self._weights)
        except NotFiniteError as error:
            self._last_top = None
            values = values_of.undefined(D, error)
        values |= values_of.steps(rgd, values["lambda_max"])
        return DiffusionRecord(
            epoch=epoch,
            step=step,
            examples=D.n_examples,
            n_weights=D.n_weights,
            mode=self._mode,
            per_example=gradients.way,
            products_dtype=gradients.products_dtype,
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
