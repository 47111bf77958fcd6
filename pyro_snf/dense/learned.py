"""The paper's method for a matrix: ``R = I + Φ/√D``, trained beside ``A = I + Θ/√D``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_snf.dense import near_identity
from pyro_snf.learned import LearnedInverse

__all__ = ["LearnedMatrix"]


class LearnedMatrix(LearnedInverse):
    """``R = I + Φ/√D``, a matrix; events are rows. It starts as the identity.

    :param int dim: D.
    :param kwargs: those of :class:`~pyro_snf.learned.LearnedInverse`.
    """

    event_dim = 1

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(torch.zeros(dim, dim, device=device, dtype=dtype), **kwargs)

    def product(self, theta: Tensor, x: Tensor) -> Tensor:
        return near_identity.multiply(theta, x)

    def product_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        return near_identity.multiply_transposed(theta, x)

    def product_gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        return (cotangent / math.sqrt(theta.shape[-1])).mT @ x  # dA/dΘ = dR/dΦ = 1/√D

    def trace_gradient(self, theta: Tensor, other: Tensor, x: Tensor) -> Tensor:
        return near_identity.matrix(other).mT / math.sqrt(theta.shape[-1])

    def inverse_t(self) -> Tensor:
        """``Rᵀ``, shape ``(D, D)``; a constant to autograd."""
        return near_identity.matrix(self.theta.detach()).mT
