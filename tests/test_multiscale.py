"""MultiScale: a bijection between images and flat vectors, which finds its levels' caches."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import AffineTransform, ComposeTransform, ReshapeTransform

from pyro_snf.path_gradient import PathGradientDistribution
from pyro_snf.transforms.activations import SmoothLeakyReLU
from pyro_snf.transforms.actnorm import ActNorm
from pyro_snf.transforms.base import InverseTransformModule
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.image_coupling import image_coupling
from pyro_snf.transforms.linear import SelfNormalizingLinear
from pyro_snf.transforms.multiscale import MultiScale
from pyro_snf.transforms.squeeze import Squeeze2d
from tests.registry import COPIES, randomize

# Float64: rounding, and three digits to spare.
EXACT = 1e-9
SINGLE = 1e-4
BATCH_SHAPES = [(), (2,), (2, 1), (2, 1, 3)]
SHAPE = (2, 4, 4)


def glow(seed: int = 0, squeeze: int = 1) -> MultiScale:
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
    """Value and log-det of one image, spelled out."""
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


@pytest.mark.parametrize("direction", ["T", "T.inv"])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_log_det_is_that_of_the_jacobian(num_levels: int, direction: str) -> None:
    levels = [Compose([Squeeze2d(), image_coupling(4, hidden_channels=4)])]
    levels += [image_coupling(2, hidden_channels=4), SmoothLeakyReLU()][: num_levels - 1]
    flow = MultiScale(levels, (1, 4, 4)).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    part = flow if direction == "T" else flow.inv
    x = torch.randn(1, 4, 4) if direction == "T" else torch.randn(16)
    jacobian = torch.autograd.functional.jacobian(part, x).reshape(16, 16)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(part.log_abs_det_jacobian(x, part(x)), expected, rtol=EXACT)


def test_second_half_of_the_channels_is_done() -> None:
    x = torch.arange(32.0).view(SHAPE)
    flow = MultiScale([Squeeze2d(), Squeeze2d(1)], SHAPE)
    y = flow(x)
    assert flow.latent_shapes == [(4, 2, 2), (4, 2, 2)]
    squeezed = Squeeze2d()(x)
    assert torch.equal(y, torch.cat([squeezed[4:].flatten(), squeezed[:4].flatten()]))
    assert (flow.log_abs_det_jacobian(x, y) == 0).all()


def test_rows_do_not_depend_on_each_other() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    y = flow(x)
    for row, latent in zip(x, y, strict=True):
        assert torch.allclose(flow(row), latent, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    flow = glow()
    x = torch.randn(5, *SHAPE)
    expected = flow(x)
    y = flow.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    tolerance = SINGLE if dtype == torch.float32 else 0.2
    assert torch.allclose(y.double(), expected, atol=tolerance)
    assert flow.log_abs_det_jacobian(x.to(dtype), y).dtype == torch.float32
    assert torch.allclose(flow.inv(y.clone()).double(), x, atol=tolerance)


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


def test_shapes_and_constraints() -> None:
    flow = glow()
    assert (flow.domain.event_dim, flow.codomain.event_dim) == (3, 1)
    assert (flow.inv.domain.event_dim, flow.inv.codomain.event_dim) == (1, 3)
    assert flow.forward_shape(torch.Size([7, *SHAPE])) == (7, 32)
    assert flow.inverse_shape(torch.Size([7, 2, 32])) == (7, 2, *SHAPE)
    assert flow.inv.forward_shape(torch.Size([32])) == SHAPE
    assert flow.bijective is flow.inv.bijective is True


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
    # The other way round: the base has images.
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


def test_same_object_comes_back() -> None:
    flow, x, y = glow(), torch.randn(3, *SHAPE), torch.randn(3, 32)
    image = flow(x)
    assert flow(x) is image
    assert flow.inv(image) is x
    latent = flow.inv(y)
    assert flow(latent) is y
    assert flow.inv(y) is latent
    flow.clear_cache()
    assert flow.inv(y) is not latent
    flow.inv.clear_cache()
    assert flow(x) is not image


def test_inexact_levels_are_not_remembered() -> None:
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


def test_remembered_values_die_with_what_they_depend_on() -> None:
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


def test_foreign_levels_remember_nothing_that_is_not_true() -> None:
    parts = [AffineTransform(1.0, 2.0), ComposeTransform([AffineTransform(0.0, 3.0)])]
    for level in parts:
        flow, x = MultiScale([level, Squeeze2d()], SHAPE), torch.ones(3, *SHAPE)
        y = flow(x)
        x.zero_()
        assert not torch.equal(flow(x), y)
        x.requires_grad_()
        assert flow(x).requires_grad


def test_gradient_accumulation_on_the_same_tensor() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    density.log_prob(x).sum().backward()
    once = [parameter.grad.clone() for parameter in flow.parameters()]
    density.log_prob(x).sum().backward()
    for parameter, gradient in zip(flow.parameters(), once, strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=EXACT, atol=EXACT)
        assert (gradient != 0).any()


def test_with_cache() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    assert flow.with_cache(1) is flow
    assert flow.inv.with_cache(1) is flow.inv
    twin = flow.with_cache(0)
    assert twin is not flow
    assert twin._cache_size == twin.inv._cache_size == 0
    assert twin.with_cache(0) is twin
    assert twin.inv.inv is twin
    assert twin.inv is not flow.inv
    y = twin(x)
    assert twin(x) is not y
    assert torch.equal(y, flow(x))
    assert flow(x) is flow(x)
    assert twin.twin()(x) is not twin(x)
    again = twin.with_cache(1)
    assert again(x) is again(x)
    with pytest.raises(ValueError, match="expected cache_size 0 or 1; got 2"):
        flow.with_cache(2)


# --- State --------------------------------------------------------------------------------------


def train(flow: MultiScale, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    for _ in range(steps):
        optimizer.zero_grad()
        (-density.log_prob(x).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("make_copy", COPIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("is_trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("through", ["T", "T.inv"])
def test_copies(
    make_copy: Callable[[nn.Module], nn.Module], is_trained: bool, through: str
) -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    if is_trained:
        train(flow, x)
    y = flow(x)  # the cache holds a graph
    twin = make_copy(flow) if through == "T" else make_copy(flow.inv).inv
    assert torch.equal(twin(x), y)
    assert twin.inv.inv is twin
    assert twin.inv is not flow.inv
    train(twin, x)
    assert torch.equal(flow(x.clone()), y)
    assert not torch.equal(twin(x), y)


def test_state_dict() -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    train(flow, x)
    other = glow(seed=1)
    other(x)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    assert all(name.startswith("levels.") for name in flow.state_dict())
    assert list(flow.inv.state_dict()) == [f"transform.{name}" for name in flow.state_dict()]


def test_parameter_store(tmp_path: Path) -> None:
    flow, x = glow(), torch.randn(3, *SHAPE)
    train(flow, x)
    pyro.module("flow", flow.inv)
    names = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert names == {id(parameter) for parameter in flow.parameters()}
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = glow(seed=1)
    pyro.module("flow", fresh.inv, update_module_params=True)
    assert torch.equal(fresh(x), flow(x))


def test_first_batch_starts_every_level() -> None:
    flow = MultiScale([Compose([Squeeze2d(), ActNorm(8)]), ActNorm(4)], SHAPE)
    x = 3 + 2 * torch.randn(50, *SHAPE)
    dist.TransformedDistribution(standard_normal(), [flow.inv]).log_prob(x)
    y = flow(x)
    assert torch.allclose(y.mean(), torch.tensor(0.0), atol=EXACT)
    assert torch.allclose(y.square().mean(), torch.tensor(1.0), atol=EXACT)


def test_modes_and_inverse() -> None:
    flow = glow()
    assert isinstance(flow.inv, InverseTransformModule)
    assert flow.inv is flow.inv
    flow.inv.eval()
    assert not any(module.training for module in flow.modules())
    assert repr(flow) == "MultiScale((2, 4, 4), 3 levels)"
    assert repr(flow) in repr(flow.inv)


# --- Mistakes -----------------------------------------------------------------------------------


def test_odd_number_of_channels() -> None:
    message = r"expected an even number of channels.*; got images \(3, 4, 4\) from level 0"
    with pytest.raises(ValueError, match=message):
        MultiScale([ActNorm(3), ActNorm(3)], (3, 4, 4))
    message = r"expected an even number of channels.*; got images \(3, 4, 4\) from level 1"
    with pytest.raises(ValueError, match=message):
        MultiScale([ActNorm(6), ActNorm(3), ActNorm(3)], (6, 4, 4))
    MultiScale([ActNorm(6), ActNorm(3)], (6, 4, 4))  # the last level may have as many as it likes


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
