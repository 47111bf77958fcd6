"""Exact log-determinants, by a factorization at every step."""

from __future__ import annotations

from torch import Tensor

from pyro_snf.caching import TensorState
from pyro_snf.log_dets.base import LogDetMethod
from pyro_snf.surrogate import Surrogate

__all__ = ["Exact"]


class Exact(LogDetMethod):
    """``log|det A|`` with all its derivatives, from the factors of A: ``log_det="exact"``.

    That is O(D³) at every step for a dense matrix, and O((CW)³ log H) for a convolution with zeros
    beyond the edges of C × H × W images.

    >>> layer = SelfNormalizingLinear(3, log_det=Exact())
    """

    training_value = "exact"
    has_surrogate = True

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: TensorState) -> Surrogate:
        factors = self.factors(theta, x.shape[1:], state)
        _ = factors.gradient  # first: it makes an estimate of the condition number unnecessary
        return self.linear_map.log_abs_det(factors)
