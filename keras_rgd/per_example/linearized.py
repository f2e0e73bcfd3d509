"""Per-example gradients on JAX, where the losses of the examples are linearized once.

f(weights) -> (L(1), f_1, ..., f_N) has a Jacobian that JAX pushes a vector forward through, which
gives every <g_i, v> in about the work of one forward pass, and pulls one back through, which gives
sum_i w_i g_i. One forward pass serves both, so it is exact also where examples mix, for the very
Dropout masks of the step, and for recurrent layers; for any layer that JAX differentiates. Where
examples do not mix both take fewer passes: `unmixed.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import ops

from keras_rgd._keras.models import attribute_replaced, layers_of
from keras_rgd._support import jaxprs, vectors
from keras_rgd._support.backends import check_float64
from keras_rgd._support.vectors import Tensor, Vector
from keras_rgd.per_example.batch import Batch
from keras_rgd.per_example.gradients import (
    PerExampleGradients,
    centered,
    gram_of_rows,
    products,
    squares_of_rows,
    working_dtype,
)
from keras_rgd.per_example.layer_calls import class_name
from keras_rgd.per_example.loss_weights import (
    IGNORES_WEIGHTS,
    NOT_LINEAR,
    LossWeights,
    check_scalar,
)
from keras_rgd.per_example.not_exact import NotExactError
from keras_rgd.per_example.unmixed import unmixed
from keras_rgd.per_example.way import Way

# Rows of each example alone may differ from those in a batch by so many units of rounding.
_SHARE = 128


def linearized_way(model: keras.Model, training: bool, chunk_size: int | None = None) -> Way:
    """The `Way` "linearized", for any model on JAX.

    Args:
        model: a compiled, built model.
        training: whether its layers behave as in training.
        chunk_size: how many examples' gradients a Gram matrix in each step may hold at once.
            Defaults to `None`: a step forms none.
    """
    make = functools.partial(
        Linearized, model, training, LossWeights(model, training), chunk_size=chunk_size
    )
    return Way("linearized", "JAX differentiates the losses of the examples forward", make)


class Linearized(PerExampleGradients):
    """k = J v by pushing v forward, sum_i w_i g_i = J^T w by pulling w back, for one batch.

    J holds the derivatives of f_i = N dL/du_i. Where no example enters another's loss both go
    through it in part only, see `unmixed`. A layer with a gradient of its own (`jax.custom_vjp`)
    can only be pulled back through; k is then the derivative of the pullback.

    The forward pass reads the model's variables, and moves those that it changes (seeds, moving
    statistics), as Keras's does: inside a `keras.StatelessScope` those of the scope.

    Args:
        model: a compiled, built model.
        training: whether its layers behave as in training.
        weights_of_losses: the model's `LossWeights`.
        batch: a `Batch`.
        loss_scale: by which the model's optimizer scales the loss in training; it cancels.
            Defaults to `1.0`.
        chunk_size: as in `linearized_way`. Defaults to `None`.

    Raises:
        ValueError: where the loss has no per-example losses.
    """

    way = "linearized"
    # On a CPU convolutions in a loop that XLA compiled take many times as long.
    products_in_loops = False

    def __init__(
        self,
        model: keras.Model,
        training: bool,
        weights_of_losses: LossWeights,
        batch: Batch,
        loss_scale: Any = 1.0,
        chunk_size: int | None = None,
    ):
        self.gram_is_cheap = chunk_size is not None
        self._chunk_size = chunk_size
        check_float64(working_dtype(model.trainable_variables), f"Model '{model.name}'")
        self.weights = [v.value for v in model.trainable_variables]
        self.n_examples = batch.size
        self._half = any(part.compute_dtype == "float16" for part in layers_of(model))
        self._scale = ops.cast(loss_scale, self.dtype)
        self._losses = _Losses(model, training, weights_of_losses, batch, self._scale)
        losses = self._losses.traced(self.weights)
        self._like, push, aux = jax.linearize(losses, self.weights, has_aux=True)
        self.loss, self.y_pred, *states = aux
        for variables, new in zip(self._losses.states, states, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
        self.gradient = vectors.scale(self.cast(self._take_apart(push)), 1 / self._scale)

    def _take_apart(self, push: Any) -> Vector:
        """Find how J v and J^T w are had; the scaled gradient v.

        Args:
            push: from v to the derivatives of r and of the f_i along v.

        Raises:
            NotExactError: there is no J v.
        """
        weights, n = self.weights, self.n_examples
        one, ones = map(ops.ones_like, self._like)
        jacobian = jax.make_jaxpr(lambda *v: push(list(v))[1])(*weights)
        own = jaxprs.layers_of(jacobian, "custom_lin")
        apart = None if own else unmixed(jacobian, n)
        if apart is not None:
            # In units of the cotangents of the batch's loss, which half precision can hold.
            product = apart.linearized(weights, 1 / n)
            self._push = lambda v: n * product.dot(v, self.dtype)
            self._pull = lambda w: product.combine(n * w)
            (rest,) = jax.linear_transpose(lambda v: push(v)[0], weights)(one)
            return vectors.add(rest, product.combine(ones))
        transposed = jax.linear_transpose(lambda v: push(v)[1], weights)
        self._pull = lambda w: transposed(ops.cast(w, ones.dtype))[0]
        self._push = self._pulled_twice(own) if own else lambda v: push(v)[1]
        (gradient,) = jax.linear_transpose(push, weights)((one, ones / n))
        return gradient

    def _pulled_twice(self, layers: list[str]) -> Any:
        """J v as the derivative of J^T w, where some layers can only be pulled back through."""
        try:
            _, back = jax.vjp(self._pull, ops.zeros_like(self._like[1]))
        except Exception as error:  # each kernel has a class of its own
            names = ", ".join(f"'{name}'" for name in layers)
            raise NotExactError(_NO_DERIVATIVE.format(layers=names), _TURN_OFF) from error
        return lambda v: back(v)[0]

    def _dot(self, v: Vector) -> Tensor:
        v = [ops.cast(t, w.dtype) for t, w in zip(v, self.weights, strict=True)]
        return ops.cast(self._push(v), self.dtype) / self._scale

    def _combine(self, w: Tensor) -> Vector:
        size = 1.0
        if self._half:
            # Cotangents no larger than those of the batch's own loss: half precision overflows.
            size = self.n_examples * ops.max(ops.abs(w))
            w = ops.divide_no_nan(w, size)
        return vectors.scale(self.cast(self._pull(w)), size / self._scale)

    def _mapped(self, function: Any, given: Any, like: Any) -> Any:
        return jax.lax.map(function, given, batch_size=self._chunk_size)

    def separate_rows(self) -> tuple[Vector, Tensor]:
        """As `rows`, each the gradient of an example's loss in a batch of that example alone.

        That is g_i where no example enters another's loss, and one pass over the examples instead
        of one an example. Random sums of them are compared with those of the batch (Freivalds):
        rows that pass are the batch's own, to the digits of the comparison.

        Returns:
            A list of tensors (N, *weight shape); whether they are not the rows of the batch, a
            bool scalar tensor.
        """
        return self._separate(0, self.n_examples)

    def separate_gram(self, center: Vector | None, unit: Any) -> tuple[Tensor, Tensor]:
        """As `gram`, by `separate_rows`; and whether they are not the batch's."""
        rows, wrong = self.separate_rows()
        return gram_of_rows(rows, center, unit), wrong

    def separate_products(
        self, a: Tensor, b: Tensor, center: Vector | None, unit: Any
    ) -> tuple[Tensor, Tensor]:
        """A block of `gram`, of `chunk_size` examples from a and from b on; see `separate_gram`."""
        rows, wrong = self._separate(a, self._chunk_size)
        others, also = self._separate(b, self._chunk_size)
        block = products(centered(rows, center, unit), centered(others, center, unit))
        return block, ops.logical_or(wrong, also)

    def _separate(self, start, size):
        some = self._losses.batch.mapped(lambda t: jax.lax.dynamic_slice_in_dim(t, start, size))

        def one(example):
            function = self._losses.of(example.mapped(lambda t: t[None]))
            ones = ops.ones([1], self.dtype)
            gradient = jax.grad(lambda weights: function(weights, ones)[0][1][0])(self.weights)
            return [t / self._scale for t in self.cast(gradient)]

        rows = jax.lax.map(one, some, batch_size=min(size, self._chunk_size or size))
        w = jax.random.rademacher(jax.random.key(0), (size,), self.dtype)
        sums = [ops.tensordot(w, r, 1) for r in rows]
        zeros = ops.zeros([self.n_examples], self.dtype)
        whole = self.combine(jax.lax.dynamic_update_slice_in_dim(zeros, w, start, 0))
        difference = vectors.norm(vectors.add(whole, sums, -1.0))
        lengths = ops.sum(ops.sqrt(sum(squares_of_rows(r) for r in rows)))
        bound = _SHARE * float(jnp.finfo(self._losses.model.compute_dtype).eps) * lengths
        return rows, ops.logical_not(difference <= bound)


class _Losses:
    """weights, u -> (L(u), f), both scaled; with the loss, the output and the new states beside.

    Attributes:
        model: the model.
        batch: the batch.
        states: the variables that a forward pass may change, in the order of the new states.
    """

    def __init__(self, model, training, weights_of_losses, batch, scale):
        dtype = scale.dtype
        self.model, self._training = model, training
        self._weights_of_losses, self.batch = weights_of_losses, batch
        self.states = [model.non_trainable_variables, model.metrics_variables]
        self._given = [[v.value for v in variables] for variables in self.states]
        self._of_optimizer = [v.value for v in model.optimizer.variables]
        self._ones, self._scale = ops.ones([batch.size], dtype), scale

    def of(self, batch):
        """The same of another batch."""
        return _Losses(self.model, self._training, self._weights_of_losses, batch, self._scale)

    def traced(self, weights):
        """The function from weights to (r, f) and what else there is, its Python code run once."""
        jaxpr, like = jax.make_jaxpr(self, return_shape=True)(weights, self._ones)
        structure = jax.tree.structure(like)

        def losses(weights):
            given = [*((w, w) for w in weights), (self._ones, jaxprs.ZERO)]
            outputs = jaxprs.run_at_zero(jaxpr, given)
            (loss, f), aux = jax.tree.unflatten(structure, [now for now, _ in outputs])
            rest = outputs[0][1]
            return (ops.zeros_like(loss) if rest is jaxprs.ZERO else rest, f), aux

        return losses

    def __call__(self, weights, u):
        """((L(u), f), aux); f_i = N dL/du_i at u = 1."""
        model, batch = self.model, self.batch
        derivatives = []

        def replacement(compute_loss):
            def observed_compute_loss(x, y, y_pred, sample_weight, **kwargs):
                given = Batch(x, y, sample_weight)
                call = functools.partial(compute_loss, **kwargs)
                derivatives.append(self._by_example(call, given, y_pred))
                weighted = self._weights_of_losses(given, y_pred, u)
                return call(x=x, y=y, y_pred=y_pred, sample_weight=weighted)

            return observed_compute_loss

        with attribute_replaced(model, "compute_loss", replacement):
            loss, aux = model.compute_loss_and_updates(
                weights,
                *self._given,
                batch.x,
                batch.y,
                batch.sample_weight,
                training=self._training,
                optimizer_variables=self._of_optimizer,
            )
        (derivative,) = derivatives
        return (loss, batch.size * self._scale * derivative), aux

    def _by_example(self, compute_loss, batch, y_pred):
        """dL/du at u = 1, shape (N,), for a model's output; what is assigned meanwhile is dropped.

        Raises:
            ValueError: L does not depend on u, is not linear in it, or is no scalar.
        """

        def of_weighted(u):
            weighted = self._weights_of_losses(batch, y_pred, u)
            loss = compute_loss(x=batch.x, y=batch.y, y_pred=y_pred, sample_weight=weighted)
            check_scalar(loss)
            return loss

        def derivative(u):
            loss, push = jax.linearize(of_weighted, u)
            if not _depends(push, u):
                raise ValueError(IGNORES_WEIGHTS.format(class_name(self.model)))
            return jax.linear_transpose(push, u)(ops.ones_like(loss))[0]

        now = [(v, v.value) for v in self.model.variables]
        now += [(v, v.value) for m in self.model.metrics for v in m.variables]
        with keras.StatelessScope(state_mapping=now):
            by_example, change = jax.linearize(derivative, self._ones)
        if _depends(change, self._ones):
            raise ValueError(NOT_LINEAR.format(self.model.loss))
        return by_example


_NO_DERIVATIVE = """\
Layers {layers} compute with kernels that JAX can differentiate once and neither forward nor a \
second time, so that the gradients of the examples are not to be had through them."""

_TURN_OFF = """\
Turn the kernels off: keras.config.disable_flash_attention() for attention, use_cudnn=False for \
LSTM and GRU. Or take keras_rgd.RGD(..., window=32), which needs one gradient alone."""


def _depends(linear, u):
    """Whether the outputs of a linear function, once traced, are made of its input."""
    jaxpr = jax.make_jaxpr(linear)(u).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return any(not hasattr(v, "val") and v in reached for v in jaxpr.outvars)
