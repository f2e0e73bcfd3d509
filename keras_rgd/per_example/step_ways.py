"""The way to per-example gradients of the training steps of a model, from its first step on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from keras_rgd._keras.models import layers_of
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.choice import Wanted, choose_way
from keras_rgd.per_example.gradients import PerExampleGradients
from keras_rgd.per_example.losses import ExampleLosses
from keras_rgd.per_example.traces import specs_of, structure
from keras_rgd.per_example.way import Way


class StepWays:
    """The ways of one training function: chosen for its first batch, and wherever it is retraced.

    A step that is traced once more, for another shape or with other layers frozen, is never taken
    by a way that is not exact for it any more.

    Args:
        model: the model.
        wanted: a `Wanted`.
        told: a function of the `Way`, called where it is another than before.

    Attributes:
        last: the `Way` chosen last, `None` at first.
    """

    def __init__(self, model: keras.Model, wanted: Wanted, told: Callable):
        self._losses, self._wanted = ExampleLosses(model, training=True), wanted
        self._told = told
        self.last: Way | None = None
        self._sizes: Batch | None = None
        self._ways: dict = {}  # by what is known of a step when it is traced

    def choose(self, specs: Batch, batch: Batch | None = None) -> Way:
        """The `Way` for a step that is traced for these specs.

        Args:
            specs: a `Batch` of tensors or of a spec of each.
            batch: the first batch of this fit; `None` where its step is traced once more.
        """
        wanted = self._wanted
        if wanted.per_example == "auto" and self.last and self.last.name == "double_backward":
            wanted = dataclasses.replace(wanted, per_example="double_backward")
        if batch is not None:
            self._sizes = specs_of(batch)
        way = choose_way(self._losses, wanted, specs, batch, self._sizes)
        if self.last is None or way.name != self.last.name:
            self.last = way
            self._told(way)
        self._ways[self._key(specs)] = way
        return way

    def gradients(self, batch: Batch, loss_scale: Any) -> PerExampleGradients:
        """The per-example gradients of the step at hand.

        Its way is chosen anew where the step is another than was asked about.
        """
        way = self._ways.get(self._key(batch)) or self.choose(specs_of(batch))
        return way(batch, loss_scale)

    def _key(self, batch: Batch) -> tuple:
        """What is known of a step when it is traced: shapes, and what is trained."""
        model = self._losses.model
        trained = tuple(id(v) for v in model.trainable_variables)
        return (
            structure(batch),
            trained,
            tuple(layer.trainable for layer in layers_of(model)),
        )
