"""The examples run, and what they compute is what they say."""

from __future__ import annotations

import csv
import errno
import gzip
import importlib
import itertools
import json
import math
import os
import re
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

EXAMPLES = ["svi_guide", "density_digits", "amortized", "images", "distributed"]

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
MODULES = {name: importlib.import_module(name) for name in EXAMPLES}
svi_guide, density_digits, amortized, images, _ = MODULES.values()
common = importlib.import_module("common")

PICTURES = {
    "svi_guide": {"intensity.png"},
    "density_digits": {"test_nll.png", "samples.png"},
    "amortized": {"posterior.png"},
    "images": {"samples.png", "reconstructions.png", "kernels.png", "curves.png"},
}
SMALL_GLOW = "--model glow --steps-per-level 1 --hidden-channels 4"

# Pyro warns of it.
LOSS_IS_NAN = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")

# An empty picture with its axes takes a few thousand bytes.
MIN_PNG_BYTES = 10_000

# What is added to the diagonal of the covariance, for its factorization.
JITTER = 1e-6


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to evaluate and to draw."""
    monkeypatch.setattr(amortized, "NUM_TEST", 50)
    monkeypatch.setattr(images, "COLUMNS", 3)


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write(folder: Path, files: dict[str, bytes | np.ndarray | dict[str, np.ndarray]]) -> Path:
    """Write bytes as they are, an array as an IDX file, and several as an NPZ file."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict):
            np.savez(folder / name, **content)
            continue
        if isinstance(content, np.ndarray):
            content = struct.pack(">4I", 0x0803, *content.shape) + content.tobytes()
            content = gzip.compress(content) if name.endswith(".gz") else content
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder as MNIST's, with images of 4 × 4: 12 for training, gzipped, and 5 for testing."""
    train, test = np.split(np.arange(17 * 16, dtype=np.uint8).reshape(17, 4, 4), [12])
    files = {"train-images-idx3-ubyte.gz": train, "t10k-images-idx3-ubyte": test}
    return _write(tmp_path / "mnist", files)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """A folder with coloured images of 4 × 4 in an NPZ file: 12 for training and 5 for testing."""
    arrays = {"x_train": _pixels(12, 4, 4, 3), "x_test": _pixels(5, 4, 4, 3, seed=1)}
    return _write(tmp_path / "npz", {"images.npz": arrays})


@pytest.fixture
def run(mnist: Path, npz: Path, tmp_path: Path) -> Any:
    """Run an example by its command line, names in capitals being folders; the rows it prints."""
    odd = _write(
        tmp_path / "odd", {"a.npz": {"train": _pixels(12, 5, 5), "test": _pixels(3, 5, 5)}}
    )
    folders = {"MNIST": str(mnist), "NPZ": str(npz), "ODD": str(odd)}
    folder = tmp_path / "new" / "folder"

    def call(name: str, options: str) -> list[dict[str, Any]]:
        words = [folders.get(word, word) for word in options.split()]
        result = MODULES[name].main([*words, "--seed", "3", "--output-dir", str(folder)])
        assert json.loads((folder / "result.json").read_text()) == result
        assert set(result) == {"settings", "torch", "date", "table"}
        assert result["settings"]["seed"] == 3
        assert {path.name for path in folder.glob("*.png")} == PICTURES[name]
        for picture in PICTURES[name]:
            content = (folder / picture).read_bytes()
            assert content.startswith(b"\x89PNG")
            assert len(content) > MIN_PNG_BYTES
        return result["table"]

    return call


# --- Whole runs ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the loss was still falling:UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("svi_guide", "--num-steps 100"),
        ("density_digits", "--num-steps 30"),
        ("amortized", "--num-steps 80"),
        ("images", "--epochs 2"),
        ("images", "--epochs 2 --log-det learned --activation smooth_leaky_relu"),
        ("images", "--epochs 2 --model fc --log-det exact --data-dir MNIST"),
        ("images", f"--epochs 2 {SMALL_GLOW}"),
        ("images", "--epochs 2 --log-det learned --reconstruction-weight 3 --data-dir NPZ"),
        ("images", f"--epochs 2 {SMALL_GLOW} --log-det learned --data-dir NPZ"),
    ],
)
def test_examples_run(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, options: str
) -> None:
    rows = run(name, options)
    printed = capsys.readouterr().out
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        assert row["seconds" if name == "svi_guide" else "ms/step"] > 0
        assert all(value in printed for value in row.values() if isinstance(value, str))
    if name == "images":
        assert "Exact NLL of" in printed
        assert "inverse error  estimate  factorized" in printed  # of the diagnostics
    _check(name, rows, tmp_path / "new" / "folder")


def _check(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    if name == "svi_guide":
        assert [row["guide"] for row in rows] == ["AutoSelfNormalizingFlow", "AutoNormal"]
        # After 100 steps, both are far from the posterior, but not equally far.
        assert rows[0]["-ELBO (nats)"] < rows[1]["-ELBO (nats)"] - 50
        assert 0 < rows[0]["gap"] < rows[1]["gap"]
    if name == "density_digits":
        assert [row["log_det"] for row in rows] == ["exact", "refined", "learned"]
        nats = [row["test NLL (nats)"] for row in rows]
        assert [row["bits/dim"] * 64 * math.log(2) for row in rows] == pytest.approx(nats)
        assert max(nats) < 64 * math.log(17)  # better than uniform over the 17 levels
        # The tracked inverse follows the exact gradient from the first step.
        assert nats[1] == pytest.approx(nats[0], rel=1e-3)
        assert rows[0]["inverse error"] < 1e-12
    if name == "amortized":
        assert [row["posterior"] for row in rows] == list(amortized.RANKS)
        mean_field, *dense = (row["-log q"] for row in rows)
        bound = max(row["bound"] for row in rows)
        assert bound < max(dense) < mean_field - 5
        assert all(0 <= row[name] <= 1 for row in rows for name in ("ellipsoids", "intervals"))
    if name == "images":
        (row,) = rows
        data_dir = json.loads((folder / "result.json").read_text())["settings"]["data_dir"]
        dim = {"mnist": 16, "npz": 48, "None": 64}[Path(str(data_dir)).name]
        nats = row["test NLL (nats)"]
        assert row["bits/dim"] * dim * math.log(2) == pytest.approx(nats, rel=1e-6)
        assert row["exact reconstructions off by"] == 0
        assert (folder / "checkpoint.pt").is_file()
        with (folder / "history.csv").open() as file:
            history = list(csv.DictReader(file))
        assert [float(epoch["epoch"]) for epoch in history] == [0, 1, 2]
        best = min(float(epoch["validation"]) for epoch in history)
        assert row["validation NLL"] == pytest.approx(best, rel=1e-12)


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in a step of Adam, of all that the example takes."""
    take_step, calls = torch.optim.Adam.step, itertools.count(1)

    def interrupted(self: Any, *args: Any) -> Any:
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return take_step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("density_digits", "--num-steps 1000", 20),
        ("images", "--epochs 99 --data-dir NPZ --batch-size 5", 1),
    ],
)
def test_interrupted_examples_go_on_with_what_they_have(
    run: Any, monkeypatch: pytest.MonkeyPatch, name: str, options: str, step: int
) -> None:
    _interrupt(monkeypatch, step)
    rows = run(name, options)
    if name == "density_digits":
        assert all(row["at step"] <= 7 for row in rows)
    if name == "images":  # once more, of the same flow: no epoch is left to train
        assert run(name, options.replace("99", "1") + " --resume")[0]["at epoch"] in (0, 1)


def test_a_second_interrupt_is_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    with common.deferred_interrupt() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@LOSS_IS_NAN
def test_training_ends_where_a_loss_is_not_finite(run: Any) -> None:
    message = r"the loss is (nan|inf|-inf) in step \d+; try a --learning-rate below 1e\+200"
    with pytest.raises(SystemExit, match=message):
        run("images", "--learning-rate 1e200 --warm-up-epochs 1")


@pytest.mark.parametrize("name", EXAMPLES)
def test_numbers_in_options_are_positive(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        MODULES[name].main(["--help"])
    found = set(re.findall(r"  (--[a-z-]+) [A-Z_]+\b", capsys.readouterr().out))
    numbers = found - {"--seed", "--device", "--output-dir", "--data-dir"}
    assert numbers & {"--batch-size", "--num-steps"}
    for option in numbers:
        for value in ("0", "-1", "nan", "few"):
            with pytest.raises(SystemExit):
                MODULES[name].main([option, value])
            message = rf"{option}: expected (an integer >= 1|a number > 0); got '{value}'"
            assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[(name, "--device nonsense", "no device 'nonsense' here") for name in EXAMPLES],
        ("images", "--model glow --activation spline", "with --model fc only; got glow"),
        ("images", "--hidden-channels 3", "--hidden-channels with --model glow only; got conv"),
        ("images", "--data-dir nowhere", "expected an NPZ file, or one IDX file named *train*im"),
        ("distributed", "--num-steps 1", "expected to be started by torchrun"),
        ("images", "--resume", "expected a checkpoint to resume from; got no "),
        ("images", "--model glow --data-dir ODD", "error: level 1 of 2: "),
        ("images", "--model glow --data-dir ODD", "expected H and W divisible by 2"),
    ],
)
def test_bad_options_are_named(
    run: Any, capsys: pytest.CaptureFixture[str], name: str, options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run(name, options)
    assert message in f"{error.value} {' '.join(capsys.readouterr().err.split())}"


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


def test_epidemics_are_random_walks() -> None:
    theta, x = amortized.Epidemic().simulate(4000)
    assert (theta.shape, x.shape) == ((4000, 48), (4000, 26))
    # Means and standard deviations of 4000, or of 47 times as many, within 5 standard errors.
    assert abs(theta[:, 0].mean() - math.log(30)) < 5 * 1.5 / 4000**0.5
    assert theta[:, 0].std() == pytest.approx(1.5, rel=5 / 8000**0.5)
    assert theta.diff(dim=1).std() == pytest.approx(0.4, rel=5 / (2 * 47 * 4000) ** 0.5)


# --- Densities of images ------------------------------------------------------------------------


def test_digits() -> None:
    digits = density_digits.load_data()
    assert [part.shape for part in digits] == [(1297, 64), (250, 64), (250, 64)]
    assert all(map(torch.equal, digits, density_digits.load_data()))
    assert torch.cat(digits).aminmax() == (0, 16)
    flow = density_digits.make_flow("refined")
    samples = density_digits.sample_images(flow, 5, seed=0)
    assert samples.shape == (5, 8, 8)
    assert torch.equal(samples, samples.round().clamp(0, 16))
    assert torch.equal(samples, density_digits.sample_images(flow, 5, seed=0))


def _images_run(folder: Path, options: str = "") -> Any:
    fixed = "--warm-up-epochs 1 --batch-size 5 --output-dir"
    words = [*fixed.split(), str(folder), "--data-dir", str(folder), *options.split()]
    return images.make_run(images.parse_args(words), folder / "checkpoint.pt")


@pytest.mark.parametrize("name", ["density_digits", "images"])
def test_densities_of_pixels_count_every_jacobian(name: str, mnist: Path) -> None:
    if name == "images":
        example = _images_run(mnist, "--log-det exact")
        flow, density, levels = example.flow, example.density, 256
        pixels = example.data.test[:1].double() + 0.5
    else:
        flow, levels = density_digits.make_flow("exact"), 17
        density = density_digits.make_density(flow)
        pixels = density_digits.load_data().test[:1]
        pixels = density_digits.dequantize(pixels, torch.Generator().manual_seed(0))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def to_latent(x: Tensor) -> Tensor:
        return flow(torch.logit((x / levels + 1e-6) * (1 - 2e-6)))

    jacobian = torch.autograd.functional.jacobian(to_latent, pixels)
    jacobian = jacobian.view(pixels.numel(), pixels.numel())
    expected = dist.Normal(0.0, 1.0).log_prob(to_latent(pixels)).sum()
    expected = expected + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(density.log_prob(pixels)[0], expected)


def test_evaluation_is_always_the_same(npz: Path) -> None:
    losses = set()
    for seed in ("0", "1"):
        example = _images_run(npz, f"--seed {seed}")
        losses |= {example.negative_log_likelihood(example.data.test) for _ in range(2)}
        assert example.flow.training
    assert len(losses) == 1


@pytest.mark.parametrize(
    "options",
    ["", "--log-det learned", "--model fc", "--model fc --log-det exact", SMALL_GLOW],
)
@pytest.mark.parametrize("last_step", [2, 5])  # at the end of an epoch of two, and in the middle
def test_resumed_runs_go_on_as_if_nothing_had_happened(
    npz: Path, monkeypatch: pytest.MonkeyPatch, options: str, last_step: int
) -> None:
    def train(more: str = "") -> Any:
        example = _images_run(npz, f"{options} {more}")
        path = npz / "checkpoint.pt"
        images.train(example, num_epochs=4, checkpoint=path, show_progress=False)
        return example

    expected = train()
    with monkeypatch.context() as context:
        _interrupt(context, last_step)
        example = train()
    assert example.num_steps == last_step
    assert example.history[-1].epoch == last_step / 2
    resumed = train("--resume")
    assert resumed.num_steps == expected.num_steps == 8
    assert resumed.seconds > 0
    for one, other in zip(resumed.history, expected.history, strict=True):
        assert one[:-1] == pytest.approx(other[:-1], rel=1e-9, nan_ok=True)
    assert resumed.best[:2] == pytest.approx(expected.best[:2], rel=1e-9)
    parameters, others = (dict(one.flow.named_parameters()) for one in (resumed, expected))
    torch.testing.assert_close(parameters, others, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resumed.best.state, expected.best.state, equal_nan=True)


def test_resume_needs_the_same_settings(run: Any) -> None:
    run("images", "--epochs 1 --data-dir NPZ")
    for options, message in {
        "NPZ --model fc": "expected model to be 'conv', as in the checkpoint; got 'fc'",
        "NPZ --batch-size 4": "expected batch_size to be 100, as in the checkpoint; got 4",
        "MNIST": "expected images to be [[10, 3, 4, 4], ",
    }.items():
        with pytest.raises(SystemExit, match=re.escape(message)):
            run("images", f"--resume --data-dir {options}")


def test_runs_whose_process_was_killed_go_on_from_the_latest_epoch(npz: Path) -> None:
    path = npz / "checkpoint.pt"

    def train(num_epochs: int, more: str = "") -> Any:
        example = _images_run(npz, f"--model fc --log-det exact {more}")
        images.train(example, num_epochs=num_epochs, checkpoint=path, show_progress=False)
        return example

    expected = train(3)
    for num_epochs in (0, 2):  # before the end of the first epoch, and after that of the second
        train(num_epochs)
        path.with_name("checkpoint.pt.part").write_bytes(b"what was begun of the next")
        resumed = train(3, "--resume")
        assert [one[:-1] for one in resumed.history[1:]] == [
            one[:-1] for one in expected.history[1:]
        ]
        for one, other in zip(resumed.flow.parameters(), expected.flow.parameters(), strict=True):
            assert torch.equal(one, other)
        assert [one.name for one in npz.glob("checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_damaged_checkpoints_are_named(run: Any, tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "new" / "folder" / "checkpoint.pt"
    common.output_folder(str(path.parent))
    common.save_state(path, {"flow": torch.zeros(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(SystemExit, match="pt: expected a whole checkpoint; got "):
        run("images", "--resume --data-dir NPZ")


# --- Files that are written ---------------------------------------------------------------------


def _fail(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_files_that_cannot_be_written_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    path = tmp_path / "checkpoint.pt"
    common.save_state(path, {"step": 1})
    is_interrupt = isinstance(error, KeyboardInterrupt)
    expected = KeyboardInterrupt if is_interrupt else SystemExit
    message = "^$" if is_interrupt else r"^error: cannot write .*checkpoint.pt: No space left on"
    with monkeypatch.context() as context:
        context.setattr(os, function, _fail(error))
        with pytest.raises(expected, match=message):
            common.save_state(path, {"step": 2})
    with pytest.raises(AttributeError, match=r"pickle|local object"):
        common.save_state(path, {"step": lambda: 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of Unix")
def test_a_write_that_breaks_off_leaves_the_file_whole(tmp_path: Path) -> None:
    import resource

    path, size = tmp_path / "checkpoint.pt", 2**23
    common.write_whole(path, b"whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(SystemExit, match=r"error: cannot write .*: File too large"):
            common.write_whole(path, bytes(2 * size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disks_end_a_run_with_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, replace = tmp_path / "new" / "folder", os.replace
    for room in range(3):  # of files: two checkpoints, and then history.csv
        left = iter(range(room))

        def write(*paths: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise NO_SPACE
            replace(*paths)

        with monkeypatch.context() as context:
            context.setattr(os, "replace", write)
            with pytest.raises(SystemExit, match=r"^error: cannot write .*: No space left"):
                run("images", "--epochs 1 --data-dir NPZ")
        assert not list(folder.glob("*.part"))
        if room:
            checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
            assert checkpoint["num_steps"] == (room > 1)


def test_folders_that_cannot_be_made_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        images.main(["--output-dir", str(tmp_path / "file")])
    assert "--output-dir: cannot make " in capsys.readouterr().err


def test_pictures_leave_the_layers_as_they_are(npz: Path) -> None:
    example = _images_run(npz, "--log-det learned")
    layers = images.layers_of(example.flow)
    for layer in layers:
        torch.nn.init.normal_(layer.theta, std=0.5)
    latents = images.encode(example, example.data.test)
    draws = [images.draw_latents(example, 7, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    for method in ("one_pass", "exact"):
        pixels = images.decode(example, latents, method)
        assert torch.equal(pixels, example.data.test) == (method == "exact")
        assert {layer.inverse for layer in layers} == {"iterative"}
        assert images.decode(example, draws[0], method).shape == (7, 3, 4, 4)


@pytest.mark.parametrize("model", ["fc", "conv", "glow"])
def test_kernels_are_those_of_the_layers(npz: Path, model: str) -> None:
    rows = images.kernel_rows(_images_run(npz, f"--model {model}"))
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


def test_as_many_blocks_as_fit() -> None:
    shapes = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (1, 4, 4), (1, 7, 7), (1, 12, 8), (1, 30, 30)]
    counts = [images._num_blocks(torch.Size(shape)) for shape in shapes]
    assert counts == [3, 2, 3, 1, 1, 2, 2]


def test_late_limits_leave_out_the_start_and_what_is_not_finite() -> None:
    curves = {"a": ([0, 1, 2, 3], [100.0, 3.0, math.nan, 1.0]), "b": ([0], [math.inf])}
    assert common.late_limits(curves, skip=0.25) == pytest.approx((0.9, 3.1))
    assert common.late_limits({"b": curves["b"]}, skip=0.25) is None


# --- Files of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "emnist-letters-"])
@pytest.mark.parametrize("parts", [("train", "t10k"), ("train", "test")])
@pytest.mark.parametrize(
    "end", ["-images-idx3-ubyte", "-images-idx3-ubyte.gz", "-images.idx3-ubyte"]
)
def test_idx_images_are_read(tmp_path: Path, kind: str, parts: tuple[str, str], end: str) -> None:
    pixels = {f"{kind}{part}{end}": _pixels(4 + index, 5, 6) for index, part in enumerate(parts)}
    labels = {name.replace("images", "labels").replace("idx3", "idx1"): b"" for name in pixels}
    _write(tmp_path, pixels | labels)
    for _ in range(2):
        for found, expected in zip(common.load_images(tmp_path), pixels.values(), strict=True):
            assert torch.equal(found, torch.from_numpy(expected).unsqueeze(1))
        # Gzipped or not, it is one file.
        _write(tmp_path, {name.removesuffix(".gz"): array for name, array in pixels.items()})
    if (kind, parts[1]) == ("", "t10k") and "-idx3" in end:
        for found, expected in zip(common.load_mnist(tmp_path), pixels.values(), strict=True):
            assert torch.equal(found, torch.from_numpy(expected).flatten(1))


@pytest.mark.parametrize("names", [("train", "test"), ("x_train", "x_test")])
@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC", "N1HW", "NHW1"])
def test_npz_images_are_read(tmp_path: Path, names: tuple[str, str], layout: str) -> None:
    arrays = [_pixels(count, 3 if "C" in layout else 1, 5, 6) for count in (4, 2)]
    last = layout in ("NHWC", "NHW1")
    stored = [np.moveaxis(array, 1, -1) if last else array for array in arrays]
    stored = [array[:, 0] for array in arrays] if layout == "NHW" else stored
    content = dict(zip(names, stored, strict=True)) | {"y_train": np.zeros(3)}
    _write(tmp_path, {"a.npz": content})
    for found, expected in zip(common.load_images(tmp_path), arrays, strict=True):
        assert torch.equal(found, torch.from_numpy(expected))
        assert found.is_contiguous()


TRAIN, TEST, SMALL = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte", _pixels(2, 4, 4)
GOOD = {TRAIN: SMALL, TEST: SMALL}
ARRAYS = "expected arrays train and test or x_train and x_test; got "


def _npz(train: np.ndarray) -> dict[str, Any]:
    return {"a.npz": {"train": train, "test": SMALL}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (GOOD | {TEST: b""}, "expected an IDX file of images; got 0 bytes"),
        (GOOD | {TEST: struct.pack(">4I", 0x0801, 1, 1, 1)}, "the first of them 00000801"),
        (GOOD | {TEST: struct.pack(">4I", 0x0803, 2, 1, 1)}, "an IDX file of images; got 16 byte"),
        ({f"{TRAIN}.gz": b"no gzip", TEST: SMALL}, "expected a gzipped file; got"),
        ({f"{TRAIN}.gz": gzip.compress(b"x")[:-9], TEST: SMALL}, "expected a gzipped file; got"),
        ({TRAIN: SMALL}, "an NPZ file, or one IDX file named *t10k*images*idx3* or *test*"),
        (GOOD | {f"fashion-{TRAIN}": SMALL}, f"got fashion-{TRAIN}, {TRAIN}"),
        ({"a.npz": b"", "b.npz": b""}, "; got a.npz, b.npz"),
        ({"a.npz": b""}, "a.npz: expected an NPZ file; got "),
        ({"a.npz": b"no archive"}, "a.npz: expected an NPZ file; got "),
        ({"a.npz": b"PK\x03\x04 damaged"}, "a.npz: expected an NPZ file; got "),
        ({"a.npz": {"train": SMALL}}, f"{ARRAYS}train"),
        ({"a.npz": {}}, f"{ARRAYS}none"),
        (_npz(np.array([None])), "expected an NPZ file; got Object arrays cannot be loaded"),
        (_npz(SMALL / 255), "a.npz: train: expected bytes, dtype uint8; got float64"),
        (_npz(_pixels(2, 16)), "(N, C, H, W) or (N, H, W, C), with C 1 or 3; got (2, 16)"),
        (_npz(_pixels(2, 4, 4, 4)), "with C 1 or 3; got (2, 4, 4, 4)"),
        (_npz(_pixels(2, 4, 5)), "for training and testing; got (2, 1, 4, 5) and (2, 1, 4, 4)"),
        (_npz(SMALL[:0]), "expected images of one size for training and testing"),
    ],
)
def test_other_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    _write(tmp_path, files)
    with pytest.raises(ValueError, match=re.escape(message)):
        common.load_images(tmp_path)
    if "IDX file of" in message or "gzip" in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            common.load_mnist(tmp_path)
