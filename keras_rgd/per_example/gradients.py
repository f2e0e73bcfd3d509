"""What the rest of the package asks of per-example gradients: three operations."""

import abc
import dataclasses

import tensorflow as tf

from keras_rgd._support import vectors


@dataclasses.dataclass(frozen=True)
class ExampleSpace:
    """The gradients and v = grad L(1) as a step sees them that has a Gram matrix."""

    gram: tf.Tensor  # <g_i - c, g_j - c> / unit**2 for some c, (N, N)
    products: tf.Tensor  # <g_i, v> / unit**2, (N,)
    square: tf.Tensor  # |v|^2 / unit**2, ()
    largest: tf.Tensor  # about the largest |g_i|^2 / unit**2, (): rounding is relative to it
    unit: tf.Tensor  # of the order of the gradients' entries, ()
    centred: bool  # whether `gram` is as if c were the mean, taken off before the products


class PerExampleGradients(abc.ABC):
    """The gradients g_i of the losses f_i of one batch, seen through three operations.

    L(u) is what `model.compute_loss` returns when example i's sample weight is multiplied by u_i;
    r = L(0), f_i = N dL/du_i and L(1) = r + (1/N) sum_i f_i is the loss that `fit` reports. The
    N x d matrix G has the rows g_i = grad f_i. Implementations differ in how they reach it, not
    in what it is.

    Attributes:
        way: name of the implementation, as in `per_example=`.
        n_examples: N, an int or (inside a graph) a scalar int32 tensor.
        weights: the model's trainable weights, a list of `tf.Variable`.
        loss: L(1), a scalar tensor.
        y_pred: what the model returned for the batch.
        gradient: v = grad L(1), a list of tensors shaped as the weights, of `dtype` as all others.
        gram_is_cheap: whether `gram` costs about what one pass over the examples costs,
            rather than N backward passes over the batch.
    """

    way: str
    gram_is_cheap: bool

    @property
    def dtype(self):
        """The dtype of all that is formed: the widest of the weights', and at least float32."""
        return working_dtype(self.weights)

    def cast(self, tensors):
        """A list of tensors (or of a tape's sparse gradients) as a list of tensors of `dtype`."""
        return [tf.cast(tf.convert_to_tensor(t), self.dtype) for t in tensors]

    def vector(self, v):
        """V as a list of tensors of `dtype`, checked to be shaped as the weights.

        Raises:
            ValueError: it is not.
        """
        v = self.cast(vectors.checked(v, self.weights))
        return [tf.ensure_shape(t, w.shape) for t, w in zip(v, self.weights, strict=True)]

    def dot(self, v):
        """k_i = <g_i, v>, shape (N,), for v a list of tensors shaped as the weights.

        Raises:
            ValueError: v is not shaped as the weights.
        """
        return self._dot(self.vector(v))

    @abc.abstractmethod
    def _dot(self, v):
        """As `dot`, of what was checked."""

    def combine(self, w):
        """sum_i w_i g_i, a list of tensors shaped as the weights, for w of shape (N,).

        Raises:
            ValueError: w has another shape.
        """
        w = tf.cast(tf.convert_to_tensor(w), self.dtype)
        if not w.shape.is_compatible_with([self.n_examples if self._n_is_known else None]):
            raise ValueError(
                f"`w` must have one entry for each of the {self.n_examples} examples. "
                f"Received: shape {tuple(w.shape)}"
            )
        return self._combine(w)

    @abc.abstractmethod
    def _combine(self, w):
        """As `combine`, of what was checked."""

    @property
    def _n_is_known(self):
        return isinstance(self.n_examples, int)

    def gram(self, center=None, unit=1.0):
        """<(g_i - c) / unit, (g_j - c) / unit>, shape (N, N).

        Here by N times `combine` and `dot`, with no more memory than those take.

        Args:
            center: c, a list of tensors shaped as the weights. Subtracting the mean gradient
                before the products keeps the digits that centring the products would lose.
                Defaults to `None`, which is c = 0.
            unit: a scalar tensor that keeps the squares in range.
        """
        center = [tf.zeros(w.shape, self.dtype) for w in self.weights] if center is None else center

        def column(e):
            """<(g_i - c) / unit, h> for h = (g_j - c) / unit; e is the unit vector of j."""
            h = vectors.scale(vectors.add(self.combine(e), center, -1.0), 1 / unit)
            return (self.dot(h) - vectors.inner(center, h)) / unit

        # Symmetric, so its columns are its rows.
        return tf.map_fn(column, tf.eye(self.n_examples, dtype=self.dtype))

    def combine_many(self, w):
        """Rows of `combine`: for w of shape (m, N) a list of tensors (m, *weight shape)."""
        return tf.map_fn(
            self.combine,
            w,
            fn_output_signature=[tf.TensorSpec(w.shape, self.dtype) for w in self.weights],
        )

    def rows(self):
        """The g_i themselves, a list of tensors (N, *weight shape): N d numbers."""
        return self.combine_many(tf.eye(self.n_examples, dtype=self.dtype))

    def squares(self, center):
        """|g_i - c|^2, shape (N,), for c a list of tensors shaped as the weights."""
        return tf.add_n([squares_of_rows(rows) for rows in centered(self.rows(), center, 1.0)])

    def images(self, v, shift):
        """sum_i (<g_i, v_j> - shift_j) g_i for each of m vectors v_j, and those factors.

        With shift_j = <gbar, v_j> that is N D v_j, without a pass of its own for the mean.

        Args:
            v: a list of tensors (m, *weight shape).
            shift: shape (m,).

        Returns:
            The factors, shape (m, N); a list of tensors (m, *weight shape).
        """

        def one(given):
            vector, mean = given
            k = self.dot(vector) - mean
            return k, self.combine(k)

        signature = [tf.TensorSpec(w.shape, self.dtype) for w in self.weights]
        known = self.n_examples if self._n_is_known else None
        return tf.map_fn(
            one, (v, shift), fn_output_signature=(tf.TensorSpec([known], self.dtype), signature)
        )

    def reweighted(self, m):
        """Grad r + (1/N) sum_i m_i g_i, a list of tensors shaped as the weights; v for m = 1.

        Args:
            m: the examples' multipliers, shape (N,).
        """
        n = tf.cast(self.n_examples, self.dtype)
        return vectors.add(self.gradient, self.combine((m - 1) / n))

    def example_space(self):
        """What a step on v needs, an `ExampleSpace`; where `gram_is_cheap`."""
        mean = self.mean()
        unit = self.unit(mean)
        v = vectors.scale(self.gradient, 1 / unit)
        gram, shift = self.gram(mean, unit), vectors.norm(mean) / unit
        return ExampleSpace(
            gram=gram,
            products=self.dot(v) / unit,
            square=vectors.inner(v, v),
            largest=tf.reduce_max(tf.linalg.diag_part(gram)) + tf.square(shift),
            unit=unit,
            centred=True,
        )

    def unit(self, mean):
        """A positive scalar of the order of the gradients: their squares in it stay in range.

        Args:
            mean: `self.mean()`.
        """
        signs = tf.cast(1 - 2 * (tf.range(self.n_examples) % 2), self.dtype)
        # The mean alone is nearly 0 at a minimum.
        other = self.combine(signs / tf.cast(self.n_examples, self.dtype))
        size = tf.maximum(vectors.norm(mean), vectors.norm(other))
        return tf.where(size > 0, size, tf.ones_like(size))

    def mean(self):
        """Gbar = (1/N) sum_i g_i, without the gradient of r."""
        n = tf.cast(self.n_examples, self.dtype)
        return self.combine(tf.fill([self.n_examples], 1 / n))


def working_dtype(weights):
    """The widest floating dtype of TensorFlow variables, and at least float32."""
    floating = [w.dtype for w in weights if w.dtype.is_floating]
    return max((tf.float32, *floating), key=lambda dtype: dtype.size)


def centered(rows, center, unit):
    """(g_i - center) / unit for rows g_i, a list of tensors (n, *weight shape)."""
    if center is not None:
        rows = [r - c for r, c in zip(rows, center, strict=True)]
    return [r / tf.cast(unit, r.dtype) for r in rows]


def products(rows, others):
    """<a_i, b_j>, shape (n, m), of rows a_i and b_j as lists of tensors (n or m, *weight shape)."""
    pairs = zip(rows, others, strict=True)
    return tf.add_n([tf.matmul(_matrix(a), _matrix(b), transpose_b=True) for a, b in pairs])


def _matrix(tensor):
    return tf.reshape(tensor, [tf.shape(tensor)[0], tensor.shape[1:].num_elements()])


def squares_of_rows(rows):
    """The sum of the squares in each row of a tensor (n, ...), shape (n,)."""
    return tf.reduce_sum(tf.square(_matrix(rows)), 1)


def gram_of_rows(rows, center, unit):
    """The Gram matrix of (g_i - center) / unit, shape (n, n), from rows held in memory."""
    rows = centered(rows, center, unit)
    return products(rows, rows)
