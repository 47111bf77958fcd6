"""A scale and a shift for each channel, which the first batch initializes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint, dependent_property

from pyro_snf.options import as_count, check_device, check_dtype, expect, is_count
from pyro_snf.precision import at_least_float32
from pyro_snf.processes import column_moments
from pyro_snf.transforms.base import check_image, check_input
from pyro_snf.transforms.first_batch import FirstBatchTransform

__all__ = ["ActNorm", "actnorm"]


class ActNorm(FirstBatchTransform):
    r"""Activation normalization (Kingma and Dhariwal, 2018): a scale and a shift for each channel.

    .. math::
        y_c = e^{s_c} (x_c + b_c), \qquad \log|\det J| = HW \sum_c s_c .

    Value, log-det and inverse are exact; all cost O(D). The scale multiplies the centred values, so
    the gradient of s does not depend on the mean of the data.

    **The first batch initializes it.** The first batch that passes through T in training (in
    ``train()`` mode, with gradients recorded and the parameters not frozen) sets s and b such that
    every channel of T(x) has mean 0 and standard deviation 1 over that batch. Before that, and so
    in ``eval()`` mode of a new layer, T is the identity.

    - The parameters are written before T(x) is computed, so no cached value becomes invalid. It
      happens once: ``initialized`` is in the ``state_dict``. Nor are parameters ever overwritten
      that are not 0 any more, as after loading Pyro's parameter store, which has no buffers.
    - ``T.inv`` initializes nothing, so a flow can be sampled from before training. In a flow whose
      data pass through the inverses of its layers, use ``ActNorm(...).inv``.
    - In a guide, where there are no data, ``layer.initialized.fill_(True)`` keeps the identity.
    - :meth:`initialize` does the same explicitly, for instance with a larger batch, or again.
    - In more than one process, the first batch is that of all of them together
      (:mod:`pyro_snf.processes`). It has to pass before ``fully_shard``.

    >>> layer = ActNorm(2, event_dim=1)
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 14.0]]))
    tensor([[-1., -1.],
            [ 1.,  1.]], grad_fn=<MulBackward0>)
    >>> layer.inv(torch.zeros(2))
    tensor([ 2., 12.], grad_fn=<SubBackward0>)

    :param int num_channels: C.
    :param int event_dim: 3 for images, inputs of shape ``(..., C, H, W)``, or 1 for features,
        ``(..., C)``.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options outside these ranges, for inputs of other shapes or dtypes, and
        for a first batch that is not finite or has a channel of equal values.

    References:

    Diederik P. Kingma, Prafulla Dhariwal. Glow: Generative Flow with Invertible 1×1 Convolutions.
    NeurIPS 2018. [arXiv:1807.03039]
    """

    @dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    codomain = domain

    def __init__(
        self,
        num_channels: int,
        *,
        event_dim: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = as_count("num_channels", num_channels)
        expect("event_dim 1 or 3", is_count(event_dim) and event_dim in (1, 3), event_dim)
        check_device(device)
        check_dtype(dtype)
        self._event_dim = int(event_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_scale = nn.Parameter(torch.empty(self.num_channels, **factory))  # s
        self.bias = nn.Parameter(torch.empty(self.num_channels, **factory))  # b
        self._make_initialized(device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity, until the next first batch."""
        self.log_scale.zero_()
        self.bias.zero_()
        self._reset_initialized()

    def extra_repr(self) -> str:
        return f"{self.num_channels}, event_dim={self._event_dim}"

    def _call(self, x: Tensor) -> Tensor:
        self._check(x)
        return (x + self._per_channel(self.bias)) * self._per_channel(self.log_scale).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        self._check(y)
        return y * torch.exp(-self._per_channel(self.log_scale)) - self._per_channel(self.bias)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x)
        num_positions = math.prod(x.shape[x.dim() - self._event_dim + 1 :])  # H W, or 1
        log_det = num_positions * at_least_float32(self.log_scale).sum()
        return log_det.expand(x.shape[: x.dim() - self._event_dim])

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set s and b so that every channel of T(x) has mean 0 and standard deviation 1.

        All processes have to call it, each with its own part of the batch.

        :param Tensor x: a batch, with at least two different values in each channel.
        :raises ValueError: if it is not finite, or a channel has equal values.
        :raises RuntimeError: if the parameters have been sharded.
        """
        self._check_not_sharded()
        self._check(x)
        channels = x.movedim(-self._event_dim, -1).reshape(-1, self.num_channels)
        mean, deviation = column_moments(channels)
        if not torch.isfinite(mean + deviation).all():
            raise ValueError(
                f"{self}: expected a first batch of finite mean and variance; got NaN or infinity"
            )
        is_constant = deviation == 0
        if is_constant.any():
            raise ValueError(
                f"{self}: expected a first batch in which every channel has different values; got "
                f"equal ones in channels {is_constant.nonzero().flatten().tolist()} of a tensor of "
                f"shape {tuple(x.shape)}"
            )
        self.log_scale.copy_(-deviation.log())
        self.bias.copy_(-mean)
        self._note_initialized()

    def _is_as_reset(self) -> bool:
        return not self.log_scale.any() and not self.bias.any()

    def _per_channel(self, parameter: Tensor) -> Tensor:
        return parameter if self._event_dim == 1 else parameter.view(-1, 1, 1)

    def _check(self, x: Tensor) -> None:
        if self._event_dim == 1:
            check_input(self, x, (self.num_channels,), self.log_scale.dtype)
        else:
            check_image(self, x, self.num_channels, self.log_scale.dtype)


def actnorm(num_channels: int, **kwargs: Any) -> ActNorm:
    """An :class:`ActNorm`, in the style of Pyro's helper functions.

    :param int num_channels: C.
    :param kwargs: the keyword arguments of :class:`ActNorm`.
    """
    return ActNorm(num_channels, **kwargs)
