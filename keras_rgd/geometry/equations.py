"""The equations of motion in weight space: gradient descent, Eq. (10), Eq. (8) of the paper."""

import abc

import numpy as np

from keras_rgd._support import vectors
from keras_rgd.diffusion_metric import inverse_product
from keras_rgd.geometry.epsilon_field import EpsilonField


class Equation(abc.ABC):
    """The right-hand side of a flow, at the model's present weights.

    A state is a flat numpy vector: the weights and, in an equation of second order, the velocity
    after them.

    Attributes:
        geometry: a `Geometry`, whose weights are moved by `visit`.
        epsilon: an `EpsilonField`.
        exact: whether indices are raised with (I + eps D)^-1.
    """

    kind: str
    exact = False

    def __init__(self, geometry, epsilon=0.0, held=False):
        self.geometry = geometry
        self.epsilon = EpsilonField(epsilon, geometry, held)

    def start(self):
        """The state to begin with."""
        return self.geometry.flat_weights()

    def visit(self, state):
        """Move the weights to where a state has them."""
        self.geometry.move_to(state[: self.geometry.d])

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
        return -flat(self.geometry.gradient())

    def acceleration(self, velocity):
        return vectors.scale(self.geometry.derivatives.loss_hessian(velocity), -1.0)


class RelativisticDescent(Equation):
    """dx/dt = -(I - eps D) grad L, Eq. (10)."""

    kind = "rgd"

    def velocity(self, state):
        v, D = self.geometry.gradient(), self.geometry.diffusion_matrix()
        return -flat(vectors.add(v, self.geometry.product(v), -self.epsilon.at(D, v)))

    def acceleration(self, velocity):
        v, D = self.geometry.gradient(), self.geometry.diffusion_matrix()
        epsilon, epsilon_gradient = self.epsilon.at(D, v), self.epsilon.gradient(D, v)
        change = self.geometry.derivatives.loss_hessian(velocity)
        return rgd_acceleration(self.geometry, velocity, v, change, epsilon, epsilon_gradient)


class Geodesic(Equation):
    """d^2x/dt^2 = -Gamma(dx/dt, dx/dt) - d/dt grad L, Eq. (8), with its indices raised or not."""

    kind = "geodesic"

    def __init__(self, geometry, epsilon, velocity, exact, force):
        super().__init__(geometry, epsilon, held=True)
        self.exact, self._force = exact, force
        if velocity is None:
            descent = RelativisticDescent(geometry, self.epsilon.constant)
            self._first_velocity = descent.velocity(None)
        else:
            self._first_velocity = flat(velocity)

    def start(self):
        return np.concatenate([super().start(), self._first_velocity])

    def __call__(self, state):
        velocity = self.velocity(state)
        as_list = vectors.unflatten(velocity, self.geometry.weights, self.geometry.dtype)
        return np.concatenate([velocity, flat(self.acceleration(as_list))])

    def velocity(self, state):
        return state[len(state) // 2 :]

    def acceleration(self, velocity):
        geometry, epsilon = self.geometry, self.epsilon.constant
        symbols = geometry.lowered_christoffel(velocity, velocity, epsilon)
        lowered = vectors.scale(symbols, -1.0)
        if self._force:
            lowered = vectors.add(lowered, geometry.derivatives.loss_hessian(velocity), -1.0)
        if not self.exact:
            return lowered
        return inverse_product(geometry.diffusion_matrix(), epsilon, lowered)


def rgd_acceleration(geometry, velocity, v, change, epsilon, epsilon_gradient):
    """The derivative by time of -(I - eps D) v, a list of tensors.

    Args:
        geometry: a `Geometry`.
        velocity: dx/dt, like the others a list of tensors shaped as the weights.
        v: the gradient.
        change: its derivative by time.
        epsilon: eps, a float.
        epsilon_gradient: its gradient, or `None`.
    """
    result = vectors.add(vectors.scale(change, -1.0), geometry.product(change), epsilon)
    result = vectors.add(result, geometry.product_change(velocity, v), epsilon)
    if epsilon_gradient is None:
        return result
    return vectors.add(result, geometry.product(v), vectors.inner(epsilon_gradient, velocity))


def flat(v):
    """A list of tensors as one numpy vector, float64."""
    return vectors.flatten(v).astype(np.float64)
