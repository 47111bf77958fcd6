"""An affine autoregressive map whose Jacobian is diagonal plus low-rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_snf.caching import TensorMemo
from pyro_snf.options import as_count, as_positive, check_device, check_dtype
from pyro_snf.precision import at_least_float32, soft_bound, without_autocast
from pyro_snf.transforms.base import InvertibleTransformModule, check_input

__all__ = ["LowRankAutoregressive", "low_rank_autoregressive"]


class LowRankAutoregressive(InvertibleTransformModule):
    r"""The affine autoregressive map (Kingma et al., 2016) of a narrow network.

    .. math::
        y_i = e^{s_i(x_{<i})}\, x_i + t_i(x_{<i}), \qquad
        \binom{t}{r} = C\,h + c, \quad h = \tanh(B x + b), \quad s = \sigma \tanh(r / \sigma).

    The H hidden units are spread evenly over the features: the inputs of a unit are
    :math:`x_1 \ldots x_d`, and it is an input of :math:`y_{d+1} \ldots y_D`. So the first features
    shift and scale the later ones, as the posteriors of hierarchies, funnels and bananas need it.
    Causes should come before effects, which is the order of a Pyro model. Between dense layers, the
    map makes the distribution of a flow non-Gaussian.

    Its Jacobian is a diagonal matrix plus one of rank H. Value, inverse and log-det,
    :math:`\sum_i s_i`, are exact and cost O(DH), the inverse in H + 1 sequential steps.
    :meth:`push_score`, which path gradients need, is exact and costs O(DH² + H³).

    It starts as the identity, with C = 0. B is drawn from torch's global random stream. B and C are
    in units of 1/√fan-in and 2/√H, and s is bounded by :math:`\pm\sigma`, so that Pyro's usual
    learning rates are suitable.

    >>> flow = Compose([LowRankAutoregressive(5), SelfNormalizingLinear(5, init_scale=0.1)])
    >>> flow(torch.ones(2, 5))[0]
    tensor([0.1000, 0.1000, 0.1000, 0.1000, 0.1000], grad_fn=<SelectBackward0>)

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param int hidden_dim: H, the number of hidden units.
    :param float max_log_scale: σ, positive.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options outside these ranges, and for inputs of other shapes or dtypes.

    References:

    Diederik P. Kingma, Tim Salimans, Rafal Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling.
    Improving Variational Inference with Inverse Autoregressive Flow. NIPS 2016. [arXiv:1606.04934]

    Mathieu Germain, Karol Gregor, Iain Murray, Hugo Larochelle. MADE: Masked Autoencoder for
    Distribution Estimation. ICML 2015. [arXiv:1502.03509]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    has_continuous_log_det = True

    mask_in: Tensor
    mask_out: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 64,
        *,
        max_log_scale: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = as_count("input_dim", input_dim)
        self.hidden_dim = hidden_dim = as_count("hidden_dim", hidden_dim)
        self.max_log_scale = as_positive("max_log_scale", max_log_scale)
        check_device(device)
        check_dtype(dtype)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_in = nn.Parameter(torch.empty(hidden_dim, input_dim, **factory))  # B
        self.bias_in = nn.Parameter(torch.empty(hidden_dim, **factory))  # b
        self.weight_out = nn.Parameter(torch.empty(2 * input_dim, hidden_dim, **factory))  # C
        self.bias_out = nn.Parameter(torch.empty(2 * input_dim, **factory))  # c
        # The last input of each unit. The last feature is no unit's input: no output depends on it.
        self._last_inputs = [unit * (input_dim - 1) // hidden_dim for unit in range(hidden_dim)]
        # Ranges of outputs that depend on the same units.
        starts = {0, input_dim, *(last + 1 for last in self._last_inputs)}
        self._stages = list(pairwise(sorted(starts)))
        self.register_buffer("mask_in", None, persistent=False)
        self.register_buffer("mask_out", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity, with a random B."""
        self.weight_in.normal_()
        for parameter in (self.bias_in, self.weight_out, self.bias_out):
            parameter.zero_()
        self._set_masks()
        self.clear_cache()

    def _set_masks(self) -> None:
        """Masks for B and C, multiplied by the units of B and C."""
        last_inputs, features = torch.tensor(self._last_inputs), torch.arange(self.input_dim)
        is_input = (features <= last_inputs.unsqueeze(-1)).double()
        is_output = (last_inputs < features.unsqueeze(-1)).double().repeat(2, 1)
        self.mask_in = (is_input / is_input.sum(-1, keepdim=True).sqrt()).to(self.weight_in)
        self.mask_out = (is_output * 2 / math.sqrt(self.hidden_dim)).to(self.weight_in)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, hidden_dim={self.hidden_dim}, max_log_scale={self.max_log_scale}"

    def _call(self, x: Tensor) -> Tensor:
        return self._call_with_memo(x)[0]

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, TensorMemo]:
        shift, log_scale = self._shift_and_log_scale(x)
        y = torch.addcmul(shift, x, log_scale.exp())
        return y, TensorMemo(log_scale)

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, (self.input_dim,), self.weight_in.dtype)
        weight_in, weight_out = self._weights()
        weight_t, weight_r = weight_out.chunk(2)
        bias_t, bias_r = self.bias_out.chunk(2)
        inner = self.bias_in.expand(*y.shape[:-1], self.hidden_dim)
        parts = []
        for start, stop in self._stages:
            # Complete for the units that this stage depends on; the masks leave out the others.
            hidden = torch.tanh(inner)
            shift = F.linear(hidden, weight_t[start:stop], bias_t[start:stop])
            log_scale = F.linear(hidden, weight_r[start:stop], bias_r[start:stop])
            log_scale = soft_bound(log_scale, self.max_log_scale)
            parts.append((y[..., start:stop] - shift) * torch.exp(-log_scale))
            inner = inner + F.linear(parts[-1], weight_in[:, start:stop])
        return torch.cat(parts, dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        memo = self._memo_of(x, y)
        log_scale = self._shift_and_log_scale(x)[1] if memo is None else memo.handle
        return at_least_float32(log_scale).sum(-1)

    @torch.no_grad()
    def push_score(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """See :func:`pyro_snf.path_gradient.push_score`; by Woodbury's identity."""
        with without_autocast(x.device):
            weight_in, weight_out = self._weights()
            x, score = x.to(weight_in.dtype), score.to(weight_in.dtype)  # may differ under autocast
            hidden, _, log_scale = self._network(x, weight_in, weight_out)
            scale = log_scale.exp()
            hidden_slope = 1 - hidden.square()
            slope = 1 - (log_scale / self.max_log_scale).square()  # ds/dr
            weight_t, weight_r = weight_out.chunk(2)
            # Jᵀ = diag(eˢ) + Bᵀ M with M = diag(h') (C_tᵀ + C_rᵀ diag(s' x eˢ)), shape (H, D), and
            # ∇ log|det J| = Bᵀ (h' ⊙ C_rᵀ s').
            middle = weight_t.mT + weight_r.mT * (slope * x * scale).unsqueeze(-2)
            middle = hidden_slope.unsqueeze(-1) * middle
            right = (score - F.linear(hidden_slope * (slope @ weight_r), weight_in.mT)) / scale
            # u + diag(e⁻ˢ) Bᵀ M u = right:  first M u, from (I + M diag(e⁻ˢ) Bᵀ) M u = M right.
            small = (middle / scale.unsqueeze(-2)) @ weight_in.mT
            small.diagonal(dim1=-2, dim2=-1).add_(1)
            # Never singular, but for rounding: a check would wait for a GPU.
            product = torch.linalg.solve_ex(
                at_least_float32(small), at_least_float32(middle @ right.unsqueeze(-1))
            ).result.to(x.dtype)
            return right - F.linear(product.squeeze(-1), weight_in.mT) / scale

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> LowRankAutoregressive:  # .to(), .double(), …
        super()._apply(fn, recurse)
        self._set_masks()  # anew, so that they are not rounded to an earlier dtype
        return self

    def _weights(self) -> tuple[Tensor, Tensor]:
        """B and C, masked, shapes ``(H, D)`` and ``(2D, H)``."""
        return self.weight_in * self.mask_in, self.weight_out * self.mask_out

    def _network(
        self, x: Tensor, weight_in: Tensor, weight_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h, shape ``(..., H)``, and t and s, each of x's shape."""
        hidden = torch.tanh(F.linear(x, weight_in, self.bias_in))
        shift, log_scale = F.linear(hidden, weight_out, self.bias_out).chunk(2, -1)
        return hidden, shift, soft_bound(log_scale, self.max_log_scale)

    def _shift_and_log_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """t and s, each of x's shape."""
        check_input(self, x, (self.input_dim,), self.weight_in.dtype)
        return self._network(x, *self._weights())[1:]


def low_rank_autoregressive(
    input_dim: int, hidden_dim: int = 64, **kwargs: Any
) -> LowRankAutoregressive:
    """A :class:`LowRankAutoregressive`, in the style of Pyro's helper functions.

    :param int input_dim: D, the number of features.
    :param int hidden_dim: H, the number of hidden units.
    :param kwargs: the keyword arguments of :class:`LowRankAutoregressive`.
    """
    return LowRankAutoregressive(input_dim, hidden_dim, **kwargs)
