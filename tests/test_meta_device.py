"""Layers without memory: made on the "meta" device, given memory later, and then values.

That is how torch's distributed wrappers (FSDP) make models that are larger than one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_snf import (
    GECO,
    Learned,
    PairRefined,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    conditional_self_normalizing_linear,
    flows,
    self_normalizing_pair,
)
from tests import registry
from tests.registry import CASES, CONDITIONAL_CASES, batch, density_loss, train

#: Options and all: what is made with ``device="meta"``.
WITH_DEVICE: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda **options: SelfNormalizingLinear(3, init_scale=0.5, **options),
    "linear learned GECO": lambda **options: SelfNormalizingLinear(
        3, log_det=Learned(reconstruction_weight=GECO(0.1, weight=2.0)), **options
    ),
    "conv": lambda **options: SelfNormalizingConv2d(2, **options),
    "pair": lambda **options: self_normalizing_pair(3, [4], log_det=PairRefined(seed=3), **options),
    "conditional": lambda **options: conditional_self_normalizing_linear(
        3, 2, [4], rank=1, **options
    ),
    "fully connected": lambda **options: flows.fully_connected(4, activation="spline", **options),
    "convolutional": lambda **options: flows.convolutional((1, 6, 6), num_blocks=2, **options),
    "glow": lambda **options: flows.glow(
        (1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4, **options
    ),
}


def materialize(module: nn.Module) -> None:
    """Give the tensors memory, with values that stand for whatever is there."""
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        if isinstance(tensor, Tensor):
            tensor.fill_(7)


def reset(module: nn.Module, seed: int = 0) -> None:
    """As FSDP does it."""
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def state_of(module: nn.Module) -> dict[str, Any]:
    """A copy, also of the buffers that are not saved; what is no tensor as text."""
    state = dict(module.named_buffers()) | module.state_dict()
    return {k: v.clone() if isinstance(v, Tensor) else repr(v) for k, v in state.items()}


def is_same(one: Tensor, other: Tensor) -> bool:
    """NaNs are equal."""
    pair = (one.double(), other.double())
    return one.dtype == other.dtype and torch.allclose(*pair, rtol=0, atol=0, equal_nan=True)


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert is_same(actual[name], value), name
        else:
            assert actual[name] == value, name


def is_meta(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@pytest.fixture
def make_new(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[..., nn.Module]:
    """The constructor of a case, without the random values that cases give to the parameters."""

    def make(device: str = "cpu") -> nn.Module:
        # Pyro's DenseNN cannot be made there, but moved.
        is_moved = name in CONDITIONAL_CASES
        with monkeypatch.context() as context, torch.device("cpu" if is_moved else device):
            for function in ("randomize", "randomize_outputs"):
                context.setattr(registry, function, lambda *_: None)
            module = {**CASES, **CONDITIONAL_CASES}[name].make()
        return module.to(device) if is_moved else module

    return make


@pytest.mark.parametrize("name", [*CASES, *CONDITIONAL_CASES])
def test_loaded_states_give_the_same_numbers(make_new: Callable[..., nn.Module], name: str) -> None:
    case = CASES.get(name)
    original = (case or CONDITIONAL_CASES[name]).make()
    if case is not None:
        train(original, case, steps=2)
    module = make_new("meta")
    assert is_meta(module)
    materialize(module)
    module.load_state_dict(original.state_dict())
    assert_equal(state_of(module), state_of(original))
    if case is not None:
        for mode in (True, False):
            losses = [density_loss(one.train(mode), batch(case)) for one in (module, original)]
            assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("name", [*CASES, *CONDITIONAL_CASES])
def test_reset_layers_are_new(make_new: Callable[..., nn.Module], name: str) -> None:
    case = CASES.get(name)
    if case is not None and case.foreign:
        pytest.skip("Pyro's Spline has no reset_parameters")
    torch.manual_seed(0)
    new, used, module = make_new(), make_new(), make_new("meta")
    before = state_of(new)
    if case is not None:
        train(used, case, steps=2)
    materialize(module)
    for one in (new, used, module):
        reset(one)
    after = state_of(new)
    assert_equal(state_of(used), after)
    assert_equal(state_of(module), after)
    reset(new, seed=1)
    other = state_of(new)
    for key, value in before.items():  # what is not drawn is what the constructor gave it
        if not isinstance(value, Tensor):
            assert after[key] == value, key
        elif is_same(after[key], other[key]):
            assert is_same(after[key], value), key
    reset(new)
    if case is not None:  # what was known of the used one is forgotten
        assert density_loss(used, batch(case)).item() == density_loss(new, batch(case)).item()


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_device_may_be_meta(name: str) -> None:
    original, module = WITH_DEVICE[name](), WITH_DEVICE[name](device="meta")
    module.state_dict()
    materialize(module)
    module.load_state_dict(original.state_dict())
    assert_equal(state_of(module), state_of(original))
