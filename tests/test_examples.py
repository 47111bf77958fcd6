"""The examples run, and what they compute is what they say."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

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
def vae(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pyro.settings.context(module_local_params=True):
        yield importlib.import_module("vae")


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
        squeeze = density_digits.SQUEEZE
        unit = (pixels / 17 + squeeze) * (1 - 2 * squeeze)
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


@pytest.mark.parametrize("name", ["svi_guide", "density_digits", "vae"])
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
