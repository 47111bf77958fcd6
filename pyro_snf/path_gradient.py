r"""The path derivative of a flow's log-density: the gradient without its noise.

In the ELBO's gradient with samples :math:`x = T_\theta(z)`,

.. math::
    \nabla_\theta\, [\log p(x) - \log q_\theta(x)] =
    \Big(\frac{\partial x}{\partial\theta}\Big)^{\!\top}
    [\nabla_x \log p(x) - \nabla_x \log q_\theta(x)]
    \;-\; \frac{\partial \log q_\theta(x)}{\partial\theta}\Big|_x ,

the last term is 0 in expectation, and pure noise. Without it, what is left is the *path
derivative*, which vanishes sample by sample where the guide is the posterior ("sticking the
landing"): the closer the guide, the less noise. It needs the score :math:`\nabla_x \log q(x)`, and
that is passed on from layer to layer,

.. math::
    \nabla_y \log q(y) = J^{-\top} \big(\nabla_x \log q(x) - \nabla_x \log|\det J(x)|\big),
    \qquad y = T(x),

so that a dense layer has to solve a linear system: a product with R, where one is tracked.

Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient
Estimators for Variational Inference. NIPS 2017. [arXiv:1703.09194]

Lorenz Vaitl, Kim A. Nicoli, Shinichi Nakajima, Pan Kessel. Gradients should stay on path. Machine
Learning: Science and Technology, 2022. [arXiv:2207.08219]
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.autograd import Function
from torch.distributions import ComposeTransform, Distribution, Transform

from pyro_snf.surrogate import first_order_only
from pyro_snf.transforms.base import GuardedTransformModule

__all__ = ["PathGradientDistribution", "push_score"]

_NO_SHAPE = torch.Size()


def push_score(transform: Transform, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """The score of ``y = T(x)``, from that of x.

    A transform that knows how has a method of this name. Elementwise ones need nothing but their
    log-det. All others are inverted, at ``y``, and differentiated there.

    :param Transform transform: T, bijective.
    :param Tensor x: of any batch shape.
    :param Tensor y: ``T(x)``.
    :param Tensor score: ``∇ log q(x)``, of x's shape.
    :return: ``∇ log q(y)``, of y's shape, a constant to autograd.
    """
    own = getattr(transform, "push_score", None)
    if own is not None:
        return own(x, y, score)
    if isinstance(transform, GuardedTransformModule):
        return push_score(transform.transform, x, y, score)
    with torch.enable_grad():
        if transform.domain.event_dim == 0 and (sign := _sign(transform)) is not None:
            # It may be written in x, in y (as an inverse's) or in both: dy/dx is the slope.
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            log_slope = transform.log_abs_det_jacobian(x, y)
            slope = sign * log_slope.detach().exp()
            if log_slope.requires_grad:
                by_x, by_y = torch.autograd.grad(log_slope.sum(), (x, y), allow_unused=True)
                score = score if by_x is None else score - by_x
                score = score if by_y is None else score - by_y * slope
            return score / slope
        y = y.detach().requires_grad_()
        x = transform.inv(y)
        # log q(y) = log q(x(y)) − log|det J(x(y))|, where the gradient of log q is known.
        total = (score * x).sum() - transform.log_abs_det_jacobian(x, y).sum()
        (gradient,) = torch.autograd.grad(total, y)
        return gradient


def _sign(transform: Transform) -> Any:
    try:
        return transform.sign
    except NotImplementedError:
        return None


class SampleWeights:
    """Whether all samples that one backward pass goes through count alike.

    Copies and pickles know of no samples.
    """

    def __init__(self) -> None:
        self._sample: weakref.ref[Tensor] | None = None
        self._backward_pass: int | None = None
        self._weight: Tensor | None = None

    def remember(self, x: Tensor) -> None:
        """The latest sample."""
        self._sample = weakref.ref(x)

    def is_sample(self, x: Tensor) -> bool:
        """Whether it is the latest sample."""
        return self._sample is not None and self._sample() is x

    def check(self, weights: Tensor) -> None:
        """Raise unless these are what the others of this backward pass are."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self._backward_pass:
            self._backward_pass = backward_pass
            self._weight = weights.detach().flatten()[0]
            if weights.numel() == 1:
                return  # not to make a GPU wait
        assert self._weight is not None
        if not torch.allclose(weights, self._weight, rtol=1e-3, atol=0.0, equal_nan=True):
            raise RuntimeError(
                "the path derivative needs an objective that averages over samples, such as the "
                "ELBO; this one weighs them unequally: use gradient='total' instead"
            )

    def __reduce__(self) -> tuple[type[SampleWeights], tuple[()]]:
        return type(self), ()


class PathGradientDistribution(dist.TransformedDistribution):
    """A ``TransformedDistribution`` whose samples are scored by their path derivative.

    ``log_prob(x)`` is the same number. Where x requires a gradient, as samples from ``rsample`` do,
    it goes to x alone, not to the parameters: see the module's text. There are no second
    derivatives, a RuntimeError says. For any other x, and in a ``torch.jit`` trace, all is as in a
    ``TransformedDistribution``.

    The path derivative belongs to objectives that average over samples, as the ELBO does. Where
    samples are weighted (``RenyiELBO``), the term that it leaves out is not 0 in expectation: a
    backward pass that brings unequal weights raises a RuntimeError.

    :param base_distribution: of z; it has a score.
    :param transforms: one or more, bijective.
    :param SampleWeights weights: shared by distributions whose samples may belong together.
    """

    _weights: SampleWeights

    def __init__(
        self,
        base_distribution: Distribution,
        transforms: Transform | list[Transform],
        validate_args: bool | None = None,
        *,
        weights: SampleWeights | None = None,
    ) -> None:
        super().__init__(base_distribution, transforms, validate_args=validate_args)
        self._weights = SampleWeights() if weights is None else weights

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> PathGradientDistribution:
        new = self._get_checked_instance(PathGradientDistribution, _instance)
        new._weights = self._weights
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = _NO_SHAPE) -> Tensor:
        """A sample, remembered."""
        x = super().rsample(torch.Size(sample_shape))
        self._weights.remember(x)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if not value.requires_grad or torch.jit.is_tracing():
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        weights = self._weights if self._weights.is_sample(value) else None
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        if value.shape != shape:
            value = value.expand(shape)
        parts = list(_flatten(self.transforms))
        values = [value]
        for part in reversed(parts):
            values.append(part.inv(values[-1]))  # remembered, if it is a sample
        values.reverse()
        # Of the event, as it is before each part.
        event_dim = len(self.event_shape)
        event_dim += sum(part.domain.event_dim - part.codomain.event_dim for part in parts)
        total, score = _score(self.base_dist, values[0])
        total = sum_rightmost(total, event_dim - len(self.base_dist.event_shape))
        for part, (x, y) in zip(parts, pairwise(values), strict=True):
            log_det = part.log_abs_det_jacobian(x, y).detach()
            total = total - sum_rightmost(log_det, event_dim - part.domain.event_dim)
            event_dim += part.codomain.event_dim - part.domain.event_dim
            score = push_score(part, x, y, score)
        return _WithScore.apply(value, total, score, weights)


def _flatten(transforms: Iterable[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform


def _score(base: Distribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """``log q(z)`` and its gradient in z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_prob = base.log_prob(z)
        score = None  # of a uniform distribution
        if log_prob.requires_grad:
            (score,) = torch.autograd.grad(log_prob.sum(), z, allow_unused=True)
    return log_prob.detach(), torch.zeros_like(z) if score is None else score


class _WithScore(Function):
    """The value, whose derivative in x is the score."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, score: Tensor, weights: SampleWeights | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, score, ctx.weights = inputs
        ctx.save_for_backward(x, score)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, score = ctx.saved_tensors
        if ctx.weights is not None:
            ctx.weights.check(cotangent)
        shape = cotangent.shape + (1,) * (score.dim() - cotangent.dim())
        gradient = cotangent.reshape(shape) * score
        if torch.is_grad_enabled():  # create_graph=True
            # Else a Hessian would lack this term, and nobody would know.
            gradient = first_order_only(
                gradient,
                x,
                error="the path derivative has no second derivatives: use gradient='total' instead",
            )
        return gradient, None, None, None
