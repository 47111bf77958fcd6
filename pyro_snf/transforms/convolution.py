"""Unconstrained convolutions whose log-determinant costs no more than some convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_snf.log_dets import LogDetMethod
from pyro_snf.maps import Convolution
from pyro_snf.maps.kernels import PADDING_MODES
from pyro_snf.options import as_count, as_odd_size, check_choice, expect
from pyro_snf.transforms.base import check_image
from pyro_snf.transforms.self_normalizing import AffineSelfNormalizingTransform

__all__ = ["SelfNormalizingConv2d", "self_normalizing_conv2d"]

Size = tuple[int, int]


class SelfNormalizingConv2d(AffineSelfNormalizingTransform):
    r"""The unconstrained convolution of images of C channels, of stride 1 and "same" size.

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
    "exact"       exact                                  exact                   O((CW)³)
    ============  =====================================  ======================  ==================

    *In training* means in ``train()`` mode, with gradients recorded and parameters that require
    them. Otherwise value and gradient are exact, computed once and cached until a parameter
    changes. ``T(x)`` is always exact. Exact log-determinants are those of Fourier transforms,
    for ``"zeros"`` of a larger image, of which J is a part: see
    :mod:`pyro_snf.maps.convolution_factors`. (W is the shorter side.)

    Each name stands for an object with options of its own: :class:`~pyro_snf.Refined`,
    :class:`~pyro_snf.Learned` and :class:`~pyro_snf.Exact`. ``Refined`` measures its error,
    :attr:`error_estimate`. A kernel of 1 × 1 has the log-determinant of a dense layer, H·W times.

    ``T.inv(y)`` solves to rounding, with implicit gradients: by the factors of the exact
    log-determinant, which are kept until a parameter changes. Where these would be very large,
    ``inverse="iterative"`` iterates instead; ``"exact"`` always factorizes. ``"one_pass"`` is a
    convolution with a kernel of ``inverse_kernel_size``: the learned r, or for ``Refined`` the best
    one in the sense of least squares. That is an *approximate* inverse.

    >>> transform = SelfNormalizingConv2d(2, kernel_size=3)
    >>> base = dist.Normal(torch.zeros(2, 8, 8), 1.0).to_event(3)
    >>> density = dist.TransformedDistribution(base, [transform.inv])
    >>> density.log_prob(torch.zeros(5, 2, 8, 8)).shape
    torch.Size([5])

    :param int channels: C. Inputs have shape ``(..., C, H, W)``.
    :param kernel_size: odd, ``k`` or ``(k_h, k_w)``.
    :param inverse_kernel_size: likewise, of the approximate inverse; by default as large as the
        kernel for ``Learned``, and 7 × 7 or the kernel's size, if larger, otherwise.
    :param str padding_mode: what lies beyond the edges, ``"zeros"``, or ``"circular"``, the other
        side.
    :param log_det: ``"refined"``, ``"learned"``, ``"exact"``, or a
        :class:`~pyro_snf.LogDetMethod`, of which the layer takes a copy.
    :param inverse: ``"iterative"``, ``"exact"`` or ``"one_pass"``. By default the first that the
        method has; ``Exact`` has only ``"exact"``.
    :param bool bias: whether there is a b; it starts at 0.
    :param float init_scale: the scale :math:`e^s` to start from, positive.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for inputs that are not floating,
        empty, of another number of channels or another dtype, or smaller than the kernel (or, with
        ``"circular"`` padding, than a learned inverse kernel).
    :raises torch.linalg.LinAlgError: where a log-determinant or an inverse is asked of a
        convolution that is singular or not finite.
    :warns RuntimeWarning: once, where solves in training leave more than the tolerance.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.independent(constraints.real, 3)

    def __init__(
        self,
        channels: int,
        kernel_size: int | Size = 3,
        *,
        inverse_kernel_size: int | Size | None = None,
        padding_mode: str = "zeros",
        log_det: str | LogDetMethod = "refined",
        inverse: str | None = None,
        bias: bool = True,
        init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = as_count("channels", channels)
        size = as_odd_size("kernel_size", kernel_size)
        inverse_size = None
        if inverse_kernel_size is not None:
            inverse_size = as_odd_size("inverse_kernel_size", inverse_kernel_size)
            expected = "inverse_kernel_size 1 or None for a 1 × 1 kernel, as its inverse is 1 × 1"
            expect(expected, inverse_size == (1, 1) or size != (1, 1), inverse_kernel_size)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        super().__init__(
            Convolution(padding_mode, inverse_size),
            (channels, channels, *size),
            log_det=log_det,
            inverse=inverse,
            bias=bias,
            init_scale=init_scale,
            device=device,
            dtype=dtype,
        )
        self.channels = channels
        self.kernel_size = size
        self.padding_mode = padding_mode
        #: The shape (C, H, W) of the latest images; None before the first.
        self.event_shape: torch.Size | None = None

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, "
            f"padding_mode={self.padding_mode!r}, {super().extra_repr()}"
        )

    @torch.no_grad()
    def inverse_weight(self, image_size: Size) -> Tensor:
        """The kernel of the approximate inverse, shape ``(C, C, qh, qw)``, a constant to autograd.

        The learned one, or that of least squares; see
        :func:`~pyro_snf.maps.convolution_solve.one_pass_kernel`.

        :param image_size: ``(H, W)``, which the latter is for.
        """
        event_shape = torch.Size([self.channels, *image_size])
        kernel = self.log_det.inverse_weight(self.theta, event_shape)
        return kernel * torch.exp(-self.log_scale).view(1, -1, 1, 1)

    def _as_events(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., C, H, W)`` and flatten it to ``(B, C, H, W)``."""
        check_image(self, x, self.channels, self.theta.dtype)
        if x.shape[-2] < self.kernel_size[0] or x.shape[-1] < self.kernel_size[1]:
            raise ValueError(
                f"{self}: expected images no smaller than the kernel; got {tuple(x.shape)}"
            )
        self.event_shape = x.shape[-3:]
        return x.reshape(-1, *x.shape[-3:])


def self_normalizing_conv2d(
    channels: int, kernel_size: int | Size = 3, **kwargs: Any
) -> SelfNormalizingConv2d:
    """A :class:`SelfNormalizingConv2d`, in the style of Pyro's helper functions.

    >>> stack = dist.transforms.iterated(2, self_normalizing_conv2d, 3, padding_mode="circular")

    :param int channels: C.
    :param kernel_size: odd, an integer or a pair of integers.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingConv2d`.
    """
    return SelfNormalizingConv2d(channels, kernel_size, **kwargs)
