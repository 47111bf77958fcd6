"""The error of a tracked inverse, estimated in training by a few matrix-vector products."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_snf.caching import fixed_directions
from pyro_snf.extra_state import saved_count, saved_number
from pyro_snf.maps.dense import Dense

__all__ = ["InverseError", "ResidualMonitor", "measure_error"]

_DENSE = Dense()

# Fixed directions for the checks, used in turn: an error that one of them misses is seen soon.
_NUM_DIRECTIONS = 16

# The most steps between two checks.
_MAX_STEPS_UNTIL_CHECK = 8

# The least growth of the error in a step to plan with, in units of its limit: the latest direction
# may have missed most of it.
_LEAST_GROWTH = 1 / 16

# On a GPU, so many checks of a new layer are waited for: Adam's first steps are its largest.
_NUM_FIRST_CHECKS = 4

# A step of Θ that is three times as long as the one before the latest check is checked at once; one
# that is ten times as long is taken for an external change, by an edit or a checkpoint.
_LONG_STEP = 3.0
_EXTERNAL_STEP = 10.0


class InverseError(NamedTuple):
    """Estimates of the error of R as an inverse of A."""

    inverse: float
    """``‖I − RA‖_F/√D``, or ``‖I − AR‖_F/√D``."""
    gradient: float
    """``‖(I − RA)R‖_F/‖R‖_F``, to first order the relative error of the gradient ``Rᵀ``."""

    def relative_to(self, limits: InverseError) -> float:
        """The larger of the two, each in units of its limit; NaN if either is."""
        inverse, gradient = self.inverse / limits.inverse, self.gradient / limits.gradient
        return inverse if inverse > gradient or math.isnan(inverse) else gradient


def measure_error(
    inverse_t: Tensor,
    theta: Tensor,
    probes: Tensor,
    sources: Tensor,
    matrix_map: Dense = _DENSE,
) -> tuple[Tensor, Tensor]:
    """The error of R along some random directions g, and along the images R g of others.

    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
    :param Tensor theta: Θ, shape ``(D, D)``.
    :param Tensor probes: the directions as rows, shape ``(k, D)``.
    :param Tensor sources: the others as rows, shape ``(h, D)``.
    :param Dense matrix_map: how to multiply with the matrices.
    :return: the residuals ``(I − RA) g`` as rows, k for the directions and then h for the images;
        and the two numbers of :class:`InverseError`, shape ``(2,)``.
    """
    count = len(probes)
    images = matrix_map.apply_weight(inverse_t, sources, transposed=True)  # (R g)ᵀ
    # Scaled like the directions, for an update uses the residuals of both.
    images = images * (math.sqrt(images.numel()) / torch.linalg.vector_norm(images))
    probes = torch.cat([probes, images])
    products = matrix_map.multiply(theta, probes)
    residual = probes - matrix_map.apply_weight(inverse_t, products, transposed=True)
    found = torch.linalg.vector_norm(residual, dim=-1)
    norm = torch.linalg.vector_norm
    numbers = [norm(found[:count]) / norm(probes[:count]), norm(found[count:]) / norm(images)]
    return residual, torch.stack(numbers)


def _check_error(
    inverse_t: Tensor, theta: Tensor, direction: Tensor, matrix_map: Dense = _DENSE
) -> Tensor:
    """The error of R along one random direction w, by three matrix-vector products.

    :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
    :param Tensor theta: Θ, shape ``(D, D)``.
    :param Tensor direction: w, shape ``(D,)``, of norm ``√D``.
    :param Dense matrix_map: how to multiply with the matrices.
    :return: the two numbers of :class:`InverseError`, shape ``(2,)``.
    """
    root = math.sqrt(len(direction))
    norm = torch.linalg.vector_norm
    image = matrix_map.apply_weight(inverse_t, direction, transposed=True)  # R w
    residual = direction - image - matrix_map.apply_weight(theta, image / root)  # (I − AR) w
    error = matrix_map.apply_weight(inverse_t, residual, transposed=True)  # (I − RA)R w
    return torch.stack([norm(residual) / root, norm(error) / norm(image)])


class _Reading:
    """Numbers on their way from a GPU to the host, beside the device's other work."""

    def __init__(self, numbers: Tensor) -> None:
        self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        self._copy.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[float]:
        if not self._event.query():
            self._event.synchronize()
        return self._copy.tolist()


class ResidualMonitor:
    """Estimates the error of R by single-vector residual checks, one direction after the other.

    A check is made every few steps, more often the faster the error grows, and at once if Θ makes
    an unusually long step. The step's length is that of the fingerprint ``Θ w``, which is computed
    at every step anyway.

    On a GPU, a check is made at every step and read at the next one, so that the device is not
    waited for: what is known lags by one step, whatever the device's speed. It is waited for in the
    first steps, after a refactorization, and where Θ has been written to more often than usual.

    :param Dense matrix_map: how to multiply with the matrices.
    """

    def __init__(self, matrix_map: Dense = _DENSE) -> None:
        self.matrix_map = matrix_map
        self.num_checks = 0
        self.num_followed = 0
        self.steps_until_check = 0
        self.steps_since_check = 0
        #: The error at the latest check, in units of the limits.
        self.latest_error = 0.0
        #: Θ w at the latest step.
        self.fingerprint: Tensor | None = None
        #: How far Θ w has moved in the latest step, and in the one before the latest check.
        self.step_norm = 0.0
        self.usual_step_norm = 0.0
        #: Whether Θ has probably been changed by something else than an optimizer's step.
        self.is_external_change = False
        # Autograd's counter of writes to Θ at the latest step, and how many a step usually makes.
        self._version: int | None = None
        self._usual_writes: int | None = None
        self._pending: _Reading | None = None
        self._updated: _Reading | None = None

    def reset(self) -> None:
        """R was corrected: check it at the next step."""
        self.steps_until_check = self.steps_since_check = 0
        self.latest_error = 0.0
        self._pending = self._updated = None

    def observe(self, fingerprint: Tensor, version: int = 0) -> bool:
        """Whether Θ has moved since the latest call.

        :param Tensor fingerprint: ``Θ w``, shape ``(D,)``.
        :param int version: autograd's counter of writes to Θ.
        """
        previous, self.fingerprint = self.fingerprint, fingerprint
        writes = 0 if self._version is None else version - self._version
        is_unusual = self._usual_writes is not None and writes not in (0, self._usual_writes)
        if writes != 0 or (previous is not None and self._usual_writes is None):
            self._usual_writes = writes  # none, if an optimizer writes through .data
        self._version = version
        self.is_external_change = previous is None
        if previous is None or fingerprint.is_cuda:  # whose step would have to be waited for
            self.step_norm = math.inf
            self.is_external_change |= is_unusual
            return True
        self.step_norm = torch.linalg.vector_norm(fingerprint - previous).item()
        self.is_external_change = self.step_norm > _EXTERNAL_STEP * self.usual_step_norm > 0
        return self.step_norm != 0

    def follow(self, fingerprint: Tensor) -> None:
        """R and Θ have changed together. Any step of Θ alone is checked at once.

        :param Tensor fingerprint: ``Θ w``, shape ``(D,)``.
        """
        self.fingerprint = fingerprint
        self.num_followed += 1
        self.step_norm = self.usual_step_norm = 0.0
        self.steps_until_check, self.is_external_change = 0, False

    def is_check_due(self) -> bool:
        """Whether a check is due at this step; to be called once for each."""
        self.steps_since_check += 1
        if self.steps_until_check > 0 and self.step_norm <= _LONG_STEP * self.usual_step_norm:
            self.steps_until_check -= 1
            return False
        return True

    def check(self, inverse_t: Tensor, theta: Tensor, limits: InverseError) -> InverseError:
        """An estimate of the error; on a GPU of the error in the step before.

        :param Tensor inverse_t: ``Rᵀ``, shape ``(D, D)``.
        :param Tensor theta: Θ, shape ``(D, D)``.
        :param InverseError limits: what the estimate will be compared with.
        """
        self.usual_step_norm = self.step_norm if math.isfinite(self.step_norm) else 0.0
        number = self.num_checks % _NUM_DIRECTIONS
        self.num_checks += 1
        error = InverseError(*self._read(self._check_along(inverse_t, theta, number)))
        self.plan_next_check(error, limits)
        return error

    def _check_along(self, inverse_t: Tensor, theta: Tensor, number: int) -> Tensor:
        """The error along one of the fixed directions, shape ``(2,)``."""
        directions = fixed_directions(
            _NUM_DIRECTIONS, len(theta), inverse_t.dtype, inverse_t.device
        )
        return _check_error(inverse_t, theta, directions[number], self.matrix_map)

    def lags(self, tensor: Tensor) -> bool:
        """Whether the latest check was not waited for, on the device of a tensor."""
        is_new = self.num_checks <= _NUM_FIRST_CHECKS
        return tensor.is_cuda and not (is_new or self.is_external_change)

    def look(self, inverse_t: Tensor, theta: Tensor) -> InverseError:
        """An estimate of the error now, which changes nothing."""
        return InverseError(*self._check_along(inverse_t, theta, 0).tolist())

    def check_update(self, inverse_t: Tensor, theta: Tensor) -> None:
        """Check R after an update, on a GPU: :meth:`error_after_update` is the outcome."""
        self._updated = _Reading(self._check_along(inverse_t, theta, 0))

    def error_after_update(self) -> InverseError | None:
        """What was left of the error by an update in the step before; None if there was none."""
        reading, self._updated = self._updated, None
        return None if reading is None else InverseError(*reading.wait())

    def _read(self, numbers: Tensor) -> list[float]:
        """The numbers; on a GPU those of the check before, which have arrived by now."""
        if not numbers.is_cuda:
            return numbers.tolist()
        previous = self._pending if self.lags(numbers) else None
        self._pending = _Reading(numbers)
        return (previous or self._pending).wait()

    def plan_next_check(self, error: InverseError, limits: InverseError) -> None:
        """Wait half as many steps as the error needs to grow to 1.25 times the limits."""
        size = error.relative_to(limits)
        self.steps_until_check = 0
        if size <= 1:
            # In this order, max ignores a growth of NaN, from an earlier check.
            growth = max(_LEAST_GROWTH, (size - self.latest_error) / max(self.steps_since_check, 1))
            self.steps_until_check = min(int((1.25 - size) / (2 * growth)), _MAX_STEPS_UNTIL_CHECK)
        self.latest_error, self.steps_since_check = size, 0

    #: What a resumed run needs to take the same decisions, besides the fingerprint.
    SAVED: ClassVar = {
        "num_checks": saved_count,
        "num_followed": saved_count,
        "steps_until_check": saved_count,
        "steps_since_check": saved_count,
        "latest_error": saved_number,
        "usual_step_norm": saved_number,
    }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._pending = self._updated = None
        for name, value in state.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None, "_updated": None}  # they belong to a device
