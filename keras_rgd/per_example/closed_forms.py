"""Per-example gradients of one use of a weight, from its input and the gradient at its output.

Each form answers for the tensor T that joins the examples (see `uses`): `rows`, the gradients
themselves, shape (N, |T|); `dot(v)`, `combine(w)` and `gram()` without them where that is less
work, as in mixed ghost clipping (Bu et al., arXiv 2205.10683).
"""

import abc
import functools
import itertools
import math

import tensorflow as tf

# A guess where the trace does not tell how many places of an example use a weight.
_PLACES = 64

# Rows are kept for later products where they take at most so many times the room of the factors.
_ROOM = 1.5

# Entries that rows may have together, beyond those that are less work than products of positions.
ROW_ENTRIES = 2**26


class NoFormError(ValueError):
    """An operation for which there is no closed form."""


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
        return self._shaped(_beside(self.rows), [-1])

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
        return self._shaped(_beside([tf.matmul(w, rows) for rows in self.rows]))

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


class Contraction(Form):
    """T is a matrix, or several: g_i = sum_p left_ip right_ip^T.

    Args:
        left: shape (N, A) or (N, ..., P, A).
        right: shape (N, B) or (N, ..., P, B).
        shape: of T, whose entries are (..., A, B) in `order`.
        n: N, or a guess of it, to count work by.
        order: the permutation that takes the axes of `split` to T's; `None` where they are T's.
        split: the shape before the permutation.
    """

    def __init__(self, left, right, shape, n, order=None, split=None):
        super().__init__(shape)
        self._left, self._right, self._n = left, right, n
        self._order, self._split = order, split
        places = self._places or _PLACES
        self.work = self.rows_work = n * places * self.size
        ghost = n * n * places * places * (left.shape[-1] + right.shape[-1])
        through_rows = n * places * self.size + n * n * self.size
        # Products of positions instead of rows where that is less work.
        plain = left.shape.rank <= 3 and self._places is not None
        self._ghost = plain and (places == 1 or ghost < through_rows)
        self.gram_work = ghost if self._ghost else through_rows

    @classmethod
    def mergeable(cls, forms):
        """Whether `merged` takes these forms: plain products with the same matrix."""
        return all(type(f) is cls and f._left.shape.rank <= 3 for f in forms) and (
            len({(str(f._order), str(f._split), f._left.shape[-1]) for f in forms}) == 1
        )

    @classmethod
    def merged(cls, forms):
        """One form for several products with one matrix: g_i is the sum of theirs."""
        first = forms[0]
        left, right = (
            tf.concat([t if t.shape.rank == 3 else t[:, None] for t in factors], 1)
            for factors in ([f._left for f in forms], [f._right for f in forms])
        )
        return cls(left, right, first.shape, first._n, first._order, first._split)

    @property
    def _one_position(self):
        return self._left.shape.rank == 2

    @property
    def _places(self):
        return 1 if self._one_position else self._left.shape[-2]

    def _rows(self):
        if self._one_position:
            rows = self._left[:, :, None] * self._right[:, None, :]
        else:
            rows = tf.matmul(self._left, self._right, transpose_a=True)
        return [self._arranged(rows)]

    def _arranged(self, rows):
        if self._order is not None:
            rows = tf.reshape(rows, [-1, *self._split])
            rows = tf.transpose(rows, [0, *(axis + 1 for axis in self._order)])
        return tf.reshape(rows, [-1, self.size])

    def _back(self, v):
        """V as a (..., A, B)."""
        if self._order is not None:
            inverse = [self._order.index(i) for i in range(len(self._order))]
            v = tf.transpose(tf.reshape(v, self.shape), inverse)
        batch = self._left.shape[1:-2] if not self._one_position else []
        return tf.reshape(v, [*batch, self._left.shape[-1], self._right.shape[-1]])

    @property
    def _keeps_rows(self):
        """Whether there are rows, and they take little more room than the factors."""
        if self._ghost or not self.has_rows or self._places is None:
            return False
        a, b = self._left.shape[-1], self._right.shape[-1]
        return a * b <= _ROOM * self._places * (a + b)

    def dot(self, v):
        if self._keeps_rows:
            return super().dot(v)
        through = tf.matmul(self._left, self._back(v)) * self._right
        return tf.reduce_sum(through, list(range(1, through.shape.rank)))

    def combine(self, w):
        if self._keeps_rows:
            return super().combine(w)
        right = self._right * _column(w, self._right)
        if self._left.shape.rank > 3:
            combined = tf.einsum("n...pa,n...pb->...ab", self._left, right)
        else:
            combined = tf.matmul(_flat(self._left), _flat(right), transpose_a=True)
        return tf.reshape(self._arranged(combined[None]), self.shape)

    def gram(self, outer):
        if not self._ghost:
            return None
        if self._one_position:
            return outer(self._left) * outer(self._right)
        left, right = _flat(self._left), _flat(self._right)
        p = self._left.shape[1]
        products = tf.reshape(outer(left) * outer(right), [-1, p, tf.shape(left)[0] // p, p])
        return tf.reduce_sum(products, [1, 3])


class Convolution(Form):
    """T is the kernel of a convolution: its rows from shifted images.

    Args:
        image: what the kernel slides over, (N * P, *space, A).
        response: what each place has to do with, (N * P, *places, B).
        shape: of the kernel, (*window, A, B).
        strides: of the window.
        dilations: of the window.
        padding: "SAME" or "VALID".
        positions: P.
        n: N, or a guess of it, to count work by.
    """

    def __init__(self, image, response, shape, strides, dilations, padding, positions, n):
        super().__init__(shape)
        self._image, self._response, self._n = image, response, n
        self._window = self.shape[:-2]
        self._strides, self._dilations, self._padding = strides, dilations, padding
        self._positions = positions
        self._places = list(response.shape[1:-1])
        if None in image.shape[1:] or None in self._places or positions is None:
            raise NoFormError("a convolution over a space of unknown extent")
        self._p = p = positions * math.prod(self._places)
        self.work = self.rows_work = n * p * self.size
        ghost = n * n * p * p * (self._patch + self.shape[-1])
        through_rows = self.work + n * n * self.size
        self._ghost = ghost < through_rows
        self.gram_work = min(ghost, through_rows)

    def _shifts(self):
        """For each axis of space: what to pad before and after, and a slice for each place."""
        axes = zip(
            self._image.shape[1:-1],
            self._places,
            self._window,
            self._strides,
            self._dilations,
            strict=True,
        )
        for extent, places, window, stride, dilation in axes:
            needed = max((places - 1) * stride + (window - 1) * dilation + 1 - extent, 0)
            before = needed // 2 if self._padding == "SAME" else 0
            last = (places - 1) * stride + 1
            slices = [slice(k * dilation, k * dilation + last, stride) for k in range(window)]
            yield [before, needed - before], slices

    def _images(self):
        """The image under each place of the window, a list of (N, P * places, A)."""
        pads, axes = zip(*self._shifts(), strict=True)
        # Not before the backward pass comes here: those of all layers would fill the memory.
        with tf.control_dependencies([self._response, *self.after]):
            return self._slid(_padded(self._image, pads), axes)

    @property
    def _moves_response(self):
        """Whether it is less to copy to move the response along the window's last axis."""
        a, b = self.shape[-2:]
        return self._window[-1] > 1 and self._strides[-1] == 1 and b <= a

    def _slid_and_moved(self):
        """As `_images`, but for the places of the window's other axes; and the response.

        Its channels stand side by side for each place along the last axis, (N, P * places,
        window * B), moved against the image.
        """
        *others, ((before, _), slices) = self._shifts()
        extent, places, reach = self._image.shape[-2], self._places[-1], slices[-1].start
        with tf.control_dependencies([self._response, *self.after]):
            around = [reach - before, extent + before - places]
            response = _padded(self._response, [*([0, 0] for _ in others), around])
            moves = [slice(reach - s.start, reach - s.start + extent, 1) for s in slices]
            whole = [[slice(0, places, 1)] for places in self._places[:-1]]
            response = _beside(_parts(response, [*whole, moves]))
            image = _padded(self._image, [*(pad for pad, _ in others), [0, 0]])
            whole = [slice(0, extent, 1)]
            images = self._slid(image, [*(slices for _, slices in others), whole])
            return images, self._of_examples(response)

    def _slid(self, image, axes):
        slid = _parts(image, axes)
        shape = tf.constant(self._of_example(slid[0]))
        return [tf.reshape(t, shape) for t in slid]

    def _of_examples(self, t):
        return tf.reshape(t, self._of_example(t))

    def _of_example(self, t):
        return [-1, self._positions * math.prod(t.shape[1:-1]), t.shape[-1]]

    def _rows(self):
        if self._moves_response:
            images, response = self._slid_and_moved()
        else:
            images, response = self._images(), self._of_examples(self._response)
        # One product for each place of the window; side by side they would be copied again.
        products = [tf.matmul(image, response, transpose_a=True) for image in images]
        shape = tf.constant([-1, self.size // len(images)])
        return [tf.reshape(t, shape) for t in products]

    @property
    def _row_order(self):
        if not self._moves_response:
            return None
        *others, last, a, b = range(len(self.shape))
        return [*others, a, last, b]

    @property
    def _patch(self):
        return math.prod(self.shape[:-1])

    @property
    def _keeps_rows(self):
        places = self._p * self.shape[-1] + self._positions * math.prod(self._image.shape[1:])
        return self.has_rows and not self._ghost and self.size <= _ROOM * places

    def dot(self, v):
        if self._keeps_rows:
            return super().dot(v)
        through = self._slide(v) * self._response
        return tf.reduce_sum(tf.reshape(through, [-1, self._p * self.shape[-1]]), 1)

    def combine(self, w):
        if self._keeps_rows:
            return super().combine(w)
        if self._positions > 1:
            w = tf.repeat(w, self._positions, axis=1)
        return self._kernel_gradient(self._response * _column(w, self._response))

    def _arguments(self):
        strides, dilations = [1, *self._strides, 1], [1, *self._dilations, 1]
        return dict(strides=strides, dilations=dilations, padding=self._padding)

    def _slide(self, v):
        function = tf.raw_ops.Conv2D if len(self._window) == 2 else tf.raw_ops.Conv3D
        return function(input=self._image, filter=tf.reshape(v, self.shape), **self._arguments())

    def _kernel_gradient(self, response):
        two = len(self._window) == 2
        function = tf.raw_ops.Conv2DBackpropFilter if two else tf.raw_ops.Conv3DBackpropFilterV2
        return function(
            input=self._image,
            filter_sizes=self.shape,
            out_backprop=response,
            **self._arguments(),
        )

    def gram(self, outer):
        if not self._ghost:
            return None
        patches, response = _beside(self._images()), self._of_examples(self._response)
        form = Contraction(patches, response, [self._patch, self.shape[-1]], self._n)
        return form.gram(outer)


class Depthwise(Form):
    """T is the kernel of a depthwise convolution: the examples stand side by side as channels.

    Args:
        image: (N * P, height, width, A).
        response: (N * P, height, width, A * M).
        shape: of the kernel, (height, width, A, M).
        arguments: strides, padding, dilations as of the operation.
        positions: P.
        n: N, or a guess of it, to count work by.
    """

    def __init__(self, image, response, shape, arguments, positions, n):
        super().__init__(shape)
        self._image, self._response = image, response
        self._arguments, self._positions = arguments, positions
        if None in image.shape[1:] or positions is None:
            raise NoFormError("a convolution over a space of unknown extent")
        self.work = n * positions * math.prod(response.shape[1:]) * shape[0] * shape[1]
        self.rows_work = self.work
        self.gram_work = self.work + n * n * self.size

    def _rows(self):
        height, width, channels, multiplier = self.shape
        n = tf.shape(self._image)[0]
        kernels = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=self._side_by_side(self._image),
            filter_sizes=tf.stack([height, width, n * channels, multiplier]),
            out_backprop=self._side_by_side(self._response),
            **self._arguments,
        )
        kernels = tf.reshape(kernels, [height, width, n, channels, multiplier])
        rows = tf.reshape(tf.transpose(kernels, [2, 0, 1, 3, 4]), [n, self.size])
        if self._positions > 1:
            rows = tf.reduce_sum(tf.reshape(rows, [-1, self._positions, self.size]), 1)
        return [rows]

    @staticmethod
    def _side_by_side(t):
        height, width, channels = t.shape[1:]
        t = tf.transpose(t, [1, 2, 0, 3])
        return tf.reshape(t, [1, height, width, tf.shape(t)[2] * channels])


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
        places = index.shape[1] or _PLACES
        matched = n * n * places * places * gradient.shape[-1]
        through_rows = n * n * self.size
        self._through_rows = through_rows < matched and n * self.size <= ROW_ENTRIES
        self.work, self.gram_work = 0, through_rows if self._through_rows else matched
        self.rows_work = n * self.size

    def _rows(self):
        n, entries = tf.shape(self._index)[0], self.shape[0]
        index = self._index + entries * tf.range(n)[:, None]
        rows = tf.math.unsorted_segment_sum(
            _flat(self._gradient), tf.reshape(index, [-1]), n * entries
        )
        return [tf.reshape(rows, [n, self.size])]

    _keeps_rows = False

    def dot(self, v):
        read = tf.gather(tf.reshape(v, [self.shape[0], -1]), self._index)
        return tf.reduce_sum(read * self._gradient, [1, 2])

    def combine(self, w):
        gradient = _flat(self._gradient * _column(w, self._gradient))
        index = tf.reshape(self._index, [-1])
        combined = tf.math.unsorted_segment_sum(gradient, index, self.shape[0])
        return tf.reshape(combined, self.shape)

    def gram(self, outer):
        return None if self._through_rows else self._matched(outer.cast(self._gradient))

    def _matched(self, gradients):
        """sum_ts [index_it = index_js] <gradient_it, gradient_js>, some examples at a time."""
        index, gradient = tf.reshape(self._index, [-1]), _flat(gradients)
        n, p = tf.shape(self._index)[0], tf.shape(self._index)[1]

        def one(example):
            mine, at = example
            same = tf.cast(mine[:, None] == index[None], gradient.dtype)
            products = tf.matmul(at, gradient, transpose_b=True) * same
            return tf.reduce_sum(tf.reshape(tf.reduce_sum(products, 0), [n, p]), 1)

        return tf.map_fn(one, (self._index, gradients), fn_output_signature=gradient.dtype)


def _padded(t, pads):
    """Zeros around the axes between the first and the last."""
    return tf.pad(t, [[0, 0], *pads, [0, 0]]) if any(map(any, pads)) else t


def _parts(t, axes):
    """All parts of a tensor that take one of the slices of each axis between first and last."""
    if any(a.step != 1 for axis in axes for a in axis):
        return [t[(slice(None), *part)] for part in itertools.product(*axes)]
    # One constant less for each, in graphs with hundreds of them.
    size = tf.constant([-1, *(axis[0].stop - axis[0].start for axis in axes), t.shape[-1]])
    return [
        tf.slice(t, [0, *(s.start for s in part), 0], size) for part in itertools.product(*axes)
    ]


def _beside(tensors):
    """Along the last axis."""
    return tf.concat(tensors, -1) if len(tensors) > 1 else tensors[0]


def _column(w, t):
    return tf.reshape(w, [-1] + [1] * (t.shape.rank - 1))


def _flat(t):
    """All axes but the last as one."""
    return t if t.shape.rank == 2 else tf.reshape(t, [-1, t.shape[-1]])


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
