"""Diagnostics: the errors of approximate inverses and of surrogate gradients, and of guides.

References are computed in float64, those for layers at O(D³). Nothing in the layer, the guide or
the model is changed.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution

from pyro_snf.caching import state_of
from pyro_snf.free_form.linearization import linearize
from pyro_snf.free_form.log_det import exact_slogdet, probe_gradient
from pyro_snf.free_form.methods import PairLearned
from pyro_snf.free_form.network_pair import NetworkPair
from pyro_snf.free_form.solve import invert
from pyro_snf.importance import PSIS, psis
from pyro_snf.options import are_counts, as_list, expect, has_values, shown
from pyro_snf.transforms.pair import ConditionalSelfNormalizingPair, SelfNormalizingPair
from pyro_snf.transforms.self_normalizing import (
    AffineSelfNormalizingTransform,
    SelfNormalizingTransform,
)

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


# Unit events that are in memory at a time.
_CHUNK = 256


class GradientError(NamedTuple):
    """How far the surrogate gradient of a log-determinant is from the exact one."""

    relative: float
    """‖surrogate − exact‖ / ‖exact‖, in Frobenius norms."""
    cosine: float
    """The cosine of the angle between the two."""


# Numbers in the probes that are in memory at a time.
_MAX_NUMBERS = 2**20

# Relative distance between an event and T.inv(T(event)) up to which it counts as recovered.
_RECOVERED = 1e-4


def _layer(transform: Transform) -> AffineSelfNormalizingTransform:
    inner = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(inner, AffineSelfNormalizingTransform):
        raise ValueError(
            f"expected a dense or convolutional self-normalizing layer or its inverse; "
            f"got {shown(transform)}"
        )
    return inner


def _event_shape(
    layer: AffineSelfNormalizingTransform, image_size: tuple[int, int] | None
) -> torch.Size:
    if image_size is not None:
        fits = are_counts(image_size) and len(image_size) == 2
        expect("image_size (H, W), integers >= 1, or None", fits, image_size)
    if image_size is not None and layer.log_det.linear_map.event_dim == 3:
        return torch.Size([len(layer.theta), *image_size])
    if layer.event_shape is None:
        raise ValueError(f"expected image_size, for {layer} has not seen an image yet; got None")
    return layer.event_shape


@torch.no_grad()
def inverse_error(transform: Transform, image_size: tuple[int, int] | None = None) -> float:
    """``‖I − RW‖_F/√D`` of a layer, with R as it stands. 0 is exact, 1 is as good as no inverse.

    R is the approximate inverse of ``inverse="one_pass"``: tracked or learned; or for other
    convolutions a kernel of their ``inverse_kernel_size``, fitted by least squares up to 1024
    entries for each channel, and beyond a window of the inverse with a periodic boundary. The error
    costs D² operations, times D or the size of the kernels.

    >>> inverse_error(SelfNormalizingLinear(3))
    0.0

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :param image_size: ``(H, W)``, of a convolution's images; by default that of the latest.
    :raises ValueError: for other transforms, and for a convolution without an image size.
    """
    layer = _layer(transform)
    event_shape = _event_shape(layer, image_size)
    linear_map, theta = layer.log_det.linear_map, layer.theta.double()
    inverse = layer.log_det.inverse_weight(layer.theta, event_shape).double()
    dim, total = event_shape.numel(), 0.0
    for indices in torch.arange(dim, device=theta.device).split(_CHUNK):
        units = nn.functional.one_hot(indices, dim).double().view(-1, *event_shape)
        # The scale e^s of W and its inverse cancel: I − RW is that of A.
        back = linear_map.apply_weight(inverse, linear_map.multiply(theta, units))
        total += (back - units).square().sum().item()
    return math.sqrt(total / dim)


@torch.no_grad()
def gradient_error(
    transform: Transform, image_size: tuple[int, int] | None = None
) -> GradientError:
    """The surrogate gradient of a layer's log-determinant in its weight, against the exact one.

    It is the gradient that the next training step would take, for weights as they are now.

    >>> gradient_error(SelfNormalizingLinear(3)).relative < 1e-6
    True
    >>> gradient_error(SelfNormalizingConv2d(3), (8, 8)).relative < 1e-6
    True

    :param Transform transform: a self-normalizing layer, or the inverse of one.
    :param image_size: ``(H, W)``, of a convolution's images; by default that of the latest.
    :raises ValueError: for other transforms, and for a convolution without an image size.
    :raises torch.linalg.LinAlgError: if the layer is singular.
    """
    layer = _layer(transform)
    event_shape = _event_shape(layer, image_size)
    linear_map = layer.log_det.linear_map
    exact = linear_map.factorize(layer.theta.double(), event_shape).gradient
    training = copy.deepcopy(layer).train()  # not to change the layer's own state
    training.theta.requires_grad_()
    with torch.enable_grad():
        x = training.theta.new_zeros(1, *event_shape)
        log_det = training.log_abs_det_jacobian(x, x).sum()
        (gradient,) = torch.autograd.grad(log_det, training.theta)
    return _compare(gradient.double() / linear_map.theta_scale(layer.theta), exact)


def _compare(surrogate: Tensor, exact: Tensor) -> GradientError:
    length = torch.linalg.vector_norm(exact)
    relative = torch.linalg.vector_norm(surrogate - exact) / length
    cosine = (surrogate * exact).sum() / (torch.linalg.vector_norm(surrogate) * length)
    return GradientError(relative.item(), cosine.item())


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
    num_unique: int
    """Events x to which no other one was found with the same image: by ``T.inv``, or by Newton's
    method from 0 and from the event before. Less than all of them is proof that f is not
    invertible; the other ones may be far from all events."""


@torch.no_grad()
def pair_report(transform: Transform, x: Tensor) -> PairReport:
    """How good the pair of networks of a :class:`~pyro_snf.SelfNormalizingPair` is, at some data.

    It takes some D passes through the networks, and D² numbers, for every event: some hundred of
    them tell enough.

    >>> layer = self_normalizing_pair(3)  # the identity, so far
    >>> pair_report(layer, torch.randn(100, 3)).num_recovered
    100

    :param Transform transform: a self-normalizing pair, or the inverse of one.
    :param Tensor x: events that the transform is given, shape ``(B, *event)``.
    :raises ValueError: for other transforms, and for inputs that do not fit it.
    """
    if isinstance(transform, ConditionalSelfNormalizingPair):
        raise ValueError("expected a pair with its context, transform.condition(context)")
    layer = getattr(transform, "transform", transform)  # T.inv holds T
    if not isinstance(layer, SelfNormalizingPair):
        raise ValueError(
            f"expected a SelfNormalizingPair or its inverse; got {shown(transform)}: of a stack, "
            "pass the pair, such as flow.parts[-1], and x as the parts before give it"
        )
    expect("x, a dense tensor of numbers", has_values(x), x)
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

    size = torch.linalg.vector_norm(rows, dim=axes) + math.sqrt(dim)

    def solve(start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whether a solution of ``f(x') = f(x)`` was found, and whether that is x."""
        y = near.output.detach()
        found = invert(pair.forward, pair.inverse, y, context, tolerance=_RECOVERED**2, start=start)
        distance = torch.linalg.vector_norm(found.x - rows, dim=axes)
        return found.converged, distance <= _RECOVERED * size

    solutions = [solve(start) for start in (None, torch.zeros_like(rows), rows.roll(1, 0))]
    is_found, is_same = map(torch.stack, zip(*solutions, strict=True))
    return PairReport(
        reconstruction_error=(back.output - rows).square().mean().sqrt().item(),
        inverse_error=error.sqrt().item(),
        gradient=_pair_gradient_error(layer, pair, rows, context),
        condition=torch.linalg.cond(jacobian).median().item(),
        num_events=len(rows),
        num_oriented=max(int((sign > 0).sum()), int((sign < 0).sum())),
        num_recovered=int((is_found & is_same)[0].sum()),
        num_unique=int((~is_found | is_same).all(0).sum()),
    )


@torch.enable_grad()
def _pair_gradient_error(
    layer: SelfNormalizingPair, pair: NetworkPair, rows: Tensor, context: tuple[Tensor, ...]
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
    method = copy.deepcopy(layer.log_det)  # not to change the layer's own state
    if not isinstance(method, PairLearned):
        state = functools.partial(state_of, parameters)
        value = method.training_log_abs_det(pair, near, back, context, state)
        value = value[1] if isinstance(value, tuple) else value
        return _compare(gradient_of(value), exact)
    # Unit vectors for probes give the trace itself.
    dim = rows[0].numel()
    eye = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    surrogate = torch.zeros_like(exact)
    for units in eye.split(max(1, _MAX_NUMBERS // rows.numel())):
        probes = units.view(-1, 1, *rows.shape[1:]).expand(-1, *rows.shape)
        found = probe_gradient(
            near,
            back,
            probes,
            tolerance=method.tolerance,
            krylov_steps=method.krylov_steps,
        )
        surrogate += len(units) * gradient_of(found.surrogate)
    return _compare(surrogate, exact)


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`Report`."""

    name: str
    """The layer's name within the flow."""
    dim: int
    """D; for a convolution C·H·W, of the latest images. 0 where no shape of events is known."""
    log_det: str
    """The name of its log-determinant method."""
    condition: float
    """An estimate of the condition number of the layer's weight as a linear map, in the 2-norm. NaN
    for a convolution that has seen no images, and for a pair of networks, whose Jacobian depends on
    the event: see :func:`pair_report`."""
    inverse_error: float
    """See :func:`inverse_error`. NaN where the layer uses no approximate inverse, for a convolution
    that has seen no images, and for a pair."""
    error_estimate: float | None
    """The method's own latest estimate of its error; None where it makes none. Of the same error
    as ``inverse_error`` for a matrix (dense, or of a 1 × 1 convolution); for another convolution
    and for a pair, the residual of the probes' solves."""
    num_refactorizations: int | None
    """Factorizations in training so far; None where the method makes none."""


@dataclass(frozen=True)
class Report:
    """A row for every self-normalizing layer of a flow; prints as a table."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        header = ["layer", "D", "log_det", "condition", "inverse error", "estimate", "factorized"]
        table = [header]
        for row in self.layers:
            table.append(
                [
                    row.name,
                    str(row.dim),
                    row.log_det,
                    "–" if math.isnan(row.condition) else f"{row.condition:.3g}",
                    "–" if math.isnan(row.inverse_error) else f"{row.inverse_error:.2e}",
                    "–" if row.error_estimate is None else f"{row.error_estimate:.2e}",
                    "–" if row.num_refactorizations is None else str(row.num_refactorizations),
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
    layer  D  log_det  condition  inverse error  estimate  factorized
        0  3  Refined          1       0.00e+00       nan           0

    :param flow: a transform, a module that holds some (an autoguide, say), a
        ``TransformedDistribution``, or a list of these.
    :raises ValueError: if there is no self-normalizing layer in it.
    """
    rows = tuple(_row(name, layer) for name, layer in _named_layers(flow))
    if not rows:
        expected = "expected a flow with self-normalizing layers"
        raise ValueError(f"{expected}; found none in {shown(flow)}")
    return Report(rows)


def _named_layers(flow: Any, prefix: str = "") -> Iterator[tuple[str, SelfNormalizingTransform]]:
    if isinstance(flow, nn.Module):
        for name, module in flow.named_modules(prefix=prefix):
            if isinstance(module, SelfNormalizingTransform):
                yield name or type(module).__name__, module
    elif isinstance(flow, TransformedDistribution):
        yield from _named_layers(flow.transforms, prefix)
    elif isinstance(flow, Iterable) and not isinstance(flow, Tensor):
        for index, part in enumerate(as_list("a flow, or flows in a list", flow)):
            if isinstance(part, nn.Module) or not isinstance(part, Iterable):  # no list in a list
                yield from _named_layers(part, f"{prefix}.{index}" if prefix else str(index))
    else:  # transforms that are not modules: torch's compositions and inverses of compositions
        for attribute in ("parts", "inv"):
            inner = getattr(flow, attribute, None)
            if isinstance(inner, nn.Module | list):
                yield from _named_layers(inner, prefix)
                return


def _row(name: str, layer: SelfNormalizingTransform) -> LayerReport:
    condition = error = math.nan
    if isinstance(layer, AffineSelfNormalizingTransform) and layer.event_shape is not None:
        linear_map = layer.log_det.linear_map
        theta = linear_map.theta_of(layer.weight.double())
        try:
            condition = linear_map.factorize(theta, layer.event_shape).condition
            # The inverse of other convolutions is no kernel, nor do their layers use one.
            is_matrix = linear_map.matrix_of(theta) is not None
            if is_matrix or layer.uses_approximate_inverse:
                error = inverse_error(layer)
        except torch.linalg.LinAlgError:  # a singular layer has a report all the same
            condition = math.inf
    return LayerReport(
        name=name,
        dim=0 if layer.event_shape is None else layer.event_shape.numel(),
        log_det=type(layer.log_det).__name__,
        condition=condition,
        inverse_error=error,
        error_estimate=layer.error_estimate,
        num_refactorizations=layer.num_refactorizations,
    )
