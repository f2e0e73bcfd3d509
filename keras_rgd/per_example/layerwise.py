"""Per-example gradients from one ordinary forward and backward pass over the batch.

Where examples do not mix, the gradient of the batch's loss at the output of an operation holds
every example's own; with the operation's input it gives that operation's part of g_i. So the three
operations cost a few matrix products for each use of a weight, and no matrix of all g_i is kept.
"""

import functools

import keras
import tensorflow as tf

from keras_rgd import vectors
from keras_rgd.per_example.batch import batch_size
from keras_rgd.per_example.closed_forms import Contraction, Elementwise, NoFormError, Outer
from keras_rgd.per_example.interface import (
    ExampleSpace,
    PerExampleGradients,
    squares_of_rows,
)
from keras_rgd.per_example.lanes import quiet
from keras_rgd.per_example.loss import (
    call_model,
    example_losses,
    replaced,
    what_losses_read,
)
from keras_rgd.per_example.operations import form_of
from keras_rgd.per_example.uses import NotVisibleError, find_uses

# The Gram matrix gives a guaranteed bound on M_x; it is formed while its work is at most that of so
# many SGD steps, or too little to tell. Beyond, products with D estimate M_x.
_GRAM_STEPS = 2
_GRAM_FLOOR = 5e7  # multiply-adds

# The bound's N x N products.
_POWERS = 3

# Rows of at most so many entries are put side by side for one product.
_SMALL = 1024

# The large intermediates of so many weights may be in memory together: with fewer of them the
# backward pass, which does not wait, would leave more of its own there.
_AHEAD = 5

# From so many entries on, rows are multiplied in parts.
_LONG = 2048


class Layerwise(PerExampleGradients):
    """The parts of G by the uses of the weights, for one batch; inside a graph only.

    Args:
        model: a compiled, built model whose examples do not mix.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets.
        sample_weight: the user's sample weights (class weights included), or `None`.
        training: whether layers behave as in training.
        loss_scale: factor that keeps half-precision gradients in range; it cancels.
        n: N, to count work by where it is not known when the step is traced. Defaults to `64`.
        compiled: whether the caller compiles what it traces with XLA. Defaults to `False`.
        repeats: whether an operation may give a weight its axis of examples, as `check_layerwise`
            found it to. Defaults to `True`.
        precise: whether to work in float64, so that the Gram matrix keeps the digits that
            centring loses; and to form it whatever it costs, from one weight after another, as
            room is short then. Defaults to `False`.

    Raises:
        NotVisibleError: a weight is used where that cannot be seen, or has no closed form there.
        ValueError: where the loss has no per-example losses.
    """

    way = "layerwise"

    def __init__(
        self,
        model,
        x,
        y,
        sample_weight=None,
        training=True,
        loss_scale=1.0,
        n=64,
        compiled=False,
        repeats=True,
        precise=False,
    ):
        self.weights = [w.value for w in model.trainable_variables]
        self.n_examples = batch_size(x)
        self._compiled = compiled
        self._inner, self._one_by_one = tf.float64 if precise else self.dtype, precise
        self._n = tf.cast(self.n_examples, self.dtype)
        counted = self.n_examples if isinstance(self.n_examples, int) else n
        u = tf.ones([self.n_examples], self.dtype)
        graph = tf.compat.v1.get_default_graph()
        examples = [tf.convert_to_tensor(t) for t in keras.tree.flatten(x) if t is not None]
        before = len(graph.get_operations())
        with tf.GradientTape(persistent=True) as tape:
            self.y_pred = call_model(model, x, training)
            operations = graph.get_operations()[before:]
            outputs = what_losses_read(self.y_pred)
            # Outputs may follow from one another; by copies each passes on its own part alone.
            with tape.stop_recording():
                copied = replaced(self.y_pred, tf.identity)
            copies = what_losses_read(copied)
            tape.watch(copies)
            self.loss, derivatives = example_losses(model, x, y, copied, sample_weight, u, training)
            f_mean = tf.reduce_sum(tf.cast(derivatives, self.dtype))
            scaled = tf.cast(loss_scale, self.dtype) * f_mean
        self._tape, zero = tape, tf.UnconnectedGradients.ZERO
        self._derivatives, self._outputs, self._copies = derivatives, outputs, copies
        # What reaches the weights by another way than the copies is grad r.
        self._r_gradient = None
        r_gradient = tape.gradient(self.loss, self.weights)
        if any(g is not None for g in r_gradient):
            pairs = zip(r_gradient, self.weights, strict=True)
            self._r_gradient = self.cast([tf.zeros(w.shape) if g is None else g for g, w in pairs])
        cotangents = tape.gradient(scaled, copies, unconnected_gradients=zero)
        cotangents, unit = _in_unit(cotangents, self.dtype)
        self._unit = unit / tf.cast(loss_scale, self.dtype)
        known = self.n_examples if isinstance(self.n_examples, int) else None
        uses = find_uses(operations, self.weights, examples, known, repeats)
        # A tape would leak the graph, where one use's output leads to another's.
        gradients = tf.gradients(outputs, [use.output for use in uses], cotangents)
        self.repeats = any(use.repeats for use in uses)
        self._uses = _merged(
            [
                (use, self._form(use, gradient, counted))
                for use, gradient in zip(uses, gradients, strict=True)
                if gradient is not None
            ]
        )
        forward = sum(form.work for _, form in self._uses)
        self.gram_work = sum(form.gram_work for _, form in self._uses) + _POWERS * counted**3
        self.step_work = 3 * forward
        cheap = self.gram_work <= max(_GRAM_STEPS * self.step_work, _GRAM_FLOOR)
        self.gram_is_cheap = precise or cheap
        for _, form in self._uses:
            # Rows of all uses at once, in float64, would take too much room.
            form.has_rows = cheap and not precise

    def _form(self, use, gradient, n):
        try:
            return form_of(use, tf.convert_to_tensor(gradient), self._inner, n)
        except (NoFormError, TypeError, ValueError, tf.errors.OpError) as error:
            raise NotVisibleError(min(use.path.weights), str(error)) from error

    @functools.cached_property
    def gradient(self):
        return self.reweighted(tf.ones([self.n_examples], self.dtype))

    def reweighted(self, m):
        return self._with_r(self._combine(m * self._unit))

    def combine(self, w):
        return self._combine(w * self._n * self._unit)

    def dot(self, v):
        return self._n * self._unit * tf.cast(self._dot(v), self.dtype)

    def rows(self):
        rows = dict(self._rows_by_weight())
        factor = tf.cast(self._n * self._unit, self._inner)
        return [
            tf.cast(tf.reshape(factor * rows[index], [-1, *w.shape]), self.dtype)
            if index in rows
            else tf.zeros([self.n_examples, *w.shape], self.dtype)
            for index, w in enumerate(self.weights)
        ]

    def squares(self, center):
        factor = tf.cast(self._n * self._unit, self._inner)
        # Of a weight without a use the gradients are 0.
        squares = {index: tf.reduce_sum(tf.square(c)) for index, c in enumerate(center)}
        for index, rows in self._rows_by_weight():
            rows = factor * rows - tf.reshape(tf.cast(center[index], self._inner), [1, -1])
            squares[index] = tf.cast(squares_of_rows(rows), self.dtype)
        return tf.add_n([s + tf.zeros([self.n_examples], self.dtype) for s in squares.values()])

    def gram(self, center=None, unit=1.0):
        factor = tf.cast(self._n * self._unit / unit, self._inner)
        gram = self._gram * factor * factor
        if center is not None:
            # <g_i - c, g_j - c>; the digits that this loses are those of the mean's square.
            scaled = [tf.cast(c / unit, self._inner) for c in center]
            k = factor * self._dot(scaled)
            gram += vectors.inner(scaled, scaled) - k[:, None] - k[None]
        return tf.cast(gram, self.dtype)

    def example_space(self):
        gram = tf.cast(self._gram, self.dtype) * (self._n * self._n)
        k, square = tf.reduce_mean(gram, 1), tf.reduce_mean(gram)
        if self._r_gradient is not None:
            r = vectors.scale(self._r_gradient, 1 / self._unit)
            along = self._n * tf.cast(self._dot(r), self.dtype)
            square += 2 * tf.reduce_mean(along) + vectors.inner(r, r)
            k += along
        largest = tf.reduce_max(tf.linalg.diag_part(gram))
        return ExampleSpace(gram, products=k, square=square, largest=largest, unit=self._unit)

    def reweighted_ordinarily(self, m):
        """`reweighted(m)` by ordinary differentiation of the same forward pass."""
        total, factors = [self.loss, self._derivatives], [tf.ones_like(self.loss)]
        factors.append(tf.cast(m - 1, self._derivatives.dtype))
        zero = tf.UnconnectedGradients.ZERO
        cotangents = self._tape.gradient(total, self._copies, factors, unconnected_gradients=zero)
        return self.cast(
            self._tape.gradient(
                total + self._outputs,
                self.weights,
                factors + cotangents,
                unconnected_gradients=zero,
            )
        )

    def reweighted_and_squares(self, m):
        """`reweighted(m)` and its square, but for grad r and in some unit, by two operations.

        By `combine`, and by `gram` or `dot`, whichever a step uses.

        Args:
            m: shape (N,).

        Returns:
            A list of tensors; two scalars that must agree.
        """
        combined = self._combine(m)
        if self.gram_is_cheap:
            products = tf.linalg.matvec(tf.cast(self._gram, self.dtype), m)
        else:
            products = tf.cast(self._dot(combined), self.dtype)
        squares = vectors.inner(combined, combined), tf.reduce_sum(m * products)
        return self._with_r(vectors.scale(combined, self._unit)), squares

    def _with_r(self, combined):
        return combined if self._r_gradient is None else vectors.add(self._r_gradient, combined)

    # Below, in the unit of the gradients: g_i / (N unit).

    def _dot(self, v):
        v = [tf.cast(t, self._inner) for t in v]
        total = tf.zeros([self.n_examples], self._inner)
        for use, form in self._uses:
            if use.path.steps is not None:
                (index,) = use.path.weights
                total += form.dot(use.path.rearranged(v[index]))
            else:
                for index, rows in self._pulled_rows(use, form).items():
                    total += tf.linalg.matvec(rows, tf.reshape(v[index], [-1]))
        return total

    def _combine(self, w):
        w = tf.cast(w, self._inner)[None]
        parts = [[] for _ in self.weights]
        for use, form in self._uses:
            combined = form.combine(w)
            if use.path.steps is not None:
                (index,) = use.path.weights
                parts[index].append(use.path.back(combined))
            else:
                for index, gradient in self._pull(use, combined).items():
                    parts[index].append(gradient)
        return [
            tf.cast(tf.add_n(p) if len(p) > 1 else p[0], self.dtype)
            if p
            else tf.zeros(w.shape, self.dtype)
            for p, w in zip(parts, self.weights, strict=True)
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

    def _rows_by_weight(self):
        """(index, rows (N, its size)) of one weight after another: room for all may be short."""
        before = []
        for index, same in self._by_weight:
            for _, form in same:
                form.after = before
            rows = tf.add_n([self._rows_by(index, *one) for one in same])
            before = [rows]
            yield index, rows

    @functools.cached_property
    def _gram(self):
        grams, small, formed, outer = [], [], [], Outer()
        ahead = 1 if self._one_by_one else _AHEAD
        for index, same in self._by_weight:
            for _, form in same:
                form.after = formed[len(formed) - ahead :][:1] if len(formed) >= ahead else []
            use, form = same[0]
            if len(same) > 1 or use.path.steps is None:
                rows = [tf.add_n([self._rows_by(index, *one) for one in same])]
            elif (gram := form.gram(outer)) is not None:
                grams.append(gram)
                formed.append(gram)
                continue
            else:
                rows = form.rows
            if rows[0].shape[1] > _SMALL or self._one_by_one:
                rows = [self._products(r) for r in rows]
                grams += rows
            else:
                small += rows
            formed.append(rows[-1])
        return tf.add_n(grams + [self._products(rows) for rows in _side_by_side(small)])

    def _products(self, rows):
        """The products of long rows, shape (N, N)."""
        width = rows.shape[1]
        parts = next((m for m in (8, 4, 2) if width % m == 0), 1)
        if self._compiled or parts == 1 or width < _LONG:
            return tf.matmul(rows, rows, transpose_b=True)
        # TF's own product of long rows uses one core; one in parts uses all.
        rows = tf.transpose(tf.reshape(rows, [-1, parts, width // parts]), [1, 0, 2])
        return tf.reduce_sum(tf.matmul(rows, rows, transpose_b=True), 0)

    def _rows_by(self, index, use, form):
        """Rows by one weight, shape (N, its size), from one use."""
        if use.path.steps is None:
            return self._pulled_rows(use, form)[index]
        return tf.reshape(use.path.back(form.shaped_rows(), leading=(-1,)), [-1, form.size])

    def _pulled_rows(self, use, form):
        """Rows by the weights themselves where the use's tensor is a function of them."""
        with quiet():
            pulled = tf.vectorized_map(lambda row: self._pull(use, row), form.shaped_rows())
        return {
            index: tf.reshape(t, [-1, self.weights[index].shape.num_elements()])
            for index, t in pulled.items()
        }

    def _pull(self, use, t):
        """A gradient by the use's tensor, as one by each weight behind it: index -> tensor."""
        indices = sorted(use.path.weights)
        gradients = self._tape.gradient(
            use.tensor,
            [self.weights[i] for i in indices],
            tf.cast(t, use.tensor.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        gradients = [tf.cast(tf.convert_to_tensor(g), self._inner) for g in gradients]
        return dict(zip(indices, gradients, strict=True))


def _merged(uses):
    """Matrix products of one weight with several inputs become one, over all their places."""
    by_weight = {}
    for use, form in uses:
        by_weight.setdefault(use.path.weights, []).append((use, form))
    merged = []
    for same in by_weight.values():
        forms = [form for _, form in same]
        if len(same) > 1 and len({use.path for use, _ in same}) == 1:
            if Contraction.mergeable(forms):
                same = [(same[0][0], Contraction.merged(forms))]
        merged += same
    return merged


def _in_unit(cotangents, dtype):
    """Cotangents in a unit that keeps the squares of what follows in range, and the unit.

    A power of two, so that no digit changes. Half precision keeps its own range, by loss scaling,
    and its squares are in that of `dtype`.
    """
    one = tf.ones([], dtype)
    if any(t.dtype == tf.float16 for t in cotangents):
        return cotangents, one
    largest = tf.reduce_max([tf.cast(tf.reduce_max(tf.abs(t)), dtype) for t in cotangents])
    integer, mask = (tf.int64, 0x7FF0 << 48) if dtype == tf.float64 else (tf.int32, 0x7F800000)
    exponent = tf.bitwise.bitwise_and(tf.bitcast(largest, integer), tf.constant(mask, integer))
    unit = tf.bitcast(exponent, dtype)
    sound = tf.logical_and(unit > 0, tf.math.is_finite(unit))
    unit = tf.where(sound, unit, one)
    return [t / tf.cast(unit, t.dtype) for t in cotangents], unit


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
