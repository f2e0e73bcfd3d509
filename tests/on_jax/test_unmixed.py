"""J v and J^T w of functions of weights and examples, taken apart or not, against a dense J."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from keras_rgd._support import jaxprs
from keras_rgd.per_example.unmixed import unmixed

pytestmark = pytest.mark.skipif(jax.config.jax_enable_x64, reason="once is enough")

N = 4
RNG = np.random.default_rng(0)


def numbers(*shape):
    return jnp.asarray(RNG.normal(size=shape), "float32")


X, ROWS, W = numbers(N, 6), numbers(N, 5, 6), numbers(6, 3)
IMAGES, KERNEL = numbers(N, 5, 5, 2), numbers(3, 3, 2, 3)
TABLE, PLACES = numbers(7, 3), jnp.asarray(RNG.integers(0, 7, (N, 5)))


def lost(h):
    """A loss of each example from what a model returned, (N, ...)."""
    return jnp.sum(jnp.tanh(jnp.reshape(h, (h.shape[0], -1))) ** 2, 1)


def convolved(w, dims=("NHWC", "HWIO", "NHWC"), **options):
    x = jnp.transpose(IMAGES, ["NHWC".index(d) for d in dims[0]])
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims, **options)


def pooled(h, start, combine, size=2):
    window = (1, size, size, 1)
    return lax.reduce_window(h, start, combine, window, window, "VALID")


def scanned(w, time):
    step = lambda h, x: (jnp.tanh(x @ w + h), h)  # noqa: E731
    return lax.scan(step, jnp.zeros((N, 3)), jnp.swapaxes(time, 0, 1))[0]


def picked(h):
    """For each example the entries of its own row that are largest."""
    return jnp.take_along_axis(h, jnp.argsort(h, 1)[:, :2], 1)


APART = {
    "matmul": (lambda w: X @ w, W),
    "two layers": (lambda w: jnp.tanh(X @ w) @ jnp.sin(w).T, W),
    "bias": (lambda w: jnp.tanh(X[:, :3] + w) + w, numbers(3)),
    "scalar": (lambda w: X * w, numbers()),
    "a row": (lambda w: lax.broadcast_in_dim(w[:1], (N, 3), (0, 1)) * X[:, :3], W),
    "over time": (lambda w: jnp.einsum("nti,io->nto", ROWS, w), W),
    "time first": (lambda w: jnp.swapaxes(jnp.einsum("nti,io->tno", ROWS, w), 0, 1), W),
    "attention": (
        lambda w: jnp.einsum("nts,nsi->nti", jax.nn.softmax((ROWS @ w) @ (ROWS @ w).mT), ROWS),
        W,
    ),
    "convolution": (lambda w: convolved(jnp.tanh(w)), KERNEL),
    "channels first": (lambda w: convolved(w, ("NCHW", "HWIO", "NCHW")), KERNEL),
    "depthwise": (
        lambda w: convolved(w, feature_group_count=2),
        numbers(3, 3, 1, 4),
    ),
    "pooling": (
        lambda w: pooled(convolved(w), -jnp.inf, lax.max) + pooled(convolved(w), 0.0, lax.add),
        KERNEL,
    ),
    "padding": (lambda w: jnp.pad(convolved(w), ((0, 0), (1, 2), (0, 0), (0, 0))), KERNEL),
    "lookup": (lambda w: jnp.tanh(jnp.take(w, PLACES, 0)), TABLE),
    "token": (lambda w: jnp.tanh(ROWS @ w)[:, 0] + jnp.tanh(ROWS @ w)[:, -1], W),
    "parts": (lambda w: jnp.concatenate(jnp.split(jnp.tanh(X @ w), 3, 1)[::-1], 1), W),
    "put together": (lambda w: jnp.concatenate([X @ w, jnp.tanh(X @ w)], 1), W),
    "cumulative": (lambda w: jnp.cumsum(jnp.tanh(X @ w), 1), W),
    "turned": (lambda w: jnp.tanh(ROWS @ w)[:, ::-1], W),
    "strides": (lambda w: jnp.tanh(ROWS @ w)[:, ::2], W),
    "stacked": (lambda w: jnp.stack([jnp.tanh(X @ w), X @ w], 1), W),
    "stacked first": (lambda w: jnp.swapaxes(jnp.stack([jnp.tanh(X @ w), X @ w]), 0, 1), W),
    "unstacked": (lambda w: sum(jnp.unstack(jnp.tanh(ROWS @ w), axis=1)), W),
    "unstacked first": (
        lambda w: sum(jnp.unstack(jnp.swapaxes(jnp.tanh(ROWS @ w), 0, 1))),
        W,
    ),
    "repeated": (lambda w: jnp.tile(jnp.tanh(X @ w), (1, 2)), W),
    "normalised": (lambda w: jax.nn.standardize(X @ w, -1), W),
    "chosen": (lambda w: jnp.where(X[:, :3] > 0, X @ w, 0.0), W),
    "a weight for each example": (lambda w: jnp.tanh(X + w), numbers(N, 6)),
    "as many steps as examples": (lambda w: jnp.einsum("nti,io->nto", ROWS[:, :N], w), W),
    "rows of a matrix": (lambda w: jnp.reshape(jnp.reshape(ROWS, (-1, 6)) @ w, (N, -1)), W),
    "a scan": (lambda w: scanned(w, ROWS), W),
    "largest entries": (lambda w: picked(jnp.tanh(X @ w)), W),
    "a compiled function": (lambda w: jax.jit(lambda w: jnp.tanh(X @ jax.jit(jnp.sin)(w)))(w), W),
    "recomputed": (lambda w: jax.checkpoint(lambda w: jnp.tanh(X @ w))(w), W),
    "part of a buffer": (
        lambda w: lax.dynamic_update_slice(jnp.ones((N, 6)), jnp.tanh(X @ w), (0, 1)),
        W,
    ),
    "a mean of weights": (lambda w: X @ (w - jnp.mean(w, 0)), W),
    "bfloat16": (lambda w: (X.astype("bfloat16") @ w.astype("bfloat16")).astype("float32"), W),
}


def symmetric(h):
    """Entries (i, j) of which examples i and j both have a part."""
    square = h @ X[:3, :N]
    return square + square.T


HIDDEN = {
    "a symmetric matrix": symmetric,
    "batch statistics": lambda h: h - jnp.mean(h, 0),
    "neighbours": lambda h: h + jnp.roll(h, 1, 0),
    "pairs": lambda h: h @ h.T,
    "reversed examples": lambda h: h * h[::-1],
    "sums so far": lambda h: h + jnp.cumsum(h, 0),
    "in another order": lambda h: h[jnp.asarray([2, 0, 3, 1])] + h,
    "the example before": lambda h: lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0))) + h,
    "every second example": lambda h: jnp.concatenate([h, h])[::2] + h,
    "sums of neighbours": lambda h: lax.reduce_window(h, 0.0, lax.add, (3, 1), (1, 1), "SAME"),
    "part of the examples": lambda h: lax.dynamic_update_slice(h, h[:2] ** 2, (1, 0)),
    "a piece of a larger matrix": lambda h: jax.vmap(
        lambda i: lax.dynamic_slice(jnp.concatenate([h, h]), (i, 0), (N, 3))
    )(jnp.arange(1, 3))[0],
    "the first example": lambda h: jnp.tile(h[:1], (N, 1)) + h,
    "a convolution over examples": lambda h: (
        lax.conv_general_dilated(
            h[None],
            KERNEL[:, :, 0, 0, None] * jnp.eye(3),
            (1,),
            "SAME",
            None,
            None,
            ("NWC", "WIO", "NWC"),
        )[0]
        + h
    ),
    "twice the examples": lambda h: jnp.tile(h, (2, 1))[1 : N + 1] + h,
    "examples stacked": lambda h: jnp.stack([h[0], h[1], h[1], h[0]]) + h,
    "correlations": lambda h: jnp.einsum("ni,mi,mj->nj", h, h, h),
    "examples as steps": lambda h: lax.scan(lambda s, x: (s + x, s + x), h[0], h)[1],
    "other rows of a matrix": lambda h: jnp.reshape(jnp.concatenate([h, h], 1), (2, N, 3))[0] + h,
}


def taken_apart(function, w):
    """The dense J; what `unmixed` makes of it; w as a list."""
    losses = lambda w: lost(function(w))  # noqa: E731
    _, push = jax.linearize(losses, w)
    jacobian = np.asarray(jax.jacrev(losses)(w)).reshape(N, -1)
    return jacobian, unmixed(jax.make_jaxpr(push)(w), N)


def check(apart, J, w, tolerance):
    v, u = numbers(*w.shape), numbers(N)

    # Not compiled: JAX 0.6 folds what is known of a convolution's gradient to wrong numbers.
    product = apart.linearized([w], 1.0)
    k, combined = product.dot([v], "float32"), product.combine(u)[0]
    scale = np.linalg.norm(J)
    np.testing.assert_allclose(k, J @ np.ravel(v), atol=tolerance * scale)
    np.testing.assert_allclose(np.ravel(combined), J.T @ np.asarray(u), atol=tolerance * scale)


@pytest.mark.parametrize("name", APART)
def test_where_examples_do_not_mix_both_products_are_those_of_a_dense_jacobian(name):
    function, w = APART[name]
    J, apart = taken_apart(function, w)
    assert apart is not None
    check(apart, J, w, 2e-2 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("outer", [jnp.tanh, lambda h: h], ids=["nonlinear", "linear"])
def test_where_examples_mix_the_jacobian_is_whole_or_the_parts_are_exact(name, outer):
    J, apart = taken_apart(lambda w: outer(HIDDEN[name](outer(X @ w))), W)
    if apart is not None:
        check(apart, J, W, 1e-5)


def test_where_both_parts_would_go_through_the_same_layers_the_jacobian_is_whole():
    for name in ("batch statistics", "neighbours", "reversed examples", "sums so far"):
        assert taken_apart(lambda w: HIDDEN[name](jnp.tanh(X @ w)), W)[1] is None, name  # noqa: B023


def test_one_example_and_losses_without_weights_are_not_taken_apart():
    one = lambda w: lost(X[:1] @ w)  # noqa: E731
    assert unmixed(jax.make_jaxpr(jax.linearize(one, W)[1])(W), 1) is None
    _, push = jax.linearize(lambda w: jnp.ones(N) + 0 * lax.stop_gradient(w[0, 0]), W)
    assert unmixed(jax.make_jaxpr(push)(W), N) is None


@pytest.mark.parametrize(
    "loss, rest",
    [
        (lambda w, u: jnp.mean(u * lost(X @ w)), None),
        (lambda w, u: 2.0 * (jnp.mean(u * lost(X @ w)) + 0.1 * jnp.sum(w**2)), "weights"),
        (lambda w, u: jnp.sum(w**2) - jnp.sum(u * lost(X @ w)) / N, "weights"),
        (
            lambda w, u: (
                jax.jit(lambda u: jnp.where(True, jnp.dot(u, lost(X @ w)), 0.0))(u) + jnp.sum(w**2)
            ),
            "weights",
        ),
        (lambda w, u: jnp.sum(w**2) + jnp.sum(jnp.abs(u) * lost(X @ w)), "examples"),
    ],
)
def test_a_loss_at_zero_is_what_does_not_depend_on_the_examples_weights(loss, rest):
    traced = jax.make_jaxpr(loss)(W, jnp.ones(N))

    def at_zero(w):
        ((_, zero),) = jaxprs.run_at_zero(traced, [(w, w), (jnp.ones(N), jaxprs.ZERO)])
        return zero

    if rest is None:
        assert at_zero(W) is jaxprs.ZERO
        return
    np.testing.assert_allclose(at_zero(W), loss(W, jnp.zeros(N)), rtol=1e-6)
    if rest == "weights":  # and takes no pass over the examples
        assert "tanh" not in jax.jit(at_zero).lower(W).compile().as_text()
