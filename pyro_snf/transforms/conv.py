"""Unconstrained convolutions whose log-determinant costs no more than some convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_snf.caching import ParameterCache
from pyro_snf.conv import kernels
from pyro_snf.conv.exact import ConvFactors
from pyro_snf.conv.kernels import PADDING_MODES, convolve, kernel_gradient, near_identity
from pyro_snf.conv.learned import LearnedKernel
from pyro_snf.conv.pointwise import PointwiseInverse
from pyro_snf.conv.refined import RefinedLogDet
from pyro_snf.conv.solve import KernelSolver, KrylovSolver, is_affordable, one_pass_kernel
from pyro_snf.geco import GECO
from pyro_snf.precision import at_least_float32, without_autocast
from pyro_snf.surrogate import Solver, implicit_solve
from pyro_snf.transforms.image_input import check_image
from pyro_snf.transforms.options import check_count, expect, is_count
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform, check_estimator_options

__all__ = ["SelfNormalizingConv2d", "self_normalizing_conv2d"]

Size = tuple[int, int]


class SelfNormalizingConv2d(SelfNormalizingTransform):
    r"""The unconstrained convolution of images of C channels, of stride 1 and "same" size,

    .. math::
        T(x)_o = b_o + e^{s_o} \sum_i a_{oi} \star x_i, \qquad
        a = \delta + \theta / \sqrt{C\,k_h k_w},

    with :math:`\log|\det| = HW \sum_o s_o + \log|\det J|`, J being the convolution with a as a
    linear map of images (Keller et al., 2021). It starts as ``init_scale`` times the identity.

    ============  =====================================  ======================  ==================
    ``log_det``   gradient of :math:`\log|\det J|`       value in training       cost a step
    ============  =====================================  ======================  ==================
    "refined"     of a recent J, exactly, and probes     estimate, by the same   some convolutions
                  for what has changed since             probes                  of the probes
    "learned"     flip(r) ⊙ m, r a parameter: biased     exactly 0               a convolution
    "exact"       exact                                  exact                   O((CW)³ log H)
    ============  =====================================  ======================  ==================

    *In training* means in ``train()`` mode, with gradients recorded and parameters that require
    them. Otherwise value and gradient are exact, computed once and cached until a parameter
    changes. ``T(x)`` is always exact.

    **Exact** log-determinants are those of block tridiagonal matrices (``"zeros"``) or of a Fourier
    transform (``"circular"``): see :mod:`pyro_snf.conv.exact`. (W is the shorter side.)

    **"refined"** keeps such an exact one as a reference while the kernel moves, and measures its
    own error: :attr:`certificate`, :attr:`num_refreshes`. See :mod:`pyro_snf.conv.refined`.
    **"learned"** is the paper's objective with all its parts; see :mod:`pyro_snf.learned`. A kernel
    of 1 × 1 has the log-determinant of a dense layer, H·W times:
    :class:`~pyro_snf.SelfNormalizingLinear`.

    ``T.inv(y)`` solves by the factors of the exact log-determinant, kept until a parameter changes;
    where these would be very large, ``inverse="refined"`` iterates to rounding instead. Both have
    implicit gradients. ``"learned"`` is one pass through a kernel of ``inverse_kernel_size``: the
    learned r, or for ``"refined"`` the best one in the sense of least squares. That is an
    *approximate* inverse.

    >>> transform = SelfNormalizingConv2d(2, kernel_size=3)
    >>> base = dist.Normal(torch.zeros(2, 8, 8), 1.0).to_event(3)
    >>> density = dist.TransformedDistribution(base, [transform.inv])
    >>> density.log_prob(torch.zeros(5, 2, 8, 8)).shape
    torch.Size([5])

    :param int channels: C. Inputs have shape ``(..., C, H, W)``.
    :param kernel_size: odd, ``k`` or ``(k_h, k_w)``.
    :param inverse_kernel_size: likewise, of the approximate inverse; by default as large as the
        kernel for ``"learned"``, and 7 × 7 or the kernel's size, if larger, otherwise.
    :param str padding_mode: what lies beyond the edges, ``"zeros"``, or ``"circular"``, the other
        side.
    :param str log_det: ``"refined"``, ``"learned"`` or ``"exact"``.
    :param str inverse: ``"refined"``, ``"learned"`` or ``"exact"``.
    :param bool bias: whether there is a b; it starts at 0.
    :param float init_scale: the scale :math:`e^s` to start from, positive.
    :param int num_probes: of a step, for ``"refined"``.
    :param float tolerance: in (0, 1), for ``"refined"``: of the residuals of its solves, and, with
        1 × 1 kernels, as for :class:`~pyro_snf.SelfNormalizingLinear`.
    :param int max_iterations: of a solve in training, for ``"refined"``.
    :param int seed: of the probes, for ``"refined"``.
    :param reconstruction_weight: λ, a number or a :class:`~pyro_snf.GECO`, for ``"learned"``.
    :param float mixture: the share of the inverse's density in [0, 1), for ``"learned"``.
    :param str reconstruction: what the penalty trains, ``"both"`` kernels, the ``"inverse"``
        alone, or both by the ``"symmetric"`` form; for ``"learned"``.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for inputs that are not floating,
        empty, of another number of channels or another dtype, or smaller than the kernel (or a
        learned inverse kernel, with ``"circular"`` padding).
    :raises torch.linalg.LinAlgError: where a log-determinant or an inverse is asked of a
        convolution that is singular or not finite.
    :warns RuntimeWarning: once, where solves in training leave more than ``tolerance``.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)

    estimator: RefinedLogDet | PointwiseInverse | LearnedKernel | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | Size = 3,
        *,
        inverse_kernel_size: int | Size | None = None,
        padding_mode: str = "zeros",
        log_det: str = "refined",
        inverse: str = "refined",
        bias: bool = True,
        init_scale: float = 1.0,
        num_probes: int = 8,
        tolerance: float = 0.02,
        max_iterations: int = 20,
        seed: int = 0,
        reconstruction_weight: float | GECO = 1.0,
        mixture: float = 0.5,
        reconstruction: str = "both",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("channels", channels)
        check_count("max_iterations", max_iterations)
        size = _odd_size("kernel_size", kernel_size)
        if inverse_kernel_size is None:
            inverse_kernel_size = size if log_det == "learned" else _window(size)
        inverse_size = _odd_size("inverse_kernel_size", inverse_kernel_size)
        modes = PADDING_MODES
        expect(f"padding_mode to be one of {modes}", padding_mode in modes, padding_mode)
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
            (channels, channels, *size),
            log_det=log_det,
            inverse=inverse,
            bias=bias,
            init_scale=init_scale,
            **factory,
        )
        self.channels = channels
        self.kernel_size = size
        self.inverse_kernel_size = inverse_size
        self.padding_mode = padding_mode
        if log_det == "refined" and size == (1, 1):
            self.estimator = PointwiseInverse(
                channels, num_probes=num_probes, tolerance=tolerance, seed=seed, **factory
            )
        elif log_det == "refined":
            self.estimator = RefinedLogDet(
                channels,
                size,
                padding_mode=padding_mode,
                num_probes=num_probes,
                tolerance=tolerance,
                max_iterations=max_iterations,
                seed=seed,
                **factory,
            )
        elif log_det == "learned":
            self.estimator = LearnedKernel(
                channels,
                inverse_size,
                padding_mode=padding_mode,
                mixture=mixture,
                reconstruction_weight=reconstruction_weight,
                reconstruction=reconstruction,
                **factory,
            )
        #: The size (H, W) of the latest images; None before the first.
        self.image_size: Size | None = None
        self._factors: ParameterCache[dict[Size, ConvFactors]] = ParameterCache()
        self._one_pass_kernels: ParameterCache[dict[Size, Tensor]] = ParameterCache()

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, "
            f"padding_mode={self.padding_mode!r}, {super().extra_repr()}"
        )

    def _call(self, x: Tensor) -> Tensor:
        images = self._as_images(x)
        if isinstance(self.estimator, LearnedKernel):
            product = self.estimator.multiply(self.theta, images)
            y = product * _per_channel(self.log_scale.exp())
            y = y if self.bias is None else y + _per_channel(self.bias)
        else:
            y = convolve(images, self.weight, self.padding_mode, self.bias)
        return y.view(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        images = self._as_images(y)
        if self.bias is not None:
            images = images - _per_channel(self.bias)
        images = images * _per_channel(torch.exp(-self.log_scale))
        size = (y.shape[-2], y.shape[-1])
        with without_autocast(y.device), self._named_errors():
            if self.inverse == "learned" and isinstance(self.estimator, LearnedKernel):
                # g is a map of its own here: gradients go to its parameter.
                return self.estimator.apply_inverse(images).reshape(y.shape)
            if torch.jit.is_tracing():
                matrix = kernels.matrix(near_identity(self.theta), size, self.padding_mode)
                x = torch.linalg.solve(matrix, images.flatten(1).mT).mT.reshape(images.shape)
            elif torch.is_grad_enabled():
                outer = partial(_outer, self.kernel_size, self.padding_mode)
                kernel = near_identity(self.theta)
                x = implicit_solve(kernel, images, self._solver(size), outer=outer)
            else:
                x = self._solver(size)(images, False)
            if isinstance(self.estimator, LearnedKernel):
                x = self.estimator.mixture_solution(x, images)
            return x.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        images = self._as_images(x)
        height, width = x.shape[-2:]
        with without_autocast(x.device), self._named_errors():
            estimator = self._training_estimator()
            total = height * width * self._sum_of_log_scale(self.log_scale)
            if isinstance(estimator, LearnedKernel):
                total = total - total.detach()  # the whole term adds exactly 0 to the value
            if estimator is None:
                value = self._exact_log_det((height, width)).expand(len(images))
            else:
                value = estimator.training_log_abs_det(self.theta, images)
            return (value + total).view(x.shape[:-3])

    def push_score(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """See :func:`pyro_snf.path_gradient.push_score`: by the exact factors, or to rounding."""
        images = self._as_images(score)
        with torch.no_grad(), without_autocast(x.device), self._named_errors():
            solution = self._exact_solver((x.shape[-2], x.shape[-1]))(images, True)
            return (solution * _per_channel(torch.exp(-self.log_scale))).view(score.shape)

    @property
    def weight(self) -> Tensor:
        """The effective kernel w, shape ``(C, C, kh, kw)``."""
        return self.log_scale.exp().view(-1, 1, 1, 1) * near_identity(self.theta)

    @torch.no_grad()
    def inverse_weight(self, image_size: Size) -> Tensor:
        """The kernel of the approximate inverse, shape ``(C, C, qh, qw)``.

        The learned one, or that of least squares; see
        :func:`~pyro_snf.conv.solve.one_pass_kernel`.

        :param image_size: ``(H, W)``, which the latter is for.
        """
        if isinstance(self.estimator, LearnedKernel):
            kernel = self.estimator.kernel()
        else:
            kernel = self._one_pass_kernel(image_size)
        return kernel * torch.exp(-self.log_scale).view(1, -1, 1, 1)

    def _exact_log_det(self, size: Size) -> Tensor:
        if torch.jit.is_tracing():
            matrix = kernels.matrix(near_identity(self.theta), size, self.padding_mode)
            return torch.linalg.slogdet(at_least_float32(matrix)).logabsdet
        factors = self._exact_factors(size)
        if torch.is_grad_enabled() and self.theta.requires_grad:
            return factors.differentiable_log_abs_det(near_identity(self.theta))
        return factors.log_abs_det

    def _as_images(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., C, H, W)`` and flatten it to ``(B, C, H, W)``."""
        check_image(self, x, self.channels, self.theta.dtype)
        sizes = [self.kernel_size]
        if self.padding_mode == "circular" and isinstance(self.estimator, LearnedKernel):
            sizes.append(self.inverse_kernel_size)  # wrapped around, it would meet itself
        if any(x.shape[-2] < height or x.shape[-1] < width for height, width in sizes):
            raise ValueError(
                f"{self}: expected images no smaller than the kernel; got {tuple(x.shape)}"
            )
        self.image_size = (x.shape[-2], x.shape[-1])
        return x.reshape(-1, *x.shape[-3:])

    def _exact_factors(self, size: Size) -> ConvFactors:
        """The factors for images of one size, for as long as θ stays what it is."""
        kept = self._factors.get([self.theta], dict)
        if size not in kept:
            kept[size] = ConvFactors(near_identity(self.theta.detach()), size, self.padding_mode)
        return kept[size]

    @torch.no_grad()
    def _one_pass_kernel(self, size: Size) -> Tensor:
        """The kernel of one pass, for as long as θ stays what it is."""
        kept = self._one_pass_kernels.get([self.theta], dict)
        if size not in kept:
            kernel = near_identity(self.theta)
            kept[size] = one_pass_kernel(kernel, self.inverse_kernel_size, size, self.padding_mode)
        return kept[size]

    def _solver(self, size: Size) -> Solver:
        """Solves with J by the method of ``self.inverse``."""
        if self.inverse == "learned" and self.log_det != "exact":
            return KernelSolver(self._one_pass_kernel(size), self.padding_mode)
        return self._exact_solver(size)

    def _exact_solver(self, size: Size) -> Solver:
        mode = self.padding_mode
        if self.inverse != "exact" and not is_affordable(
            self.kernel_size, self.channels, size, mode
        ):
            return KrylovSolver(near_identity(self.theta.detach()), size, mode)
        return self._exact_factors(size).solve


def _outer(kernel_size: Size, padding_mode: str, left: Tensor, right: Tensor) -> Tensor:
    # No method: a graph that holds the layer, which remembers the graph, would never be freed.
    return kernel_gradient(right, left, kernel_size, padding_mode)


def _per_channel(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1)


def _odd_size(name: str, size: int | Size) -> Size:
    pair = (size, size) if isinstance(size, int) else size
    fits = isinstance(pair, tuple | list) and len(pair) == 2
    fits = fits and all(is_count(length) and length % 2 == 1 for length in pair)
    expect(f"{name}, one or two odd integers >= 1", fits, size)
    return (pair[0], pair[1])


def _window(size: Size) -> Size:
    """Of the inverse kernel, unless told otherwise: a 1 × 1 kernel's inverse is 1 × 1 itself."""
    return size if size == (1, 1) else (max(7, size[0]), max(7, size[1]))


def self_normalizing_conv2d(channels: int, **kwargs: Any) -> SelfNormalizingConv2d:
    """A :class:`SelfNormalizingConv2d`, in the style of Pyro's helper functions.

    >>> stack = dist.transforms.iterated(2, self_normalizing_conv2d, 3, padding_mode="circular")

    :param int channels: C.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingConv2d`.
    """
    return SelfNormalizingConv2d(channels, **kwargs)
