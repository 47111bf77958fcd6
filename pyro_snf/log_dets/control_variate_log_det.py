"""The log-determinant of a map that changes, from that of a fixed map nearby.

Let P be a map whose ``log|det P|`` and whose inverse are known. For every weight ``a`` of J then::

    log|det J| = log|det P| + tr log(J P⁻¹)
               = log|det P| + [tr(P⁻¹ J) − D] + tr(log(I + E) − E),        E = J P⁻¹ − I,
    ∂ log|det J|/∂a = ∂ tr(P⁻¹ J)/∂a + tr((J⁻¹ − P⁻¹) ∂J/∂a).

J is linear in ``a``, so that the middle term of the value is ``⟨G, a⟩ − D`` with
``G = ∂ tr(P⁻¹ J)/∂a``, which is known too. The last term of the value is of second order in E, that
of the gradient of first order. They are estimated by k random probes v (Hutchinson, 1989)::

    tr(log(I + E) − E)    = E[vᵀ (log(J P⁻¹) − J P⁻¹ + I) v],
    tr((J⁻¹ − P⁻¹) ∂J)    = E[vᵀ ∂J (u − P⁻¹ v)],        J u = v.

So P is a control variate, which keeps the noise down, for the probes only estimate what J and P
differ by; and a preconditioner. It is chosen to be

- J itself as it was some steps ago, factorized. E is small, and both terms are power series in it,
  ``J⁻¹ = P⁻¹ (I − E + E² − …)`` and ``log(I + E) = E − E²/2 + …``, of which one or two terms do.
  The error of a value is forgotten with the next factorization. For the next weights, a value is
  continued linearly, and its gradient kept, as long as the solutions u still solve ``J u = v`` for
  them: so most steps take one product with J, and no solve;
- where that would cost too much (convolutions of many channels on large images, with zeros beyond
  the edges): the convolution with a periodic boundary, whose factors are cheap. E is then confined
  to the edges, but not small. One Krylov space for each probe, preconditioned by P, gives both
  terms (:mod:`~pyro_snf.krylov`).

Either is made anew when J has moved away from it.

The paper's learned kernel, which this replaces, is a P⁻¹ that has to be trained, whose determinant
is not known, and whose window is too small for a kernel of a condition number of 100.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_snf.caching import StateCache, TensorState
from pyro_snf.extra_state import SavesAttributes, saved_count, saved_number
from pyro_snf.krylov import krylov, recent_steps
from pyro_snf.maps.base import ControlVariate, LinearMap
from pyro_snf.options import as_event_shape
from pyro_snf.precision import at_least_float32, keep_float32
from pyro_snf.probes import ProbeStream, draw_probes
from pyro_snf.surrogate import Surrogate
from pyro_snf.transfer import read

__all__ = ["ControlVariateLogDet"]

# ‖(J − P)P⁻¹V‖/‖V‖ up to which P serves. The probes' noise grows with its square.
_MAX_DRIFT = 0.05

# In units of the tolerance, the largest residual up to which solutions are kept for other weights,
# and that of new ones. A gradient that is kept for too long costs more than it saves: at a constant
# rate, a loss of 150 nats was 2 higher at the end with 1, and 0.6 with 0.5.
_KEPT_RESIDUAL = 0.7
_NEW_RESIDUAL = 0.35


@dataclass(frozen=True)
class _Anchor:
    """P, made for one weight a of J, and what is known of it."""

    control_variate: ControlVariate
    weight: Tensor
    """The weight a."""
    value: Tensor
    """``log|det P| + ⟨G, a⟩ − D``, shape ``()``, in float64."""


@dataclass(frozen=True)
class _Estimate:
    """``log|det J|`` and its gradient, for one weight a of J, and the solves that they are from."""

    weight: Tensor
    """The weight a."""
    value: Tensor
    """``log|det J|``, shape ``()``, in float64."""
    gradient: Tensor
    """The gradient in a."""
    solution: Tensor
    """u, shape ``(k, *event)``."""
    rest: Tensor
    """``v − J u``, where P is exact."""


class _Solves(NamedTuple):
    """What a new estimate is made of."""

    solution: Tensor
    """u, shape ``(k, *event)``."""
    rest: Tensor
    """``v − J u``, where P is exact."""
    higher_orders: Tensor
    """The estimate of ``tr(log(I + E) − E)``, shape ``()``, in float64."""


class ControlVariateLogDet(SavesAttributes):
    """An estimate of ``log|det J|`` and of its gradient, by a control variate and random probes.

    :param LinearMap linear_map: J, as a function of its parameter θ.
    :param Tensor theta: θ = 0, for its shape, device and dtype.
    :param int num_probes: k, at least 1.
    :param float tolerance: of the solves' residuals ``‖v − J u‖/‖v‖``.
    :param int krylov_steps: the most in a solve.
    :param seed: of the probes; see :class:`~pyro_snf.probes.ProbeStream`.
    """

    saved_attributes: ClassVar = {
        "num_refactorizations": saved_count,
        "error_estimate": saved_number,
        "event_shape": lambda name, value: None if value is None else as_event_shape(value),
    }

    theta: Tensor  # that P was made for; in float32 at least
    solved_theta: Tensor  # that the latest solves were for

    def __init__(
        self,
        linear_map: LinearMap,
        theta: Tensor,
        *,
        num_probes: int,
        tolerance: float,
        krylov_steps: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.linear_map = linear_map
        self.num_probes = num_probes
        self.tolerance = tolerance
        self.krylov_steps = krylov_steps
        self.probes = ProbeStream(seed, device=theta.device)
        for name in ("theta", "solved_theta"):
            self.register_buffer(name, at_least_float32(torch.empty_like(theta)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The state for θ = 0, before the first estimate."""
        self.theta.zero_()
        self.solved_theta.zero_()
        #: Control variates made so far.
        self.num_refactorizations = 0
        #: The root mean square of ``‖v − J u‖/‖v‖`` over the probes.
        self.error_estimate = math.nan
        #: The events' shape that P is for, as a tuple; None before the first.
        self.event_shape: tuple[int, ...] | None = None
        self._has_warned = False
        self._forget()

    def _forget(self) -> None:
        """Drop what follows from the saved state."""
        self._anchor: _Anchor | None = None
        self._estimate: _Estimate | None = None
        self._probes: tuple[Tensor, Tensor] | None = None  # v and P⁻¹ v, for an exact P
        self._recent_steps = recent_steps(1)
        self._latest: StateCache[tuple[Tensor, Tensor]] = StateCache()
        self._inverse_weights: StateCache[Tensor] = StateCache()

    def update(self, theta: Tensor, event_shape: torch.Size, state: TensorState) -> Surrogate:
        """The value and its gradient in θ, computed once for every change of θ.

        :raises torch.linalg.LinAlgError: if a map that is to be factorized is singular or not
            finite.
        """
        evaluate = partial(self._evaluate_at, theta, event_shape)
        value, gradient = self._latest.get(state, evaluate, tuple(event_shape))
        return Surrogate(value, gradient, self.linear_map.theta_scale(theta))

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        """The weight of the best inverse of its size."""
        compute = partial(self.linear_map.inverse_weight, theta, event_shape)
        return self._inverse_weights.get(TensorState(theta), compute, tuple(event_shape))

    @torch.no_grad()
    def _evaluate_at(self, theta: Tensor, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
        theta = theta.detach().to(self.theta.dtype)
        if tuple(event_shape) != self.event_shape:
            self._make_anchor(theta, event_shape)
        value, gradient = self._evaluate(theta, event_shape)
        return value.to(theta), gradient.to(theta)

    def refactorize(self, theta: Tensor) -> None:
        """Make P anew, for events of the latest shape. Without one, there is nothing to do."""
        if self.event_shape is not None:
            theta = theta.detach().to(self.theta.dtype)
            self._latest.clear()
            self._make_anchor(theta, torch.Size(self.event_shape))

    def _evaluate(self, theta: Tensor, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The value, and the gradient in the weight."""
        if not self._current_anchor(theta, event_shape).control_variate.is_exact:
            estimate = self._new_estimate(theta, event_shape)
            return estimate.value, estimate.gradient
        estimate = self._known_estimate(event_shape)
        change = self.linear_map.weight(theta) - estimate.weight
        rest = estimate.rest - self.linear_map.apply_weight(change, estimate.solution)
        (lengths,) = read(torch.linalg.vector_norm(rest.flatten(1), dim=1))
        residuals = lengths.numpy() / math.sqrt(event_shape.numel())
        if not residuals.max() <= _KEPT_RESIDUAL * self.tolerance:
            estimate = self._new_estimate(theta, event_shape)
            return estimate.value, estimate.gradient
        self.error_estimate = math.sqrt(np.square(residuals).mean())
        first_order = (estimate.gradient * change).sum(dtype=torch.float64)
        return estimate.value + first_order, estimate.gradient

    def _known_estimate(self, event_shape: torch.Size) -> _Estimate:
        """The latest one. It is made again from a saved state. P is to be exact."""
        if self._estimate is None and not torch.equal(self.solved_theta, self.theta):
            # A state from elsewhere may be no map that can be factorized: then P's serves.
            with suppress(torch.linalg.LinAlgError):
                self._new_estimate(self.solved_theta.clone(), event_shape)
        if self._estimate is None:  # that of P itself
            anchor = self._current_anchor(self.theta, event_shape)
            probes, start = self._probes_for(anchor, event_shape)
            gradient = anchor.control_variate.trace_gradient
            rest = torch.zeros_like(probes)
            self._estimate = _Estimate(anchor.weight, anchor.value, gradient, start, rest)
            self.error_estimate = 0.0
        return self._estimate

    def _new_estimate(self, theta: Tensor, event_shape: torch.Size) -> _Estimate:
        """By solves; or, where J has moved too far from P, by a new P."""
        anchor = self._current_anchor(theta, event_shape)
        weight = self.linear_map.weight(theta)
        probes, start = self._probes_for(anchor, event_shape)
        if anchor.control_variate.is_exact:
            found = self._by_powers(anchor, weight, probes, start)
        else:
            found = self._by_krylov(anchor, weight, probes, start)
        if found is None:
            anchor = self._make_anchor(theta, event_shape)
            if anchor.control_variate.is_exact:
                return self._known_estimate(event_shape)
            start = anchor.control_variate.factors.precondition(probes)
            found = self._by_krylov(anchor, weight, probes, start)
        assert found is not None  # J has not moved from a P of its own
        trace_gradient = anchor.control_variate.trace_gradient
        first_order = (trace_gradient.double() * (weight - anchor.weight)).sum()
        factor = len(probes) * self.linear_map.theta_scale(theta)
        correction = self.linear_map.gradient(theta, found.solution - start, probes) / factor
        self.solved_theta.copy_(theta)
        self._estimate = _Estimate(
            weight=weight,
            value=anchor.value + first_order + found.higher_orders,
            gradient=trace_gradient + correction,
            solution=found.solution,
            rest=found.rest,
        )
        return self._estimate

    def _by_powers(
        self, anchor: _Anchor, weight: Tensor, probes: Tensor, start: Tensor
    ) -> _Solves | None:
        """For an exact P, of which E is small: ``J⁻¹ = P⁻¹ (I − E + E² − …)``, of as many terms as
        the solves need. The rests are ``∓Eⁿ v``, of which ``log(I + E)`` is a series as well.

        :return: None where J has moved too far from P.
        """
        linear_map, factors = self.linear_map, anchor.control_variate.factors
        length = torch.linalg.vector_norm(probes[0])  # that of all
        solutions, rests = [start], [linear_map.apply_weight(anchor.weight - weight, start)]
        unread, residuals = [rests[0]], np.empty((0, len(probes)))
        # On a GPU all that is expected to be needed is read at once.
        first_look = max(self._recent_steps) if weight.is_cuda else 0
        while True:
            count = len(solutions) - 1
            if count >= first_look:
                norms = read(*(one.flatten(1).norm(dim=1) / length for one in unread))
                residuals = np.concatenate([residuals, np.stack(norms)])
                unread.clear()
                if not np.square(residuals[0]).mean() <= _MAX_DRIFT**2:
                    return None
                is_solved = residuals.max(1) <= _NEW_RESIDUAL * self.tolerance
                if is_solved.any():
                    break
            if count == self.krylov_steps:
                return None
            solutions.append(solutions[-1] + factors.precondition(rests[-1]))
            rests.append(probes - linear_map.apply_weight(weight, solutions[-1]))
            unread.append(rests[-1])
        number = int(is_solved.argmax())  # of the first of them
        self._recent_steps.append(number)
        self.error_estimate = math.sqrt(np.square(residuals[number]).mean())
        terms = [(probes * rest).sum().double() / -(n + 1) for n, rest in enumerate(rests)]
        higher_orders = sum(terms[1 : number + 1], torch.zeros_like(anchor.value)) / len(probes)
        return _Solves(solutions[number], rests[number], higher_orders)

    def _by_krylov(
        self, anchor: _Anchor, weight: Tensor, probes: Tensor, start: Tensor
    ) -> _Solves | None:
        """For a P that is not exact; None where J has moved too far from the weight P is for.

        On a GPU all that is to be known is read at once.
        """
        linear_map, factors = self.linear_map, anchor.control_variate.factors
        change = linear_map.apply_weight(weight - anchor.weight, start)
        drift = torch.linalg.vector_norm(change) / torch.linalg.vector_norm(probes)
        if not drift.is_cuda and not drift <= _MAX_DRIFT:
            return None
        space = krylov(
            partial(linear_map.apply_weight, weight),
            factors.precondition,
            probes,
            preconditioned=start,
            tolerance=self.tolerance,
            max_steps=self.krylov_steps,
            expected_steps=max(self._recent_steps),
            beside=drift,
        )
        if not space.beside <= _MAX_DRIFT:
            return None
        self._recent_steps.append(space.num_steps)
        self.error_estimate = space.residual.square().mean().sqrt().item()
        if not self.error_estimate <= self.tolerance:
            self._warn()
        # The next weights have solves of their own: no rest is looked at.
        return _Solves(space.solution, probes, space.second_order_log().mean())

    def _probes_for(self, anchor: _Anchor, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """v and ``P⁻¹ v``, shape ``(k, *event)``.

        New ones for every P, of which half of the solves are then known; and for every estimate
        where P is not exact, because what is left to estimate is not small there.
        """
        is_exact, device = anchor.control_variate.is_exact, anchor.weight.device
        if self._probes is None or not is_exact:
            stream = self.probes
            if is_exact:  # also where P is made again, from a saved state
                generator = stream.generator(max(stream.count - 1, 0), device)
            else:
                generator = stream.next_generator(device)
            shape = tuple(event_shape)
            probes = draw_probes("rademacher", self.num_probes, shape, generator, self.theta.dtype)
            self._probes = probes, anchor.control_variate.factors.precondition(probes)
        return self._probes

    def _current_anchor(self, theta: Tensor, event_shape: torch.Size) -> _Anchor:
        if self._anchor is None:
            try:
                self._anchor = self._anchor_of(self.theta, event_shape)
            except torch.linalg.LinAlgError:
                # A state from elsewhere, or a map that is singular in its new dtype.
                return self._make_anchor(theta, event_shape)
        return self._anchor

    def _make_anchor(self, theta: Tensor, event_shape: torch.Size) -> _Anchor:
        anchor = self._anchor_of(theta, event_shape)
        self.theta.copy_(theta)
        self.solved_theta.copy_(theta)
        self.event_shape = tuple(event_shape)
        self._anchor, self._estimate, self._probes = anchor, None, None
        if anchor.control_variate.is_exact:
            self.probes.next_generator(theta.device)  # the latest from now on
        self.num_refactorizations += 1
        return anchor

    @torch.no_grad()
    def _anchor_of(self, theta: Tensor, event_shape: torch.Size) -> _Anchor:
        linear_map = self.linear_map
        with torch.inference_mode(False):  # for use outside it too
            theta = theta.clone()  # the factors' own
            control_variate = linear_map.control_variate(theta, event_shape, self.num_probes)
            weight = linear_map.weight(theta)
            value = control_variate.factors.log_abs_det.double()
            if not control_variate.is_exact:
                trace = (control_variate.trace_gradient.double() * weight).sum()
                value = value + trace - event_shape.numel()
        return _Anchor(control_variate, weight, value)

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the solves for the gradient of log|det J| left a relative residual of "
                f"{self.error_estimate:.2g} after {self.krylov_steps} steps, above the tolerance "
                f"of {self.tolerance:.2g}; error_estimate has the latest residual",
                RuntimeWarning,
                stacklevel=2,
            )

    def set_extra_state(self, state: Any) -> None:
        self._forget()
        super().set_extra_state(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_anchor": None, "_estimate": None, "_probes": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ControlVariateLogDet:
        self._forget()
        return super()._apply(keep_float32(fn), recurse)
