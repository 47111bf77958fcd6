r"""The path derivative of a flow's log-density: an ELBO gradient of lower variance.

In the gradient of the ELBO for samples :math:`x = T_\theta(z)`,

.. math::
    \nabla_\theta\, [\log p(x) - \log q_\theta(x)] =
    \Big(\frac{\partial x}{\partial\theta}\Big)^{\!\top}
    [\nabla_x \log p(x) - \nabla_x \log q_\theta(x)]
    \;-\; \frac{\partial \log q_\theta(x)}{\partial\theta}\Big|_x ,

the last term has expectation 0 and adds only noise. Without it, the *path derivative* remains. It
is 0 in every sample where the guide equals the posterior ("sticking the landing"), so its variance
decreases as the guide approaches the posterior. It needs the score :math:`\nabla_x \log q(x)`,
which is computed layer by layer,

.. math::
    \nabla_y \log q(y) = J^{-\top} \big(\nabla_x \log q(x) - \nabla_x \log|\det J(x)|\big),
    \qquad y = T(x),

so a dense layer has to solve a linear system; with a tracked inverse R, this is a product with R.

The expectation of the omitted term is 0 only if the density :math:`q_\theta` is continuous. The
log-det of a map with a kink, such as a leaky ReLU, jumps there, and so does the density; the path
derivative lacks what the moving jump contributes, and is biased. Transforms with a continuous
log-det declare it by an attribute ``has_continuous_log_det = True``, as those of this library for
guides do.

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

from pyro_snf.krylov import krylov
from pyro_snf.recording import RecordedCall
from pyro_snf.surrogate import first_order_only
from pyro_snf.tracing import is_traced
from pyro_snf.transforms.base import SafelyCachedTransform
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["EqualWeightsCheck", "PathGradientDistribution", "push_score"]

_NO_SHAPE = torch.Size()

# Of the solutions for a score without an inverse: residuals, and the most backward passes.
_TOLERANCE, _MAX_STEPS = 1e-6, 50


def push_score(transform: Transform, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """The score of ``y = T(x)``, from that of x; exact, as far as T's inverse and log-det are.

    A transform may have a method of this name, which is then called. An elementwise one is
    differentiated by its log-det alone. For any other, ``T.inv(y)`` and its log-det are
    differentiated by autograd. Without an inverse, as Pyro's ``Planar``, or where that takes a
    pass for each feature, as Pyro's autoregressive transforms do, GMRES solves with the transposed
    Jacobian, to a residual of 1e-6, in at most 50 backward passes.

    :param Transform transform: T, bijective.
    :param Tensor x: of any batch shape.
    :param Tensor y: ``T(x)``.
    :param Tensor score: ``∇ log q(x)``, of x's shape.
    :return: ``∇ log q(y)``, of y's shape, a constant to autograd.
    """
    if isinstance(transform, SafelyCachedTransform):
        transform = transform.transform
    own = getattr(transform, "push_score", None)
    if own is not None:
        return own(x, y, score)
    with torch.enable_grad():
        if transform.domain.event_dim == 0 and (sign := _sign(transform)) is not None:
            # The log-det may be a function of x, of y (that of an inverse) or of both, and dy/dx is
            # the slope.
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            log_slope = transform.log_abs_det_jacobian(x, y)
            slope = sign * log_slope.detach().exp()
            if log_slope.requires_grad:
                by_x, by_y = torch.autograd.grad(log_slope.sum(), (x, y), allow_unused=True)
                score = score if by_x is None else score - by_x
                score = score if by_y is None else score - by_y * slope
            return score / slope
        if hasattr(transform, "arn"):  # Pyro's autoregressive networks
            return _solve_for_score(transform, x, score)
        y = y.detach().requires_grad_()
        try:
            x_of_y = transform.inv(y)
        except (KeyError, NotImplementedError):  # Pyro's and torch's, for one that does not exist
            return _solve_for_score(transform, x, score)
        # log q(y) = log q(x(y)) − log|det J(x(y))|, where the gradient of log q(x) is the score.
        total = (score * x_of_y).sum() - transform.log_abs_det_jacobian(x_of_y, y).sum()
        (gradient,) = torch.autograd.grad(total, y)
        return gradient


def _solve_for_score(transform: Transform, x: Tensor, score: Tensor) -> Tensor:
    """``J⁻ᵀ (score − ∇ log|det J|)``, by GMRES, a backward pass for each of its steps."""
    x = x.detach().requires_grad_()
    y = transform(x)
    (by_x,) = torch.autograd.grad(
        transform.log_abs_det_jacobian(x, y).sum(), x, retain_graph=True, materialize_grads=True
    )
    rows = (score - by_x).detach().reshape(-1, x.shape[-1])

    def transposed(vectors: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(y, x, vectors.view_as(y), retain_graph=True)
        return product.reshape(vectors.shape)

    found = krylov(
        transposed,
        lambda vectors: vectors,
        rows,
        preconditioned=rows,
        tolerance=_TOLERANCE,
        max_steps=_MAX_STEPS,
    )
    return found.solution.view_as(score)


def _sign(transform: Transform) -> Any:
    try:
        return transform.sign
    except NotImplementedError:
        return None


class EqualWeightsCheck:
    """Checks that a backward pass multiplies the log-densities of all samples by the same weight.

    The check knows the latest sample, and the weight of the first sample in the current backward
    pass. Copies and pickles start without either.
    """

    def __init__(self) -> None:
        self._sample: weakref.ref[Tensor] | None = None
        self._backward_pass: int | None = None
        self._is_first_pass = True
        self._weight: Tensor | None = None

    def remember(self, x: Tensor) -> None:
        """Let x be the latest sample."""
        self._sample = weakref.ref(x)

    def is_sample(self, x: Tensor) -> bool:
        """Whether x is the latest sample."""
        return self._sample is not None and self._sample() is x

    def check(self, weights: Tensor) -> Tensor:
        """The weights, if none differs from earlier ones of this backward pass.

        Otherwise a RuntimeError. A GPU is waited for in the first pass only; in later ones, NaN.
        """
        # Private. Torch has no public name for the current backward pass: the hooks and the
        # functions of torch.autograd, up to 2.13, are not told to which pass a call belongs, and
        # weights of different passes may differ.
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self._backward_pass:
            self._is_first_pass = self._backward_pass is None
            self._backward_pass = backward_pass
            self._weight = weights.detach().flatten()[0]
            if weights.numel() == 1:
                return weights
        assert self._weight is not None
        is_equal = torch.isclose(weights, self._weight, rtol=1e-3, atol=0.0, equal_nan=True).all()
        if weights.is_cuda and not self._is_first_pass:
            return torch.where(is_equal, weights, torch.nan)
        if not is_equal:
            raise RuntimeError(
                "the path derivative needs an objective that averages over samples, such as the "
                "ELBO; this one weights them unequally: use gradient='total' instead"
            )
        return weights

    def __reduce__(self) -> tuple[type[EqualWeightsCheck], tuple[()]]:
        return type(self), ()


class PathGradientDistribution(dist.TransformedDistribution):
    """A ``TransformedDistribution`` whose log-density has the path derivative as its gradient.

    The value of ``log_prob(x)`` is the same. Where x requires a gradient, as samples of ``rsample``
    do, ``log_prob(x)`` has a gradient in x but none in the parameters: see the text of this module.
    A second derivative is a RuntimeError. For any other x, and in a ``torch.jit`` trace,
    ``log_prob`` is that of a ``TransformedDistribution``.

    The log-dets of the transforms have to be continuous: see the text of this module. The path
    derivative is for objectives that average over samples, such as the ELBO. For weighted
    samples (``RenyiELBO``), the omitted term does not have expectation 0; a backward pass with
    unequal weights raises a RuntimeError.

    :param base_distribution: of z, with a log-density that can be differentiated in z.
    :param transforms: one or more, bijective.
    :param EqualWeightsCheck weights_check: shared by distributions whose samples may occur in one
        backward pass; one of its own if None.
    :param bool is_path: False for the ordinary gradient. A last layer whose samples are recorded
        (:mod:`pyro_snf.recording`) follows the path derivative all the same.
    """

    # Private names of torch here are those by which its own distributions are subclassed.

    _weights_check: EqualWeightsCheck
    _is_path: bool

    def __init__(
        self,
        base_distribution: Distribution,
        transforms: Transform | list[Transform],
        validate_args: bool | None = None,
        *,
        weights_check: EqualWeightsCheck | None = None,
        is_path: bool = True,
    ) -> None:
        super().__init__(base_distribution, transforms, validate_args=validate_args)
        self._is_path = is_path
        self._weights_check = weights_check or EqualWeightsCheck()

    def expand(self, batch_shape: Iterable[int], _instance: Any = None) -> PathGradientDistribution:
        new = self._get_checked_instance(PathGradientDistribution, _instance)
        new._weights_check, new._is_path = self._weights_check, self._is_path
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = _NO_SHAPE) -> Tensor:
        """A sample; the check of weights remembers it."""
        x = super().rsample(torch.Size(sample_shape))
        self._weights_check.remember(x)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if not value.requires_grad or is_traced():
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        check = self._weights_check if self._weights_check.is_sample(value) else None
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        if value.shape != shape:  # the cached pair of a sample is found by its identity
            value = value.expand(shape)
        parts = list(_flatten(self.transforms))
        values = [value]
        for part in reversed(parts):
            values.append(part.inv(values[-1]))  # cached, if it is a sample
        values.reverse()
        call = _recorded_call(parts[-1], values[-2], value)
        if call is None and not self._is_path:
            return super().log_prob(value)
        # The number of event dimensions before each part.
        event_dim = len(self.event_shape)
        event_dim += sum(part.domain.event_dim - part.codomain.event_dim for part in parts)
        total, score = _score(self.base_dist, values[0])
        total = sum_rightmost(total, event_dim - len(self.base_dist.event_shape))
        for part, (x, y) in zip(parts, pairwise(values), strict=True):
            log_det = part.log_abs_det_jacobian(x, y)
            log_det = log_det.detach() if self._is_path else log_det
            total = total - sum_rightmost(log_det, event_dim - part.domain.event_dim)
            event_dim += part.codomain.event_dim - part.domain.event_dim
            if y is value and call is not None:
                weights = check.check if check and self._is_path else _accept
                return call.log_prob(total, value, score, weights, is_path=self._is_path)
            score = push_score(part, x, y, score)
        return _WithScore.apply(value, total, score, check)


def _recorded_call(transform: Transform, x: Tensor, y: Tensor) -> RecordedCall | None:
    if isinstance(transform, SelfNormalizingLinear):
        return transform.recorded_call(x, y)
    return None


def _accept(weights: Tensor) -> Tensor:
    """No check."""
    return weights


def _flatten(transforms: Iterable[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform


def _score(base: Distribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """``log q(z)`` and its gradient in z, both constants to autograd."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_prob = base.log_prob(z)
        if not log_prob.requires_grad:  # as for a uniform distribution
            return log_prob, torch.zeros_like(z)
        (score,) = torch.autograd.grad(log_prob.sum(), z, materialize_grads=True)
    return log_prob.detach(), score


class _WithScore(Function):
    """The value, whose derivative in x is the score; its cotangents are the weights to check."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, score: Tensor, check: EqualWeightsCheck | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, score, ctx.check = inputs
        ctx.save_for_backward(x, score)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, score = ctx.saved_tensors
        if ctx.check is not None:
            cotangent = ctx.check.check(cotangent)
        shape = cotangent.shape + (1,) * (score.dim() - cotangent.dim())
        gradient = cotangent.reshape(shape) * score
        if torch.is_grad_enabled():  # create_graph=True
            # Without the error, a Hessian would silently lack the derivative of the score.
            gradient = first_order_only(
                gradient,
                x,
                error="the path derivative has no second derivatives: use gradient='total' instead",
            )
        return gradient, None, None, None
