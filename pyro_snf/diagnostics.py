"""How good is the approximate inverse, the gradient that stands on it, and what was trained by it?

The functions compute their references in float64, those for layers at O(D³). They change nothing
in the layer, the guide or the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution

from pyro_snf.conv.exact import ConvFactors
from pyro_snf.conv.kernels import convolve, near_identity, theta_scale
from pyro_snf.importance import PSIS, psis
from pyro_snf.transforms.conv import SelfNormalizingConv2d
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


# Columns of a convolution's matrix that are in memory at a time.
_CHUNK = 256


class GradientError(NamedTuple):
    """How far the surrogate gradient of a log-determinant is from the exact one."""

    relative: float
    """‖surrogate − exact‖ / ‖exact‖, in Frobenius norms."""
    cosine: float
    """The cosine of the angle between the two."""


Layer = SelfNormalizingLinear | SelfNormalizingConv2d


def _layer(transform: Transform) -> Layer:
    inner = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(inner, Layer):
        raise ValueError(f"expected a self-normalizing layer or its inverse; got {transform!r}")
    return inner


def _size_of(layer: SelfNormalizingConv2d, image_size: tuple[int, int] | None) -> tuple[int, int]:
    size = layer.image_size if image_size is None else image_size
    if size is None:
        raise ValueError(f"expected image_size, for {layer} has not seen an image yet; got None")
    return size


@torch.no_grad()
def inverse_error(transform: Transform, image_size: tuple[int, int] | None = None) -> float:
    """``‖I − RW‖_F/√D`` of a layer, with R as it stands. 0 is exact, 1 is as good as no inverse.

    Of a convolution, R is the one pass of ``inverse="learned"``: a learned kernel, or the window of
    an exact inverse on a torus. It costs D² operations, times the size of the kernel.

    >>> inverse_error(SelfNormalizingLinear(3))
    0.0

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :param image_size: ``(H, W)``, of a convolution's images; by default that of the latest.
    :raises ValueError: for other transforms, and for a convolution without an image size.
    """
    layer = _layer(transform)
    if isinstance(layer, SelfNormalizingConv2d):
        return _kernel_error(layer, _size_of(layer, image_size))
    product = layer.inverse_weight.double() @ layer.weight.double()
    eye = torch.eye(layer.input_dim, dtype=product.dtype, device=product.device)
    return (torch.linalg.norm(eye - product) / math.sqrt(layer.input_dim)).item()


def _kernel_error(layer: SelfNormalizingConv2d, size: tuple[int, int]) -> float:
    kernel, inverse = layer.weight.double(), layer.inverse_weight(size).double()
    dim = layer.channels * size[0] * size[1]
    total = 0.0
    for indices in torch.arange(dim, device=kernel.device).split(_CHUNK):
        units = nn.functional.one_hot(indices, dim).double().view(-1, layer.channels, *size)
        back = convolve(convolve(units, kernel, layer.padding_mode), inverse, layer.padding_mode)
        total += (back - units).square().sum().item()
    return math.sqrt(total / dim)


@torch.no_grad()
def gradient_error(
    transform: Transform, image_size: tuple[int, int] | None = None
) -> GradientError:
    """The surrogate gradient of a layer's log-determinant in its weight, against the exact one.

    For a dense layer, ``Rᵀ`` against ``W⁻ᵀ``, with R as it stands; the next training step of a
    ``"refined"`` layer brings it up to date first. For a convolution, what the next training step
    would take.

    >>> gradient_error(SelfNormalizingLinear(3)).relative
    0.0
    >>> gradient_error(SelfNormalizingConv2d(3), (8, 8)).relative < 1e-6
    True

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :param image_size: ``(H, W)``, of a convolution's images; by default that of the latest.
    :raises ValueError: for other transforms, and for a convolution without an image size.
    :raises torch.linalg.LinAlgError: if the layer is singular.
    """
    layer = _layer(transform)
    if isinstance(layer, SelfNormalizingConv2d):
        size = _size_of(layer, image_size)
        kernel = near_identity(layer.theta.double())
        exact = ConvFactors(kernel, size, layer.padding_mode).kernel_gradient
        surrogate = _kernel_gradient(layer, size).double()
    else:
        surrogate = layer.inverse_weight.double()
        exact = torch.linalg.inv(layer.weight.double())
    length = torch.linalg.vector_norm(exact)
    relative = torch.linalg.vector_norm(surrogate - exact) / length
    cosine = (surrogate * exact).sum() / (torch.linalg.vector_norm(surrogate) * length)
    return GradientError(relative.item(), cosine.item())


def _kernel_gradient(layer: SelfNormalizingConv2d, size: tuple[int, int]) -> Tensor:
    """In a, the kernel without the scale, as the layer would have it in training."""
    twin = copy.deepcopy(layer).train()  # the layer itself is to draw its own probes
    twin.theta.requires_grad_()
    with torch.enable_grad():
        x = twin.theta.new_zeros(1, layer.channels, *size)
        (gradient,) = torch.autograd.grad(twin.log_abs_det_jacobian(x, x).sum(), twin.theta)
    return gradient / theta_scale(layer.theta)


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`Report`."""

    name: str
    """The layer's name within the flow."""
    dim: int
    """D; for a convolution C·H·W, of the latest images, or C if there were none."""
    log_det: str
    """The layer's ``log_det``."""
    condition: float
    """Of a dense layer, an estimate of the condition number of W in the 1-norm, ``‖W‖₁‖R‖₁``; of a
    convolution, one in the 2-norm, from the exact factors. NaN for one that has seen no images."""
    inverse_error: float
    """See :func:`inverse_error`. NaN for a convolution that has seen no images."""
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
                    "–" if math.isnan(row.condition) else f"{row.condition:.3g}",
                    "–" if math.isnan(row.inverse_error) else f"{row.inverse_error:.2e}",
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


def _named_layers(flow: Any, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    if isinstance(flow, nn.Module):
        for name, module in flow.named_modules(prefix=prefix):
            if isinstance(module, Layer):
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


def _row(name: str, layer: Layer) -> LayerReport:
    if isinstance(layer, SelfNormalizingConv2d):
        dim, condition, error = layer.channels, math.nan, math.nan
        if layer.image_size is not None:
            dim *= layer.image_size[0] * layer.image_size[1]
            kernel = near_identity(layer.theta.double())
            try:
                condition = ConvFactors(kernel, layer.image_size, layer.padding_mode).condition
                error = inverse_error(layer)
            except torch.linalg.LinAlgError:  # of a singular one, there is a report all the same
                condition = math.inf
    else:
        weight, inverse = layer.weight.double(), layer.inverse_weight.double()
        norms = torch.linalg.matrix_norm(weight, 1) * torch.linalg.matrix_norm(inverse, 1)
        dim, condition, error = layer.input_dim, norms.item(), inverse_error(layer)
    return LayerReport(
        name=name,
        dim=dim,
        log_det=layer.log_det,
        condition=condition,
        inverse_error=error,
        certificate=layer.certificate,
        refreshes=layer.num_refreshes,
    )
