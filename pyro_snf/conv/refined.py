"""The log-determinant of a convolution that moves, from a reference that stands still.

Let P be a map whose ``log|det P|`` and whose inverse are known. For every kernel ``a`` then::

    log|det J| = log|det P| + tr log(J P⁻¹)
               = log|det P| + [tr(P⁻¹ J) − D] + tr(log(I + E) − E),        E = J P⁻¹ − I,
    ∂ log|det J|/∂a = ∂ tr(P⁻¹ J)/∂a + tr((J⁻¹ − P⁻¹) ∂J/∂a).

J is linear in ``a``, so that the middle term of the value is ``⟨G, a⟩ − D`` with
``G = ∂ tr(P⁻¹ J)/∂a``, which is known too. What is left is of second order in E for the value, of
first order for the gradient, and is estimated by k random probes v (Hutchinson, 1989)::

    tr(log(I + E) − E)    = E[vᵀ (log(J P⁻¹) − J P⁻¹ + I) v],
    tr((J⁻¹ − P⁻¹) ∂J)    = E[vᵀ ∂J (u − P⁻¹ v)],        J u = v.

One Krylov space a probe, preconditioned by P, gives both (:mod:`~pyro_snf.krylov`). The probes
see nothing but the difference of J and P: that is what keeps their noise down. So P is chosen to be

- J itself as it was some steps ago, factorized (:class:`~pyro_snf.conv.exact.ConvFactors`). Its
  inverse is exact, E is small, two or three iterations do, and the error of a value dies with the
  next reference;
- where that would cost too much (many channels on large images, zeros beyond the edges): the
  convolution on a torus, whose factors are cheap. E is confined to the edges then, but not small.

Either is made anew when the kernel has moved away from it.

The paper's learned kernel, which this replaces, is a P⁻¹ that has to be trained, whose determinant
is not known, and whose window is too small for a kernel of a condition number of 100.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.caching import TensorState
from pyro_snf.conv.exact import ConvFactors, factorization_flops
from pyro_snf.conv.kernels import (
    convolve,
    flip,
    kernel_gradient,
    multiplicity,
    near_identity,
    theta_scale,
)
from pyro_snf.krylov import krylov
from pyro_snf.precision import at_least_float32, check_finite, keep_float32
from pyro_snf.probes import draw_probes, probe_generator
from pyro_snf.surrogate import with_gradient

__all__ = ["RefinedLogDet", "torus_gradient"]

# ‖(J − P)P⁻¹V‖/‖V‖ up to which a reference serves. The probes' noise grows with its square.
_MAX_DRIFT = 0.05

# |λ| of J P⁻¹ down to which a reference serves. Below it J has lost a direction that P has, few of
# the probes see it, and its logarithm is more than they can tell.
_MIN_EIGENVALUE = 0.1

# Factors of J itself are made every ten or twenty steps, for which they may cost so many times what
# a convolution of the probes does.
_MAX_COST = 400.0


@dataclass(frozen=True)
class _Reference:
    """P, and what is known of it."""

    factors: ConvFactors
    is_exact: bool
    """Whether P is the J of the reference's kernel, and not its likeness on a torus."""
    gradient: Tensor
    """``G = ∂ tr(P⁻¹ J)/∂a``, shape ``(C, C, kh, kw)``, in float64."""
    value: Tensor
    """``log|det P| + ⟨G, a⟩ − D`` for the reference's own a, shape ``()``, in float64."""


def torus_gradient(factors: ConvFactors, padding_mode: str) -> Tensor:
    """``∂ tr(P⁻¹ J)/∂a`` for P on a torus and J with other padding, shape ``(C, C, kh, kw)``.

    As for a learned kernel, ``flip(r) ⊙ m``.
    """
    size = (factors.kernel.shape[-2], factors.kernel.shape[-1])
    inverse = flip(factors.inverse_kernel(size))
    count = multiplicity(size, factors.image_size, padding_mode, inverse.dtype, inverse.device)
    return inverse * count


class RefinedLogDet(nn.Module):
    """``log|det J|`` of a kernel ``a = δ + θ/√(C kh kw)`` and its gradient, by a reference.

    :param int channels: C.
    :param kernel_size: ``(kh, kw)``.
    :param str padding_mode: as in :func:`~pyro_snf.conv.kernels.convolve`.
    :param int num_probes: k, at least 1.
    :param float tolerance: of the solves' residuals ``‖v − J u‖/‖v‖``.
    :param int max_iterations: of a solve.
    :param int seed: of the probes.
    """

    kernel: Tensor  # that of the reference; in float32 at least

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        *,
        padding_mode: str,
        num_probes: int,
        tolerance: float,
        max_iterations: int,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.num_probes = num_probes
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.seed = seed
        #: References made so far.
        self.num_refreshes = 0
        #: Batches of probes drawn so far.
        self.num_draws = 0
        #: The latest solves' residual, the root mean square of ``‖v − J u‖/‖v‖``.
        self.certificate = math.nan
        #: The images' size (H, W) that the reference is for; None before the first.
        self.image_size: tuple[int, int] | None = None
        zero = torch.zeros(channels, channels, *kernel_size, device=device, dtype=dtype)
        self.register_buffer("kernel", at_least_float32(near_identity(zero)))
        self._has_warned = False
        self._forget()

    def _forget(self) -> None:
        """Not to know what follows from the state; the next use finds out."""
        self._reference: _Reference | None = None
        self._memory: tuple[TensorState, tuple[int, int], Tensor, Tensor] | None = None

    def training_log_abs_det(self, theta: Tensor, images: Tensor) -> Tensor:
        """An estimate of ``log|det J|``, shape ``(B,)``, with the estimate of its gradient.

        :raises torch.linalg.LinAlgError: if the reference to be made is singular or not finite.
        """
        value, gradient = self.update(theta, (images.shape[-2], images.shape[-1]))
        value = with_gradient(value, theta, gradient, scale=theta_scale(theta))
        return value.expand(len(images))

    @torch.no_grad()
    def update(self, theta: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The value, shape ``()``, and the gradient in a, once for every change of θ."""
        state = TensorState(theta)
        if self._memory is not None and self._memory[:2] == (state, image_size):
            return self._memory[2:]
        kernel = near_identity(theta.detach().to(self.kernel.dtype))
        check_finite(kernel)
        if image_size != self.image_size:
            self._refresh(kernel, image_size)
        value, gradient = self._evaluate(kernel, image_size)
        value, gradient = value.to(kernel), gradient.to(kernel)
        self._memory = (state, image_size, value, gradient)
        return value, gradient

    def refresh(self, theta: Tensor) -> None:
        """Make the reference anew, for images of the size of the latest. Else nothing to do."""
        if self.image_size is not None:
            self._refresh(near_identity(theta.detach().to(self.kernel.dtype)), self.image_size)

    def _evaluate(self, kernel: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        reference = self._current_reference(kernel)
        change = kernel - reference.factors.kernel
        if reference.is_exact and not change.any():
            self.certificate = 0.0
            return reference.value, reference.gradient
        probes = self._draw_probes(image_size)
        start = reference.factors.solve(probes)
        size = torch.linalg.vector_norm(probes)
        drift = torch.linalg.vector_norm(convolve(start, change, self.padding_mode))
        if not drift <= _MAX_DRIFT * size:
            reference = self._refresh(kernel, image_size)
            if reference.is_exact:
                return self._evaluate(kernel, image_size)
            change = torch.zeros_like(kernel)
            start = reference.factors.solve(probes)
        space = krylov(
            lambda images: convolve(images, kernel, self.padding_mode),
            reference.factors.solve,
            probes,
            preconditioned=start,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.certificate = space.residual.square().mean().sqrt().item()
        has_converged = self.certificate <= self.tolerance
        if reference.is_exact:
            if not (has_converged and space.smallest_eigenvalue >= _MIN_EIGENVALUE):
                self._refresh(kernel, image_size)
                return self._evaluate(kernel, image_size)
        elif not has_converged:
            self._warn()
        first_order = (reference.gradient * change).sum()
        second_order = space.second_order_log().mean().to(first_order)
        correction = kernel_gradient(
            space.solution - start, probes, (kernel.shape[-2], kernel.shape[-1]), self.padding_mode
        )
        gradient = reference.gradient + correction / len(probes)
        return reference.value + first_order + second_order, gradient

    def _current_reference(self, kernel: Tensor) -> _Reference:
        if self._reference is None:
            assert self.image_size is not None
            try:
                self._reference = self._make_reference(self.kernel, self.image_size)
            except torch.linalg.LinAlgError:
                # A state from elsewhere, or a kernel that is singular in its new dtype.
                return self._refresh(kernel, self.image_size)
        return self._reference

    @torch.no_grad()
    def _refresh(self, kernel: Tensor, image_size: tuple[int, int]) -> _Reference:
        reference = self._make_reference(kernel, image_size)
        self._forget()
        self.kernel.copy_(kernel)
        self.image_size = image_size
        self._reference = reference
        self.num_refreshes += 1
        return reference

    def _make_reference(self, kernel: Tensor, image_size: tuple[int, int]) -> _Reference:
        size = (kernel.shape[-2], kernel.shape[-1])
        pixels = image_size[0] * image_size[1]
        cost = factorization_flops(size, len(kernel), image_size, self.padding_mode)
        convolution = 2 * self.num_probes * kernel.numel() * pixels
        is_exact = self.padding_mode == "circular" or cost <= _MAX_COST * convolution
        with torch.inference_mode(False):  # for use outside it too
            kernel = kernel.clone()  # the factors' own
            factors = ConvFactors(kernel, image_size, self.padding_mode if is_exact else "circular")
            value = factors.log_abs_det.double()
            if is_exact:
                gradient = factors.kernel_gradient.double()
            else:
                gradient = torus_gradient(factors, self.padding_mode).double()
                value = value + (gradient * kernel).sum() - len(kernel) * pixels
        return _Reference(factors, is_exact, gradient, value)

    def _draw_probes(self, image_size: tuple[int, int]) -> Tensor:
        """Fresh probes of random signs, which have the least noise in a trace."""
        generator = probe_generator(self.seed, self.num_draws, self.kernel.device)
        self.num_draws += 1
        shape = (len(self.kernel), *image_size)
        return draw_probes("rademacher", self.num_probes, shape, generator, self.kernel.dtype)

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the solves for the gradient of log|det J| left a relative residual of "
                f"{self.certificate:.2g} after {self.max_iterations} iterations, above the "
                f"tolerance of {self.tolerance:.2g}; the layer's certificate has the latest one",
                RuntimeWarning,
                stacklevel=2,
            )

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_refreshes": self.num_refreshes,
            "num_draws": self.num_draws,
            "certificate": self.certificate,
            "image_size": self.image_size,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.num_refreshes = state["num_refreshes"]
        self.num_draws = state["num_draws"]
        self.certificate = state["certificate"]
        self.image_size = state["image_size"]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reference": None, "_memory": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RefinedLogDet:
        self._forget()
        return super()._apply(keep_float32(fn), recurse)
