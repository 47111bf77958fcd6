"""MultiScale: a bijection between images and flat vectors; it finds the cached pairs of levels."""

from __future__ import annotations

import copy
import math
import re

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import AffineTransform, ComposeTransform, ReshapeTransform

from pyro_snf.path_gradient import PathGradientDistribution
from pyro_snf.transforms.activations import SmoothLeakyReLU
from pyro_snf.transforms.actnorm import ActNorm
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.image_coupling import image_coupling
from pyro_snf.transforms.linear import SelfNormalizingLinear
from pyro_snf.transforms.multiscale import MultiScale
from pyro_snf.transforms.squeeze import Squeeze2d
from tests.registry import randomize

# Float64: rounding, and three digits to spare.
EXACT = 1e-9
BATCH_SHAPES = [(), (2,), (2, 1), (2, 1, 3)]
SHAPE = (2, 4, 4)


def glow(seed: int = 0) -> MultiScale:
    """Three levels; (2, 4, 4) is split into parts of 16, 8 and 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels: list[Transform] = [
            Compose([ActNorm(2), image_coupling(2, hidden_channels=4), SmoothLeakyReLU(0.5)]),
            Compose([Squeeze2d(), ActNorm(4), image_coupling(4, hidden_channels=4)]),
            image_coupling(2, hidden_channels=4).inv,
        ]
        flow = MultiScale(levels, SHAPE)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return flow


def standard_normal(dim: int = 32) -> dist.Distribution:
    return dist.Normal(torch.tensor(0.0), 1.0).expand([dim]).to_event(1)


def levelwise(flow: MultiScale, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and log-det of one image, level by level."""
    total, latents = torch.zeros(()), []
    for index, level in enumerate(flow.levels):
        output = level(x)
        total = total + level.log_abs_det_jacobian(x, output).sum()
        if index == len(flow.levels) - 1:
            latents.append(output.flatten())
        else:
            x, latent = output.chunk(2)
            latents.append(latent.flatten())
    return torch.cat(latents), total


# --- Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_value_log_det_and_round_trip(batch_shape: tuple[int, ...]) -> None:
    flow = glow()
    x = torch.randn(*batch_shape, *SHAPE)
    y = flow(x)
    assert y.shape == (*batch_shape, 32)
    log_det = flow.log_abs_det_jacobian(x, y)
    assert log_det.shape == batch_shape
    for image, latent, value in zip(
        x.view(-1, *SHAPE), y.view(-1, 32), log_det.flatten(), strict=True
    ):
        expected = levelwise(copy.deepcopy(flow), image)
        assert torch.allclose(latent, expected[0], rtol=EXACT, atol=EXACT)
        assert torch.allclose(value, expected[1], rtol=EXACT, atol=EXACT)
    again = flow.inv(y.clone())
    assert again.shape == x.shape
    assert torch.allclose(again, x, rtol=EXACT, atol=EXACT)
    inverse_log_det = flow.inv.log_abs_det_jacobian(y, x)
    assert torch.allclose(inverse_log_det, -log_det, rtol=EXACT, atol=EXACT)


def test_second_half_of_the_channels_is_split_off() -> None:
    x = torch.arange(32.0).view(SHAPE)
    flow = MultiScale([Squeeze2d(), Squeeze2d(1)], SHAPE)
    y = flow(x)
    assert flow.latent_shapes == [(4, 2, 2), (4, 2, 2)]
    squeezed = Squeeze2d()(x)
    assert torch.equal(y, torch.cat([squeezed[4:].flatten(), squeezed[:4].flatten()]))
    assert (flow.log_abs_det_jacobian(x, y) == 0).all()
    assert repr(flow) == "MultiScale((2, 4, 4), 2 levels)"
    single = MultiScale([Squeeze2d()], SHAPE)
    assert torch.equal(single(x), squeezed.flatten())
    assert torch.equal(single.inv(squeezed.flatten()), x)
    assert single.latent_shapes == [(8, 2, 2)]


def test_nan_stays_in_its_image() -> None:
    flow, x = glow(), torch.randn(2, *SHAPE)
    x[0, 0, 0, 0] = math.nan
    y = flow(x)
    assert y.isnan().any(-1).tolist() == [True, False]
    assert flow.log_abs_det_jacobian(x, y).isnan().tolist() == [True, False]


def test_channels_last() -> None:
    flow, x = glow(), torch.randn(5, *SHAPE)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(flow(last), flow(x), rtol=EXACT, atol=EXACT)


# --- In distributions and stacks ----------------------------------------------------------------


def test_density_and_its_samples() -> None:
    flow = glow()
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    assert density.event_shape == SHAPE
    assert density.batch_shape == ()
    x = density.rsample((4, 2))
    assert x.shape == (4, 2, *SHAPE)
    y = flow(x)
    expected = standard_normal().log_prob(y) + flow.log_abs_det_jacobian(x, y)
    assert torch.allclose(density.log_prob(x), expected, rtol=EXACT)
    assert torch.allclose(density.log_prob(x.clone()), expected, rtol=EXACT)
    assert density.expand([5]).log_prob(torch.randn(5, *SHAPE)).shape == (5,)


def test_vectors_from_images() -> None:
    # The other direction: a base of images.
    base = dist.Normal(torch.zeros(SHAPE), 1.0).to_event(3)
    density = dist.TransformedDistribution(base, [glow()])
    assert density.event_shape == (32,)
    assert density.log_prob(density.rsample((4,))).shape == (4,)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 1)])
def test_inside_a_stack(batch_shape: tuple[int, ...]) -> None:
    linear = SelfNormalizingLinear(32, log_det="exact")
    randomize(linear)
    before = ActNorm(2).eval()
    flow = Compose([before, AffineTransform(1.0, 2.0), glow(), linear])
    x = torch.randn(*batch_shape, *SHAPE)
    y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    assert log_det.shape == batch_shape
    h = before(x) * 2 + 1
    z = flow.parts[2](h)
    expected = 32 * math.log(2) + flow.parts[2].log_abs_det_jacobian(h, z)
    expected = expected + linear.log_abs_det_jacobian(z, y)
    assert torch.allclose(log_det, expected, rtol=EXACT)
    assert torch.allclose(flow.inv(y.clone()), x, rtol=EXACT, atol=EXACT)
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    assert density.event_shape == SHAPE
    assert torch.allclose(density.log_prob(x), standard_normal().log_prob(y) + log_det, rtol=EXACT)


def test_multi_scale_inside_a_multi_scale() -> None:
    inner = Compose([glow(), ReshapeTransform((32,), SHAPE)])
    flow = MultiScale([inner, Squeeze2d()], SHAPE)
    x = torch.randn(3, *SHAPE)
    y = flow(x)
    assert torch.allclose(flow.inv(y.clone()), x, rtol=EXACT, atol=EXACT)
    expected = inner.log_abs_det_jacobian(x, inner(x))
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), expected, rtol=EXACT)


def test_path_gradient() -> None:
    flow = glow()
    x = dist.TransformedDistribution(standard_normal(), [flow.inv]).rsample((3,)).detach()
    scores = []
    for kind in (dist.TransformedDistribution, PathGradientDistribution):
        x = x.detach().clone().requires_grad_()
        kind(standard_normal(), [flow.inv]).log_prob(x).sum().backward()
        scores.append(x.grad)
    assert torch.allclose(*scores, rtol=EXACT, atol=EXACT)


def test_torch_and_pyro_transforms_as_levels() -> None:
    levels = [
        ComposeTransform([AffineTransform(0.5, 2.0, event_dim=3), Squeeze2d()]),
        AffineTransform(torch.tensor(1.0), torch.tensor(-3.0)),
        dist.transforms.GeneralizedChannelPermute(2),
    ]
    flow = MultiScale(levels, SHAPE)
    x = torch.randn(5, *SHAPE)
    y = flow(x)
    assert torch.allclose(flow.inv(y.clone()), x, rtol=EXACT, atol=EXACT)
    expected = 32 * math.log(2) + 16 * math.log(3)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), torch.tensor(expected), atol=1e-6)
    assert len(list(flow.parameters())) == len(list(levels[2].parameters())) > 0


# --- Caches -------------------------------------------------------------------------------------


def count_calls(flow: MultiScale) -> list[int]:
    calls: list[int] = []
    for module in flow.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_levels_are_evaluated_once_a_likelihood() -> None:
    flow = MultiScale(
        [Compose([image_coupling(2, hidden_channels=4), Squeeze2d()]), image_coupling(4)], SHAPE
    )
    calls = count_calls(flow)
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    density.log_prob(torch.randn(3, *SHAPE)).sum().backward()
    assert len(calls) == 2


def test_pairs_of_inexact_levels_are_not_found() -> None:
    class Rough(SmoothLeakyReLU):
        def _inverse(self, y: Tensor) -> Tensor:
            return super()._inverse(y) + 0.1

        def _inverse_is_exact(self) -> bool:
            return False

    flow = MultiScale([Squeeze2d(), Rough(), SmoothLeakyReLU()], SHAPE)
    y = torch.randn(3, 32)
    x = flow.inv(y)
    assert flow(x) is not y
    assert not torch.allclose(flow(x), y)


def test_pairs_are_dropped_after_any_change() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    y = flow(x)
    for change in ("parameter", "data", "grad mode", "input"):
        if change == "parameter":
            flow.levels[1].parts[1].bias.data.add_(1.0)
        elif change == "input":
            x.add_(1.0)
        with torch.set_grad_enabled(change != "grad mode"):
            again = flow(x)
            assert torch.equal(again, copy.deepcopy(flow)(x.clone()))
            assert again.requires_grad == (change != "grad mode")
        if change in ("parameter", "input"):
            assert not torch.allclose(again, y)
        y = again


def test_levels_of_torch_are_safely_cached() -> None:
    parts = [AffineTransform(1.0, 2.0), ComposeTransform([AffineTransform(0.0, 3.0)])]
    for level in parts:
        flow, x = MultiScale([level, Squeeze2d()], SHAPE), torch.ones(3, *SHAPE)
        y = flow(x)
        x.zero_()
        assert not torch.equal(flow(x), y)
        x.requires_grad_()
        assert flow(x).requires_grad


def test_with_cache() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    assert flow.with_cache(1) is flow
    assert flow.inv.with_cache(1) is flow.inv
    other = flow.with_cache(0)
    y = other(x)
    assert other(x) is not y
    assert torch.equal(y, flow(x))
    assert flow(x) is flow(x)
    assert other.copy_with_own_cache()(x) is not other(x)
    again = other.with_cache(1)
    assert again(x) is again(x)
    assert other(x) is not other(x)


def test_first_batch_initializes_every_level() -> None:
    flow = MultiScale([Compose([Squeeze2d(), ActNorm(8)]), ActNorm(4)], SHAPE)
    x = 3 + 2 * torch.randn(50, *SHAPE)
    dist.TransformedDistribution(standard_normal(), [flow.inv]).log_prob(x)
    y = flow(x)
    assert torch.allclose(y.mean(), torch.tensor(0.0), atol=EXACT)
    assert torch.allclose(y.square().mean(), torch.tensor(1.0), atol=EXACT)


# --- Mistakes -----------------------------------------------------------------------------------


def test_odd_number_of_channels() -> None:
    message = r"expected an even number of channels.*; got images \(3, 4, 4\) from level 0"
    with pytest.raises(ValueError, match=message):
        MultiScale([ActNorm(3), ActNorm(3)], (3, 4, 4))
    message = r"expected an even number of channels.*; got images \(3, 4, 4\) from level 1"
    with pytest.raises(ValueError, match=message):
        MultiScale([ActNorm(6), ActNorm(3), ActNorm(3)], (6, 4, 4))
    MultiScale([ActNorm(6), ActNorm(3)], (6, 4, 4))  # the channels of the last are not halved


def test_sizes_that_do_not_fit() -> None:
    message = (
        r"level 1, with images \(2, 3, 5\): Squeeze2d\(2\): expected H and W divisible by 2; "
        r"got \(2, 3, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        MultiScale([Squeeze2d(), Squeeze2d()], (1, 6, 10))


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="expected at least one level; got none"):
        MultiScale([], SHAPE)
    with pytest.raises(ValueError, match="expected levels, bijective transforms; got ReLU"):
        MultiScale([nn.ReLU()], SHAPE)
    with pytest.raises(ValueError, match="expected levels, bijective transforms; got AbsTr"):
        MultiScale([torch.distributions.AbsTransform()], SHAPE)
    with pytest.raises(ValueError, match=r"images to images; level 0 maps shape .* to \(32,\)"):
        MultiScale([ReshapeTransform(SHAPE, (32,))], SHAPE)
    with pytest.raises(ValueError, match=r"level 0, with images .*expected a shape"):
        MultiScale([glow()], (2, 4, 6))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (1, 2, 4, 4), 4, "244", None])
def test_event_shape_is_checked(shape: object) -> None:
    message = re.escape(f"expected event_shape (C, H, W), integers >= 1; got {shape!r}")
    with pytest.raises(ValueError, match=message):
        MultiScale([Squeeze2d()], shape)


@pytest.mark.parametrize("size", [0, -4, 4.0, "4", None, True])
def test_sizes_are_checked(size: object) -> None:
    shape = (2, size, 4)
    message = re.escape(f"expected event_shape (C, H, W), integers >= 1; got {shape!r}")
    with pytest.raises(ValueError, match=message):
        MultiScale([Squeeze2d()], shape)


def test_wrong_input() -> None:
    flow = glow()
    for use in (flow, lambda x: flow.log_abs_det_jacobian(x, torch.zeros(32))):
        for shape in [(32,), (2, 4), (2, 4, 5), (4, 4, 2), (0, 2, 4, 4)]:
            message = r"MultiScale\(.*expected .*shape \(\.\.\., 2, 4, 4\); got "
            with pytest.raises(ValueError, match=message + re.escape(str(shape))):
                use(torch.zeros(shape))
    for shape in [(), (31,), (32, 1), SHAPE]:
        message = r"MultiScale\(.*expected .*shape \(\.\.\., 32\); got " + re.escape(str(shape))
        with pytest.raises(ValueError, match=message):
            flow.inv(torch.zeros(shape))
    with pytest.raises(ValueError, match="floating-point tensor"):
        flow(torch.zeros(SHAPE, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., 2, 4, 4\); got \(32,\)"):
        flow.forward_shape(torch.Size([32]))
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., 32\); got \(2, 4, 4\)"):
        flow.inverse_shape(torch.Size(SHAPE))
