"""Squeeze2d: a permutation of entries, and its shapes."""

from __future__ import annotations

import re

import pyro.distributions as dist
import pytest
import torch

from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.squeeze import Squeeze2d, squeeze2d

BATCH_SHAPES = [(), (5,), (2, 1), (2, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_formula(batch_shape: tuple[int, ...], factor: int, dtype: torch.dtype) -> None:
    layer = squeeze2d(factor)
    channels, height, width = 2, 2, 3
    x = torch.randn(*batch_shape, channels, factor * height, factor * width).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (*batch_shape, channels * factor**2, height, width)
    for c in range(channels):
        for i in range(factor):
            for j in range(factor):
                expected = x[..., c, i::factor, j::factor]
                assert torch.equal(y[..., c * factor**2 + i * factor + j, :, :], expected)
    assert torch.equal(layer.inv(y.clone()), x)
    assert (layer.log_abs_det_jacobian(x, y) == 0).all()
    # The memory format does not matter.
    for part, first, second in [(layer, x, y), (layer.inv, y, x)]:
        rows, expected = (one.reshape(-1, *one.shape[-3:]) for one in (first, second))
        last = rows.contiguous(memory_format=torch.channels_last)
        assert torch.equal(part(last), expected)


def test_what_is_not_finite_only_moves() -> None:
    x = torch.tensor([[[torch.nan, 1.0], [torch.inf, 2.0]]])
    assert torch.equal(Squeeze2d()(x).flatten().nan_to_num(7, 8), x.flatten().nan_to_num(7, 8))


def test_density() -> None:
    base = dist.Normal(torch.zeros(8, 2, 3), 1.0).to_event(3)
    flow = dist.TransformedDistribution(base, [Squeeze2d().inv])
    assert flow.event_shape == (2, 4, 6)
    x = flow.sample((5,))
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum((-3, -2, -1))
    assert torch.allclose(flow.log_prob(x.clone()), expected)
    forward = dist.TransformedDistribution(dist.Normal(torch.zeros(2, 4, 6), 1.0), [Squeeze2d()])
    assert forward.event_shape == (8, 2, 3)


def test_squeezing_twice() -> None:
    flow = Compose([Squeeze2d(), Squeeze2d(3)])
    assert flow.forward_shape(torch.Size([5, 1, 12, 6])) == (5, 36, 2, 1)
    x = torch.randn(5, 1, 12, 6)
    assert torch.equal(flow.inv(flow(x).clone()), x)


def test_sizes_that_do_not_fit() -> None:
    layer = Squeeze2d()
    for shape in [(1, 3, 4), (5, 1, 4, 3)]:
        message = re.escape(f"Squeeze2d(2): expected H and W divisible by 2; got {shape}")
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(shape))
        with pytest.raises(ValueError, match=message):
            layer.forward_shape(torch.Size(shape))
    message = re.escape("Squeeze2d(2): expected C divisible by 4; got (6, 2, 2)")
    with pytest.raises(ValueError, match=message):
        layer.inv(torch.zeros(6, 2, 2))
    with pytest.raises(ValueError, match=message):
        layer.inverse_shape(torch.Size([6, 2, 2]))
    with pytest.raises(ValueError, match=r"expected a shape \(\.\.\., C, H, W\); got \(4, 4\)"):
        layer.forward_shape(torch.Size([4, 4]))
