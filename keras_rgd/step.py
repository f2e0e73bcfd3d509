"""D as one training step sees it: M_x, v's spectral measure, and the way back to the weights."""

from keras import ops

from keras_rgd import bounds, vectors
from keras_rgd.diffusion import ESTIMATE_MARGIN, DiffusionMatrix
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
    """

    def __init__(self, gradients):
        self._gradients = gradients
        space = gradients.example_space()
        n = ops.cast(gradients.n_examples, space.gram.dtype)
        noise = space.largest * bounds.machine_epsilon(space.gram.dtype)
        k = space.gram - ops.mean(space.gram, 0, keepdims=True)
        k = (k - ops.mean(k, 1, keepdims=True)) / n
        # What is rounding alone is no variance: equal gradients differ by that.
        real = ops.cast(ops.trace(k) > 8 * noise, k.dtype)
        self._centred = real * (space.products - ops.mean(space.products))
        self.spectrum = GramSpectrum(
            lambda_max=real * (bounds.trace_power_bound(k) + noise),
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
    """

    def __init__(self, gradients, image, lambda_max):
        self._gradients, self._image = gradients, image
        unit = image.unit
        mass = ops.square(image.size / unit)
        nodes, weights = bounds.moments_measure(
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
