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
from pyro_snf.free_form.linearization import linearize
from pyro_snf.free_form.log_det import exact_slogdet, probe_gradient
from pyro_snf.free_form.pair import NetworkPair
from pyro_snf.free_form.solve import invert
from pyro_snf.importance import PSIS, psis
from pyro_snf.transforms.conv import SelfNormalizingConv2d
from pyro_snf.transforms.free_form import SelfNormalizing
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = [
    "PSIS",
    "GradientError",
    "LayerReport",
    "PairReport",
    "Report",
    "gradient_error",
    "inverse_error",
    "pair_report",
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


# Numbers in the probes that are in memory at a time.
_MAX_NUMBERS = 2**20

# Relative distance of an event from what its inverse comes to, up to which it is the same.
_RECOVERED = 1e-4

Layer = SelfNormalizingLinear | SelfNormalizingConv2d


def _layer(transform: Transform) -> Layer:
    inner = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(inner, Layer):
        raise ValueError(
            f"expected a dense or convolutional self-normalizing layer or its inverse; "
            f"got {transform!r}"
        )
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
    return _gradient_error(surrogate, exact)


def _gradient_error(surrogate: Tensor, exact: Tensor) -> GradientError:
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


class PairReport(NamedTuple):
    """How good a pair of networks is, at the events that it is asked for."""

    reconstruction_error: float
    """The root mean square of an element of ``g(f(x)) − x``."""
    inverse_error: float
    """``‖I − J_g J_f‖_F/√D``, a root mean square over events. 0 is exact."""
    gradient: GradientError
    """That of the mean of ``log|det J_f|`` in the parameters of f, as training has it in
    expectation, against the exact one."""
    condition: float
    """The median of the condition numbers of ``J_f``, in the 2-norm."""
    num_events: int
    num_oriented: int
    """Events at which ``det J_f`` has the sign that it has at most of them. Less than all of them
    is proof that f is not invertible."""
    num_recovered: int
    """Events x for which ``T.inv(T(x))`` is x. What is missing has another x with the same image,
    or none that was found: there f is not invertible, or almost so."""


@torch.no_grad()
def pair_report(transform: Transform, x: Tensor) -> PairReport:
    """How good the pair of networks of a :class:`~pyro_snf.SelfNormalizing` is, at some data.

    It takes some D passes through the networks, and D² numbers, for every event: some hundred of
    them tell enough.

    >>> layer = self_normalizing(3)  # the identity, so far
    >>> pair_report(layer, torch.randn(100, 3)).num_recovered
    100

    :param Tensor x: events that the transform is given, shape ``(B, *event)``.
    :param Transform transform: a self-normalizing pair, or the inverse of one.
    :raises ValueError: for other transforms, and for inputs that do not fit it.
    """
    layer = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(layer, SelfNormalizing):
        raise ValueError(f"expected a SelfNormalizing or its inverse; got {transform!r}")
    rows, context = layer.rows_of(x)
    rows, context = rows.detach().double(), tuple(one.detach().double() for one in context)
    networks = (layer.forward_net, layer.inverse_net)
    pair = NetworkPair(*(copy.deepcopy(network).double() for network in networks))
    dim, axes = rows[0].numel(), tuple(range(1, rows.dim()))
    near = linearize(pair.forward, rows, context)
    back = linearize(pair.inverse, near.output, context)
    jacobian, inverse = near.jacobian(), back.jacobian()
    sign = torch.linalg.slogdet(jacobian).sign
    eye = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    error = (inverse @ jacobian - eye).square().sum((1, 2)).mean() / dim

    recovered = invert(
        pair.forward, pair.inverse, near.output.detach(), context, tolerance=_RECOVERED**2
    )
    distance = torch.linalg.vector_norm(recovered.x - rows, dim=axes)
    size = torch.linalg.vector_norm(rows, dim=axes) + math.sqrt(dim)
    return PairReport(
        reconstruction_error=(back.output - rows).square().mean().sqrt().item(),
        inverse_error=error.sqrt().item(),
        gradient=_pair_gradient_error(layer, pair, rows, context),
        condition=torch.linalg.cond(jacobian).median().item(),
        num_events=len(rows),
        num_oriented=max(int((sign > 0).sum()), int((sign < 0).sum())),
        num_recovered=int((recovered.converged & (distance <= _RECOVERED * size)).sum()),
    )


@torch.enable_grad()
def _pair_gradient_error(
    layer: SelfNormalizing, pair: NetworkPair, rows: Tensor, context: tuple[Tensor, ...]
) -> GradientError:
    parameters = [one.requires_grad_() for one in pair.forward_net.parameters()]
    if not parameters:
        return GradientError(math.nan, math.nan)

    def gradient_of(value: Tensor) -> Tensor:
        found = torch.autograd.grad(
            value.mean(), parameters, retain_graph=True, materialize_grads=True
        )
        return torch.cat([one.flatten() for one in found])

    exact = gradient_of(exact_slogdet(pair.forward, rows, context, parameters)[1])
    near = linearize(pair.forward, rows, context)
    back = linearize(pair.inverse, near.output, context)
    # Unit vectors for probes give the trace itself.
    dim = rows[0].numel()
    eye = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    surrogate = torch.zeros_like(exact)
    for units in eye.split(max(1, _MAX_NUMBERS // rows.numel())):
        probes = units.view(-1, 1, *rows.shape[1:]).expand(-1, *rows.shape)
        mean, _ = probe_gradient(
            near,
            back,
            probes,
            tolerance=layer.estimator.tolerance,
            max_iterations=layer.estimator.max_iterations,
        )
        surrogate += len(units) * gradient_of(mean)
    return _gradient_error(surrogate, exact)


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`Report`."""

    name: str
    """The layer's name within the flow."""
    dim: int
    """D; for a convolution C·H·W, of the latest images, or C if there were none; for a pair of
    networks without an event shape 0."""
    log_det: str
    """The layer's ``log_det``."""
    condition: float
    """Of a dense layer, an estimate of the condition number of W in the 1-norm, ``‖W‖₁‖R‖₁``; of a
    convolution, one in the 2-norm, from the exact factors. NaN for one that has seen no images, and
    for a pair of networks, whose every event has its own: see :func:`pair_report`."""
    inverse_error: float
    """See :func:`inverse_error`. NaN for a convolution that has seen no images, and for a pair."""
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


def _named_layers(flow: Any, prefix: str = "") -> Iterator[tuple[str, Layer | SelfNormalizing]]:
    if isinstance(flow, nn.Module):
        for name, module in flow.named_modules(prefix=prefix):
            if isinstance(module, Layer | SelfNormalizing):
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


def _row(name: str, layer: Layer | SelfNormalizing) -> LayerReport:
    if isinstance(layer, SelfNormalizing):
        dim = 0 if layer.event_shape is None else layer.event_shape.numel()
        condition = error = math.nan
    elif isinstance(layer, SelfNormalizingConv2d):
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
        refreshes=None if isinstance(layer, SelfNormalizing) else layer.num_refreshes,
    )
