"""What all self-normalizing layers share: their options, their parameters, their modes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_snf.geco import GECO
from pyro_snf.learned import LearnedInverse
from pyro_snf.transforms.base import InvertibleTransformModule
from pyro_snf.transforms.options import check_count, check_floating, expect

__all__ = ["SelfNormalizingTransform", "check_estimator_options"]


def check_estimator_options(
    *,
    num_probes: int,
    tolerance: float,
    seed: int,
    reconstruction_weight: float | GECO,
    mixture: float,
    reconstruction: str,
) -> None:
    """Raise a ValueError unless the options of all ways to a log-determinant fit."""
    weight, options = reconstruction_weight, LearnedInverse.RECONSTRUCTIONS
    is_number = isinstance(weight, float | int) and 0 <= weight < math.inf
    check_count("num_probes", num_probes)
    check_count("seed", seed, 0)
    expect("tolerance in (0, 1)", 0 < tolerance < 1, tolerance)
    expect("mixture in [0, 1)", 0 <= mixture < 1, mixture)
    expect("reconstruction_weight >= 0, or a GECO", isinstance(weight, GECO) or is_number, weight)
    expect(f"reconstruction to be one of {options}", reconstruction in options, reconstruction)


class SelfNormalizingTransform(InvertibleTransformModule):
    """A layer ``T(x) = diag(e^s) A x + b`` with a linear A that ``theta`` parametrizes.

    Subclasses set :attr:`estimator`, and define what remains.

    :param theta_shape: of θ, which starts at 0; the first of it is the number of scales.
    """

    #: The values of ``log_det``, and what the log-det's value in training is with each.
    TRAINING_VALUES: ClassVar[dict[str, str]] = {
        "refined": "estimate",
        "learned": "0",
        "exact": "exact",
    }
    INVERSES = ("refined", "learned", "exact")

    #: What stands in for the exact log-determinant in training; None with ``log_det="exact"``.
    estimator: Any

    def __init__(
        self,
        theta_shape: tuple[int, ...],
        *,
        log_det: str,
        inverse: str,
        bias: bool,
        init_scale: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        log_dets = tuple(self.TRAINING_VALUES)
        expect(f"log_det to be one of {log_dets}", log_det in log_dets, log_det)
        expect(f"inverse to be one of {self.INVERSES}", inverse in self.INVERSES, inverse)
        expect("init_scale > 0", 0 < init_scale < math.inf, init_scale)
        check_floating(dtype)
        self.log_det = log_det
        self.inverse = inverse
        self.estimator = None

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        count = theta_shape[0]
        self.theta = nn.Parameter(torch.zeros(theta_shape, **factory))
        self.log_scale = nn.Parameter(torch.full((count,), math.log(init_scale), **factory))
        if bias:
            self.bias = nn.Parameter(torch.zeros(count, **factory))
        else:
            self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return (
            f"log_det={self.log_det!r}, inverse={self.inverse!r}, "
            f"bias={self.bias is not None}, training value: {self.TRAINING_VALUES[self.log_det]}"
        )

    @property
    def certificate(self) -> float | None:
        """The latest estimate of the estimator's error; None unless ``log_det="refined"``."""
        return self.estimator.certificate if self.log_det == "refined" else None

    @property
    def num_refreshes(self) -> int | None:
        """Times that the estimator was made exact; None unless ``log_det="refined"``."""
        return self.estimator.num_refreshes if self.log_det == "refined" else None

    def refresh(self) -> None:
        """Make the estimator exact. Nothing to do unless ``log_det="refined"``."""
        if self.log_det == "refined":
            with self._named_errors():
                self.estimator.refresh(self.theta)

    def _training_estimator(self) -> Any:
        """What stands in for the exact log-determinant now; None where nothing does."""
        if (
            # The estimator's mode is the layer's, and that of its twins (see with_cache) too.
            self.estimator is not None
            and self.estimator.training
            and torch.is_grad_enabled()
            and self.theta.requires_grad
            and not torch.jit.is_tracing()  # tracking is nothing that a trace could repeat
        ):
            return self.estimator
        return None

    @staticmethod
    def _sum_of_log_scale(log_scale: Tensor) -> Tensor:
        total = log_scale.sum()
        # A GPU is not waited for: there it is a NaN that the caller sees.
        if not total.is_cuda and not math.isfinite(total.item()):
            raise torch.linalg.LinAlgError("log_scale has NaN or infinite entries")
        return total

    def _map_parameters(self) -> list[Tensor]:
        parameters = [self.theta, self.log_scale]
        return parameters if self.bias is None else [*parameters, self.bias]

    def _inverse_is_exact(self) -> bool:
        return self.inverse != "learned"

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"{self}: {error}") from error
