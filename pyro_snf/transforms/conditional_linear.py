"""Dense layers that depend on a context, at the cost of one matrix for all contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import DenseNN
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import Linear, init

from pyro_snf.maps.base import scale_and_shift
from pyro_snf.options import are_counts, as_count, expect, is_count, shown
from pyro_snf.precision import at_least_float32, without_autocast
from pyro_snf.transforms.base import (
    InvertibleTransformModule,
    broadcast_with_context,
    check_input,
)
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.context_scale import ContextScale, StandardizesContexts
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["ConditionalSelfNormalizingLinear", "conditional_self_normalizing_linear"]


class ConditionalSelfNormalizingLinear(StandardizesContexts, ConditionalTransformModule):
    r"""The affine map whose bias, scale and low-rank factor depend on a context c.

    .. math::
        T(x; c) = \operatorname{diag}(e^{s(c)})\, W\, (I + U(c) V(c)^\top)\, x + b(c),

    .. math::
        \log|\det| = \log|\det W| + \sum_i s_i(c) + \log|\det(I + V(c)^\top U(c))|,

    where the matrix W, of a :class:`SelfNormalizingLinear` without a bias, is the same for all
    contexts, and b, s, U and V are the outputs of a network. The low-rank factor is to the right of
    W, so that its determinant and its inverse,

    .. math::
        (I + U V^\top)^{-1} = I - U (I + V^\top U)^{-1} V^\top,

    need no inverse of W. ``W + PQᵀ`` is of this form as well, with ``U = W⁻¹P`` and ``V = Q``.

    The terms that depend on the context are exact: in T, its inverse, the log-det and the
    gradients. log|det W| and W⁻¹ are those of the shared layer, :attr:`linear`, with its options.
    By default log|det W| is an estimate in training, whose gradient has a measured error, and exact
    otherwise. It is computed once for all contexts.

    A row costs O(D²), and a context costs O(Dr²) and a pass through the network. A full matrix for
    each context would cost O(D³), and need a network with D² outputs.

    As an amortized guide, with a distribution for each of eight contexts:

    >>> transform = conditional_self_normalizing_linear(3, context_dim=2, rank=1, init_scale=0.1)
    >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> guide = dist.ConditionalTransformedDistribution(base, [transform])
    >>> guide.condition(torch.zeros(8, 2)).rsample().shape
    torch.Size([8, 3])

    As a conditional density model, data pass through T:

    >>> density = dist.ConditionalTransformedDistribution(base, [transform.inv])
    >>> loss = -density.condition(torch.zeros(8, 2)).log_prob(torch.ones(8, 3)).mean()
    >>> loss.backward()

    The network expects contexts of about unit scale. If they have other units, give the layer a
    sample of them before training, of which it keeps the mean and the standard deviation. If x has
    other units, map the data first by an :class:`ActNorm`, which is not to be trained:

    >>> years, grams = torch.rand(1000, 2) * 100 + 1900, torch.randn(1000, 3) * 1e-3
    >>> transform.standardize_contexts(years)
    >>> norm = ActNorm(3, event_dim=1)
    >>> norm.initialize(grams)
    >>> density = dist.ConditionalTransformedDistribution(base, [transform.inv, norm.inv])
    >>> loss = -density.condition(years).log_prob(grams).mean()
    >>> optimizer = torch.optim.Adam(transform.parameters(), lr=1e-3)

    With another network, of class labels for example:

    >>> class Labels(torch.nn.Embedding):
    ...     def forward(self, labels):
    ...         return super().forward(labels).chunk(2, dim=-1)
    >>> transform = ConditionalSelfNormalizingLinear(3, Labels(10, 6))
    >>> transform.condition(torch.tensor([4, 2]))(torch.zeros(5, 1, 3)).shape
    torch.Size([5, 2, 3])

    :param int input_dim: D, the number of features.
    :param nn: maps a context, for Pyro's ``DenseNN`` of shape ``(*batch, context_dim)``, to a
        tuple ``(b, s)``, each of shape ``(*batch, D)``; with a rank to ``(b, s, U, V)``, the last
        two of shape ``(*batch, r·D)``: r columns of length D, one after the other.
    :param int rank: r, of the low-rank factor; 0 for none.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingLinear` but ``bias``.
    :raises ValueError: for options that are not of these; for contexts that do not fit a
        ``DenseNN``, and for outputs of the network of another number, shape or dtype; for inputs as
        :class:`SelfNormalizingLinear` does, and for inputs whose batch does not broadcast with that
        of the context.
    :raises torch.linalg.LinAlgError: by the log-determinant and the inverse if W is singular or not
        finite, and by the inverse if an I + VᵀU is singular. (Then the log-det is −∞ for the
        contexts concerned, and finite for all others.)

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        input_dim: int,
        nn: Callable[[Any], Sequence[Tensor]],
        *,
        rank: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        input_dim, rank = _checked_sizes(input_dim, rank)
        expect("nn, a network that maps contexts to tensors", callable(nn), nn)
        if "bias" in kwargs:
            got = shown(kwargs["bias"])
            raise ValueError(f"expected no bias: b(c) is there; got bias={got}")
        self.input_dim = input_dim
        self.rank = rank
        self.nn = nn
        #: The map x ↦ Wx that all contexts share.
        self.linear = SelfNormalizingLinear(input_dim, bias=False, **kwargs)
        if isinstance(nn, DenseNN):
            found, dims = list(nn.param_dims), _output_dims(input_dim, rank)
            expect(f"nn, a DenseNN with param_dims={dims}", found == dims, found)
        self.context_scale = (
            ContextScale(nn.input_dim, self.linear.theta) if isinstance(nn, DenseNN) else None
        )

    def extra_repr(self) -> str:
        return f"{self.input_dim}, rank={self.rank}"

    def _wanted_networks(self) -> str:
        return f"a network that is a DenseNN; got {type(self.nn).__name__}"

    def condition(self, context: Any) -> Compose:
        """The transform ``T(·; c)`` of a context, or of a batch of contexts.

        Each call evaluates the network once, and returns a new transform with caches of its own,
        for the current parameters of the network. So each training step has to call it, as a model
        or a guide does.

        :param context: c, for a ``DenseNN`` of shape ``(*batch, context_dim)``. Inputs of the
            transform have shape ``(..., D)``, and ``...`` broadcasts with ``batch``.
        """
        bias, log_scale, *factors = self._parameters_of(context)
        # With one cache for all contexts, each sample would replace those of other contexts.
        parts: list[Transform] = [self.linear.copy_with_own_cache(), ScaleAndShift(bias, log_scale)]
        if factors:
            u, v = (factor.unflatten(-1, (self.rank, self.input_dim)) for factor in factors)
            parts.insert(0, LowRankUpdate(u, v))
        return Compose(parts).train(self.training)

    def _parameters_of(self, context: Any) -> list[Tensor]:
        """The network's outputs, checked: ``b, s`` and, with a rank, ``U, V`` as flat vectors."""
        dtype = self.linear.theta.dtype
        under_autocast = torch.is_autocast_enabled(self.linear.theta.device.type)
        # Other networks than Pyro's check their contexts themselves.
        if self.context_scale is not None:
            context = self.context_scale(context)
        outputs = self.nn(context)
        _check_outputs(outputs, _output_dims(self.input_dim, self.rank))
        if under_autocast:
            return [one.to(dtype) for one in outputs]
        if any(one.dtype != dtype for one in outputs):
            raise ValueError(
                f"expected nn(context) to be of the layer's dtype {dtype}; "
                f"got {[one.dtype for one in outputs]}"
            )
        return list(outputs)


class _BatchOfMaps(InvertibleTransformModule):
    """An affine map of vectors for each context, given by tensors with batch dimensions.

    The tensors are outputs of a network, not parameters. They have a graph, and are not saved.

    :param batch_shape: of the contexts.
    :param tensors: on which the map depends.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, batch_shape: torch.Size, *tensors: Tensor) -> None:
        super().__init__()
        self.input_dim = tensors[0].shape[-1]
        self.batch_shape = batch_shape
        self._tensors = tensors

    def extra_repr(self) -> str:
        return f"{self.input_dim}, batch_shape={tuple(self.batch_shape)}"

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``shape`` with its batch broadcast with the contexts'."""
        return broadcast_with_context(self, shape, 1, self.batch_shape)

    inverse_shape = forward_shape

    def _check(self, x: Tensor) -> None:
        check_input(self, x, (self.input_dim,), self._tensors[0].dtype)
        self.forward_shape(x.shape)

    def _map_parameters(self) -> list[Tensor]:
        return list(self._tensors)


class ScaleAndShift(_BatchOfMaps):
    r"""The map :math:`T(x) = e^{s} \odot x + b`, at a cost of O(D).

    :param Tensor bias: b, shape ``(*batch, D)``.
    :param Tensor log_scale: s, shape ``(*batch, D)``.
    """

    def __init__(self, bias: Tensor, log_scale: Tensor) -> None:
        super().__init__(log_scale.shape[:-1], bias, log_scale)

    def _call(self, x: Tensor) -> Tensor:
        self._check(x)
        bias, log_scale = self._tensors
        return scale_and_shift(x, log_scale.exp(), bias)

    def _inverse(self, y: Tensor) -> Tensor:
        self._check(y)
        bias, log_scale = self._tensors
        return (y - bias) * torch.exp(-log_scale)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x)
        _, log_scale = self._tensors
        return at_least_float32(log_scale).sum(-1).expand(self.forward_shape(x.shape)[:-1])


class LowRankUpdate(_BatchOfMaps):
    r"""The map :math:`T(x) = (I + U V^\top)\, x`, at a cost of O(Dr) a row and O(Dr²) a context.

    :param Tensor u: Uᵀ, shape ``(*batch, r, D)``.
    :param Tensor v: Vᵀ, shape ``(*batch, r, D)``.
    """

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__(u.shape[:-2], u, v)
        self.rank = u.shape[-2]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _call(self, x: Tensor) -> Tensor:
        self._check(x)
        return _add_low_rank(x, *self._tensors)

    def _inverse(self, y: Tensor) -> Tensor:
        # By Woodbury's identity the inverse is another such map, with −U, and V (I + VᵀU)⁻ᵀ for V.
        self._check(y)
        with without_autocast(y.device):
            u, v = map(at_least_float32, self._tensors)
            try:
                solution = torch.linalg.solve(_small_matrix(u, v), v)
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(f"{self}: I + VᵀU: {error}") from error
            return _add_low_rank(y.to(u.dtype), -u, solution).to(self._tensors[0].dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x)
        with without_autocast(x.device):
            matrix = _small_matrix(*map(at_least_float32, self._tensors))
            value = torch.linalg.slogdet(matrix).logabsdet
            return value.expand(self.forward_shape(x.shape)[:-1])


def _add_low_rank(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``x + U Vᵀ x``, from Uᵀ and Vᵀ of shape ``(*batch, r, D)``."""
    coordinates = torch.einsum("...d, ...rd -> ...r", x, v)
    return x + torch.einsum("...r, ...rd -> ...d", coordinates, u)


def _small_matrix(u: Tensor, v: Tensor) -> Tensor:
    """``I + Vᵀ U``, shape ``(*batch, r, r)``, whose determinant is that of ``I + U Vᵀ``."""
    return torch.eye(u.shape[-2], dtype=u.dtype, device=u.device) + v @ u.mT


class _FirstOutputs(Linear):
    """A network's last layer, which gives ``b = s = 0``, ``U = 0`` and random V at the start."""

    def __init__(self, in_features: int, out_features: int, input_dim: int, rank: int) -> None:
        self.input_dim, self.rank = input_dim, rank  # first: nn.Linear resets the parameters
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)
        if self.rank:
            columns = self.bias[-self.rank * self.input_dim :]
            init.normal_(columns, std=self.input_dim**-0.5)


def _output_dims(input_dim: int, rank: int) -> list[int]:
    """The sizes of b, s and, with a rank, of U and V."""
    return [input_dim] * 2 + [rank * input_dim] * (2 if rank else 0)


def _checked_sizes(input_dim: int, rank: int) -> tuple[int, int]:
    input_dim = as_count("input_dim", input_dim)
    expect(f"rank, an integer from 0 to {input_dim}", is_count(rank, 0) and rank <= input_dim, rank)
    return input_dim, int(rank)


def _check_outputs(outputs: Any, dims: list[int]) -> None:
    found: Any = type(outputs).__name__
    if isinstance(outputs, tuple | list) and all(isinstance(one, Tensor) for one in outputs):
        found = [tuple(one.shape) for one in outputs]
        if found and found == [(*found[0][:-1], dim) for dim in dims]:
            return
    expected = ", ".join(f"(*batch, {dim})" for dim in dims)
    raise ValueError(
        f"expected nn(context) to be {len(dims)} tensors of shapes {expected}; got {found}"
    )


def conditional_self_normalizing_linear(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    rank: int = 0,
    **kwargs: Any,
) -> ConditionalSelfNormalizingLinear:
    """A :class:`ConditionalSelfNormalizingLinear` with a ``DenseNN``, in the style of Pyro's
    helper functions.

    It starts as ``init_scale`` times the identity for all contexts: b, s and U are 0. The columns
    of V are random, with norms of about 1, and drawn from torch's global random stream as the
    network's weights are. So U has a gradient from the first step on.

    >>> transform = conditional_self_normalizing_linear(3, 2, [16], rank=1, init_scale=0.5)
    >>> transform.condition(torch.randn(4, 2))(torch.ones(3))[0]
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<SelectBackward0>)

    :param int input_dim: D, the number of features.
    :param int context_dim: the number of features of a context.
    :param hidden_dims: the widths of the network's hidden layers, at least one; by default
        ``[10·D, 10·D]``, as in Pyro.
    :param int rank: r, of the low-rank factor; 0 for none.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingLinear` but ``bias``. The network
        is of the same ``device`` and ``dtype``.
    """
    input_dim, rank = _checked_sizes(input_dim, rank)
    context_dim = as_count("context_dim", context_dim)
    widths = [10 * input_dim] * 2 if hidden_dims is None else hidden_dims
    fits = are_counts(widths) and len(widths) > 0  # a DenseNN has at least one hidden layer
    expect("hidden_dims, a non-empty list of integers >= 1", fits, hidden_dims)
    with torch.device("cpu"):  # Pyro reads numbers off tensors, which "meta" ones do not have
        network = DenseNN(context_dim, list(widths), param_dims=_output_dims(input_dim, rank))
        last: Any = network.layers[-1]
        network.layers[-1] = _FirstOutputs(last.in_features, last.out_features, input_dim, rank)
    transform = ConditionalSelfNormalizingLinear(input_dim, network, rank=rank, **kwargs)
    network.to(transform.linear.theta)  # its device and dtype
    return transform
