"""How good is a tracked inverse? Asked in every step, so it must cost next to nothing."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_snf.caching import fixed_directions
from pyro_snf.dense import near_identity

__all__ = ["Error", "Lookout", "glance", "measure"]

# Directions to look in, taken in turn: enough that an error which one of them misses is seen soon.
_NUM_DIRECTIONS = 16

# Steps without a look, at most; and the least that an error may be expected to grow in a step, in
# units of its limit: one direction may not have met it.
_MAX_PATIENCE = 8
_LEAST_GROWTH = 1 / 16

# A step so many times as long as the one before the latest glance is looked at whatever the
# patience; and one of so many times is no optimizer's.
_UNUSUAL = 3.0
_EVENT = 10.0

# A GPU is not waited for: what it has computed is read some steps later, but not more than these.
_MAX_READINGS = 4


class Error(NamedTuple):
    """What is known of the error of R."""

    inverse: float
    """``‖I − RA‖_F/√D``, or ``‖I − AR‖_F/√D``."""
    gradient: float
    """``‖(I − RA)R‖_F/‖R‖_F``, to first order the relative error of the gradient ``Rᵀ``."""

    def relative_to(self, limits: Error) -> float:
        """The larger of the two, each in units of its limit; NaN if either is."""
        inverse, gradient = self.inverse / limits.inverse, self.gradient / limits.gradient
        return inverse if inverse > gradient or math.isnan(inverse) else gradient


def measure(inverse_t: Tensor, theta: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The error of R in some random directions g, and in their images R g.

    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
    :param Tensor theta: Θ, shape ``(D, D)``.
    :param Tensor probes: the directions as rows, shape ``(k, D)``.
    :return: the residuals ``E g`` as rows, k for the directions and then half as many, at least
        one, for the images; and the two numbers of :class:`Error`, shape ``(2,)``.
    """
    count = len(probes)
    images = probes[: (count + 1) // 2] @ inverse_t  # (R g)ᵀ
    # Of the size of the others: together they aim a correction.
    images = images * (math.sqrt(images.numel()) / torch.linalg.vector_norm(images))
    probes = torch.cat([probes, images])
    residual = probes - near_identity.multiply(theta, probes) @ inverse_t
    found = torch.linalg.vector_norm(residual, dim=-1)
    norm = torch.linalg.vector_norm
    numbers = [norm(found[:count]) / norm(probes[:count]), norm(found[count:]) / norm(images)]
    return residual, torch.stack(numbers)


def glance(inverse_t: Tensor, theta: Tensor, direction: Tensor) -> Tensor:
    """The error of R in one random direction w, by as few products as there can be: three.

    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
    :param Tensor theta: Θ, shape ``(D, D)``.
    :param Tensor direction: w, shape ``(D,)``, of norm ``√D``.
    :return: the two numbers of :class:`Error`, shape ``(2,)``.
    """
    root = math.sqrt(len(direction))
    norm = torch.linalg.vector_norm
    image = torch.mv(inverse_t.mT, direction)  # R w
    residual = torch.addmv(direction - image, theta, image, alpha=-1 / root)  # (I − AR) w
    error = torch.mv(inverse_t.mT, residual)  # R(I − AR) w = (I − RA)R w
    return torch.stack([norm(residual) / root, norm(error) / norm(image)])


class Lookout:
    """Estimates the error of R by glances in one direction after the other.

    They are taken every few steps: the more often the faster the error grows, and at once if Θ
    takes an unusual step. That is seen on the fingerprint ``Θ w``, which is at hand in every step.
    """

    def __init__(self) -> None:
        #: Glances so far.
        self._count = 0
        #: Steps to go without one; steps since the latest, and what it saw, relative to the limits.
        self._patience = 0
        self._steps = 0
        self._size = 0.0
        #: Θ w in the latest step; how far it moved in it, and in the one before the latest glance.
        self._fingerprint: Tensor | None = None
        self._stride = 0.0
        self._usual_stride = 0.0
        #: Whether the latest step was one that nothing is known of, or no optimizer's.
        self.is_event = False
        #: What has been computed and not been read.
        self._readings: deque[_Reading] = deque()

    def start_again(self) -> None:
        """Watch an R that was just corrected."""
        self._patience = self._steps = 0
        self._size = 0.0
        self._readings.clear()

    def moves_to(self, fingerprint: Tensor) -> bool:
        """Whether Θ has moved since the latest call.

        :param Tensor fingerprint: ``Θ w``, shape ``(D,)``.
        """
        previous, self._fingerprint = self._fingerprint, fingerprint
        self.is_event = previous is None
        if previous is None or fingerprint.is_cuda:  # which would have to be waited for
            self._stride = math.inf
            return True
        self._stride = torch.linalg.vector_norm(fingerprint - previous).item()
        self.is_event = self._stride > _EVENT * self._usual_stride > 0
        return self._stride != 0

    def estimate(self, inverse_t: Tensor, theta: Tensor, limits: Error) -> Error | None:
        """An estimate of the error; None where there is no news, and no need for any.

        :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
        :param Tensor theta: Θ, shape ``(D, D)``.
        :param Error limits: what the estimate will be compared with.
        """
        self._steps += 1
        if self._patience > 0 and self._stride <= _UNUSUAL * self._usual_stride:
            self._patience -= 1
            return None
        self._usual_stride = self._stride if math.isfinite(self._stride) else 0.0
        number = self._count % _NUM_DIRECTIONS
        self._count += 1
        directions = fixed_directions(
            _NUM_DIRECTIONS, len(theta), inverse_t.dtype, inverse_t.device
        )
        self._readings.append(_Reading(glance(inverse_t, theta, directions[number])))
        # The latest reading that has arrived; none is waited for, unless many are under way, or
        # nothing is known of R.
        arrived = None
        while self._readings and (
            self.is_event or len(self._readings) > _MAX_READINGS or self._readings[0].has_arrived()
        ):
            arrived = self._readings.popleft()
        if arrived is None:
            return None
        error = arrived.value()
        self.rest(error, limits)
        return error

    def rest(self, error: Error, limits: Error) -> None:
        """Look away for some steps: half as many as it takes to get over the limits."""
        size = error.relative_to(limits)
        self._patience = 0
        if size <= 1:
            # In this order a NaN, of an earlier look, is passed over.
            growth = max(_LEAST_GROWTH, (size - self._size) / max(self._steps, 1))
            self._patience = min(int((1.25 - size) / (2 * growth)), _MAX_PATIENCE)
        self._size, self._steps = size, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to take the same decisions."""
        return {
            "count": self._count,
            "patience": self._patience,
            "steps": self._steps,
            "size": self._size,
            "fingerprint": self._fingerprint,
            "usual_stride": self._usual_stride,
        }

    def load_state_dict(self, state: dict[str, Any], *, like: Tensor) -> None:
        """Go on from a state; its tensors are taken to the type and device of another one."""
        self.start_again()
        for name, value in state.items():
            setattr(self, f"_{name}", value.to(like) if isinstance(value, Tensor) else value)

    def __getstate__(self) -> dict[str, Any]:
        # A reading belongs to its device.
        return {**self.__dict__, "_readings": deque()}


class _Reading:
    """An error that the device may still be computing.

    :param Tensor numbers: those of :class:`Error`, shape ``(2,)``.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def has_arrived(self) -> bool:
        return self._event is None or self._event.query()

    def value(self) -> Error:
        """The error; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return Error(*self._numbers.tolist())
