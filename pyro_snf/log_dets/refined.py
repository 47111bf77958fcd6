"""Log-determinants from what was known some steps ago, with a measured error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_snf.caching import TensorState
from pyro_snf.log_dets.base import LogDetMethod
from pyro_snf.log_dets.control_variate_log_det import ControlVariateLogDet
from pyro_snf.log_dets.tracked_inverse import TrackedInverse
from pyro_snf.maps.base import LinearMap
from pyro_snf.options import as_count, as_number, as_seed, expect
from pyro_snf.surrogate import Solver, Surrogate

__all__ = ["Refined"]

_KRYLOV_STEPS = 20


class Refined(LogDetMethod):
    r"""An estimate of :math:`\log|\det A|`, and its gradient, from what was known of A some steps
    ago: ``log_det="refined"``, the default.

    - For a matrix, dense or of a 1 × 1 convolution: an inverse R is tracked
      (:mod:`pyro_snf.log_dets.tracked_inverse`). The value is right to second order in
      :math:`E = I - RA`, the gradient :math:`R^\top` to first order. O(D²) a step.
    - For any other convolution: an earlier A is factorized, and random probes estimate what has
      changed since (:mod:`pyro_snf.log_dets.control_variate_log_det`). Most steps take one
      convolution of the probes.

    Both measure their error, :attr:`error_estimate`, and factorize again where it grows,
    :attr:`num_refactorizations`. Probes are drawn from generators of the layer's own, whose state
    is saved: the global random stream stays as it is, and a resumed run repeats.

    >>> layer = SelfNormalizingLinear(3, log_det=Refined(tolerance=0.01))

    :param int num_probes: k, of a measurement or a step.
    :param float tolerance: in (0, 1). For a matrix: the relative error of the gradient above which
        R is corrected. Otherwise: of the residuals of the probes' solves.
    :param krylov_steps: the most in a solve, 20 by default. A matrix has no such solves, and takes
        None only.
    :param seed: of the probes, an integer from 0. By default one is drawn from torch's global
        random stream when a layer is made, so that no two layers share their probes.
    :raises ValueError: for options that are not of these.
    """

    inverses = ("iterative", "exact", "one_pass")
    has_surrogate = True

    def __init__(
        self,
        *,
        num_probes: int = 8,
        tolerance: float = 0.02,
        krylov_steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_probes = as_count("num_probes", num_probes)
        self.tolerance = as_number("tolerance in (0, 1)", tolerance, lambda number: 0 < number < 1)
        self.krylov_steps = None if krylov_steps is None else as_count("krylov_steps", krylov_steps)
        self.seed = as_seed(seed)
        #: The state, a TrackedInverse or a ControlVariateLogDet; None before :meth:`setup`.
        self.estimator: Any = None

    def setup(self, linear_map: LinearMap, theta: Tensor) -> None:
        super().setup(linear_map, theta)
        options: dict[str, Any] = {
            "num_probes": self.num_probes,
            "tolerance": self.tolerance,
            "seed": self.seed,
        }
        if linear_map.matrix_of(theta) is None:
            steps = self.krylov_steps or _KRYLOV_STEPS
            self.estimator = ControlVariateLogDet(linear_map, theta, krylov_steps=steps, **options)
        else:
            expected = "no krylov_steps for a dense or 1 × 1 layer, which tracks its inverse"
            expect(expected, self.krylov_steps is None, self.krylov_steps)
            self.estimator = TrackedInverse(linear_map, theta, **options)

    def extra_repr(self) -> str:
        options = f"num_probes={self.num_probes}, tolerance={self.tolerance}"
        for name in ("krylov_steps", "seed"):
            value = getattr(self, name)
            options += "" if value is None else f", {name}={value}"
        return options

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: TensorState) -> Surrogate:
        return self.estimator.update(theta, x.shape[1:], state)

    def score_solver(
        self, theta: Tensor, event_shape: torch.Size, state: TensorState, *, is_training: bool
    ) -> Solver:
        if is_training and self.follows_inverse(theta):
            self.estimator.update(theta, event_shape, state)
            return self.one_pass_solver(theta, event_shape)
        return super().score_solver(theta, event_shape, state, is_training=is_training)

    def follows_inverse(self, theta: Tensor) -> bool:
        return self.linear_map.matrix_of(theta) is not None

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        return self.estimator.inverse_weight(theta, event_shape)

    @property
    def error_estimate(self) -> float:
        """For a matrix ``‖I − RA‖_F/√D``, otherwise the probes' root mean square residual.

        NaN before the first estimate.
        """
        return math.nan if self.estimator is None else self.estimator.error_estimate

    @property
    def num_refactorizations(self) -> int:
        return 0 if self.estimator is None else self.estimator.num_refactorizations

    def refactorize(self, theta: Tensor) -> None:
        self.estimator.refactorize(theta)

    def multiply_input(self, theta: Tensor, left: Tensor, right: Tensor) -> None:
        self._catch_up(theta)
        super().multiply_input(theta, left, right)
        self.estimator.multiply_input(theta, left, right)

    def scale_output(self, theta: Tensor, log_factors: Tensor) -> None:
        self._catch_up(theta)
        super().scale_output(theta, log_factors)
        self.estimator.scale_output(theta, log_factors)

    def _catch_up(self, theta: Tensor) -> None:
        """Let R follow what may have changed θ since it was last used."""
        self.estimator.update(theta, theta.shape[:1], TensorState(theta))
