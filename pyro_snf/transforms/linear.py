"""Unconstrained dense layers whose log-determinant costs O(D²)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_snf.caching import ParameterCache, ParameterState, version
from pyro_snf.dense import near_identity
from pyro_snf.dense.affine import DeferredLogDet, affine, can_defer, scale_and_shift
from pyro_snf.dense.exact import ExactFactors
from pyro_snf.dense.learned import LearnedMatrix
from pyro_snf.dense.solve import OnePassSolver, RefinedSolver
from pyro_snf.dense.tracked import TrackedInverse
from pyro_snf.geco import GECO
from pyro_snf.precision import without_autocast
from pyro_snf.surrogate import Solver, implicit_solve
from pyro_snf.transforms.base import check_input
from pyro_snf.transforms.options import check_count
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform, check_estimator_options

__all__ = ["SelfNormalizingLinear", "self_normalizing_linear"]

# A row takes about ten products with D² numbers to refine, at the speed of a product; the factors
# (2/3) D³ operations at half that speed.
_ROWS_WORTH_FACTORS = 16


class SelfNormalizingLinear(SelfNormalizingTransform):
    r"""The unconstrained affine map

    .. math::
        T(x) = W x + b, \qquad
        W = \operatorname{diag}(e^{s})\,A, \qquad A = I + \Theta / \sqrt D,

    with :math:`\log|\det W| = \sum_i s_i + \log|\det A|` (Keller et al., 2021). It starts as
    ``init_scale`` times the identity.

    ============  =====================================  ===========================  ============
    ``log_det``   gradient of :math:`\log|\det A|`       value in training            cost a step
    ============  =====================================  ===========================  ============
    "refined"     :math:`R^\top`, R tracks A⁻¹: close    estimate, error tr(E²)/2     O(BD²)
    "learned"     :math:`R^\top`, R a parameter: biased  exactly 0                    O(BD²)
    "exact"       :math:`A^{-\top}`                      exact                        O(D³)
    ============  =====================================  ===========================  ============

    where E = I − RA and B is the batch size. *In training* means in ``train()`` mode, with
    gradients recorded and parameters that require them. Otherwise, that is under ``no_grad``, in
    ``eval()`` mode or with frozen parameters, value and gradient are exact, O(D³) once and then
    cached until a parameter changes. ``T(x)`` is always exact.

    ``"refined"`` keeps its error measured: :attr:`certificate`. Where the gradient is off by more
    than ``tolerance``, R is corrected, or made exact (:attr:`num_refreshes`); see
    :mod:`pyro_snf.dense.tracked`. ``"learned"`` is the paper's objective with all its parts; see
    :mod:`pyro_snf.learned`.

    ``T.inv(y)`` solves by LU factors, O(D³) for every new W, kept until a parameter changes. In
    training, where W is new in each step, ``inverse="refined"`` starts from R and refines to
    rounding where that is cheaper, falling back to the factors where R is too far off. Both have
    implicit gradients. ``"learned"`` is one pass through R, the paper's fast sampler: an
    *approximate* inverse, whose error :func:`pyro_snf.diagnostics.inverse_error` measures.

    As a guide, samples pass through T:

    >>> transform = SelfNormalizingLinear(3, init_scale=0.1)
    >>> guide = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [transform])
    >>> guide.rsample().shape
    torch.Size([3])

    As a density model, data pass through T, from data to latent:

    >>> density = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [transform.inv])
    >>> loss = -density.log_prob(torch.ones(8, 3)).mean()
    >>> loss.backward()

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param str log_det: ``"refined"``, ``"learned"`` or ``"exact"``.
    :param str inverse: ``"refined"``, ``"learned"`` or ``"exact"``.
    :param bool bias: whether there is a b; it starts at 0.
    :param float init_scale: the scale :math:`e^s` to start from, positive. A guide does well to
        start narrow, at 0.1 say.
    :param int num_probes: of a correction, for ``"refined"``.
    :param float tolerance: the relative error of the gradient of log|det W|, in (0, 1), above
        which R is corrected, for ``"refined"``.
    :param int seed: of the probes, for ``"refined"``.
    :param reconstruction_weight: λ, a number or a :class:`~pyro_snf.GECO`, for ``"learned"``.
    :param float mixture: the share of the inverse's density in [0, 1), for ``"learned"``.
    :param str reconstruction: what the penalty trains, ``"both"`` matrices, the ``"inverse"``
        alone, or both by the ``"symmetric"`` form; for ``"learned"``.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for inputs that are not floating,
        empty, of another last dimension or another dtype.
    :raises torch.linalg.LinAlgError: where a log-determinant or an inverse is asked of a W that
        is singular or not finite.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    estimator: TrackedInverse | LearnedMatrix | None

    def __init__(
        self,
        input_dim: int,
        *,
        log_det: str = "refined",
        inverse: str = "refined",
        bias: bool = True,
        init_scale: float = 1.0,
        num_probes: int = 8,
        tolerance: float = 0.02,
        seed: int = 0,
        reconstruction_weight: float | GECO = 1.0,
        mixture: float = 0.5,
        reconstruction: str = "both",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("input_dim", input_dim)
        check_estimator_options(
            num_probes=num_probes,
            tolerance=tolerance,
            seed=seed,
            reconstruction_weight=reconstruction_weight,
            mixture=mixture,
            reconstruction=reconstruction,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            (input_dim, input_dim),
            log_det=log_det,
            inverse=inverse,
            bias=bias,
            init_scale=init_scale,
            **factory,
        )
        self.input_dim = input_dim
        if log_det == "refined":
            self.estimator = TrackedInverse(
                input_dim, num_probes=num_probes, tolerance=tolerance, seed=seed, **factory
            )
        elif log_det == "learned":
            self.estimator = LearnedMatrix(
                input_dim,
                mixture=mixture,
                reconstruction_weight=reconstruction_weight,
                reconstruction=reconstruction,
                **factory,
            )
        self._factors: ParameterCache[ExactFactors] = ParameterCache()

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {super().extra_repr()}"

    def _call(self, x: Tensor) -> Tensor:
        rows = self._as_rows(x)
        if isinstance(self.estimator, LearnedMatrix):
            product = self.estimator.multiply(self.theta, rows)
        else:
            product = near_identity.multiply(self.theta, rows)
        return scale_and_shift(product, self.log_scale.exp(), self.bias).view(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        rows = self._as_rows(y)
        if self.bias is not None:
            rows = rows - self.bias
        rows = rows * torch.exp(-self.log_scale)
        with without_autocast(y.device), self._named_errors():
            if self.inverse == "learned" and isinstance(self.estimator, LearnedMatrix):
                # R is a map of its own here: gradients go to its parameter.
                return self.estimator.apply_inverse(rows).reshape(y.shape)
            if torch.jit.is_tracing():
                x = torch.linalg.solve(near_identity.matrix(self.theta), rows.mT).mT
            elif torch.is_grad_enabled():
                matrix = near_identity.matrix(self.theta)
                x = implicit_solve(matrix, rows, self._solver(matrix, len(rows)))
            else:
                x = self._solver(None, len(rows))(rows, False)
            if isinstance(self.estimator, LearnedMatrix):
                x = self.estimator.mixture_solution(x, rows)
            return x.reshape(y.shape)

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, DeferredLogDet | None]:
        recorded = torch.is_grad_enabled() and self.theta.requires_grad
        is_learned = isinstance(self._training_estimator(), LearnedMatrix)
        if is_learned or not recorded or not can_defer():
            return self._call(x), None
        y, log_det = affine(self._as_rows(x), self.theta, self.log_scale, self.bias)
        return y.view(x.shape), log_det

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        rows = self._as_rows(x)
        shape = x.shape[:-1]
        with without_autocast(x.device), self._named_errors():
            estimator = self._training_estimator()
            if isinstance(estimator, LearnedMatrix):
                return self._learned_log_det(estimator, rows).view(shape)
            found: Any = self._pair.memo_of(x, y, self._map_parameters())
            if isinstance(estimator, TrackedInverse):
                return self._tracked_log_det(estimator, found).expand(shape)
            return self._exact_log_det(found).expand(shape)

    def push_score(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """See :func:`pyro_snf.path_gradient.push_score`: ``W⁻ᵀ`` times the score.

        In training by R, brought up to date, O(D²); otherwise by LU factors.
        """
        rows = self._as_rows(score)
        estimator = self._training_estimator()
        with torch.no_grad(), without_autocast(x.device), self._named_errors():
            if isinstance(estimator, TrackedInverse):
                found = self._pair.memo_of(x, y, self._map_parameters())
                estimator.update(self.theta, None if found is None else found[1][0])
            if estimator is None:
                solution = self._exact_factors().solve(rows, transposed=True)
            else:
                solution = OnePassSolver(self._approximate_inverse_t())(rows, True)
            return (solution * torch.exp(-self.log_scale)).view(score.shape)

    @property
    def weight(self) -> Tensor:
        """The effective W, shape ``(D, D)``."""
        return self.log_scale.exp().unsqueeze(-1) * near_identity.matrix(self.theta)

    @property
    def inverse_weight(self) -> Tensor:
        """R ≈ W⁻¹ as the layer knows it, shape ``(D, D)``: tracked, learned or (in O(D³)) exact."""
        inverse = self._approximate_inverse_t().mT
        return inverse * torch.exp(-self.log_scale.detach()).to(inverse.dtype)

    def _exact_log_det(self, found: tuple[DeferredLogDet, ParameterState] | None) -> Tensor:
        if torch.jit.is_tracing():
            return near_identity.log_abs_det(self.theta) + self.log_scale.sum()
        if found is not None:
            factors = self._exact_factors()
            inverse_t = factors.inverse_t
            total = self._sum_of_log_scale(self.log_scale.detach())
            return found[0].evaluate(factors.log_abs_det + total, inverse_t, exact=True)
        if torch.is_grad_enabled() and self.theta.requires_grad:
            matrix = near_identity.matrix(self.theta)
            value = self._exact_factors(matrix).differentiable_log_abs_det(matrix)
        else:
            value = self._exact_factors().log_abs_det
        return value + self._sum_of_log_scale(self.log_scale)

    def _tracked_log_det(
        self, tracked: TrackedInverse, found: tuple[DeferredLogDet, ParameterState] | None
    ) -> Tensor:
        if found is None or found[1][0].version != version(self.theta):
            value = tracked.training_log_abs_det(self.theta)
            return value + self._sum_of_log_scale(self.log_scale)
        log_det, (state, *_) = found
        value = tracked.update(self.theta, state)
        total = self._sum_of_log_scale(self.log_scale.detach())
        return log_det.evaluate(value + total, tracked.inverse_t, exact=False)

    def _learned_log_det(self, learned: LearnedMatrix, rows: Tensor) -> Tensor:
        scale = self._sum_of_log_scale(self.log_scale)
        # The whole term adds exactly 0 to the value.
        return learned.training_log_abs_det(self.theta, rows) + (scale - scale.detach())

    def _as_rows(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., D)`` and flatten it to ``(B, D)``."""
        check_input(self, x, (self.input_dim,), self.theta.dtype)
        return x.reshape(-1, self.input_dim)

    def _exact_factors(self, matrix: Tensor | None = None) -> ExactFactors:
        """The factors of A, for as long as Θ stays what it is.

        :param Tensor matrix: A, if it is at hand.
        """

        def make() -> ExactFactors:
            return ExactFactors(near_identity.matrix(self.theta) if matrix is None else matrix)

        return self._factors.get([self.theta], make)

    def _approximate_inverse_t(self) -> Tensor:
        """``Rᵀ ≈ A⁻ᵀ``, shape ``(D, D)``, a constant to autograd."""
        if isinstance(self.estimator, TrackedInverse):
            return self.estimator.inverse_t
        if isinstance(self.estimator, LearnedMatrix):
            return self.estimator.inverse_t()
        return self._exact_factors().inverse_t

    def _solver(self, matrix: Tensor | None, num_rows: int) -> Solver:
        """Solves with A by the method of ``self.inverse``.

        :param matrix: A, if it is at hand.
        """
        if self.inverse == "learned" and self.log_det != "exact":
            return OnePassSolver(self._approximate_inverse_t())
        factors = self._exact_factors(matrix)
        # Refinement is for weights that change after every few solves. Others are worth LU factors,
        # which are kept, and so are many rows.
        is_worth_factors = _ROWS_WORTH_FACTORS * num_rows >= self.input_dim
        if self.inverse == "refined" and self._training_estimator() and not is_worth_factors:
            return RefinedSolver(factors, self._approximate_inverse_t())
        return factors.solve


def self_normalizing_linear(input_dim: int, **kwargs: Any) -> SelfNormalizingLinear:
    """A :class:`SelfNormalizingLinear`, in the style of Pyro's helper functions.

    >>> stack = dist.transforms.iterated(2, self_normalizing_linear, 3, init_scale=0.5)

    :param int input_dim: D, the number of features.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingLinear`.
    """
    return SelfNormalizingLinear(input_dim, **kwargs)
