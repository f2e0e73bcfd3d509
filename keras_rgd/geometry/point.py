"""D and its first derivatives at one point of weight space: what all of the geometry is made of.

Cov_i stands for the covariance over the examples, divided by N, as in Eq. (2): D v is
Cov_i(g_i, <g_i, v>), and moving the weights along u changes D by the product rule.
"""

import contextlib

import numpy as np
import tensorflow as tf

from keras_rgd._support import centring, vectors
from keras_rgd.diffusion_matrix import DiffusionMatrix
from keras_rgd.geometry.derivatives import Derivatives
from keras_rgd.per_example.measuring import as_batch, way_for
from keras_rgd.per_example.state import unchanged


class Point:
    """D and its derivatives for one model and batch, wherever the weights are now.

    Args:
        model: a compiled `keras.Model`.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        compiled: as in `Derivatives`. Defaults to `False`.

    Raises:
        ValueError: the model is not compiled with a loss that is a weighted sum over examples, or
            has no second derivatives.
    """

    def __init__(self, model, x, y=None, sample_weight=None, compiled=False):
        self.model = model
        self.batch = as_batch(model, x, y, sample_weight)
        self._way = way_for(model, self.batch, False, "auto", None)
        self.derivatives = Derivatives(model, *self.batch, compiled=compiled)
        with self.visiting():
            self.derivatives.check()
        self.n_examples = self.derivatives.n_examples
        self.weights = self.derivatives.weights
        self.dtype = self.derivatives.dtype

    @property
    def d(self):
        """The number of trainable scalars."""
        return vectors.size(self.weights)

    def diffusion_matrix(self):
        """D at the model's present weights."""
        return DiffusionMatrix(self._way(self.batch))

    def gradient(self):
        """v, the gradient of L(1)."""
        return self.derivatives.loss_and_gradient()[1]

    def covariance(self, a):
        """Cov_i(a_i, g_i), for a of shape (N,)."""
        return self.derivatives.combine(self._centred(a))

    def covariance_hessian(self, a, u):
        """Cov_i(a_i, H_i u)."""
        return self.derivatives.hessian(self._centred(a), u)

    def covariance_third(self, a, u, v):
        """Cov_i(a_i, T_i(u, v)), with T_i(u, v) the gradient of <u, H_i v>."""
        return self.derivatives.third(self._centred(a), u, v)

    def product(self, v):
        """D v, by derivatives that are traced already; `DiffusionMatrix` would trace its own."""
        return self.covariance(self.derivatives.dot(v))

    def product_change(self, u, v):
        """(d/du D) v, the derivative of D along u, times v."""
        return vectors.add(
            self.covariance_hessian(self.derivatives.dot(v), u),
            self.covariance(self.derivatives.second(u, v)),
        )

    def christoffel(self, u, v, epsilon, epsilon_gradient=None):
        """The lowered Christoffel symbols Gamma_kij u^i v^j of g = I + eps D, exactly.

        Eps Cov_i(<u, H_i v>, g_i), Eq. (7); and where eps has a gradient e also
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

    def vector(self, v, name):
        """V as a list of tensors shaped as the weights and of their dtype.

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

    def flat_weights(self):
        """The trainable weights as one numpy vector, float64, shape (d,)."""
        return vectors.flatten([w.numpy() for w in self.weights]).astype(np.float64)

    def move_to(self, position):
        """Set the trainable weights to a numpy vector of shape (d,)."""
        for w, value in zip(self.weights, vectors.unflatten(position, self.weights), strict=True):
            w.assign(value)

    @contextlib.contextmanager
    def visiting(self):
        """Whatever runs inside, the model's weights and states end as they began."""
        with unchanged(self.model):
            yield

    def _centred(self, a):
        return centring.centred(a) / self.n_examples
