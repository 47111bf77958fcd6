"""Networks that start as the identity, for pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import init

from pyro_snf.transforms.options import check_count, check_floating, expect, is_count

__all__ = ["ResidualMLP"]


class ResidualMLP(nn.Module):
    r"""A residual network of vectors that starts as the identity,

    .. math::
        h_0 = x, \qquad h_{l+1} = h_l + W_l\, \phi_l(h_l, c), \qquad f(x) = h_n,

    each φ being a network of dense layers with an activation after each, and the :math:`W_l`
    being 0 at the start.

    >>> network = ResidualMLP(3, [16, 16])
    >>> bool((network(torch.ones(5, 3)) == 1).all())
    True

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param hidden_dims: the widths of φ's layers, at least one.
    :param int num_blocks: n, at least 1.
    :param int context_dim: the number of features of c, which is not there if it is 0.
    :param activation: makes the activations. Smooth ones give densities that are continuous.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these.
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
        check_count("input_dim", input_dim)
        check_count("num_blocks", num_blocks)
        check_count("context_dim", context_dim, 0)
        check_floating(dtype)
        widths = list(hidden_dims) if isinstance(hidden_dims, Sequence) else []
        expect(
            "hidden_dims, a non-empty list of integers >= 1",
            len(widths) > 0 and all(map(is_count, widths)),
            hidden_dims,
        )
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            layers: list[nn.Module] = []
            width = input_dim + context_dim
            for hidden_dim in widths:
                layers += [nn.Linear(width, hidden_dim, device=device, dtype=dtype), activation()]
                width = hidden_dim
            last = nn.Linear(width, input_dim, device=device, dtype=dtype)
            init.zeros_(last.weight)
            init.zeros_(last.bias)
            self.blocks.append(nn.Sequential(*layers, last))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(torch.cat([x, *context], dim=-1) if context else x)
        return x
