"""Networks that start as the identity, for pairs of networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import init

from pyro_snf.options import are_counts, as_count, check_device, check_dtype, check_factory, expect

__all__ = ["ResidualMLP"]


class _ZeroLinear(nn.Linear):
    """A dense layer that starts at 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # whose draws are made in any case
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class ResidualMLP(nn.Module):
    r"""A residual network of vectors that starts as the identity.

    .. math::
        h_0 = x, \qquad h_{l+1} = h_l + W_l\, \phi_l(h_l, c), \qquad f(x) = h_n,

    where each φ is a network of dense layers with an activation after each, and the :math:`W_l`
    start at 0.

    >>> network = ResidualMLP(3, [16, 16])
    >>> bool((network(torch.ones(5, 3)) == 1).all())
    True

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param hidden_dims: the widths of φ's layers, at least one.
    :param int num_blocks: n, at least 1.
    :param int context_dim: the number of features of c; 0 for a network without a context.
    :param activation: makes an activation module. Smooth activations give continuous densities.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options outside these ranges.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        num_blocks: int = 2,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        input_dim = as_count("input_dim", input_dim)
        self.context_dim = context_dim = as_count("context_dim", context_dim, 0)
        check_factory("activation, a factory of modules", activation)
        check_device(device)
        check_dtype(dtype)
        fits = are_counts(hidden_dims) and len(hidden_dims) > 0
        expect("hidden_dims, a non-empty list of integers >= 1", fits, hidden_dims)

        def make_activation() -> nn.Module:
            made = activation()
            expect("activation() to be a module", isinstance(made, nn.Module), made)
            return made

        self.blocks = nn.ModuleList()
        for _ in range(as_count("num_blocks", num_blocks)):
            layers: list[nn.Module] = []
            width = input_dim + context_dim
            for hidden_dim in map(int, hidden_dims):
                linear = nn.Linear(width, hidden_dim, device=device, dtype=dtype)
                layers += [linear, make_activation()]
                width = hidden_dim
            last = _ZeroLinear(width, input_dim, device=device, dtype=dtype)
            self.blocks.append(nn.Sequential(*layers, last))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(torch.cat([x, *context], dim=-1) if context else x)
        return x
