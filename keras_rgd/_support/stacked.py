"""Vectors in weight space, several of them stacked along axis 0 of each of their tensors."""

from keras import ops


def dot(rows, v):
    """<v_t, v> for each place t, shape (W,), for v a list of tensors."""
    products = [_contracted(ops.cast(row, x.dtype), x) for row, x in zip(rows, v, strict=True)]
    # Not one added to the other: XLA would compute each with the addition, one after the other.
    return ops.sum(ops.stack(products), axis=0)


def square(v):
    """|v|^2 for v a list of tensors."""
    return sum(_square_of(x) for x in v)


def _square_of(x):
    if len(x.shape) != 1:
        return ops.sum(ops.square(x))  # split over devices: it is to stay so
    # On a CPU XLA adds up a product of two vectors number by number, several times as long as one
    # of two matrices that holds it.
    if x.shape[0] % 4:
        return ops.matmul(x, x)
    x = ops.reshape(x, [4, x.shape[0] // 4])
    return ops.trace(ops.matmul(x, ops.transpose(x)))


def combine(w, rows):
    """sum_t w_t v_t, a list of tensors, for w of shape (W,) or (m, W)."""
    return [_contracted(w, ops.cast(row, w.dtype), 1) for row in rows]


def _contracted(a, b, axes=None):
    """The sum over the last axes of a and the first of b, as many as b has or `axes`."""
    axes = len(b.shape) if axes is None else axes
    # A matrix product where it is one: with TensorFlow a `tensordot` is several operations.
    plain = axes == 1 and len(b.shape) <= 2
    return ops.matmul(a, b) if plain else ops.tensordot(a, b, axes)


def place(rows, t, dtype):
    """The gradient in place t, a list of tensors."""
    return [ops.cast(ops.take(row, t, axis=0), dtype) for row in rows]
