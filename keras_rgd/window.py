"""D from a window of mini-batch gradients, for any model, loss, strategy and Keras backend.

The paper defines D as |B| times the variance of the mini-batch gradient (text before Eq. 2). The
last W of them are W samples of it, up to the drift of the weights:

    D = (|B| / (n - 1)) sum_t (v_t - vbar) (v_t - vbar)^T

over the n <= W gradients that are stored, the current one among them. Centring by the plain mean,
with the current gradient in, was as good as any other way of treating the drift that we measured
(docs/window.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_rgd._keras.optimizers import layout_of_stacked
from keras_rgd._support import centring, eigensolvers, rounding, stacked, vectors
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.epsilon import GramSpectrum
from keras_rgd.per_example.gradients import PerExampleGradients, gram_of_rows, working_dtype

# In bytes; a window above it is announced before training.
_LARGE = 2**30


class GradientWindow:
    """The last W gradients as variables of an optimizer, and what a step needs of them.

    Beside the gradients stand their squared distances E_ts = |v_t - v_s|^2, and
    p_t = <v_t - v_T, v_T> for the last one, v_T. A new gradient v_T + c makes a new row of E and a
    new p from one product with the window, q_t = <v_t, c>:

        E_t = |c|^2 + E_tT - 2 (q_t - q_T),    p_t + (q_t - q_T) - (q_T + |c|^2)

    Both are made of differences, so few digits are lost to the mean gradient, which may be far
    longer than the noise.

    Args:
        add_variable: the optimizer's method of that name.
        variables: the weights.
        size: W.
        dtype: of the stored gradients, or `None` for `working_dtype(variables)`.
    """

    def __init__(
        self,
        add_variable: Callable[..., Any],
        variables: Sequence[Any],
        size: int,
        dtype: str | None = None,
    ):
        self.size = size
        self.variables = list(variables)
        self.dtype = working_dtype(variables)
        self.stored_dtype = dtype or self.dtype

        def add(shape, dtype, name, **layout):
            # Every replica has the same gradient, the all-reduced one.
            kind = "only_first_replica"
            return add_variable(shape, dtype=dtype, aggregation=kind, name=name, **layout)

        sizes = [vectors.size([v]) for v in self.variables]
        self.groups = _groups(sizes)
        self.rows, self._laid_out = [], []
        for j, group in enumerate(self.groups):
            shape = (sum(sizes[i] for i in group),)
            # A weight that lies split over devices has its gradients split likewise, in its shape.
            layout = layout_of_stacked(self.variables[group[0]]) if len(group) == 1 else {}
            if layout:
                shape = tuple(self.variables[group[0]].shape)
            self._laid_out.append(bool(layout))
            self.rows.append(add((size, *shape), self.stored_dtype, f"window_{j}", **layout))
        self.distances = add((size, size), self.dtype, "window_distances")
        self.products = add((size,), self.dtype, "window_products")
        self.stored = add((), "int", "window_stored")

    def count(self):
        """How many gradients were stored so far, an int; outside a graph."""
        return int(ops.convert_to_numpy(self.stored.value))

    def direction_of(self, gradients: Sequence[Tensor | None], batch_size: int) -> WindowDirection:
        """The `WindowDirection` along a new gradient, which is not stored yet.

        Args:
            gradients: v, a list of tensors shaped as the weights; `None` stands for 0.
            batch_size: |B|.
        """
        return WindowDirection(self, self.flat(gradients), batch_size)

    def flat(self, v):
        """A list of tensors shaped as the weights, or `None` for 0, as one of group vectors."""
        return [
            self._joined([v[i] for i in group], [self.variables[i] for i in group], laid_out)
            for group, laid_out in zip(self.groups, self._laid_out, strict=True)
        ]

    def _joined(self, tensors, variables, laid_out):
        parts = []
        for x, variable in zip(tensors, variables, strict=True):
            # By the weight's shape: a trace for batches of any size may not know the gradient's.
            shape = tuple(variable.shape) if laid_out else (vectors.size([variable]),)
            if x is None:
                parts.append(ops.zeros(shape, self.dtype))
            else:
                parts.append(ops.cast(ops.reshape(ops.convert_to_tensor(x), shape), self.dtype))
        return parts[0] if len(parts) == 1 else ops.concatenate(parts)

    def shaped(self, flat, first=()):
        """A list of group vectors (*first, size) as one of tensors (*first, *weight shape)."""
        tensors = [None] * len(self.variables)
        for x, group, laid_out in zip(flat, self.groups, self._laid_out, strict=True):
            if laid_out:
                tensors[group[0]] = x
                continue
            end = 0
            for i in group:
                shape = tuple(self.variables[i].shape)
                start, end = end, end + vectors.size([self.variables[i]])
                tensors[i] = ops.reshape(x[..., start:end], [*first, *shape])
        return tensors

    def read(self):
        """The stored gradients, a list of tensors (W, *shape of a group vector)."""
        # A gather from a TensorFlow variable would make each read of it a copy: it is read once.
        return [ops.stop_gradient(row.value) for row in self.rows]


class WindowDirection:
    """(I - eps D) v with the window's D, v in it, along the new gradient v.

    It has the Gram matrix H G G^T H of its own, from the gradients' squared distances, as the
    window keeps those from step to step where `DiffusionMatrix` would form all products anew.
    tests/test_one_mathematics.py holds it equal to that of `WindowGradients`.

    Every use of the stored gradients comes before `store`, and what is stored depends on the
    direction: so XLA overwrites the oldest gradient in place, where it would copy the window.

    Attributes:
        seen_by_rule: D along v, for a rule of `keras_rgd.epsilon`.
        lost_digits: as of `keras_rgd.direction.GramDirection`.
    """

    def __init__(self, window: GradientWindow, v: list[Tensor], batch_size: int):
        self._window, self._v, self._rows = window, v, window.read()
        dtype, W = window.dtype, window.size
        self._slot, last = window.stored % W, (window.stored + W - 1) % W
        places = ops.arange(W, dtype=window.stored.dtype)
        self._here = ops.cast(places == self._slot, dtype)
        # A product, as XLA would compile an index anew for each value.
        there = ops.cast(places == last, dtype)
        # As they will be stored.
        self._new = [ops.cast(ops.cast(x, window.stored_dtype), dtype) for x in v]
        lasts = stacked.place(self._rows, last, dtype)
        change = [new - old for new, old in zip(self._new, lasts, strict=True)]
        q = stacked.dot(self._rows, change)
        square, moved = stacked.square(self._new), stacked.square(change)
        # |v_t - v_T|^2 and <v_t - v_T, v_T> from those of v_(T-1).
        before, at_last = ops.matmul(there, window.distances), ops.sum(there * q)
        distances = ops.maximum(moved + before - 2 * (q - at_last), 0) * (1 - self._here)
        products = window.products + (q - at_last) - (at_last + moved)
        self._products = products * (1 - self._here)
        row, column = self._here[:, None], self._here[None]
        others = window.distances * (1 - row) * (1 - column)
        self._distances = others + row * distances[None] + column * distances[:, None]

        n = ops.minimum(window.stored + 1, W)
        valid = ops.cast(places < n, dtype)
        n = ops.cast(n, dtype)
        scale = batch_size / ops.maximum(n - 1, 1)
        squares = self._distances * valid[:, None] * valid
        largest = ops.max(squares)
        unit = ops.sqrt(ops.where(largest > 0, largest, ops.ones_like(largest)))
        # The products of points less their mean, from their squared distances E: -H E H / 2, as in
        # classical multidimensional scaling (Torgerson 1952).
        k = centring.centred_gram(squares / unit / unit, valid) * (-scale / 2)
        self._square, square_in_unit = square, ops.square(ops.sqrt(square) / unit)
        differ = rounding.is_real(largest, square, dtype, centred=True)
        several = ops.logical_and(window.stored > 0, square > 0)
        self.lost_digits = ops.logical_and(several, ops.logical_not(differ))
        real = ops.cast(differ, dtype)
        error = rounding.error(ops.ones_like(square), square_in_unit, dtype, centred=True)
        centred = self._products / unit / unit * valid * real
        # Twice, as the weights are spent on gradients that are not centred.
        centred = centring.centred(centring.centred(centred, valid), valid)
        self._weights = scale * centred
        self.seen_by_rule = GramSpectrum(
            lambda_max=real * (eigensolvers.trace_power_bound(k) + scale * n * error),
            gram=real * k,
            products=ops.sqrt(scale) * centred,
            square=square_in_unit,
            unit=unit,
        )

    def at(self, epsilon: Tensor) -> Vector:
        """(I - eps D) v, Eq. (10), for eps in the unit of `seen_by_rule`."""
        w = epsilon * self._weights
        own = ops.sum(w * self._here)
        others = stacked.combine(w * (1 - self._here), self._rows)
        direction = [(1 - own) * x - y for x, y in zip(self._v, others, strict=True)]
        self._probe = sum(x[(0,) * len(x.shape)] for x in direction if 0 not in x.shape)
        return self._window.shaped(direction)

    def store(self):
        """Put v in the place of the oldest gradient; where the step is not finite, zeros.

        The next gradient takes that place then. After `at`.
        """
        window = self._window
        finite = ops.isfinite(self._probe + self._square)
        for variable, row, x in zip(window.rows, self._rows, self._new, strict=True):
            new = ops.where(finite, ops.cast(x, window.stored_dtype), 0)
            place = [self._slot, *[0] * len(x.shape)]
            variable.assign(ops.slice_update(row, place, new[None]))
        for variable, value in (
            (window.distances, self._distances),
            (window.products, self._products),
            (window.stored, window.stored + 1),
        ):
            variable.assign(ops.where(finite, value, variable.value))


class WindowGradients(PerExampleGradients):
    """A window's gradients as `keras_rgd.DiffusionMatrix` takes those of examples.

    Scaled so that their D, (1/n) G^T H G, is the window's. It looks at the optimizer's variables:
    the next step changes what it says.

    Args:
        window: a `GradientWindow` with at least two gradients.
        batch_size: |B|.
    """

    way = "window"
    gram_is_cheap = True

    def __init__(self, window: GradientWindow, batch_size: int):
        self._window = window
        self.n_examples = min(window.count(), window.size)
        self.weights = window.variables
        self._scale = (batch_size * self.n_examples / (self.n_examples - 1)) ** 0.5

    @property
    def gradient(self):
        """v, the gradient stored last, a list of tensors shaped as the weights."""
        last = (self._window.count() - 1) % self._window.size
        return self._window.shaped(stacked.place(self._window.read(), last, self.dtype))

    def _dot(self, v):
        k = stacked.dot(self._window.read(), self._window.flat(v))
        return self._scale * k[: self.n_examples]

    def _combine(self, w):
        return [x[0] for x in self.combine_many(w[None])]

    def combine_many(self, w):
        w = self._scale * ops.pad(w, [[0, 0], [0, self._window.size - self.n_examples]])
        return self._window.shaped(stacked.combine(w, self._window.read()), [w.shape[0]])

    def gram(self, center=None, unit=1.0):
        rows = (
            self._scale * ops.cast(row[: self.n_examples], self.dtype)
            for row in self._window.read()
        )
        return gram_of_rows(rows, None if center is None else self._window.flat(center), unit)


def make_window(
    add_variable: Callable[..., Any], variables: Sequence[Any], size: int, dtype: str | None
) -> GradientWindow:
    """A `GradientWindow`, announced where it is large.

    Args:
        add_variable: as in `GradientWindow`, as all others.
        variables: the weights.
        size: W.
        dtype: of the stored gradients, or `None`.

    Raises:
        ValueError: it does not fit in memory.
    """
    # First, as it may not fit.
    large = _announcement(variables, size, dtype)
    if large is not None:
        print(large, flush=True)
    try:
        return GradientWindow(add_variable, variables, size, dtype)
    except Exception as error:  # each backend has a class of its own for want of memory
        if large is None:
            raise
        raise ValueError(
            f"The window does not fit in memory: {large} Expected a smaller `window`. "
            f"Received: window={size!r}"
        ) from error


def _announcement(variables, size, dtype):
    """A line for the user where a window would be large, else `None`; nothing is allocated.

    Args:
        variables: the weights.
        size: W.
        dtype: as in `GradientWindow`.
    """
    dtype, d = dtype or working_dtype(variables), vectors.size(variables)
    nbytes = size * d * {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    if nbytes <= _LARGE:
        return None
    smaller = "" if dtype == "bfloat16" else '; window_dtype="bfloat16" takes less'
    return (
        f"RGD(window={size}) stores {size:,} gradients of {d:,} weights in {dtype}: "
        f"{nbytes / 2**30:,.1f} GiB{smaller}."
    )


def _groups(sizes):
    """The places of the sizes: each large one alone, and the small ones together."""
    large = [[i] for i, size in enumerate(sizes) if size >= vectors.SMALL]
    small = [i for i, size in enumerate(sizes) if size < vectors.SMALL]
    return [*large, small] if small else large
