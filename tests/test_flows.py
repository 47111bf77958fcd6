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

from pyro_snf import GECO, Learned, RationalQuadraticSpline, Refined, flows
from pyro_snf.images import LogitTransform, bits_per_dim, dequantize
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform
from tests.registry import COPIES, LOG_DETS, Case, is_close, randomize, standard_normal, train

# Float64 with well conditioned layers, a dozen of them: rounding, and three digits to spare.
EXACT = 1e-9

#: Small flows with everything in them, and the shapes of their data.
FLOWS: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "fully connected": (flows.fully_connected, (1, 3, 4), {}),
    "fully connected on vectors": (flows.fully_connected, (5,), {"num_layers": 3}),
    "fully connected with splines": (flows.fully_connected, (2, 2, 2), {"activation": "spline"}),
    "convolutional": (flows.convolutional, (1, 8, 8), {"num_blocks": 2, "layers_per_block": 2}),
    "convolutional with splines": (
        *(flows.convolutional, (2, 6, 8)),
        {"num_blocks": 2, "layers_per_block": 1, "activation": "spline"},
    ),
    "convolutional circular": (
        *(flows.convolutional, (2, 4, 4)),
        {"num_blocks": 1, "layers_per_block": 2, "padding_mode": "circular", "kernel_size": (3, 1)},
    ),
    "glow": (flows.glow, (1, 8, 8), {"num_steps": 2, "hidden_channels": 4}),
    "glow of three levels": (
        *(flows.glow, (2, 8, 8)),
        {"num_levels": 3, "num_steps": 1, "hidden_channels": 4},
    ),
}

EVERY_METHOD = pytest.mark.parametrize("log_det", LOG_DETS)


@pytest.fixture(params=FLOWS)
def named(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, **options: Any) -> Any:
    build, shape, own = FLOWS[name]
    return build(shape, **own, **options)


def data(name: str, *batch_shape: int) -> Tensor:
    return torch.randn(*batch_shape, *FLOWS[name][1])


def size(name: str) -> int:
    return math.prod(FLOWS[name][1])


def layers(flow: nn.Module) -> list[Any]:
    return [module for module in flow.modules() if isinstance(module, SelfNormalizingTransform)]


@EVERY_METHOD
def test_shapes_round_trips_densities_and_gradients(named: str, log_det: str) -> None:
    flow, shape, base = make(named, log_det=log_det), FLOWS[named][1], standard_normal(size(named))
    randomize(flow)
    density = dist.TransformedDistribution(base, [flow.inv])
    (-density.log_prob(data(named, 4)).mean()).backward()
    for name, parameter in flow.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # A ReLU may be off in all images; whole layers are not.
        assert (parameter.grad != 0).any(), name
    flow.eval()
    assert flow.inv.inv is flow
    assert (flow.domain.event_dim, flow.codomain.event_dim) == (len(shape), 1)
    assert density.event_shape == shape
    for batch_shape in [(), (2, 1)]:
        x = density.sample(batch_shape)
        assert x.shape == (*batch_shape, *shape)
        y = flow(x)
        assert y.shape == flow.forward_shape(x.shape) == (*batch_shape, size(named))
        assert flow.inverse_shape(y.shape) == x.shape
        log_det_value = flow.log_abs_det_jacobian(x, y)
        assert log_det_value.shape == batch_shape
        expected = base.log_prob(y) + log_det_value
        assert is_close(density.log_prob(x.clone()), expected)
        assert is_close(flow.inv(y.detach().clone()), x)
    x = data(named)
    jacobian = torch.autograd.functional.jacobian(flow, x).reshape(size(named), size(named))
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert is_close(flow.log_abs_det_jacobian(x, flow(x)), expected)
    assert is_close(flow.inv.log_abs_det_jacobian(flow(x), x), -expected)


def test_start(named: str) -> None:
    """Dense and convolutional flows start as what lies between their layers, Glow as a rotation."""
    flow, x = make(named), data(named, 5)
    with torch.no_grad():
        y = flow(x)
        log_det = flow.log_abs_det_jacobian(x, y)
    if "glow" in named:
        assert is_close(y.norm(dim=-1), x.flatten(1).norm(dim=-1))
        assert is_close(log_det, torch.zeros(5))
        return
    for part in flow.parts:
        if not isinstance(part, SelfNormalizingTransform):
            x = part(x)
    assert is_close(y, x)


@EVERY_METHOD
def test_training_finds_correlations_and_shows_the_likelihood(named: str, log_det: str) -> None:
    # Images whose neighbours are alike: a density of independent pixels does worse.
    flow = make(named, log_det=log_det)
    density = dist.TransformedDistribution(standard_normal(size(named)), [flow.inv])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def draw(count: int) -> Tensor:
        return 0.5 * data(named, count) + torch.randn(count, *[1] * len(FLOWS[named][1]))

    test = draw(200)
    density.log_prob(test)  # the first batch, of ActNorm
    for _ in range(40):
        optimizer.zero_grad()
        (-density.log_prob(draw(50)).mean()).backward()
        optimizer.step()
    in_training = density.log_prob(test).detach().mean()
    flow.eval()
    with torch.no_grad():
        trained = density.log_prob(test).mean()
    # The best density of independent pixels: each is Normal(0, 1.25).
    independent = -size(named) * 0.5 * math.log(2 * math.pi * math.e * 1.25)
    assert trained > independent
    if log_det != "learned":
        # In nats of dozens of numbers.
        assert is_close(in_training, trained, EXACT if log_det == "exact" else 0.05)


def test_stacks_are_those_of_the_paper() -> None:
    def kinds(flow: Any) -> list[str]:
        return [type(part).__name__ for part in flow.parts]

    dense = flows.fully_connected((1, 28, 28))
    linear = "SelfNormalizingLinear"
    assert kinds(dense) == ["_Flatten", linear, "SmoothLeakyReLU", linear]
    assert dense.parts[2].alpha.item() == pytest.approx(0.3)
    assert not list(dense.parts[2].parameters())
    convolutional = flows.convolutional((1, 28, 28), activation="spline")
    block = ["SelfNormalizingConv2d", "RationalQuadraticSpline"] * 3
    expected = [*block, "Squeeze2d", *block, "Squeeze2d", *block[:-1], "_Flatten"]
    assert kinds(convolutional) == expected
    splines = [part for part in convolutional.parts if isinstance(part, RationalQuadraticSpline)]
    shapes = [(1, 28, 28)] * 3 + [(4, 14, 14)] * 3 + [(16, 7, 7)] * 2
    assert [tuple(part.event_shape) for part in splines] == shapes
    glow = flows.glow((1, 28, 28), hidden_channels=3)
    step = ["ActNorm", "SelfNormalizingConv2d", "ImageCoupling"]
    assert [kinds(level) for level in glow.levels] == [["Squeeze2d", *step * 16]] * 2
    assert glow.latent_shapes == [(2, 14, 14), (8, 7, 7)]


@pytest.mark.parametrize(
    ("kernel_size", "inverse_kernel_size"), [(1, None), (1, 1), (3, None), ((1, 3), 5)]
)
@EVERY_METHOD
def test_glow_starts_with_rotations(
    log_det: str, kernel_size: int | tuple[int, int], inverse_kernel_size: int | None
) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        options = {"log_det": log_det, "inverse_kernel_size": inverse_kernel_size}
        options["kernel_size"] = kernel_size
        return flows.glow((1, 8, 8), num_levels=1, num_steps=3, hidden_channels=4, **options)

    def matrix_of(kernel: torch.Tensor) -> torch.Tensor:
        center = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
        assert is_close(kernel.norm(), center.norm())
        return center

    flow = build(0)
    mixings = layers(flow)
    assert not is_close(mixings[0].weight, mixings[1].weight)
    for mixing in mixings:
        matrix = matrix_of(mixing.weight.detach())
        assert is_close(matrix @ matrix.mT, torch.eye(4))
        assert not is_close(matrix.abs(), torch.eye(4), 0.1)
        assert is_close(matrix_of(mixing.inverse_weight((4, 4))), matrix.mT)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(flow(x), build(0)(x))
    assert not torch.equal(flow(x), build(1)(x))


def train_glow_on_blobs(learning_rate: float, num_steps: int) -> list[float]:
    """The default depth, at a high rate, without a warm-up; the losses in bits per dim."""
    torch.manual_seed(0)
    single: dict[str, Any] = {"dtype": torch.float32}
    flow = flows.glow((1, 8, 8), num_levels=1, hidden_channels=64, **single)
    base = dist.Normal(torch.zeros(64, **single), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow.inv, LogitTransform().inv])
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
    pixels = torch.arange(8, **single) + 0.5
    losses = []
    for _ in range(num_steps):
        row, column = 8 * torch.rand(2, 8, 1, 1, 1, **single)
        distance = (pixels.view(8, 1) - row).square() + (pixels - column).square()
        images = dequantize((255 * torch.exp(-distance / 8)).round())
        optimizer.zero_grad()
        loss = bits_per_dim(density.log_prob(images), (1, 8, 8)).mean()
        loss.backward()
        optimizer.step()
        assert all(torch.isfinite(one).all() for one in flow.parameters())
        losses.append(loss.item())
    return losses


def test_glow_trains_without_a_warm_up() -> None:
    losses = train_glow_on_blobs(3e-3, 20)
    assert max(losses) < losses[0] + 2
    assert sum(losses[-5:]) < sum(losses[:5])


def test_glow_that_explodes_is_stopped_while_its_parameters_are_numbers() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match=r"^\w+\(.*; its.*lower the learning rate"):
        train_glow_on_blobs(10.0, 20)


@pytest.mark.parametrize("build", [flows.fully_connected, flows.convolutional])
def test_activation_may_be_a_function(build: Callable[..., Any]) -> None:
    def activation(shape: torch.Size) -> Transform:
        return RationalQuadraticSpline(shape, num_bins=3)

    options = {"num_blocks": 1} if build is flows.convolutional else {"num_layers": 3}
    flow = build((1, 4, 4), activation=activation, **options)
    splines = [part for part in flow.parts if isinstance(part, RationalQuadraticSpline)]
    shape = (1, 4, 4) if build is flows.convolutional else (16,)
    assert [(tuple(part.event_shape), part.num_bins) for part in splines] == [(shape, 3)] * 2
    flow = build((1, 4, 4), activation=activation, dtype=torch.float32, **options)
    assert all(parameter.dtype == torch.float32 for parameter in flow.parameters())
    foreign = build((1, 4, 4), activation=lambda shape: dist.transforms.TanhTransform(), **options)
    assert foreign(torch.zeros(1, 4, 4)).shape == (16,)


def test_every_layer_has_the_options_and_a_method_of_its_own(named: str) -> None:
    controller = GECO(0.1)
    method = Learned(mixture=0.25, reconstruction="inverse", reconstruction_weight=controller)
    found = layers(make(named, log_det=method, bias=False, inverse="exact"))
    for layer in found:
        assert (layer.inverse, layer.bias) == ("exact", None)
        assert (layer.log_det.mixture, layer.log_det.reconstruction) == (0.25, "inverse")
    controllers = {id(layer.log_det.reconstruction_weight) for layer in found}
    assert len(controllers | {id(controller)}) == 1 + len(found)
    for method, count in ((Refined(seed=7), 1), (Refined(), len(found))):
        streams = [one.log_det.estimator.probes for one in layers(make(named, log_det=method))]
        seeds = {int(stream.seed) for stream in streams}
        assert len(seeds) == count
        assert count > 1 or seeds == {7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_device_and_dtype(named: str, device: torch.device, dtype: torch.dtype) -> None:
    flow = make(named, device=device, dtype=dtype)
    for name, tensor in [*flow.named_parameters(), *flow.named_buffers()]:
        assert tensor.device.type == device.type, name
        # A log-determinant that is carried along is always kept in float64.
        is_kept = name.endswith("log_abs_det_inverse") or not tensor.is_floating_point()
        assert tensor.dtype == dtype or is_kept, name
    x = data(named, 4).to(device, dtype)
    # Latents are sums of some dozens of numbers.
    tolerance = EXACT if dtype == torch.float64 else 1e-3
    assert is_close(flow.inv(flow(x).detach().clone()), x, tolerance)


@pytest.mark.parametrize("make_copy", [None, *COPIES])
def test_copies_train_alike(named: str, make_copy: Callable[[Any], Any] | None) -> None:
    flow, case = make(named), Case(make, FLOWS[named][1], "flows", output_shape=(size(named),))
    train(flow, case)
    other = make(named) if make_copy is None else make_copy(flow)
    if make_copy is None:
        other.load_state_dict(copy.deepcopy(flow.state_dict()))
    assert train(other, case) == train(flow, case)
    x = data(named, 3)
    assert torch.equal(other(x), flow(x))
    assert other.inv.inv is other


def wrong_options() -> Iterator[tuple[Callable[..., Any], object, dict[str, object], str]]:
    dense, convolutional, glow = flows.fully_connected, flows.convolutional, flows.glow
    image = (1, 16, 16)
    for build in (dense, convolutional, glow):
        yield build, image, {"log_det": "lu"}, "expected log_det to be .*; got 'lu'"
        yield build, image, {"inverse": "lu"}, "expected inverse.* to be one of .*; got 'lu'"
        yield build, image, {"dtype": torch.int64}, r"expected dtype, .*; got torch\.int64"
    for build in (dense, convolutional):
        message = "expected activation to be one of .*, or a function; got 'relu'"
        yield build, image, {"activation": "relu"}, message
    counts = {dense: "layers", convolutional: "blocks", glow: "levels steps"}
    names = [(build, f"num_{name}") for build in counts for name in counts[build].split()]
    for build, name in [*names, (convolutional, "layers_per_block"), (glow, "hidden_channels")]:
        yield build, image, {name: 0}, f"expected {name}, an integer >= 1; got 0"
    yield dense, 4, {"padding_mode": "circular"}, "unexpected keyword argument 'padding_mode'"
    yield convolutional, image, {"kernel_size": 2}, "expected kernel_size, .*odd.*; got 2"
    for shape in [(), (4, 0), "44", None, 4.0, (4.0,), True]:
        message = f"expected event_shape, integers >= 1; got {shape!r}"
        yield dense, shape, {}, re.escape(message)
    for shape in [16, (4, 4), (1, 1, 4, 4), (1, 4, 0), "444", None, (1, 4.0, 4)]:
        message = re.escape(f"expected event_shape (C, H, W), integers >= 1; got {shape!r}")
        yield convolutional, shape, {}, message
        yield glow, shape, {}, message
    message = r"Squeeze2d\(2\): expected H and W divisible by 2; got "
    yield convolutional, (1, 30, 28), {}, "block 3 of 3: " + message + r"\(4, 15, 14\)"
    yield glow, (1, 28, 28), {"num_levels": 3}, "level 3 of 3: " + message + r"\(4, 7, 7\)"
    message = r"block 3 of 3: expected images no smaller than kernels of \(3, 3\); got \(16, 2, 2\)"
    yield convolutional, (1, 8, 8), {}, message
    message = r"level 2 of 2: expected images no smaller than kernels of \(3, 3\); got \(8, 2, 2\)"
    yield glow, (1, 8, 8), {"kernel_size": 3}, message


@pytest.mark.parametrize(("build", "shape", "options", "message"), list(wrong_options()))
def test_wrong_options(
    build: Callable[..., Any], shape: object, options: dict[str, object], message: str
) -> None:
    kind = TypeError if "keyword" in message else ValueError
    with pytest.raises(kind, match=message):
        build(shape, **options)


def test_wrong_input(named: str) -> None:
    flow, shape = make(named), FLOWS[named][1]
    wrong = [(3, *shape[:-1], shape[-1] + 1), (*shape[:-1], 2 * shape[-1])]
    if len(shape) == 3:
        wrong += [(3, *shape[1:]), (3, *reversed(shape))]  # the latter with as many entries
    wrong = [one for one in wrong if one[-len(shape) :] != shape]
    latents = [(size(named) + 1,), (2, *shape), ()]
    x = data(named, 3)
    for cached in (flow, flow.with_cache(0)):
        assert is_close(cached(x), flow(x))
        cases = [(cached, one, r"expected .*; got \(") for one in wrong]
        message = "expected a non-empty tensor of shape"
        cases += [(cached.inv, one, message) for one in latents if one[-1:] != (size(named),)]
        for part, one, message in cases:
            with pytest.raises(ValueError, match=message):
                part(torch.zeros(one))
        with pytest.raises(ValueError, match="floating"):
            cached(torch.zeros(3, *shape, dtype=torch.uint8))
