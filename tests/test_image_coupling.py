"""ImageCoupling and its network: formula, log-det, inverse, gradients."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from pyro_snf.transforms.image_coupling import CouplingNet, ImageCoupling, image_coupling

# Float64: rounding, and three digits to spare.
EXACT = 1e-9
BATCH_SHAPES = [(), (2,), (2, 1), (2, 1, 3)]


def coupling(num_channels: int = 3, seed: int = 0, **options: object) -> ImageCoupling:
    """With a network of random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = image_coupling(num_channels, hidden_channels=8, **options)
        for parameter in layer.network[-1].parameters():
            nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("num_channels", [2, 3, 4, 5])
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_formula_and_round_trip(batch_shape: tuple[int, ...], num_channels: int) -> None:
    layer = coupling(num_channels)
    x = torch.randn(*batch_shape, num_channels, 3, 5)
    y = layer(x)
    seen = num_channels // 2
    flat, image = x.reshape(-1, num_channels, 3, 5), y.reshape(-1, num_channels, 3, 5)
    total = []
    for row, result in zip(flat, image, strict=True):
        shift, log_scale = layer.network(row[None, :seen])[0].chunk(2)
        log_scale = math.log(2) * torch.tanh(log_scale / math.log(2))
        assert torch.equal(result[:seen], row[:seen])
        expected = log_scale.exp() * row[seen:] + shift
        assert torch.allclose(result[seen:], expected, rtol=EXACT)
        total.append(log_scale.sum())
    log_det = layer.log_abs_det_jacobian(x, y)
    assert torch.allclose(log_det, torch.stack(total).view(batch_shape), rtol=EXACT)
    assert torch.allclose(layer.inv(y.clone()), x, rtol=EXACT, atol=EXACT)


def test_it_starts_as_the_identity() -> None:
    layer, x = image_coupling(4), torch.randn(2, 4, 3, 3)
    assert torch.equal(layer(x), x)
    assert (layer.log_abs_det_jacobian(x, layer(x)) == 0).all()
    assert layer.network[0].out_channels == 512
    # The identity is not a stationary point.
    layer(x).square().sum().backward()
    assert (layer.network[-1].theta.grad != 0).any()


def test_scale_is_bounded_and_its_gradient_exact() -> None:
    layer = coupling(2, max_scale=1.5)
    with torch.no_grad():
        layer.network[-1].bias.fill_(0.6)
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    log_scale = layer.log_abs_det_jacobian(x, layer(x)) / 4
    assert (log_scale.abs() < math.log(1.5)).all()
    uncached = layer.with_cache(0)
    assert gradcheck(uncached, x)
    assert gradcheck(uncached.inv, x)
    assert gradcheck(lambda x: uncached.log_abs_det_jacobian(x, x), x)


def test_network_runs_once_for_value_and_log_det() -> None:
    calls = []

    class Counting(CouplingNet):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    layer = ImageCoupling(2, Counting(1, 2, hidden_channels=4))
    x = torch.randn(3, 2, 4, 4)
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2, 4, 4), 1.0).to_event(3), layer.inv
    )
    flow.log_prob(x).sum().backward()
    assert calls == [3]


# --- Mistakes -----------------------------------------------------------------------------------


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        image_coupling(4, 8)


@pytest.mark.parametrize("out_channels", [2, 3, 4, 8])
def test_network_of_another_kind(out_channels: int) -> None:
    layer, x = ImageCoupling(3, nn.Conv2d(1, out_channels, 1)), torch.randn(2, 3, 5, 5)
    if out_channels == 4:
        assert torch.allclose(layer.inv(layer(x).clone()), x, rtol=EXACT, atol=EXACT)
    else:
        message = rf"output to have shape \(2, 4, 5, 5\); got \(2, {out_channels}, 5, 5\)"
        with pytest.raises(ValueError, match=message):
            layer(x)
