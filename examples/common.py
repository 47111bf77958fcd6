"""What the examples share: the options of a command line, and where a table and a picture go."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def positive_int(text: str) -> int:
    """An option's value that is an integer from 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1; got {text!r}")
    return int(text)


def output_folder(text: str) -> Path:
    """An option's value that is a folder, made if it is not there: before any work is done."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def make_parser(docstring: str | None, *, num_steps: int) -> argparse.ArgumentParser:
    """A parser with the options of all examples, and the docstring as its help."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=docstring, formatter_class=style)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all random draws (default 0)")
    add("--num-steps", type=positive_int, default=num_steps, help=f"default {num_steps}")
    add("--output-dir", type=output_folder, default="outputs", help="default outputs")
    return parser


def finish(rows: Sequence[Mapping[str, object]], figure: Figure, folder: Path, name: str) -> None:
    """Print the table; write it and the picture to files of this name."""
    table = format_table(rows)
    (folder / f"{name}.txt").write_text(f"{table}\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"{table}\n\nThe picture: {folder / name}.png")


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as an aligned table, the keys as its header."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in cells
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"
