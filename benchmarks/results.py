"""Results as JSON lines in a file, to which they are appended as they come, and Markdown tables."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "append",
    "load",
    "markdown_table",
    "number",
    "print_header",
    "print_row",
    "print_table",
    "select",
    "slope",
    "spread",
]

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """The results so far; not the beginning of a line, which a killed process may have left."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def append(path: Path, row: Row) -> None:
    """Add a result, and print it."""
    print(row, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # see load
        file.write(f"{json.dumps(row)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def markdown_table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells as a table."""
    return "\n".join([_line(header), f"{'|---' * len(header)}|", *map(_line, rows)])


def print_table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table, and an empty line before it."""
    print(f"\n{markdown_table(header, rows)}", flush=True)


def print_header(*cells: object) -> None:
    """The same of a table whose rows come one by one, by :func:`print_row`."""
    print_table(cells, [])


def print_row(*cells: object) -> None:
    """Print the next row."""
    print(_line(cells), flush=True)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float) -> str:
    """Three digits at least, two of them after the point; infinite is what has diverged."""
    if not math.isfinite(value):
        return "diverged"
    if 0 < abs(value) < 0.01:
        return f"{value:.1g}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    is_finite = len(values) > 1 and math.isfinite(mean)
    return number(mean) + (f" ± {number(statistics.stdev(values))}" if is_finite else "")


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The power of x that y grows with: the slope of log y against log x; None of fewer than 2."""
    if len(points) < 2:
        return None
    return float(np.polyfit(*np.log(points).T, 1)[0])
