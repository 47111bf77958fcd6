"""Pairs of networks for tests, and oracles: dense Jacobians, computed in another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.func import jacrev, vmap

from pyro_snf import SelfNormalizingPair
from tests.registry import pair_options

# Float64, condition numbers below 10.
EXACT = 1e-9
# The same in float32.
SINGLE = 1e-4
# Of means over independent draws: an error above five standard errors has probability 6e-7.
STANDARD_ERRORS = 5


def events(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Standard normal events, shape ``(count, *shape)``."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(300 + seed))


def pair_of(
    f: nn.Module, g: nn.Module, event_shape: int | Sequence[int] = 3, **options: object
) -> SelfNormalizingPair:
    """A layer of two networks; for the options, see :func:`tests.registry.pair_options`."""
    return SelfNormalizingPair(f, g, event_shape=event_shape, **pair_options(options))


def jacobians(network: nn.Module, x: Tensor, *context: Tensor) -> Tensor:
    """J of a network at every event, shape ``(B, D, D)``, with a graph."""

    def one(x: Tensor, *context: Tensor) -> Tensor:
        rows = (each.unsqueeze(0) for each in (x, *context))
        return network(*rows).squeeze(0).flatten()

    dim = x[0].numel()
    return vmap(jacrev(one))(x, *context).reshape(len(x), dim, dim)


class Dense(Transform):
    """The map of a network, with dense Jacobians and autograd: the expected values.

    :param Tensor context: of as many rows as inputs have, if there is one.
    """

    bijective = True

    def __init__(
        self, network: nn.Module, *context: Tensor, event_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.context = context
        self.event_shape = event_shape
        dim = 1 if event_shape is None else len(event_shape)
        self.domain = self.codomain = constraints.independent(constraints.real, dim)

    def _rows(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:] if self.event_shape is None else self.event_shape
        return x.reshape(-1, *shape)

    def _call(self, x: Tensor) -> Tensor:
        return self.network(self._rows(x), *self.context).reshape(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        # Newton's method, whose last step has the graph: dx = J⁻¹ (dy − ∂_θ f dθ).
        rows = self._rows(y)
        x = rows.detach()
        for step in range(30):
            with torch.set_grad_enabled(step == 29 and torch.is_grad_enabled()):
                residual = (rows - self.network(x, *self.context)).flatten(1)
                jacobian = jacobians(self.network, x, *self.context).detach()
                x = x + torch.linalg.solve(jacobian, residual.unsqueeze(2)).view_as(x)
        return x.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        rows = self._rows(x)
        value = torch.linalg.slogdet(jacobians(self.network, rows, *self.context)).logabsdet
        return value.reshape(x.shape[: x.dim() - self.domain.event_dim])


class Fixed(nn.Module):
    """A map without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Perturbed(nn.Module):
    """``h + ε N h`` of the outputs h of a network, with ``‖N‖_F = √D``: a relative error of ε."""

    def __init__(self, network: nn.Module, dim: int, size: float, seed: int = 0) -> None:
        super().__init__()
        noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("noise", size * dim**0.5 * noise / noise.norm())
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        h = self.network(x)
        return h + h @ self.noise.mT


class Recorder(nn.Module):
    """A network that records its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.inputs: list[Tensor] = []
        self.contexts: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        self.inputs.append(x)
        self.contexts.append(context)
        return self.network(x, *context)


def trace_surrogate(jacobian: Tensor, inverse: Tensor) -> Tensor:
    """A function with the gradient ``tr(M ∂J)``, M being constant, for every event."""
    return (inverse.detach().mT * jacobian).sum((1, 2))


def gradients_of(
    transform: Transform, x: Tensor, parameters: dict[str, Tensor], loss: Tensor
) -> dict[str, Tensor]:
    """Of a loss in x and in named parameters."""
    named = {"x": x, **parameters}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def parameters_of_f(layer: SelfNormalizingPair) -> dict[str, Tensor]:
    return dict(layer.forward_net.named_parameters())
