"""The rivals of the paper's table, against dense matrices that loops over pixels build."""

from __future__ import annotations

import copy
import doctest
import importlib
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_snf import (
    Compose,
    Exact,
    MultiScale,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    Squeeze2d,
    flows,
)

# Of a series with 13 terms at a norm of 0.9, in the log-determinant of 27 pixels and channels.
SERIES = 1e-10
# With 6 terms: 0.9⁷/7! for each of them.
SERIES_IN_TRAINING = 27 * 1.1e-4
SHAPE = (3, 3, 3)
SIZES = [1, 3, (3, 5)]


@pytest.fixture
def rivals(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("rivals")


def matrix_of(kernel: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The matrix of a convolution with zeros beyond the edges, entry after entry."""
    _, height, width = shape
    matrix = kernel.new_zeros(*shape, *shape)
    middle = [length // 2 for length in kernel.shape[2:]]
    for row, column in product(range(height), range(width)):
        for a, b in product(*map(range, kernel.shape[2:])):
            i, j = row + a - middle[0], column + b - middle[1]
            if 0 <= i < height and 0 <= j < width:
                matrix[:, row, column, :, i, j] = kernel[:, :, a, b]
    return matrix.view(matrix[0, 0, 0].numel(), -1)


def emerging_matrix(layer: Any, shape: tuple[int, int, int]) -> Tensor:
    """By masks of the full size, as the authors describe them."""
    channels, (height, width) = layer.channels, layer.kernel_size
    matrices = []
    for kernel in (layer.first, layer.second):
        full = kernel.new_zeros(channels, channels, height, width)
        full[:, :, : height // 2 + 1, : width // 2 + 1] = kernel
        mask = torch.zeros_like(full)
        mask[:, :, : height // 2 + 1, : width // 2 + 1] = 1
        mask[:, :, height // 2, width // 2] = torch.ones(channels, channels).tril()
        matrices.append(full * mask)
    first, second = matrices[0], matrices[1].flip(0, 1, 2, 3)
    return matrix_of(second, shape) @ matrix_of(first, shape)


def exponential_matrix(layer: Any, shape: tuple[int, int, int]) -> Tensor:
    assert (layer.weight.abs() > 0).all()
    return torch.linalg.matrix_exp(matrix_of(layer.weight, shape))


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "EmergingConv2d": emerging_matrix,
    "ConvolutionExponential": exponential_matrix,
}


def make(rivals: ModuleType, name: str, kernel_size: Any = 3) -> Any:
    """A layer that is far from the identity, in eval mode."""
    layer = getattr(rivals, name)(SHAPE[0], kernel_size).eval()
    for parameter in layer.parameters():
        # With a spectral norm of K below 0.9.
        nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5 / 3)
    if name == "EmergingConv2d":
        for kernel in (layer.first, layer.second):
            kernel.data.mul_(2)
            kernel.data[:, :, -1, -1].diagonal().sub_(0.7)
    return layer


def event_of(layer: Any) -> tuple[int, ...]:
    return SHAPE if hasattr(layer, "channels") else (layer.input_dim,)


def any_rival(rivals: ModuleType, name: str) -> Any:
    if name != "RelativeGradientLinear":
        return make(rivals, name)
    layer = rivals.RelativeGradientLinear(5).eval()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


NAMES = ("RelativeGradientLinear", "EmergingConv2d", "ConvolutionExponential")


@pytest.mark.parametrize("name", NAMES)
def test_log_det_is_that_of_the_jacobian(rivals: ModuleType, name: str) -> None:
    layer = any_rival(rivals, name)
    x = torch.randn(2, 2, *event_of(layer))
    jacobian = torch.autograd.functional.jacobian(layer, x[0, 0]).view(x[0, 0].numel(), -1)
    log_det = layer.log_abs_det_jacobian(x, layer(x))
    assert log_det.shape == (2, 2)
    torch.testing.assert_close(log_det[1, 0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("name", NAMES)
def test_inverse(rivals: ModuleType, name: str) -> None:
    layer = any_rival(rivals, name)
    x = torch.randn(2, 2, *event_of(layer))
    y = layer(x)
    torch.testing.assert_close(layer.inv(y.clone()), x, rtol=0, atol=SERIES)
    torch.testing.assert_close(layer(layer.inv(x)), x, rtol=0, atol=SERIES)


@pytest.mark.parametrize("kernel_size", SIZES)
@pytest.mark.parametrize("name", REFERENCES)
def test_values_and_gradients_are_those_of_a_matrix(
    rivals: ModuleType, name: str, kernel_size: Any
) -> None:
    layer = make(rivals, name, kernel_size)
    x = torch.randn(2, *SHAPE, requires_grad=True)
    weights = torch.randn(2, *SHAPE)
    inputs = [x, *layer.parameters()]

    matrix = REFERENCES[name](layer, SHAPE)
    expected = (x.flatten(1) @ matrix.mT).view_as(x) + layer.bias.view(-1, 1, 1)
    log_det = torch.linalg.slogdet(matrix).logabsdet
    loss = (expected * weights).sum() + 2 * log_det
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=SERIES)
    own_log_det = layer.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(own_log_det, log_det.expand(2), rtol=0, atol=SERIES)
    own_loss = (y * weights).sum() + own_log_det.sum()
    for own, other in zip(
        torch.autograd.grad(own_loss, inputs), torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=SERIES)

    # And those of the inverse.
    matrix = REFERENCES[name](layer, SHAPE)
    shifted = (x - layer.bias.view(-1, 1, 1)).flatten(1)
    loss = (torch.linalg.solve(matrix, shifted.mT).mT.view_as(x) * weights).sum()
    own_loss = (layer.inv(x) * weights).sum()
    for own, other in zip(
        torch.autograd.grad(own_loss, inputs), torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=SERIES)


def test_inverse_of_an_emerging_convolution_is_a_substitution(rivals: ModuleType) -> None:
    # The inverse grows by a factor of 3 for every pixel, to 1e13: a series would be all rounding.
    layer = rivals.EmergingConv2d(1, (1, 3)).eval()
    layer.first.data.copy_(torch.tensor([[[[3.0, 1.0]]]]))
    layer.second.data.copy_(torch.tensor([[[[0.0, 1.0]]]]))
    x = torch.randn(1, 1, 28)
    images = layer(x)
    back = layer.inv(images.clone())
    matrix = matrix_of(torch.tensor([[[[3.0, 1.0, 0.0]]]]), (1, 1, 28))
    column = images.detach().flatten().unsqueeze(-1)
    expected = torch.linalg.solve_triangular(matrix, column, upper=False)
    torch.testing.assert_close(back.flatten(), expected.flatten(), rtol=1e-14, atol=0)


def loss_of(layer: Any, x: Tensor) -> Tensor:
    """A weighted mean of log-densities."""
    base = dist.StudentT(3.0).expand(x.shape[-1:]).to_event(1)
    log_prob = dist.TransformedDistribution(base, [layer.inv]).log_prob(x)
    return -(log_prob * torch.linspace(0.5, 2.0, log_prob.numel()).view_as(log_prob)).mean()


def test_relative_gradient(rivals: ModuleType) -> None:
    """That of the whole loss is ``(∂L/∂W) WᵀW``; those of x and b are the true ones."""
    layer = any_rival(rivals, "RelativeGradientLinear")
    x = torch.randn(4, 2, 5, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    true = torch.autograd.grad(loss_of(layer, x), inputs)
    own = torch.autograd.grad(loss_of(layer.train(), x), inputs)
    weight = layer.weight.detach()
    torch.testing.assert_close(own[0], true[0])
    torch.testing.assert_close(own[1], true[1] @ weight.mT @ weight)
    torch.testing.assert_close(own[2], true[2])

    value = layer.log_abs_det_jacobian(x, layer(x))
    assert value.requires_grad
    assert not value.any()
    with torch.no_grad():  # exact, though in train() mode
        value = layer.log_abs_det_jacobian(x, layer(x))
        torch.testing.assert_close(value, torch.linalg.slogdet(weight).logabsdet.expand(4, 2))
    (first,) = torch.autograd.grad((layer(x) ** 3).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_relative_gradient_costs_no_product_of_matrices(rivals: ModuleType) -> None:
    dim, batch = 32, 3
    layer = rivals.RelativeGradientLinear(dim)
    x = torch.randn(batch, dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss_of(layer, x).backward()
    assert counter.get_total_flops() == 4 * 2 * batch * dim**2


def test_exponential_in_training(rivals: ModuleType) -> None:
    layer = make(rivals, "ConvolutionExponential").train()
    x = torch.randn(2, *SHAPE)
    y = layer(x)
    log_det = layer.log_abs_det_jacobian(x, y)
    jacobian = torch.autograd.functional.jacobian(layer, x[0], create_graph=True)
    true = torch.linalg.slogdet(jacobian.view(27, 27)).logabsdet
    assert 0 < (log_det[0] - true).abs() < SERIES_IN_TRAINING
    with torch.no_grad():  # all terms
        assert (layer(x) - y).abs().max() < 1e-3
        torch.testing.assert_close(layer.inv(layer(x)), x, rtol=0, atol=SERIES)


def test_spectral_norm_of_an_exponential(rivals: ModuleType) -> None:
    """It is at most 0.9 once the power iteration has converged, and is not touched below that."""
    layer = rivals.ConvolutionExponential(SHAPE[0])
    x = torch.randn(1, *SHAPE)
    layer(x)
    with torch.no_grad():
        assert torch.equal(layer._kernel(x.shape[1:]), layer.weight)
        layer.weight.mul_(30)
    for _ in range(200):
        y = layer(x.clone())
    kernel = layer._kernel(x.shape[1:]).detach()
    norm = torch.linalg.matrix_norm(matrix_of(kernel, SHAPE), 2).item()
    assert norm == pytest.approx(0.9, rel=1e-6)

    # A gradient along the kernel does not change what is normalized.
    loss = (y * torch.randn_like(y)).sum()
    (gradient,) = torch.autograd.grad(loss, [layer.weight])
    assert gradient.norm() > 1e-3
    assert (gradient * layer.weight).sum().abs() < 1e-6 * gradient.norm() * layer.weight.norm()

    # An evaluation uses what training has found, and leaves it as it is.
    direction = layer.direction.clone()
    layer.eval()
    layer(torch.randn(1, SHAPE[0], 5, 5))
    assert torch.equal(layer.direction, direction)


def test_log_det_of_an_exponential_is_that_of_its_call(rivals: ModuleType) -> None:
    """The next step of the power iteration does not change it."""
    layer = rivals.ConvolutionExponential(SHAPE[0])
    layer.weight.data.mul_(30)
    x = torch.randn(1, *SHAPE)
    y = layer(x)
    kernel = layer._kernel(x.shape[1:])
    layer._iterate(x.shape[1:])
    expected = 9 * kernel[:, :, 1, 1].trace()
    torch.testing.assert_close(layer.log_abs_det_jacobian(x, y)[0], expected)
    assert not torch.allclose(layer._kernel(x.shape[1:])[:, :, 1, 1], kernel[:, :, 1, 1])


@pytest.mark.parametrize("layer_type", [SelfNormalizingLinear, SelfNormalizingConv2d])
def test_slogdet_is_exact(rivals: ModuleType, layer_type: type) -> None:
    layers = [layer_type(3, log_det=method) for method in (rivals.SlogDet(), Exact())]
    nn.init.normal_(layers[0].theta, std=0.5)
    layers[1].theta.data.copy_(layers[0].theta)
    x = torch.randn(2, 3) if layer_type is SelfNormalizingLinear else torch.randn(2, 3, 4, 4)
    results = []
    for layer in layers:
        value = layer.log_abs_det_jacobian(x, layer(x)).sum()
        results.append([value, *torch.autograd.grad(value, [layer.theta, layer.log_scale])])
        torch.testing.assert_close(layer.inv(layer(x).clone()), x)
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


# Of images (1, 4, 4), but for "conv", which has (1, 6, 6).
FLOWS: dict[str, Callable[[], Any]] = {
    "fc": lambda: flows.fully_connected((1, 4, 4), log_det="learned"),
    "conv": lambda: flows.convolutional((1, 6, 6), num_blocks=2, layers_per_block=2),
    "nested": lambda: MultiScale(
        [
            Compose([Squeeze2d(), Compose([SelfNormalizingConv2d(4, kernel_size=(1, 3))])]),
            SelfNormalizingConv2d(2, log_det="exact"),
        ],
        (1, 4, 4),
    ),
    "glow": lambda: flows.glow((1, 4, 4), num_steps=1, hidden_channels=2),
}
PLACES = [
    ("fc", "relative", "RelativeGradientLinear", 2),
    ("conv", "emerging", "EmergingConv2d", 4),
    ("conv", "exponential", "ConvolutionExponential", 4),
    ("nested", "emerging", "EmergingConv2d", 2),
    ("nested", "exponential", "ConvolutionExponential", 2),
    ("fc", "slogdet", "SlogDet", 2),
    ("conv", "slogdet", "SlogDet", 4),
    ("glow", "slogdet", "SlogDet", 2),
]


@pytest.mark.parametrize(("flow", "kind", "name", "count"), PLACES)
def test_replaced_layers_train(
    rivals: ModuleType, flow: str, kind: str, name: str, count: int
) -> None:
    """And then the densities are normalized ones: the log-determinant is that of the flow."""
    original, side = FLOWS[flow](), 6 if flow == "conv" else 4
    dim = side**2
    flow = rivals.replace_layers(original, kind)
    rival_type = getattr(rivals, name)
    assert sum(isinstance(one, rival_type) for one in flow.modules()) == count
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow.inv])
    images = 2 + 3 * torch.randn(20, 1, side, side)
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = -density.log_prob(images).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(-density.log_prob(images).mean().item())
    assert losses[-1] < losses[0] - 0.3

    flow.eval()
    jacobian = torch.autograd.functional.jacobian(flow, images[0]).view(dim, dim)
    y = flow(images[:1])
    log_det = flow.log_abs_det_jacobian(images[:1], y)[0]
    torch.testing.assert_close(
        log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=SERIES
    )
    torch.testing.assert_close(flow.inv(y.clone()), images[:1], rtol=0, atol=1e-8)

    # What was learned is saved: the state of a copy, and of a new flow that has seen no images.
    state = flow.state_dict()
    other = rivals.replace_layers(original, kind).eval()
    other.load_state_dict(copy.deepcopy(state))
    for one in (other, copy.deepcopy(flow)):
        assert torch.equal(one(images.clone()), flow(images))


def test_replaced_layers_keep_what_they_replace(rivals: ModuleType) -> None:
    """The centre of a kernel, device and dtype, other parts, the mode; and the flow as it was."""
    layer = SelfNormalizingConv2d(4, 3, init_scale=2.0, dtype=torch.float32)
    nn.init.normal_(layer.theta)
    spline = flows.RationalQuadraticSpline((4, 2, 2), dtype=torch.float32)
    flow = Compose([layer, spline]).eval()
    for kind in ("emerging", "exponential"):
        other = rivals.replace_layers(flow, kind)
        assert not any(module.training for module in other.modules())
        assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
        assert other.parts[1] is spline
        centre = other.parts[0].parts[0]
        torch.testing.assert_close(centre.weight, layer.weight[:, :, 1:2, 1:2])
    assert flow.parts[0] is layer
    same = rivals.replace_layers(layer, "slogdet")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(same(x), layer(x))
    assert same.theta is not layer.theta


@pytest.mark.parametrize("kind", ["emerging", "exponential"])
def test_replaced_layers_do_not_fit(rivals: ModuleType, kind: str) -> None:
    replace = rivals.replace_layers
    with pytest.raises(ValueError, match="layers SelfNormalizingConv2d, for kind"):
        replace(Squeeze2d(), kind)
    with pytest.raises(ValueError, match="expected layers SelfNormalizingConv2d in flows"):
        replace(FLOWS["fc"](), kind)
    with pytest.raises(ValueError, match="expected layers SelfNormalizingLinear in flows"):
        replace(FLOWS["conv"](), "relative")
    with pytest.raises(ValueError, match="layers SelfNormalizingLinear in flows of kind"):
        replace(flows.tabular(3, hidden_dim=4, num_layers=1), "relative")  # in its copula
    with pytest.raises(ValueError, match="expected convolutions larger than 1 × 1"):
        replace(FLOWS["glow"](), kind)
    with pytest.raises(ValueError, match="expected padding_mode='zeros'"):
        replace(SelfNormalizingConv2d(2, padding_mode="circular"), kind)
    with pytest.raises(ValueError, match="expected kind to be one of"):
        replace(FLOWS["conv"](), "planar")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_devices_and_types(
    rivals: ModuleType, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    layer = getattr(rivals, name)(3, device=device, dtype=dtype)
    x = torch.randn(5, *event_of(layer), device=device, dtype=dtype)
    y = layer(x)
    loss = (y**2).sum() - layer.log_abs_det_jacobian(x, y).sum()
    loss.backward()
    # Of a single event, too.
    event = x[0].clone()
    z = layer(event)
    torch.testing.assert_close(z, y[0])
    (z.sum() - layer.log_abs_det_jacobian(event, z)).backward()
    torch.testing.assert_close(layer.inv(z.detach()), event, rtol=0, atol=1e-3)
    assert (y.dtype, y.device, y.shape) == (dtype, x.device, x.shape)
    for parameter in layer.parameters():
        assert parameter.dtype is dtype
        assert torch.isfinite(parameter.grad).all()
    with pytest.raises(ValueError, match=r"expected dtype torch\.float"):
        layer(x.double() if dtype is torch.float32 else x.float())


def test_examples_of_the_docstrings(rivals: ModuleType) -> None:
    results = doctest.testmod(rivals)
    assert (results.failed, results.attempted > 3) == (0, True)


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_and_inputs(rivals: ModuleType, name: str) -> None:
    make_layer = getattr(rivals, name)
    with pytest.raises(ValueError, match="integer >= 1; got 0"):
        make_layer(0)
    with pytest.raises(ValueError, match="expected dtype, a floating-point"):
        make_layer(2, dtype=torch.int64)
    layer = make_layer(2)
    for transform in (layer, layer.inv):
        with pytest.raises(ValueError, match="expected a non-empty tensor of shape"):
            transform(torch.zeros(4, 3, 3))
    if name != "RelativeGradientLinear":
        for size in (2, 0, (3, 4), (3, 3, 3), 3.0):
            with pytest.raises(ValueError, match="expected kernel_size, one or two odd integers"):
                make_layer(2, size)
