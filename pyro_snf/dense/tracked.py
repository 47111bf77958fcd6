"""The refined method: an inverse of ``A = I + Θ/√D`` that follows it at O(kD²) a step.

``R ≈ A⁻¹`` is a buffer. Its error ``E = I − RA`` is measured with k random probes, and removed
where the measurement found it. With vectors as columns, as on paper:

1. *Measure.* ``U = EG`` for k fresh Gaussian probes G. ``‖U‖/‖G‖`` estimates ``‖E‖_F/√D``, the
   **certificate**.
2. *Aim.* ``V = orth(EᵀU) = orth(EᵀE G)``: one subspace iteration turns the probes towards the
   largest right singular vectors of E. An optimizer's step is dominated by few directions, and so
   is the error that it leaves in R: aimed probes remove most of it, random ones a share k/D.
3. *Update*, Broyden's "good" one in block form. With ``P = RAV`` and ``M = VᵀP``,

       R₊ = R + (V − P) M⁻¹ VᵀR,      so that      R₊ A V = V:

   nothing is left of the error in the span of V, and ``R⁻¹`` has moved to ``A`` by a projection.
4. *Determinant*, by the determinant lemma:

       det R₊ = det R · det(I + M⁻¹Vᵀ(V − P)) = det R · det(VᵀV) / det M,      VᵀV = I.

5. *Value.* ``log|det A| = −log|det R| + log|det(I − E)| ≈ −log|det R| − tr E``, where the trace is
   ``D − ⟨Rᵀ, A⟩``, exact in O(D²). What is left is of second order: ``tr(E²)/2``.

One round a step is enough while A moves slowly, and its steps 2 to 4 are left out where the
certificate is far below the tolerance. Where the certificate is above the tolerance (the
learning rate is high, a checkpoint was loaded, A was edited), more rounds follow, each with twice
the probes; and where a round does not halve the error, one exact refresh in O(D³).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_snf.caching import TensorState
from pyro_snf.dense import near_identity
from pyro_snf.dense.exact import ExactFactors
from pyro_snf.dense.lookout import Lookout
from pyro_snf.dense.schedule import RefreshSchedule
from pyro_snf.precision import at_least_float32, keep_float32
from pyro_snf.surrogate import with_gradient

__all__ = ["TrackedInverse"]

# With twice the probes each, more rounds than this cost as much as a refresh.
_MAX_ROUNDS = 4

# A round that changes log|det R| by more than this has met a nearly singular matrix, where the
# update is all rounding, and would leave its error in the running sum. A refresh takes over.
_MAX_LOG_ABS_DET_STEP = 3.0


class TrackedInverse(nn.Module):
    """A buffer ``R`` that tracks ``A⁻¹``, and a running ``log|det R|``.

    Probes are drawn from a generator of its own, a function of the seed and the number of rounds
    so far: the global random stream is untouched, and a run that is resumed from a state dict
    goes on as if it had not stopped. R is kept in float32 at least, whatever ``A`` is in.

    :param int dim: D.
    :param int num_probes: k, at least 1, of a first round; more than D are not used.
    :param float tolerance: the certificate, in ``(0, 1)``, above which one round is not enough.
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
        #: The latest estimate of ‖I − RA‖_F/√D, measured before the correction that followed it.
        self.certificate = math.nan
        #: What the latest refresh left of it: the rounding level, which grows with A's condition.
        self.rounding_level = 0.0
        self._lookout = Lookout()
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
        self._tracked: TensorState | None = None
        self._tracked_version = -1
        self._offset: Tensor | None = None
        self._value: Tensor | None = None
        self._lookout.forget()

    def training_log_abs_det(self, theta: Tensor) -> Tensor:
        """An estimate of ``log|det A|``, shape ``()``, whose gradient is ``Rᵀ``.

        :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
        """
        value = self.update(theta)
        return with_gradient(value, theta, self.inverse_t, scale=1 / math.sqrt(theta.shape[-1]))

    @torch.no_grad()
    def update(self, theta: Tensor, state: TensorState | None = None) -> Tensor:
        """Bring R up to date with ``A``, once for every change; the value, shape ``()``.

        :param TensorState state: that of ``theta``, if it is at hand.
        :raises torch.linalg.LinAlgError: if ``A`` is singular or not finite.
        """
        if state is None:
            state = TensorState(theta)
        if (
            self._value is not None
            and self._tracked_version == self.inverse_t._version
            and self._tracked == state
        ):
            return self._value
        assert state.fingerprint is not None  # there is none while torch.jit traces
        current = theta.detach().to(self.inverse_t.dtype)
        self._schedule.count_step()
        if self._offset is None and not torch.isfinite(self.log_abs_det_inverse):
            self.refresh(theta)  # an interrupt has left it so
        elif not self._looks_good(state.fingerprint.to(self.inverse_t.dtype)):
            self._correct(theta, current)
        if self._offset is None:
            trace = self.inverse_t.diagonal().sum(dtype=torch.float64)
            self._offset = trace - current.shape[-1] - self.log_abs_det_inverse
        self._value = near_identity.add_trace(self._offset, self.inverse_t, current)
        self._tracked, self._tracked_version = state, self.inverse_t._version
        return self._value

    def _looks_good(self, image: Tensor) -> bool:
        """Whether R may be left as it is, by all that is known without probes.

        :param Tensor image: ``Θ w``, see :class:`~pyro_snf.dense.lookout.Lookout`.
        """
        tolerance = self._attainable_tolerance
        estimate = self._lookout.estimate(self.inverse_t, image, tolerance)
        if estimate is not None:
            if not estimate <= tolerance:
                return False
            self.certificate = estimate
        return not self._lookout.is_due()

    @property
    def _attainable_tolerance(self) -> float:
        """No refresh could do better than the last one did."""
        return max(self.tolerance, 2 * self.rounding_level)

    def _correct(self, theta: Tensor, current: Tensor) -> None:
        """Measure, and bring the error below the tolerance if it is not."""
        tolerance = self._attainable_tolerance
        previous = math.inf
        for doublings in range(_MAX_ROUNDS):
            residual, self.certificate = self._measure(current, self.num_probes * 2**doublings)
            if doublings == 0:
                self._lookout.calibrate(self.certificate)
            if self.certificate <= tolerance:
                return
            if not self.certificate <= previous / 2:  # also where it is NaN
                break
            if doublings == 0 and self._schedule.refresh_pays():
                break
            if not self._update(current, residual):
                break
            self._schedule.count_round()
            if self.certificate <= 2 * tolerance:
                return  # less is left of it
            previous = self.certificate
        self.refresh(theta)

    @torch.no_grad()
    def refresh(self, theta: Tensor) -> None:
        """Recompute R exactly, in O(D³).

        :raises torch.linalg.LinAlgError: if ``A`` is not finite, or singular at the precision of
            its type.
        """
        factors = ExactFactors(near_identity.matrix(theta))
        inverse_t = factors.inverse_t
        self._forget()
        self.log_abs_det_inverse.fill_(math.nan)  # as in _update
        self.inverse_t.copy_(inverse_t)
        self.log_abs_det_inverse.copy_(-factors.log_abs_det)
        self.num_refreshes += 1
        self._schedule.restart()
        current = theta.detach().to(self.inverse_t.dtype)
        _, self.certificate = self._measure(current, self.num_probes)
        self.rounding_level = self.certificate
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
        self._forget()
        self.log_abs_det_inverse.fill_(math.nan)
        self.inverse_t.addmm_((probes @ self.inverse_t.mT).mT, step)
        self.log_abs_det_inverse.copy_(log_abs_det_inverse)
        return True

    def _measure(self, theta: Tensor, num_probes: int) -> tuple[Tensor, float]:
        """The residual ``(EG)ᵀ`` of fresh probes, shape ``(k, D)``, and the certificate."""
        probes = self._draw_probes(num_probes)
        residual = probes - near_identity.multiply(theta, probes) @ self.inverse_t
        return residual, (residual.norm() / probes.norm()).item()

    def _draw_probes(self, num_probes: int) -> Tensor:
        """Fresh Gaussian probes as rows, a function of the seed and the number of rounds."""
        device, dtype = self.inverse_t.device, self.inverse_t.dtype
        generator = torch.Generator(device)
        # Hashed, for torch's generator takes 32 bits on the CPU, and must not repeat the user's.
        words = np.random.SeedSequence([self.seed, self.num_rounds]).generate_state(1)
        generator.manual_seed(int(words[0]))
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
            "rounding_level": self.rounding_level,
            "lookout": self._lookout.state_dict(),
            "schedule": asdict(self._schedule),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.num_rounds = state["num_rounds"]
        self.num_refreshes = state["num_refreshes"]
        self.certificate = state["certificate"]
        self.rounding_level = state["rounding_level"]
        self._schedule = RefreshSchedule(**state["schedule"])
        self._forget()
        self._lookout.load_state_dict(state["lookout"], like=self.inverse_t)

    def __getstate__(self) -> dict[str, Any]:
        # A copy need not trust that R and Θ were copied together.
        state = self.__dict__.copy()
        state.update(_tracked=None, _tracked_version=-1, _offset=None, _value=None)
        return state

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> TrackedInverse:  # .to(), .double(), .bfloat16(), .cuda(), …
        self._forget()

        def keep_precision(tensor: Tensor) -> Tensor:
            if tensor is self.log_abs_det_inverse:
                return tensor.to(fn(tensor).device)  # a sum over all steps stays in float64
            return keep_float32(fn)(tensor)

        return super()._apply(keep_precision, recurse)
