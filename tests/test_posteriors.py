"""The posteriors that benchmarks compare guides on are what they say they are."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_snf import AutoSelfNormalizingFlow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SMALL = [
    "Cox process, D = 256",
    "horseshoe regression, D = 62",
    "neural network, D = 242",
    "banana, D = 20",
    "funnel, D = 20",
]


@pytest.fixture
def posteriors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
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
