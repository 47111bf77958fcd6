"""The ready-made stacks: bijections of images and flat latents, for all three log-dets."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import (
    GECO,
    ActNorm,
    ImageCoupling,
    RationalQuadraticSpline,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    Squeeze2d,
    diagnostics,
    flows,
)
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform
from tests.conftest import DEVICES
from tests.registry import COPIES, LOG_DETS, randomize

# Float64 with well conditioned layers, a dozen of them: rounding, and three digits to spare.
EXACT = 1e-9
# The same in float32, in which latents are sums of some dozens of numbers.
SINGLE = 1e-3

#: Small flows with everything in them, and the shapes of their data.
FLOWS: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "fully connected": (flows.fully_connected, (1, 3, 4), {}),
    "fully connected on vectors": (flows.fully_connected, (5,), {"num_layers": 3}),
    "fully connected with splines": (flows.fully_connected, (2, 2, 2), {"activation": "spline"}),
    "convolutional": (flows.convolutional, (1, 8, 8), {"num_blocks": 2, "layers_per_block": 2}),
    "convolutional with splines": (
        flows.convolutional,
        (2, 6, 8),
        {"num_blocks": 2, "layers_per_block": 1, "activation": "spline"},
    ),
    "convolutional circular": (
        flows.convolutional,
        (2, 4, 4),
        {"num_blocks": 1, "layers_per_block": 2, "padding_mode": "circular", "kernel_size": (3, 1)},
    ),
    "glow": (flows.glow, (1, 8, 8), {"num_steps": 2, "hidden_channels": 4}),
    "glow of three levels": (
        flows.glow,
        (2, 8, 8),
        {"num_levels": 3, "num_steps": 1, "hidden_channels": 4},
    ),
}


@pytest.fixture(params=FLOWS)
def named(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, **options: Any) -> Any:
    build, shape, own = FLOWS[name]
    return build(shape, **own, **options)


def make_random(name: str, **options: Any) -> Any:
    """A flow with random, well conditioned parameters."""
    flow = make(name, **options)
    randomize(flow)
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, RationalQuadraticSpline):
                for parameter in module.parameters():
                    parameter.copy_(0.5 * torch.randn_like(parameter))
    return flow


def data(name: str, *batch_shape: int) -> Tensor:
    return torch.randn(*batch_shape, *FLOWS[name][1])


def size(name: str) -> int:
    return math.prod(FLOWS[name][1])


def make_density(name: str, flow: Any) -> dist.TransformedDistribution:
    like = next(flow.parameters())
    zero, one = like.new_zeros(()), like.new_ones(())
    base = dist.Normal(zero, one).expand([size(name)]).to_event(1)
    return dist.TransformedDistribution(base, [flow.inv])


def layers(flow: nn.Module) -> list[Any]:
    return [module for module in flow.modules() if isinstance(module, SelfNormalizingTransform)]


def train(name: str, flow: Any, steps: int = 3) -> None:
    density = make_density(name, flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(6, *FLOWS[name][1], generator=generator)
        optimizer.zero_grad()
        (-density.log_prob(x).mean()).backward()
        optimizer.step()


# --- The bijections -----------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 1)])
def test_shapes_and_round_trip(named: str, log_det: str, batch_shape: tuple[int, ...]) -> None:
    flow = make_random(named, log_det=log_det)
    x = data(named, *batch_shape)
    y = flow(x)
    assert y.shape == (*batch_shape, size(named))
    assert flow.log_abs_det_jacobian(x, y).shape == batch_shape
    again = flow.inv(y.detach().clone())
    assert torch.allclose(again, x, rtol=EXACT, atol=EXACT)
    assert flow.inv.inv is flow
    assert (flow.domain.event_dim, flow.codomain.event_dim) == (len(FLOWS[named][1]), 1)
    assert flow.forward_shape(x.shape) == y.shape
    assert flow.inverse_shape(y.shape) == x.shape


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_det_is_that_of_the_jacobian(named: str, log_det: str) -> None:
    flow = make_random(named, log_det=log_det).eval()
    x = data(named)
    jacobian = torch.autograd.functional.jacobian(flow, x).reshape(size(named), size(named))
    expected = torch.linalg.slogdet(jacobian).logabsdet
    y = flow(x)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), expected, rtol=EXACT, atol=EXACT)
    inverse = flow.inv.log_abs_det_jacobian(y, x)
    assert torch.allclose(inverse, -expected, rtol=EXACT, atol=EXACT)


def test_start(named: str) -> None:
    """Dense and convolutional flows start as what lies between their layers, Glow as a rotation."""
    flow, x = make(named), data(named, 5)
    with torch.no_grad():
        y = flow(x)
        log_det = flow.log_abs_det_jacobian(x, y)
    if "glow" in named:
        assert torch.allclose(y.norm(dim=-1), x.flatten(1).norm(dim=-1), rtol=EXACT)
        assert torch.allclose(log_det, torch.zeros(5), atol=EXACT)
        return
    for part in flow.parts:
        if not isinstance(part, SelfNormalizingTransform):
            x = part(x)
    assert torch.allclose(y, x, rtol=EXACT, atol=EXACT)


# --- The densities ------------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_density(named: str, log_det: str) -> None:
    flow = make_random(named, log_det=log_det)
    density = make_density(named, flow)
    assert density.event_shape == FLOWS[named][1]
    sample = density.sample((4,))
    assert sample.shape == (4, *FLOWS[named][1])
    flow.eval()
    y = flow(sample)
    expected = dist.Normal(0.0, 1.0).log_prob(y).sum(-1) + flow.log_abs_det_jacobian(sample, y)
    assert torch.allclose(density.log_prob(sample.clone()), expected, rtol=EXACT)
    flow.train()
    (-density.log_prob(data(named, 4)).mean()).backward()


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_every_parameter_gets_a_gradient(named: str, log_det: str) -> None:
    flow = make_random(named, log_det=log_det)
    (-make_density(named, flow).log_prob(data(named, 4)).mean()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A ReLU may be off in all images; whole layers are not.
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_training_leaves_the_start(named: str, log_det: str) -> None:
    # Images whose neighbours are alike: a density of independent pixels does worse.
    flow = make(named, log_det=log_det)
    density = make_density(named, flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def draw(count: int) -> Tensor:
        return 0.5 * data(named, count) + torch.randn(count, *[1] * len(FLOWS[named][1]))

    test = draw(200)
    density.log_prob(test)  # the first batch, of ActNorm
    for _ in range(60):
        optimizer.zero_grad()
        (-density.log_prob(draw(50)).mean()).backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        trained = -density.log_prob(test).mean()
    # The best density of independent pixels: each is Normal(0, 1.25).
    independent = size(named) * 0.5 * math.log(2 * math.pi * math.e * 1.25)
    assert trained < independent


@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_training_value_is_honest(named: str, log_det: str) -> None:
    flow = make(named, log_det=log_det)
    train(named, flow)
    x = data(named, 4)
    with torch.enable_grad():
        estimate = make_density(named, flow).log_prob(x).detach()
    flow.eval()
    exact = make_density(named, flow).log_prob(x).detach()
    # Three steps from a reference, in nats of dozens of numbers.
    assert torch.allclose(estimate, exact, atol=EXACT if log_det == "exact" else 0.05)


# --- Options ------------------------------------------------------------------------------------


def test_stacks_are_those_of_the_paper() -> None:
    def kinds(flow: Any) -> list[str]:
        return [type(part).__name__ for part in flow.parts]

    dense = flows.fully_connected((1, 28, 28))
    assert kinds(dense) == [
        "_Flatten",
        "SelfNormalizingLinear",
        "SmoothLeakyReLU",
        "SelfNormalizingLinear",
    ]
    assert dense.parts[2].alpha.item() == pytest.approx(0.3)
    convolutional = flows.convolutional((1, 28, 28), activation="spline")
    block = ["SelfNormalizingConv2d", "RationalQuadraticSpline"] * 3
    expected = [*block, "Squeeze2d", *block, "Squeeze2d", *block[:-1], "_Flatten"]
    assert kinds(convolutional) == expected
    shapes = [
        tuple(part.event_shape)
        for part in convolutional.parts
        if isinstance(part, RationalQuadraticSpline)
    ]
    assert shapes == [(1, 28, 28)] * 3 + [(4, 14, 14)] * 3 + [(16, 7, 7)] * 2
    glow = flows.glow((1, 28, 28), hidden_channels=3)
    step = ["ActNorm", "SelfNormalizingConv2d", "ImageCoupling"]
    assert [kinds(level) for level in glow.levels] == [["Squeeze2d", *step * 16]] * 2
    assert glow.latent_shapes == [(2, 14, 14), (8, 7, 7)]


def test_every_coupling_sees_other_channels() -> None:
    flow = flows.glow((1, 8, 8), num_levels=1, num_steps=3, hidden_channels=4)
    mixings = layers(flow)
    for mixing in mixings:
        matrix = mixing.weight.flatten(1).detach()
        assert torch.allclose(matrix @ matrix.mT, torch.eye(4), atol=EXACT)
        assert not torch.allclose(matrix.abs(), torch.eye(4), atol=0.1)
    assert not torch.allclose(mixings[0].weight, mixings[1].weight)


@pytest.mark.parametrize("inverse_kernel_size", [None, 3])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_rotations_know_their_inverse(log_det: str, inverse_kernel_size: int | None) -> None:
    flow = flows.glow(
        (1, 4, 4),
        num_levels=1,
        num_steps=2,
        hidden_channels=4,
        log_det=log_det,
        inverse_kernel_size=inverse_kernel_size,
    )
    for mixing in layers(flow):
        inverse = mixing.inverse_weight((2, 2))
        centre = inverse[:, :, inverse.shape[2] // 2, inverse.shape[3] // 2]
        assert torch.allclose(centre, mixing.weight.flatten(1).mT, atol=EXACT)
        assert torch.allclose(inverse.square().sum(), torch.tensor(4.0))  # and nothing beside it
        mixing.inverse = "learned"
    x = torch.randn(3, 1, 4, 4)
    assert torch.allclose(flow.inv(flow(x).detach().clone()), x, rtol=EXACT, atol=EXACT)


def test_glow_is_reproducible() -> None:
    def build(seed: int) -> Tensor:
        torch.manual_seed(seed)
        flow = flows.glow((1, 4, 4), num_steps=1, hidden_channels=4)
        return flow(torch.linspace(-1, 1, 48).view(3, 1, 4, 4))

    assert torch.equal(build(0), build(0))
    assert not torch.equal(build(0), build(1))


def test_options_reach_every_layer(named: str) -> None:
    flow = make(named, log_det="refined", num_probes=3, bias=False, inverse="exact", seed=7)
    found = layers(flow)
    assert [
        layer.estimator.tracked.seed
        if hasattr(layer.estimator, "tracked")
        else layer.estimator.seed
        for layer in found
    ] == list(range(7, 7 + len(found)))
    for layer in found:
        assert layer.inverse == "exact"
        assert layer.bias is None


def test_learned_options_reach_every_layer(named: str) -> None:
    controller = GECO(0.1)
    flow = make(
        named,
        log_det="learned",
        mixture=0.25,
        reconstruction="inverse",
        reconstruction_weight=controller,
    )
    controllers = {id(controller)}
    for layer in layers(flow):
        assert layer.estimator.mixture == 0.25
        assert layer.estimator.reconstruction == "inverse"
        controllers.add(id(layer.estimator.reconstruction_weight))
    assert len(controllers) == 1 + len(layers(flow))  # each has its own
    flow = make(named, log_det="learned", reconstruction_weight=3.0)
    assert {layer.estimator.reconstruction_weight for layer in layers(flow)} == {3.0}


@pytest.mark.parametrize("build", [flows.fully_connected, flows.convolutional])
def test_activation_may_be_a_function(build: Callable[..., Any]) -> None:
    shapes = []

    def activation(shape: torch.Size) -> Transform:
        shapes.append(tuple(shape))
        return RationalQuadraticSpline(shape, num_bins=3)

    options = {"num_blocks": 1} if build is flows.convolutional else {"num_layers": 3}
    flow = build((1, 4, 4), activation=activation, dtype=torch.float32, **options)
    splines = [part for part in flow.parts if isinstance(part, RationalQuadraticSpline)]
    shape = (1, 4, 4) if build is flows.convolutional else (16,)
    assert [tuple(spline.event_shape) for spline in splines] == [shape] * 2 == shapes
    assert all(parameter.dtype == torch.float32 for parameter in flow.parameters())
    foreign = build((1, 4, 4), activation=lambda shape: dist.transforms.TanhTransform(), **options)
    assert foreign(torch.zeros(1, 4, 4)).shape == (16,)


def test_default_activation() -> None:
    flow = flows.fully_connected(3)
    assert isinstance(flow.parts[1], SmoothLeakyReLU)
    assert not list(flow.parts[1].parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_device_and_dtype(named: str, device: str, dtype: torch.dtype) -> None:
    flow = make(named, device=device, dtype=dtype)
    for name, tensor in [*flow.named_parameters(), *flow.named_buffers()]:
        assert tensor.device.type == device, name
        # A log-determinant that is carried along is always kept in float64.
        is_kept = name.endswith("log_abs_det_inverse") or not tensor.is_floating_point()
        assert tensor.dtype == dtype or is_kept, name
    x = data(named, 4).to(device, dtype)
    density = make_density(named, flow)
    log_prob = density.log_prob(x)
    assert log_prob.dtype == dtype
    (-log_prob.mean()).backward()
    y = flow(x).detach()
    again = flow.inv(y.clone())
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    assert torch.allclose(again, x, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_types_agree(named: str, dtype: torch.dtype) -> None:
    flow, x = make_random(named).eval(), data(named, 4)
    expected, expected_log_det = flow(x), flow.log_abs_det_jacobian(x, flow(x))
    flow.to(dtype)
    y = flow(x.to(dtype))
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    assert torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance)
    log_det = flow.log_abs_det_jacobian(x.to(dtype), y)
    assert torch.allclose(log_det.double(), expected_log_det, rtol=tolerance, atol=tolerance)


# --- Copies and states --------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_train_alike(
    named: str, log_det: str, make_copy: Callable[[nn.Module], nn.Module]
) -> None:
    flow, x = make(named, log_det=log_det), data(named, 3)
    train(named, flow)
    twin: Any = make_copy(flow)
    assert torch.equal(twin(x), flow(x))
    train(named, flow)
    train(named, twin)
    assert torch.equal(twin(x), flow(x))
    assert twin.inv.inv is twin


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_state_dict(named: str, log_det: str) -> None:
    flow, x = make(named, log_det=log_det), data(named, 3)
    train(named, flow)
    other = make(named, log_det=log_det)
    other.load_state_dict(copy.deepcopy(flow.state_dict()))
    assert torch.equal(other(x), flow(x))
    for module in (flow, other):
        train(named, module)
    assert torch.allclose(other(x), flow(x), rtol=EXACT, atol=EXACT)


def test_inverse_is_a_module(named: str) -> None:
    flow = make(named)
    assert set(map(id, flow.inv.parameters())) == set(map(id, flow.parameters()))
    assert flow.inv.transform is flow


def test_diagnostics_find_the_layers(named: str) -> None:
    flow = make_random(named)
    for layer in layers(flow):
        assert isinstance(layer, SelfNormalizingLinear | SelfNormalizingConv2d)
    if "fully" in named:
        assert all(diagnostics.inverse_error(layer) < EXACT for layer in layers(flow))


# --- Mistakes -----------------------------------------------------------------------------------


def test_images_that_do_not_fit() -> None:
    message = r"block 3 of 3: Squeeze2d\(2\): expected H and W divisible by 2; got \(4, 15, 14\)"
    with pytest.raises(ValueError, match=message):
        flows.convolutional((1, 30, 28))
    message = r"block 3 of 3: expected images no smaller than kernels of \(3, 3\); got \(16, 2, 2\)"
    with pytest.raises(ValueError, match=message):
        flows.convolutional((1, 8, 8))
    message = r"level 3 of 3: Squeeze2d\(2\): expected H and W divisible by 2; got \(4, 7, 7\)"
    with pytest.raises(ValueError, match=message):
        flows.glow((1, 28, 28), num_levels=3, num_steps=1, hidden_channels=4)


@pytest.mark.parametrize("shape", [(), (4, 0), "44", None, 4.0, (4.0,), True])
def test_shapes_are_checked(shape: object) -> None:
    message = re.escape(f"expected event_shape, integers >= 1; got {shape!r}")
    with pytest.raises(ValueError, match=message):
        flows.fully_connected(shape)


@pytest.mark.parametrize("shape", [16, (4, 4), (1, 1, 4, 4), (1, 4, 0), "444", None, (1, 4.0, 4)])
def test_image_shapes_are_checked(shape: object) -> None:
    message = re.escape(f"expected event_shape (C, H, W), integers >= 1; got {shape!r}")
    for build in (flows.convolutional, flows.glow):
        with pytest.raises(ValueError, match=message):
            build(shape)


def wrong_options() -> Iterator[tuple[Callable[..., Any], dict[str, object], str]]:
    for build in (flows.fully_connected, flows.convolutional, flows.glow):
        yield build, {"log_det": "lu"}, "expected log_det to be one of .*; got 'lu'"
        yield build, {"inverse": "lu"}, "expected inverse to be one of .*; got 'lu'"
        yield build, {"num_probes": 0}, "expected num_probes, an integer >= 1; got 0"
        yield build, {"seed": -1}, "expected seed, an integer >= 0; got -1"
        yield build, {"seed": 0.5}, "expected seed, an integer >= 0; got 0.5"
        yield build, {"mixture": 1.0}, r"expected mixture in \[0, 1\); got 1.0"
        yield build, {"dtype": torch.int64}, "expected a floating-point dtype; got torch.int64"
    for build in (flows.fully_connected, flows.convolutional):
        message = "expected activation to be one of .*, or a function; got 'relu'"
        yield build, {"activation": "relu"}, message
    yield flows.fully_connected, {"num_layers": 0}, "expected num_layers, an integer >= 1; got 0"
    for name in ("num_blocks", "layers_per_block"):
        yield flows.convolutional, {name: 0}, f"expected {name}, an integer >= 1; got 0"
    yield flows.convolutional, {"kernel_size": 2}, "expected kernel_size, .*odd.*; got 2"
    for name in ("num_levels", "num_steps", "hidden_channels"):
        yield flows.glow, {name: 0}, f"expected {name}, an integer >= 1; got 0"


@pytest.mark.parametrize(("build", "options", "message"), list(wrong_options()))
def test_wrong_options(build: Callable[..., Any], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build((1, 16, 16), **options)


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'padding_mode'"):
        flows.fully_connected(4, padding_mode="circular")


def test_wrong_input(named: str) -> None:
    flow, shape = make(named), FLOWS[named][1]
    wrong = [(3, *shape[:-1], shape[-1] + 1), (*shape[:-1], 2 * shape[-1])]
    if len(shape) == 3:
        wrong += [(3, *shape[1:]), (3, *reversed(shape))]  # the latter with as many entries
    for one in wrong:
        if one[-len(shape) :] != shape:
            with pytest.raises(ValueError, match=r"expected .*; got \("):
                flow(torch.zeros(one))
    for latent in [(size(named) + 1,), (2, *shape), ()]:
        if latent[-1:] != (size(named),):
            with pytest.raises(ValueError, match=r"expected a non-empty tensor of shape"):
                flow.inv(torch.zeros(latent))
    with pytest.raises(ValueError, match="floating"):
        flow(torch.zeros(3, *shape, dtype=torch.uint8))


@pytest.mark.parametrize("cache_size", [0, 1])
def test_cache_size(named: str, cache_size: int) -> None:
    flow, x = make_random(named), data(named, 3)
    expected = flow(x)
    other = flow.with_cache(cache_size)
    assert torch.allclose(other(x), expected, rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="expected"):
        other(torch.zeros(*x.shape, 7))


def test_parts_are_registered() -> None:
    flow = flows.glow((1, 4, 4), num_steps=1, hidden_channels=4)
    kinds = {type(module) for module in flow.modules()}
    assert {ActNorm, ImageCoupling, Squeeze2d, SelfNormalizingConv2d} <= kinds
