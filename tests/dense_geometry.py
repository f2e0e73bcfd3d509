"""The geometry written out with d x d and d x d x d arrays, in float64, by JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


class DenseGeometry:
    """The paper's objects for losses f(x), shape (N,), and r(x), of flat weights x.

    Args:
        losses: a JAX function of the weights.
        rest: likewise, r; a scalar. Defaults to 0.
    """

    def __init__(self, losses, rest=lambda x: 0.0):
        self.losses = self._float64(losses)
        self.G = self._float64(jax.jacrev(losses))
        self.H = self._float64(jax.hessian(losses))
        self.T = self._float64(jax.jacfwd(jax.hessian(losses)))

        def loss(x):
            return jnp.mean(losses(x)) + rest(x)

        self.loss = self._float64(loss)
        self.v = self._float64(jax.grad(loss))
        self.loss_hessian = self._float64(jax.hessian(loss))

    @staticmethod
    def _float64(function):
        compiled = jax.jit(function)

        @functools.wraps(function)
        def run(x):
            return np.asarray(compiled(jnp.asarray(x, jnp.float64)))

        return run

    def D(self, x):
        """Eq. (2): the covariance of the per-example gradients."""
        G = self.G(x)
        return np.cov(G, rowvar=False, bias=True)

    def dD(self, x):
        """D's derivatives, [r, s, z] that of D_rs along z, from Eq. (2) by the product rule."""
        G, H = self.G(x), self.H(x)
        G, H = G - G.mean(0), H - H.mean(0)
        half = np.einsum("irz,is->rsz", H, G) / len(G)
        return half + half.transpose(1, 0, 2)

    def lambda_max(self, x):
        return np.linalg.eigvalsh(self.D(x))[-1]

    def g(self, x, epsilon):
        """Eq. (6)."""
        return np.eye(len(x)) + epsilon * self.D(x)

    def lowered(self, x, epsilon):
        """The lowered Christoffel symbols of Eq. (5), [z, u, v], for constant eps."""
        dg = epsilon * self.dD(x)
        return (dg.transpose(1, 2, 0) + dg.transpose(1, 0, 2) - dg.transpose(2, 0, 1)) / 2

    def christoffel(self, x, epsilon, exact):
        """Gamma^w_uv, [w, u, v]."""
        lowered = self.lowered(x, epsilon)
        if not exact:
            return lowered
        return np.einsum("wz,zuv->wuv", np.linalg.inv(self.g(x, epsilon)), lowered)

    def rgd(self, x, epsilon):
        """The right-hand side of Eq. (10)."""
        return -self.v(x) + epsilon * self.D(x) @ self.v(x)

    def geodesic(self, x, x1, epsilon, exact, force=True):
        """D^2x/dt^2 of Eq. (8)."""
        pull = -self.loss_hessian(x) @ x1 if force else np.zeros(len(x))
        if exact:
            pull = np.linalg.solve(self.g(x, epsilon), pull)
        return pull - np.einsum("wuv,u,v->w", self.christoffel(x, epsilon, exact), x1, x1)
