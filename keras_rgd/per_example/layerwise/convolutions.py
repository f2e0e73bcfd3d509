"""The forms of kernels that slide over an image: convolutions of all kinds.

The window is the kernel's extent in space; a place is where it stands when it makes one entry of
the output. In one dimension, with stride s and dilation d, the kernel's entry [k, a, b] joins image
[p s + k d, a] with response [p, b] at each place p, so that

    g_i[k, a, b] = sum_p image_i[p s + k d, a] response_i[p, b]

is for each k one product of matrices: of the image, shifted by k d, and the response. A window of
3 x 3 has nine such shifts.
"""

import itertools
import math

import tensorflow as tf

from keras_rgd.per_example.layerwise.forms import ROOM, Form, NoFormError, beside, column
from keras_rgd.per_example.layerwise.products import Contraction


class Sliding(Form):
    """T is a kernel that slides over an image, in one, two or three dimensions of space.

    Args:
        image: what the kernel slides over, (N * P, *space, A).
        response: what is paired with the image at each place, (N * P, *places, B): the gradient
            at the output.
        shape: of the kernel, (*window, A, B).
        strides: of the window.
        dilations: of the window.
        padding: "SAME" or "VALID".
        rows_per_example: P, how many images one example has.
        n: N, or a guess of it, to count work by.

    Raises:
        NoFormError: the image's extents or P are open in the trace.
    """

    def __init__(self, image, response, shape, strides, dilations, padding, rows_per_example, n):
        super().__init__(shape)
        self._image, self._response, self._n = image, response, n
        self._window = self.shape[:-2]
        self._strides, self._dilations, self._padding = strides, dilations, padding
        self._rows_per_example = rows_per_example
        self._places = list(response.shape[1:-1])
        if None in image.shape[1:] or None in self._places or rows_per_example is None:
            raise NoFormError("a convolution over a space of unknown extent")
        self._p = rows_per_example * math.prod(self._places)
        self.work = self.rows_work = n * self._p * self.size
        self.gram_work = self.work + n * n * self.size

    def _shifts(self):
        """What to cut out of the image for each entry of the window, by axes.

        Yields:
            For each axis of space: (how much to pad before, after), and a slice of the padded axis
            for each place of the window along it.
        """
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

    def _images(self, after):
        """The shifted image of each entry of the window, a list of (N, P * places, A)."""
        pads, axes = zip(*self._shifts(), strict=True)
        # Not before the backward pass comes here: those of all layers would fill the memory.
        with tf.control_dependencies([self._response, *after]):
            return self._slid(_padded(self._image, pads), axes)

    def _slid(self, image, axes):
        """Parts of an image, each (N, P * places, A), for the slices of each axis of space."""
        slid = _parts(image, axes)
        shape = tf.constant(self._of_example(slid[0]))
        return [tf.reshape(t, shape) for t in slid]

    def _of_examples(self, t):
        return tf.reshape(t, self._of_example(t))

    def _of_example(self, t):
        return [-1, self._rows_per_example * math.prod(t.shape[1:-1]), t.shape[-1]]


class Convolution(Sliding):
    """The kernel of an ordinary convolution: its rows from shifted images.

    Args:
        *sliding: as for `Sliding`.
    """

    def __init__(self, *sliding):
        super().__init__(*sliding)
        ghost = self._n**2 * self._p**2 * (self._patch + self.shape[-1])
        self._ghost = ghost < self.gram_work
        self.gram_work = min(ghost, self.gram_work)

    @property
    def _moves_response(self):
        """Whether to shift the response and not the image along the window's last axis.

        With stride 1 the one is as good as the other, and the one with fewer channels is copied.
        """
        a, b = self.shape[-2:]
        return self._window[-1] > 1 and self._strides[-1] == 1 and b <= a

    def _slid_and_moved(self, after):
        """As `_images` for the window's other axes, and the response shifted along the last one.

        Along the last axis, with stride 1, image [p + k d] and response [p] pair the same entries
        as image [p] and response [p - k d]. For each k the response is shifted by k d, and these
        copies stand side by side as channels: (N, P * places, window * B), with zeros where there
        is no response. `_row_order` says where that leaves the kernel's axes.
        """
        *others, ((before, _), slices) = self._shifts()
        extent, places, reach = self._image.shape[-2], self._places[-1], slices[-1].start
        with tf.control_dependencies([self._response, *after]):
            around = [reach - before, extent + before - places]
            response = _padded(self._response, [*([0, 0] for _ in others), around])
            moves = [slice(reach - s.start, reach - s.start + extent, 1) for s in slices]
            whole = [[slice(0, places, 1)] for places in self._places[:-1]]
            response = beside(_parts(response, [*whole, moves]))
            image = _padded(self._image, [*(pad for pad, _ in others), [0, 0]])
            whole = [slice(0, extent, 1)]
            images = self._slid(image, [*(slices for _, slices in others), whole])
            return images, self._of_examples(response)

    def _rows(self, after):
        if self._moves_response:
            images, response = self._slid_and_moved(after)
        else:
            images, response = self._images(after), self._of_examples(self._response)
        # One product for each entry of the window; side by side they would be copied again.
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
        """Entries of the image under the window."""
        return math.prod(self.shape[:-1])

    @property
    def _keeps_rows(self):
        places = self._p * self.shape[-1] + self._rows_per_example * math.prod(
            self._image.shape[1:]
        )
        return self.has_rows and not self._ghost and self.size <= ROOM * places

    def dot(self, v):
        if self._keeps_rows:
            return super().dot(v)
        through = self._slide(v) * self._response
        return tf.reduce_sum(tf.reshape(through, [-1, self._p * self.shape[-1]]), 1)

    def combine(self, w):
        if self._keeps_rows:
            return super().combine(w)
        if self._rows_per_example > 1:
            w = tf.repeat(w, self._rows_per_example, axis=1)
        return self._kernel_gradient(self._response * column(w, self._response))

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

    def gram(self, outer, after=()):
        if not self._ghost:
            return None
        patches, response = beside(self._images(after)), self._of_examples(self._response)
        form = Contraction(patches, response, [self._patch, self.shape[-1]], self._n)
        return form.gram(outer)


class GroupedConvolution(Form):
    """T is the kernel of a convolution in groups: each group of channels has a part of it.

    So each group of an example is an example of an ordinary convolution, whose rows are the parts
    of the example's row.

    Args:
        image: (N * P, *space, G * A).
        response: (N * P, *places, G * B).
        shape: of the kernel, (*window, A, G * B).
        strides: of the window.
        dilations: of the window.
        padding: "SAME" or "VALID".
        rows_per_example: P, how many images one example has.
        n: N, or a guess of it, to count work by.

    Raises:
        NoFormError: the image's extents or P are open in the trace.
    """

    def __init__(self, image, response, shape, strides, dilations, padding, rows_per_example, n):
        super().__init__(shape)
        if rows_per_example is None or None in [*image.shape[1:], *response.shape[1:]]:
            raise NoFormError("a convolution over a space of unknown extent")
        self._groups = groups = image.shape[-1] // shape[-2]
        self._each = Convolution(
            _by_group(image, groups, rows_per_example),
            _by_group(response, groups, rows_per_example),
            [*shape[:-1], shape[-1] // groups],
            strides,
            dilations,
            padding,
            rows_per_example,
            n * groups,
        )
        self.work = self.rows_work = self._each.work
        self.gram_work = self.work + n * n * self.size

    def _rows(self, after):
        # Not by `_each.rows`, which would keep them a second time.
        rows = self._each._shaped(beside(self._each._rows(after)), [-1])
        *window, a, b = self._each.shape
        rows = tf.reshape(rows, [-1, self._groups, math.prod(window) * a, b])
        return [tf.reshape(tf.transpose(rows, [0, 2, 1, 3]), [-1, self.size])]


def _by_group(t, groups, rows_per_example):
    """(N * P, *space, G * A) as (N * G * P, *space, A)."""
    *space, channels = t.shape[1:]
    each = channels // groups
    t = tf.reshape(t, [-1, rows_per_example, math.prod(space), groups, each])
    return tf.reshape(tf.transpose(t, [0, 3, 1, 2, 4]), [-1, *space, each])


class Depthwise(Sliding):
    """The kernel of a depthwise convolution, which works on each channel by itself.

    Args:
        *sliding: as for `Sliding`, with a response (N * P, *places, A * M) and a kernel
            (*window, A, M).
    """

    def _rows(self, after):
        *_, channels, multiplier = self.shape
        response = self._of_examples(self._response)
        images = self._images(after)
        if multiplier > 1:
            response = tf.reshape(response, [-1, self._p, channels, multiplier])
            images = [image[..., None] for image in images]
        # One sum over the places for each entry of the window.
        entries = [tf.reduce_sum(image * response, 1) for image in images]
        return [tf.reshape(tf.stack(entries, 1), [-1, self.size])]


def _padded(t, pads):
    """A tensor with zeros around its axes between the first and the last."""
    return tf.pad(t, [[0, 0], *pads, [0, 0]]) if any(map(any, pads)) else t


def _parts(t, axes):
    """The parts of a tensor for every choice of one slice an axis, between first and last axis."""
    if any(a.step != 1 for axis in axes for a in axis):
        parts = ((slice(None), *part) for part in itertools.product(*axes))
        return [t[part] for part in parts]
    # One constant less for each, in graphs with hundreds of them.
    size = tf.constant([-1, *(axis[0].stop - axis[0].start for axis in axes), t.shape[-1]])
    return [
        tf.slice(t, [0, *(s.start for s in part), 0], size) for part in itertools.product(*axes)
    ]
