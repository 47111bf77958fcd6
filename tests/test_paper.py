"""The runner of the paper's experiments: every preset and rival on a slice, resumed bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_snf.images import LogitTransform, dequantize

SMALL = ["--data", "digits", "--num-train", "120", "--num-evaluated", "30", "--batch-size", "40"]
SMALL += ["--clock", "processor"]
SIZES = {
    "fc": [],
    "conv": ["--num-blocks", "2", "--layers-per-block", "1"],
    "glow": ["--num-levels", "1", "--steps-per-level", "1", "--hidden-channels", "4"],
}


@pytest.fixture
def paper(
    benchmark_modules: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """The command, which returns what is in result.json of ``folder``."""
    pytest.importorskip("sklearn")
    import command_line

    monkeypatch.setattr(command_line, "draw", lambda *_: {})  # which takes seconds

    def run(preset: str, *options: str, folder: str = "run") -> Any:
        place = tmp_path / folder
        command_line.main(["run", "--preset", preset, "--output-dir", str(place), *options])
        return json.loads((place / "result.json").read_text(encoding="utf-8"))

    return run


RUNS = [
    *[("fc-mnist", "fc", name) for name in ("refined", "learned", "exact", "slogdet", "relative")],
    *[("conv-mnist", "conv", name) for name in ("learned", "emerging", "exponential")],
    ("glow-mnist", "glow", "refined"),
    ("glow-cifar", "glow", "learned"),
    ("glow-imagenet32", "glow", "exact"),
    ("geco", "glow", "learned"),
]


@pytest.mark.parametrize(("preset", "model", "log_det"), RUNS)
def test_every_preset_goes_on_as_if_not_interrupted(
    paper: Callable[..., Any], tmp_path: Path, preset: str, model: str, log_det: str
) -> None:
    options = [*SMALL, *SIZES[model], "--log-det", log_det, "--warm-up-epochs", "1"]
    if model == "glow":
        options += ["--kernel-size", "3" if preset != "glow-mnist" else "1"]
    averaging = ["--averaging", "1"] if preset in ("fc-mnist", "glow-mnist") else []
    whole = paper(preset, *options, *averaging, "--epochs", "2", folder="whole")
    paper(preset, *options, *averaging, "--epochs", "1")
    again = paper(preset, *options, *averaging, "--epochs", "2", "--resume")
    for result in (whole, again):
        del result["date"], result["seconds"]
        result["history"] = [row | {"seconds": 0} for row in result["history"]]
    assert again == whole
    states = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "run")]
    for name in ("flow", "evaluated"):
        ours, theirs = (state[name] for state in states)
        tensors = [key for key, value in ours.items() if isinstance(value, torch.Tensor)]
        assert ours.keys() == theirs.keys()
        assert len(tensors) > 0
        assert all(torch.equal(ours[key], theirs[key]) for key in tensors)
    assert again["settings"]["log_det"] == log_det
    assert again["settings"]["batch_size"] == 40
    assert set(again["versions"]) >= {"torch", "pyro", "pyro_snf", "python", "numpy"}
    assert [row["epoch"] for row in again["history"]] == [0, 1, 2]
    assert again["num_steps"] == 6
    validation = [row["validation"] for row in again["history"]]
    assert validation[-1] < validation[0] or log_det == "exponential"
    assert again["validation"] == min(validation)
    assert math.isclose(again["test"], again["test_bits_per_dim"] * 64 * math.log(2))


@pytest.mark.parametrize(("model", "log_det"), [("conv", "refined"), ("glow", "emerging")])
def test_pictures(
    benchmark_modules: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    log_det: str,
) -> None:
    pytest.importorskip("sklearn")
    import command_line
    import pictures

    monkeypatch.setattr(pictures, "_COLUMNS", 2)
    options = [*SMALL, *SIZES[model], "--epochs", "1", "--kernel-size", "3", "--log-det", log_det]
    # The averages' one-pass inverse is that of the latest weights.
    options += ["--averaging", "1", "--schedule", "cosine", "--warm-up-epochs", "0"]
    command_line.main(
        ["run", "--preset", f"{model}-mnist", "--output-dir", str(tmp_path), *options]
    )
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    names = {path.name for path in tmp_path.glob("*.png")}
    expected = {"samples.png", "reconstructions.png"}
    if log_det == "refined":
        expected.add("kernels.png")
        assert result["one_pass_ms"] > 0
        assert result["exact_ms"] > 0
        assert result["reconstructions_off_by"] < 0.01
        assert result["reconstructions_off_by"] <= result["one_pass_samples_off_by"] < 1
    assert names == expected


def test_why_a_run_ends(paper: Callable[..., Any]) -> None:
    tiny = [*SMALL, "--epochs", "4"]
    ends = {
        "max_seconds": ["--max-seconds", "1e-6"],
        "patience": ["--patience", "1", "--learning-rate", "0"],
        "diverged": ["--learning-rate", "1e30", "--warm-up-epochs", "0"],
    }
    for reason, options in ends.items():
        result = paper("fc-mnist", *tiny, *options, folder=reason)
        assert result["reason"] == reason
        if reason == "patience":
            assert result["history"][-1]["epoch"] == 1
    assert paper("fc-mnist", *tiny, "--resume", folder="max_seconds")["reason"] == "epochs"
    with pytest.raises(SystemExit, match="expected seed to be 0, as in the checkpoint; got 1"):
        paper("fc-mnist", *tiny, "--resume", "--seed", "1", folder="max_seconds")
    with pytest.raises(SystemExit, match=r"expected no checkpoint in .*; got one"):
        paper("fc-mnist", *tiny, folder="max_seconds")
    with pytest.raises(SystemExit, match="expected a checkpoint to resume from"):
        paper("fc-mnist", *tiny, "--resume", folder="new")
    with pytest.raises(SystemExit, match=r"expected warm_up_epochs below epochs, 4, .* got 10"):
        paper("fc-mnist", *tiny, "--schedule", "cosine", folder="wrong")
    with pytest.raises(SystemExit, match="expected num_blocks for conv only; got fc"):
        paper("fc-mnist", "--num-blocks", "2", folder="wrong")
    with pytest.raises(SystemExit, match="expected geco_rate for learned only; got exact"):
        paper("geco", "--log-det", "exact", "--geco-rate", "0.1", folder="wrong")
    with pytest.raises(SystemExit, match="expected a device of this machine; got 'abacus'"):
        paper("fc-mnist", *tiny, "--device", "abacus", folder="wrong")
    with pytest.raises(SystemExit, match=r"expected .* of kind 'emerging'"):
        paper("fc-mnist", *tiny, "--log-det", "emerging", folder="wrong")


def test_whitened_inputs(paper: Callable[..., Any]) -> None:
    from datasets import load_images
    from models import layers_of
    from settings import make_settings
    from training import Run

    data = load_images("digits", None)
    run = Run(make_settings("fc-mnist", {"inputs": "whitened", "dtype": "float64"}), data)
    generator = torch.Generator().manual_seed(0)  # of the run's seed
    pixels = dequantize(data.train.double(), num_levels=data.num_levels, generator=generator)
    logits = LogitTransform(data.num_levels)(pixels)
    flatten, whitening, *rest = run.flow.parts
    hidden = whitening(flatten(logits))
    assert hidden.mean(0).abs().max() < 1e-9
    assert (torch.cov(hidden.mT) - torch.eye(64)).abs().max() < 1e-9
    expected = -0.5 * torch.linalg.slogdet(torch.cov(logits.flatten(1).mT)).logabsdet
    found = whitening.log_abs_det_jacobian(flatten(logits), hidden)
    assert math.isclose(found[0].item(), expected.item(), abs_tol=1e-8)
    assert [layer in rest for layer in layers_of(run.flow)] == [True, True]
    before = whitening.weight.clone()
    for _ in range(3):
        run.step()
    assert torch.equal(whitening.weight, before)

    result = paper("fc-mnist", *SMALL, "--inputs", "whitened", "--epochs", "2")
    plain = paper("fc-mnist", *SMALL, "--epochs", "2", folder="plain")
    assert result["validation"] < plain["validation"]
    with pytest.raises(SystemExit, match="expected inputs for fc only; got conv"):
        paper("conv-mnist", *SMALL, "--inputs", "whitened", folder="conv")
    with pytest.raises(SystemExit, match=r"expected more training images than pixels .* got 50"):
        paper("fc-mnist", *SMALL, "--inputs", "whitened", "--num-train", "50", folder="few")


def test_schedule_and_average(paper: Callable[..., Any]) -> None:
    from datasets import load_images
    from settings import make_settings
    from training import Run

    options = {"data": "digits", "num_train": 40, "batch_size": 10, "num_evaluated": 10}
    options |= {"epochs": 5, "warm_up_epochs": 1.0, "schedule": "cosine", "averaging": 0.5}
    run = Run(make_settings("fc-mnist", {**options, "learning_rate": 0.1}), load_images("digits"))
    rates, weights = [], []
    for _ in range(20):
        rates.append(run.learning_rate())
        run.step()
        weights.append(run.flow.parts[1].theta.detach().clone())
    expected = [0.1 * (step + 1) / 4 for step in range(4)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(expected)
    average = weights[0]
    for number, weight in enumerate(weights[1:], start=2):
        average = average.lerp(weight, 1 / min(number, 2))
    assert torch.allclose(run.evaluated.parts[1].theta, average, atol=1e-6)


def test_report(paper: Callable[..., Any], tmp_path: Path) -> None:
    import command_line

    for log_det in ("exact", "refined"):
        for seed in ("0", "1"):
            options = [*SMALL, "--epochs", "2", "--log-det", log_det, "--seed", seed]
            paper("fc-mnist", *options, folder=f"all/{log_det}-{seed}")
    command_line.main(["report", str(tmp_path / "all")])
    text = (tmp_path / "all" / "results.md").read_text(encoding="utf-8")
    assert "--preset fc-mnist --data digits --num-train 120 --num-evaluated 30" in text
    lines = [line.split("|") for line in text.splitlines() if "|" in line]
    rows = {cells[1].strip(): cells for cells in lines}
    assert {"exact", "refined"} <= set(rows)
    assert rows["refined"][2].strip() == "0, 1"
    assert rows["refined"][-2].strip() == "–"
    assert rows["exact"][-2].strip() == "947.6 ± 0.2"
    assert "%" in rows["refined"][-4]
    assert "±" in rows["refined"][-6]
    assert (tmp_path / "all" / "curves.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="expected results of runs below"):
        command_line.main(["report", str(tmp_path / "none")])
