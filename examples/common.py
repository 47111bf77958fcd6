"""What both examples need around their subject: options, a table, a result file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch


def positive_int(text: str) -> int:
    """An option's value that is an integer from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1; got {text!r}")
    return value


def positive_float(text: str) -> float:
    """An option's value that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number > 0; got {text!r}")
    return value


def device(text: str) -> torch.device:
    """An option's value that is a device on this machine."""
    try:
        value = torch.device(text)
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {error}") from error
    return value


def make_parser(docstring: str | None, *, output_dir: str) -> argparse.ArgumentParser:
    """A parser with the options of both examples, the docstring as its help.

    :param str output_dir: the default of ``--output-dir``.
    """
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random draws (default 0)")
    parser.add_argument(
        "--device", type=device, default="cpu", help='"cpu" (the default), "cuda", "cuda:1", …'
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(output_dir),
        help=f"where pictures and result.json go (default {output_dir})",
    )
    return parser


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as an aligned table, the keys as its header."""
    lines = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"


def late_limits(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, skip: float
) -> tuple[float, float] | None:
    """Limits of an axis for all but the share ``skip`` of every curve, which is far above the rest.

    None where there is nothing to go by.
    """
    late = [
        value
        for _, values in curves.values()
        for value in values[int(skip * len(values)) :]
        if math.isfinite(value)
    ]
    if not late:
        return None
    margin = 0.05 * (max(late) - min(late)) or 1.0
    return min(late) - margin, max(late) + margin


def write_result(args: argparse.Namespace, table: Sequence[Mapping[str, object]]) -> dict:
    """Write the settings, the versions and the table to ``result.json``; return them."""
    result = {
        "settings": {
            key: value if isinstance(value, int | float | None) else str(value)
            for key, value in sorted(vars(args).items())
        },
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "table": [{key: _json_value(value) for key, value in row.items()} for row in table],
    }
    path = args.output_dir / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _json_value(value: object) -> object:
    """JSON has no NaN and no infinities: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
