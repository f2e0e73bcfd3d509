"""D as one training step sees it: M_x, v's spectral measure, and the way back to the weights."""

from keras import ops

from keras_rgd._support import eigensolvers, rounding, vectors
from keras_rgd.diffusion_matrix import ESTIMATE_MARGIN, DiffusionMatrix
from keras_rgd.epsilon import GramSpectrum, SpectralMeasure


def step_of(gradients, last_estimate):
    """What a step along v = `gradients.gradient` needs: a `GramStep` or a `MatvecStep`.

    Args:
        gradients: the batch's `PerExampleGradients`.
        last_estimate: `lambda_max` of the last step, 0 if there is none; a scalar.
    """
    if gradients.gram_is_cheap:
        return GramStep(gradients)
    D = DiffusionMatrix(gradients)
    image = D.image(gradients.gradient)
    estimate = D.estimate(image, last_estimate)
    return MatvecStep(gradients, image, estimate * ESTIMATE_MARGIN)


def iterated_step_of(gradients, start):
    """As `step_of` where each operation is a pass over many examples: as few as can be.

    Args:
        gradients: the batch's `PerExampleGradients`.
        start: what the last step returned, a list of tensors shaped as the weights; 0 at first.

    Returns:
        A `MatvecStep`; where the next step may start.
    """
    D = DiffusionMatrix(gradients)
    image, lambda_max, top = D.iterate(gradients.gradient, start)
    return MatvecStep(gradients, image, lambda_max), top


class GramStep:
    """A step in example space: a Gram matrix, an upper bound on M_x, weights for the examples.

    Attributes:
        spectrum: for a rule of `keras_rgd.epsilon`.
        lost_digits: whether D was taken as 0 because the gradients of several examples differ by
            no more than rounding, a bool scalar tensor.
    """

    def __init__(self, gradients):
        self._gradients = gradients
        space = gradients.example_space()
        dtype = space.gram.dtype
        n = ops.cast(gradients.n_examples, dtype)
        k = space.gram - ops.mean(space.gram, 0, keepdims=True)
        k = k - ops.mean(k, 1, keepdims=True)
        known = (space.largest, dtype, space.centred)
        differ = rounding.is_real(ops.max(ops.diagonal(k)), *known)
        self.lost_digits = _lost(gradients, space.square, differ)
        real, k = ops.cast(differ, dtype), k / n
        error = rounding.error(ops.trace(k), *known)
        centred = space.products - ops.mean(space.products)
        # Twice: what the first mean's rounding leaves would be multiplied by the mean gradient.
        self._centred = real * (centred - ops.mean(centred))
        self.spectrum = GramSpectrum(
            lambda_max=real * (eigensolvers.trace_power_bound(k) + error),
            unit=space.unit,
            gram=real * k,
            products=self._centred / ops.sqrt(n),
            square=space.square,
        )

    def direction(self, epsilon):
        """(I - eps D) v, Eq. (10), for eps in the unit of the spectrum."""
        return self._gradients.reweighted(1 - epsilon * self._centred)


class MatvecStep:
    """A step by products with D: an estimate of M_x, and v less eps D v.

    Args:
        gradients: the batch's `PerExampleGradients`.
        image: D v as an `Image`.
        lambda_max: M_x in the unit `image.unit`**2, a scalar tensor.

    Attributes:
        spectrum: for a rule of `keras_rgd.epsilon`.
        lost_digits: whether D v was taken as 0, as in `GramStep`.
    """

    def __init__(self, gradients, image, lambda_max):
        self._gradients, self._image = gradients, image
        self.lost_digits = _lost(gradients, image.norm, image.size > 0)
        unit = image.unit
        mass = ops.square(image.size / unit)
        nodes, weights = eigensolvers.moments_measure(
            lambda_max, mass, mass * ops.square(image.alpha / unit)
        )
        self.spectrum = SpectralMeasure(
            lambda_max=lambda_max, nodes=nodes, weights=weights, unit=unit
        )

    def direction(self, epsilon):
        """(I - eps D) v, Eq. (10), for eps in the unit of the spectrum."""
        image = self._image
        # eps D v, each factor in units of the gradient: no product of them leaves the dtype.
        length = epsilon * (image.size / image.unit) * (image.alpha / image.unit) * image.norm
        return vectors.add(self._gradients.gradient, image.direction, -length)


def _lost(gradients, size, differ):
    """Whether what differed by no more than rounding were gradients of several examples."""
    several = ops.convert_to_tensor(gradients.n_examples) > 1
    return ops.logical_and(ops.logical_and(several, size > 0), ops.logical_not(differ))
