"""Tables and a picture of all results in a folder."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results import markdown_table, spread
from settings import BUDGETS, LOG_DETS, PRESETS, make_settings

Result = dict[str, Any]

#: Test NLL of the paper's tables, in nats, or bits per dimension: mean ± standard deviation.
PAPER = {
    ("fc-mnist", "relative"): "1096.5 ± 0.5",
    ("fc-mnist", "exact"): "947.6 ± 0.2",
    ("fc-mnist", "learned"): "947.1 ± 0.2",
    ("conv-mnist", "emerging"): "645.7 ± 3.6",
    ("conv-mnist", "exponential"): "638.1 ± 1.0",
    ("conv-mnist", "exact"): "637.4 ± 0.2",
    ("conv-mnist", "learned"): "638.6 ± 0.9",
    ("glow-mnist", "exact"): "575.7 ± 0.8",
    ("glow-mnist", "learned"): "575.4 ± 1.4",
}

#: Settings that do not tell sections of the report apart: they are in its rows, or are of machines.
_IN_ROWS = {"log_det", "kernel_size", "seed", "threads", "clock", "device", *BUDGETS}

_COLORS = dict(
    zip(
        LOG_DETS,
        ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#009E73", "#56B4E9"),
        strict=False,
    )
)


def load(folder: Path) -> list[Result]:
    """All results below a folder, in the order of their names.

    :raises ValueError: if there are none.
    """
    paths = sorted({*folder.rglob("result.json"), *folder.glob("*.json")})
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results = [one for one in results if one.get("preset") in PRESETS and len(one["history"]) > 1]
    if not results:
        raise ValueError(f"expected results of runs below {folder}; got none")
    return results


def _sections(results: Sequence[Result]) -> Iterator[tuple[str, str, list[Result]]]:
    """Presets, the options that were given, and the results that have both."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for one in results:
        default = make_settings(one["preset"], {})
        given = {
            name: value
            for name, value in one["settings"].items()
            if name not in _IN_ROWS and value != getattr(default, name)
        }
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        groups.setdefault((one["preset"], options), []).append(one)
    order = list(PRESETS)
    for preset, options in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        yield preset, options, groups[preset, options]


def _rows(results: Sequence[Result], preset: str) -> Iterator[tuple[str, str, list[Result]]]:
    """The label and the log_det of each row, and the results of its seeds."""
    usual = make_settings(preset, {}).kernel_size
    groups: dict[tuple[int, int], list[Result]] = {}
    for one in results:
        key = (LOG_DETS.index(one["settings"]["log_det"]), one["settings"]["kernel_size"])
        groups.setdefault(key, []).append(one)
    for (index, size), ones in sorted(groups.items()):
        label = LOG_DETS[index] + (f", {size} × {size}" if size != usual else "")
        yield label, LOG_DETS[index], ones


def _distance(result: Result, reference: Result) -> float:
    """The largest relative distance of validation at equal steps."""
    exact = {row["num_steps"]: row["validation"] for row in reference["history"]}
    pairs = [
        (row["validation"], exact[row["num_steps"]])
        for row in result["history"]
        if row["num_steps"] > 0 and exact.get(row["num_steps"])
    ]
    return max(((a - b) / b for a, b in pairs if a is not None), key=abs, default=math.nan)


def _recent_gain(result: Result) -> float:
    """Nats of validation that the last tenth of the training time has gained."""
    history = [row for row in result["history"] if row["validation"] is not None]
    before = [row for row in history if row["seconds"] <= 0.9 * history[-1]["seconds"]]
    return before[-1]["validation"] - history[-1]["validation"]


def _table(results: Sequence[Result], preset: str) -> str:
    references = {
        one["settings"]["seed"]: one for one in results if one["settings"]["log_det"] == "exact"
    }
    lines = []
    for label, log_det, ones in _rows(results, preset):
        tests = [one["test"] for one in ones if one.get("test") is not None]
        bits = [one["test_bits_per_dim"] for one in ones if one.get("test") is not None]
        pairs = [(one, references.get(one["settings"]["seed"])) for one in ones]
        distances = [_distance(one, other) for one, other in pairs if other and one is not other]
        distance = max((d for d in distances if math.isfinite(d)), key=abs, default=None)
        steps = statistics.fmean(one["num_steps"] for one in ones)
        seconds = statistics.fmean(one["seconds"] for one in ones)
        epochs = statistics.fmean(one["history"][-1]["epoch"] for one in ones)
        lines.append(
            [
                label,
                ", ".join(str(one["settings"]["seed"]) for one in ones),
                f"{epochs:.1f}",
                f"{seconds / 60:.0f}",
                f"{1e3 * seconds / steps:.1f}",
                spread([one["validation"] for one in ones]),
                spread(tests),
                f"{statistics.fmean(bits):.3f}" if bits else "–",
                "–" if distance is None else f"{distance:+.3%}",
                f"{statistics.fmean(map(_recent_gain, ones)):.2f}",
                PAPER.get((preset, log_det), "–"),
            ]
        )
    header = ["log_det", "seeds", "epochs", "minutes", "ms a step", "validation", "test"]
    header += ["bits/dim", "from exact", "last tenth", "paper"]
    return markdown_table(header, lines)


def _sampling_table(results: Sequence[Result], preset: str) -> str:
    """Of the approximate inverse in one pass, and the true one; empty where there is none."""
    names = ["one_pass_samples_off_by", "one_pass_reconstructions_off_by", "reconstructions_off_by"]
    names += ["one_pass_ms", "exact_ms"]
    lines = []
    for label, _, ones in _rows(results, preset):
        found = [one for one in ones if one.get("one_pass_ms")]
        if found:
            cells = [spread([one[name] for one in found]) for name in names]
            lines.append([label, *cells])
    if not lines:
        return ""
    header = ["log_det", "one pass: samples off by", "reconstructions off by"]
    header += ["true inverse: reconstructions off by", "one pass: ms", "true inverse: ms"]
    return (
        "\n\n24 samples; levels of a pixel, on average, by which they are off:\n\n"
        + markdown_table(header, lines)
    )


def _section(preset: str, options: str, results: Sequence[Result]) -> str:
    command = f"python benchmarks/paper run --preset {preset} {options}".rstrip()
    first = results[0]
    dates = sorted({one["date"][:10] for one in results})
    commits = sorted({str(one["commit"]) for one in results})
    device = first["settings"]["device"]
    origin = (
        f"Torch {first['versions']['torch']}, {first['versions']['machine']}"
        f"{'' if device == 'cpu' else f', {device}'}, time of the "
        f"{first['settings']['clock']}, {' to '.join([dates[0], *dates[1:][-1:]])}, commit "
        f"{', '.join(commits)}."
    )
    tables = f"{_table(results, preset)}{_sampling_table(results, preset)}"
    return f"### {preset}\n\n    {command}\n\n{tables}\n\n{origin}\n"


def write_report(folder: Path, output_dir: Path) -> None:
    """Write results.md and curves.png.

    :raises ValueError: if there are no results.
    """
    sections = list(_sections(load(folder)))
    text = "\n".join(_section(*section) for section in sections)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.md").write_text(text, encoding="utf-8")
    _plot(sections).savefig(output_dir / "curves.png", dpi=110)
    print(text)
    print(f"written: {output_dir / 'results.md'}, {output_dir / 'curves.png'}")


def _plot(sections: Sequence[tuple[str, str, list[Result]]]) -> Figure:
    """Validation NLL against time, a panel for each section with more than one method."""
    several = [one for one in sections if len({label for label, *_ in _rows(one[2], one[0])}) > 1]
    sections = several or sections
    count = Counter(preset for preset, *_ in sections)
    figure = Figure(figsize=(4.6 * min(len(sections), 2), 3.4 * math.ceil(len(sections) / 2)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(math.ceil(len(sections) / 2), min(len(sections), 2), squeeze=False)
    for panel in panels.flat[len(sections) :]:
        panel.set_axis_off()
    for panel, (preset, options, ones) in zip(panels.flat, sections, strict=False):
        late: list[float] = []
        for label, log_det, results in _rows(ones, preset):
            for index, one in enumerate(results):
                rows = [row for row in one["history"] if row["validation"] is not None][1:]
                values = [row["validation"] for row in rows]
                panel.plot(
                    [row["seconds"] / 60 for row in rows],
                    values,
                    color=_COLORS[log_det],
                    linestyle="--" if "×" in label else "-",
                    linewidth=1.2,
                    label=label if index == 0 else None,
                )
                late += values[len(values) // 5 :]
        if late:
            low, high = min(late), max(late)
            panel.set_ylim(low - 0.05 * (high - low) - 0.1, high + 0.05 * (high - low) + 0.1)
        shown = textwrap.fill(f"{preset} {options}" if count[preset] > 1 else preset, 60)
        panel.set_title(shown, fontsize=8)
        panel.set_xlabel("minutes of training")
        panel.set_ylabel("validation NLL (nats)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure
