"""Per-example gradients of one use of a weight, from its input and the gradient at its output.

Each form answers for the tensor T that joins the examples (see `uses`): `rows`, the gradients
themselves, shape (N, |T|); `dot(v)`, `combine(w)` and `gram()` without them where that is less
work, as in mixed ghost clipping (Bu et al., arXiv 2205.10683).
"""

import abc
import functools
import math

import tensorflow as tf

# A guess where the trace does not tell how many places of an example use a weight.
PLACES = 64

# Rows are kept for later products where they take at most so many times the room of the factors.
ROOM = 1.5

# Entries that rows may have together, beyond those that are less work than products of positions.
ROW_ENTRIES = 2**26


class NoFormError(ValueError):
    """An operation for which there is no closed form."""


class Outer:
    """The products t t^T of tensors (N, k), each formed once.

    Args:
        dtype: in which they are formed. Defaults to `None`, the tensors' own.
    """

    def __init__(self, dtype=None):
        self._dtype, self._known = dtype, {}

    def __contains__(self, t):
        return t.ref() in self._known

    def __call__(self, t):
        if t not in self:
            cast = self.cast(t)
            self._known[t.ref()] = tf.matmul(cast, cast, transpose_b=True)
        return self._known[t.ref()]

    def cast(self, t):
        """A tensor in the dtype of the products."""
        return t if self._dtype is None else tf.cast(t, self._dtype)


class Form(abc.ABC):
    """The gradients by T, one for each example.

    Work is counted in multiply-adds, for N as far as it is known when the step is traced.

    Attributes:
        shape: T's shape, a list.
        work: of the operation itself, forward.
        gram_work: of `gram`, or of the rows and their products.
        rows_work: of the rows.
        has_rows: whether rows are formed anyway, as for a Gram matrix.
        after: tensors before which no large intermediate is formed, to save memory.
    """

    work: int
    gram_work: int
    rows_work: int
    has_rows = False
    after = ()

    def __init__(self, shape):
        self.shape = list(shape)

    @property
    def size(self):
        """Entries of T."""
        return math.prod(self.shape)

    @functools.cached_property
    def rows(self):
        """The gradients, pieces (N, k) of one k; side by side T's entries by `_row_order`."""
        return self._rows()

    # Whether later products use them too, so that they stay in memory.
    _keeps_rows = True

    def fresh_rows(self):
        """As `rows`, formed anew where they would not be in memory any more."""
        return self.rows if self._keeps_rows else self._rows()

    @abc.abstractmethod
    def _rows(self):
        """As `rows`, formed anew."""

    # The axes of T as they stand in a row; `None` for their own order.
    _row_order = None

    def shaped_rows(self):
        """The gradients, shape (N, *T)."""
        return self._shaped(beside(self.rows), [-1])

    def _shaped(self, rows, leading=()):
        """Rows as T, each."""
        if self._row_order is None:
            return tf.reshape(rows, [*leading, *self.shape])
        shape = [self.shape[axis] for axis in self._row_order]
        back = [self._row_order.index(axis) for axis in range(len(shape))]
        if leading:
            back = [0, *(1 + axis for axis in back)]
        return tf.transpose(tf.reshape(rows, [*leading, *shape]), back)

    def dot(self, v):
        """<g_i, v>, shape (N,), for v shaped as T."""
        v = tf.reshape(v if self._row_order is None else tf.transpose(v, self._row_order), [-1, 1])
        parts = tf.split(v, [rows.shape[1] for rows in self.rows]) if len(self.rows) > 1 else [v]
        products = [tf.matmul(r, p) for r, p in zip(self.rows, parts, strict=True)]
        return tf.reshape(tf.add_n(products), [-1])

    def combine(self, w):
        """sum_i w_i g_i, shaped as T, for w of shape (1, N)."""
        return self._shaped(beside([tf.matmul(w, rows) for rows in self.rows]))

    def gram(self, outer):
        """<g_i, g_j>, shape (N, N), or `None` where the rows are the way to it.

        Args:
            outer: an `Outer`.
        """
        return None


class Elementwise(Form):
    """T enters elementwise, broadcast: the gradient is summed where T was repeated.

    Args:
        gradient: by T as it was broadcast, shape (N, ...).
        shape: T's shape.
        n: N, or a guess of it, to count work by.
    """

    def __init__(self, gradient, shape, n):
        super().__init__(shape)
        rank = gradient.shape.rank - 1
        if len(shape) == rank + 1 and shape[0] == 1:
            shape = shape[1:]
        if len(shape) > rank:
            raise NoFormError("the weight has an entry for each example")
        shape = [1] * (rank - len(shape)) + list(shape)
        summed = [
            axis + 1
            for axis, (t, z) in enumerate(zip(shape, gradient.shape[1:], strict=True))
            if t == 1 and z != 1
        ]
        self._gradient = tf.reduce_sum(gradient, summed) if summed else gradient
        self.work, self.gram_work, self.rows_work = 0, n * n * self.size, 0

    def gram(self, outer):
        # A bias shares its gradient with the product before it.
        return outer(self._gradient) if self._gradient in outer else None

    def _rows(self):
        return [tf.reshape(self._gradient, [-1, self.size])]


class Mapped(Form):
    """Rows that were formed one example at a time.

    Args:
        rows: shape (N, |T|).
        shape: T's shape.
        n: N, or a guess of it, to count work by.
    """

    def __init__(self, rows, shape, n):
        super().__init__(shape)
        if n * self.size > ROW_ENTRIES:
            raise NoFormError(f"an operation that needs {n} rows of {self.size} entries")
        self._all = rows
        self.work, self.gram_work, self.rows_work = n * self.size, n * n * self.size, 0

    def _rows(self):
        return [self._all]


class Lookup(Form):
    """T is a table of which each example reads some entries.

    Args:
        index: which, shape (N, P), integers.
        gradient: at what was read, shape (N, P, D).
        shape: of the table, (V, ...).
        n: N, or a guess of it, to count work by.
    """

    def __init__(self, index, gradient, shape, n):
        super().__init__(shape)
        self._index, self._gradient = tf.cast(index, tf.int32), gradient
        places = index.shape[1] or PLACES
        matched = n * n * places * places * gradient.shape[-1]
        through_rows = n * n * self.size
        self._through_rows = through_rows < matched and n * self.size <= ROW_ENTRIES
        self.work, self.gram_work = 0, through_rows if self._through_rows else matched
        self.rows_work = n * self.size

    def _rows(self):
        n, entries = tf.shape(self._index)[0], self.shape[0]
        index = self._index + entries * tf.range(n)[:, None]
        rows = tf.math.unsorted_segment_sum(
            flat(self._gradient), tf.reshape(index, [-1]), n * entries
        )
        return [tf.reshape(rows, [n, self.size])]

    _keeps_rows = False

    def dot(self, v):
        read = tf.gather(tf.reshape(v, [self.shape[0], -1]), self._index)
        return tf.reduce_sum(read * self._gradient, [1, 2])

    def combine(self, w):
        gradient = flat(self._gradient * column(w, self._gradient))
        index = tf.reshape(self._index, [-1])
        combined = tf.math.unsorted_segment_sum(gradient, index, self.shape[0])
        return tf.reshape(combined, self.shape)

    def gram(self, outer):
        return None if self._through_rows else self._matched(outer.cast(self._gradient))

    def _matched(self, gradients):
        """sum_ts [index_it = index_js] <gradient_it, gradient_js>, some examples at a time."""
        index, gradient = tf.reshape(self._index, [-1]), flat(gradients)
        n, p = tf.shape(self._index)[0], tf.shape(self._index)[1]

        def one(example):
            mine, at = example
            same = tf.cast(mine[:, None] == index[None], gradient.dtype)
            products = tf.matmul(at, gradient, transpose_b=True) * same
            return tf.reduce_sum(tf.reshape(tf.reduce_sum(products, 0), [n, p]), 1)

        return tf.map_fn(one, (self._index, gradients), fn_output_signature=gradient.dtype)


def beside(tensors):
    """Along the last axis."""
    return tf.concat(tensors, -1) if len(tensors) > 1 else tensors[0]


def column(w, t):
    """Numbers for the examples, shaped to multiply a tensor (N, ...)."""
    return tf.reshape(w, [-1] + [1] * (t.shape.rank - 1))


def flat(t):
    """All axes but the last as one."""
    return t if t.shape.rank == 2 else tf.reshape(t, [-1, t.shape[-1]])
