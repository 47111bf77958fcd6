"""Is a tracked inverse still good enough? Asked in every step, so it must cost next to nothing."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from pyro_snf.caching import fingerprint_weights

__all__ = ["Lookout"]

# A fixed direction may happen to miss where the error is: it decides alone for so many steps at
# most, and its word is corrected by this factor at most, up or down.
_MAX_STEPS = 32
_MAX_CALIBRATION = 4.0

# What a movement that is not looked at may do, as a multiple of what a movement of its size did.
_CAUTION = 3.0

# A GPU is not waited for: what it has computed is read some steps later, but not more than these.
_MAX_READINGS = 4


class Lookout:
    """Estimates ``‖E‖_F/√D``, E = I − RA, from one direction at the cost of one product with R.

    The direction w is that of the fingerprint ``Θ w``, which is at hand in every step, so the
    estimate is ``‖E w‖/‖w‖``. It is unbiased (squared), but w is always the same: it is calibrated
    by certificates of fresh probes, and never trusted for long. And as long as ``Θ w`` stays where
    it was, as measured by how R has answered to its movements before, not even R is looked at.
    """

    def __init__(self) -> None:
        #: Steps since the last certificate of fresh probes.
        self._steps = 0
        #: The latest ‖E w‖/‖w‖; what to multiply it with.
        self._glance = 0.0
        self._calibration = 1.0
        #: ‖ΔE w‖/‖ΔΘ w‖ of the latest movement that was looked at; 0 before there is one.
        self._gain = 0.0
        #: Θ w at the latest look.
        self._seen: Tensor | None = None
        #: E w at the latest look.
        self._residual: Tensor | None = None
        #: Norms of E w that have not been read.
        self._readings: deque[_Reading] = deque()

    def forget(self) -> None:
        """What was seen of R: it is another one now."""
        self._seen = self._residual = None
        self._readings.clear()

    def is_due(self) -> bool:
        """Whether the direction has decided alone for long enough."""
        return self._steps >= _MAX_STEPS

    def estimate(self, inverse_t: Tensor, image: Tensor, tolerance: float) -> float | None:
        """An estimate of ``‖E‖_F/√D``; None where there is no news, and no need for any.

        :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
        :param Tensor image: ``Θ w``, shape ``(D,)``.
        :param float tolerance: what the estimate will be compared with.
        """
        self._steps += 1
        root = math.sqrt(len(image))
        moved = 0.0
        if self._seen is not None and not image.is_cuda:
            moved = torch.linalg.vector_norm(image - self._seen).item()
            change = _CAUTION * self._gain * moved / root
            trusted = self._gain > 0 and self._steps < _MAX_STEPS
            if trusted and self._calibration * (self._glance + change) <= tolerance:
                return None
        direction = fingerprint_weights(len(image), image.dtype, image.device)
        # E w = w − R (w + Θ w/√D)
        argument = torch.add(direction, image, alpha=1 / root)
        residual = torch.addmv(direction, inverse_t.mT, argument, alpha=-1)
        if self._residual is not None and moved:
            answer = torch.linalg.vector_norm(residual - self._residual).item()
            self._gain = answer / moved
        self._seen, self._residual = image, residual
        self._readings.append(_Reading(torch.linalg.vector_norm(residual)))
        # The latest reading that has arrived; none is waited for, unless many are under way.
        arrived = None
        while self._readings and (
            len(self._readings) > _MAX_READINGS or self._readings[0].has_arrived()
        ):
            arrived = self._readings.popleft()
        if arrived is None:
            return None
        self._glance = arrived.value() / root  # ‖w‖ = √D
        return self._calibration * self._glance

    def calibrate(self, certificate: float) -> None:
        """Learn what fresh probes make of the error that was looked at last."""
        self._steps = 0
        if self._glance > 0 and math.isfinite(certificate):
            ratio = certificate / self._glance
            self._calibration = min(max(ratio, 1 / _MAX_CALIBRATION), _MAX_CALIBRATION)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to take the same decisions."""
        return {
            "steps": self._steps,
            "glance": self._glance,
            "calibration": self._calibration,
            "gain": self._gain,
            "seen": self._seen,
            "residual": self._residual,
        }

    def load_state_dict(self, state: dict[str, Any], *, like: Tensor) -> None:
        """Go on from a state; its tensors are taken to the type and device of another one."""
        self.forget()
        for name, value in state.items():
            setattr(self, f"_{name}", value.to(like) if isinstance(value, Tensor) else value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks for itself.
        return {**self.__dict__, "_seen": None, "_residual": None, "_readings": deque()}


class _Reading:
    """A number that the device may still be computing.

    :param Tensor number: shape ``()``.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def has_arrived(self) -> bool:
        return self._event is None or self._event.query()

    def value(self) -> float:
        """The number; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._number.item()
