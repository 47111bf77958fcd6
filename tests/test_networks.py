"""Residual networks: formula, the identity at the start, options."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pyro_snf import (
    ResidualMLP,
    SelfNormalizingPair,
    conditional_self_normalizing_pair,
    self_normalizing_pair,
)
from tests.registry import COPIES

# Float64, the same operations.
EXACT = 1e-12


def network(
    dim: int = 3, widths: tuple[int, ...] = (5, 4), *, context_dim: int = 0, **options: object
) -> ResidualMLP:
    """A network of random parameters."""
    result = ResidualMLP(dim, widths, context_dim=context_dim, **options)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.normal_()
    return result


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("widths", [(4,), (5, 4)])
def test_formula(widths: tuple[int, ...], num_blocks: int, context_dim: int) -> None:
    result = network(3, widths, num_blocks=num_blocks, context_dim=context_dim)
    x, context = torch.randn(7, 3), torch.randn(7, context_dim)
    parameters = iter(result.parameters())
    expected = x
    for _ in range(num_blocks):
        hidden = torch.cat([expected, context], dim=-1)
        for width in widths:
            weight, bias = next(parameters), next(parameters)
            assert weight.shape == (width, hidden.shape[-1])
            hidden = hidden @ weight.mT + bias
            hidden = hidden * hidden.sigmoid()  # SiLU
        weight, bias = next(parameters), next(parameters)
        expected = expected + hidden @ weight.mT + bias
    assert not list(parameters)
    actual = result(x, context) if context_dim else result(x)
    assert torch.allclose(actual, expected, rtol=EXACT)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, lambda: nn.ELU(0.5)])
def test_activation_is_that_of_the_option(activation: Callable[[], nn.Module]) -> None:
    result, x = network(3, (4,), num_blocks=1, activation=activation), torch.randn(7, 3)
    weight, bias, last_weight, last_bias = result.parameters()
    hidden = activation()(x @ weight.mT + bias)
    assert torch.allclose(result(x), x + hidden @ last_weight.mT + last_bias, rtol=EXACT)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 1, 3)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_any_batch_shape(context_dim: int, shape: tuple[int, ...]) -> None:
    result, x = network(context_dim=context_dim), torch.randn(shape)
    contexts = [10 * torch.randn(*shape[:-1], context_dim)] if context_dim else []
    y = result(x, *contexts)
    assert y.shape == shape
    rows = [one.reshape(-1, one.shape[-1]) for one in (x, *contexts)]
    assert torch.allclose(y.reshape(-1, 3), result(*rows), rtol=EXACT)
    # At first it is the identity, whatever the context.
    assert torch.equal(ResidualMLP(3, [8, 8], context_dim=context_dim)(x, *contexts), x)


def test_identity_is_not_a_stationary_point() -> None:
    # At first the last layers have a gradient, and after a step all do.
    result, x = ResidualMLP(3, [8]), torch.randn(5, 3)
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (result(x) - x.roll(1, -1)).square().sum().backward()
        optimizer.step()
    for name, parameter in result.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_context_enters_every_block() -> None:
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    for silenced in (0, 1):
        result = network(context_dim=2)
        with torch.no_grad():
            result.blocks[silenced][0].weight[:, 3:] = 0
        assert not torch.allclose(result(x, context), result(x, -context))


def test_networks_and_blocks_differ_in_their_initial_weights() -> None:
    first, second = ResidualMLP(3, [8]), ResidualMLP(3, [8])
    assert not torch.equal(first.blocks[0][0].weight, second.blocks[0][0].weight)
    blocks = first.blocks
    assert not torch.equal(blocks[0][0].weight, blocks[1][0].weight)


# --- Types, devices, copies ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_built_on_the_device_and_of_the_dtype(dtype: torch.dtype, device: torch.device) -> None:
    result = ResidualMLP(3, [4], context_dim=2, device=device, dtype=dtype)
    for name, parameter in result.named_parameters():
        assert parameter.device.type == device.type, name
        assert parameter.dtype == dtype, name
        assert parameter.is_contiguous(), name
    x = torch.ones(5, 3, device=device, dtype=dtype)
    assert result(x, torch.ones(5, 2, device=device, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies(make_copy: Callable[[nn.Module], nn.Module]) -> None:
    result, x = network(), torch.randn(5, 3)
    other = make_copy(result)
    assert torch.equal(other(x), result(x))
    other = network()
    other.load_state_dict(copy.deepcopy(result.state_dict()))
    assert torch.equal(other(x), result(x))


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "expected", "values"),
    [
        ("input_dim", "an integer >= 1", [0, -1, 2.0, "3", None, True]),
        ("num_blocks", "an integer >= 1", [0, -1, 1.5, None]),
        ("context_dim", "an integer >= 0", [-1, 2.0, None]),
        (
            "hidden_dims",
            "a non-empty list of integers >= 1",
            [[], (), [0], [4, -1], [4.0], [True], 8, "44", None],
        ),
        ("dtype", "a floating-point torch.dtype or None", [torch.int64]),
    ],
)
def test_options_are_checked(option: str, expected: str, values: list[object]) -> None:
    for value in values:
        message = re.escape(f"expected {option}, {expected}; got {value!r}")
        with pytest.raises(ValueError, match=message):
            ResidualMLP(**{"input_dim": 3, option: value})
    with pytest.raises(TypeError):  # keywords only
        ResidualMLP(3, [4], 2)


def test_numpy_integers() -> None:
    widths = [np.int32(4), np.int64(5)]
    result = ResidualMLP(np.int64(3), widths, num_blocks=np.int64(1), context_dim=np.int64(2))
    assert result(torch.ones(7, 3), torch.ones(7, 2)).shape == (7, 3)


@pytest.mark.parametrize("sizes", [(2,), (3, 1)], ids=["features", "context"])
def test_inputs_of_wrong_sizes_are_an_error(sizes: tuple[int, ...]) -> None:
    # The error is torch's, as for any other network.
    result = network(context_dim=2 if len(sizes) == 2 else 0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        result(*(torch.zeros(5, size) for size in sizes))


@pytest.mark.parametrize(
    "transform",
    [
        self_normalizing_pair(2, [4], activation=nn.Tanh),
        conditional_self_normalizing_pair(2, 3, [4], activation=nn.Tanh).transform,
    ],
    ids=["plain", "conditional"],
)
def test_factories_pass_the_activation_on(transform: SelfNormalizingPair) -> None:
    for network in (transform.forward_net, transform.inverse_net):
        assert any(isinstance(module, nn.Tanh) for module in network.modules())
