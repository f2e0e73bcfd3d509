"""Whether the examples of a batch mix, read off the traced graph."""

from keras_rgd.per_example.mixing.mixing import Mixing, mixing_of

__all__ = ["Mixing", "mixing_of"]
