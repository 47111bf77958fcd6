"""The refined method: an inverse of ``A = I + Θ/√D`` that follows it at O(D²) a step.

``R ≈ A⁻¹`` is a buffer, and ``E = I − RA`` its error. In most steps R is left as it is: its error
is only watched, by a few matrix-vector products (:mod:`pyro_snf.dense.lookout`). Where it gets over
the tolerance, it is measured with k random probes and removed where they found it, in a **round**.
With vectors as columns, as on paper:

1. *Measure.* ``U = EG`` for fresh probes G: k Gaussian ones, and the images ``R g`` of some. The
   ratio ``‖E g‖/‖g‖`` of the former estimates ``‖E‖_F/√D``, the **certificate**; that of the
   latter ``‖ER‖_F/‖R‖_F``, the relative error of the gradient.
2. *Aim.* ``V = orth(EᵀU) = orth(EᵀE G)``: one subspace iteration turns the probes towards the
   largest right singular vectors of E. An optimizer's step is dominated by few directions, and so
   is the error that it leaves in R: aimed probes remove most of it, random ones a share k/D.
3. *Update*, Broyden's "good" one in block form. With ``P = RAV`` and ``M = VᵀP``,

       R₊ = R + (V − P) M⁻¹ VᵀR,      so that      R₊ A V = V:

   nothing is left of the error in the span of V, and ``R⁻¹`` has moved to ``A`` by a projection.
4. *Determinant*, by the determinant lemma:

       det R₊ = det R · det(I + M⁻¹Vᵀ(V − P)) = det R · det(VᵀV) / det M,      VᵀV = I.

And in every step:

5. *Value.* ``log|det A| = −log|det R| + log|det(I − E)| ≈ −log|det R| − tr E``, where the trace is
   ``D − ⟨Rᵀ, A⟩``, exact in O(D²). What is left is of second order: ``tr(E²)/2``.

Where a round is not enough (the learning rate is high, a checkpoint was loaded), more follow, each
with twice the probes. Where they do not halve the error, where the weights were edited by somebody
else than an optimizer, and where it is cheaper than going on with rounds
(:mod:`pyro_snf.dense.schedule`), R is made exact by one **refresh** in O(D³).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.caching import TensorState
from pyro_snf.dense import near_identity
from pyro_snf.dense.exact import ExactFactors
from pyro_snf.dense.lookout import Error, Lookout, measure
from pyro_snf.dense.schedule import RefreshSchedule
from pyro_snf.precision import at_least_float32, keep_float32
from pyro_snf.probes import probe_generator
from pyro_snf.surrogate import with_gradient

__all__ = ["TrackedInverse"]

# With twice the probes each, more rounds than this cost as much as a refresh.
_MAX_ROUNDS = 4

# An error of such a share of its limit is let be also where somebody else than an optimizer has
# changed the weights. What one glance does not see could be a direction in which A is singular.
_NEGLIGIBLE = 0.05

# An error of so many times its limit is no usual one, and one round is not enough. Below that, what
# the round has left is seen in the next step.
_MODERATE = 2.0

# A round that changes log|det R| by more than this has met a nearly singular matrix, where the
# update is all rounding, and would leave its error in the running sum. A refresh takes over.
_MAX_LOG_ABS_DET_STEP = 3.0


@dataclass
class _Memory:
    """What is known as long as neither R nor Θ changes."""

    state: TensorState | None = None  # of Θ
    version: int = -1  # of R
    offset: Tensor | None = None  # tr R − D − log|det R|; it holds for any Θ
    value: Tensor | None = None


class TrackedInverse(nn.Module):
    """A buffer ``R`` that tracks ``A⁻¹``, and a running ``log|det R|``.

    Probes are drawn from a generator of its own, a function of the seed and the number of rounds
    so far: the global random stream is untouched, and a run that is resumed from a state dict
    goes on as if it had not stopped. R is kept in float32 at least, whatever ``A`` is in.

    :param int dim: D.
    :param int num_probes: k, at least 1, of a round; more than D are not used.
    :param float tolerance: the relative error of the gradient, in ``(0, 1)``, that is let be.
    :param int seed: of the probes.
    """

    inverse_t: Tensor  # Rᵀ: in A's own layout, it is added to A's gradient as it stands.
    log_abs_det_inverse: Tensor  # log|det R|; in float64, for it is a sum over all steps.

    def __init__(
        self,
        dim: int,
        *,
        num_probes: int,
        tolerance: float,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_probes = num_probes
        self.tolerance = tolerance
        self.seed = seed
        #: Rounds of measure, aim and update so far.
        self.num_rounds = 0
        #: Exact O(D³) refreshes so far.
        self.num_refreshes = 0
        #: The latest estimate of ‖I − RA‖_F/√D, from before the correction that may have followed.
        self.certificate = math.nan
        # What the latest refresh left: rounding, which grows with A's condition.
        self._rounding = Error(0.0, 0.0)
        # A round is about nine thin products and some overhead.
        self._schedule = RefreshSchedule(refresh_cost=3 + dim / (12 * min(num_probes, dim)))
        eye = torch.eye(dim, device=device, dtype=dtype)
        self.register_buffer("inverse_t", at_least_float32(eye))
        self.register_buffer(
            "log_abs_det_inverse", torch.zeros((), device=device, dtype=torch.float64)
        )
        self._forget()

    def _forget(self) -> None:
        """Not to know whether R still belongs to A: the next use looks."""
        self._memory = _Memory()
        self._lookout = Lookout()

    def training_log_abs_det(self, theta: Tensor) -> Tensor:
        """An estimate of ``log|det A|``, shape ``()``, whose gradient is ``Rᵀ``.

        :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
        """
        value = self.update(theta)
        return with_gradient(value, theta, self.inverse_t, scale=1 / math.sqrt(theta.shape[-1]))

    def update(self, theta: Tensor, state: TensorState | None = None) -> Tensor:
        """Bring R up to date with ``A``, once for every change; the value, shape ``()``.

        :param TensorState state: that of ``theta``, if it is at hand.
        :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
        """
        state = TensorState(theta) if state is None else state
        inverse_t, memory = self.inverse_t, self._memory
        if memory.version == inverse_t._version and memory.state == state:
            assert memory.value is not None
            return memory.value
        assert state.fingerprint is not None  # there is none while torch.jit traces
        if memory.version not in (inverse_t._version, -1):
            self._forget()  # R has been written to from outside
        current = theta.detach().to(inverse_t.dtype)
        has_moved = self._lookout.moves_to(state.fingerprint.to(inverse_t.dtype))
        if has_moved:
            self._schedule.count_step()
        try:
            if self._memory.offset is None and not torch.isfinite(self.log_abs_det_inverse):
                self.refresh(theta)  # an interrupt has left it so
            elif has_moved:
                self._follow(theta, current)
        except torch.linalg.LinAlgError:
            self._forget()  # the next use is to find out for itself
            raise
        memory = self._memory  # another one, if R has changed
        if memory.offset is None:
            trace = inverse_t.diagonal().sum(dtype=torch.float64)
            memory.offset = trace - len(inverse_t) - self.log_abs_det_inverse
        memory.value = near_identity.add_trace(memory.offset, inverse_t, current)
        memory.state, memory.version = state, inverse_t._version
        return memory.value

    def _limits(self) -> Error:
        """The error that is let be."""
        # One direction in which A is singular is an error of 1/√D. And no refresh could do better
        # than the last one did.
        singular = 0.9 / math.sqrt(len(self.inverse_t))
        return Error(
            inverse=max(singular, 2 * self._rounding.inverse),
            gradient=max(self.tolerance, 2 * self._rounding.gradient),
        )

    def _follow(self, theta: Tensor, current: Tensor) -> None:
        """Find out how good R is, at next to no cost, and correct it if it is not good enough."""
        limits = self._limits()
        error = self._lookout.estimate(self.inverse_t, current, limits)
        if error is None:
            return
        size = error.relative_to(limits)
        if self._lookout.is_event and not size <= _NEGLIGIBLE:
            self.refresh(theta)
        elif size <= 1:
            self.certificate = error.inverse
        else:
            self._correct(theta, current)

    @torch.no_grad()
    def _correct(self, theta: Tensor, current: Tensor) -> None:
        """Measure, and bring the error below the limits if it is not."""
        limits = self._limits()
        previous = math.inf
        for doublings in range(_MAX_ROUNDS):
            residual, error = self._measure(current, self.num_probes * 2**doublings)
            self.certificate = error.inverse
            size = error.relative_to(limits)
            if size <= 1:
                if doublings == 0:
                    self._lookout.rest(error, limits)
                return
            if not size <= previous / 2:  # also where it is NaN
                break
            if doublings == 0 and self._schedule.refresh_pays():
                break
            if not self._update(current, residual):
                break
            self._schedule.count_round()
            if size <= _MODERATE:
                return
            previous = size
        self.refresh(theta)

    @torch.no_grad()
    def refresh(self, theta: Tensor) -> None:
        """Recompute R exactly, in O(D³).

        :raises torch.linalg.LinAlgError: if ``A`` is not finite, or singular at the precision of
            its type.
        """
        factors = ExactFactors(near_identity.matrix(theta))
        inverse_t = factors.inverse_t
        self._memory = _Memory()
        self.log_abs_det_inverse.fill_(math.nan)  # as in _update
        self.inverse_t.copy_(inverse_t)
        self.log_abs_det_inverse.copy_(-factors.log_abs_det)
        self.num_refreshes += 1
        self._schedule.restart()
        self._lookout.start_again()
        current = theta.detach().to(self.inverse_t.dtype)
        _, self._rounding = self._measure(current, self.num_probes)
        self.certificate = self._rounding.inverse
        if not self.certificate < 1:
            raise torch.linalg.LinAlgError(
                f"the weight is numerically singular in {current.dtype}: its computed inverse R "
                f"leaves ‖I − RW‖_F/√D = {self.certificate:.2g}"
            )

    def _update(self, theta: Tensor, residual: Tensor) -> bool:
        """Aim and update once (steps 2 to 4 of the module's text); whether that was possible.

        :param Tensor residual: ``(EG)ᵀ``, as measured.
        """
        # Rows instead of columns from here on: residual = Uᵀ, probes = Vᵀ, image = Pᵀ.
        aimed = residual - near_identity.multiply_transposed(theta, residual @ self.inverse_t.mT)
        probes = torch.linalg.qr(aimed.mT).Q.mT
        image = near_identity.multiply(theta, probes) @ self.inverse_t
        middle = probes @ image.mT  # M
        log_abs_det_middle = torch.linalg.slogdet(middle.double()).logabsdet
        if not log_abs_det_middle.abs() < _MAX_LOG_ABS_DET_STEP:
            return False
        step = torch.linalg.solve(middle.mT, probes - image)  # M⁻ᵀ Uᵀ
        log_abs_det_inverse = self.log_abs_det_inverse - log_abs_det_middle
        # R and log|det R| change together: an interrupt (Ctrl-C) in between leaves a NaN, which
        # the next update takes for what it is.
        self._memory = _Memory()
        self._lookout.start_again()
        self.log_abs_det_inverse.fill_(math.nan)
        self.inverse_t.addmm_((probes @ self.inverse_t.mT).mT, step)
        self.log_abs_det_inverse.copy_(log_abs_det_inverse)
        return True

    def _measure(self, theta: Tensor, num_probes: int) -> tuple[Tensor, Error]:
        """The residuals ``(EG)ᵀ`` of fresh probes, and the error; see :func:`lookout.measure`."""
        residual, numbers = measure(self.inverse_t, theta, self._draw_probes(num_probes))
        return residual, Error(*numbers.tolist())

    def _draw_probes(self, num_probes: int) -> Tensor:
        """Fresh Gaussian probes as rows, a function of the seed and the number of rounds."""
        device, dtype = self.inverse_t.device, self.inverse_t.dtype
        generator = probe_generator(self.seed, self.num_rounds, device)
        self.num_rounds += 1
        dim = self.inverse_t.shape[-1]
        shape = (min(num_probes, dim), dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_rounds": self.num_rounds,
            "num_refreshes": self.num_refreshes,
            "certificate": self.certificate,
            "rounding": tuple(self._rounding),
            "lookout": self._lookout.state_dict(),
            "schedule": asdict(self._schedule),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.num_rounds = state["num_rounds"]
        self.num_refreshes = state["num_refreshes"]
        self.certificate = state["certificate"]
        self._rounding = Error(*state["rounding"])
        self._schedule = RefreshSchedule(**state["schedule"])
        self._forget()
        self._lookout.load_state_dict(state["lookout"], like=self.inverse_t)

    def __getstate__(self) -> dict[str, Any]:
        # A copy need not trust that R and Θ were copied together.
        return {**self.__dict__, "_memory": _Memory()}

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> TrackedInverse:  # .to(), .double(), .bfloat16(), .cuda(), …
        self._forget()

        def keep_precision(tensor: Tensor) -> Tensor:
            if tensor is self.log_abs_det_inverse:
                return tensor.to(fn(tensor).device)  # a sum over all steps stays in float64
            return keep_float32(fn)(tensor)

        return super()._apply(keep_precision, recurse)
