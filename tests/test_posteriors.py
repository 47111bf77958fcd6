"""The posteriors that benchmarks compare guides on are what they say they are."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_snf import AutoSelfNormalizingFlow

SMALL = [
    "Cox process, D = 256",
    "horseshoe regression, D = 62",
    "neural network, D = 242",
    "banana, D = 20",
    "funnel, D = 20",
]


@pytest.fixture
def posteriors(benchmark_modules: None) -> ModuleType:
    torch.set_default_dtype(torch.float32)  # as the benchmarks have it
    return importlib.import_module("posteriors")


@pytest.mark.parametrize("name", SMALL)
def test_dimension(posteriors: ModuleType, name: str) -> None:
    posterior = posteriors.POSTERIORS[name]()
    guide = AutoDiagonalNormal(posterior.model)
    guide()
    assert guide.latent_dim == posterior.dim


def test_evidence_of_the_conjugate_gaussian(posteriors: ModuleType) -> None:
    # With the posterior itself as the guide, −ELBO is −log p(data) for every sample.
    posterior = posteriors.conjugate_gaussian(dim=6, condition=10.0)
    trace = pyro.poutine.trace(posterior.model).get_trace()
    prior, data = trace.nodes["z"]["fn"], trace.nodes["y"]["value"]
    precision = prior.precision_matrix + torch.eye(6)
    covariance = torch.linalg.inv(precision)
    guide = AutoSelfNormalizingFlow(posterior.model, 1).eval()
    guide()
    layer = guide.transform.parts[-1]
    with torch.no_grad():
        layer.log_scale.zero_()
        layer.theta.copy_((torch.linalg.cholesky(covariance) - torch.eye(6)) * 6**0.5)
        layer.bias.copy_(covariance @ data)
        loss = Trace_ELBO().loss(posterior.model, guide)
    assert loss == pytest.approx(posterior.negative_log_evidence, abs=1e-4)  # float32


def test_evaluate_is_exact_for_a_conjugate_model(posteriors: ModuleType) -> None:
    # With q = p(z | y), every sample of −ELBO is the negative log evidence.
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([1.0, -2.0]))

    guide = AutoDiagonalNormal(model)
    guide()
    guide.loc.data = torch.tensor([0.5, -1.0])
    guide.scale = torch.full((2,), math.sqrt(0.5))
    evidence = dist.Normal(torch.zeros(2), math.sqrt(2)).log_prob(torch.tensor([1.0, -2.0])).sum()
    loss, error = posteriors.evaluate(model, guide, num_samples=10)
    assert loss == pytest.approx(-evidence.item(), abs=1e-5)  # float32
    assert error < 1e-5
    assert guide.training


def test_grid_is_a_draw_from_its_prior(posteriors: ModuleType) -> None:
    grid = posteriors.simulate_grid(30)
    assert grid.counts.shape == grid.intensity.shape == (900,)
    assert torch.equal(grid.counts, grid.counts.round())
    assert torch.equal(grid.counts, posteriors.simulate_grid(30).counts)
    # 900 Poisson counts: their sum is within 5 standard deviations of what is expected of it.
    expected = grid.intensity.sum()
    assert (grid.counts.sum() - expected).abs() < 5 * expected.sqrt()
    # The field, white again, is standard normal: its mean square is 1 within 5 deviations.
    field = grid.intensity.log() - grid.mean
    white = torch.linalg.solve_triangular(grid.scale_tril, field.unsqueeze(-1), upper=False)
    assert abs(white.square().mean() - 1) < 5 * math.sqrt(2 / 900)


def test_matern_kernel(posteriors: ModuleType) -> None:
    from sklearn.gaussian_process.kernels import Matern

    positions = torch.rand(6, 2, dtype=torch.float64)
    scale_tril = posteriors.matern_cholesky(positions, length_scale=0.7)
    expected = torch.as_tensor(Matern(0.7, nu=1.5)(positions)) + 1e-6 * torch.eye(6)
    torch.testing.assert_close(scale_tril @ scale_tril.mT, expected)
