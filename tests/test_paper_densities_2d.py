"""Densities in the plane: they are those of their samples, and what is said of flows is right."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_snf import SelfNormalizingPair

# An empty picture with its axes takes a few thousand bytes.
MIN_PNG_BYTES = 10_000


@pytest.fixture
def densities_2d(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("densities_2d")


def test_densities_are_those_of_their_samples(densities_2d: ModuleType) -> None:
    line = (torch.arange(128) + 0.5) / 16 - 4
    points = torch.cartesian_prod(line, line)
    for name, make in densities_2d.DENSITIES.items():
        _check_samples(name, make(), points)


def _check_samples(name: str, density: Any, points: Tensor) -> None:
    samples, again = (density.sample(4000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(samples, again)
    log_prob = density.log_prob(points)
    masses = log_prob.exp() / 16**2
    # Where p jumps, a sum over cells is off by a share of those at the jump.
    assert masses.sum() == pytest.approx(1, abs=2e-2 if name == "checkerboard" else 2e-3), name

    # Means, of coordinates and of log p, are those of the samples, within 5 standard errors.
    def check(values: Tensor, expected: Tensor) -> None:
        error = values.std() / math.sqrt(len(values))
        assert (values.mean() - expected).abs() < 5 * error + 1e-2, name  # the latter of the sum

    is_inside = log_prob > -math.inf
    check(density.log_prob(samples), (masses * log_prob)[is_inside].sum() / masses.sum())
    for axis in range(2):
        for power in (1, 2):
            expected = (masses * points[:, axis] ** power).sum() / masses.sum()
            check(samples[:, axis] ** power, expected)
        assert abs(samples[:, axis].mean()) < 0.05, name
        assert 0.7 < samples[:, axis].std() < 1.4, name


def test_folds_are_found(densities_2d: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = torch.nn.Module()  # x₁³ − 3 x₁, which takes the values from −2 to 2 three times each
    fold.forward = lambda x: torch.stack([x[:, 0] ** 3 - 3 * x[:, 0], x[:, 1]], 1)
    pair = SelfNormalizingPair(fold, torch.nn.Linear(2, 2), event_shape=2).eval()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = densities_2d.Flow(dist.TransformedDistribution(base, [pair.inv]), pair)
    monkeypatch.setattr(densities_2d, "NUM_CELLS", 1000)
    once_more = 2 * (2 * dist.Normal(0.0, 1.0).cdf(torch.tensor(2.0)).item() - 1)
    assert densities_2d.integral(flow) == pytest.approx(1 + once_more, rel=1e-3)
    assert densities_2d.recovered_share(flow, torch.randn(100, 2)) < 0.9


def _run(module: ModuleType, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    options = {"num_layers": 2, "num_bins": 4, **settings}
    return module.run(module.Densities2dSettings(**options), folder)


def test_flows_are_normalized_and_approach_the_density(
    densities_2d: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    for name, value in {"NUM_TEST": 500, "NUM_INVERTED": 50, "NUM_CELLS": 80}.items():
        monkeypatch.setattr(densities_2d, name, value)
    rows = _run(densities_2d, tmp_path, num_steps=30, batch_size=100, densities=["trimodal"])
    assert [row["flow"] for row in rows] == list(densities_2d.FLOWS)
    density = densities_2d.DENSITIES["trimodal"]()
    test = density.sample(500, torch.Generator().manual_seed(densities_2d.TEST_SEED))
    start = -dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(test).mean().item()
    truth = -density.log_prob(test).mean().item()
    for row in rows:
        assert row["above_truth"] == pytest.approx(row["nll"] - truth, abs=1e-5)
        assert row["above_truth"] > -3 * row["standard_error"]
        if row["flow"] != "spline coupling":  # rough at first, and the grid is coarse
            assert row["nll"] < start - 0.1
            assert row["integral"] == pytest.approx(1, abs=0.02)
        assert row["recovered"] == 1
        assert row["ms"] > 0
    # The tracked inverse follows the exact gradient.
    assert rows[1]["nll"] == pytest.approx(rows[0]["nll"], abs=1e-2)
    content = (tmp_path / "densities.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > MIN_PNG_BYTES


@pytest.mark.parametrize(
    ("log_det", "expected"), [("learned", ["learned", "pair"]), ("pair", ["pair"])]
)
def test_one_log_det_beside_the_other_flows(
    log_det: str,
    expected: list[str],
    densities_2d: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    torch.set_default_dtype(torch.float32)
    for name, value in {
        "FLOWS": ("exact", "learned", "pair"),
        "NUM_TEST": 9,
        "NUM_CELLS": 4,
    }.items():
        monkeypatch.setattr(densities_2d, name, value)
    rows = _run(densities_2d, tmp_path, num_steps=1, log_det=log_det, densities=["sine"])
    assert [row["flow"] for row in rows] == expected


def test_other_densities_are_named(densities_2d: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected densities among eight-.*; got 'disks'"):
        _run(densities_2d, tmp_path, densities=["moons", "disks"])
