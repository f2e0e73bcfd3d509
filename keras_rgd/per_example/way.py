"""A way to per-example gradients: what makes them for a model, and why it was chosen.

Each way's file has the function that makes its `Way`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import PerExampleGradients


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
