"""What the rest of the package asks of per-example gradients: three operations.

On `keras.ops` alone, so that every backend of Keras can implement it; what TensorFlow needs beside
is in `tensorflow_gradients.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rgd._support import vectors
from keras_rgd._support.vectors import Tensor, Vector

# One chunk of gradients is held in memory; this is what it may take, in bytes.
_CHUNK_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class ExampleSpace:
    """The gradients and v = grad L(1) as a step sees them that has a Gram matrix."""

    gram: Tensor  # <g_i - c, g_j - c> / unit**2 for some c, (N, N)
    products: Tensor  # <g_i, v> / unit**2, (N,)
    square: Tensor  # |v|^2 / unit**2, ()
    largest: Tensor  # about the largest |g_i|^2 / unit**2, (): rounding is relative to it
    unit: Tensor  # of the order of the gradients' entries, ()
    centred: bool  # whether `gram` is as if c were the mean, taken off before the products


class PerExampleGradients(abc.ABC):
    """The gradients g_i of the losses f_i of one batch, seen through three operations.

    L(u) is what `model.compute_loss` returns when example i's sample weight is multiplied by u_i;
    r = L(0), f_i = N dL/du_i and L(1) = r + (1/N) sum_i f_i is the loss that `fit` reports. The
    N x d matrix G has the rows g_i = grad f_i. Implementations differ in how they reach it, not
    in what it is: they implement `_dot` and `_combine`, and whatever else they have cheaper.

    Attributes:
        way: name of the implementation, as in `per_example=`.
        n_examples: N, an int or (inside a graph) a scalar int32 tensor.
        weights: the model's trainable weights, a list of the backend's variables.
        loss: L(1), a scalar tensor.
        y_pred: what the model returned for the batch.
        gradient: v = grad L(1), a list of tensors shaped as the weights, of `dtype` as all others.
        gram_is_cheap: whether `gram` costs about what one pass over the examples costs,
            rather than N backward passes over the batch.
        products_in_loops: whether `dot` and `combine` may stand in a loop of a compiled step, so
            that a step can take as many products with D as it needs.
    """

    way: str
    gram_is_cheap: bool
    products_in_loops = True
    n_examples: int | Tensor
    weights: list[Any]
    loss: Tensor
    y_pred: Any
    gradient: Vector

    @property
    def products_dtype(self) -> str:
        """The dtype in which `gram` is computed: `dtype`, or a wider one."""
        return self.dtype

    @property
    def dtype(self) -> str:
        """The dtype of all that is formed: the widest of the weights', and at least float32."""
        return working_dtype(self.weights)

    def cast(self, tensors: Iterable[Any]) -> Vector:
        """A list of tensors as a list of tensors of `dtype`."""
        return [ops.cast(ops.convert_to_tensor(t), self.dtype) for t in tensors]

    def vector(self, v: Any) -> Vector:
        """v as a list of tensors of `dtype`, checked to be shaped as the weights.

        Raises:
            ValueError: it is not.
        """
        return self.cast(vectors.checked(v, self.weights))

    def dot(self, v: Vector) -> Tensor:
        """k_i = <g_i, v>, shape (N,), for v a list of tensors shaped as the weights.

        Raises:
            ValueError: v is not shaped as the weights.
        """
        return self._dot(self.vector(v))

    @abc.abstractmethod
    def _dot(self, v: Vector) -> Tensor:
        """As `dot`, of what was checked."""

    def combine(self, w: Tensor) -> Vector:
        """sum_i w_i g_i, a list of tensors shaped as the weights, for w of shape (N,).

        Raises:
            ValueError: w has another shape.
        """
        w = ops.cast(ops.convert_to_tensor(w), self.dtype)
        shape = vectors.shape_of(w)
        if not vectors.shapes_agree(shape, (self._known_n,)):
            raise ValueError(
                f"`w` must have one entry for each of the {self.n_examples} examples. "
                f"Received: shape {shape}"
            )
        return self._combine(w)

    @abc.abstractmethod
    def _combine(self, w: Tensor) -> Vector:
        """As `combine`, of what was checked."""

    @property
    def _known_n(self) -> int | None:
        """N where the trace tells it, else `None`."""
        return self.n_examples if isinstance(self.n_examples, int) else None

    def gram(self, center: Vector | None = None, unit: Any = 1.0) -> Tensor:
        """<(g_i - c) / unit, (g_j - c) / unit>, shape (N, N).

        Here by N times `combine` and `dot`, with no more memory than those take.

        Args:
            center: c, a list of tensors shaped as the weights. Subtracting the mean gradient
                before the products keeps the digits that centring the products would lose.
                Defaults to `None`, which is c = 0.
            unit: a scalar tensor that keeps the squares in range.
        """
        if center is None:
            center = [ops.zeros(w.shape, self.dtype) for w in self.weights]

        def column(e: Tensor) -> Tensor:
            """<(g_i - c) / unit, h> for h = (g_j - c) / unit; e is the unit vector of j."""
            h = vectors.scale(vectors.add(self.combine(e), center, -1.0), 1 / unit)
            return (self.dot(h) - vectors.inner(center, h)) / unit

        # Symmetric, so its columns are its rows.
        return self._mapped(column, self._unit_vectors(), self._like_examples())

    def combine_many(self, w: Tensor) -> Vector:
        """Rows of `combine`: for w of shape (m, N) a list of tensors (m, *weight shape)."""
        return self._mapped(self.combine, w, self._like_weights())

    def rows(self) -> Vector:
        """The g_i themselves, a list of tensors (N, *weight shape): N d numbers."""
        return self.combine_many(self._unit_vectors())

    def squares(self, center: Vector) -> Tensor:
        """|g_i - c|^2, shape (N,), for c a list of tensors shaped as the weights."""
        return sum(squares_of_rows(rows) for rows in centered(self.rows(), center, 1.0))

    def images(self, v: Vector, shift: Tensor) -> tuple[Tensor, Vector]:
        """sum_i (<g_i, v_j> - shift_j) g_i for each of m vectors v_j, and those factors.

        With shift_j = <gbar, v_j> that is N D v_j, without a pass of its own for the mean.

        Args:
            v: a list of tensors (m, *weight shape).
            shift: shape (m,).

        Returns:
            The factors, shape (m, N); a list of tensors (m, *weight shape).
        """

        def one(given: tuple[Vector, Tensor]) -> tuple[Tensor, Vector]:
            vector, mean = given
            k = self.dot(vector) - mean
            return k, self.combine(k)

        return self._mapped(one, (v, shift), (self._like_examples(), self._like_weights()))

    def _mapped(self, function: Callable[[Any], Any], given: Any, like: Any) -> Any:
        """`function` of one entry of axis 0 after another, its results put together.

        Args:
            function: what is called.
            given: a tensor, or a structure of tensors, with the entries along axis 0.
            like: what `function` returns, a `keras.KerasTensor` for each tensor: some backends
                must be told.
        """
        del like
        return ops.map(function, given)

    def _like_examples(self) -> keras.KerasTensor:
        return keras.KerasTensor((self._known_n,), self.dtype)

    def _like_weights(self) -> list[keras.KerasTensor]:
        return [keras.KerasTensor(tuple(w.shape), self.dtype) for w in self.weights]

    def _unit_vectors(self) -> Tensor:
        return ops.eye(self.n_examples, dtype=self.dtype)

    def reweighted(self, m: Tensor) -> Vector:
        """The vector grad r + (1/N) sum_i m_i g_i, shaped as the weights; v for m = 1.

        Args:
            m: the examples' multipliers, shape (N,).
        """
        n = ops.cast(self.n_examples, self.dtype)
        return vectors.add(self.gradient, self.combine((m - 1) / n))

    def example_space(self) -> ExampleSpace:
        """What a step on v needs, an `ExampleSpace`; where `gram_is_cheap`."""
        mean = self.mean()
        unit = self.unit(mean)
        v = vectors.scale(self.gradient, 1 / unit)
        gram, shift = self.gram(mean, unit), vectors.norm(mean) / unit
        return ExampleSpace(
            gram=gram,
            products=self.dot(v) / unit,
            square=vectors.inner(v, v),
            largest=ops.max(ops.diagonal(gram)) + ops.square(shift),
            unit=unit,
            centred=True,
        )

    def unit(self, mean: Vector) -> Tensor:
        """A positive scalar of the order of the gradients: their squares in it stay in range.

        Args:
            mean: `self.mean()`.
        """
        n = ops.cast(self.n_examples, self.dtype)
        signs = 1 - 2 * ops.cast(ops.arange(self.n_examples, dtype="int32") % 2, self.dtype)
        # The mean alone is nearly 0 at a minimum.
        other = self.combine(signs / n)
        size = ops.maximum(vectors.norm(mean), vectors.norm(other))
        return ops.where(size > 0, size, ops.ones_like(size))

    def mean(self) -> Vector:
        """gbar = (1/N) sum_i g_i, without the gradient of r."""
        n = ops.cast(self.n_examples, self.dtype)
        return self.combine(ops.ones([self.n_examples], self.dtype) / n)


def working_dtype(weights: Iterable[Any]) -> str:
    """The widest floating dtype of variables, and at least float32, by its name."""
    dtypes = {keras.backend.standardize_dtype(w.dtype) for w in weights}
    return "float64" if "float64" in dtypes else "float32"


def examples_that_fit(weights: Sequence[Any]) -> int:
    """How many examples' gradients fit in the memory that is meant for them."""
    entry = np.dtype(working_dtype(weights)).itemsize
    return max(1, _CHUNK_BYTES // (entry * vectors.size(weights)))


def centered(rows: Vector, center: Vector | None, unit: Any) -> Vector:
    """(g_i - center) / unit for rows g_i, a list of tensors (n, *weight shape)."""
    if center is not None:
        rows = [r - c for r, c in zip(rows, center, strict=True)]
    return [r / ops.cast(unit, r.dtype) for r in rows]


def products(rows: Vector, others: Vector) -> Tensor:
    """<a_i, b_j>, shape (n, m), of rows a_i and b_j as lists of tensors (n or m, *weight shape)."""
    pairs = zip(rows, others, strict=True)
    return sum(ops.matmul(_matrix(a), ops.transpose(_matrix(b))) for a, b in pairs)


def squares_of_rows(rows: Tensor) -> Tensor:
    """The sum of the squares in each row of a tensor (n, ...), shape (n,)."""
    return ops.sum(ops.square(_matrix(rows)), 1)


def gram_of_rows(rows: Iterable[Tensor], center: Vector | None, unit: Any) -> Tensor:
    """The Gram matrix of (g_i - center) / unit, shape (n, n), from rows held in memory.

    Args:
        rows: tensors (n, *weight shape), of which one after another is centred.
        center: shaped as the weights; `None` for 0.
        unit: a scalar tensor.
    """
    total = 0
    for j, row in enumerate(rows):
        part = centered([row], None if center is None else center[j : j + 1], unit)
        total = total + products(part, part)
    return total


def _matrix(tensor: Tensor) -> Tensor:
    # Of known length, as a weight may have no entries.
    return ops.reshape(tensor, [ops.shape(tensor)[0], int(np.prod(tensor.shape[1:]))])
