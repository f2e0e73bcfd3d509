"""`Way`, a way to per-example gradients, and `StepWays`, those of the training steps of a model.

Each way's file has the function that makes its `Way`; `choice.py` chooses one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_rgd._keras.models import layers_of
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import PerExampleGradients


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked of a way.

    Attributes:
        per_example: its name, one of `keras_rgd._support.arguments.WAYS`.
        chunk_size: examples whose gradients "vectorized_map" holds at once; `None` for all.
        microbatch_size: examples that are differentiated together; `None` for all.
        compiled: whether the step is compiled with XLA.
    """

    per_example: str = "auto"
    chunk_size: int | None = None
    microbatch_size: int | None = None
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """What makes per-example gradients for a model, and why this one.

    `way(batch, loss_scale)` gives the `PerExampleGradients` of a `Batch`. The loss scale keeps
    half-precision gradients in range and cancels; it is 1 by default.

    Attributes:
        name: "layerwise", "double_backward", "vectorized_map", or where D is measured also
            "one_by_one"; as in `per_example=`.
        reason: why it was chosen, a clause.
        make: the function of a batch and a loss scale.
    """

    name: str
    reason: str
    make: Callable[..., PerExampleGradients] = dataclasses.field(repr=False)

    def __call__(self, batch: Batch, loss_scale: Any = 1.0) -> PerExampleGradients:
        return self.make(batch, loss_scale)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class StepWays:
    """The ways of one training function: chosen for its first batch, and wherever it is retraced.

    A step that is traced once more, for another shape or with other layers frozen, is never taken
    by a way that is not exact for it any more.

    Args:
        losses: the `ExampleLosses` of the model in training mode.
        wanted: a `Wanted`.
        choose_way: the function `keras_rgd.per_example.choose_way`, whose ways are made of `Way`.
        told: a function of the `Way`, called where it is another than before.

    Attributes:
        last: the `Way` chosen last, `None` at first.
    """

    def __init__(self, losses: Any, wanted: Wanted, choose_way: Callable, told: Callable):
        self._losses, self._wanted = losses, wanted
        self._choose_way, self._told = choose_way, told
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
            self._sizes = batch.specs()
        way = self._choose_way(self._losses, wanted, specs, batch, self._sizes)
        if self.last is None or way.name != self.last.name:
            self.last = way
            self._told(way)
        self._ways[self._key(specs)] = way
        return way

    def gradients(self, batch: Batch, loss_scale: Any) -> PerExampleGradients:
        """The per-example gradients of the step at hand.

        Its way is chosen anew where the step is another than was asked about.
        """
        way = self._ways.get(self._key(batch)) or self.choose(batch.specs())
        return way(batch, loss_scale)

    def _key(self, batch: Batch) -> tuple:
        """What is known of a step when it is traced: shapes, and what is trained."""
        model = self._losses.model
        trained = tuple(id(v) for v in model.trainable_variables)
        return (
            batch.signature,
            trained,
            tuple(layer.trainable for layer in layers_of(model)),
        )
