"""Per-example gradients of one use of a weight, from its input and the gradient at its output.

A form answers for T, the tensor made of weights alone at that use (see `uses`): g_i is here the
gradient of example i's loss by T through that operation. `rows` are these gradients themselves,
shape (N, |T|); `dot(v)`, `combine(w)` and `gram()` do without rows where that is less work, as in
mixed ghost clipping (Bu et al., arXiv 2205.10683).
"""

import abc
import math

import tensorflow as tf

# At how many places of an example (timesteps, pixels) a weight is used, where the trace leaves that
# open: a guess, to count work by.
PLACES = 64

# Rows are kept for later products where they have at most this many times the entries of the
# factors that they are the product of.
ROOM = 1.5

# The most entries of rows of lookups, of operations without a form, and of weights with several
# uses (in float32 256 MiB). Those of products are limited by their work.
ROW_ENTRIES = 2**26


class NoFormError(ValueError):
    """An operation for which there is no closed form."""


class Outer:
    """The products t t^T of tensors t of shape (N, k), each formed once.

    A Dense layer's bias and kernel share the gradient at its output, so their parts of the Gram
    matrix share its products.

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

    Methods that form rows take `after`, a list of tensors: large intermediates are formed only
    once these exist (control dependencies), as those of all layers together would fill the memory.

    Attributes:
        shape: T's shape, a list.
        work: of the operation itself, forward.
        gram_work: of `gram`, or of the rows and their products.
        rows_work: of the rows.
        has_rows: whether the Gram matrix forms the rows of all forms without a shorter way to it,
            so that `dot` and `combine` may use them too. False until `Parts.hold_rows` says so,
            which it does before any product is asked for: it takes the work of all forms to know.
    """

    work: int
    gram_work: int
    rows_work: int
    has_rows = False

    def __init__(self, shape):
        self.shape = list(shape)
        self._formed = None

    @property
    def size(self):
        """Entries of T."""
        return math.prod(self.shape)

    def rows(self, after=()):
        """The gradients as a list of pieces (N, k), all of one k, formed once.

        Side by side the pieces are the rows (N, |T|), T's axes in the order of `_row_order`.
        """
        if self._formed is None:
            self._formed = self._rows(after)
        return self._formed

    # Whether `rows` stay in memory, for `dot` and `combine` after the Gram matrix.
    _keeps_rows = True

    def fresh_rows(self, after=()):
        """As `rows`; formed anew where those would be held in memory for this alone."""
        return self.rows(after) if self._keeps_rows else self._rows(after)

    @abc.abstractmethod
    def _rows(self, after):
        """As `rows`, formed anew."""

    # In which order T's axes stand in a row; `None` for T's own.
    _row_order = None

    def shaped_rows(self, after=()):
        """The gradients, shape (N, *T's shape)."""
        return self._shaped(beside(self.rows(after)), [-1])

    def _shaped(self, rows, leading=()):
        """Rows, each in the shape and order of T, behind axes of the sizes `leading`."""
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
        rows = self.rows()
        parts = tf.split(v, [r.shape[1] for r in rows]) if len(rows) > 1 else [v]
        products = [tf.matmul(r, p) for r, p in zip(rows, parts, strict=True)]
        return tf.reshape(tf.add_n(products), [-1])

    def combine(self, w):
        """sum_i w_i g_i, shaped as T, for w of shape (1, N)."""
        return self._shaped(beside([tf.matmul(w, rows) for rows in self.rows()]))

    def gram(self, outer, after=()):
        """<g_i, g_j>, shape (N, N), or `None` where products of the rows are less work.

        Args:
            outer: an `Outer`.
            after: as for `rows`.
        """
        return None


class Elementwise(Form):
    """T is added, multiplied or the like, entry by entry, broadcast to the shape of the examples.

    g_i is the gradient by T as it was broadcast, summed over the axes along which T was repeated.

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

    def gram(self, outer, after=()):
        # A bias shares its gradient with the product before it.
        return outer(self._gradient) if self._gradient in outer else None

    def _rows(self, after):
        return [tf.reshape(self._gradient, [-1, self.size])]


class Mapped(Form):
    """Any operation: rows that its own derivative gave, one example at a time.

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

    def _rows(self, after):
        return [self._all]


class Reshaped(Form):
    """T is another form's, in another shape with its entries in the same order.

    Args:
        form: the other form.
        shape: of T.
    """

    def __init__(self, form, shape):
        super().__init__(shape)
        self._form = form
        self.work, self.gram_work = form.work, form.gram_work
        self.rows_work = form.rows_work

    @property
    def has_rows(self):
        return self._form.has_rows

    @has_rows.setter
    def has_rows(self, held):
        self._form.has_rows = held

    @property
    def _keeps_rows(self):
        return self._form._keeps_rows

    def _rows(self, after):
        rows = self._form._shaped(beside(self._form.fresh_rows(after)), [-1])
        return [tf.reshape(rows, [-1, self.size])]

    def dot(self, v):
        return self._form.dot(tf.reshape(v, self._form.shape))

    def combine(self, w):
        return tf.reshape(self._form.combine(w), self.shape)

    def gram(self, outer, after=()):
        return self._form.gram(outer, after)


class Lookup(Form):
    """T is a table of which each example reads some entries, as an Embedding's.

    g_i has the gradient at each of the P entries that example i read, at that entry's place in T.

    Args:
        index: which entries, shape (N, P), integers.
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

    def _rows(self, after):
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

    def gram(self, outer, after=()):
        return None if self._through_rows else self._matched(outer.cast(self._gradient))

    def _matched(self, gradients):
        """sum_ts [index_it = index_js] <gradient_it, gradient_js>, one row i at a time."""
        index, gradient = tf.reshape(self._index, [-1]), flat(gradients)
        n, p = tf.shape(self._index)[0], tf.shape(self._index)[1]

        def one(example):
            mine, at = example
            same = tf.cast(mine[:, None] == index[None], gradient.dtype)
            products = tf.matmul(at, gradient, transpose_b=True) * same
            return tf.reduce_sum(tf.reshape(tf.reduce_sum(products, 0), [n, p]), 1)

        return tf.map_fn(one, (self._index, gradients), fn_output_signature=gradient.dtype)


def beside(tensors):
    """Tensors joined along the last axis."""
    return tf.concat(tensors, -1) if len(tensors) > 1 else tensors[0]


def column(w, t):
    """One number for each example, shaped to multiply a tensor (N, ...)."""
    return tf.reshape(w, [-1] + [1] * (t.shape.rank - 1))


def flat(t):
    """A tensor with all axes but the last as one."""
    return t if t.shape.rank == 2 else tf.reshape(t, [-1, t.shape[-1]])
