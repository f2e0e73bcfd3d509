"""Per-example gradients from one ordinary forward and backward pass over the batch.

Where examples do not mix, the gradient of the batch's loss at the output of an operation has the
gradient of each example's loss in its rows; with the operation's input it gives that operation's
part of g_i. So <g_i, v>, sum_i w_i g_i and <g_i, g_j> cost a few matrix products for each use of a
weight, and no matrix of all g_i is kept. `docs/layerwise.md` draws one model.
"""

import dataclasses
import functools

import tensorflow as tf

from keras_rgd._keras.graphs import current_graph, handles_in
from keras_rgd._support import rounding, vectors
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import ExampleSpace, squares_of_rows
from keras_rgd.per_example.layerwise.forms import ROW_ENTRIES
from keras_rgd.per_example.layerwise.functions import CALLS, holds_others
from keras_rgd.per_example.layerwise.options import LayerwiseOptions
from keras_rgd.per_example.layerwise.parts import Parts
from keras_rgd.per_example.layerwise.uses import NotVisibleError, find_uses
from keras_rgd.per_example.loss_weights import what_losses_read
from keras_rgd.per_example.losses import replaced
from keras_rgd.per_example.tensorflow_gradients import TensorFlowGradients
from keras_rgd.per_example.way import Way

# The Gram matrix gives a guaranteed bound on M_x. It is formed where its work is at most that of
# _GRAM_STEPS SGD steps, or so little that it does not matter; else products with D estimate M_x.
_GRAM_STEPS = 2
_GRAM_FLOOR = 5e7  # multiply-adds

# How many products of N x N matrices the bound takes.
_POWERS = 3

# Between these, squares of gradients in their unit leave float32 room for the products in them.
_RANGE = 1e-18, 1e30


def layerwise_way(losses, options, reason):
    """The `Way` "layerwise", for a model that `check_layerwise` has passed.

    Args:
        losses: the `ExampleLosses` of the model.
        options: `LayerwiseOptions`.
        reason: why it was chosen.
    """
    make = functools.partial(Layerwise, losses, options=options)
    return Way("layerwise", reason, make)


class Layerwise(TensorFlowGradients):
    """The parts of G by the uses of the weights, for one batch; inside a graph only.

    Args:
        losses: the `ExampleLosses` of a model whose examples do not mix.
        batch: a `Batch`.
        loss_scale: factor that keeps half-precision gradients in range; it cancels.
        options: `LayerwiseOptions`.
        cotangent_noise: for the trial, which should see every output of the model even where the
            loss ignores it: a function from an output (N, ...) to numbers R of its shape, or to
            `None`. The losses are then f_i + <R_i, output_i>, R in the unit of the cotangents.
            Defaults to `None`.

    Raises:
        NotVisibleError: a weight is used where that cannot be seen, or has no closed form there.
        ValueError: where the loss has no per-example losses.
    """

    way = "layerwise"

    def __init__(
        self,
        losses,
        batch,
        loss_scale=1.0,
        options=LayerwiseOptions(),  # noqa: B008  # frozen
        cotangent_noise=None,
    ):
        self.weights = losses.weights
        self.n_examples = batch.size
        known = isinstance(self.n_examples, int)
        if known:
            options = dataclasses.replace(options, n=self.n_examples)
        self._inner = tf.float64 if options.precise else self.dtype
        self._n = tf.cast(self.n_examples, self.dtype)
        operations = self._go_forward(losses, batch)
        self._r_gradient = self._gradient_beside_the_outputs()
        cotangents = self._cotangents(loss_scale, cotangent_noise)
        examples = [tf.convert_to_tensor(t) for t in Batch(batch.x).tensors()]
        uses = find_uses(
            operations,
            self.weights,
            examples,
            self.n_examples if known else None,
            bool(options.repeats),
        )
        for use in uses:
            if use.inside is None and holds_others(use.op):
                unseen = f"an operation whose inside cannot be seen ({use.op.type})"
                raise NotVisibleError(min(use.path.weights), unseen)
        # Not by the tape, which keeps the graph alive where one use's output leads to another's.
        # With what called functions are given, as TensorFlow differentiates a call by an operation
        # that XLA does not have where no gradient is asked for before it.
        places = [use.output for use in uses] + _given_to_calls(operations)
        gradients = tf.gradients(self._outputs, places, cotangents)[: len(uses)]
        self.repeats = sum(use.repeats for use in uses)
        if options.repeats is not True and self.repeats != options.repeats:
            weight = min(uses[0].path.weights)
            raise NotVisibleError(weight, "a batch as long as another axis, which looks the same")
        # The closed forms of the uses, and whether their Gram matrix is worth its work.
        pairs = zip(uses, gradients, strict=True)
        found = [(use, gradient) for use, gradient in pairs if gradient is not None]
        self._parts = Parts(self.weights, self._tape, found, self.n_examples, self._inner, options)
        self._plan(options)

    def _go_forward(self, losses, batch):
        """The forward pass and the losses, on a tape; the operations of the pass."""
        graph = current_graph()
        before = len(graph.get_operations())
        u = tf.ones([self.n_examples], self.dtype)
        with tf.GradientTape(persistent=True) as self._tape:
            self.y_pred = losses.forward(batch.x)
            operations = graph.get_operations()[before:]
            self._outputs = what_losses_read(self.y_pred)
            # One output may be computed from another. The losses read copies, so that the gradient
            # at a copy is what the losses ask of that output alone.
            with self._tape.stop_recording():
                copied = replaced(self.y_pred, tf.identity)
            self._copies = what_losses_read(copied)
            self._tape.watch(self._copies)
            self.loss, self._derivatives = losses(batch, copied, u)
            self._f_mean = tf.reduce_sum(tf.cast(self._derivatives, self.dtype))
        return operations

    def _gradient_beside_the_outputs(self):
        """grad r, what the losses depend on the weights by but through the outputs, or `None`."""
        gradient = self._tape.gradient(self.loss, self.weights)
        if all(g is None for g in gradient):
            return None
        pairs = zip(gradient, self.weights, strict=True)
        return self.cast([tf.zeros(w.shape) if g is None else g for g, w in pairs])

    def _cotangents(self, loss_scale, noise):
        """The gradient of mean f by the outputs, in `self._unit`, with the noise of a trial."""
        loss_scale = tf.cast(loss_scale, self.dtype)
        zero = tf.UnconnectedGradients.ZERO
        cotangents = self._tape.gradient(
            self._f_mean, self._copies, loss_scale, unconnected_gradients=zero
        )
        cotangents, unit = _in_unit(cotangents, self.dtype)
        self._unit = unit / loss_scale
        self._noise = [noise and noise(t) for t in self._copies]
        pairs = zip(cotangents, self._noise, strict=True)
        return [c if r is None else c + tf.cast(r, c.dtype) for c, r in pairs]

    def _plan(self, options):
        """Whether a Gram matrix is formed, and what is kept for it."""
        self.gram_work = self._parts.gram_work + _POWERS * options.n**3
        self.step_work = 3 * self._parts.work
        cheap = self.gram_work <= max(_GRAM_STEPS * self.step_work, _GRAM_FLOOR)
        cheap = cheap and self._parts.row_entries <= ROW_ENTRIES
        self.gram_is_cheap = options.precise or cheap
        # In float64 the rows of all uses at once would take too much memory.
        self._parts.hold_rows(cheap and not options.precise)

    @functools.cached_property
    def gradient(self):
        return self.reweighted(tf.ones([self.n_examples], self.dtype))

    def reweighted(self, m):
        return self._with_r(self._combined(m * self._unit))

    def _combine(self, w):
        return self._combined(w * self._n * self._unit)

    def _dot(self, v):
        return self._n * self._unit * tf.cast(self._parts.dot(v), self.dtype)

    def rows(self):
        rows = dict(self._parts.rows_by_weight())
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
        for index, rows in self._parts.rows_by_weight():
            rows = factor * rows - tf.reshape(tf.cast(center[index], self._inner), [1, -1])
            squares[index] = tf.cast(squares_of_rows(rows), self.dtype)
        return tf.add_n([s + tf.zeros([self.n_examples], self.dtype) for s in squares.values()])

    def gram(self, center=None, unit=1.0):
        factor = tf.cast(self._n * self._unit / unit, self._inner)
        gram = self._gram * factor * factor
        if center is not None:
            # <g_i - c, g_j - c>; the digits that this loses are those of the mean's square.
            scaled = [tf.cast(c / unit, self._inner) for c in center]
            k = factor * self._parts.dot(scaled)
            centred = gram + vectors.inner(scaled, scaled) - k[:, None] - k[None]
            if self._inner == self.dtype:
                squares = (tf.linalg.trace(t) / self._n for t in (centred, gram))
                keeps = rounding.keeps_digits(*squares, self._inner)
                centred = tf.cond(
                    keeps, lambda: centred, lambda: self._gram_by_rows(scaled, factor)
                )
            gram = centred
        return tf.cast(gram, self.dtype)

    def _gram_by_rows(self, center, factor):
        """<factor g_i - c, factor g_j - c>, each difference formed before the products."""
        without = dict(enumerate(center))
        gram = tf.zeros([self.n_examples, self.n_examples], self._inner)
        for index, rows in self._parts.rows_by_weight():
            rows = factor * rows - tf.reshape(without.pop(index), [1, -1])
            gram += tf.matmul(rows, rows, transpose_b=True)
        # Of a weight without a use the gradients are 0.
        return gram + tf.add_n([tf.zeros([], self._inner), *map(_square, without.values())])

    @functools.cached_property
    def _gram(self):
        """G G^T as `_parts` has it: in the unit of the cotangents, and of losses over N."""
        return self._parts.gram()

    def _combined(self, w):
        """sum_i w_i g_i in the same unit."""
        return [tf.cast(t, self.dtype) for t in self._parts.combine(w)]

    def example_space(self):
        gram, dtype = self._gram, tf.float64
        if self._inner != dtype:
            # Float64 has the range and the digits for products of whatever float32 holds.
            gram = tf.cond(
                self._is_sound, lambda: tf.cast(self._gram, dtype), lambda: self._parts.gram(dtype)
            )
        gram *= tf.cast(self._n * self._n, dtype)
        k, square = tf.reduce_mean(gram, 1), tf.reduce_mean(gram)
        if self._r_gradient is not None:
            r = [tf.cast(t, self._inner) for t in vectors.scale(self._r_gradient, 1 / self._unit)]
            along = tf.cast(self._n, dtype) * tf.cast(self._parts.dot(r), dtype)
            square += 2 * tf.reduce_mean(along) + tf.cast(vectors.inner(r, r), dtype)
            k += along
        largest = tf.reduce_max(tf.linalg.diag_part(gram))
        unit = tf.sqrt(tf.where(largest > 0, largest, tf.ones_like(largest)))
        # Centred before the last digits are cut off.
        k, gram = k - tf.reduce_mean(k), gram - tf.reduce_mean(gram, 0, keepdims=True)
        gram -= tf.reduce_mean(gram, 1, keepdims=True)
        values = (gram, k, square, largest)
        gram, k, square, largest = (tf.cast(t / unit / unit, self.dtype) for t in values)
        return ExampleSpace(
            gram=gram,
            products=k,
            square=square,
            largest=largest,
            unit=tf.cast(unit, self.dtype) * self._unit,
            centred=self._inner != dtype,
        )

    @functools.cached_property
    def _is_sound(self):
        """Whether the Gram matrix of `_parts` is within its dtype's range and digits."""
        squares = tf.linalg.diag_part(self._gram) * (self._n * self._n)
        mean, largest = tf.reduce_mean(squares), tf.reduce_max(squares)
        variance = mean - self._n * self._n * tf.reduce_mean(self._gram)  # not finite if one is
        low, high = _RANGE
        in_range = tf.logical_and(low < largest, largest < high)
        return tf.logical_and(in_range, rounding.keeps_digits(variance, mean, self._inner))

    def reweighted_ordinarily(self, m):
        """`reweighted(m)` by ordinary differentiation of the same forward pass."""
        total, factors = [self.loss, self._derivatives], [tf.ones_like(self.loss)]
        factors.append(tf.cast(m - 1, self._derivatives.dtype))
        zero = tf.UnconnectedGradients.ZERO
        cotangents = self._tape.gradient(total, self._copies, factors, unconnected_gradients=zero)
        for i, r in enumerate(self._noise):
            if r is not None:
                rows = tf.reshape(m * self._unit, [-1] + [1] * (r.shape.rank - 1))
                cotangents[i] += tf.cast(rows * tf.cast(r, self.dtype), cotangents[i].dtype)
        # As for the uses, so that the functions that the model calls are compiled once for both.
        gradients = tf.gradients(
            total + self._outputs,
            handles_in(current_graph(), self.weights),
            factors + cotangents,
            stop_gradients=self._copies,
        )
        pairs = zip(gradients, self.weights, strict=True)
        return self.cast([tf.zeros(w.shape) if g is None else g for g, w in pairs])

    def reweighted_and_squares(self, m):
        """What the trial compares: sum_i m_i g_i, and its square computed in two ways.

        The square is had from `combine`, as |sum_i m_i g_i|^2, and from `gram` or `dot`, whichever
        a step would use, as sum_ij m_i m_j <g_i, g_j>. So all operations of a step are tried.

        Args:
            m: shape (N,).

        Returns:
            `reweighted(m)`, a list of tensors; and the two squares, scalars in one unit and
            without grad r, which must agree.
        """
        combined = self._combined(m)
        if self.gram_is_cheap:
            products = tf.linalg.matvec(tf.cast(self._gram, self.dtype), m)
        else:
            products = tf.cast(self._parts.dot(combined), self.dtype)
        squares = tf.stack([vectors.inner(combined, combined), tf.reduce_sum(m * products)])
        # Out of float32's range, where a step works in float64, they say nothing.
        squares = tf.where(tf.reduce_all(tf.math.is_finite(squares)), squares, 0)
        return self._with_r(vectors.scale(combined, self._unit)), tf.unstack(squares)

    def _with_r(self, combined):
        return combined if self._r_gradient is None else vectors.add(self._r_gradient, combined)


def _given_to_calls(operations):
    calls = [op for op in operations if op.type in CALLS]
    return [t for op in calls for t in op.inputs if t.dtype.is_floating]


def _square(tensor):
    return tf.reduce_sum(tf.square(tensor))


def _in_unit(cotangents, dtype):
    """Cotangents divided by a unit that keeps the squares of what follows in range; and the unit.

    It is a power of two, so that no digit changes. In half precision the unit is 1: loss scaling
    keeps its range, and its squares are formed in `dtype`.
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
