"""SelfNormalizingConv2d against dense oracles: values, gradients, inverses, what it survives."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional as F

from pyro_snf import Learned, SelfNormalizingConv2d, SelfNormalizingLinear
from pyro_snf.log_dets import base
from pyro_snf.maps import convolution, kernels
from pyro_snf.path_gradient import push_score
from tests.registry import (
    LOG_DETS,
    LOSSES,
    REDUCTIONS,
    assert_gradients_equal,
    conv,
    density_by_inverse,
    density_loss,
    is_close,
    layer_options,
    log_det_of,
    nudge_inverses,
    randomize,
    relative_error,
    shared_gradients,
    standard_normal,
)

# Float64, condition numbers below 3, images of a few dozen numbers.
EXACT = 1e-9

Size = tuple[int, int]
Loss = Callable[[Transform, Tensor], Tensor]


class Setting(NamedTuple):
    """A convolution, and the images that it is tried on."""

    channels: int
    kernel_size: Size
    padding_mode: str
    image_size: Size
    inverse_kernel_size: Size
    """Of a learned kernel. It can be exact if it covers a periodic image, or is 1 × 1."""

    def layer(self, log_det: str = "refined", **options: object) -> SelfNormalizingConv2d:
        return conv(
            self.channels,
            kernel_size=self.kernel_size,
            padding_mode=self.padding_mode,
            inverse_kernel_size=self.inverse_kernel_size,
            log_det=log_det,
            **options,
        )

    def images(self, *batch_shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(200 + seed)
        return torch.randn(*batch_shape, self.channels, *self.image_size, generator=generator)


#: Odd and even images, square and oblong kernels.
SETTINGS = {
    "3×3": Setting(2, (3, 3), "zeros", (4, 4), (3, 3)),
    "3×5 on an odd image": Setting(1, (3, 5), "zeros", (5, 7), (5, 5)),
    "5×1": Setting(2, (5, 1), "zeros", (6, 3), (3, 1)),
    "periodic": Setting(2, (3, 3), "circular", (3, 5), (3, 5)),
    "periodic and even": Setting(2, (3, 3), "circular", (4, 6), (3, 3)),
    "periodic and oblong": Setting(1, (1, 3), "circular", (3, 5), (1, 5)),
    "1×1": Setting(3, (1, 1), "zeros", (3, 2), (1, 1)),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
EVERY_METHOD = pytest.mark.parametrize("log_det", LOG_DETS)
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)

#: All ways to a log-determinant that are exact at the first use of a layer.
EXACT_WAYS = [
    *[(log_det, name, 0.5) for log_det in ("exact", "refined") for name in SETTINGS],
    *[("learned", name, 0.0) for name in ("periodic", "periodic and oblong", "1×1")],
    *[("learned", name, 0.5) for name in ("periodic", "periodic and oblong", "1×1")],
]

SMALL = SETTINGS["3×3"]
PERIODIC = SETTINGS["periodic"]


class Dense(Transform):
    """The oracle: the same map and parameters by a dense matrix and nothing but autograd."""

    domain = codomain = constraints.independent(constraints.real, 3)
    bijective = True

    def __init__(self, layer: SelfNormalizingConv2d) -> None:
        super().__init__()
        self.layer = layer

    def matrix(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        return kernels.matrix(self.layer.weight, size, self.layer.padding_mode)

    def bias(self, x: Tensor) -> Tensor:
        return self.layer.bias.view(-1, 1, 1).expand(x.shape[-3:]).flatten()

    def _call(self, x: Tensor) -> Tensor:
        return (x.flatten(-3) @ self.matrix(x).mT + self.bias(x)).view(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y.flatten(-3) - self.bias(y)
        return torch.linalg.solve(self.matrix(y), rows.mT).mT.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.matrix(x)).logabsdet.expand(x.shape[:-3])


def exact_log_det(layer: SelfNormalizingConv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return log_det_of(Dense(copy.deepcopy(layer).double()), x.double())


def fit(layer: Transform, data: Tensor, *, num_steps: int, lr: float, decay: float) -> float:
    """Trains a density model by Adam; the last loss."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    for _ in range(num_steps):
        loss = density_loss(layer, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@EVERY_SETTING
@EVERY_METHOD
def test_value_is_that_of_torch_with_the_formula(log_det: str, setting: Setting) -> None:
    layer, x = setting.layer(log_det), setting.images(3)
    kernel = layer.theta / math.sqrt(layer.theta[0].numel())
    height, width = (size // 2 for size in setting.kernel_size)
    identity = torch.zeros_like(kernel)
    identity[range(setting.channels), range(setting.channels), height, width] = 1
    kernel = layer.log_scale.exp()[:, None, None, None] * (identity + kernel)
    assert relative_error(layer.weight, kernel) < EXACT
    mode = {"zeros": "constant", "circular": "circular"}[setting.padding_mode]
    padded = F.pad(x, (width, width, height, height), mode=mode)
    assert relative_error(layer(x), F.conv2d(padded, kernel, layer.bias)) < EXACT


@EVERY_METHOD
@pytest.mark.parametrize("scale", [1.0, 0.1, 7.0])
def test_start_is_a_multiple_of_the_identity(scale: float, log_det: str) -> None:
    layer, x = SelfNormalizingConv2d(2, log_det=log_det, init_scale=scale), SMALL.images(3)
    assert torch.allclose(layer(x), scale * x, rtol=EXACT)
    assert torch.allclose(layer.inv(x.clone()), x / scale, rtol=EXACT)
    with torch.no_grad():
        expected = torch.full((3,), 32 * math.log(scale))
        assert torch.allclose(log_det_of(layer, x), expected, rtol=EXACT)


@EVERY_METHOD
@pytest.mark.parametrize("layout", ["channels_last", "five dimensions", "a window"])
def test_memory_layout_does_not_matter(layout: str, log_det: str) -> None:
    layer = SMALL.layer(log_det)
    x = {
        "channels_last": SMALL.images(3).to(memory_format=torch.channels_last),
        "five dimensions": SMALL.images(2, 3).permute(1, 0, 3, 4, 2).contiguous().movedim(-1, 2),
        "a window": torch.randn(3, 4, 9, 9)[:, ::2, 1:5, 2:6],
    }[layout]
    assert not x.is_contiguous()
    for part in (layer, layer.inv):
        outputs = []
        for images in (x, x.clone(memory_format=torch.contiguous_format)):
            leaf = images.detach().requires_grad_()
            y = part(leaf)
            value = part.log_abs_det_jacobian(leaf, y)
            (y.square().sum() - value.sum()).backward()
            outputs.append([y, value, leaf.grad, layer.theta.grad.clone()])
            layer.zero_grad()
        for one, other in zip(*outputs, strict=True):
            assert one.shape == other.shape
            assert is_close(one, other, EXACT)


@EVERY_METHOD
def test_two_image_sizes_through_one_layer(log_det: str) -> None:
    layer = SMALL.layer(log_det)
    for _ in range(2):
        for x in (SMALL.images(2), torch.randn(3, 2, 6, 5)):
            layer.zero_grad()
            log_det_of(layer, x).sum().backward()
            if log_det != "learned":
                (expected,) = torch.autograd.grad(log_det_of(Dense(layer), x).sum(), layer.theta)
                assert relative_error(layer.theta.grad, expected) < EXACT
            with torch.no_grad():
                assert torch.allclose(log_det_of(layer, x), exact_log_det(layer, x), rtol=EXACT)
                assert is_close(layer.inv(layer(x).clone()), x, EXACT)
        with torch.no_grad():
            layer.theta.mul_(0.9)


@pytest.mark.parametrize("reduction", ["mean", "weighted"])
@EVERY_LOSS
@pytest.mark.parametrize(("log_det", "name", "mixture"), EXACT_WAYS)
def test_exact_estimate_gives_the_exact_value_and_gradient(
    log_det: str, name: str, mixture: float, loss: Loss, reduction: str
) -> None:
    options = {"mixture": mixture} if log_det == "learned" else {}
    layer, gradients = SETTINGS[name].layer(log_det, **options), []
    for transform in (layer, Dense(layer)):
        layer.zero_grad()
        x = SETTINGS[name].images(4).requires_grad_()
        REDUCTIONS[reduction](loss(transform, x)).backward()
        gradients.append({**shared_gradients(layer), "x": x.grad})
    assert_gradients_equal(*gradients, EXACT)
    value = log_det_of(layer, x)
    assert torch.equal(log_det_of(layer, math.nan * x), value)
    if log_det != "learned":
        assert torch.allclose(value, exact_log_det(layer, x), rtol=EXACT)


@EVERY_METHOD
def test_second_derivatives_are_exact(log_det: str) -> None:
    layer, x = PERIODIC.layer(log_det), PERIODIC.images(3).requires_grad_()
    seconds = []
    for transform in (layer, Dense(layer)):
        # As in score matching: the log-determinant is not a function of the data.
        log_prob = density_by_inverse(transform, x).sum()
        (score,) = torch.autograd.grad(log_prob, x, create_graph=True)
        value = transform.inv(x).square().sum()
        (gradient,) = torch.autograd.grad(value, layer.theta, create_graph=True)
        loss = score.square().sum() + gradient.square().sum()
        seconds.append(torch.autograd.grad(loss, [layer.theta, layer.log_scale, x]))
    for one, other in zip(*seconds, strict=True):
        assert relative_error(one, other) < EXACT


@pytest.mark.parametrize(
    "method", ["refined iterative", "learned iterative", *(f"{one} exact" for one in LOG_DETS)]
)
@EVERY_SETTING
def test_inverse_and_pushed_score_are_dense_solves(setting: Setting, method: str) -> None:
    log_det, inverse = method.split()
    layer = setting.layer(log_det, inverse=inverse)
    x, score = setting.images(2), setting.images(2, seed=1)
    y = layer(x).detach()
    expected = torch.linalg.solve(Dense(layer).matrix(x).mT, score.flatten(1).mT).mT
    assert relative_error(push_score(layer, x, y, score).flatten(1), expected) < EXACT
    nudge_inverses(layer, 0.5)
    assert relative_error(layer.inv(x), Dense(layer).inv(x)) < EXACT


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_one_pass_is_a_convolution_with_the_inverse_weight(log_det: str) -> None:
    layer, y = SMALL.layer(log_det, inverse="one_pass"), SMALL.images(3)
    nudge_inverses(layer, 0.3)
    kernel = layer.inverse_weight((4, 4))
    assert not kernel.requires_grad
    expected = kernels.convolve(y - layer.bias[:, None, None], kernel, "zeros")
    assert relative_error(layer.inv(y), expected) < EXACT


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_factors_of_many_image_sizes_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, padding_mode: str
) -> None:
    def count_kept(sizes: Iterable[int]) -> int:
        layer, made = conv(2, padding_mode=padding_mode).eval(), []
        method = layer.log_det
        for size in sizes:
            x = torch.randn(1, 2, size, size + 1)
            layer.inv(layer(x))
            layer.log_abs_det_jacobian(x, layer(x))
            factors = method.factors(layer.theta, torch.Size([2, size, size + 1]))
            assert factors is method.factors(layer.theta, torch.Size([2, size, size + 1]))
            made.append(weakref.ref(factors))
            del factors
        gc.collect()
        return sum(one() is not None for one in made)

    assert count_kept(range(4, 14)) == 4
    entries = conv(2, padding_mode=padding_mode).log_det.linear_map.num_factor_entries(
        torch.zeros(2, 2, 3, 3), torch.Size([2, 10, 11])
    )
    monkeypatch.setattr(base, "_MAX_ENTRIES", entries)
    assert count_kept(range(4, 14)) == 1  # the last ones are large, and kept alone
    assert count_kept([12, 13, 4, 5]) == 2


def test_large_convolution_is_inverted_without_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if these would take minutes, and gigabytes.
    monkeypatch.setattr(convolution, "_MAX_FLOPS", 0.0)
    layer = SelfNormalizingConv2d(8)
    randomize(layer)
    y, cotangent = torch.randn(2, 2, 8, 16, 16)
    y.requires_grad_()
    x = layer.inv(y)
    assert relative_error(layer(x.detach()), y.detach()) < EXACT
    # The gradient solves with the transposed convolution.
    (gradient,) = torch.autograd.grad((cotangent * x).sum(), y)
    product = kernels.convolve_transposed(gradient, layer.weight, "zeros")
    assert relative_error(product, cotangent) < EXACT
    assert relative_error(push_score(layer, x, y, cotangent), gradient) < EXACT


@pytest.mark.parametrize("reconstruction", Learned.RECONSTRUCTIONS)
@pytest.mark.parametrize("mixture", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("name", ["3×3", "periodic and even", "1×1"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_paper_formulas(name: str, mixture: float, reconstruction: str, sign: float) -> None:
    setting, weight = SETTINGS[name], 0.7
    options = {"reconstruction": reconstruction, "reconstruction_weight": weight}
    layer = setting.layer("learned", mixture=mixture, **options)
    nudge_inverses(layer, 0.5)
    x = setting.images(5).requires_grad_()
    cotangent, weights = setting.images(5, seed=1), sign * torch.rand(5)
    y = layer(x)
    log_det = layer.log_abs_det_jacobian(x, y)
    assert torch.equal(log_det, torch.zeros(5))
    ((cotangent * y).sum() + (weights * log_det).sum()).backward()

    # A and R as matrices, each with a constant copy.
    thetas = (layer.theta, layer.log_det.theta)
    parameters = [theta.detach().clone().requires_grad_() for theta in thetas]
    forward, inverse = (
        kernels.matrix(kernels.near_identity(one), setting.image_size, setting.padding_mode)
        for one in parameters
    )
    fixed, fixed_inverse = forward.detach(), inverse.detach()
    rows, total = x.detach().flatten(1), weights.sum()
    delta_h = (cotangent * layer.log_scale.detach().exp().view(-1, 1, 1)).flatten(1)
    h, delta_x = rows @ fixed.mT, delta_h @ fixed
    # log p^f: ⟨δ_h, A x⟩ + tr(RA), R constant; log p^g: −⟨δ_x, R h⟩ − tr(AR), A constant
    objective = (delta_h * (rows @ forward.mT)).sum() + total * (fixed_inverse @ forward).trace()
    mirrored = (delta_x * (h @ inverse.mT)).sum() + total * (fixed @ inverse).trace()
    penalized = fixed if reconstruction == "inverse" else forward
    error = ((rows @ penalized.mT) @ inverse.mT - rows).square().sum(-1)
    if reconstruction == "symmetric":
        error = (error + ((h @ inverse.mT) @ forward.mT - h).square().sum(-1)) / 2
    penalty = weight * (weights.abs() * error).sum()
    (objective + (penalty - mixture * mirrored) / (1 - mixture)).backward()

    assert relative_error(layer.theta.grad, parameters[0].grad) < EXACT
    assert relative_error(layer.log_det.theta.grad, parameters[1].grad) < EXACT
    assert relative_error(layer.bias.grad, cotangent.sum((0, 2, 3))) < EXACT
    expected = (delta_h * h).view_as(x).sum((0, 2, 3)) + math.prod(setting.image_size) * total
    assert relative_error(layer.log_scale.grad, expected) < EXACT
    # The penalty takes x for a constant: samplers and encoders see the true gradient.
    assert relative_error(x.grad.flatten(1), delta_x) < EXACT


@pytest.mark.parametrize("part", ["T", "T.inv"])
@pytest.mark.parametrize(
    "options",
    [
        {"log_det": "refined", "num_probes": 2, "tolerance": 0.01, "seed": 0},
        {"log_det": "learned", "reconstruction_weight": 0.7},
        {"log_det": "exact"},
    ],
)
def test_pointwise_is_dense_at_every_pixel(options: dict[str, object], part: str) -> None:
    layers = conv(4, kernel_size=1, **options), SelfNormalizingLinear(4, **layer_options(options))
    parameters = [list(layer.parameters()) for layer in layers]
    x, noise = torch.randn(5, 4, 3, 2), 0.1 * torch.randn(4, 4)
    pixels, weights = x.movedim(1, -1), torch.linspace(-1, 2, 5)
    with torch.no_grad():
        for one, other in zip(*parameters, strict=True):
            other.copy_(one.view_as(other))
    layers[1].refactorize()
    for _ in range(6):
        for layer in layers:
            layer.zero_grad()
            nudge_inverses(layer, 0.3)  # the same noise, in the same order
        one, other = (layer if part == "T" else layer.inv for layer in layers)
        y, rows = one(x), other(pixels)
        assert relative_error(y.movedim(1, -1), rows) < EXACT
        value = one.log_abs_det_jacobian(x, y)
        expected = other.log_abs_det_jacobian(pixels, rows).sum((-1, -2))
        assert torch.allclose(value, expected, rtol=EXACT)
        ((weights * value).sum() + y.sin().sum()).backward()
        ((weights * expected).sum() + rows.sin().sum()).backward()
        for first, second in zip(*parameters, strict=True):
            assert relative_error(first.grad.view_as(second), second.grad) < EXACT
        assert layers[0].error_estimate == pytest.approx(layers[1].error_estimate)
        assert layers[0].num_refactorizations == layers[1].num_refactorizations
        with torch.no_grad():
            for layer in layers:
                layer.theta.add_(noise.view_as(layer.theta))


SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda kernel: kernel.zero_(),
    "a channel of zeros": lambda kernel: kernel[1].zero_(),
    "equal channels": lambda kernel: kernel[1].copy_(kernel[0]),
    "NaN": lambda kernel: kernel[0, 0, 0, 0].fill_(math.nan),
    "inf": lambda kernel: kernel[1, 0, 0, 0].fill_(math.inf),
}


@pytest.mark.parametrize("mode", ["train", "eval", "inverse"])
@pytest.mark.parametrize("kind", SINGULAR)
@EVERY_METHOD
@pytest.mark.parametrize(
    "setting",
    # √C is exact: so are the zeros that a kernel is made of.
    [SMALL, PERIODIC, Setting(4, (1, 1), "zeros", (3, 2), (1, 1))],
    ids=["3×3", "periodic", "1×1"],
)
def test_singular_kernel_is_an_error_that_names_the_layer_and_leaves_nothing_behind(
    setting: Setting, log_det: str, kind: str, mode: str
) -> None:
    if log_det == "learned" and mode == "train" and kind not in ("NaN", "inf"):
        pytest.skip("nothing is inverted there")
    layer, x = setting.layer(log_det), setting.images(3)
    log_det_of(layer, x)
    layer.train(mode == "train")
    good = layer.theta.detach().clone()
    kernel = kernels.near_identity(good)
    SINGULAR[kind](kernel)
    with torch.no_grad():
        layer.theta.copy_(layer.log_det.linear_map.theta_of(kernel))
    message = r"SelfNormalizingConv2d\(\d, .*(singular|finite|NaN)"
    for _ in range(2):  # the error is not a matter of the first time
        with pytest.raises(torch.linalg.LinAlgError, match=message):
            _ = layer.inv(x) if mode == "inverse" else log_det_of(layer, x)
    with torch.no_grad():
        layer.theta.copy_(good)
    if log_det != "learned" or not layer.training:
        assert torch.allclose(log_det_of(layer, x).detach(), exact_log_det(layer, x), rtol=1e-6)
    assert is_close(layer.inv(layer(x).detach()), x, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", kernels.PADDING_MODES)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_huge_steps_give_no_wrong_value(log_det: str, mode: str, dtype: torch.dtype) -> None:
    layer = SelfNormalizingConv2d(2, log_det=log_det, padding_mode=mode, dtype=dtype)
    layer.log_scale.requires_grad_(False)  # e^s would overflow, and be refused
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e3)
    # Conditions of up to 10⁴ cost float32 three of its seven digits.
    tolerance = 1e-4 if dtype == torch.float32 else EXACT
    for step in range(8):
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        expected = exact_log_det(layer, x)[0].item()
        assert value[0].item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
        optimizer.zero_grad()
        (0.5 * y.square().sum((1, 2, 3)) - value).mean().backward()
        optimizer.step()


@EVERY_METHOD
def test_density_model_of_images_learns_their_correlation(log_det: str) -> None:
    # Data are white noise through a known convolution; the best likelihood is the entropy's.
    root, noise = torch.zeros(1, 1, 3, 3), torch.randn(256, 1, 5, 5)
    root[0, 0] = torch.tensor([[0.1, 0.3, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 0.0]])
    data = kernels.convolve(noise, root, "zeros")  # triangular with ones: log|det| = 0
    layer, base = SelfNormalizingConv2d(1, (5, 5), log_det=log_det), standard_normal(1, 5, 5)
    best = base.log_prob(noise).mean().item()
    fit(layer, data, num_steps=100, lr=0.03, decay=0.97)
    with torch.no_grad():
        # Of 26 parameters each overfits 256 images by half a nat a data set; the inverse of a
        # 3 × 3 kernel is larger than 5 × 5, which costs some hundredths.
        assert -density_loss(layer, data).item() == pytest.approx(best, abs=0.15)
        assert best - base.log_prob(data).mean().item() > 1
