"""The Christoffel symbols of the diffusion metric g = I + eps D, Eq. (5) and (7) of the paper."""

from keras_rgd.diffusion_metric import inverse_product
from keras_rgd.geometry.epsilon_field import EpsilonField
from keras_rgd.geometry.point import Point


def christoffel(
    model,
    x,
    y,
    u,
    v,
    epsilon,
    *,
    sample_weight=None,
    exact=False,
    constant_epsilon=True,
):
    r"""Gamma^k_ij u^i v^j at the model's weights, with layers in evaluation mode.

    .. math:: \Gamma_{kij} u^i v^j = \mathcal{E} \, \mathrm{Cov}_i(\langle u, H_i v\rangle, g_i)

    are the lowered symbols of I + eps D, exactly, for an eps that does not depend on the weights:
    so Eq. (7) is derived. In the weak field, Eq. (7), the index is raised with the identity: the
    symbols to first order in eps. `exact=True` raises it with (I + eps D)^-1. Symmetric in u, v.

    Args:
        model: any compiled `keras.Model` whose loss has third derivatives where they are asked for;
            with piecewise linear activations they are those of the piece.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets, or `None`.
        u: a list of arrays shaped as the trainable weights.
        v: likewise.
        epsilon: eps, a float with 0 <= eps * lambda_max < 1; or a rule of `keras_rgd.epsilon`,
            applied at these weights.
        sample_weight: the examples' weights in the loss. Defaults to `None`.
        exact: whether to raise with the inverse metric, not the identity. Defaults to `False`.
        constant_epsilon: `False` adds what a rule's eps(x), which changes from point to point, has
            as derivative: (<grad eps, u> D v + <grad eps, v> D u - <u, D v> grad eps) / 2. For
            `Fraction` and `Fixed`, where lambda_max is a simple eigenvalue. Defaults to `True`.

    Returns:
        A list of tensors shaped as the weights.

    Raises:
        ValueError: u or v is not shaped as the weights; eps is not below 1 / lambda_max; or
            eps has no derivative.
    """
    point = Point(model, x, y, sample_weight)
    with point.visiting():
        u, v = point.vector(u, "u"), point.vector(v, "v")
        D, gradient = point.diffusion_matrix(), point.gradient()
        field = EpsilonField(epsilon, point, held=constant_epsilon)
        eps = field.at(D, gradient)
        lowered = point.christoffel(u, v, eps, field.gradient(D, gradient))
        return inverse_product(D, eps, lowered) if exact else lowered
