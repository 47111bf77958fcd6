"""Gradients of single samples at a guide's last dense layer, in the coordinates of its input.

A sample ``x = W h + b`` has the gradient ``g`` of the loss. While a :class:`Recording` is attached,
the layer's parameters get no gradient, which would be a sum over the samples. Instead, the rows
``h`` and ``Wᵀ g`` are kept, from which :class:`~pyro_snf.optim.NaturalGradient` makes its step.

``g`` is the path derivative. The part of the guide's log-density in ``Wᵀ g`` is
``Wᵀ ∇_x log q(x) = ∇_h log q(h)``, the score of the layer's input: no system is solved. What comes
before the layer may be trained by the ordinary gradient.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["RecordedCall", "Recording", "RecordingSlot", "Samples"]

# More calls between two steps than this are not particles: nobody reads the recording.
_MAX_CALLS = 10_000


class Samples(NamedTuple):
    """Samples at a layer, their gradients in units of the weights of their log-densities."""

    inputs: Tensor
    """h, shape ``(N, D)``."""
    gradients: Tensor
    """``Wᵀ g``, shape ``(N, D)``: ``∇_h log q(h) − Wᵀ ∇_x log p(x)``."""
    scores: Tensor
    """``∇_h log q(h)``, shape ``(N, D)``: −h where h is standard normal."""


class Recording:
    """The samples that have passed through a layer since they were last taken.

    :param float max_length: the largest length of a path derivative that is passed on to what comes
        before the layer, in units of √D, the typical length of the score of a standard normal. The
        ordinary gradient is the path derivative minus the score: the former alone is shortened, for
        it vanishes at the optimum. If all of it were, its expectation there would not be 0, and
        guides were seen to widen without end.
    """

    def __init__(self, max_length: float) -> None:
        self.max_length = max_length
        self._samples: list[Samples] = []

    def __len__(self) -> int:
        """The number of samples."""
        return sum(len(samples.inputs) for samples in self._samples)

    def add(self, samples: Samples) -> None:
        if len(self._samples) >= _MAX_CALLS:
            raise RuntimeError(
                "this guide records its gradients for a NaturalGradient that makes no steps: use "
                "that optimizer, or delete it"
            )
        self._samples.append(samples)

    def take(self) -> Samples:
        """All samples, in one; the recording is empty then."""
        recorded, self._samples = self._samples, []
        return Samples(*map(torch.cat, zip(*recorded, strict=True)))

    def clear(self) -> None:
        self._samples = []

    def norms(self) -> Tensor:
        """Of the gradients of each call, shape ``(n,)``; there has to be one.

        Where a gradient is not finite, or its square, of which steps are made, a norm is not.
        """
        return torch.stack([one.gradients.double().norm() for one in self._samples])

    def state(self) -> list[tuple[Any, ...]]:
        """The samples, to be saved."""
        return [tuple(one) for one in self._samples]

    def load_state(self, state: list[tuple[Any, ...]]) -> None:
        self._samples = [Samples(*one) for one in state]


class RecordingSlot:
    """Where a recording is attached, for as long as its owner keeps it. Copies are empty."""

    def __init__(self) -> None:
        self._reference: Callable[[], Recording | None] = lambda: None

    def get(self) -> Recording | None:
        return self._reference()

    def set(self, recording: Recording | None) -> None:
        self._reference = (lambda: None) if recording is None else weakref.ref(recording)

    def __reduce__(self) -> tuple[type[RecordingSlot], tuple[()]]:
        return type(self), ()


class RecordedCall:
    """A call ``y = T(x)`` of a layer whose parameters are constants of the graph.

    :param pull: ``g ↦ Wᵀ g``, rows.
    :param Tensor inputs: x, shape ``(B, D)``.
    """

    # From log_prob, whose backward pass comes before that of the output, and sets the weights.
    score: Tensor
    is_path: bool

    def __init__(
        self, recording: Recording, pull: Callable[[Tensor], Tensor], inputs: Tensor
    ) -> None:
        self.recording = recording
        self.pull = pull
        self.inputs = inputs.detach()
        self.weights: Tensor | None = None

    @property
    def handle(self) -> None:
        """None: it has no tensor in the graph of y."""
        return None

    def output(self, x: Tensor, y: Tensor, parameter: Tensor) -> Tensor:
        """y with a graph, which leads to x.

        :param Tensor parameter: requires a gradient, and gets none: with it, y has a graph even
            where x requires no gradient.
        """
        return _Output.apply(x, y, parameter, self)

    def log_prob(
        self,
        value: Tensor,
        y: Tensor,
        score: Tensor,
        check: Callable[[Tensor], Tensor],
        *,
        is_path: bool,
    ) -> Tensor:
        """``log q(y)``.

        :param Tensor value: of it; a constant for the path derivative, else with a graph.
        :param Tensor score: ``∇ log q(x)``, of x's shape.
        :param check: of the weights in the backward pass, which it returns.
        :param bool is_path: whether the gradient in x is the path derivative, too. Else it is the
            ordinary one.
        """
        self.score, self.is_path = score.detach().reshape(self.inputs.shape), is_path
        return _Weighted.apply(value, y, self, check)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> Tensor:
        """Record, and return the gradient in x, from that in y."""
        pulled = self.pull(gradient.reshape(self.inputs.shape))
        if self.weights is not None:
            weights = self.weights.expand(gradient.shape[:-1]).reshape(-1, 1).to(pulled.dtype)
            score = self.score.to(pulled.dtype)
            path = torch.addcmul(pulled, weights, score)
            relative = path / weights
            self.recording.add(Samples(self.inputs, relative, score))
            unit: float | Tensor = math.sqrt(pulled.shape[-1])
            if not self.is_path:  # a rough density, such as that of random splines, has long scores
                unit = score.norm(dim=-1, keepdim=True).clamp_min(unit)
            longest, length = self.recording.max_length * unit, relative.norm(dim=-1, keepdim=True)
            pulled = torch.where(length > longest, path * (longest / length), path)
            if not self.is_path:
                pulled = torch.addcmul(pulled, weights, score, value=-1)
        return pulled.view(gradient.shape)


class _Output(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parameter: Tensor, call: RecordedCall) -> Tensor:
        ctx.call = call
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = ctx.call.backward(gradient)
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None


class _Weighted(Function):
    # y is an input, so that the backward pass comes here before it comes to y.
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        y: Tensor,
        call: RecordedCall,
        weights: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.call, ctx.weights = call, weights
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.call.weights = ctx.weights(cotangent)
        return cotangent, None, None, None
