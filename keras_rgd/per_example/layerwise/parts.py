"""The parts of G by the uses of the weights: products, sums and the Gram matrix of a batch.

G v, G^T w and G G^T are sums over the weights, and those over the uses of each weight. All are in
the unit of the cotangents, which `layerwise` chooses, and in one dtype.
"""

import math

import tensorflow as tf

from keras_rgd.per_example.layerwise.forms import Elementwise, NoFormError, Outer
from keras_rgd.per_example.layerwise.operations import form_of
from keras_rgd.per_example.layerwise.products import Contraction
from keras_rgd.per_example.layerwise.uses import NotVisibleError
from keras_rgd.per_example.vectorized_map import quiet

# Rows of at most this many entries are put side by side for one product.
_SMALL = 1024

# The large intermediates of this many weights may be in memory together. Fewer would take more
# memory, not less: the backward pass does not wait for them, and its own results would pile up.
_AHEAD = 5

# Rows of this many entries or more are multiplied in parts.
_LONG = 2048

# The largest entry that v is scaled to for a product with an example's inputs. These may be any
# finite number where the example's cotangent is 0, and a sum of 2^24 of them must stay in range.
_SMALL_V = 2.0**-24


class Parts:
    """The parts of one batch's G; inside a graph only.

    Args:
        weights: the trainable `tf.Variable`s.
        tape: a persistent `tf.GradientTape` of the forward pass.
        found: (`Use`, gradient of the batch's loss at its output) of each use, a list.
        n_examples: N, an int or a scalar tensor.
        dtype: in which to work.
        options: `LayerwiseOptions`; where they are precise, memory is short, and the Gram matrix
            forms the rows of one weight after another.

    Attributes:
        work: of the uses, forward, in multiply-adds.
        gram_work: of `gram`, but for the products (N, N).
        row_entries: entries of the rows that `gram` forms in any case: of weights that are
            combined with others before their use, or have several uses that no form joins.

    Raises:
        NotVisibleError: a use has no closed form.
    """

    def __init__(self, weights, tape, found, n_examples, dtype, options):
        self._weights, self._tape, self._n_examples = weights, tape, n_examples
        self._inner, self._compiled, self._one_by_one = dtype, options.compiled, options.precise
        counted = options.n
        self._joined_rows = {}  # by index, of weights whose rows are sums over several uses
        self._uses = _merged([(use, self._form(use, gradient, counted)) for use, gradient in found])
        self.work = sum(form.work for _, form in self._uses)
        self.gram_work = self.row_entries = 0
        for index, same in self._by_weight:
            if _by_itself(same):
                self.gram_work += same[0][1].gram_work
                continue
            size = math.prod(weights[index].shape)
            entries = counted * (size + sum(form.size for _, form in same))
            self.row_entries += entries
            self.gram_work += counted**2 * size + entries
            self.gram_work += sum(form.rows_work for _, form in same)

    def hold_rows(self, held):
        """Say whether rows that the Gram matrix forms are kept for `dot` and `combine`."""
        for _, form in self._uses:
            form.has_rows = held

    def _form(self, use, gradient, n):
        try:
            return form_of(use, tf.convert_to_tensor(gradient), self._inner, n)
        except (NoFormError, TypeError, ValueError, tf.errors.OpError) as error:
            raise NotVisibleError(min(use.path.weights), str(error)) from error

    def dot(self, v):
        """<g_i, v>, shape (N,)."""
        v = [tf.cast(t, self._inner) for t in v]
        largest = tf.reduce_max([tf.reduce_max(tf.abs(t)) for t in v if 0 not in t.shape])
        v = [tf.math.divide_no_nan(t, largest) for t in v]
        total = tf.zeros([self._n_examples], self._inner)
        for use, form in self._uses:
            if use.path.rearrangements is not None:
                (index,) = use.path.weights
                total += form.dot(_SMALL_V * use.path.rearranged(v[index]))
            else:
                total += form.dot(_SMALL_V * self._pushed(use, v))
        return total / _SMALL_V * largest

    def combine(self, w):
        """sum_i w_i g_i, a list of tensors shaped as the weights, for w of shape (N,)."""
        w = tf.cast(w, self._inner)[None]
        parts = [[] for _ in self._weights]
        for use, form in self._uses:
            combined = form.combine(w)
            if use.path.rearrangements is not None:
                (index,) = use.path.weights
                parts[index].append(use.path.back(combined))
            else:
                for index, gradient in self._pull(use, combined).items():
                    parts[index].append(gradient)
        return [
            (tf.add_n(p) if len(p) > 1 else p[0]) if p else tf.zeros(w.shape, self._inner)
            for p, w in zip(parts, self._weights, strict=True)
        ]

    @property
    def _by_weight(self):
        """(index, [(use, form), ...]) of each weight, in the order in which rows are formed.

        The last layers first, as the backward pass reaches them first. Weights whose uses are all
        elementwise come last: a bias may take its products from its kernel's.
        """
        by_weight = {}
        for use, form in self._uses:
            for index in use.path.weights:
                by_weight.setdefault(index, []).append((use, form))
        return sorted(reversed(by_weight.items()), key=_elementwise)

    def rows_by_weight(self):
        """The rows by one weight after another, as there may not be memory for all at once.

        Yields:
            (index, rows of shape (N, the weight's size)).
        """
        before = []
        for index, same in self._by_weight:
            rows = self._rows_by(index, same, before)
            before = [rows]
            yield index, rows

    def gram(self, dtype=None):
        """<g_i, g_j>, shape (N, N).

        Args:
            dtype: in which products of the factors are formed. Defaults to `None`, their own.

        Returns:
            The sum of the weights' parts. Of a weight with one use of itself the part is what its
            form says; of any other it is the products of its rows.
        """
        grams, small, formed, outer = [], [], [], Outer(dtype)
        short = self._one_by_one or dtype is not None
        ahead = 1 if short else _AHEAD
        for index, same in self._by_weight:
            after = [formed[-ahead]] if len(formed) >= ahead else []
            _, form = same[0]
            if not _by_itself(same):
                if index not in self._joined_rows or self._one_by_one:
                    self._joined_rows[index] = self._rows_by(index, same, after)
                rows = [self._joined_rows[index]]
            elif (gram := form.gram(outer, after)) is not None:
                grams.append(gram)
                formed.append(gram)
                continue
            else:
                rows = form.fresh_rows(after)
            if dtype is not None and len(rows) > 1:
                rows = [tf.concat(rows, 1)]
            if rows[0].shape[1] > _SMALL or self._one_by_one:
                rows = [self._products(outer.cast(r)) for r in rows]
                grams += rows
            else:
                small += rows
            formed.append(rows[-1])
        small = [self._products(outer.cast(rows)) for rows in _side_by_side(small)]
        return tf.add_n(grams + small)

    def _products(self, rows):
        """The products of long rows, shape (N, N)."""
        width = rows.shape[1]
        parts = next((m for m in (8, 4, 2) if width % m == 0), 1)
        if self._compiled or parts == 1 or width < _LONG:
            return tf.matmul(rows, rows, transpose_b=True)
        # TF's own product of long rows uses one core; one in parts uses all.
        rows = tf.transpose(tf.reshape(rows, [-1, parts, width // parts]), [1, 0, 2])
        return tf.reduce_sum(tf.matmul(rows, rows, transpose_b=True), 0)

    def _rows_by(self, index, same, after):
        """The gradients by one weight, shape (N, its size): the sum over its uses.

        Args:
            index: the weight's.
            same: (use, form) of each of its uses.
            after: as for `Form.rows`.
        """
        rows = []
        for use, form in same:
            if use.path.rearrangements is None:
                rows.append(self._pulled_rows(use, form, index, after))
            else:
                back = use.path.back(form.shaped_rows(after), leading=(-1,))
                rows.append(tf.reshape(back, [-1, form.size]))
        return tf.add_n(rows) if len(rows) > 1 else rows[0]

    def _pulled_rows(self, use, form, index, after):
        """The gradients by a weight of which the use's tensor is a function, one row at a time."""
        with quiet():
            pulled = tf.vectorized_map(
                lambda row: self._pull(use, row, [index])[index], form.shaped_rows(after)
            )
        return tf.reshape(pulled, [-1, self._weights[index].shape.num_elements()])

    def _pull(self, use, t, indices=None):
        """The chain rule by the tape: from a gradient by the use's tensor to those by weights.

        Args:
            use: a `Use`.
            t: the gradient, shaped as the tensor.
            indices: of the weights. Defaults to `None`, all that the tensor is made of.

        Returns:
            A dict of index to tensor.
        """
        indices = sorted(use.path.weights) if indices is None else indices
        gradients = self._tape.gradient(
            use.tensor,
            [self._weights[i] for i in indices],
            tf.cast(t, use.tensor.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        gradients = [tf.cast(tf.convert_to_tensor(g), self._inner) for g in gradients]
        return dict(zip(indices, gradients, strict=True))

    def _pushed(self, use, v):
        """The use's tensor's derivative along v, by differentiating `_pull`, which is linear."""
        at = tf.zeros(use.shape, self._inner)
        pulled = self._pull(use, at)
        along = [v[index] for index in pulled]
        return tf.gradients(list(pulled.values()), at, along, unconnected_gradients="zero")[0]


def _by_itself(same):
    """Whether a weight has one use, as itself or rearranged: its form has all of its part."""
    return len(same) == 1 and same[0][0].path.rearrangements is not None


def _merged(uses):
    """Uses with the products of one matrix with several inputs made one use, over all places.

    So the inner products between these uses are counted too, without rows.
    """
    by_tensor = {}
    for use, form in uses:
        # The same rearrangement of one weight is the same matrix; functions are told by tensor.
        tensor = use.path if use.path.rearrangements is not None else use.tensor.ref()
        by_tensor.setdefault(tensor, []).append((use, form))
    merged = []
    for same in by_tensor.values():
        forms = [form for _, form in same]
        if len(same) > 1 and Contraction.mergeable(forms):
            same = [(same[0][0], Contraction.merged(forms))]
        merged += same
    return merged


def _elementwise(item):
    _, same = item
    return all(isinstance(form, Elementwise) for _, form in same)


def _side_by_side(rows):
    """Short rows of several weights joined, while they have at most `_SMALL` entries together."""
    groups, width = [], _SMALL
    for r in rows:
        if width + r.shape[1] > _SMALL:
            groups.append([])
            width = 0
        groups[-1].append(r)
        width += r.shape[1]
    return [tf.concat(g, 1) if len(g) > 1 else g[0] for g in groups]
