"""ActNorm: formula, initialization by the first batch and by nothing else."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_snf import GaussianCopula, SelfNormalizingLinear, flows
from pyro_snf.path_gradient import push_score
from pyro_snf.transforms.actnorm import ActNorm, actnorm
from pyro_snf.transforms.compose import Compose
from tests.registry import COPIES

# Float64: rounding, and three digits to spare.
EXACT = 1e-9
# The mean and the standard deviation of a few hundred float32 values.
SINGLE = 1e-5

#: event_dim, and an event of 3 channels.
EVENTS = [(3, (3, 4, 5)), (1, (3,))]
BATCH_SHAPES = [(), (2,), (2, 1), (2, 1, 3)]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images of mean 5 and standard deviation 3."""
    generator = torch.Generator().manual_seed(seed)
    return (5 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_layer(event_dim: int = 3, seed: int = 0) -> ActNorm:
    layer = ActNorm(3, event_dim=event_dim)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(3, generator=generator))
    return layer


def is_normal(y: Tensor, event_dim: int = 3, tolerance: float = EXACT) -> bool:
    rows = y.detach().movedim(-event_dim, 0).flatten(1)
    zero, one = torch.zeros_like(rows[:, 0]), torch.ones_like(rows[:, 0])
    mean, deviation = rows.mean(-1), rows.std(-1, correction=0)
    return torch.allclose(mean, zero, atol=tolerance) and torch.allclose(
        deviation, one, atol=tolerance
    )


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
@pytest.mark.parametrize(("event_dim", "event_shape"), EVENTS)
def test_formula(
    event_dim: int, event_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> None:
    layer = random_layer(event_dim)
    x = images(*batch_shape, *event_shape)
    y = layer(x)
    for channel in range(3):
        index = (..., channel) + (slice(None),) * (event_dim - 1)
        expected = layer.log_scale[channel].exp() * (x[index] + layer.bias[channel])
        assert torch.allclose(y[index], expected, rtol=EXACT)
    assert torch.allclose(layer.inv(y.clone()), x, rtol=EXACT)
    log_det = math.prod(event_shape[1:]) * layer.log_scale.sum()
    expected = log_det.expand(batch_shape)
    assert torch.allclose(layer.log_abs_det_jacobian(x, y), expected, rtol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = ActNorm(3, dtype=dtype)
    x = images(8, 3, 4, 4, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {torch.float32: SINGLE, torch.float64: EXACT, torch.bfloat16: 0.05}[dtype]
    assert is_normal(y.double(), tolerance=tolerance)
    log_det = layer.log_abs_det_jacobian(x, y)
    assert log_det.dtype == (dtype if dtype != torch.bfloat16 else torch.float32)
    if dtype == torch.float32:  # far from zero, where the rounding of x is 6e-5
        x = 1e3 + torch.randn(500, 1, dtype=dtype)
        assert is_normal(ActNorm(1, event_dim=1, dtype=dtype)(x), 1, tolerance=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_surfaces_where_it_is(value: float) -> None:
    layer, x = random_layer().eval(), images(3, 2, 2)
    expected = layer(x)
    x = x.clone()
    x[1, 0, 0] = value
    y = layer(x)
    assert not torch.isfinite(y[1, 0, 0])
    assert (torch.isfinite(y).sum(), y[0, 0, 0]) == (11, expected[0, 0, 0])


# --- Initialization -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_shape", [(7,), (2, 1, 4), (25, 1)])
@pytest.mark.parametrize(("event_dim", "event_shape"), EVENTS)
def test_first_batch_is_normalized(
    event_dim: int, event_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> None:
    layer = actnorm(3, event_dim=event_dim)
    assert not layer.initialized
    x = images(*batch_shape, *event_shape)
    y = layer(x)
    assert is_normal(y, event_dim)
    assert layer.initialized
    deviation = x.movedim(-event_dim, 0).flatten(1).std(-1, correction=0)
    log_det = (-math.prod(event_shape[1:]) * deviation.log().sum()).expand(batch_shape)
    assert torch.allclose(layer.log_abs_det_jacobian(x, y), log_det, rtol=EXACT)
    state = copy.deepcopy(layer.state_dict())
    assert not is_normal(layer(images(*batch_shape, *event_shape, seed=1)), event_dim)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


def test_initialization_through_a_density() -> None:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, 4, 4), 1.0).to_event(3), layer.inv
    )
    assert flow.rsample((5,)).shape == (5, 3, 4, 4)
    assert not layer.initialized  # samples do not initialize it
    flow.log_prob(x).sum().backward()
    assert layer.initialized
    assert layer.bias.grad is not None
    assert is_normal(layer(x))


def test_scoring_in_the_direction_of_sampling_initializes_nothing() -> None:
    # The density's x = T⁻¹(value) are latents, not data.
    image = (2, 4, 4)
    for flow, shape, latent in [
        (
            Compose([ActNorm(2, event_dim=1), SelfNormalizingLinear(2), ActNorm(2, event_dim=1)]),
            (2,),
            (2,),
        ),
        (Compose([GaussianCopula(2), Compose([ActNorm(2, event_dim=1)])]).float(), (2,), (2,)),
        (flows.glow(image, num_levels=1, num_steps=2, hidden_channels=4), image, (32,)),
        (flows.glow(image, num_levels=2, num_steps=1, hidden_channels=4), image, (32,)),
    ]:
        dtype = next(flow.parameters()).dtype
        base = dist.Normal(torch.zeros(shape, dtype=dtype), 1.0).to_event(len(shape))
        guide = dist.TransformedDistribution(base, [flow])
        x = 50 * torch.randn(9, *latent, dtype=dtype)
        first = guide.log_prob(x)
        first.sum().backward()
        assert torch.equal(guide.log_prob(x.clone()), first)
        layers = [one for one in flow.modules() if hasattr(one, "initialized")]
        assert not any(layer.initialized for layer in layers)
        # And then data do.
        flow(flow.inv(x).detach() + 1)
        assert all(layer.initialized for layer in layers)


def test_stack_is_initialized_layer_by_layer() -> None:
    flow = Compose([ActNorm(3), random_layer(seed=1), ActNorm(3)])
    x = images(7, 3, 4, 4)
    assert is_normal(flow(x))
    assert is_normal(flow.parts[0](x))
    assert is_normal(ActNorm(3)(x[:1]))  # a single image suffices


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "frozen", "inverse"])
def test_identity_until_it_is_trained(how: str) -> None:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    if how == "eval":
        assert torch.equal(layer.eval()(x), x)
        layer.train()
    elif how == "frozen":
        assert torch.equal(layer.requires_grad_(False)(x), x)
        layer.requires_grad_(True)
    elif how == "inverse":
        assert torch.equal(layer.inv(x), x)
    else:
        with getattr(torch, how)():
            assert torch.equal(layer(x), x)
    assert not layer.initialized
    # The cached pair is not used afterwards.
    assert is_normal(layer(x))
    if how == "inverse":
        assert not torch.allclose(layer.inv(x), x)


def test_inverse_as_a_layer_is_initialized_by_its_data() -> None:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    flow = Compose([random_layer(), layer.inv])
    base = dist.Normal(torch.zeros(3, 4, 4), 1.0).to_event(3)
    dist.TransformedDistribution(base, [flow]).log_prob(x)
    assert is_normal(layer(x))


def test_explicit_initialization() -> None:
    layer, x, other = ActNorm(3), images(7, 3, 4, 4), images(7, 3, 4, 4, seed=1)
    layer.eval().initialize(x)
    assert is_normal(layer(x))
    layer.train()
    assert is_normal(layer(x))
    assert not is_normal(layer(other))
    layer.initialize(other)
    assert is_normal(layer(other))
    # The identity can be kept.
    layer = ActNorm(3)
    layer.initialized.fill_(True)
    assert torch.equal(layer(x), x)
    layer.initialized.fill_(False)
    assert is_normal(layer(x))


def test_parameters_that_are_set_are_kept() -> None:
    layer, x = random_layer(), images(7, 3, 4, 4)
    before = copy.deepcopy(dict(layer.named_parameters()))
    layer(x)
    assert layer.initialized
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_first_batch_must_be_finite(value: float) -> None:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    x[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match=r"ActNorm\(3, .*expected a first batch of finite"):
        layer(x)
    assert not layer.initialized
    assert all((parameter == 0).all() for parameter in layer.parameters())
    assert is_normal(layer(images(7, 3, 4, 4)))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_first_batch_must_not_be_constant_in_a_channel(value: float, dtype: torch.dtype) -> None:
    layer, x = ActNorm(3, dtype=dtype), images(100, 3, 4, 4, dtype=dtype)
    x[:, 1] = value
    message = r"every channel has different values; got equal ones in channels \[1\] of a tensor of"
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert all((parameter == 0).all() for parameter in layer.parameters())
    # A single value is not enough.
    for event_dim, shape in [(1, (3,)), (1, (1, 1, 3)), (3, (1, 3, 1, 1))]:
        with pytest.raises(ValueError, match=r"equal ones in channels \[0, 1, 2\]"):
            ActNorm(3, event_dim=event_dim)(images(*shape))


# --- State --------------------------------------------------------------------------------------


def trained() -> tuple[ActNorm, Tensor]:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x).square().sum() - layer.log_abs_det_jacobian(x, x).sum()).backward()
        optimizer.step()
    layer(x)  # the cache holds a graph
    return layer, x


def by_state_dict(layer: nn.Module) -> ActNorm:
    buffer, fresh = io.BytesIO(), ActNorm(3)
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("make_copy", [*COPIES, by_state_dict], ids=lambda make: make.__name__)
@pytest.mark.parametrize("is_trained", [False, True], ids=["fresh", "trained"])
def test_copies(make_copy: Callable[[nn.Module], nn.Module], is_trained: bool) -> None:
    layer, x = trained() if is_trained else (ActNorm(3), images(7, 3, 4, 4))
    other = make_copy(layer)
    assert other.initialized == is_trained
    for inputs in (x, images(7, 3, 4, 4, seed=1)):
        y = other(inputs)
        assert is_normal(y) == (inputs is x and not is_trained)
        assert torch.equal(y, layer(inputs))


def test_with_cache_shares_the_initialization() -> None:
    layer, x = ActNorm(3), images(7, 3, 4, 4)
    other = layer.with_cache(0)
    assert is_normal(other(x))
    assert layer.initialized
    assert torch.equal(layer(x), other(x))
    assert not is_normal(layer(images(7, 3, 4, 4, seed=1)))


def test_parameter_store(tmp_path: Path) -> None:
    layer, x = trained()
    pyro.module("layer", layer.inv)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = ActNorm(3)
    pyro.module("layer", fresh.inv, update_module_params=True)
    # The store has no buffers, but the layer is not initialized again.
    other = images(7, 3, 4, 4, seed=1)
    assert torch.equal(fresh(other), layer(other))
    assert torch.equal(fresh(x), layer(x))


def test_other_dtype_keeps_it_initialized_and_an_untrained_state_does_not() -> None:
    layer, x = trained()
    y = layer(x)
    assert torch.allclose(layer.float()(x.float()).double(), y, atol=SINGLE)
    assert layer.initialized
    layer.double().load_state_dict(ActNorm(3).state_dict())
    assert is_normal(layer(x))


def test_score_is_passed_on() -> None:
    layer, x = random_layer(), images(3, 4, 5)
    score = torch.randn(3, 4, 5)
    expected = score / layer.log_scale.exp().view(-1, 1, 1)
    assert torch.allclose(push_score(layer, x, layer(x), score), expected, rtol=EXACT)
