"""The scale of contexts: networks expect inputs of about unit scale."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.options import check_context
from pyro_snf.precision import at_least_float32
from pyro_snf.processes import column_moments
from pyro_snf.tracing import is_traced

__all__ = ["ContextScale", "StandardizesContexts"]

# Contexts are far from unit scale if a column has a root mean square above the first number, or,
# where there are enough of them to tell, a standard deviation below the second. By
# `benchmarks/amortization.py units`, root mean squares of 4, 40 and 400 cost 0.2 nats, 4 nats, and
# a loss that is not finite; standard deviations of 0.02 and 0.002 cost 0.5 and 1.8 nats.
_LARGEST_SIZE, _SMALLEST_DEVIATION, _MIN_CONTEXTS = 10.0, 0.01, 32


class ContextScale(nn.Module):
    """``(c − mean) / deviation``, of contexts c; before :meth:`fit`, c itself.

    Both are buffers: in the ``state_dict``, but not in Pyro's parameter store.

    :param int context_dim: the number of columns of c.
    :param Tensor like: of the device and the dtype of contexts.
    :raises ValueError: for contexts that are not of shape ``(..., context_dim)``, or of another
        dtype, outside autocast.
    :warns UserWarning: for the first contexts in training, if they are far from unit scale.
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
        self._is_checked = False

    def extra_repr(self) -> str:
        return str(self.context_dim)

    def forward(self, context: Any) -> Tensor:
        self.check(context)
        return (context - self.mean) / self.deviation

    def check(self, context: Any) -> None:
        """Raise for contexts of another shape or dtype, and warn of their scale."""
        self._check(context)
        is_training = self.training and torch.is_grad_enabled()
        if is_training and not self._is_checked and not is_traced():
            self._warn_of_scale(context)

    @torch.no_grad()
    def fit(self, contexts: Tensor) -> None:
        """Take the mean and the standard deviation of a sample; of a column of equal values, 1.

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
        check_context(context, self.mean.dtype, features=self.context_dim)

    @torch.no_grad()
    def _warn_of_scale(self, context: Tensor) -> None:
        """Warn of contexts that are far from unit scale; of the first ones in training only, for
        their values are waited for on a GPU."""
        self._is_checked = True
        columns = at_least_float32((context - self.mean) / self.deviation)
        columns = columns.reshape(-1, self.context_dim)
        variance, mean = torch.var_mean(columns, 0, correction=0)
        deviation = variance.sqrt()
        is_far = torch.hypot(mean, deviation) > _LARGEST_SIZE
        if len(columns) >= _MIN_CONTEXTS:
            # Of a column with mostly the same value, as 0 of some pixels, it says nothing.
            share = (columns != columns.median(0).values).float().mean(0)
            is_far |= (share > 0.5) & (deviation < _SMALLEST_DEVIATION)
        if is_far.any():
            first, *_ = found = is_far.nonzero().flatten().tolist()
            warnings.warn(
                f"{len(found)} of the {len(mean)} columns of the contexts are far from unit scale; "
                f"column {first} has mean {mean[first]:.2g} and standard deviation "
                f"{deviation[first]:.2g}. Before training, call standardize_contexts(contexts) "
                "with a sample of them.",
                stacklevel=6,
            )


class StandardizesContexts:
    """A conditional transform that can give its networks contexts of unit scale."""

    #: What the networks see of contexts; None for those of other networks, as they are.
    context_scale: ContextScale | None

    def _wanted_networks(self) -> str:
        """For an error: the networks whose width of contexts is known, and those that there are."""
        raise NotImplementedError

    def standardize_contexts(self, contexts: Tensor) -> None:
        """From here on, the networks see contexts minus their mean over a sample, divided by their
        standard deviation.

        To be called once, before training, with the training contexts or some of them. Both are
        buffers, which nothing else changes: they are in the ``state_dict``, but not in Pyro's
        parameter store. In more than one process, all have to call it, each with its own sample;
        the mean and the deviation are those of all samples (:mod:`pyro_snf.processes`).

        :param Tensor contexts: shape ``(..., context_dim)``. A column of equal values is divided
            by 1.
        :raises ValueError: for contexts that are not finite, and for networks of other classes than
            those that the factory function makes.
        """
        if self.context_scale is None:
            raise ValueError(
                f"expected {self._wanted_networks()}, whose contexts may be of any width: other "
                "networks have to standardize their contexts themselves"
            )
        self.context_scale.fit(contexts)
