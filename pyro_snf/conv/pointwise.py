"""A convolution with a 1 × 1 kernel: the machinery of the dense layer, H·W times its log-det."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_snf.dense.tracked import TrackedInverse

__all__ = ["PointwiseInverse"]


class PointwiseInverse(nn.Module):
    """A :class:`~pyro_snf.dense.tracked.TrackedInverse` of the matrix that every pixel meets.

    :param int channels: C.
    :param kwargs: those of :class:`~pyro_snf.dense.tracked.TrackedInverse`.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.tracked = TrackedInverse(channels, **kwargs)

    @property
    def certificate(self) -> float:
        return self.tracked.certificate

    @property
    def num_refreshes(self) -> int:
        return self.tracked.num_refreshes

    def refresh(self, theta: Tensor) -> None:
        """Recompute R exactly, in O(C³)."""
        self.tracked.refresh(theta.flatten(1))

    def training_log_abs_det(self, theta: Tensor, images: Tensor) -> Tensor:
        """An estimate of ``log|det J|``, shape ``(B,)``, whose gradient is by R."""
        per_pixel = self.tracked.training_log_abs_det(theta.flatten(1))
        return (images[0, 0].numel() * per_pixel).expand(len(images))
