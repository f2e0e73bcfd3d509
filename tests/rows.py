"""Per-example gradients from a dense matrix G, for tests of the linear algebra alone."""

import numpy as np
import reference
import tensorflow as tf

from keras_rgd._support import vectors
from keras_rgd.per_example.gradients import PerExampleGradients, gram_of_rows

SHAPES = ((2, 3), (4,))  # of the weights: d = 10


class Rows(PerExampleGradients):
    """The rows of G, shape (N, d), as gradients of weights of the given shapes."""

    way = "rows"

    def __init__(self, G, shapes=SHAPES, gram_is_cheap=True, r=None, dtype="float64"):
        G = np.asarray(G)
        v = G.mean(0) + (0 if r is None else r)
        self.dense = reference.Dense(G.astype("float64"), v.astype("float64"))
        self.gram_is_cheap = gram_is_cheap
        self.n_examples = len(G)
        self.weights = [tf.Variable(tf.zeros(s, dtype)) for s in shapes]
        self.gradient = vectors.unflatten(v, self.weights)
        ends = np.cumsum([np.prod(s, dtype=int) for s in shapes])
        parts = np.split(G, ends[:-1], axis=1)
        self._rows = [
            tf.constant(p.reshape(-1, *s), dtype) for p, s in zip(parts, shapes, strict=True)
        ]

    def _dot(self, v):
        return tf.add_n(
            [tf.tensordot(r, x, x.shape.rank) for r, x in zip(self._rows, v, strict=False)]
        )

    def _combine(self, w):
        return [tf.tensordot(w, r, 1) for r in self._rows]

    def gram(self, center=None, unit=1.0):
        return gram_of_rows(self._rows, center, unit)


def random_rows(n=6, seed=0, scale=1.0, offset=1.0, **kwargs):
    """Gradients with a mean that is not 0, and a gradient of r on top."""
    rng = np.random.default_rng(seed)
    d = sum(int(np.prod(s)) for s in kwargs.get("shapes", SHAPES))
    G = scale * (rng.normal(size=(n, d)) * rng.uniform(0.1, 2, d) + offset * rng.normal(size=d))
    return Rows(G, r=scale * rng.normal(size=d), **kwargs)
