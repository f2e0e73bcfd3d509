"""D and its first derivatives at one point of weight space: what all of the geometry is made of.

Cov_i stands for the covariance over the examples, divided by N, as in Eq. (2): D v is
Cov_i(g_i, <g_i, v>), and moving the weights along u changes D by the product rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rgd._support import centring, vectors
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.geometry.derivatives import Derivatives
from keras_rgd.per_example.measuring import as_batch, way_for
from keras_rgd.per_example.state import unchanged


class WeightSpace:
    """The weights of a model as a space to move in, with D and its derivatives where they are.

    Nothing that depends on the values of the weights is kept. What is traced is remembered with the
    model, and looked up at each visit: so layers may be frozen and losses recompiled in between.

    Args:
        model: a compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.

    Raises:
        ValueError: the model is not compiled with a loss that is a weighted sum over examples, or
            has no second derivatives.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None):
        self.model = model
        self.batch = as_batch(model, x, y, sample_weight)
        self._is_visited = False
        with self.visiting():
            pass  # refused here, if at all

    @contextlib.contextmanager
    def visiting(self, often: bool = False) -> Iterator[None]:
        """Whatever runs inside, the model's weights and states end as they began.

        Args:
            often: whether derivatives are asked for at many points. Defaults to `False`.
        """
        if self._is_visited:
            yield
            return
        self._is_visited = True
        try:
            self._way = way_for(self.model, self.batch, training=False)
            with unchanged(self.model):
                self.derivatives = Derivatives(self.model, self.batch, often)
                yield
        finally:
            self._is_visited = False

    @property
    def n_examples(self) -> int:
        """N."""
        return self.batch.size

    @property
    def weights(self) -> list[tf.Variable]:
        """The trainable weights."""
        return self.derivatives.weights

    @property
    def dtype(self) -> tf.DType:
        """The dtype of all that is formed: the widest of the weights', and at least float32."""
        return self.derivatives.dtype

    @property
    def d(self) -> int:
        """The number of trainable scalars."""
        return vectors.size(self.weights)

    def diffusion_matrix(self) -> DiffusionMatrix:
        """D at the model's present weights, to be asked before they change."""
        with self.visiting():
            return DiffusionMatrix(self._way(self.batch))

    def gradient(self) -> list[tf.Tensor]:
        """v, the gradient of L(1)."""
        with self.visiting():
            return self.derivatives.loss_and_gradient()[1]

    def covariance(self, a: Tensor) -> Vector:
        """Cov_i(a_i, g_i), for a of shape (N,)."""
        return self.derivatives.combine(self._centred(a))

    def covariance_hessian(self, a: Tensor, u: Vector) -> Vector:
        """Cov_i(a_i, H_i u)."""
        return self.derivatives.hessian(self._centred(a), u)

    def covariance_third(self, a: Tensor, u: Vector, v: Vector) -> Vector:
        """Cov_i(a_i, T_i(u, v)), with T_i(u, v) the gradient of <u, H_i v>."""
        return self.derivatives.third(self._centred(a), u, v)

    def product(self, v: Vector) -> Vector:
        """D v, by derivatives that are traced already; `DiffusionMatrix` would trace its own."""
        return self.covariance(self.derivatives.dot(v))

    def product_change(self, u: Vector, v: Vector) -> Vector:
        """(d/du D) v, the derivative of D along u, times v."""
        return vectors.add(
            self.covariance_hessian(self.derivatives.dot(v), u),
            self.covariance(self.derivatives.second(u, v)),
        )

    def lowered_christoffel(
        self, u: Vector, v: Vector, epsilon: float, epsilon_gradient: Vector | None = None
    ) -> Vector:
        """The lowered Christoffel symbols Gamma_kij u^i v^j of g = I + eps D, exactly.

        eps Cov_i(<u, H_i v>, g_i), Eq. (7); and where eps has a gradient e also
        (<e, u> D v + <e, v> D u - <u, D v> e) / 2, by Eq. (5).
        """
        result = vectors.scale(self.covariance(self.derivatives.second(u, v)), epsilon)
        if epsilon_gradient is None:
            return result
        e, Dv = epsilon_gradient, self.product(v)
        Du = self.product(u)
        result = vectors.add(result, Dv, vectors.inner(e, u) / 2)
        result = vectors.add(result, Du, vectors.inner(e, v) / 2)
        return vectors.add(result, e, -vectors.inner(u, Dv) / 2)

    def vector(self, v: Any, name: str) -> list[tf.Tensor]:
        """v as a list of tensors shaped as the weights and of their dtype.

        Raises:
            ValueError: it is not shaped as the weights; names the argument.
        """
        expected = [tuple(w.shape) for w in self.weights]
        given = [tuple(np.shape(t)) for t in v] if isinstance(v, list | tuple) else type(v).__name__
        if given != expected:
            raise ValueError(
                f"`{name}` must be a list of arrays shaped as the trainable weights, {expected}. "
                f"Received: {given}"
            )
        return [tf.cast(tf.convert_to_tensor(t), self.dtype) for t in v]

    def flat_weights(self) -> np.ndarray:
        """The trainable weights as one numpy vector, float64, shape (d,)."""
        return vectors.flatten([w.numpy() for w in self.weights]).astype(np.float64)

    def move_to(self, position: np.ndarray) -> None:
        """Set the trainable weights to a numpy vector of shape (d,)."""
        for w, value in zip(self.weights, vectors.unflatten(position, self.weights), strict=True):
            w.assign(value)

    def _centred(self, a):
        return centring.centred(a) / self.n_examples
