"""A controller for the weight of a reconstruction penalty."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_snf.precision import keep_float32

__all__ = ["GECO"]


class GECO(nn.Module):
    r"""Holds a reconstruction error at a tolerance by a multiplicative step on its weight λ.

    .. math::
        \bar e \leftarrow \rho\,\bar e + (1 - \rho)\,e, \qquad
        \lambda \leftarrow \lambda \exp\bigl(\eta\,
            \operatorname{clip}(\log(\sqrt{\bar e} / \tau), -1, 1)\bigr)

    where e is the mean squared error per element of the current batch. λ rises while the averaged
    error is above the tolerance, and falls while it is below. λ and ē are buffers, saved with the
    module. Non-finite errors are passed over.

    Pass it as ``reconstruction_weight`` to a layer with ``log_det="learned"``; it takes one step
    for every change of the layer's parameters. Give every layer a controller of its own.

    >>> layer = SelfNormalizingLinear(64, log_det="learned", reconstruction_weight=GECO(0.02))

    :param float tolerance: τ > 0, the root mean square error per element to hold.
    :param float weight: the first λ > 0.
    :param float rate: η > 0.
    :param float decay: ρ in ``[0, 1)``, of the moving average.

    References:

    Danilo Jimenez Rezende, Fabio Viola. Taming VAEs. 2018. [arXiv:1810.00597]
    """

    log_weight: Tensor
    mean_square_error: Tensor

    def __init__(
        self,
        tolerance: float,
        *,
        weight: float = 1.0,
        rate: float = 1e-2,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        for name, value in [("tolerance", tolerance), ("weight", weight), ("rate", rate)]:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"expected {name} > 0; got {value}")
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in [0, 1); got {decay}")
        self.tolerance = tolerance
        self.rate = rate
        self.decay = decay
        self.register_buffer("log_weight", torch.tensor(math.log(weight)))
        # Starting at the tolerance, the first errors move λ no faster than later ones.
        self.register_buffer("mean_square_error", torch.tensor(tolerance**2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GECO:
        # In half precision, steps of λ would be rounded away.
        return super()._apply(keep_float32(fn), recurse)

    def extra_repr(self) -> str:
        return f"tolerance={self.tolerance}, rate={self.rate}, decay={self.decay}"

    @property
    def weight(self) -> Tensor:
        """λ, shape ``()``."""
        return self.log_weight.exp()

    @torch.no_grad()
    def update(self, mean_square_error: Tensor) -> bool:
        """One step of the controller.

        :param Tensor mean_square_error: e, shape ``()``.
        :return: whether a step was taken, that is, whether e is finite.
        """
        if not torch.isfinite(mean_square_error):
            return False
        self.mean_square_error.lerp_(mean_square_error.to(self.mean_square_error), 1 - self.decay)
        # A floor, so that an error of exactly 0 steps down by the full rate.
        error = self.mean_square_error.clamp_min(torch.finfo(self.mean_square_error.dtype).tiny)
        excess = (error.log() / 2 - math.log(self.tolerance)).clamp(-1, 1)
        self.log_weight.add_(excess, alpha=self.rate)
        return True
