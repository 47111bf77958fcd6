"""SelfNormalizingConv2d against dense oracles: values, gradients, inverses, what it survives."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Transform, constraints
from torch.nn import functional as F

from pyro_snf import GECO, Compose, SelfNormalizingConv2d, SelfNormalizingLinear, SmoothLeakyReLU
from pyro_snf.conv import kernels
from pyro_snf.conv.exact import ConvFactors
from pyro_snf.learned import LearnedInverse
from pyro_snf.path_gradient import push_score
from tests.registry import (
    COPIES,
    INVERSES,
    LOG_DETS,
    LOSSES,
    REDUCTIONS,
    assert_gradients_equal,
    by_torch_save,
    conv,
    density_by_inverse,
    density_by_transform,
    density_loss,
    make_inverse_exact,
    nudge_inverses,
    randomize,
    relative_error,
    set_kernel,
    shared_gradients,
)

# Float64, condition numbers below 3, images of a few dozen numbers.
EXACT = 1e-9
# The same in float32.
SINGLE = 1e-4

Size = tuple[int, int]


class Setting(NamedTuple):
    """A convolution, and the images that it is tried on."""

    channels: int
    kernel_size: Size
    padding_mode: str
    image_size: Size
    inverse_kernel_size: Size
    """Of a learned kernel. It can be the exact inverse if it covers a torus, or is 1 × 1."""

    def layer(self, log_det: str = "refined", **options: object) -> SelfNormalizingConv2d:
        options = {"inverse_kernel_size": self.inverse_kernel_size, **options}
        return conv(
            self.channels,
            kernel_size=self.kernel_size,
            padding_mode=self.padding_mode,
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
    "torus": Setting(2, (3, 3), "circular", (3, 5), (3, 5)),
    "even torus": Setting(2, (3, 3), "circular", (4, 6), (3, 3)),
    "oblong on a torus": Setting(1, (1, 3), "circular", (3, 5), (1, 5)),
    "1×1": Setting(3, (1, 1), "zeros", (3, 2), (1, 1)),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))

#: Where a learned kernel can be the exact inverse.
INVERTIBLE = ["torus", "oblong on a torus", "1×1"]

#: All ways to a log-determinant that are exact at the first use of a layer.
EXACT_WAYS = [
    *[("refined", name, 0.5) for name in SETTINGS],
    *[("learned", name, mixture) for name in INVERTIBLE for mixture in (0.0, 0.5)],
]

SMALL = SETTINGS["3×3"]
TORUS = SETTINGS["torus"]


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


def log_det_of(transform: Transform, x: Tensor) -> Tensor:
    return transform.log_abs_det_jacobian(x, transform(x))


def exact_log_det(layer: SelfNormalizingConv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight, size = layer.weight.double(), (x.shape[-2], x.shape[-1])
        return torch.linalg.slogdet(kernels.matrix(weight, size, layer.padding_mode)).logabsdet


# --- Values -------------------------------------------------------------------------------------


@EVERY_SETTING
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_value_is_that_of_torch_with_the_effective_kernel(log_det: str, setting: Setting) -> None:
    layer, x = setting.layer(log_det), setting.images(3)
    height, width = (size // 2 for size in setting.kernel_size)
    mode = {"zeros": "constant", "circular": "circular"}[setting.padding_mode]
    padded = F.pad(x, (width, width, height, height), mode=mode)
    assert relative_error(layer(x), F.conv2d(padded, layer.weight, layer.bias)) < EXACT


@EVERY_SETTING
def test_weight_is_the_formula(setting: Setting) -> None:
    layer = setting.layer()
    expected = layer.theta / math.sqrt(layer.theta[0].numel())
    for channel in range(setting.channels):
        centre = [size // 2 for size in setting.kernel_size]
        one = torch.zeros_like(expected)
        one[channel, channel, centre[0], centre[1]] = 1
        expected = expected + one
    expected = layer.log_scale.exp()[:, None, None, None] * expected
    assert relative_error(layer.weight, expected) < EXACT


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("scale", [1.0, 0.1, 7.0])
def test_start_is_a_multiple_of_the_identity(scale: float, log_det: str) -> None:
    layer = SelfNormalizingConv2d(2, log_det=log_det, init_scale=scale)
    x = SMALL.images(3)
    assert torch.allclose(layer(x), scale * x, rtol=EXACT)
    assert torch.allclose(layer.inv(x.clone()), x / scale, rtol=EXACT)
    with torch.no_grad():
        expected = torch.full((3,), 32 * math.log(scale))
        assert torch.allclose(log_det_of(layer, x), expected, rtol=EXACT)


@EVERY_SETTING
@pytest.mark.parametrize("mode", ["eval", "no_grad", "frozen"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_det_outside_training_is_that_of_the_jacobian(
    log_det: str, mode: str, setting: Setting
) -> None:
    layer, x = setting.layer(log_det), setting.images(2)
    jacobian = torch.autograd.functional.jacobian(layer, x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1)).logabsdet
    nudge_inverses(layer, 0.5)
    layer.train(mode != "eval").requires_grad_(mode != "frozen")
    with torch.set_grad_enabled(mode != "no_grad"):
        value = log_det_of(layer, x)
    assert torch.allclose(value.detach(), expected.expand(2), rtol=EXACT)


@pytest.mark.parametrize("log_det", ["refined", "exact"])
@EVERY_SETTING
def test_first_value_in_training_is_exact(setting: Setting, log_det: str) -> None:
    layer, x = setting.layer(log_det), setting.images(3)
    value = log_det_of(layer, x)
    assert value.requires_grad
    assert torch.allclose(value.detach(), exact_log_det(layer, x).expand(3), rtol=EXACT)


@EVERY_SETTING
def test_learned_log_det_adds_exactly_zero(setting: Setting) -> None:
    layer, x = setting.layer("learned"), setting.images(3)
    nudge_inverses(layer, 0.5)
    value = log_det_of(layer, x)
    assert value.requires_grad
    assert torch.equal(value, torch.zeros(3))


@pytest.mark.parametrize("log_det", LOG_DETS)
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
            log_det_value = part.log_abs_det_jacobian(leaf, y)
            (y.square().sum() - log_det_value.sum()).backward()
            outputs.append([y, log_det_value, leaf.grad, layer.theta.grad.clone()])
            layer.zero_grad()
        for one, other in zip(*outputs, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_two_image_sizes_through_one_layer(log_det: str) -> None:
    layer = SMALL.layer(log_det)
    small, large = SMALL.images(2), torch.randn(3, 2, 6, 5)
    for _ in range(2):
        for x in (small, large):
            layer.zero_grad()
            value = log_det_of(layer, x)
            value.sum().backward()
            expected = exact_log_det(layer, x)
            if log_det != "learned":
                assert torch.allclose(value.detach(), expected.expand(len(x)), rtol=EXACT)
                dense = copy.deepcopy(layer)
                dense.zero_grad()
                log_det_of(Dense(dense), x).sum().backward()
                assert relative_error(layer.theta.grad, dense.theta.grad) < EXACT
            with torch.no_grad():
                assert torch.allclose(log_det_of(layer, x), expected.expand(len(x)), rtol=EXACT)
                assert torch.allclose(layer.inv(layer(x).clone()), x, rtol=EXACT, atol=EXACT)
        with torch.no_grad():
            layer.theta.mul_(0.9)


# --- Exact gradients ----------------------------------------------------------------------------

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
Loss = Callable[[Transform, Tensor], Tensor]


def gradients_of(
    transform: Transform,
    layer: SelfNormalizingConv2d,
    loss: Loss,
    reduction: Callable[[Tensor], Tensor],
    images: Tensor,
) -> dict[str, Tensor]:
    layer.zero_grad()
    x = images.clone().requires_grad_()
    reduction(loss(transform, x)).backward()
    return {**shared_gradients(layer), "x": x.grad}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LOSS
@EVERY_SETTING
def test_exact_gradient_is_autograds(setting: Setting, loss: Loss, reduction: str) -> None:
    layer, x = setting.layer("exact"), setting.images(4)
    expected = gradients_of(Dense(layer), layer, loss, REDUCTIONS[reduction], x)
    actual = gradients_of(layer, layer, loss, REDUCTIONS[reduction], x)
    assert_gradients_equal(actual, expected, EXACT)


@pytest.mark.parametrize("reduction", ["mean", "weighted"])
@EVERY_LOSS
@pytest.mark.parametrize(("log_det", "name", "mixture"), EXACT_WAYS)
def test_exact_estimator_gives_the_exact_gradient(
    log_det: str, name: str, mixture: float, loss: Loss, reduction: str
) -> None:
    setting = SETTINGS[name]
    layer, x = setting.layer(log_det, mixture=mixture), setting.images(4)
    actual = gradients_of(layer, layer, loss, REDUCTIONS[reduction], x)
    expected = gradients_of(Dense(layer), layer, loss, REDUCTIONS[reduction], x)
    assert_gradients_equal(actual, expected, EXACT)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_exact_estimator_gives_the_exact_gradient_in_a_stack(log_det: str, inverse: str) -> None:
    if log_det == "learned" and inverse == "learned":
        pytest.skip("there the data's gradient goes to R, not to A")
    gradients = []
    for mode in (log_det, "exact"):
        options = {"log_det": mode, "inverse": inverse, "padding_mode": "circular"}
        stack = Compose(
            [
                SelfNormalizingConv2d(2, **options),
                SmoothLeakyReLU(0.3, learnable=True),
                SelfNormalizingConv2d(2, **options),
            ]
        )
        randomize(stack)
        x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(3))
        total = density_by_inverse(stack, x).mean() - 0.7 * density_by_transform(stack, x).sum()
        total.backward()
        gradients.append(shared_gradients(stack))
    assert_gradients_equal(*gradients)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_gradient_outside_training_is_exact(log_det: str) -> None:
    layer, x = SMALL.layer(log_det).eval(), SMALL.images(4)
    nudge_inverses(layer, 1.0)
    actual = gradients_of(layer, layer, density_by_inverse, torch.sum, x)
    expected = gradients_of(Dense(layer), layer, density_by_inverse, torch.sum, x)
    assert_gradients_equal(actual, expected)


@EVERY_LOSS
@pytest.mark.parametrize("setting", [SETTINGS["3×5 on an odd image"], TORUS], ids=["3×5", "torus"])
def test_exact_mode_against_finite_differences(setting: Setting, loss: Loss) -> None:
    layer = setting.layer("exact").with_cache(0)
    x = setting.images(1).requires_grad_()
    # gradcheck perturbs the parameters in place, past autograd's version counter.
    assert gradcheck(lambda *_: loss(layer, x), (*layer.parameters(), x))


@pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_inverse_has_second_derivatives(log_det: str, padding_mode: str) -> None:
    layer = conv(1, log_det=log_det, padding_mode=padding_mode).with_cache(0)
    y = torch.randn(1, 1, 3, 4, requires_grad=True)
    inputs = (*layer.parameters(), y)
    assert gradcheck(lambda *_: layer.inv(y), inputs)
    assert gradgradcheck(lambda *_: layer.inv(y), inputs)


@pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
def test_exact_log_det_has_second_derivatives(padding_mode: str) -> None:
    layer, x = conv(2, log_det="exact", padding_mode=padding_mode), torch.randn(2, 2, 4, 4)
    seconds = []
    for transform in (layer, Dense(layer)):
        value = log_det_of(transform, x).sum()
        (gradient,) = torch.autograd.grad(value, layer.theta, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), layer.theta)[0])
    assert relative_error(*seconds) < EXACT


@pytest.mark.parametrize("log_det", ["refined", "learned"])
def test_second_derivative_of_a_surrogate_is_refused(log_det: str) -> None:
    layer, x = SMALL.layer(log_det), SMALL.images(2)
    value = log_det_of(layer, x).sum()
    (gradient,) = torch.autograd.grad(value, layer.theta, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_score_of_the_data_is_differentiable_in_the_parameters(log_det: str) -> None:
    layer = TORUS.layer(log_det)
    scores = []
    for transform in (layer, Dense(layer)):
        layer.zero_grad()
        x = TORUS.images(3).requires_grad_()
        log_prob = density_by_inverse(transform, x).sum()
        (score,) = torch.autograd.grad(log_prob, x, create_graph=True)
        score.square().sum().backward()
        names = ["theta", "log_scale"]
        gradients = {name: layer.get_parameter(name).grad.clone() for name in names}
        scores.append({**gradients, "x": x.grad})
    assert_gradients_equal(*scores)


@pytest.mark.parametrize("how", ["no_grad", "optimizer"])
@pytest.mark.parametrize("part", ["T", "T.inv", "log_abs_det_jacobian"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_backward_after_a_change_is_right_or_an_error(log_det: str, part: str, how: str) -> None:
    def value(layer: SelfNormalizingConv2d, x: Tensor) -> Tensor:
        if part == "log_abs_det_jacobian":
            return log_det_of(layer, x).sum()
        return (layer(x) if part == "T" else layer.inv(x)).square().sum()

    layer, x = SMALL.layer(log_det), SMALL.images(4)
    (expected,) = torch.autograd.grad(value(layer, x), layer.theta)
    layer.clear_cache()
    stale = value(layer, x)
    if how == "no_grad":
        with torch.no_grad():
            layer.theta.mul_(1.5)
    else:
        layer.theta.grad = torch.ones_like(layer.theta)
        torch.optim.SGD([layer.theta], lr=0.1).step()
    value(layer, x.clone())  # brings the reference, the factors and the caches up to date
    gradient = None
    try:
        (gradient,) = torch.autograd.grad(stale, layer.theta)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    assert gradient is None or relative_error(gradient, expected) < EXACT


@pytest.mark.parametrize("log_det", LOG_DETS)
@EVERY_SETTING
def test_score_is_pushed_by_the_transposed_inverse(setting: Setting, log_det: str) -> None:
    layer, x, score = setting.layer(log_det), setting.images(2), setting.images(2, seed=1)
    y = layer(x)
    expected = torch.linalg.solve(Dense(layer).matrix(x).mT, score.flatten(1).mT).mT
    assert relative_error(push_score(layer, x, y, score).flatten(1), expected) < EXACT


# --- The inverse --------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["refined", "exact"])
@pytest.mark.parametrize("log_det", LOG_DETS)
@EVERY_SETTING
def test_inverse_is_a_dense_solve(setting: Setting, log_det: str, inverse: str) -> None:
    layer, y = setting.layer(log_det, inverse=inverse), setting.images(3)
    nudge_inverses(layer, 0.5)
    assert relative_error(layer.inv(y), Dense(layer).inv(y)) < EXACT


@pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
def test_one_pass_is_better_with_a_larger_kernel(padding_mode: str) -> None:
    errors, y = [], torch.randn(4, 2, 9, 9)
    for size in (1, 3, 5, 7, 9):
        layer = conv(2, padding_mode=padding_mode, inverse="learned", inverse_kernel_size=size)
        exact = Dense(layer).inv(y)
        errors.append(relative_error(layer.inv(y), exact))
    assert errors[0] > 5 * errors[1] > 10 * errors[2]
    if padding_mode == "circular":
        assert errors[2] > 5 * errors[3]
        assert errors[4] < EXACT
    else:  # what remains is that there are edges, and the noise of the fit
        assert min(errors[2:]) > 1e-3
        assert max(errors[2:]) < 1.1 * min(errors[2:])


def test_one_pass_is_a_convolution_with_the_inverse_weight() -> None:
    for log_det in ("refined", "learned"):
        layer = SMALL.layer(log_det, inverse="learned")
        nudge_inverses(layer, 0.3)
        y = SMALL.images(3)
        kernel = layer.inverse_weight((4, 4))
        assert not kernel.requires_grad
        expected = kernels.convolve(y - layer.bias[:, None, None], kernel, "zeros")
        assert relative_error(layer.inv(y), expected) < EXACT


@pytest.mark.parametrize("log_det", ["refined", "learned"])
@pytest.mark.parametrize("name", INVERTIBLE)
def test_one_pass_is_exact_where_the_window_covers_an_odd_torus(name: str, log_det: str) -> None:
    setting = SETTINGS[name]
    layer, y = setting.layer(log_det, inverse="learned"), setting.images(3)
    assert relative_error(layer.inv(y), Dense(layer).inv(y)) < EXACT


def test_one_pass_of_an_exact_layer_is_exact() -> None:
    # It has no approximate inverse.
    layer, y = SMALL.layer("exact", inverse="learned"), SMALL.images(3)
    assert relative_error(layer.inv(y), Dense(layer).inv(y)) < EXACT


def test_approximate_inverse_is_never_taken_for_the_truth() -> None:
    for log_det in ("refined", "learned"):
        layer, y = SMALL.layer(log_det, inverse="learned"), SMALL.images(3)
        x = layer.inv(y)
        assert relative_error(layer(x), y) > 1e-3
        assert layer(x) is not y
        z = layer(y)
        assert layer.inv(z) is y  # T is exact: a sample is scored at what it came from


# --- The paper's objective ----------------------------------------------------------------------

RECONSTRUCTION = pytest.mark.parametrize("reconstruction", LearnedInverse.RECONSTRUCTIONS)
MIXTURE = pytest.mark.parametrize("mixture", [0.0, 0.5, 0.8])
LEARNED = pytest.mark.parametrize(
    "setting", [SMALL, SETTINGS["even torus"], SETTINGS["1×1"]], ids=["3×3", "torus", "1×1"]
)


def learned_layer(setting: Setting, **options: object) -> SelfNormalizingConv2d:
    """A learned layer whose R is not the inverse."""
    layer = setting.layer("learned", **options)
    nudge_inverses(layer, 0.5)
    return layer


class Maps(NamedTuple):
    """A and R as dense matrices that are differentiable in leaves θ and φ."""

    theta: Tensor
    phi: Tensor
    forward: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, layer: SelfNormalizingConv2d, setting: Setting) -> Maps:
        leaves = [
            parameter.detach().clone().requires_grad_()
            for parameter in (layer.theta, layer.estimator.theta)
        ]
        matrices = [
            kernels.matrix(kernels.near_identity(leaf), setting.image_size, setting.padding_mode)
            for leaf in leaves
        ]
        return cls(*leaves, *matrices)

    def penalty(self, rows: Tensor, weights: Tensor, reconstruction: str) -> Tensor:
        """``Σᵢ wᵢ Eᵢ``, x being constants; DESIGN's formulas."""
        forward, inverse = self.forward, self.inverse
        if reconstruction == "inverse":
            forward = forward.detach()
        error = ((rows @ forward.mT) @ inverse.mT - rows).square().sum(-1)
        if reconstruction == "symmetric":
            h = (rows @ forward.mT).detach()
            error = (error + ((h @ inverse.mT) @ forward.mT - h).square().sum(-1)) / 2
        return (weights * error).sum()


@RECONSTRUCTION
@MIXTURE
@LEARNED
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_paper_formulas_forward(
    setting: Setting, mixture: float, reconstruction: str, sign: float
) -> None:
    layer = learned_layer(
        setting, mixture=mixture, reconstruction=reconstruction, reconstruction_weight=0.7
    )
    x = setting.images(5).requires_grad_()
    cotangent, weights = setting.images(5, seed=1), sign * torch.rand(5)
    y = layer(x)
    log_det = layer.log_abs_det_jacobian(x, y)
    ((cotangent * y).sum() + (weights * log_det).sum()).backward()

    maps, share = Maps.of(layer, setting), mixture / (1 - mixture)
    rows = x.detach().flatten(1)
    scale = layer.log_scale.detach().exp().view(-1, 1, 1)
    delta_h = (cotangent * scale).flatten(1)  # δ_z, through the scale
    forward, inverse = maps.forward.detach(), maps.inverse.detach()
    h, delta_x = rows @ forward.mT, delta_h @ forward
    total = weights.sum()
    # log p^f: ⟨δ_h, A x⟩ + tr(RA), R constant; log p^g: −⟨δ_x, R h⟩ − tr(AR), A constant
    objective = (delta_h * (rows @ maps.forward.mT)).sum()
    objective = objective + total * (inverse @ maps.forward).trace()
    mirrored = (delta_x * (h @ maps.inverse.mT)).sum() + total * (forward @ maps.inverse).trace()
    penalty = maps.penalty(rows, weights.abs(), reconstruction)
    (objective - share * mirrored + 0.7 / (1 - mixture) * penalty).backward()

    pixels = math.prod(setting.image_size)
    assert relative_error(layer.theta.grad, maps.theta.grad) < EXACT
    assert relative_error(layer.estimator.theta.grad, maps.phi.grad) < EXACT
    assert relative_error(layer.bias.grad, cotangent.sum((0, 2, 3))) < EXACT
    expected = (delta_h * h).view_as(x).sum((0, 2, 3)) + pixels * total
    assert relative_error(layer.log_scale.grad, expected) < EXACT
    # The penalty takes x for a constant: samplers and encoders see the true gradient.
    assert relative_error(x.grad.flatten(1), delta_x) < EXACT


@RECONSTRUCTION
@MIXTURE
@LEARNED
def test_paper_formulas_inverse(setting: Setting, mixture: float, reconstruction: str) -> None:
    # x = A⁻¹h exactly; the map of p^g is x = Rh itself.
    layer = learned_layer(
        setting, mixture=mixture, reconstruction=reconstruction, reconstruction_weight=0.7
    )
    y = setting.images(5).requires_grad_()
    cotangent, weights = setting.images(5, seed=1), torch.rand(5)
    x = layer.inv(y)
    log_det = layer.inv.log_abs_det_jacobian(y, x)
    ((cotangent * x).sum() + (weights * log_det).sum()).backward()

    maps, share = Maps.of(layer, setting), mixture / (1 - mixture)
    scale = layer.log_scale.detach().exp().view(-1, 1, 1)
    h = ((y.detach() - layer.bias.detach().view(-1, 1, 1)) / scale).flatten(1)
    solution = torch.linalg.solve(maps.forward, h.mT).mT
    total = -weights.sum()  # the log-det of the inverse is the negative
    left = cotangent.flatten(1)
    objective = (left * solution).sum() + total * (maps.inverse.detach() @ maps.forward).trace()
    mirrored = (left * (h @ maps.inverse.mT)).sum()
    mirrored = mirrored - total * (maps.forward.detach() @ maps.inverse).trace()
    penalty = maps.penalty(solution.detach(), weights, reconstruction)
    (objective + share * mirrored + 0.7 / (1 - mixture) * penalty).backward()

    adjoint = torch.linalg.solve(maps.forward.detach().mT, left.mT).mT
    assert relative_error(layer.theta.grad, maps.theta.grad) < EXACT
    assert relative_error(layer.estimator.theta.grad, maps.phi.grad) < EXACT
    assert relative_error(y.grad, adjoint.view_as(y) / scale) < EXACT


def test_one_pass_inverse_trains_r() -> None:
    # inverse="learned": x = R h is a map of its own; A is no part of it.
    layer = learned_layer(SMALL, inverse="learned")
    y, cotangent = SMALL.images(5), SMALL.images(5, seed=1)
    (cotangent * layer.inv(y)).sum().backward()
    maps = Maps.of(layer, SMALL)
    scale = layer.log_scale.detach().exp().view(-1, 1, 1)
    h = ((y - layer.bias.detach().view(-1, 1, 1)) / scale).flatten(1)
    (cotangent.flatten(1) * (h @ maps.inverse.mT)).sum().backward()
    assert relative_error(layer.estimator.theta.grad, maps.phi.grad) < EXACT
    assert layer.theta.grad is None or not layer.theta.grad.any()


def test_mixture_zero_trains_r_by_the_penalty_alone() -> None:
    gradients = []
    for weight in (0.0, 1.0):
        layer = learned_layer(SMALL, mixture=0.0, reconstruction_weight=weight)
        density_by_inverse(layer, SMALL.images(5)).sum().backward()
        gradients.append(layer.estimator.theta.grad)
    assert gradients[0] is None or not gradients[0].any()
    assert gradients[1].any()


@pytest.mark.parametrize("factor", [2.0, 0.1, -0.3])
def test_scaling_a_loss_scales_its_gradient(factor: float) -> None:
    # By c what maximizes or minimizes the density, by |c| the penalty, that is always minimized.
    def gradient(weight: float, scale: float) -> Tensor:
        layer = learned_layer(SMALL, reconstruction_weight=weight)
        (scale * density_by_inverse(layer, SMALL.images(5)).mean()).backward()
        return torch.cat([layer.theta.grad.flatten(), layer.estimator.theta.grad.flatten()])

    without = gradient(0.0, 1.0)
    penalty = gradient(0.7, 1.0) - without
    assert penalty.norm() > 0
    assert relative_error(gradient(0.7, factor), factor * without + abs(factor) * penalty) < EXACT


def test_gradient_error_falls_with_the_error_of_the_inverse() -> None:
    layer, x = TORUS.layer("learned", reconstruction_weight=0.0), TORUS.images(8)
    expected = gradients_of(Dense(layer), layer, density_by_inverse, torch.mean, x)["theta"]
    errors = []
    for size in (0.2, 0.1, 0.05):
        make_inverse_exact(layer)
        nudge_inverses(layer, size)
        actual = gradients_of(layer, layer, density_by_inverse, torch.mean, x)["theta"]
        errors.append(relative_error(actual, expected))
    assert errors[0] == pytest.approx(2 * errors[1], rel=EXACT)
    assert errors[1] == pytest.approx(2 * errors[2], rel=EXACT)
    assert errors[2] > 1e-4


@pytest.mark.parametrize(("tolerance", "direction"), [(1e-3, 1), (10.0, -1)])
def test_controller_moves_both_ways_and_once_a_step(tolerance: float, direction: int) -> None:
    controller = GECO(tolerance, decay=0.0)
    layer = learned_layer(SMALL, reconstruction_weight=controller)
    x, weights = SMALL.images(5), [controller.weight.item()]
    for _ in range(3):
        for _ in range(2):  # asked twice, it moves once
            log_det_of(layer, x)
        weights.append(controller.weight.item())
        with torch.no_grad():
            layer.theta.mul_(0.99)
    steps = [after - before for before, after in itertools.pairwise(weights)]
    assert all(step * direction > 0 for step in steps)
    assert weights[1] == pytest.approx(weights[0] * math.exp(0.01 * direction))  # one full step


def test_controller_sees_the_mean_square_error_of_an_element() -> None:
    controller = GECO(0.5, decay=0.0)
    layer = learned_layer(SMALL, reconstruction_weight=controller)
    x = SMALL.images(5)
    log_det_of(layer, x)
    maps = Maps.of(layer, SMALL)
    rows = x.flatten(1)
    expected = ((rows @ maps.forward.mT) @ maps.inverse.mT - rows).square().mean().item()
    assert controller.mean_square_error.item() == pytest.approx(expected, rel=1e-6)


# --- 1 × 1 kernels ------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A 1 × 1 convolution, and the dense layer that every pixel meets in it."""

    conv: SelfNormalizingConv2d
    linear: SelfNormalizingLinear

    @classmethod
    def of(cls, log_det: str, **options: object) -> Pair:
        pair = cls(
            conv(4, kernel_size=1, log_det=log_det, **options),
            SelfNormalizingLinear(4, log_det=log_det, **options),
        )
        with torch.no_grad():
            for one, other in zip(pair.linear.parameters(), pair.conv.parameters(), strict=True):
                one.copy_(other.view_as(one))
        pair.linear.refresh()
        return pair

    def assert_gradients_equal(self) -> None:
        for one, other in zip(self.linear.parameters(), self.conv.parameters(), strict=True):
            assert relative_error(other.grad.view_as(one), one.grad) < EXACT


@pytest.mark.parametrize("part", ["T", "T.inv"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_pointwise_convolution_is_a_dense_layer_at_every_pixel(log_det: str, part: str) -> None:
    options = {"reconstruction_weight": 0.7} if log_det == "learned" else {}
    pair = Pair.of(log_det, **options)
    x = torch.randn(5, 4, 3, 2)
    for _ in range(2):
        for layer in pair:
            layer.zero_grad()
            nudge_inverses(layer, 0.3)  # the same noise, in the same order
        pixels = x.movedim(1, -1)
        one, other = (layer if part == "T" else layer.inv for layer in pair)
        y, rows = one(x), other(pixels)
        assert relative_error(y.movedim(1, -1), rows) < EXACT
        weights = torch.linspace(-1, 2, 5)
        value = one.log_abs_det_jacobian(x, y)
        expected = other.log_abs_det_jacobian(pixels, rows).sum((-1, -2))
        assert torch.allclose(value, expected, rtol=EXACT)
        ((weights * value).sum() + y.sin().sum()).backward()
        ((weights * expected).sum() + rows.sin().sum()).backward()
        pair.assert_gradients_equal()
        with torch.no_grad():
            for layer in pair:
                layer.theta.mul_(0.9)


def test_pointwise_convolution_tracks_as_a_dense_layer_does() -> None:
    pair = Pair.of("refined", num_probes=2, tolerance=0.01)
    x = torch.randn(1, 4, 3, 2)
    for _ in range(6):
        values = [log_det_of(pair.conv, x), log_det_of(pair.linear, x.movedim(1, -1)).sum((1, 2))]
        assert torch.allclose(*values, rtol=EXACT)
        with torch.no_grad():
            pair.linear.theta.add_(0.1 * torch.randn(4, 4))
            pair.conv.theta.copy_(pair.linear.theta.view_as(pair.conv.theta))
    assert pair.conv.certificate == pytest.approx(pair.linear.certificate)
    assert pair.conv.num_refreshes == pair.linear.num_refreshes


# --- Lower precision ----------------------------------------------------------------------------


@EVERY_SETTING
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_float32(log_det: str, setting: Setting) -> None:
    layer, x = setting.layer(log_det), setting.images(4)
    expected = [layer(x), layer.inv(x.clone()), log_det_of(layer, x).detach()]
    expected_gradients = gradients_of(layer, layer, density_by_inverse, torch.mean, x)
    layer.float()
    x = x.float()
    actual = [layer(x), layer.inv(x.clone()), log_det_of(layer, x).detach()]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), other, rtol=SINGLE, atol=SINGLE)
    torch.set_default_dtype(torch.float32)
    gradients = gradients_of(layer, layer, density_by_inverse, torch.mean, x)
    assert_gradients_equal(gradients, expected_gradients, SINGLE)


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_works(dtype: torch.dtype, log_det: str, inverse: str) -> None:
    reference = TORUS.layer(log_det, inverse=inverse)
    layer = TORUS.layer(log_det, inverse=inverse).to(dtype)
    x = TORUS.images(5)
    expected, y = reference(x), layer(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 32 * torch.finfo(dtype).eps  # a few dozen roundings of numbers of size 1 to 3
    assert torch.allclose(y.double(), expected, atol=tolerance)
    again = layer.inv(y.detach().clone())
    assert again.dtype == dtype
    assert torch.allclose(again.double(), x, atol=2 * tolerance)
    value = log_det_of(layer, x.to(dtype))
    exact = exact_log_det(reference, x).expand(5)
    if log_det == "refined":
        assert torch.allclose(value.double(), exact, atol=4 * tolerance)
    value.sum().backward()
    assert layer.theta.grad.dtype == dtype
    assert torch.isfinite(layer.theta.grad).all()
    with torch.no_grad():
        value = log_det_of(layer, x.to(dtype)).double()
        assert torch.allclose(value, exact, atol=4 * tolerance)


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains(dtype: torch.dtype, log_det: str) -> None:
    layer = SelfNormalizingConv2d(2, log_det=log_det, dtype=dtype)
    x = (3 * torch.randn(32, 2, 4, 4)).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(60):
        y = layer(x)
        loss = 0.5 * y.float().square().sum((1, 2, 3)).mean()
        loss = loss - layer.log_abs_det_jacobian(x, y).float().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
    # Data of standard deviation 3 are whitened.
    assert abs(y.detach().double().std() - 1) < 0.2


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_autocast(log_det: str) -> None:
    layer, x = TORUS.layer(log_det).float(), TORUS.images(5).float()
    expected = layer.with_cache(0)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        again = layer.inv(y.detach().clone().float())
        low = layer(x.bfloat16())
    assert torch.allclose(y.float(), expected, atol=0.1)
    assert torch.allclose(low.float(), expected, atol=0.1)
    assert torch.allclose(again.float(), x, atol=0.1)
    assert value.dtype == torch.float32
    (y.float().square().sum() - value.sum() + again.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


# --- NaNs, singular kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("setting", [SMALL, TORUS, SETTINGS["5×1"]], ids=["zeros", "torus", "5×1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_image_spoils_no_other(
    value: float, setting: Setting, log_det: str, inverse: str
) -> None:
    layer, x = setting.layer(log_det, inverse=inverse), setting.images(3)
    expected, expected_inverse = layer(x), layer.inv(x.clone())
    bad = x.clone()
    bad[1, 0, 1, 1] = value
    for part, good in [(layer, expected), (layer.inv, expected_inverse)]:
        result = part(bad)
        assert not torch.isfinite(result[1]).all()
        assert torch.allclose(result[[0, 2]], good[[0, 2]], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_det_is_no_function_of_the_data(log_det: str) -> None:
    layer, x = SMALL.layer(log_det), SMALL.images(3)
    good = log_det_of(layer, x)
    bad = torch.full_like(x, math.nan)
    assert torch.equal(log_det_of(layer, bad), good)


SINGULAR: dict[str, Callable[[Tensor], None]] = {
    "zero": lambda kernel: kernel.zero_(),
    "a channel of zeros": lambda kernel: kernel[1].zero_(),
    "equal channels": lambda kernel: kernel[1].copy_(kernel[0]),
    "NaN": lambda kernel: kernel[0, 0, 0, 0].fill_(math.nan),
    "inf": lambda kernel: kernel[1, 0, 0, 0].fill_(math.inf),
}


def make_singular(layer: SelfNormalizingConv2d, kind: str) -> None:
    kernel = kernels.near_identity(layer.theta.detach()).clone()
    SINGULAR[kind](kernel)
    set_kernel(layer.theta, kernel)


@pytest.mark.parametrize("mode", ["train", "eval", "inverse"])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize(
    "setting",
    # √C is exact: so are the zeros that a kernel is made of.
    [SMALL, TORUS, Setting(4, (1, 1), "zeros", (3, 2), (1, 1))],
    ids=["3×3", "torus", "1×1"],
)
def test_singular_kernel_is_an_error_that_names_the_layer(
    setting: Setting, log_det: str, kind: str, mode: str
) -> None:
    if log_det == "learned" and mode == "train" and kind not in ("NaN", "inf"):
        pytest.skip("nothing is inverted there")
    layer, x = setting.layer(log_det), setting.images(3)
    log_det_of(layer, x)
    layer.train(mode == "train")
    good = layer.theta.detach().clone()
    make_singular(layer, kind)
    for _ in range(2):  # the error is not a matter of the first time
        with pytest.raises(
            torch.linalg.LinAlgError, match=r"SelfNormalizingConv2d\(\d, .*(singular|finite|NaN)"
        ):
            _ = layer.inv(x) if mode == "inverse" else log_det_of(layer, x)
    # And it leaves nothing behind.
    with torch.no_grad():
        layer.theta.copy_(good)
    if log_det != "learned" or not layer.training:
        value = log_det_of(layer, x).detach()
        assert torch.allclose(value, exact_log_det(layer, x).expand(3), rtol=1e-6)
    assert torch.allclose(layer.inv(layer(x).detach()), x, rtol=EXACT, atol=EXACT)


def test_kernel_that_is_singular_on_a_torus_may_be_none_on_an_image() -> None:
    # x ↦ x − (its neighbour): on a torus it takes a constant image to 0.
    kernel = torch.zeros(1, 1, 1, 3)
    kernel[0, 0, 0] = torch.tensor([0.0, 1.0, -1.0])
    x = torch.randn(2, 1, 3, 5)
    for padding_mode in kernels.PADDING_MODES:
        layer = SelfNormalizingConv2d(1, (1, 3), padding_mode=padding_mode)
        set_kernel(layer.theta, kernel)
        if padding_mode == "zeros":
            assert torch.allclose(log_det_of(layer, x).detach(), torch.zeros(2), atol=EXACT)
            assert torch.allclose(layer.inv(layer(x).detach()), x, rtol=EXACT, atol=EXACT)
        else:
            with pytest.raises(torch.linalg.LinAlgError, match="singular"):
                log_det_of(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_huge_steps_give_no_wrong_value(
    log_det: str, padding_mode: str, dtype: torch.dtype
) -> None:
    layer = SelfNormalizingConv2d(2, log_det=log_det, padding_mode=padding_mode, dtype=dtype)
    layer.log_scale.requires_grad_(False)  # e^s would overflow, and be refused
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e3)
    for step in range(8):
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        y = layer(x)
        value = layer.log_abs_det_jacobian(x, y)
        expected = exact_log_det(layer, x).item()
        # Conditions of up to 10⁴ cost float32 three of its seven digits.
        tolerance = SINGLE if dtype == torch.float32 else EXACT
        assert value[0].item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
        optimizer.zero_grad()
        (0.5 * y.square().sum((1, 2, 3)) - value).mean().backward()
        optimizer.step()


# --- Changes of the parameters ------------------------------------------------------------------


@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_write_past_the_version_counter_is_noticed(log_det: str) -> None:
    layer, x = SMALL.layer(log_det), SMALL.images(3)
    for _ in range(2):
        for training in (True, False):
            layer.train(training)
            log_det_of(layer, x), layer.inv(x)
        version = layer.theta._version
        layer.theta.data.mul_(-1)  # too far for the reference of before
        assert layer.theta._version == version
        for training in (True, False):
            layer.train(training)
            value = log_det_of(layer, x).detach()
            assert torch.allclose(value, exact_log_det(layer, x).expand(3), rtol=EXACT)
            assert relative_error(layer.inv(x.clone()), Dense(layer).inv(x)) < EXACT


@pytest.mark.parametrize("through", ["twin", "with_cache"])
def test_twins_share_the_estimator(through: str) -> None:
    layer, x = SMALL.layer(), SMALL.images(3)
    twin = layer.twin() if through == "twin" else layer.with_cache(0)
    assert twin.estimator is layer.estimator
    values = [log_det_of(part, x).detach() for part in (layer, twin)]
    assert torch.equal(*values)
    assert layer.num_refreshes == twin.num_refreshes == 1
    layer.eval()
    assert not twin.estimator.training


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_dtype_may_change_in_the_middle_of_training(log_det: str) -> None:
    layer = SMALL.layer(log_det)
    for dtype in (torch.float64, torch.float32, torch.float64):
        layer.to(dtype)
        torch.set_default_dtype(dtype)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for step in range(3):
            x = SMALL.images(4, seed=step)
            loss = density_loss(layer, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert all(p.grad.dtype == dtype for p in layer.parameters())
        if log_det == "refined":
            value = log_det_of(layer, x)[0].item()
            assert value == pytest.approx(exact_log_det(layer, x).item(), abs=0.01)


# --- Saving and resuming ------------------------------------------------------------------------


def run(
    layer: SelfNormalizingConv2d, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        data = torch.randn(8, 2, 4, 5, generator=torch.Generator().manual_seed(step))
        loss = density_loss(layer, 2 * data.cumsum(-1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def by_state_dict(layer: SelfNormalizingConv2d) -> SelfNormalizingConv2d:
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = SelfNormalizingConv2d(2, log_det=layer.log_det, padding_mode=layer.padding_mode)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("padding_mode", kernels.PADDING_MODES)
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("make_copy", [by_state_dict, *COPIES], ids=lambda make: make.__name__)
@pytest.mark.parametrize("steps", [0, 5])
def test_resumed_run_is_the_same_bit_for_bit(
    steps: int,
    make_copy: Callable[[SelfNormalizingConv2d], SelfNormalizingConv2d],
    log_det: str,
    padding_mode: str,
) -> None:
    layer = SelfNormalizingConv2d(2, log_det=log_det, padding_mode=padding_mode, seed=7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    run(layer, optimizer, range(steps))
    resumed = make_copy(layer)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    expected = run(layer, optimizer, range(steps, steps + 5))
    torch.randn(5)  # the global stream is no part of it
    assert run(resumed, resumed_optimizer, range(steps, steps + 5)) == expected
    assert torch.equal(resumed.theta, layer.theta)
    if log_det == "refined":
        assert resumed.estimator.get_extra_state() == layer.estimator.get_extra_state()


@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_copy_has_values_of_its_own(log_det: str) -> None:
    layer, x = SMALL.layer(log_det), SMALL.images(3)
    log_det_of(layer, x)
    twin = by_torch_save(layer)
    with torch.no_grad():
        twin.theta.mul_(-1)  # too far for the reference of before
    for part in (layer, twin, layer):
        value = log_det_of(part, x).detach()
        assert torch.allclose(value, exact_log_det(part, x).expand(3), rtol=EXACT)


@pytest.mark.parametrize("method", ["log_abs_det", "kernel_gradient", "solve"])
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_interrupt_is_repaired_by_the_next_step(
    log_det: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = SMALL.layer(log_det), SMALL.images(3)
    log_det_of(layer, x).sum().backward()
    with torch.no_grad():
        layer.theta.mul_(-0.5)  # far enough for another reference
    layer.zero_grad()

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        new = interrupted if method == "solve" else property(interrupted)
        patch.setattr(ConvFactors, method, new)
        if method == "solve" and log_det == "exact":
            with pytest.raises(KeyboardInterrupt):
                layer.inv(x)
        else:
            with pytest.raises(KeyboardInterrupt):
                log_det_of(layer, x).sum().backward()

    layer.zero_grad()
    actual = gradients_of(layer, layer, density_by_inverse, torch.mean, x)
    expected = gradients_of(Dense(layer), layer, density_by_inverse, torch.mean, x)
    assert_gradients_equal(actual, expected)
    value = log_det_of(layer, x).detach()
    assert torch.allclose(value, exact_log_det(layer, x).expand(3), rtol=EXACT)


# --- Density models -----------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_density_model_of_images_learns_their_correlation(log_det: str) -> None:
    # Data are white noise through a known convolution; the best likelihood is the entropy's.
    root = torch.zeros(1, 1, 3, 3)
    root[0, 0] = torch.tensor([[0.1, 0.3, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 0.0]])
    noise = torch.randn(256, 1, 5, 5)
    data = kernels.convolve(noise, root, "zeros")  # triangular with ones: log|det| = 0
    layer = SelfNormalizingConv2d(1, (5, 5), log_det=log_det)
    base = dist.Normal(torch.zeros(1, 5, 5), 1.0).to_event(3)
    density = dist.TransformedDistribution(base, [layer.inv])
    best = base.log_prob(noise).mean().item()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for _ in range(100):
        loss = -density.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # Of 26 parameters each overfits 256 images by half a nat a data set; the inverse of a
        # 3 × 3 kernel is larger than 5 × 5, which costs some hundredths.
        assert density.log_prob(data).mean().item() == pytest.approx(best, abs=0.15)
        start = base.log_prob(data).mean().item()
        assert best - start > 1
