"""eps as a function of the point in weight space, with its derivative where it has one."""

from keras_rgd import epsilon as epsilon_rules
from keras_rgd._support import vectors
from keras_rgd.diffusion_metric import DiffusionMetric, choose_epsilon

# Relative distance of the two largest eigenvalues from which the larger one has a derivative.
_SIMPLE = 1e-6


class EpsilonField:
    """eps(x): a number, or a rule applied to D and the gradient wherever the weights are.

    Args:
        epsilon: eps, a float with 0 <= eps * lambda_max < 1 at the present weights; or a rule of
            `keras_rgd.epsilon`.
        geometry: a `Geometry`.
        held: whether what a rule chooses at the present weights is kept at all others. Defaults to
            `False`.

    Attributes:
        constant: eps where it does not depend on the weights, else `None`.

    Raises:
        ValueError: eps is not below 1 / lambda_max.
    """

    def __init__(self, epsilon, geometry, held=False):
        self._rule, self._geometry = epsilon, geometry
        here = DiffusionMetric(geometry.diffusion_matrix(), epsilon).epsilon
        varies = isinstance(epsilon, epsilon_rules.Rule) and not held
        self.constant = None if varies else here

    def at(self, D, v):
        """eps at the present weights, for their D and gradient v."""
        return choose_epsilon(D, self._rule, v) if self.constant is None else self.constant

    def gradient(self, D, v):
        """The gradient of eps, as `epsilon_gradient`; `None` where it is 0."""
        if self.constant is not None:
            return None
        return epsilon_gradient(self._geometry, D, self._rule, self.at(D, v))

    def with_gradient(self, D):
        """eps and its gradient, as `at` and `gradient`, at the present weights."""
        # A constant needs no gradient of the loss, so none is traced for it.
        v = self._geometry.gradient() if self.constant is None else None
        return self.at(D, v), self.gradient(D, v)


def epsilon_gradient(geometry, D, rule, epsilon):
    """The gradient of eps by a rule, a list of tensors shaped as the weights; `None` where it is 0.

    For eps = c / lambda_max it is -eps / lambda_max times that of lambda_max, which is
    2 Cov_i(<g_i, e>, H_i e) for the top eigenvector e, where lambda_max is simple.

    Args:
        geometry: a `Geometry`.
        D: its `diffusion_matrix()`.
        rule: a rule of `keras_rgd.epsilon`.
        epsilon: what it chose there, a float.

    Raises:
        ValueError: it is not known, or lambda_max is not simple.
    """
    top = D.top_eigenvalue()
    if isinstance(rule, epsilon_rules.Fixed):
        if rule.value * top < 1:
            return None
    elif not isinstance(rule, epsilon_rules.Fraction):
        raise ValueError(
            "The derivative of eps(x) is known for a number, Fixed and Fraction. "
            f"Received: epsilon={rule!r}"
        )
    if top <= 0:
        return None
    second = D.eigenvalues()[1] if min(D.n_examples, D.n_weights) > 1 else 0.0
    if second > top * (1 - _SIMPLE):
        raise ValueError(
            "lambda_max is not a simple eigenvalue here, so eps = c / lambda_max has no "
            f"derivative: the two largest are {top:.8g} and {second:.8g}. Write eps as a "
            "number to hold it constant."
        )
    e = [t[0] for t in D.eigenvectors(1)]
    half = geometry.covariance_hessian(geometry.derivatives.dot(e), e)
    return vectors.scale(half, -2 * epsilon / top)
