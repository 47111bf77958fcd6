"""How good is the approximate inverse, the gradient that stands on it, and what was trained by it?

The functions compute their references in float64, those for layers at O(D³). They change nothing
in the layer, the guide or the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution

from pyro_snf.importance import PSIS, psis
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = [
    "PSIS",
    "GradientError",
    "LayerReport",
    "Report",
    "gradient_error",
    "inverse_error",
    "psis",
    "report",
]


class GradientError(NamedTuple):
    """How far the surrogate gradient of a log-determinant is from the exact one."""

    relative: float
    """‖surrogate − exact‖ / ‖exact‖, in Frobenius norms."""
    cosine: float
    """The cosine of the angle between the two."""


def _layer(transform: Transform) -> SelfNormalizingLinear:
    inner = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(inner, SelfNormalizingLinear):
        raise ValueError(f"expected a SelfNormalizingLinear or its inverse; got {transform!r}")
    return inner


@torch.no_grad()
def inverse_error(transform: Transform) -> float:
    """``‖I − RW‖_F/√D`` of a layer, with R as it stands. 0 is exact, 1 is as good as no inverse.

    >>> inverse_error(SelfNormalizingLinear(3))
    0.0

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :raises ValueError: for other transforms.
    """
    layer = _layer(transform)
    product = layer.inverse_weight.double() @ layer.weight.double()
    eye = torch.eye(layer.input_dim, dtype=product.dtype, device=product.device)
    return (torch.linalg.norm(eye - product) / math.sqrt(layer.input_dim)).item()


@torch.no_grad()
def gradient_error(transform: Transform) -> GradientError:
    """The surrogate gradient of ``log|det W|`` in W, ``Rᵀ``, against the exact one, ``W⁻ᵀ``.

    R is taken as it stands; the next training step of a ``"refined"`` layer brings it up to date
    first.

    >>> gradient_error(SelfNormalizingLinear(3)).relative
    0.0

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :raises ValueError: for other transforms.
    :raises torch.linalg.LinAlgError: if W is singular.
    """
    layer = _layer(transform)
    surrogate = layer.inverse_weight.double()
    exact = torch.linalg.inv(layer.weight.double())
    size = torch.linalg.norm(exact)
    relative = torch.linalg.norm(surrogate - exact) / size
    cosine = (surrogate * exact).sum() / (torch.linalg.norm(surrogate) * size)
    return GradientError(relative.item(), cosine.item())


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`Report`."""

    name: str
    """The layer's name within the flow."""
    dim: int
    """D."""
    log_det: str
    """The layer's ``log_det``."""
    condition: float
    """An estimate of the condition number of W in the 1-norm, ``‖W‖₁‖R‖₁``."""
    inverse_error: float
    """See :func:`inverse_error`."""
    certificate: float | None
    """The layer's own latest estimate of the same; None where it keeps none."""
    refreshes: int | None
    """Exact refreshes so far; None where there are none."""


@dataclass(frozen=True)
class Report:
    """A row for every self-normalizing layer of a flow; prints as a table."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        header = ["layer", "D", "log_det", "condition", "inverse error", "certificate", "refreshes"]
        table = [header]
        for row in self.layers:
            table.append(
                [
                    row.name,
                    str(row.dim),
                    row.log_det,
                    f"{row.condition:.3g}",
                    f"{row.inverse_error:.2e}",
                    "–" if row.certificate is None else f"{row.certificate:.2e}",
                    "–" if row.refreshes is None else str(row.refreshes),
                ]
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        aligned = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in table
        ]
        return "\n".join(line.rstrip() for line in aligned)

    __repr__ = __str__


@torch.no_grad()
def report(flow: Any) -> Report:
    """A table with a row for every self-normalizing layer of a flow.

    >>> print(report(Compose([SelfNormalizingLinear(3), SmoothLeakyReLU()])))
    layer  D  log_det  condition  inverse error  certificate  refreshes
        0  3  refined          1       0.00e+00          nan          0

    :param flow: a transform, a module that holds some (an autoguide, say), a
        ``TransformedDistribution``, or a list of these.
    :raises ValueError: if there is no self-normalizing layer in it.
    """
    rows = tuple(_row(name, layer) for name, layer in _named_layers(flow))
    if not rows:
        raise ValueError(f"expected a flow with self-normalizing layers; found none in {flow!r}")
    return Report(rows)


def _named_layers(flow: Any, prefix: str = "") -> Iterator[tuple[str, SelfNormalizingLinear]]:
    if isinstance(flow, nn.Module):
        for name, module in flow.named_modules(prefix=prefix):
            if isinstance(module, SelfNormalizingLinear):
                yield name or type(module).__name__, module
    elif isinstance(flow, TransformedDistribution):
        yield from _named_layers(flow.transforms, prefix)
    elif isinstance(flow, Iterable) and not isinstance(flow, Tensor):
        for index, part in enumerate(flow):
            yield from _named_layers(part, f"{prefix}.{index}" if prefix else str(index))
    else:  # transforms that are not modules: torch's compositions and inverses of compositions
        for attribute in ("parts", "inv"):
            inner = getattr(flow, attribute, None)
            if isinstance(inner, nn.Module | list):
                yield from _named_layers(inner, prefix)
                return


def _row(name: str, layer: SelfNormalizingLinear) -> LayerReport:
    weight, inverse = layer.weight.double(), layer.inverse_weight.double()
    condition = torch.linalg.matrix_norm(weight, 1) * torch.linalg.matrix_norm(inverse, 1)
    return LayerReport(
        name=name,
        dim=layer.input_dim,
        log_det=layer.log_det,
        condition=condition.item(),
        inverse_error=inverse_error(layer),
        certificate=layer.certificate,
        refreshes=layer.num_refreshes,
    )
