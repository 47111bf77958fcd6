"""The weight λ of a reconstruction penalty: a number, a schedule, or a controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_snf.caching import StateCache
from pyro_snf.extra_state import SavesAttributes, saved_count
from pyro_snf.options import as_number, as_positive
from pyro_snf.precision import keep_float32
from pyro_snf.processes import mean_over_processes

__all__ = ["GECO", "PenaltyWeight", "StepCounter", "as_penalty_weight", "penalty_factor"]


class GECO(nn.Module):
    r"""Holds a reconstruction error at a tolerance by a multiplicative step on its weight λ.

    .. math::
        \bar e \leftarrow \rho\,\bar e + (1 - \rho)\,e, \qquad
        \lambda \leftarrow \lambda \exp\bigl(\eta\,
            \operatorname{clip}(\log(\sqrt{\bar e} / \tau), -1, 1)\bigr)

    and with φη in the place of η where λ falls. Here e is the mean squared error per element of the
    current batch, in more than one process of the batches of all of them. λ rises while the
    averaged error is above the tolerance, and falls while it is below. λ and ē are buffers, saved
    with the module. Errors that are not finite are ignored.

    Pass it as the ``reconstruction_weight`` of a method. Each layer takes a copy, which makes one
    step for every change of the layer's parameters.

    >>> layer = SelfNormalizingLinear(64, log_det=Learned(reconstruction_weight=GECO(0.02)))
    >>> layer.log_det.reconstruction_weight.weight
    tensor(1.)

    :param float tolerance: τ > 0, the root mean square error per element to hold.
    :param float weight: the first λ > 0.
    :param float min_weight: the smallest λ, not above the first one; by default 0.
    :param float max_weight: the largest λ, not below the first one; by default there is none.
    :param float rate: η > 0.
    :param float fall: φ > 0, the rate at which λ falls, in units of η.
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
        min_weight: float = 0.0,
        max_weight: float = math.inf,
        rate: float = 1e-2,
        fall: float = 1.0,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        # Its square is to be a finite number of float32.
        expected = "tolerance > 0 and < 1e18"
        self.tolerance = as_number(expected, tolerance, lambda number: 0 < number < 1e18)
        self.rate = as_positive("rate", rate)
        self.fall = as_positive("fall", fall)
        self.decay = as_number("decay in [0, 1)", decay, lambda number: 0 <= number < 1)
        weight = as_positive("weight", weight)
        expected = f"min_weight in [0, {weight}], the first one"
        self.min_weight = as_number(expected, min_weight, lambda number: 0 <= number <= weight)
        expected = f"max_weight >= {weight}, the first one"
        self.max_weight = as_number(expected, max_weight, lambda number: number >= weight)
        self._first_log_weight = math.log(weight)
        self._min_log_weight = math.log(self.min_weight) if self.min_weight > 0 else -math.inf
        self.register_buffer("log_weight", torch.empty(()))
        self.register_buffer("mean_square_error", torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """λ as it was given, and an averaged error that is just tolerated."""
        self.log_weight.fill_(self._first_log_weight)
        # Starting at the tolerance, the first errors move λ no faster than later ones.
        self.mean_square_error.fill_(self.tolerance**2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GECO:
        # In half precision, steps of λ would be rounded away.
        return super()._apply(keep_float32(fn), recurse)

    def extra_repr(self) -> str:
        bounds = "" if self.min_weight == 0 else f"min_weight={self.min_weight}, "
        bounds += "" if self.max_weight == math.inf else f"max_weight={self.max_weight}, "
        return (
            f"tolerance={self.tolerance}, {bounds}rate={self.rate}, fall={self.fall}, "
            f"decay={self.decay}"
        )

    @property
    def weight(self) -> Tensor:
        """λ, shape ``()``."""
        return self.log_weight.exp()

    @torch.no_grad()
    def update(self, mean_square_error: Tensor) -> None:
        """One step of the controller.

        :param Tensor mean_square_error: e of this process's batch, shape ``()``.
        """
        mean_square_error = mean_over_processes(mean_square_error)
        # Without a branch, for which a GPU would have to be waited for.
        is_finite = torch.isfinite(mean_square_error)
        average = self.mean_square_error
        moved = average.lerp(mean_square_error.to(average), 1 - self.decay)
        average.copy_(torch.where(is_finite, moved, average))
        # A floor, so that an error of exactly 0 steps down by the full rate.
        error = average.clamp_min(torch.finfo(average.dtype).tiny)
        excess = (error.log() / 2 - math.log(self.tolerance)).clamp(-1, 1)
        excess = torch.where(excess < 0, self.fall * excess, excess)
        self.log_weight.add_(torch.where(is_finite, excess, 0), alpha=self.rate)
        self.log_weight.clamp_(self._min_log_weight, math.log(self.max_weight))


#: λ: a number, a function of the number of optimizer steps taken, or a controller.
PenaltyWeight = float | Callable[[int], float] | GECO


def as_penalty_weight(name: str, value: Any) -> PenaltyWeight:
    """A valid weight; numbers as a Python ``float``.

    :param str name: of the option, for the error.
    :raises ValueError: for a number below 0 or not finite, and for other objects.
    """
    expected = f"{name} >= 0, a function of the number of steps, or a GECO"
    if isinstance(value, GECO) or (callable(value) and not isinstance(value, type | nn.Module)):
        return value
    return as_number(expected, value, lambda number: 0 <= number < math.inf)


def penalty_factor(
    name: str,
    weight: PenaltyWeight,
    steps: StepCounter,
    state: Callable[[], object],
    mean_square_error: Tensor,
) -> float | Tensor:
    """The current λ. A controller makes a step where the parameters are new.

    :param str name: of the option, for the error.
    :param steps: counts the states of the parameters, where λ is not a number.
    :param state: returns that of the parameters.
    :param Tensor mean_square_error: that of the current batch, shape ``()``.
    :raises ValueError: if a schedule's value is not a number from 0.
    """
    if isinstance(weight, float):
        return weight
    is_new = steps.count(state())
    if isinstance(weight, GECO):
        if is_new:
            weight.update(mean_square_error)
        return weight.weight
    num_steps = steps.num_states - 1  # the first state has seen none
    expected = f"{name}({num_steps}) to be a number >= 0"
    value: Any = weight(num_steps)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return as_number(expected, value, lambda number: 0 <= number < math.inf)


class StepCounter(SavesAttributes):
    """Counts the optimizer's steps: changes of the parameters, however often they are used.

    Copies know the count, and count the first use as a new step.
    """

    saved_attributes: ClassVar = {"num_states": saved_count}

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Count from 0 again."""
        #: Different states of the parameters seen so far.
        self.num_states = 0
        self._latest: StateCache[int] = StateCache()

    def count(self, state: object) -> bool:
        """Whether the parameters are new.

        :param state: theirs.
        """
        before = self.num_states
        self._latest.get(state, self._next)
        return self.num_states > before

    def _next(self) -> int:
        self.num_states += 1
        return self.num_states

    def set_extra_state(self, state: Any) -> None:
        self._latest.clear()
        super().set_extra_state(state)
