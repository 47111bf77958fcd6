"""MultiScale; the options and inputs of what flows of images are made of."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import AffineTransform, ComposeTransform, ReshapeTransform

from pyro_snf import (
    ActNorm,
    Compose,
    ImageCoupling,
    LowRankAutoregressive,
    MultiScale,
    RationalQuadraticSpline,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    Squeeze2d,
    actnorm,
    image_coupling,
    smooth_leaky_relu,
    squeeze2d,
)
from pyro_snf.images import LogitTransform, dequantize, logit_transform, quantize
from pyro_snf.path_gradient import PathGradientDistribution
from pyro_snf.transforms.image_coupling import CouplingNet
from tests.registry import CASES, batch, is_close, randomize

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
        assert is_close(latent, expected[0], EXACT)
        assert is_close(value, expected[1], EXACT)
    assert is_close(flow.inv(y.clone()), x, EXACT)
    last = x.view(-1, *SHAPE).contiguous(memory_format=torch.channels_last)
    assert is_close(flow(last), y.view(-1, 32), EXACT)


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


@pytest.mark.parametrize("name", ["multi-scale", "image coupling", "autoregressive"])
def test_nan_stays_in_its_row(name: str) -> None:
    transform, x = CASES[name].make(), batch(CASES[name], (2,))
    x.view(-1)[0] = math.nan
    y = transform(x)
    assert y.flatten(1).isnan().any(-1).tolist() == [True, False]
    assert transform.log_abs_det_jacobian(x, y).isnan().tolist() == [True, False]


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
    assert is_close(flow.inv(y.clone()), x, EXACT)
    density = dist.TransformedDistribution(standard_normal(), [flow.inv])
    assert density.event_shape == SHAPE
    assert torch.allclose(density.log_prob(x), standard_normal().log_prob(y) + log_det, rtol=EXACT)


def test_multi_scale_inside_a_multi_scale() -> None:
    inner = Compose([glow(), ReshapeTransform((32,), SHAPE)])
    flow = MultiScale([inner, Squeeze2d()], SHAPE)
    x = torch.randn(3, *SHAPE)
    y = flow(x)
    assert is_close(flow.inv(y.clone()), x, EXACT)
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
    assert is_close(*scores, EXACT)


def test_torch_and_pyro_transforms_as_levels() -> None:
    levels = [
        ComposeTransform([AffineTransform(0.5, 2.0, event_dim=3), Squeeze2d()]),
        AffineTransform(torch.tensor(1.0), torch.tensor(-3.0)),
        dist.transforms.GeneralizedChannelPermute(2),
    ]
    flow = MultiScale(levels, SHAPE)
    x = torch.randn(5, *SHAPE)
    y = flow(x)
    assert is_close(flow.inv(y.clone()), x, EXACT)
    expected = 32 * math.log(2) + 16 * math.log(3)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), torch.tensor(expected), atol=1e-6)
    assert len(list(flow.parameters())) == len(list(levels[2].parameters())) > 0


# --- Caches -------------------------------------------------------------------------------------


def test_levels_are_evaluated_once_a_likelihood() -> None:
    flow = MultiScale(
        [Compose([image_coupling(2, hidden_channels=4), Squeeze2d()]), image_coupling(4)], SHAPE
    )
    calls: list[int] = []
    for module in flow.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.register_forward_hook(lambda *_: calls.append(1))
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


RELU, ABS = nn.ReLU(), torch.distributions.AbsTransform()
FLATTEN = ReshapeTransform(SHAPE, (32,))


@pytest.mark.parametrize(
    ("make_levels", "shape", "message"),
    [
        (lambda: [ActNorm(3)] * 2, (3, 4, 4), r"even number .*\(3, 4, 4\) from level 0"),
        (
            lambda: [ActNorm(6)] + [ActNorm(3)] * 2,
            (6, 4, 4),
            r"even number .*\(3, 4, 4\) from level 1",
        ),
        (lambda: [Squeeze2d()] * 2, (1, 6, 10), r"level 1, with images .*by 2; got \(2, 3, 5\)"),
        (list, SHAPE, "expected at least one level; got none"),
        (lambda: [RELU], SHAPE, "expected levels, bijective transforms; got ReLU"),
        (lambda: [ABS], SHAPE, "expected levels, bijective transforms; got AbsTr"),
        (lambda: [FLATTEN], SHAPE, r"images to images; level 0 maps shape .* to \(32,\)"),
        (lambda: [glow()], (2, 4, 6), r"level 0, with images .*expected a shape"),
    ],
)
def test_levels_are_checked(
    make_levels: Callable[[], list[Any]], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScale(make_levels(), shape)
    MultiScale([ActNorm(6), ActNorm(3)], (6, 4, 4))  # the channels of the last are not halved


COUNTS = [0, -1, 2.0, "3", None, True]
POSITIVE = [0.0, -1.0, math.inf, math.nan, "3", None, True]
DTYPE = ("dtype", ", a floating-point torch.dtype or None", [torch.int64])
AUTOREGRESSIVE = partial(LowRankAutoregressive, 3)
AUTOREGRESSIVE_REPR = "LowRankAutoregressive(5, hidden_dim=4, max_log_scale=3.0)"
COUPLING = partial(image_coupling, 4, hidden_channels=2)
SPLINE = partial(RationalQuadraticSpline, 3)
#: What flows of images are made of, an option, what it may be, and values that are not.
OPTIONS: list[tuple[Callable[..., object], str, str, list[Any]]] = [
    *[(make, "num_channels", ", an integer >= 1", COUNTS) for make in (ActNorm, actnorm)],
    (partial(ActNorm, 3), "event_dim", " 1 or 3", [*COUNTS, 2, 4, 1.0]),
    (squeeze2d, "factor", ", an integer >= 1", [*COUNTS, (2, 2)]),
    (image_coupling, "num_channels", ", an integer >= 2", [*COUNTS, 1]),
    (partial(ImageCoupling, network=RELU), "num_channels", ", an integer >= 2", [*COUNTS, 1]),
    (partial(ImageCoupling, 4), "network", ", a module", [None]),
    (COUPLING, "hidden_channels", ", an integer >= 1", COUNTS),
    (partial(CouplingNet, out_channels=1), "in_channels", ", an integer >= 1", COUNTS),
    (partial(CouplingNet, 1), "out_channels", ", an integer >= 1", COUNTS),
    (LowRankAutoregressive, "input_dim", ", an integer >= 1", COUNTS),
    (AUTOREGRESSIVE, "hidden_dim", ", an integer >= 1", COUNTS),
    (COUPLING, "max_scale", " > 1", [*POSITIVE, 1.0]),
    (AUTOREGRESSIVE, "max_log_scale", " > 0", POSITIVE),
    (
        RationalQuadraticSpline,
        "event_shape",
        ", integers >= 1",
        [0, -1, (), (2, 0), (2.0,), "23", None, (True,)],
    ),
    (SPLINE, "num_bins", ", an integer from 2 to 1000", [1, 1001, 2.0, "3", True]),
    (SPLINE, "bound", " > 0", POSITIVE),
    (smooth_leaky_relu, "alpha", " in (0, 1)", [0, 1, "0.3", None, True]),
    (SmoothLeakyReLU, "learnable", " to be True or False", ["yes"]),
    *[(make, *DTYPE) for make in (partial(ActNorm, 3), COUPLING, AUTOREGRESSIVE)],
    *[(make, *DTYPE) for make in (SPLINE, SmoothLeakyReLU)],
    *[
        (make, "num_levels", ", an integer >= 2", [1, 0, -1, 256.0, "256", None, True])
        for make in (logit_transform, *(partial(f, torch.zeros(1)) for f in (dequantize, quantize)))
    ],
    (logit_transform, "event_dim", ", an integer >= 0", [-1, 3.0, "3", None, True]),
    (logit_transform, "alpha", " in (0, 0.5)", [0.0, 0.5, -1e-6, math.nan, 1, "0.1", None, False]),
    (
        partial(MultiScale, [Squeeze2d()]),
        "event_shape",
        " (C, H, W), integers >= 1",
        [(), (4,), (4, 4), (1, 2, 4, 4), 4, "244", *[(2, size, 4) for size in COUNTS if size != 2]],
    ),
]


@pytest.mark.parametrize(("make", "option", "expected", "values"), OPTIONS)
def test_options_are_checked(
    make: Callable[..., object], option: str, expected: str, values: list[object]
) -> None:
    for value in values:
        message = f"expected {option}{expected}; got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**{option: value})


def test_numpy_numbers_are_numbers() -> None:
    for transform, expected in [
        (ActNorm(np.int64(3), event_dim=np.int32(1)), "ActNorm(3, event_dim=1)"),
        (squeeze2d(np.int64(3)), "Squeeze2d(3)"),
        (
            COUPLING(max_scale=np.float32(3), dtype=torch.float32),
            "ImageCoupling(4, max_scale=3.0",
        ),
        (
            LowRankAutoregressive(np.int64(5), np.int32(4), max_log_scale=np.float32(3)),
            AUTOREGRESSIVE_REPR,
        ),
    ]:
        assert repr(transform).startswith(expected)


#: Transforms, the shape of an event, shapes that are refused, and the error.
INPUTS: dict[str, tuple[Callable[[], Transform], tuple[int, ...], list[tuple[int, ...]], str]] = {
    "actnorm": (
        partial(ActNorm, 3),
        (3, 2, 2),
        [(), (3,), (3, 4), (4, 3, 4), (2, 1, 4, 4), (0, 3, 4, 4)],
        r"ActNorm\(3, event_dim=3\): expected .*shape \(\.\.\., 3, .*; got ",
    ),
    "coupling": (
        partial(image_coupling, 3, hidden_channels=2),
        (3, 4, 4),
        [(3,), (3, 4), (4, 3, 3), (0, 3, 4, 4)],
        r"ImageCoupling\(3, .*expected .*shape \(\.\.\., 3, .*got ",
    ),
    "squeeze": (Squeeze2d, (4, 4, 4), [(4, 4)], r"shape \(\.\.\., C, H, W\); got "),
    "empty squeeze": (Squeeze2d, (4, 4, 4), [(0, 4, 4, 4)], "a non-empty tensor of .*got "),
    "autoregressive": (
        partial(LowRankAutoregressive, 5, 4),
        (5,),
        [(2, 4), (), (0, 5)],
        r"expected a non-empty .*shape \(\.\.\., 5\); got ",
    ),
    "spline": (SPLINE, (3,), [(4,)], r"expected .* of shape \(\.\.\., 3\); got "),
    "logit": (LogitTransform, (1, 4, 4), [(4, 4)], "expected at least 3 dimensions; got "),
    "empty logit": (LogitTransform, (1, 4, 4), [(0, 1, 4, 4)], "expected a non-empty tensor.*got "),
    "multi-scale": (
        glow,
        SHAPE,
        [(32,), (2, 4), (2, 4, 5), (4, 4, 2), (0, 2, 4, 4)],
        r"MultiScale\(.*expected .*shape \(\.\.\., 2, 4, 4\); got ",
    ),
    "inverse of multi-scale": (
        lambda: glow().inv,
        (32,),
        [(), (31,), (32, 1), SHAPE],
        r"MultiScale\(.*expected .*shape \(\.\.\., 32\); got ",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_checked(name: str) -> None:
    make, event_shape, wrong_shapes, message = INPUTS[name]
    transform = make()
    refused = [(torch.zeros(shape), message + re.escape(str(shape))) for shape in wrong_shapes]
    for dtype in (torch.uint8, torch.int64):
        refused.append((torch.zeros(event_shape, dtype=dtype), rf"floating-point .*; got {dtype}"))
    refused.append(([1.0], "floating-point tensor; got list"))
    if isinstance(transform, nn.Module) and list(transform.parameters()):
        other = torch.zeros(event_shape, dtype=torch.float32)
        refused.append((other, r"expected dtype torch\.float64; got torch\.float32"))
    uses = [transform, lambda x: transform.log_abs_det_jacobian(x, torch.zeros(32))]
    if name == "inverse of multi-scale":
        uses.pop()
    elif name != "multi-scale":  # T and T.inv take the same shapes
        uses.extend([transform.inv, getattr(transform, "initialize", transform)])
    for use, (x, error) in itertools.product(uses, refused):
        with pytest.raises(ValueError, match=error):
            use(x)


def test_shapes_of_multi_scale_are_checked() -> None:
    flow = glow()
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., 2, 4, 4\); got \(32,\)"):
        flow.forward_shape(torch.Size([32]))
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., 32\); got \(2, 4, 4\)"):
        flow.inverse_shape(torch.Size(SHAPE))
