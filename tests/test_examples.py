"""The examples run, and what they compute is what they say."""

from __future__ import annotations

import csv
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

EXAMPLES = [
    "amortized",
    "density_images",
    "density_table",
    "distributed",
    "free_form",
    "svi_guide",
]

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
MODULES = {name: importlib.import_module(name) for name in EXAMPLES}
amortized, density_images, density_table, _, free_form, svi_guide = MODULES.values()
common = importlib.import_module("common")
# Benchmarks have modules of the same names.
sys.path.pop(0)
for _name in (*EXAMPLES, "common"):
    del sys.modules[_name]

# An empty picture with its axes takes a few thousand bytes.
MIN_PNG_BYTES = 10_000

# What is added to the diagonal of the covariance, for its factorization.
JITTER = 1e-6


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run an example by its command line, with less to evaluate; the rows that it prints."""
    monkeypatch.setattr(amortized, "NUM_TEST", 50)
    monkeypatch.setattr(density_images, "COLUMNS", 3)
    monkeypatch.setattr(free_form, "NUM_TEST", 50)
    monkeypatch.setattr(free_form, "NUM_CELLS", 80)

    def call(name: str, num_steps: int) -> list[dict[str, Any]]:
        folder = tmp_path / "new" / "folder"
        options = ["--num-steps", str(num_steps), "--seed", "3", "--output-dir", str(folder)]
        rows = MODULES[name].main(options)
        assert {path.name for path in folder.iterdir()} == {f"{name}.png", f"{name}.txt"}
        table = common.format_table(rows)
        assert (folder / f"{name}.txt").read_text(encoding="utf-8") == f"{table}\n"
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > MIN_PNG_BYTES
        return rows

    return call


def _check_amortized(rows: list[dict[str, Any]], printed: str) -> None:
    assert [row["posterior"] for row in rows] == list(amortized.RANKS)
    mean_field, *dense = (row["-log q"] for row in rows)
    assert max(row["bound"] for row in rows) < max(dense) < mean_field - 5
    assert all(0 <= row[name] <= 1 for row in rows for name in ("ellipsoids", "intervals"))


def _check_density_images(rows: list[dict[str, Any]], printed: str) -> None:
    uniform, pixels, flow = (row["test NLL (nats)"] for row in rows)
    assert uniform == pytest.approx(64 * math.log(17))
    assert max(pixels, flow) < uniform - 40
    for row in rows:
        assert row["bits/dim"] * 64 * math.log(2) == pytest.approx(row["test NLL (nats)"])
    assert "400 of 400 test images are recovered" in printed


def _check_density_table(rows: list[dict[str, Any]], printed: str) -> None:
    data, flow, mixture, gaussian = (row["test NLL (nats)"] for row in rows)
    assert data == "–"
    assert max(flow, mixture) < gaussian
    for row in rows[1:]:
        assert row["behind"] == pytest.approx(row["test NLL (nats)"] - flow, abs=1e-9)


def _check_free_form(rows: list[dict[str, Any]], printed: str) -> None:
    truth, pair, gaussian = (row["test NLL (nats)"] for row in rows)
    assert truth < gaussian
    assert math.isfinite(pair)
    assert "50 of 50 are recovered from their latents" in printed
    for row in rows:
        assert row["above truth"] == pytest.approx(row["test NLL (nats)"] - truth, abs=1e-9)
        assert 0.9 < float(row["integral"]) < 1.001


def _check_svi_guide(rows: list[dict[str, Any]], printed: str) -> None:
    assert [row["guide"] for row in rows] == ["AutoSelfNormalizingFlow", "AutoNormal"]
    # After so few steps, both are far from the posterior, but not equally far.
    assert rows[0]["-ELBO (nats)"] < rows[1]["-ELBO (nats)"] - 50
    assert 0 < rows[0]["gap"] < rows[1]["gap"]


@pytest.mark.filterwarnings("ignore:the loss was still falling:UserWarning")
@pytest.mark.parametrize(
    ("name", "num_steps", "check"),
    [
        ("amortized", 60, _check_amortized),
        ("density_images", 10, _check_density_images),
        ("density_table", 12, _check_density_table),
        ("free_form", 10, _check_free_form),
        ("svi_guide", 50, _check_svi_guide),
    ],
)
def test_examples_run(
    run: Any, capsys: pytest.CaptureFixture[str], name: str, num_steps: int, check: Any
) -> None:
    rows = run(name, num_steps)
    printed = capsys.readouterr().out
    assert common.format_table(rows) in printed
    check(rows, printed)


@pytest.mark.parametrize("name", EXAMPLES)
def test_bad_options_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    for option, value, message in [
        *[("--num-steps", value, "expected an integer >= 1; got") for value in ("0", "-1", "few")],
        ("--seed", "few", "invalid int value: 'few'"),
        ("--output-dir", str(tmp_path / "file"), "cannot make .*: File exists"),
    ]:
        with pytest.raises(SystemExit):
            MODULES[name].main([option, value])
        assert re.search(rf"argument {option}: {message}", capsys.readouterr().err)


def test_processes_are_started_by_torchrun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        MODULES["distributed"].main(["--output-dir", str(tmp_path)])
    assert "expected to be started by torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len(Path(MODULES[name].__file__).read_text(encoding="utf-8").splitlines()) <= 120


def test_tables_are_aligned() -> None:
    rows = [{"name": "one", "nats": 12.345, "of": 3}, {"name": "other", "nats": 0.001, "of": "–"}]
    lines = ["name    nats  of", "one    12.35   3", "other  0.001   –"]
    assert common.format_table(rows).splitlines() == lines


# --- Guides -------------------------------------------------------------------------------------


def test_sunspots_are_all_there() -> None:
    path = Path(svi_guide.__file__).parent / "data" / "sunspots_yearly.csv"
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [int(row["year"]) for row in rows] == list(range(1700, 2009))
    expected = [int(row["sunspots"]) for row in rows]
    assert min(expected) >= 0
    assert max(expected) == expected[1957 - 1700] == 190  # the solar maximum of 1957
    years, counts = svi_guide.load_sunspots()
    assert years.tolist() == list(range(1700, 2009))
    assert counts.tolist() == expected


def test_field_has_a_matern_kernel() -> None:
    from sklearn.gaussian_process.kernels import Matern

    years = torch.tensor([1700.0, 1701.0, 1704.0])
    model = svi_guide.make_model(years, torch.tensor([3.0, 0.0, 7.0]))
    prior = pyro.poutine.trace(model).get_trace().nodes["field"]["fn"]
    expected = 1.2**2 * torch.as_tensor(Matern(3.0, nu=2.5)(years.unsqueeze(1)))
    torch.testing.assert_close(prior.covariance_matrix, expected + JITTER * torch.eye(3))


# --- Amortized inference ------------------------------------------------------------------------


def test_diagnoses_are_all_there() -> None:
    path = Path(amortized.__file__).parent / "data" / "aids_quarterly.csv"
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    quarters = [4 * int(row["year"]) + int(row["quarter"]) for row in rows]
    assert quarters == list(range(4 * 1983 + 3, 4 * 1989 + 5))
    counts = [float(row["diagnoses"]) for row in rows]
    assert sum(counts) == 3037
    assert amortized.Epidemic().observed.tolist() == [counts]


def test_incubations_are_weibull() -> None:
    epidemic = amortized.Epidemic()
    assert epidemic.incubation.shape == (26, 48)
    assert (epidemic.incubation >= 0).all()
    distribution = dist.Weibull(9.8 / math.log(2) ** 0.4, 2.5)
    for column in range(48):  # from the middle of a quarter
        start, end = max(22 - column - 0.5, 0) / 4, (47 - column + 0.5) / 4
        expected = distribution.cdf(torch.tensor(end))
        expected = expected - (distribution.cdf(torch.tensor(start)) if start else 0)
        torch.testing.assert_close(epidemic.incubation[:, column].sum(), expected)


def test_extreme_epidemics_have_finite_diagnoses() -> None:
    rate = amortized.Epidemic().diagnoses(torch.full((1, 48), 1e4)).base_dist.rate
    assert torch.isfinite(rate).all()


def test_benchmark_has_the_same_epidemic(benchmark_modules: None) -> None:
    expected, found = amortized.Epidemic(), importlib.import_module("amortization").Epidemic()
    assert torch.equal(found.incubation, expected.incubation)
    draws = []
    for epidemic in (found, expected):
        pyro.set_rng_seed(0)
        draws.append(epidemic.simulate(3))
    assert all(map(torch.equal, *draws))


def test_epidemics_are_random_walks() -> None:
    theta, x = amortized.Epidemic().simulate(4000)
    assert (theta.shape, x.shape) == ((4000, 48), (4000, 26))
    # Means and standard deviations of 4000, or of 47 times as many, within 5 standard errors.
    assert abs(theta[:, 0].mean() - math.log(30)) < 5 * 1.5 / 4000**0.5
    assert theta[:, 0].std() == pytest.approx(1.5, rel=5 / 8000**0.5)
    assert theta.diff(dim=1).std() == pytest.approx(0.4, rel=5 / (2 * 47 * 4000) ** 0.5)


# --- Densities ----------------------------------------------------------------------------------


def test_digits() -> None:
    training, test = density_images.load_data()
    assert (training.shape, test.shape) == ((1397, 1, 8, 8), (400, 1, 8, 8))
    assert torch.cat([training, test]).aminmax() == (0, 16)
    assert torch.equal(training, density_images.load_data()[0])


def test_density_of_pixels_counts_every_jacobian() -> None:
    density = density_images.ImageDensity()
    glow = density.flow.parts[1].eval()
    for parameter in glow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = 17 * torch.rand(1, 1, 8, 8)

    def to_latent(x: Tensor) -> Tensor:
        return glow(torch.logit((x / 17 + 1e-6) * (1 - 2e-6)))

    jacobian = torch.autograd.functional.jacobian(to_latent, pixels).view(64, 64)
    expected = dist.Normal(0.0, 1.0).log_prob(to_latent(pixels)).sum()
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(density.continuous.log_prob(pixels)[0], expected)


def test_histograms_are_probabilities() -> None:
    training, _ = density_images.load_data()
    found = density_images.histograms(training)
    every = torch.arange(17.0).view(17, 1, 1, 1).expand(17, 1, 8, 8)
    torch.testing.assert_close(found.base_dist.log_prob(every).exp().sum(0), torch.ones(1, 8, 8))
    share = (training[:, 0, 4, 4] == 16).double().mean()
    assert found.base_dist.probs[0, 4, 4, 16].item() == pytest.approx(share.item(), abs=0.02)


def test_one_gaussian_is_the_gaussian_of_the_table() -> None:
    table = density_table.load_table()
    assert table.shape == (569, 5)
    found = density_table.Mixture(table, 1, 0)
    scale = table.std(0)  # of which so much is added to the variances
    covariance = torch.cov(table.T, correction=0) + 1e-4 * torch.diag(scale**2)
    expected = dist.MultivariateNormal(table.mean(0), covariance)
    torch.testing.assert_close(found.log_prob(table), expected.log_prob(table))
    drawn = found.sample((4000,))
    assert (drawn.mean(0) - table.mean(0)).abs().div(scale).max() < 5 / 4000**0.5


def test_spirals_are_a_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_form, "NUM_CELLS", 60)
    spirals = free_form.make_spirals()
    assert free_form.integral(spirals) == pytest.approx(1.0, abs=1e-6)
    # Of the exact mean of log p, a sum over a grid, within five standard errors.
    line = torch.linspace(-4, 4, 81)
    log_prob = spirals.log_prob(torch.cartesian_prod(line, line))
    expected = (log_prob.exp() * log_prob).sum() * 0.1**2
    drawn = spirals.log_prob(spirals.sample((2000,)))
    assert abs(drawn.mean() - expected) < 5 * drawn.std() / 2000**0.5
