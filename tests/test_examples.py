"""The examples run, and what they compute is what they say."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import math
import re
import signal
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

from pyro_snf import SelfNormalizing

EXAMPLES = Path(__file__).parents[1] / "examples"

# An empty picture with its axes takes a few thousand bytes.
MIN_PNG_BYTES = 10_000

# The share of the kernel's amplitude² that is added to its diagonal.
JITTER = 1e-6


@pytest.fixture
def svi_guide(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("svi_guide")


@pytest.fixture
def density_digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("density_digits")


@pytest.fixture
def density_2d(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("density_2d")
    for name, value in {"NUM_TEST": 500, "NUM_LATENTS": 100, "NUM_CELLS": 100}.items():
        monkeypatch.setattr(module, name, value)  # quicker to evaluate
    return module


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pyro.settings.context(module_local_params=True):
        yield importlib.import_module("vae")


@pytest.fixture
def images_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("images")
    monkeypatch.setattr(module, "COLUMNS", 3)  # quicker to draw
    return module


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("common")


def _check_outputs(folder: Path, result: Mapping[str, Any], pictures: set[str]) -> None:
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) == {"settings", "torch", "date", "table"}
    assert result["settings"]["seed"] == 3
    assert {path.name for path in folder.glob("*.png")} == pictures
    for picture in pictures:
        content = (folder / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > MIN_PNG_BYTES


def _table(result: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in result["table"]}


@pytest.mark.parametrize("options", [[], ["--grid", "4", "--num-layers", "2"]])
def test_svi_guide_runs(
    svi_guide: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    arguments = ["--num-steps", "25", "--seed", "3", "--output-dir", str(folder), *options]
    result = svi_guide.main(arguments)
    _check_outputs(folder, result, {"convergence.png", "intensity.png"})
    rows = _table(result, "guide")
    assert len(rows) == 4
    for row in rows.values():
        assert math.isfinite(row["-ELBO (nats)"])
        assert row["steps"] == 25
        assert row["ms/step"] > 0
    printed = capsys.readouterr().out
    for name in rows:
        assert name in printed
    assert "certificate" in printed  # of the diagnostics


def test_svi_guide_trains_for_equal_time(svi_guide: ModuleType) -> None:
    process = svi_guide.simulate_grid(3, seed=0)
    model = svi_guide.make_model(process)
    with pyro.settings.context(module_local_params=True):
        guides = svi_guide.make_guides(model)
        histories = svi_guide.train(
            model, guides, learning_rate=0.01, seconds=0.5, show_progress=False
        )
    for history in histories.values():
        assert len(history.losses) == len(history.seconds) > 1
        assert history.seconds[-2] < 0.5 <= history.seconds[-1]  # the last step ends late
        assert all(a < b for a, b in zip(history.seconds, history.seconds[1:], strict=False))


def test_svi_guide_needs_one_length(svi_guide: ModuleType) -> None:
    for options in [{}, {"seconds": 1.0, "num_steps": 1}]:
        with pytest.raises(ValueError, match="expected seconds or num_steps; got"):
            svi_guide.train(lambda: None, {}, learning_rate=0.1, **options)


def test_svi_guide_goes_on_after_an_interrupt(svi_guide: ModuleType) -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        pyro.sample("field", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guides = {"diagonal": AutoDiagonalNormal(model)}
    histories = svi_guide.train(
        model, guides, learning_rate=0.1, num_steps=100, show_progress=False
    )
    assert 30 < len(histories["diagonal"].losses) < 40


def test_svi_guide_stops_a_guide_that_diverges(svi_guide: ModuleType) -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        field = pyro.sample("field", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("cliff", field.sum() * (math.inf if calls > 20 else 1.0))

    guides = {"diagonal": AutoDiagonalNormal(model)}
    histories = svi_guide.train(
        model, guides, learning_rate=0.1, num_steps=100, show_progress=False
    )
    losses = histories["diagonal"].losses
    assert len(losses) < 100
    assert all(map(math.isfinite, losses[:-1]))
    assert not math.isfinite(losses[-1])


def test_history_is_averaged_over_blocks(svi_guide: ModuleType) -> None:
    history = svi_guide.History([1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 7.0, 5.0, 3.0, 1.0])
    assert history.smoothed(num_blocks=3) == ([1.0, 2.5, 4.5], [9.0, 6.0, 2.0])
    assert history.smoothed(num_blocks=100) == (history.seconds, history.losses)
    assert svi_guide.History().smoothed() == ([], [])


def test_sunspots_are_all_there(svi_guide: ModuleType) -> None:
    with svi_guide.SUNSPOTS.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [int(row["year"]) for row in rows] == list(range(1700, 2009))
    assert all(int(row["sunspots"]) >= 0 for row in rows)

    process = svi_guide.load_sunspots()
    assert process.counts.shape == (309,)
    assert process.positions.shape == (309, 1)
    assert process.scale_tril.shape == (309, 309)
    assert process.counts[1957 - 1700] == 190  # the highest, in the solar maximum of 1957
    assert process.counts.max() == 190


def test_grid_is_a_draw_from_its_prior(svi_guide: ModuleType) -> None:
    process = svi_guide.simulate_grid(30, seed=0)
    assert process.counts.shape == process.intensity.shape == (900,)
    assert torch.equal(process.counts, process.counts.round())
    # 900 Poisson counts: their sum is within 5 standard deviations of what is expected of it.
    expected = process.intensity.sum()
    assert (process.counts.sum() - expected).abs() < 5 * expected.sqrt()
    assert torch.equal(process.counts, svi_guide.simulate_grid(30, seed=0).counts)
    assert not torch.equal(process.counts, svi_guide.simulate_grid(30, seed=1).counts)
    # The field, white again, is standard normal: its mean square is 1 within 5 deviations.
    field = process.intensity.log() - process.mean
    white = torch.linalg.solve_triangular(process.scale_tril, field.unsqueeze(-1), upper=False)
    assert abs(white.square().mean() - 1) < 5 * math.sqrt(2 / 900)


@pytest.mark.parametrize("smoothness", [1.5, 2.5])
def test_matern_kernel(svi_guide: ModuleType, smoothness: float) -> None:
    from sklearn.gaussian_process.kernels import Matern

    positions = torch.rand(6, 2)
    scale_tril = svi_guide.matern_cholesky(
        positions, smoothness=smoothness, length_scale=0.7, amplitude=1.3
    )
    expected = 1.3**2 * torch.as_tensor(Matern(0.7, nu=smoothness)(positions))
    expected.diagonal().add_(JITTER * 1.3**2)
    torch.testing.assert_close(scale_tril @ scale_tril.mT, expected)


def test_every_guide_starts_alike(svi_guide: ModuleType) -> None:
    model = svi_guide.make_model(svi_guide.simulate_grid(4, seed=0))
    with torch.no_grad():
        for guide in svi_guide.make_guides(model, init_scale=0.1).values():
            draws = torch.stack([guide()["field"] for _ in range(500)])
            assert draws.shape == (500, 16)
            # 8000 draws of standard deviation 0.1; the low-rank guide starts near it.
            assert draws.mean().abs() < 0.02
            assert 0.05 < draws.std() < 0.2


def test_evaluate_is_exact_for_a_conjugate_model(svi_guide: ModuleType) -> None:
    # With q = p(field | counts), every sample of −ELBO is the negative log evidence.
    def model() -> None:
        field = pyro.sample("field", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("counts", dist.Normal(field, 1.0).to_event(1), obs=torch.tensor([1.0, -2.0]))

    guide = AutoDiagonalNormal(model)
    guide()
    guide.loc.data = torch.tensor([0.5, -1.0])
    guide.scale = torch.full((2,), math.sqrt(0.5))
    evidence = dist.Normal(torch.zeros(2), math.sqrt(2)).log_prob(torch.tensor([1.0, -2.0])).sum()
    loss, error = svi_guide.evaluate(model, guide, num_samples=10)
    assert loss == pytest.approx(-evidence.item())
    assert error < 1e-9
    assert guide.training


def test_density_digits_runs(
    density_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--num-steps", "30", "--seed", "3", "--output-dir", str(tmp_path)]
    result = density_digits.main(arguments)
    _check_outputs(tmp_path, result, {"test_nll.png", "samples.png"})
    rows = _table(result, "log_det")
    assert list(rows) == ["exact", "refined", "learned"]
    for row in rows.values():
        nats = row["test NLL (nats)"]
        assert row["bits/dim"] == pytest.approx(nats / (64 * math.log(2)))
        assert nats < 64 * math.log(17)  # better than uniform over the 17 levels
    # The tracked inverse follows the exact gradient from the first step.
    exact, refined = (rows[name]["test NLL (nats)"] for name in ("exact", "refined"))
    assert refined == pytest.approx(exact, rel=1e-3)
    assert rows["exact"]["inverse error"] < 1e-12
    printed = capsys.readouterr().out
    for name in rows:
        assert name in printed


def test_digits_are_split_the_same_way_each_time(density_digits: ModuleType) -> None:
    digits = density_digits.load_data()
    assert [part.shape for part in digits] == [(1297, 64), (250, 64), (250, 64)]
    for part, again in zip(digits, density_digits.load_data(), strict=True):
        assert torch.equal(part, again)
    values = torch.cat(digits)
    assert (values.min(), values.max()) == (0, 16)


def test_density_counts_every_jacobian(density_digits: ModuleType) -> None:
    flow = density_digits.make_flow("exact")
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    density = density_digits.make_density(flow)
    generator = torch.Generator().manual_seed(0)
    image = density_digits.dequantize(density_digits.load_data().test[:1], generator)[0]

    def to_latent(pixels: Tensor) -> Tensor:
        unit = (pixels / 17 + 1e-6) * (1 - 2e-6)
        return flow(torch.logit(unit))

    jacobian = torch.autograd.functional.jacobian(to_latent, image)
    expected = dist.Normal(0.0, 1.0).log_prob(to_latent(image)).sum()
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(density.log_prob(image), expected)


def test_samples_are_images(density_digits: ModuleType) -> None:
    flow = density_digits.make_flow("refined")
    images = density_digits.sample_images(flow, 5, seed=0)
    assert images.shape == (5, 8, 8)
    assert torch.equal(images, images.round().clamp(0, 16))
    assert torch.equal(images, density_digits.sample_images(flow, 5, seed=0))


def test_digits_go_on_after_an_interrupt(
    density_digits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = density_digits.dequantize
    calls = 0

    def interrupted(images: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return draw(images, generator)

    monkeypatch.setattr(density_digits, "dequantize", interrupted)
    runs = density_digits.train(density_digits.load_data(), num_steps=100, show_progress=False)
    for run in runs.values():
        assert run.num_steps == 7  # two of the calls are for the validation and the test data
        assert run.evaluations[-1].step == 7


#: The densities of examples/density_2d.py.
DENSITIES = ["eight-gaussians", "one-gaussian", "sine", "moons", "trimodal", "smile"]
DENSITIES += ["two-spirals", "checkerboard", "rings"]

#: Its flows.
FLOWS = ["exact", "refined", "learned", "spline_coupling", "affine_autoregressive"]


def test_density_2d_runs(
    density_2d: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seconds", "0.05", "--densities", "moons", "checkerboard", "--seed", "3"]
    result = density_2d.main([*arguments, "--output-dir", str(tmp_path)])
    _check_outputs(tmp_path, result, {"densities.png"})
    rows = result["table"]
    assert [(row["density"], row["flow"]) for row in rows] == [
        (density, flow) for density in ("moons", "checkerboard") for flow in FLOWS
    ]
    for row in rows:
        assert math.isfinite(row["nll"])
        if row["flow"] in FLOWS[:3]:  # those of Pyro are rough at first, and the grid is coarse
            assert row["mass"] == pytest.approx(1, abs=0.02)
            assert row["nll"] > row["true NLL"]
        # Nothing has moved far enough to fold.
        assert (row["recovered"], row["inverted"]) == (1, 1)
        assert row["steps"] >= 1
        assert row["ms/step"] > 0
    printed = capsys.readouterr().out
    for name in ["moons", "checkerboard", *FLOWS, "truth", "Integral of p"]:
        assert name in printed


@pytest.mark.parametrize("name", DENSITIES)
def test_plane_densities_are_those_of_their_samples(density_2d: ModuleType, name: str) -> None:
    assert list(density_2d.DENSITIES) == DENSITIES
    density = density_2d.DENSITIES[name]()
    samples, again = (
        density.sample(20_000, torch.Generator().manual_seed(seed)) for seed in (0, 0)
    )
    assert torch.equal(samples, again)

    line = (torch.arange(320) + 0.5) / 32 - 5
    points = torch.cartesian_prod(line, line)
    log_prob = density.log_prob(points)
    masses = log_prob.exp() / 32**2
    # Where p jumps, a sum over cells is off by a share of those at the jump.
    assert masses.sum() == pytest.approx(1, abs=2e-2 if name == "checkerboard" else 2e-3)

    # Means, of coordinates and of log p, are those of the samples, within 5 standard errors.
    def check(values: Tensor, expected: Tensor) -> None:
        error = values.std() / math.sqrt(len(values))
        assert (values.mean() - expected).abs() < 5 * error + 1e-2  # the latter of the sum

    is_inside = log_prob > -math.inf
    check(density.log_prob(samples), (masses * log_prob)[is_inside].sum() / masses.sum())
    for axis in range(2):
        for power in (1, 2):
            expected = (masses * points[:, axis] ** power).sum() / masses.sum()
            check(samples[:, axis] ** power, expected)
        assert abs(samples[:, axis].mean()) < 0.05
        assert 0.7 < samples[:, axis].std() < 1.4


@pytest.mark.parametrize("name", FLOWS)
def test_plane_flows_are_normalized(
    density_2d: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert list(density_2d.FLOWS) == FLOWS
    monkeypatch.setattr(density_2d, "WARM_UP", 1e-9)  # 60 steps are its start
    monkeypatch.setattr(density_2d, "NUM_CELLS", 400)  # splines are rough at first
    density = density_2d.DENSITIES["trimodal"]()
    test = density.sample(500, torch.Generator().manual_seed(1))
    run = density_2d.Run(name, seconds=100.0, seed=0)
    before = run.evaluate(test)
    for _ in range(60):
        run.step(density.sample(100, run.data_generator))
    assert run.num_steps == 60
    assert run.seconds > 0
    after = run.evaluate(test)
    assert after.nll < before.nll - 0.1
    assert after.mass == pytest.approx(1, abs=0.05)
    assert (after.recovered, after.inverted) == (1, 1)

    x = test[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: run._to_latent(x.unsqueeze(0))[0], x)
    latent = run._to_latent(x.unsqueeze(0))
    expected = dist.Normal(0.0, 1.0).log_prob(latent).sum()
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(run.log_prob(x.unsqueeze(0))[0], expected)
    assert run.sample(7, seed=0).shape == (7, 2)
    assert torch.equal(run.sample(7, seed=0), run.sample(7, seed=0))


class _Fold(torch.nn.Module):
    """``x₁³ − 3 x₁``, which takes the values from −2 to 2 three times each."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unbind(1)
        return torch.stack([first**3 - 3 * first, second], 1)


def test_folds_are_found(density_2d: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SelfNormalizing(_Fold(), torch.nn.Linear(2, 2), event_shape=2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    run = density_2d.Run("exact", seconds=1.0, seed=0)
    run.flow = density_2d.Flow(dist.TransformedDistribution(base, [pair.inv]), pair, pair)
    monkeypatch.setattr(density_2d, "NUM_CELLS", 1000)
    found = run.evaluate(torch.randn(100, 2))
    once_more = 2 * (2 * dist.Normal(0.0, 1.0).cdf(torch.tensor(2.0)).item() - 1)
    assert found.mass == pytest.approx(1 + once_more, rel=1e-3)
    assert found.recovered < 0.9


def test_plane_flows_have_the_same_time_and_data(density_2d: ModuleType) -> None:
    densities = {name: density_2d.DENSITIES[name]() for name in ("sine", "rings")}
    flows = ["exact", "affine_autoregressive"]
    runs = density_2d.train(densities, flows, seconds=0.3, batch_size=10, show_progress=False)
    assert list(runs) == list(densities)
    for name, begun in runs.items():
        assert list(begun) == flows
        for run in begun.values():
            assert run.num_steps > 1
            assert run.seconds >= 0.3  # the last step ends late
            # After n batches of a seed comes the same batch, whichever the flow.
            fresh = torch.Generator().manual_seed(0)
            for _ in range(run.num_steps):
                densities[name].sample(10, fresh)
            assert torch.equal(fresh.get_state(), run.data_generator.get_state())


def test_plane_densities_go_on_after_an_interrupt(
    density_2d: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = density_2d.Run.step
    calls = 0

    def interrupted(run: Any, batch: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        step(run, batch)

    monkeypatch.setattr(density_2d.Run, "step", interrupted)
    densities = {name: make() for name, make in density_2d.DENSITIES.items()}
    limit = 10
    runs = density_2d.train(densities, FLOWS[:2], seconds=100.0, show_progress=False)
    assert list(runs) == DENSITIES[:1]
    assert sum(run.num_steps for run in runs[DENSITIES[0]].values()) == 9

    calls, limit = 0, 2  # before each flow has had a step
    with pytest.raises(KeyboardInterrupt):
        density_2d.train(densities, FLOWS[:2], seconds=100.0, show_progress=False)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seconds", "0", "expected a number > 0; got '0'"),
        ("--batch-size", "0", "expected an integer >= 1; got '0'"),
        ("--densities", "spiral", "invalid choice: 'spiral'"),
        ("--flows", "lu", "invalid choice: 'lu'"),
        ("--device", "nonsense", "no device 'nonsense' here"),
    ],
)
def test_bad_plane_options_are_named(
    density_2d: ModuleType,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        density_2d.main([option, value])
    assert message in " ".join(capsys.readouterr().err.split())


def _small_options(folder: Path) -> list[str]:
    sizes = ["--latent-dim", "3", "--hidden", "8", "--rank", "1", "--epochs", "1"]
    return [*sizes, "--seed", "3", "--output-dir", str(folder)]


def _write_images(path: Path, images: Tensor) -> None:
    """An IDX file, gzipped if its name says so."""
    content = struct.pack(">4I", 0x0803, *images.shape) + images.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder as MNIST's, with images of 4 × 4: 12 for training, gzipped, and 5 for testing."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    pixels = torch.arange(17 * 16).remainder(256).to(torch.uint8).reshape(17, 4, 4)
    _write_images(folder / "train-images-idx3-ubyte.gz", pixels[:12])
    _write_images(folder / "t10k-images-idx3-ubyte", pixels[12:])
    return folder


@pytest.mark.parametrize("is_mnist", [False, True])
def test_vae_runs(
    vae: ModuleType,
    mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_mnist: bool,
) -> None:
    monkeypatch.setattr(vae, "NUM_VALIDATION", 2)
    folder = tmp_path / "new" / "folder"
    options = ["--data-dir", str(mnist)] if is_mnist else []
    result = vae.main([*_small_options(folder), *options])
    _check_outputs(folder, result, {"training.png", "reconstructions.png", "samples.png"})
    rows = _table(result, "guide")
    assert list(rows) == ["mean field", "self-normalizing, rank 0", "self-normalizing, rank 1"]
    for row in rows.values():
        assert 0 < row["IW bound, K = 100"] < row["-ELBO (nats)"]
        assert row["ms/step"] > 0
    sizes = [row["parameters"] for row in rows.values()]
    assert sizes[1] - sizes[0] == 3 * 3 + 3  # W, and its scale
    assert sizes[2] - sizes[1] == 2 * 3 * (8 + 1)  # U and V, from the last layer of the encoder
    printed = capsys.readouterr().out
    for name in rows:
        assert name in printed


def _make_vae_runs(vae: ModuleType, data: Any, **kwargs: Any) -> dict[str, Any]:
    options = {"latent_dim": 3, "hidden": 8, "rank": 2, "num_steps": 10, "learning_rate": 1e-2}
    return vae.make_runs(data, **(options | kwargs))


def _small_data(vae: ModuleType) -> Any:
    counts = torch.arange(30 * 4).remainder(17).to(torch.get_default_dtype()).reshape(30, 4)
    return vae.Data(counts[:20], counts[20:25], counts[25:], levels=16)


def test_every_vae_starts_alike(vae: ModuleType) -> None:
    data = _small_data(vae)
    log_weights = []
    for run in _make_vae_runs(vae, data).values():
        pyro.set_rng_seed(0)
        log_weights.append(run.log_weights(data.test, 7))
    assert log_weights[0].shape == (7, 5)
    for others in log_weights[1:]:
        torch.testing.assert_close(others, log_weights[0])


def test_vae_weights_are_those_of_the_densities(vae: ModuleType) -> None:
    data = _small_data(vae)
    for run in _make_vae_runs(vae, data).values():
        for parameter in run.guide.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        images = data.test
        pyro.set_rng_seed(0)
        actual = run.log_weights(images, 1)[0]
        pyro.set_rng_seed(0)
        run.objective.eval()
        posterior = run.guide.posterior(images / 16)
        z = posterior.expand([1, len(images)]).rsample()[0]
        expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - posterior.log_prob(z)
        probabilities = torch.sigmoid(run.model.network(z))
        pixels = torch.distributions.Binomial(16, probabilities).log_prob(images)
        torch.testing.assert_close(actual, expected + pixels.sum(-1))
        # In training the loss is −ELBO, but for the weight of z.
        pyro.set_rng_seed(0)
        loss = run.objective(images, 0.25)
        torch.testing.assert_close(loss, -(0.25 * expected + pixels.sum(-1)).sum())


def test_binary_pixels_are_binomial(vae: ModuleType) -> None:
    model = vae.Decoder(4, 1, latent_dim=2, hidden=3)
    z = torch.ones(5, 2)
    images = torch.eye(5, 4)
    expected = dist.Binomial(1, logits=model.network(z)).log_prob(images)
    torch.testing.assert_close(model.pixels(z).log_prob(images), expected)


def test_vae_goes_on_after_an_interrupt(vae: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, calls = vae.Run.step, 0

    def interrupted(self: Any, *args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:  # the second guide's in the third step
            raise KeyboardInterrupt
        return train_step(self, *args)

    monkeypatch.setattr(vae.Run, "step", interrupted)
    data = _small_data(vae)
    runs = vae.train(
        data, num_epochs=9, batch_size=10, latent_dim=3, hidden=8, rank=1, show_progress=False
    )
    assert [run.num_steps for run in runs.values()] == [3, 2, 2]
    for row in vae.make_table(runs, data):
        assert math.isfinite(row["-ELBO (nats)"])


def test_vae_ends_where_a_loss_is_not_finite(vae: ModuleType) -> None:
    data = _small_data(vae)
    bad = data._replace(train=data.train.clone())
    bad.train[3, 1] = math.nan
    with (
        pytest.warns(UserWarning, match="Encountered NaN: loss"),
        pytest.raises(SystemExit, match=r"mean field: the loss is nan in step [12]; try a --lear"),
    ):
        vae.train(
            bad, num_epochs=1, batch_size=10, latent_dim=3, hidden=8, rank=1, show_progress=False
        )


def test_vae_loss_of_a_matrix_that_is_not_finite(vae: ModuleType) -> None:
    data = _small_data(vae)
    run = list(_make_vae_runs(vae, data).values())[-1]
    torch.nn.init.constant_(run.guide.transform.linear.theta, math.inf)
    with pyro.validation_enabled(False):
        assert math.isnan(run.step(data.train, 1.0))


def test_vae_rank_is_checked(vae: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vae.main(["--rank", "9", "--latent-dim", "8"])
    assert "expected --rank <= --latent-dim; got 9 and 8" in capsys.readouterr().err


def test_vae_needs_a_folder_with_mnist(
    vae: ModuleType, mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mnist / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(SystemExit):
        vae.main(["--data-dir", str(mnist)])
    printed = " ".join(capsys.readouterr().err.split())
    assert "--data-dir: expected t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in" in printed


def test_mnist_is_read(common: ModuleType, mnist: Path) -> None:
    train, test = common.load_mnist(mnist)
    assert (train.shape, test.shape) == ((12, 16), (5, 16))
    expected = torch.arange(17 * 16).remainder(256).to(torch.uint8)
    assert torch.equal(torch.cat([train, test]).flatten(), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file of images; got 0 bytes"),
        (struct.pack(">4I", 0x0801, 1, 1, 1) + b"x", "got 17 bytes, the first of them 00000801"),
        (struct.pack(">4I", 0x0803, 2, 1, 1) + b"x", "expected an IDX file of images; got 17 byt"),
    ],
)
def test_other_files_are_no_mnist(
    common: ModuleType, mnist: Path, content: bytes, message: str
) -> None:
    (mnist / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        common.load_mnist(mnist)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"x" * 100)[:-9]])
def test_damaged_gzip_is_named(common: ModuleType, mnist: Path, content: bytes) -> None:
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match="expected a gzipped file; got"):
        common.load_mnist(mnist)


# --- Images -------------------------------------------------------------------------------------


def _write_archive(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "images.npz", **arrays)
    return folder


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """A folder with coloured images of 4 × 4 in an NPZ file: 12 for training and 5 for testing."""
    arrays = {"x_train": _pixels(12, 4, 4, 3), "x_test": _pixels(5, 4, 4, 3, seed=1)}
    return _write_archive(tmp_path / "npz", **arrays)


IMAGE_PICTURES = {"samples.png", "reconstructions.png", "kernels.png", "curves.png"}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model", "conv", "--log-det", "learned", "--activation", "smooth_leaky_relu"],
        ["--model", "fc", "--log-det", "exact", "--data-dir", "mnist"],
        ["--model", "glow", "--steps-per-level", "1", "--hidden-channels", "4"],
        ["--log-det", "learned", "--reconstruction-weight", "3", "--data-dir", "npz"],
        ["--model", "glow", "--log-det", "learned", "--hidden-channels", "4", "--data-dir", "npz"],
    ],
    ids=" ".join,
)
def test_images_runs(
    images_example: ModuleType,
    mnist: Path,
    npz: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    folders = {"mnist": str(mnist), "npz": str(npz)}
    options = [folders.get(option, option) for option in options]
    folder = tmp_path / "new" / "folder"
    arguments = ["--epochs", "2", "--seed", "3", "--output-dir", str(folder), *options]
    result = images_example.main(arguments)
    _check_outputs(folder, result, IMAGE_PICTURES)
    (row,) = result["table"]
    size = {str(mnist): 16, str(npz): 48}.get(arguments[-1], 64)
    nats = row["test NLL (nats)"]
    assert math.isfinite(nats)
    assert row["bits/dim"] == pytest.approx(nats / (size * math.log(2)), rel=1e-6)
    assert row["exact reconstructions off by"] == 0
    assert (folder / "checkpoint.pt").is_file()
    with (folder / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [float(epoch["epoch"]) for epoch in history] == [0, 1, 2]
    best = min(float(epoch["validation"]) for epoch in history)
    assert row["validation NLL"] == pytest.approx(best, rel=1e-12)
    printed = capsys.readouterr().out
    assert "Exact NLL of" in printed
    assert "certificate" in printed  # of the diagnostics


def _image_args(module: ModuleType, folder: Path, *options: str) -> Any:
    options = ("--output-dir", str(folder), "--batch-size", "5", *options)
    return module.parse_args(["--warm-up-epochs", "1", *options])


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "conv"],
        ["--model", "conv", "--log-det", "learned"],
        ["--model", "fc"],
        ["--model", "fc", "--log-det", "exact"],
        ["--model", "glow", "--steps-per-level", "2", "--hidden-channels", "4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("last_step", [2, 5, 6])
def test_images_go_on_as_if_nothing_had_happened(
    images_example: ModuleType,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    last_step: int,
) -> None:
    def make_run(*more: str) -> Any:
        args = _image_args(images_example, tmp_path, "--data-dir", str(npz), *options, *more)
        return images_example.make_run(args, checkpoint)

    def train(run: Any) -> Any:
        images_example.train(run, num_epochs=4, checkpoint=checkpoint, show_progress=False)
        return run

    checkpoint = tmp_path / "checkpoint.pt"
    expected = train(make_run())
    assert expected.num_steps == 8  # 10 images for training, two batches an epoch

    step = images_example.Run.step

    def interrupted(self: Any) -> float:
        loss = step(self)
        if self.num_steps == last_step:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(images_example.Run, "step", interrupted)
    run = train(make_run())
    assert run.num_steps == last_step
    assert run.history[-1].epoch == last_step / 2
    monkeypatch.setattr(images_example.Run, "step", step)

    resumed = train(make_run("--resume"))
    assert resumed.num_steps == 8
    assert resumed.seconds > 0
    for one, other in zip(resumed.history, expected.history, strict=True):
        assert one[:-1] == pytest.approx(other[:-1], rel=1e-9, nan_ok=True)
    assert resumed.best[:2] == pytest.approx(expected.best[:2], rel=1e-9)
    pairs = zip(resumed.flow.parameters(), expected.flow.parameters(), strict=True)
    for parameter, other in pairs:
        torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resumed.best.state, expected.best.state, equal_nan=True)


def test_a_second_interrupt_is_one(common: ModuleType) -> None:
    before = signal.getsignal(signal.SIGINT)
    with common.deferred_interrupt() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_are_never_half_written(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    common.save_whole({"step": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        common.save_whole({"step": lambda: 2}, path)
    assert torch.load(path) == {"step": 1}


def test_images_in_an_interrupted_run_are_drawn(
    images_example: ModuleType, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = images_example.Run.step

    def interrupted(self: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(images_example.Run, "step", interrupted)
    arguments = ["--data-dir", str(npz), "--batch-size", "5", "--seed", "3"]
    arguments += ["--output-dir", str(tmp_path)]
    result = images_example.main(arguments)
    _check_outputs(tmp_path, result, IMAGE_PICTURES)
    # Once more, of the same flow: no epoch is left to train.
    again = images_example.main([*arguments, "--epochs", "1", "--resume"])
    assert again["table"][0]["at epoch"] in (0, 1)


def test_resume_needs_a_checkpoint(images_example: ModuleType, tmp_path: Path) -> None:
    args = _image_args(images_example, tmp_path, "--resume")
    with pytest.raises(SystemExit, match=r"expected a checkpoint to resume from; got no .*here"):
        images_example.make_run(args, tmp_path / "nothing here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "fc"], "expected model to be 'conv', as in the checkpoint; got 'fc'"),
        (["--seed", "4"], "expected seed to be 0, as in the checkpoint; got 4"),
        (["--batch-size", "4"], "expected batch_size to be 5, as in the checkpoint; got 4"),
        (["--data-dir"], "expected images to be [[10, 3, 4, 4], "),
    ],
)
def test_resume_needs_the_same_settings(
    images_example: ModuleType,
    mnist: Path,
    npz: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    data = ["--data-dir", str(npz)]
    checkpoint = tmp_path / "checkpoint.pt"
    run = images_example.make_run(_image_args(images_example, tmp_path, *data), checkpoint)
    images_example.train(run, num_epochs=1, checkpoint=checkpoint, show_progress=False)
    options = ["--data-dir", str(mnist)] if options == ["--data-dir"] else [*data, *options]
    args = _image_args(images_example, tmp_path, "--resume", *options)
    with pytest.raises(SystemExit, match=re.escape(message)):
        images_example.make_run(args, checkpoint)


def _small_run(module: ModuleType, folder: Path, *options: str) -> Any:
    return module.make_run(_image_args(module, folder, *options), folder / "checkpoint.pt")


def test_evaluation_is_always_the_same(images_example: ModuleType, npz: Path) -> None:
    losses = set()
    for seed in ("0", "1"):
        run = _small_run(images_example, npz, "--data-dir", str(npz), "--seed", seed)
        losses |= {run.negative_log_likelihood(run.data.test) for _ in range(2)}
        assert run.flow.training
    assert len(losses) == 1


def test_images_count_every_jacobian(images_example: ModuleType, mnist: Path) -> None:
    run = _small_run(images_example, mnist, "--data-dir", str(mnist), "--log-det", "exact")
    for parameter in run.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = run.data.test[:1].double() + 0.5

    def to_latent(pixels: Tensor) -> Tensor:
        return run.flow(torch.logit((pixels / 256 + 1e-6) * (1 - 2e-6)))

    jacobian = torch.autograd.functional.jacobian(to_latent, image).reshape(16, 16)
    expected = dist.Normal(0.0, 1.0).log_prob(to_latent(image)).sum()
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(run.density.log_prob(image)[0], expected)


@pytest.mark.parametrize("method", ["learned", "exact"])
def test_pictures_leave_the_layers_as_they_are(
    images_example: ModuleType, npz: Path, method: str
) -> None:
    run = _small_run(images_example, npz, "--data-dir", str(npz), "--log-det", "learned")
    for layer in images_example.layers_of(run.flow):
        torch.nn.init.normal_(layer.theta, std=0.5)
    latents = images_example.encode(run, run.data.test)
    pixels = images_example.decode(run, latents, method)
    assert torch.equal(pixels, run.data.test) == (method == "exact")
    assert {layer.inverse for layer in images_example.layers_of(run.flow)} == {"refined"}
    count = 7
    draws = [images_example.draw_latents(run, count, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert images_example.decode(run, draws[0], method).shape == (count, 3, 4, 4)


@pytest.mark.parametrize("model", ["fc", "conv", "glow"])
def test_kernels_are_those_of_the_layers(images_example: ModuleType, npz: Path, model: str) -> None:
    run = _small_run(images_example, npz, "--data-dir", str(npz), "--model", model)
    rows = images_example.kernel_rows(run)
    if model == "glow":
        assert list(rows)[:2] == ["1 × 1 at 12×2×2, W", "1 × 1 at 12×2×2, R"]
        w, r = list(rows.values())[:2]
        assert w.shape == r.shape == (3, 12, 12)
        torch.testing.assert_close(w @ r, torch.eye(12).expand(3, 12, 12))
        return
    names = ["W − I", "R − I"] if model == "fc" else ["w − δ", "r − δ"]
    assert list(rows)[:2] == [f"layer 1, {name}" for name in names]
    for row in rows.values():
        assert row.shape[0] == 3
        assert row.abs().max() < 1e-12  # the identity at the start


def test_images_end_where_the_loss_is_not_finite(
    images_example: ModuleType, npz: Path, tmp_path: Path
) -> None:
    run = _small_run(images_example, npz, "--data-dir", str(npz))
    run.evaluate()
    torch.nn.init.constant_(images_example.layers_of(run.flow)[0].theta, math.inf)
    message = "the loss is nan in step 1; try a --learning-rate below 0.01"
    with pytest.raises(SystemExit, match=message):
        images_example.train(
            run, num_epochs=1, checkpoint=tmp_path / "checkpoint.pt", show_progress=False
        )


def test_as_many_blocks_as_fit(images_example: ModuleType) -> None:
    shapes = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (1, 4, 4), (1, 7, 7), (1, 12, 8), (1, 30, 30)]
    counts = [images_example._num_blocks(torch.Size(shape)) for shape in shapes]
    assert counts == [3, 2, 3, 1, 1, 2, 2]


def test_images_that_do_not_fit(images_example: ModuleType, tmp_path: Path) -> None:
    folder = _write_archive(tmp_path / "odd", train=_pixels(12, 5, 5), test=_pixels(3, 5, 5))
    args = _image_args(images_example, tmp_path, "--model", "glow", "--data-dir", str(folder))
    with pytest.raises(SystemExit, match=r"error: level 1 of 2: .*expected H and W divisible by 2"):
        images_example.make_run(args, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "rnn"], "invalid choice: 'rnn'"),
        (["--log-det", "lu"], "invalid choice: 'lu'"),
        (["--epochs", "0"], "--epochs: expected an integer >= 1; got '0'"),
        (
            ["--model", "glow", "--activation", "spline"],
            "with --model fc only; got glow",
        ),
        (["--hidden-channels", "3"], "expected --hidden-channels with --model glow only; got conv"),
        (
            ["--data-dir", "nowhere"],
            "expected an NPZ file, or one IDX file named *train*im",
        ),
    ],
)
def test_bad_image_options_are_named(
    images_example: ModuleType,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        images_example.main(options)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "names",
    [
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-test-images-idx3-ubyte.gz"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
    ],
)
def test_idx_images_are_read(common: ModuleType, tmp_path: Path, names: tuple[str, str]) -> None:
    train, test = torch.from_numpy(_pixels(4, 5, 6)), torch.from_numpy(_pixels(2, 5, 6, seed=1))
    for name, pixels in zip(names, (train, test), strict=True):
        _write_images(tmp_path / name, pixels)
        (tmp_path / name.replace("images", "labels").replace("idx3", "idx1")).write_bytes(b"")
    found = common.load_images(tmp_path)
    assert torch.equal(found[0], train.unsqueeze(1))
    assert torch.equal(found[1], test.unsqueeze(1))
    # Gzipped or not, it is one file.
    for name, pixels in zip(names, (train, test), strict=True):
        _write_images(tmp_path / (name.removesuffix(".gz")), pixels)
    assert torch.equal(common.load_images(tmp_path)[0], train.unsqueeze(1))


@pytest.mark.parametrize("names", [("train", "test"), ("x_train", "x_test")])
@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC", "N1HW", "NHW1"])
def test_npz_images_are_read(
    common: ModuleType, tmp_path: Path, names: tuple[str, str], layout: str
) -> None:
    channels = 3 if "C" in layout else 1
    arrays = [_pixels(count, channels, 5, 6) for count in (4, 2)]
    stored = {
        "NHW": lambda array: array[:, 0],
        "NCHW": lambda array: array,
        "N1HW": lambda array: array,
        "NHWC": lambda array: np.moveaxis(array, 1, -1),
        "NHW1": lambda array: np.moveaxis(array, 1, -1),
    }[layout]
    named = dict(zip(names, map(stored, arrays), strict=True))
    _write_archive(tmp_path, **named, y_train=np.zeros(3))
    for found, expected in zip(common.load_images(tmp_path), arrays, strict=True):
        assert torch.equal(found, torch.from_numpy(expected))
        assert found.is_contiguous()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train": _pixels(2, 4, 4)},
            "expected arrays train and test or x_train and x_test; got",
        ),
        ({}, "expected arrays train and test or x_train and x_test; got none"),
        (
            {"train": _pixels(2, 4, 4) / 255, "test": _pixels(2, 4, 4)},
            "images.npz: train: expected bytes, dtype uint8; got float64",
        ),
        (
            {"train": _pixels(2, 16), "test": _pixels(2, 16)},
            "expected shape (N, H, W), (N, C, H, W) or (N, H, W, C), with C 1 or 3; got (2, 16)",
        ),
        (
            {"train": _pixels(2, 4, 4, 4), "test": _pixels(2, 4, 4)},
            "with C 1 or 3; got (2, 4, 4, 4)",
        ),
        (
            {"train": _pixels(2, 4, 4), "test": _pixels(2, 4, 5)},
            "images of one size for training and testing; got (2, 1, 4, 4) and (2, 1, 4, 5)",
        ),
        ({"train": _pixels(0, 4, 4), "test": _pixels(2, 4, 4)}, "expected images of one size"),
        (
            {"train": np.array([None]), "test": _pixels(2, 4, 4)},
            "expected an NPZ file; got Object arrays cannot be loaded",
        ),
    ],
)
def test_other_archives_are_named(
    common: ModuleType, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    _write_archive(tmp_path, **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        common.load_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 damaged"])
def test_damaged_archives_are_named(common: ModuleType, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: expected an NPZ file; got "):
        common.load_images(tmp_path)


def test_image_folders_are_unambiguous(common: ModuleType, mnist: Path, npz: Path) -> None:
    (npz / "more.npz").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"expected one NPZ file in .*; got images\.npz, more\.npz"
    ):
        common.load_images(npz)
    (mnist / "fashion-train-images-idx3-ubyte").write_bytes(b"")
    message = (
        r"one IDX file named \*train\*images\*idx3\*, in .*; "
        "got fashion-train-images-idx3-ubyte, train-images-idx3-ubyte"
    )
    with pytest.raises(ValueError, match=message):
        common.load_images(mnist)
    (mnist / "t10k-images-idx3-ubyte").unlink()
    (mnist / "fashion-train-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match=r"\*t10k\*images\*idx3\* or \*test.*; got none"):
        common.load_images(mnist)


@pytest.mark.parametrize("option", ["--epochs", "--latent-dim", "--hidden", "--rank"])
def test_vae_sizes_are_integers(
    vae: ModuleType, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit):
        vae.main([option, "0"])
    assert f"{option}: expected an integer >= 1; got '0'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["svi_guide", "density_digits"])
@pytest.mark.parametrize("value", ["0", "few"])
def test_number_of_steps_is_an_integer(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        request.getfixturevalue(name).main(["--num-steps", value])
    assert f"expected an integer >= 1; got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["svi_guide", "density_digits", "vae", "images_example"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--learning-rate", "-1", "expected a number > 0; got '-1'"),
        ("--learning-rate", "nan", "expected a number > 0; got 'nan'"),
        ("--seed", "x", "invalid int value"),
        ("--device", "nonsense", "no device 'nonsense' here"),
    ],
)
def test_bad_options_are_named(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    name: str,
    option: str,
    value: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        request.getfixturevalue(name).main([option, value])
    assert message in capsys.readouterr().err


def test_late_limits_leave_out_the_start_and_what_is_not_finite(common: ModuleType) -> None:
    curves = {"a": ([0, 1, 2, 3], [100.0, 3.0, math.nan, 1.0]), "b": ([0], [math.inf])}
    assert common.late_limits(curves, skip=0.25) == pytest.approx((0.9, 3.1))
    assert common.late_limits({"b": curves["b"]}, skip=0.25) is None
