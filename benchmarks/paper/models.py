"""The flows of the paper's experiments, and the densities of images that they define."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import rivals
import torch
from settings import Settings
from torch import Tensor, nn

from pyro_snf import (
    GECO,
    Compose,
    Learned,
    MultiScale,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    flows,
    images,
)

Layer = SelfNormalizingLinear | SelfNormalizingConv2d


def make_flow(settings: Settings, event_shape: torch.Size) -> Any:
    """The flow of the settings, from its inputs to latents.

    :raises ValueError: for images that do not fit, and for a rival that the model has no place for.
    """
    torch.manual_seed(settings.seed)  # of probes, rotations, networks, and the noise below
    options: dict[str, Any] = {
        "log_det": _log_det(settings),
        "device": settings.device,
        "dtype": getattr(torch, settings.dtype),
    }
    if settings.model == "fc":
        flow = flows.fully_connected(
            event_shape.numel() if settings.inputs == "whitened" else event_shape,
            num_layers=settings.num_layers,
            activation=settings.activation,
            **options,
        )
    elif settings.model == "conv":
        flow = flows.convolutional(
            event_shape,
            num_blocks=settings.num_blocks,
            layers_per_block=settings.layers_per_block,
            kernel_size=settings.kernel_size,
            activation=settings.activation,
            **options,
        )
    else:
        flow = flows.glow(
            event_shape,
            num_levels=settings.num_levels,
            num_steps=settings.steps_per_level,
            hidden_channels=settings.hidden_channels,
            kernel_size=settings.kernel_size,
            **options,
        )
    if settings.model == "conv" and settings.initial_noise > 0:
        for layer in layers_of(flow):
            nn.init.normal_(layer.theta, std=settings.initial_noise)
            layer.refactorize()
    is_rival = settings.log_det in rivals.KINDS
    return rivals.replace_layers(flow, settings.log_det) if is_rival else flow


def _log_det(settings: Settings) -> str | Learned:
    if settings.log_det == "learned":
        weight: float | GECO = settings.reconstruction_weight
        if settings.geco_tolerance > 0:
            weight = GECO(settings.geco_tolerance, weight=weight, rate=settings.geco_rate)
        return Learned(reconstruction_weight=weight)
    return "exact" if settings.log_det in rivals.KINDS else settings.log_det


def whiten_first(flow: Compose, logits: Tensor) -> Compose:
    """The flow of centred, decorrelated inputs of variance 1, as a flow of logits.

    A frozen dense layer comes first: ``W = C^{-1/2}`` of the logits' covariance C. What the flow
    can represent is the same; the layer after it is better conditioned.

    :param Tensor logits: of the training images.
    :raises ValueError: for no more images than they have pixels: C is singular.
    """
    shape = logits.shape[1:]
    if len(logits) <= shape.numel():
        raise ValueError(
            f"expected more training images than pixels for whitened inputs; got {len(logits)} "
            f"images of {shape.numel()} pixels"
        )
    first = next(flow.parameters())
    whitening = flows.fully_connected(
        shape, num_layers=1, log_det="exact", device=first.device, dtype=first.dtype
    )
    rows = logits.flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(rows.mT))
    weight = (axes * variances.rsqrt()) @ axes.mT
    (layer,) = layers_of(whitening)
    assert isinstance(layer, SelfNormalizingLinear)
    layer.set_weight(weight)
    with torch.no_grad():
        layer.bias.copy_(-weight @ rows.mean(0))
    return Compose([*whitening.requires_grad_(False).parts, *flow.parts])


def make_density(flow: nn.Module, event_shape: torch.Size, num_levels: int) -> Any:
    """The density of dequantized images that a flow defines."""
    zeros = next(flow.parameters()).new_zeros(event_shape.numel())
    base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
    transforms = [flow.inv, images.LogitTransform(num_levels).inv]
    # Where a flow diverges, its loss says so.
    return dist.TransformedDistribution(base, transforms, validate_args=False)


def layers_of(flow: nn.Module) -> list[Layer]:
    """The self-normalizing layers that are trained, in their order."""
    return [module for module in flow.modules() if _is_trained_layer(module)]


def _is_trained_layer(module: nn.Module) -> bool:
    return isinstance(module, Layer) and module.theta.requires_grad


def layers_with_shapes(flow: Any, event_shape: torch.Size) -> Iterator[tuple[Layer, torch.Size]]:
    """The self-normalizing layers, with the shapes of what they are given."""
    stacks: Sequence[Any] = flow.levels if isinstance(flow, MultiScale) else [flow]
    for index, stack in enumerate(stacks):
        if index > 0:
            event_shape = torch.Size([event_shape[0] // 2, *event_shape[1:]])
        for part in stack.parts:
            if _is_trained_layer(part):
                yield part, event_shape
            event_shape = part.forward_shape(event_shape)
