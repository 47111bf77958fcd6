"""An inverse of the dense matrix ``A = I + Θ/√D`` that follows it at O(D²) a step.

``R ≈ A⁻¹`` is a buffer, and ``E = I − RA`` its error. In most steps R is not changed: its error is
only monitored, by a few matrix-vector products (:mod:`pyro_snf.log_dets.residual_monitor`). Where
it exceeds the tolerance, it is measured with k random probes and removed where they found it. With
vectors as columns, as on paper:

1. *Measure.* ``U = EG`` for fresh probes G: k Gaussian ones, and the images ``R g`` of k/2 more.
   The ratio ``‖E g‖/‖g‖`` of the former estimates ``‖E‖_F/√D``, the error of the inverse; that of
   the latter ``‖ER‖_F/‖R‖_F``, the relative error of the gradient.
2. *Subspace iteration.* ``V = orth(EᵀU) = orth(EᵀE G)``: one iteration turns the probes towards the
   largest right singular vectors of E. Few directions dominate an optimizer's step, and so the
   error that it leaves in R: these probes remove most of it, random ones a share k/D.
3. *Block Broyden update*, the "good" one. With ``P = RAV`` and ``M = VᵀP``,

       R₊ = R + (V − P) M⁻¹ VᵀR,      so that      R₊ A V = V:

   nothing is left of the error in the span of V, and ``R⁻¹`` has moved to ``A`` by a projection.
4. *Determinant*, by the determinant lemma:

       det R₊ = det R · det(I + M⁻¹Vᵀ(V − P)) = det R · det(VᵀV) / det M,      VᵀV = I.

And in every step:

5. *Value.* ``log|det A| = −log|det R| + log|det(I − E)| ≈ −log|det R| − tr E``, where the trace is
   ``D − ⟨Rᵀ, A⟩``, exact in O(D²). The rest is of second order: ``tr(E²)/2``.

Where one update is not enough (a high learning rate, a checkpoint), more follow, each with twice
the probes. Where they do not halve the error, where the weights were edited, and where updates have
cost four times as much as it, R is made exact by a *refactorization* in O(D³).

A GPU is waited for by refactorizations only. Whether R needs an update, and how large a one, is
decided by the error of the step before, as the monitor says: R lags by one step where the error
grows all at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_snf.caching import TensorState, fingerprint_of, version
from pyro_snf.extra_state import SavesAttributes, saved_count, saved_number, saved_record
from pyro_snf.log_dets.residual_monitor import InverseError, ResidualMonitor, measure_error
from pyro_snf.maps.base import LinearMap
from pyro_snf.maps.dense import Dense
from pyro_snf.precision import at_least_float32, keep_float32, singular
from pyro_snf.probes import ProbeStream
from pyro_snf.surrogate import Surrogate

__all__ = ["TrackedInverse"]

# An error below this share of its limit needs no correction even after an external change. One
# check could miss a direction in which A is singular; a larger share would tolerate that.
_NEGLIGIBLE = 0.05

# Updates at one step. Each has twice the probes of the one before; more would cost as much as a
# refactorization.
_MAX_UPDATES_AT_ONCE = 4

# An error up to this many times its limit gets one update. What that leaves is seen at the next
# step.
_MODERATE_ERROR = 2.0

# On a GPU, the share of its limit from which the error of the step before gets an update.
_EXPECTED_ERROR = 0.5

# The largest ‖I − RA‖_F/√D that a step of training may leave, at a high learning rate. A loaded R
# of a larger one is not that of the loaded weight; a smaller one is left to the next check, so that
# a resumed run repeats.
_MAX_LOADED_ERROR = 0.2

# Nats by which a loaded log|det R| may be off, besides what an R that is not exact accounts for.
_MAX_LOADED_DIFFERENCE = 0.1

# After updates that have cost this many times as much as a refactorization, R is refactorized.
# Updates last long where an optimizer leaves the error in few directions. Where it is spread over
# all of them (noisy gradients, a high learning rate), a refactorization lasts longer; the budget
# bounds what the updates waste then.
_UPDATE_BUDGET = 4

# Changes that R has followed exactly until it is checked.
_FOLLOWED_UNTIL_CHECK = 64

_LOADED = (
    "the loaded inverse_t or log_abs_det_inverse is not that of the loaded weight; both are "
    "computed anew"
)

# An update that changes log|det R| by more than this has met a nearly singular matrix. Rounding
# dominates it, and would stay in the running sum.
_MAX_LOG_ABS_DET_STEP = 3.0


@dataclass
class _Known:
    """Numbers that are valid as long as neither R nor Θ changes."""

    state: TensorState | None = None  # of Θ
    versions: tuple[int, ...] | None = None  # of R and log|det R|
    contents: tuple[Tensor, ...] = ()  # theirs, to be compared with where the versions differ
    offset: Tensor | None = None  # tr R − D − log|det R|, valid for any Θ
    value: Tensor | None = None


class TrackedInverse(SavesAttributes):
    """A buffer ``R`` that tracks ``A⁻¹``, and a running ``log|det R|``.

    R is kept in float32 at least, whatever ``A`` is in.

    :param LinearMap linear_map: copies of A, as a function of a parameter.
    :param Tensor theta: the parameter, for its shape, device and dtype.
    :param int num_probes: k, at least 1, of a measurement; more than D are not used.
    :param float tolerance: the relative error of the gradient, in ``(0, 1)``, above which R is
        corrected.
    :param seed: of the probes; see :class:`~pyro_snf.probes.ProbeStream`.
    """

    saved_attributes: ClassVar = {
        "num_refactorizations": saved_count,
        "num_updates": saved_count,
        "error_estimate": saved_number,
        "rounding": saved_record(dict.fromkeys(InverseError._fields, saved_number)),
        "monitor": saved_record(ResidualMonitor.SAVED),
    }

    inverse_t: Tensor  # Rᵀ: in A's own layout, it is added to A's gradient as it stands.
    fingerprint: Tensor
    log_abs_det_inverse: Tensor  # log|det R|; in float64, for it is a sum over all steps.

    def __init__(
        self,
        linear_map: LinearMap,
        theta: Tensor,
        *,
        num_probes: int,
        tolerance: float,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.linear_map = linear_map
        # A's own map, or that of the matrix which A consists of copies of.
        self.matrix_map = linear_map if isinstance(linear_map, Dense) else Dense()
        dim, device = len(theta), theta.device
        self.num_probes = min(num_probes, dim)
        self.tolerance = tolerance
        self.probes = ProbeStream(seed, device=device)
        # A refactorization costs as much as so many updates, which are about nine thin products.
        refactorization_cost = 3 + dim / (12 * self.num_probes)
        self._max_updates = round(_UPDATE_BUDGET * refactorization_cost)
        self.register_buffer(
            "inverse_t", at_least_float32(torch.empty_like(self._matrix_of(theta)))
        )
        self.register_buffer(
            "log_abs_det_inverse", torch.empty((), device=device, dtype=torch.float64)
        )
        # Θ w at the latest step, up to date when it is saved; NaN if there was none. A buffer, not
        # a plain value: in a checkpoint that is loaded in place, the latter may not vary in length.
        unknown = torch.empty(dim, device=device, dtype=self.inverse_t.dtype)
        self.register_buffer("fingerprint", unknown)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R = I, the inverse for Θ = 0."""
        self.inverse_t.copy_(self.matrix_map.identity(self.inverse_t))
        self.log_abs_det_inverse.zero_()
        self.fingerprint.fill_(math.nan)
        #: Exact O(D³) refactorizations so far.
        self.num_refactorizations = 0
        #: Updates since the last one.
        self.num_updates = 0
        #: The latest estimate of ‖I − RA‖_F/√D, from before the correction that may have followed.
        self.error_estimate = math.nan
        # The error that the latest refactorization left: rounding, which grows with A's condition.
        self._rounding = InverseError(0.0, 0.0)
        # Whether a change of R was interrupted, and whether it was loaded and not checked since.
        self._is_changing = self._is_loaded = False
        self._forget()

    def _forget(self) -> None:
        """Drop what is known of R's error: the next use checks."""
        self._known = _Known()
        self._monitor = ResidualMonitor(self.matrix_map)

    def update(self, theta: Tensor, event_shape: torch.Size, state: TensorState) -> Surrogate:
        """Bring R up to date with A, once for every change of it.

        :param Tensor theta: the map's parameter.
        :param TensorState state: that of the parameter.
        :return: the value and its gradient in θ.
        :raises torch.linalg.LinAlgError: if A is singular or not finite.
        """
        value, gradient = self._log_abs_det(self._matrix_of(theta), state), self.inverse_t
        scale = self.linear_map.theta_scale(theta)
        if theta.dim() == 2:
            return Surrogate(value, gradient, scale)
        copies = event_shape.numel() // len(theta)
        return Surrogate(copies * value, gradient.view_as(theta), copies * scale)

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        """R, of the parameter's shape."""
        return self.inverse_t.mT.reshape(theta.shape)

    @torch.no_grad()
    def multiply_input(self, theta: Tensor, left: Tensor, right: Tensor) -> None:
        """Follow ``A ← A (I + P Qᵀ)`` exactly, by Woodbury's formula and the determinant lemma:

            R ← R − P S⁻¹ (Qᵀ R),      det R ← det R / det S,      S = I + Qᵀ P.

        :param Tensor theta: the map's parameter after the change.
        :param Tensor left: ``Pᵀ``, shape ``(r, D)``.
        :param Tensor right: ``Qᵀ``, shape ``(r, D)``.
        """
        inverse_t = self.inverse_t
        left, right = left.to(inverse_t.dtype), right.to(inverse_t.dtype)
        small = (right @ left.mT).double()
        small.diagonal().add_(1)
        step = torch.linalg.solve_ex(small.mT, left.double()).result.to(inverse_t.dtype)  # S⁻ᵀ Pᵀ
        log_abs_det_inverse = self.log_abs_det_inverse - torch.linalg.slogdet(small).logabsdet
        with self._changing_to(log_abs_det_inverse):
            product = self.matrix_map.apply_weight(inverse_t, right)  # (Rᵀ Q)ᵀ
            self.matrix_map.add_product(inverse_t, product, step, alpha=-1)
        self._has_followed(theta)

    @torch.no_grad()
    def scale_output(self, theta: Tensor, log_factors: Tensor) -> None:
        """Follow ``A ← diag(e^c) A`` exactly.

        :param Tensor theta: the map's parameter after the change.
        :param Tensor log_factors: c, shape ``(D,)``.
        """
        log_factors = log_factors.to(self.inverse_t.dtype)
        log_abs_det_inverse = self.log_abs_det_inverse - log_factors.sum(dtype=torch.float64)
        with self._changing_to(log_abs_det_inverse):
            factors = torch.exp(-log_factors)
            self.inverse_t.copy_(self.matrix_map.scale_rows(self.inverse_t, factors))
        self._has_followed(theta)

    @contextmanager
    def _changing_to(self, log_abs_det_inverse: Tensor) -> Iterator[None]:
        """A context in which R changes, and after which ``log|det R|`` is this.

        After an interrupt (Ctrl-C) between the two, the next use refactorizes; a state that is
        saved in between has a NaN.
        """
        self._known = _Known()
        self._is_changing = True
        self.log_abs_det_inverse.fill_(math.nan)
        yield
        self.log_abs_det_inverse.copy_(log_abs_det_inverse)
        self._is_changing = False

    def _has_followed(self, theta: Tensor) -> None:
        """R is the inverse for this θ, up to rounding, which accumulates: check now and then."""
        fingerprint = TensorState(self._matrix_of(theta)).fingerprint
        assert fingerprint is not None
        self._monitor.follow(fingerprint.to(self.inverse_t.dtype))
        if self._monitor.num_followed % _FOLLOWED_UNTIL_CHECK == 0:
            matrix = self._matrix_of(theta)
            self._correct_if_needed(matrix, matrix.to(self.inverse_t.dtype))

    def _matrix_of(self, theta: Tensor) -> Tensor:
        """Θ, shape ``(D, D)``."""
        matrix = self.linear_map.matrix_of(theta)
        assert matrix is not None
        return matrix

    def _log_abs_det(self, theta: Tensor, state: TensorState) -> Tensor:
        """The estimate of ``log|det A|``, shape ``()``, by an R that is up to date."""
        if _is_shared(self.inverse_t):
            self._leave_shared_memory()
        inverse_t, known = self.inverse_t, self._known
        is_own = self._is_as_known()
        if is_own and self._is_same_theta(state):
            assert known.value is not None
            return known.value
        assert state.fingerprint is not None  # there is none while torch.jit traces
        if not is_own:  # R has been written to from outside
            self._forget()
        current = theta.detach().to(inverse_t.dtype)
        monitor = self._monitor
        has_moved = monitor.observe(state.fingerprint.to(inverse_t.dtype), state.version)
        try:
            is_valid = is_own and not self._is_changing
            if is_valid and self._is_loaded and not self._is_inverse_of(theta, current):
                warnings.warn(_LOADED, RuntimeWarning, stacklevel=2)
                is_valid = False
            if not is_valid:
                self._refactorize(theta)
            elif has_moved and monitor.is_check_due():
                self._correct_if_needed(theta, current)
        except torch.linalg.LinAlgError:
            self._forget()  # the next use checks R again
            raise
        self._is_loaded = False
        known = self._known  # another one, if R has changed
        if known.offset is None:
            trace = self.matrix_map.trace(inverse_t)
            offset = trace - len(inverse_t) - self.log_abs_det_inverse
            known.offset = offset.to(inverse_t.dtype)
            known.contents = self._contents()
        known.versions = self._versions()
        known.value, known.state = self._add_trace(known.offset, current), state
        return known.value

    def _versions(self) -> tuple[int, ...]:
        return version(self.inverse_t), version(self.log_abs_det_inverse)

    def _contents(self) -> tuple[Tensor, ...]:
        return fingerprint_of(self.inverse_t), fingerprint_of(self.log_abs_det_inverse)

    def _is_as_known(self) -> bool:
        """Whether nothing else has changed R or log|det R| since they were last used.

        Such as DistributedDataParallel writes them, with their own contents, in every step.
        """
        known = self._known
        if known.versions in (None, self._versions()):
            return True
        return all(map(torch.equal, self._contents(), known.contents))

    def _is_same_theta(self, state: TensorState) -> bool:
        known = self._known.state
        # To compare contents would be to wait for a GPU.
        return known is state or (not self.inverse_t.is_cuda and known == state)

    def _leave_shared_memory(self) -> None:
        """Take copies that no other process writes to: each of them follows Θ by itself."""
        self.inverse_t = self.inverse_t.clone()
        self.log_abs_det_inverse = self.log_abs_det_inverse.clone()
        self._forget()

    @torch.no_grad()
    def _is_inverse_of(self, theta: Tensor, current: Tensor) -> bool:
        """Whether R, and log|det R|, are those of A: the former by products, the latter in O(D³).

        :raises torch.linalg.LinAlgError: if A is singular or not finite.
        """
        error = self._monitor.look(self.inverse_t, current)
        exact = self.matrix_map.factorize(theta, theta.shape[:1]).log_abs_det
        trace = self.matrix_map.trace(self.inverse_t) - len(current)
        value = self._add_trace(trace - self.log_abs_det_inverse, current)
        second_order = len(current) * error.inverse**2
        difference = abs((value - exact).item())
        return (
            error.inverse <= _MAX_LOADED_ERROR
            and difference <= _MAX_LOADED_DIFFERENCE + second_order
        )

    def _add_trace(self, offset: Tensor, theta: Tensor) -> Tensor:
        """``offset + tr(R Θ)/√D``, exactly and in O(D²); with tr R in the offset, ``tr(R A)``.

        The identity's share is summed apart: next to D ones, a running sum in float32 over D²
        products with Θ would lose the small ones.

        :param Tensor offset: shape ``()``.
        """
        product = self.matrix_map.inner(self.inverse_t, theta)
        return torch.add(offset, product, alpha=self.matrix_map.theta_scale(theta))

    def _limits(self) -> InverseError:
        """The error up to which R is not corrected."""
        # One direction in which A is singular is an error of 1/√D. And no refactorization could do
        # better than the last one did.
        one_direction = 0.9 / math.sqrt(len(self.inverse_t))
        return InverseError(
            inverse=max(one_direction, 2 * self._rounding.inverse),
            gradient=max(self.tolerance, 2 * self._rounding.gradient),
        )

    @torch.no_grad()
    def _correct_if_needed(self, theta: Tensor, current: Tensor) -> None:
        limits = self._limits()
        error = self._monitor.check(self.inverse_t, current, limits)
        size = error.relative_to(limits)
        if self._monitor.is_external_change and not size <= _NEGLIGIBLE:
            self._refactorize(theta)
        elif self._monitor.lags(self.inverse_t):
            self.error_estimate = error.inverse
            left = self._monitor.error_after_update()
            if left is not None and not left.relative_to(limits) <= max(1, size / 2):
                self._refactorize(theta)
            elif not size <= _EXPECTED_ERROR:
                self._correct_as_before(theta, current, size)
        elif size <= 1:
            self.error_estimate = error.inverse
        else:
            self._correct(theta, current, limits)

    def _correct_as_before(self, theta: Tensor, current: Tensor, size: float) -> None:
        """One update, for an error as in the step before; the next step sees what it has done.

        :param float size: that error, in units of its limit.
        """
        doublings = max(0, math.ceil(math.log2(size))) if math.isfinite(size) else math.inf
        if doublings >= _MAX_UPDATES_AT_ONCE or self.num_updates >= self._max_updates:
            self._refactorize(theta)
        else:
            residual, _ = self._residuals(current, self.num_probes * 2 ** int(doublings))
            self._update(current, residual)
            self._monitor.check_update(self.inverse_t, current)

    def _correct(self, theta: Tensor, current: Tensor, limits: InverseError) -> None:
        """Measure the error, and bring it below the limits if it is not."""
        previous = math.inf
        for count in range(_MAX_UPDATES_AT_ONCE):
            residual, error = self._measure(current, self.num_probes * 2**count)
            self.error_estimate = error.inverse
            size = error.relative_to(limits)
            if size <= 1:
                if count == 0:
                    self._monitor.plan_next_check(error, limits)
                return
            is_reduced = size <= previous / 2  # False also for NaN
            if not is_reduced or self.num_updates >= self._max_updates:
                break
            if not self._update(current, residual):
                break
            self._monitor.reset()
            if size <= _MODERATE_ERROR:
                return
            previous = size
        self._refactorize(theta)

    def refactorize(self, theta: Tensor) -> None:
        """Recompute R exactly, in O(D³).

        :raises torch.linalg.LinAlgError: if A is not finite, or singular at the precision of its
            type.
        """
        self._refactorize(self._matrix_of(theta))

    @torch.no_grad()
    def _refactorize(self, theta: Tensor) -> None:
        factors = self.matrix_map.factorize(theta, theta.shape[:1])
        inverse_t = factors.gradient
        with self._changing_to(-factors.log_abs_det):
            self.inverse_t.copy_(inverse_t)
        self.num_refactorizations += 1
        self.num_updates = 0
        self._monitor.reset()
        current = theta.detach().to(self.inverse_t.dtype)
        _, self._rounding = self._measure(current, self.num_probes)
        self.error_estimate = self._rounding.inverse
        if not self.error_estimate < 1:
            raise singular(
                f"the weight is numerically singular in {current.dtype}: its computed inverse R "
                f"leaves ‖I − RW‖_F/√D = {self.error_estimate:.2g}"
            )

    def _update(self, theta: Tensor, residual: Tensor) -> Tensor:
        """Update R once (steps 2 to 4 of the module's text); whether that was possible.

        :param Tensor residual: ``(EG)ᵀ``, as measured.
        :return: a boolean, shape ``()``. Where it is False, R stays as it is.
        """
        # Rows instead of columns from here on: residual = Uᵀ, basis = Vᵀ, image = Pᵀ.
        matrix_map, inverse_t = self.matrix_map, self.inverse_t
        turned = residual - matrix_map.multiply_transposed(
            theta, matrix_map.apply_weight(inverse_t, residual)
        )
        basis, factor = torch.linalg.qr(turned.mT)
        # Where the residuals are linearly dependent, as after Adam's first step from Θ = 0, which
        # is a matrix of signs, the rest of the basis is rounding. An update along it would be
        # valid, but not the same for another order of a sum, as in another number of processes.
        lengths = factor.diagonal().abs()
        is_known = lengths > math.sqrt(torch.finfo(lengths.dtype).eps) * lengths.max()
        basis = basis.mT * is_known.unsqueeze(-1)
        products = matrix_map.multiply(theta, basis)
        image = matrix_map.apply_weight(inverse_t, products, transposed=True)
        middle = basis @ image.mT  # M
        middle.diagonal().add_(~is_known)
        log_abs_det_middle = torch.linalg.slogdet(middle.double()).logabsdet
        is_usable = log_abs_det_middle.abs() < _MAX_LOG_ABS_DET_STEP
        step = torch.linalg.solve_ex(middle.mT, basis - image).result  # M⁻ᵀ (V − P)ᵀ
        step = torch.where(is_usable, step, 0)
        log_abs_det_inverse = self.log_abs_det_inverse - torch.where(
            is_usable, log_abs_det_middle, 0
        )
        with self._changing_to(log_abs_det_inverse):
            matrix_map.add_product(inverse_t, matrix_map.apply_weight(inverse_t, basis), step)
        self.num_updates += 1
        return is_usable

    def _measure(self, theta: Tensor, num_probes: int) -> tuple[Tensor, InverseError]:
        """The residuals ``(EG)ᵀ`` of fresh Gaussian probes, and the error; see measure_error."""
        residual, numbers = self._residuals(theta, num_probes)
        return residual, InverseError(*numbers.tolist())

    def _residuals(self, theta: Tensor, num_probes: int) -> tuple[Tensor, Tensor]:
        """The residuals of :meth:`_measure`, and the numbers of its error as a tensor."""
        device, dtype = self.inverse_t.device, self.inverse_t.dtype
        generator = self.probes.next_generator(device)
        dim = len(self.inverse_t)
        count = min(num_probes, dim)
        # Images of directions of their own: where R is near the identity, those of the probes would
        # be the probes again, and an update would fill their places with rounding errors.
        probes, sources = (
            torch.randn(rows, dim, generator=generator, device=device, dtype=dtype)
            for rows in (count, (count + 1) // 2)
        )
        return measure_error(self.inverse_t, theta, probes, sources, self.matrix_map)

    @property
    def rounding(self) -> dict[str, float]:
        """The error that the latest refactorization left, as plain values."""
        return self._rounding._asdict()

    @rounding.setter
    def rounding(self, value: dict[str, float]) -> None:
        self._rounding = InverseError(**value)

    @property
    def monitor(self) -> dict[str, Any]:
        """The state of the monitor, as plain values."""
        return self._monitor.state_dict()

    @monitor.setter
    def monitor(self, value: dict[str, Any]) -> None:
        self._monitor.load_state_dict(value)

    def _save_to_state_dict(self, *args: Any) -> None:
        latest = self._monitor.fingerprint
        self.fingerprint.fill_(math.nan) if latest is None else self.fingerprint.copy_(latest)
        super()._save_to_state_dict(*args)

    def set_extra_state(self, state: Any) -> None:
        self._forget()
        self._is_loaded = True
        super().set_extra_state(state)
        loaded = self.fingerprint  # torch loads buffers first
        self._monitor.fingerprint = None if loaded.isnan().any() else loaded.clone()

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not rely on R and Θ having been copied together.
        return {**self.__dict__, "_known": _Known()}

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> TrackedInverse:  # .to(), .double(), .bfloat16(), .cuda(), …
        self._forget()

        def keep_precision(tensor: Tensor) -> Tensor:
            if tensor is self.log_abs_det_inverse:
                moved = fn(tensor)  # a sum over all steps stays in float64
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            return keep_float32(fn)(tensor)

        return super()._apply(keep_precision, recurse)


def _is_shared(tensor: Tensor) -> bool:
    """Whether other processes may write to a tensor's memory, after ``share_memory()`` say."""
    return not tensor.is_cuda and tensor.is_shared()
