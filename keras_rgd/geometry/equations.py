"""The equations of motion in weight space: gradient descent, Eq. (10), Eq. (8) of the paper."""

import abc

import numpy as np

from keras_rgd._support import vectors
from keras_rgd.diffusion_metric import inverse_product
from keras_rgd.geometry.epsilon_field import EpsilonField


class Equation(abc.ABC):
    """The right-hand side of a flow, at the point where `point` is.

    A state is a flat numpy vector, the weights and for second order the velocity after them.

    Attributes:
        epsilon: an `EpsilonField`.
        exact: whether indices are raised with (I + eps D)^-1.
    """

    kind: str
    exact = False

    def __init__(self, point, epsilon=0.0, held=False):
        self.point = point
        self.epsilon = EpsilonField(epsilon, point, held)

    def start(self):
        """The state to begin with."""
        return self.point.flat_weights()

    def __call__(self, state):
        """The state's derivative by time."""
        return self.velocity(state)

    @abc.abstractmethod
    def velocity(self, state):
        """dx/dt, a numpy vector of shape (d,)."""

    @abc.abstractmethod
    def acceleration(self, velocity):
        """d^2x/dt^2 where the velocity is this one, both lists of tensors."""


class GradientDescent(Equation):
    """dx/dt = -grad L."""

    kind = "gradient"

    def velocity(self, state):
        return -flat(self.point.gradient())

    def acceleration(self, velocity):
        return vectors.scale(self.point.derivatives.loss_hessian(velocity), -1.0)


class RelativisticDescent(Equation):
    """dx/dt = -(I - eps D) grad L, Eq. (10)."""

    kind = "rgd"

    def velocity(self, state):
        v, D = self.point.gradient(), self.point.diffusion_matrix()
        return -flat(vectors.add(v, self.point.product(v), -self.epsilon.at(D, v)))

    def acceleration(self, velocity):
        v, D = self.point.gradient(), self.point.diffusion_matrix()
        epsilon, slope = self.epsilon.at(D, v), self.epsilon.gradient(D, v)
        change = self.point.derivatives.loss_hessian(velocity)
        return rgd_acceleration(self.point, velocity, v, change, epsilon, slope)


class Geodesic(Equation):
    """D^2x/dt^2 = -Gamma(dx/dt, dx/dt) - (d/dt grad L), Eq. (8), its indices raised or not."""

    kind = "geodesic"

    def __init__(self, point, epsilon, velocity, exact, force):
        super().__init__(point, epsilon, held=True)
        self.exact, self._force = exact, force
        if velocity is None:
            self._first_velocity = RelativisticDescent(point, self.epsilon.constant).velocity(None)
        else:
            self._first_velocity = flat(velocity)

    def start(self):
        return np.concatenate([super().start(), self._first_velocity])

    def __call__(self, state):
        velocity = self.velocity(state)
        as_list = vectors.unflatten(velocity, self.point.weights, self.point.dtype)
        return np.concatenate([velocity, flat(self.acceleration(as_list))])

    def velocity(self, state):
        return state[len(state) // 2 :]

    def acceleration(self, velocity):
        point, epsilon = self.point, self.epsilon.constant
        lowered = vectors.scale(point.christoffel(velocity, velocity, epsilon), -1.0)
        if self._force:
            lowered = vectors.add(lowered, point.derivatives.loss_hessian(velocity), -1.0)
        if not self.exact:
            return lowered
        return inverse_product(point.diffusion_matrix(), epsilon, lowered)


def rgd_acceleration(point, velocity, v, change, epsilon, slope):
    """The derivative by time of -(I - eps D) v, a list of tensors.

    Args:
        point: a `Point`.
        velocity: dx/dt, like the others a list of tensors shaped as the weights.
        v: the gradient.
        change: its derivative by time.
        epsilon: eps, a float.
        slope: its gradient, or `None`.
    """
    result = vectors.add(vectors.scale(change, -1.0), point.product(change), epsilon)
    result = vectors.add(result, point.product_change(velocity, v), epsilon)
    if slope is None:
        return result
    return vectors.add(result, point.product(v), vectors.inner(slope, velocity))


def flat(v):
    """A list of tensors as one numpy vector, float64."""
    return vectors.flatten(v).astype(np.float64)
