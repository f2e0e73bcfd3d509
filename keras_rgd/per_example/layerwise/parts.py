"""The parts of G by the uses of the weights: products, sums and the Gram matrix of a batch.

In the unit of the cotangents, which `layerwise` chooses, and in one dtype.
"""

import math

import tensorflow as tf

from keras_rgd.per_example.layerwise.forms import Elementwise, NoFormError, Outer
from keras_rgd.per_example.layerwise.operations import form_of
from keras_rgd.per_example.layerwise.products import Contraction
from keras_rgd.per_example.layerwise.uses import NotVisibleError
from keras_rgd.per_example.vectorized_map import quiet

# Rows of at most so many entries are put side by side for one product.
_SMALL = 1024

# The large intermediates of so many weights may be in memory together: with fewer of them the
# backward pass, which does not wait, would leave more of its own there.
_AHEAD = 5

# From so many entries on, rows are multiplied in parts.
_LONG = 2048

# The largest entry of v in products, so that no sum of an example's inputs times v, 2^24 of them,
# leaves the range: where its cotangent is 0, an example may hold any finite number.
_SMALL_V = 2.0**-24


class Parts:
    """The parts of one batch's G; inside a graph only.

    Args:
        weights: the trainable `tf.Variable`s.
        tape: a persistent `tf.GradientTape` of the forward pass.
        found: (use, gradient at its output) of each use, a list.
        n_examples: N, an int or a scalar tensor.
        dtype: in which to work.
        options: `LayerwiseOptions`; where they are precise, room is short, and rows are formed of
            one weight after another.

    Attributes:
        work: of the uses, forward, in multiply-adds.
        gram_work: of `gram`, but for the products (N, N).
        row_entries: entries of the rows that `gram` forms because a weight is combined with
            others before its use, or has uses of unlike kinds.

    Raises:
        NotVisibleError: a use has no closed form.
    """

    def __init__(self, weights, tape, found, n_examples, dtype, options):
        self._weights, self._tape, self._n_examples = weights, tape, n_examples
        self._inner, self._compiled, self._one_by_one = dtype, options.compiled, options.precise
        counted = options.n
        self._joined_rows = {}  # of weights with several uses, by index
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
        """Whether rows that the Gram matrix forms may be kept for the other operations."""
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
            if use.path.steps is not None:
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
            if use.path.steps is not None:
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
        """(index, [(use, form), ...]) of each weight.

        The last layers first, as the backward pass comes by them; products before elementwise
        uses, which may share theirs.
        """
        by_weight = {}
        for use, form in self._uses:
            for index in use.path.weights:
                by_weight.setdefault(index, []).append((use, form))
        return sorted(reversed(by_weight.items()), key=_elementwise)

    def rows_by_weight(self):
        """(index, rows (N, its size)) of one weight after another: room for all may be short."""
        before = []
        for index, same in self._by_weight:
            for _, form in same:
                form.after = before
            rows = self._rows_by(index, same)
            before = [rows]
            yield index, rows

    def gram(self, dtype=None):
        """<g_i, g_j>, shape (N, N).

        Args:
            dtype: in which products of the factors are formed. Defaults to `None`, their own.
        """
        grams, small, formed, outer = [], [], [], Outer(dtype)
        short = self._one_by_one or dtype is not None
        ahead = 1 if short else _AHEAD
        for index, same in self._by_weight:
            for _, form in same:
                form.after = formed[len(formed) - ahead :][:1] if len(formed) >= ahead else []
            _, form = same[0]
            if not _by_itself(same):
                if index not in self._joined_rows or self._one_by_one:
                    self._joined_rows[index] = self._rows_by(index, same)
                rows = [self._joined_rows[index]]
            elif (gram := form.gram(outer)) is not None:
                grams.append(gram)
                formed.append(gram)
                continue
            else:
                rows = form.fresh_rows()
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

    def _rows_by(self, index, same):
        """Rows by one weight, shape (N, its size), from its uses."""
        rows = []
        for use, form in same:
            if use.path.steps is None:
                rows.append(self._pulled_rows(use, form, index))
            else:
                back = use.path.back(form.shaped_rows(), leading=(-1,))
                rows.append(tf.reshape(back, [-1, form.size]))
        return tf.add_n(rows) if len(rows) > 1 else rows[0]

    def _pulled_rows(self, use, form, index):
        """Rows by a weight itself where the use's tensor is a function of it."""
        with quiet():
            pulled = tf.vectorized_map(
                lambda row: self._pull(use, row, [index])[index], form.shaped_rows()
            )
        return tf.reshape(pulled, [-1, self._weights[index].shape.num_elements()])

    def _pull(self, use, t, indices=None):
        """A gradient by the use's tensor, as one by each weight behind it: index -> tensor."""
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
        """How the use's tensor moves with the weights along v, by the derivative of `_pull`."""
        at = tf.zeros(use.shape, self._inner)
        pulled = self._pull(use, at)
        along = [v[index] for index in pulled]
        return tf.gradients(list(pulled.values()), at, along, unconnected_gradients="zero")[0]


def _by_itself(same):
    """Whether a weight has one use, of itself: its part of the Gram matrix needs no rows."""
    return len(same) == 1 and same[0][0].path.steps is not None


def _merged(uses):
    """Matrix products of one tensor with several inputs become one, over all their places."""
    by_tensor = {}
    for use, form in uses:
        # Two functions of the same weights are not the same tensor.
        tensor = use.path if use.path.steps is not None else use.tensor.ref()
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
    """Small pieces in as few matrices as hold at most `_SMALL` columns each."""
    groups, width = [], _SMALL
    for r in rows:
        if width + r.shape[1] > _SMALL:
            groups.append([])
            width = 0
        groups[-1].append(r)
        width += r.shape[1]
    return [tf.concat(g, 1) if len(g) > 1 else g[0] for g in groups]
