"""The scale of contexts: networks expect inputs of about unit scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.options import check_context
from pyro_snf.processes import column_moments

__all__ = ["ContextScale"]


class ContextScale(nn.Module):
    """``(c − mean) / deviation``, of contexts c; before :meth:`fit`, c itself.

    Both are buffers: in the ``state_dict``, but not in Pyro's parameter store.

    :param int context_dim: the number of columns of c.
    :param Tensor like: of the device and the dtype of contexts.
    :raises ValueError: for contexts that are not of shape ``(..., context_dim)``, or of another
        dtype, outside autocast.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, context_dim: int, like: Tensor) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.register_buffer("mean", like.new_empty(context_dim))
        self.register_buffer("deviation", like.new_empty(context_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Contexts as they are."""
        self.mean.zero_()
        self.deviation.fill_(1.0)

    def extra_repr(self) -> str:
        return str(self.context_dim)

    def forward(self, context: Any) -> Tensor:
        self._check(context)
        return (context - self.mean) / self.deviation

    @torch.no_grad()
    def fit(self, contexts: Tensor) -> None:
        """Take the mean and the standard deviation of a sample; of a column of equal values, 1.

        In more than one process, all have to call it, each with its own sample; they are those of
        all samples (:mod:`pyro_snf.processes`).

        :param Tensor contexts: shape ``(..., context_dim)``.
        :raises ValueError: if they are not finite.
        """
        self._check(contexts)
        mean, deviation = column_moments(contexts.reshape(-1, self.context_dim))
        if not torch.isfinite(mean + deviation).all():
            raise ValueError("expected contexts of finite mean and variance; got NaN or infinity")
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.masked_fill(deviation == 0, 1.0))

    def is_as_reset(self) -> bool:
        """Whether contexts are left as they are."""
        return not self.mean.any() and bool((self.deviation == 1).all())

    def _check(self, context: Any) -> None:
        check_context(context)
        if context.shape[-1:] != (self.context_dim,) or context.numel() == 0:
            raise ValueError(
                f"expected a non-empty context of shape (..., {self.context_dim}); "
                f"got {tuple(context.shape)}"
            )
        under_autocast = torch.is_autocast_enabled(context.device.type)
        if context.dtype != self.mean.dtype and not under_autocast:
            raise ValueError(f"expected a context of dtype {self.mean.dtype}; got {context.dtype}")
