"""From integers to logits and back: ranges, rounding, log-dets, and that probabilities add up."""

from __future__ import annotations

import math
import re

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions.transforms import AffineTransform, ComposeTransform, SigmoidTransform

from pyro_snf.images import (
    LogitTransform,
    bits_per_dim,
    dequantize,
    logit_transform,
    quantize,
)
from pyro_snf.transforms.activations import SmoothLeakyReLU
from pyro_snf.transforms.compose import Compose
from tests.registry import by_pickle, is_close

# Float64: rounding, and three digits to spare.
EXACT = 1e-9
# Float32 against float64, of values up to 20: its rounding.
SINGLE = 4e-6

LEVELS = [2, 17, 256, 1000]


def grid(num_levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pixels from 0 to L, close to either end too; each a number of the type."""
    inside = torch.linspace(0, num_levels, 1001, dtype=torch.float64)
    near = torch.logspace(-9, 0, 100, dtype=torch.float64)
    return torch.cat([inside, near, num_levels - near]).to(dtype)


def by_torch(num_levels: int, alpha: float = 1e-6) -> ComposeTransform:
    """The same map by torch's transforms, which are accurate in float64."""
    scale = (1 - 2 * alpha) / num_levels
    return ComposeTransform(
        [AffineTransform(alpha * (1 - 2 * alpha), scale), SigmoidTransform().inv]
    )


# --- The logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
@pytest.mark.parametrize("num_levels", LEVELS)
def test_value_and_log_det(num_levels: int, alpha: float) -> None:
    transform, x = logit_transform(num_levels, 0, alpha), grid(num_levels)
    expected = by_torch(num_levels, alpha)
    y = transform(x)
    assert is_close(y, expected(x), EXACT)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert is_close(log_det, expected.log_abs_det_jacobian(x, y), EXACT)
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(transform(x).sum(), x)
    assert is_close(log_det, slope.log(), EXACT)
    if alpha == 1e-6:  # float32 is accurate at any pixel
        x = grid(num_levels, torch.float32)
        exact = (transform(x.double()), transform.log_abs_det_jacobian(x.double(), y))
        for found, expected in zip(
            (transform(x), transform.log_abs_det_jacobian(x, y)), exact, strict=True
        ):
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), expected, rtol=0, atol=SINGLE)


def test_transforms_of_torch_are_less_accurate() -> None:
    # The figures of the comment in LogitTransform.
    torch.manual_seed(0)
    x = dequantize(torch.full((1_000_000,), 255.0, dtype=torch.float32))
    ours, theirs = LogitTransform(event_dim=0), by_torch(256)
    expected = ours.log_abs_det_jacobian(x.double(), x)
    error = theirs.log_abs_det_jacobian(x, theirs(x)).double() - expected
    assert 3e-3 < error.abs().max() < 3e-2
    assert 1e-5 < error.mean().abs() < 1e-4
    error = ours.log_abs_det_jacobian(x, x).double() - expected
    assert error.abs().max() < SINGLE
    assert error.mean().abs() < 1e-6


@pytest.mark.parametrize("event_dim", [0, 1, 2, 3])
def test_log_det_is_summed_over_the_event(event_dim: int) -> None:
    transform, x = logit_transform(event_dim=event_dim), 255 * torch.rand(2, 1, 3, 4, 4)
    log_det = transform.log_abs_det_jacobian(x, transform(x))
    elementwise = LogitTransform(event_dim=0).log_abs_det_jacobian(x, x)
    assert log_det.shape == x.shape[: 5 - event_dim]
    dims = tuple(range(5 - event_dim, 5))
    expected = elementwise.sum(dims) if dims else elementwise
    assert torch.allclose(log_det, expected, rtol=EXACT)
    for constraint in (transform.domain, transform.codomain, transform.inv.domain):
        assert constraint.event_dim == event_dim


@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 1), (2, 1, 3)])
def test_log_det_of_images(batch_shape: tuple[int, ...]) -> None:
    transform, x = logit_transform(), 255 * torch.rand(*batch_shape, 1, 2, 3)
    y = transform(x)
    assert transform.log_abs_det_jacobian(x, y).shape == batch_shape
    assert transform.inv.log_abs_det_jacobian(y, x).shape == batch_shape
    assert transform.inv(y) is x
    if not batch_shape:
        for part, first in [(transform, x), (transform.inv, y)]:
            jacobian = torch.autograd.functional.jacobian(part, first).reshape(6, 6)
            expected = torch.linalg.slogdet(jacobian).logabsdet
            log_det = part.log_abs_det_jacobian(first, part(first))
            assert torch.allclose(log_det, expected, rtol=EXACT)


@pytest.mark.parametrize("num_levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trips(num_levels: int, dtype: torch.dtype) -> None:
    transform, x = LogitTransform(num_levels, 0), grid(num_levels, dtype)
    eps = torch.finfo(dtype).eps
    # The logit is rounded to eps |y|, x moves by x' = L p q times that, and is rounded itself.
    assert torch.allclose(
        transform.inv(transform(x).clone()), x, rtol=8 * eps, atol=num_levels * eps
    )
    # Any logit is that of a pixel: up to the rounding of pixels, it is this logit.
    y = torch.tensor([-1e4, -100.0, -30.0, -14.0, 0.0, 14.0, 30.0, 100.0, 1e4], dtype=dtype)
    x = transform.inv(y)
    assert transform.domain.check(x).all()
    assert (x.diff() >= 0).all()
    again = transform(x.clone())
    assert torch.isfinite(again).all()
    assert torch.isfinite(transform.log_abs_det_jacobian(x.clone(), again)).all()
    assert torch.allclose(again[4], y[4], atol=1e-5)
    if dtype == torch.float64:
        assert torch.allclose(again[3:6], y[3:6], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("value", [-1.0, 257.0, math.nan])
def test_pixels_out_of_range_are_nan_or_an_error(value: float) -> None:
    transform, x = LogitTransform(), torch.full((1, 2, 2), 3.0)
    x[0, 0, 0] = value
    assert transform(x).isnan().sum() == 1
    assert transform.log_abs_det_jacobian(x, x).isnan()
    base = dist.Normal(torch.zeros(1, 2, 2), 1.0).to_event(3)
    density = dist.TransformedDistribution(base, [transform.inv])
    with pytest.raises(ValueError, match="to be within the support"):
        density.log_prob(x)


def test_white_and_black_and_half_precision() -> None:
    transform, x = LogitTransform(event_dim=1), torch.tensor([0.0, 256.0])
    y = transform(x)
    assert torch.allclose(y, torch.tensor([-1.0, 1.0]) * math.log((1 + 2e-6) / 1e-6), atol=1e-5)
    assert torch.isfinite(transform.log_abs_det_jacobian(x, y))
    # bfloat16 is taken as float32.
    x = torch.tensor([0.0, 17.0, 200.0])
    assert torch.equal(transform(x.bfloat16()), transform(x.float()))
    assert transform.inv(torch.zeros(3, dtype=torch.float16)).dtype == torch.float32


def test_in_a_stack_and_copied() -> None:
    flow = Compose([logit_transform(), SmoothLeakyReLU()])
    x = 255 * torch.rand(2, 1, 4, 4)
    y = flow(x)
    assert flow(x) is y
    assert flow.log_abs_det_jacobian(x, y).shape == (2,)
    other = by_pickle(flow)
    assert torch.equal(other(x), y)
    assert other.domain.event_dim == 3
    transform = LogitTransform(np.int64(17), np.int32(1), np.float64(0.25))
    assert repr(transform) == "LogitTransform(num_levels=17, event_dim=1, alpha=0.25)"


# --- Dequantization -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", LEVELS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64], ids=str
)
def test_dequantized_pixels_are_within_their_level(num_levels: int, dtype: torch.dtype) -> None:
    if dtype == torch.uint8 and num_levels > 256:
        pytest.skip("they do not fit")
    pixels = torch.arange(num_levels).repeat(200, 1).to(dtype)
    x = dequantize(pixels, num_levels=num_levels)
    assert x.shape == pixels.shape
    assert x.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert (x >= pixels).all()
    assert (x.double() < pixels.double() + 1).all()
    assert torch.equal(quantize(x, num_levels=num_levels).long(), pixels.long())
    assert (x - pixels).mean() == pytest.approx(0.5, abs=0.05)
    assert (x - pixels).var() == pytest.approx(1 / 12, abs=0.01)


def test_noise_is_not_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # 255 + (1 − 2⁻²⁴) is 256 in float32.
    def largest(shape: torch.Size, *, dtype: torch.dtype, **_: object) -> Tensor:
        return torch.full(shape, 1 - torch.finfo(dtype).eps / 2, dtype=dtype)

    monkeypatch.setattr(torch, "rand", largest)
    for dtype in (torch.float32, torch.float64):
        pixels = torch.arange(256, dtype=dtype)
        x = dequantize(pixels)
        assert (x < pixels + 1).all()
        assert torch.equal(x.floor(), pixels)
        assert torch.isfinite(LogitTransform(event_dim=1)(x)).all()


def test_noise_of_a_generator() -> None:
    pixels = torch.zeros(5, dtype=torch.uint8)
    state = torch.get_rng_state()
    first = dequantize(pixels, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, expected)
    torch.manual_seed(3)
    assert torch.equal(dequantize(pixels), expected)
    x = dequantize(torch.tensor([254.0, 255.0], dtype=torch.float16))
    assert x.dtype == torch.float64
    assert torch.equal(x.floor(), torch.tensor([254.0, 255.0]))


@pytest.mark.parametrize(
    ("pixels", "num_levels", "message"),
    [
        *[
            (torch.tensor([3.0, wrong, 16.0]), 17, f"expected integers from 0 to 16; got {wrong}")
            for wrong in (-1.0, 17.0, 255.0, 0.5, math.nan, math.inf)
        ],
        (torch.tensor([3, 17], dtype=torch.uint8), 17, "expected integers from 0 to 16; got 17"),
        (torch.tensor([-1]), 256, "expected integers from 0 to 255; got -1"),
        (torch.tensor([True]), 256, r"expected a tensor of integers; got torch\.bool"),
        (torch.tensor([1j]), 256, r"expected a tensor of integers; got torch\.complex64"),
        ([1], 256, "expected a tensor of integers; got list"),
    ],
)
def test_pixels_are_checked(pixels: Tensor, num_levels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(pixels, num_levels=num_levels)


def test_quantize() -> None:
    x = torch.tensor([-0.1, 0.0, 0.999, 16.5, 17.0, 255.9, 256.0, 1e9, -math.inf, math.inf])
    assert quantize(x).tolist() == [0, 0, 0, 16, 17, 255, 255, 255, 0, 255]
    assert quantize(x, num_levels=17).tolist() == [0, 0, 0, 16, 16, 16, 16, 16, 0, 16]
    assert quantize(x).dtype == torch.uint8
    assert quantize(x, num_levels=257).dtype == torch.int64
    assert quantize(x, num_levels=1000)[-1] == 999
    with pytest.raises(ValueError, match="expected pixels; got NaN"):
        quantize(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"floating-point tensor; got torch\.int64"):
        quantize(torch.tensor([1]))


# --- Likelihoods --------------------------------------------------------------------------------


def density(num_levels: int = 256) -> dist.TransformedDistribution:
    base = dist.Normal(torch.full((1, 1, 1), -0.5), 1.5).to_event(3)
    return dist.TransformedDistribution(base, [logit_transform(num_levels).inv])


@pytest.mark.parametrize("num_levels", [17, 256])
def test_probabilities_of_all_pixels_add_up_to_one(num_levels: int) -> None:
    # The density of pixels from 0 to L, integrated over every level by the midpoint rule.
    nodes = (torch.arange(2000) + 0.5) / 2000
    pixels = torch.arange(num_levels).unsqueeze(-1) + nodes
    log_prob = density(num_levels).log_prob(pixels.reshape(-1, 1, 1, 1))
    probabilities = log_prob.exp().view(num_levels, -1).mean(-1)
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    # Each of them is that of the normal distribution.
    edges = logit_transform(num_levels)(torch.arange(num_levels + 1.0).view(-1, 1, 1, 1)).flatten()
    expected = dist.Normal(-0.5, 1.5).cdf(edges).diff()
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_likelihood_is_a_lower_bound() -> None:
    torch.manual_seed(0)
    flow, pixels = density(), torch.tensor([0, 3, 128, 255])
    noisy = dequantize(pixels.expand(20_000, 4)).view(-1, 1, 1, 1)
    average = flow.log_prob(noisy).view(-1, 4).mean(0)
    nodes = (torch.arange(20_000) + 0.5) / 20_000
    inside = flow.log_prob((pixels + nodes.unsqueeze(-1)).view(-1, 1, 1, 1)).view(-1, 4)
    assert torch.allclose(average, inside.mean(0), atol=0.05)  # the bound, with its noise
    discrete = torch.logsumexp(inside, 0) - math.log(len(nodes))
    assert (inside.mean(0) < discrete).all()


def test_samples_are_images() -> None:
    torch.manual_seed(0)
    flow = density()
    x = flow.sample((1000,))
    integers = quantize(x)
    assert integers.shape == (1000, 1, 1, 1)
    assert torch.isfinite(flow.log_prob(x.clone())).all()
    assert flow.log_prob(dequantize(integers)).shape == (1000,)


def test_bits_per_dim() -> None:
    log_prob = torch.tensor([-3 * 4 * 4 * 8 * math.log(2), 0.0])
    assert torch.allclose(bits_per_dim(log_prob, (3, 4, 4)), torch.tensor([8.0, 0.0]))
    assert bits_per_dim(log_prob, torch.Size([2])).shape == (2,)
    # Uniform noise over 256 levels.
    assert bits_per_dim(torch.tensor(-math.log(256)), (1,)).item() == pytest.approx(8)
    for size in (0, -1, 2.0, "2", None, True):
        message = re.escape(f"expected sizes of event_shape, an integer >= 1; got {size!r}")
        with pytest.raises(ValueError, match=message):
            bits_per_dim(log_prob, (3, size))
