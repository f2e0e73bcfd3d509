"""The geometry of one model on one batch: sections 2 and 3 of the paper as methods."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_rgd._support.arguments import is_count
from keras_rgd.diffusion_metric import DiffusionMetric, inverse_product
from keras_rgd.epsilon import Rule
from keras_rgd.geometry import steady_state
from keras_rgd.geometry.ensemble import Ensemble, run_ensemble
from keras_rgd.geometry.epsilon_field import EpsilonField
from keras_rgd.geometry.equations import Geodesic, GradientDescent, RelativisticDescent
from keras_rgd.geometry.flow import Flow, integrate
from keras_rgd.geometry.neglected import NeglectedTerms, terms_along
from keras_rgd.geometry.steady_state import Estimate
from keras_rgd.geometry.weight_space import WeightSpace


class Geometry(WeightSpace):
    r"""The diffusion metric g = I + eps D of a model on a batch, and what follows from it.

    Everything is at the model's present weights, with layers in evaluation mode; the model is left
    as it was. What is traced is remembered with the model, so a second call costs its arithmetic
    alone, of this object as of another one for the same model. The model may train in between.

    Build the model in float64 (`keras.config.set_floatx`) for more than four digits.

    In all methods `epsilon` is eps, a float with 0 <= eps * lambda_max < 1; or a rule of
    `keras_rgd.epsilon`, applied to D along the gradient. (The optimizer's `epsilon=0.5` is here
    `Fraction(0.5)`.) `verbose` says whether work of more than two seconds shows a progress bar.

    Args:
        model: any compiled `keras.Model` whose loss has the derivatives that are asked for; with
            piecewise linear activations they are those of the piece.
        x: inputs, axis 0 of length N; a nested structure for several inputs.
        y: targets. Defaults to `None`.
        sample_weight: the examples' weights in the loss. Defaults to `None`.

    Raises:
        ValueError: the model is not compiled with a loss that is a weighted sum over examples, or
            its second derivatives are not to be had: it computes in half precision, or uses
            tf.stop_gradient. All methods raise `ValueError` where eps is not below 1 / lambda_max.
    """

    def metric(self, epsilon: float | Rule) -> DiffusionMetric:
        """g = I + eps D, Eq. (6)."""
        return DiffusionMetric(self.diffusion_matrix(), epsilon)

    def christoffel(
        self,
        u: list,
        v: list,
        epsilon: float | Rule,
        *,
        exact: bool = False,
        constant_epsilon: bool = True,
    ) -> list[tf.Tensor]:
        r"""Gamma^k_ij u^i v^j, a list of tensors shaped as the weights; symmetric in u and v.

        .. math:: \Gamma_{kij} u^i v^j = \mathcal{E} \, \mathrm{Cov}_i(\langle u, H_i v\rangle, g_i)

        are the lowered symbols of I + eps D, exactly, for an eps that does not depend on the
        weights: so Eq. (7) is derived. In the weak field, Eq. (7), the index is raised with the
        identity: the symbols to first order in eps.

        Args:
            u: a list of arrays shaped as the trainable weights.
            v: likewise.
            epsilon: eps or its rule.
            exact: whether to raise the index with (I + eps D)^-1 instead. Defaults to `False`.
            constant_epsilon: `False` adds what a rule's eps(x), which changes from point to point,
                has as derivative: (<grad eps, u> D v + <grad eps, v> D u - <u, D v> grad eps) / 2.
                For `Fraction` and `Fixed`, where lambda_max is a simple eigenvalue. Defaults to
                `True`.

        Raises:
            ValueError: u or v is not shaped as the weights; or eps has no derivative.
        """
        with self.visiting():
            u, v = self.vector(u, "u"), self.vector(v, "v")
            D = self.diffusion_matrix()
            field = EpsilonField(epsilon, self, held=constant_epsilon)
            eps, grad_epsilon = field.with_gradient(D)
            lowered = self.lowered_christoffel(u, v, eps, grad_epsilon)
            return inverse_product(D, eps, lowered) if exact else lowered

    def gradient_flow(self, duration: float, **options: Any) -> Flow:
        """dx/dt = -grad L(x) from the model's weights on, the limit of gradient descent.

        Args:
            duration: the time to follow it, in learning rates: 100 steps of rate 0.1 take 10.
            **options: of the integration, in all flows.
                times: when to report, increasing, from 0 on and to `duration` at most. Defaults to
                    `None`, at the integrator's own steps.
                method: of `scipy.integrate.solve_ivp`. Defaults to `"DOP853"`.
                rtol, atol: its tolerances. Default to 1e-9 and 1e-11 for weights in float64, 1e-4
                    and 1e-6 else.
                max_loss: where a larger loss ends it. Defaults to 1000 times
                    (1 + |loss at first|).
                verbose: Defaults to `True`.

        Returns:
            A `Flow`. Where the loss exceeded `max_loss`, was no longer finite, or the step became
            too small, it ends there and `diverged` is set.

        Raises:
            ValueError: an argument is not what is described here.
        """
        with self.visiting(often=True):
            return integrate(GradientDescent(self), duration, **options)

    def rgd_flow(self, duration: float, epsilon: float | Rule, **options: Any) -> Flow:
        """dx/dt = -(I - eps D) grad L(x), Eq. (10), from the model's weights on.

        Args:
            duration: as in `gradient_flow`.
            epsilon: eps, constant in time; or a rule, applied anew at each point.
            **options: as in `gradient_flow`.

        Returns:
            A `Flow`; it also ends where a constant eps is no longer below 1 / lambda_max.

        Raises:
            ValueError: as `gradient_flow`.
        """
        with self.visiting(often=True):
            return integrate(RelativisticDescent(self, epsilon), duration, **options)

    def geodesic_flow(
        self,
        duration: float,
        epsilon: float | Rule,
        *,
        velocity: list | None = None,
        exact: bool = False,
        force: bool = True,
        **options: Any,
    ) -> Flow:
        r"""The geodesic of I + eps D under the force of the loss, Eq. (8), from the weights on.

        .. math:: \ddot x^k + \Gamma^k_{ij} \dot x^i \dot x^j = -\frac{d}{dt} \partial_k L

        (The right-hand side printed in Eq. (8) has the other sign, which disagrees with the lines
        before and after it.) In the weak field the index of Gamma is raised with the identity and
        the force is taken as it stands, as printed. The force is a covector by its origin, and
        `exact=True` raises both with (I + eps D)^-1, so that it is a geodesic of the metric itself.
        eps is constant in time, as in the derivation.

        Args:
            duration: as in `gradient_flow`.
            epsilon: eps; or a rule, applied at the start.
            velocity: dx/dt at the start, a list of arrays shaped as the weights. Defaults to
                `None`, that of Eq. (10), -(I - eps D) grad L.
            exact: whether to raise indices with the inverse metric. Defaults to `False`.
            force: whether there is a force. Defaults to `True`.
            **options: as in `gradient_flow`.

        Returns:
            A `Flow`, as `rgd_flow`; its `solution` has the velocity after the position.

        Raises:
            ValueError: as `gradient_flow`; or the velocity is not shaped as the weights.
        """
        with self.visiting(often=True):
            velocity = None if velocity is None else self.vector(velocity, "velocity")
            return integrate(Geodesic(self, epsilon, velocity, exact, force), duration, **options)

    def neglected_terms(
        self,
        flow: Flow,
        *,
        epsilon: float | Rule | None = None,
        nodes: int = 5,
        verbose: bool = True,
    ) -> NeglectedTerms:
        """The terms that Eq. (10) lacks, along a flow, whatever equation it follows.

        Velocities and accelerations are the flow's own.

        Args:
            flow: a `Flow` that this object made.
            epsilon: another eps than the flow's, or a rule; needed for gradient descent, which has
                none and neglects nothing. Defaults to `None`.
            nodes: of Gauss and Legendre's rule, by which the integrals go through each of the
                integrator's steps. Defaults to `5`.
            verbose: Defaults to `True`.

        Raises:
            ValueError: the rule for eps has no derivative (see `christoffel`); or the flow is of
                another geometry.
        """
        with self.visiting(often=True):
            return terms_along(self, flow, epsilon, nodes, verbose)

    def steady_state_residual(self, epsilon: float | Rule) -> list[tf.Tensor]:
        """The left-hand side of Eq. (11) for grad Phi = (I - eps D) grad L: -eps^2 D^2 grad L.

        A list of tensors shaped as the weights. 0 would be a steady state. It is the square of what
        the weak field drops, and not 0 unless D grad L is.
        """
        with self.visiting():
            eps = EpsilonField(epsilon, self, held=True).constant
            return steady_state.residual(self, eps)

    def diffusion_divergence(
        self, *, probes: int | None = None, seed: int = 0, verbose: bool = True
    ) -> Estimate:
        """The divergence of D, (nabla . D)_r = sum_s d D_rs / d x_s, which Eq. (12) takes for 0.

        It is Cov_i(tr H_i, g_i) + (1/N) sum_i (H_i - H) (g_i - gbar): 0 where all H_i are equal,
        not where the third derivatives vanish.

        Args:
            probes: how many pairs of random sign vectors to estimate the traces and the sum from
                (Hutchinson). Defaults to `None`: exactly, by d + N second derivatives.
            seed: of the signs. Defaults to `0`.
            verbose: Defaults to `True`.

        Raises:
            ValueError: `probes` is not an integer above 1.
        """
        with self.visiting(often=True):
            return steady_state.divergence(self, probes, seed, verbose)

    def probability_current(
        self,
        epsilon: float | Rule,
        *,
        learning_rate: float,
        batch_size: int,
        constant_epsilon: bool = True,
        probes: int | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> Estimate:
        r"""The current j of Eq. (12) for grad Phi = (I - eps D) grad L.

        .. math:: j = -\nabla L + (I + \mathcal{E} D) \nabla\Phi
            - \frac{\eta}{2 |B|} \nabla \cdot (I + \mathcal{E} D)

        Args:
            epsilon: eps or its rule.
            learning_rate: eta.
            batch_size: |B|.
            constant_epsilon: `False` for the divergence of eps(x) D, as in `christoffel`. Defaults
                to `True`.
            probes: as in `diffusion_divergence`, like `seed` and `verbose`.
            seed: of the probes.
            verbose: as there.

        Raises:
            ValueError: as `diffusion_divergence` and `christoffel`; or the learning rate or batch
                size is not positive.
        """
        if not learning_rate > 0 or not is_count(batch_size):
            raise ValueError(
                "`learning_rate` must be positive and `batch_size` a positive integer. Received: "
                f"learning_rate={learning_rate!r}, batch_size={batch_size!r}"
            )
        temperature = learning_rate / (2 * batch_size)
        with self.visiting(often=True):
            return steady_state.current(
                self, epsilon, temperature, constant_epsilon, probes, seed, verbose
            )

    def integrability_defect(
        self, u: list, w: list, epsilon: float | Rule, *, constant_epsilon: bool = True
    ) -> float:
        """<u, J w> - <w, J u> for the Jacobian J of grad_D L = (I - eps D) grad L.

        A potential Phi with grad Phi = grad_D L, as Eq. (11) supposes, exists only where this is 0
        for all u and w.

        Args:
            u: a list of arrays shaped as the trainable weights.
            w: likewise.
            epsilon: eps or its rule.
            constant_epsilon: `False` for the Jacobian with eps(x), as in `christoffel`. Defaults to
                `True`.

        Raises:
            ValueError: as `christoffel`.
        """
        with self.visiting():
            u, w = self.vector(u, "u"), self.vector(w, "w")
            return steady_state.defect(self, u, w, epsilon, constant_epsilon)

    def sgd_ensemble(
        self,
        steps: int,
        *,
        learning_rate: float,
        batch_size: int,
        runs: int = 20,
        every: int = 1,
        replacement: bool = True,
        seed: int = 0,
        verbose: bool = True,
    ) -> Ensemble:
        """SGD from the model's weights, again and again with other mini-batches, Eq. (1).

        Plain steps x <- x - eta grad_B L, whatever the model's optimizer: the batches are all that
        is random.

        Args:
            steps: how many each run takes.
            learning_rate: eta.
            batch_size: |B|, at most N.
            runs: how many there are, S. Defaults to `20`.
            every: how many steps apart the weights are kept. Defaults to `1`.
            replacement: `True` draws the examples of a batch with replacement, so that the
                gradient's covariance is D / |B|; `False` draws each batch without. Defaults to
                `True`.
            seed: of all runs' batches. Defaults to `0`.
            verbose: Defaults to `True`.

        Raises:
            ValueError: an argument is not what is described here, or the loss of an example depends
                on the batch it is in.
        """
        with self.visiting():
            return run_ensemble(
                self,
                steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                runs=runs,
                every=every,
                replacement=replacement,
                seed=seed,
                verbose=verbose,
            )
