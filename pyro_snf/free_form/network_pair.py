"""Two networks with one calling convention, and checks that they fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.free_form.linearization import differentiable_twice, linearize

__all__ = ["NetworkPair"]

# Events that a network is checked with.
_NUM_TRIALS = 8

_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class NetworkPair:
    """``f`` and ``g``, on events of shape ``(B, *event)`` and contexts of as many rows.

    An object holds the networks and nothing else: a graph that refers to it does not keep the
    layer alive.

    :param forward_net: f.
    :param inverse_net: g.
    """

    def __init__(self, forward_net: nn.Module, inverse_net: nn.Module) -> None:
        self.forward_net = forward_net
        self.inverse_net = inverse_net

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """``f(x)``, shape ``(B, *event)``."""
        with differentiable_twice():
            return _checked("forward_net", self.forward_net(x, *context), x)

    def inverse(self, y: Tensor, *context: Tensor) -> Tensor:
        """``g(y)``, shape ``(B, *event)``."""
        with differentiable_twice():
            return _checked("inverse_net", self.inverse_net(y, *context), y)

    def check(self, x: Tensor, context: tuple[Tensor, ...], *, derivatives: bool) -> None:
        """Raise unless both networks are deterministic, smooth, and map each event independently.

        The global random stream is not changed. A network that would update statistics of its
        batches is refused before it is called.

        :param Tensor x: shape ``(B, *event)``.
        :param bool derivatives: whether derivatives of log|det J|, second ones of f, are needed.
        :raises ValueError: if one of them is not.
        """
        x, *rest = (one[:_NUM_TRIALS].detach() for one in (x, *context))
        x = torch.where(torch.isfinite(x), x, 0)
        for name, network, call in (
            ("forward_net", self.forward_net, self.forward),
            ("inverse_net", self.inverse_net, self.inverse),
        ):
            _check_modules(name, network)
            _check_outputs(name, call, x, rest)
            if derivatives and name == "forward_net":
                _check_derivatives(name, call, x, rest)


def _checked(name: str, output: Any, x: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expected {name} to map a batch of events to one of the same shape "
            f"{tuple(x.shape)}; got {got}"
        )
    return output


def _check_modules(name: str, network: nn.Module) -> None:
    """Raise if a layer is random, or mixes the events of a batch, in its current mode.

    The outputs of a network that starts as the identity would not show it at first.
    """
    for path, module in network.named_modules():
        where = f"{name}.{path}" if path else name
        is_dropout = isinstance(module, _DROPOUTS) and module.p > 0
        if module.training and (is_dropout or isinstance(module, nn.RReLU)):
            raise ValueError(
                f"expected {name} to be deterministic; got {where}, {module}, in training mode: "
                "set its probability to 0"
            )
        if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"expected {name} to map each event independently; got {where}, {module}, which "
                "normalizes by the statistics of the batch: use layer or group normalization, or "
                "ActNorm; or put it into eval() mode"
            )


@torch.no_grad()
def _check_outputs(name: str, call: Any, x: Tensor, context: list[Tensor]) -> None:
    devices = [x.device] if x.is_cuda else []
    count = len(x)
    twice = [torch.cat([one, one]) for one in context]
    try:
        with torch.random.fork_rng(devices):
            first, again, beside_others = (
                call(torch.cat([x, other]), *twice)[:count]
                for other in (1 - 2 * x, 1 - 2 * x, 2 + x)
            )
    except (RuntimeError, TypeError) as error:  # of another width, or without a place for contexts
        shapes = " and contexts ".join(str(tuple(one.shape[1:])) for one in (x, *context))
        expected = f"expected {name} to take batches of events of shape {shapes}"
        raise ValueError(f"{expected}; got: {error}") from error
    if not _is_same(first, again):
        raise ValueError(
            f"expected {name} to be deterministic; got another output for the same event: does it "
            "contain dropout, or other noise?"
        )
    if not _is_same(first, beside_others):
        raise ValueError(
            f"expected {name} to map each event independently; got another output beside other "
            "events: does it normalize by the statistics of the batch?"
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal up to rounding, which depends on the size of the batch."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    finite = one[torch.isfinite(one)]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _check_derivatives(name: str, call: Any, x: Tensor, context: list[Tensor]) -> None:
    expected = (
        f"expected {name} to be twice differentiable, for the gradient of log|det J| is one of J"
    )
    try:
        near = linearize(call, x, tuple(context))
        left = torch.linspace(1, 2, x.numel()).to(near.output).view_as(x)
        right = left.flip(-1).square()
        product = near.jvp(right)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{expected}; got: {error}") from error
    # ⟨l, J r⟩ = ⟨Jᵀ l, r⟩ fails where torch drops derivatives without an error, as it can do for a
    # function that is marked ``once_differentiable``.
    forward, backward = left * product, near.vjp(left) * right
    size = torch.linalg.vector_norm(forward) + torch.linalg.vector_norm(backward)
    tolerance = torch.finfo(left.dtype).eps ** 0.5
    if (forward.sum() - backward.sum()).abs() > tolerance * size:
        raise ValueError(f"{expected}; got one whose second derivatives are lost")
