"""Per-example gradients by where the weights meet the examples: the way "layerwise"."""

from keras_rgd.per_example.layerwise.layerwise import Layerwise, layerwise_way

__all__ = ["Layerwise", "layerwise_way"]
