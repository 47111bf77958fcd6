"""What the examples need around their subject: options, data files, a table, a result file."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: MNIST's images, as they are named where they are published; there with ".gz" at the end.
MNIST_TRAIN, MNIST_TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
#: The first four bytes of an IDX file: two zeros, the code of bytes, the number of dimensions.
IDX_IMAGES = 0x0803


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


def mnist_folder(text: str) -> Path:
    """An option's value that is a folder with MNIST's images."""
    folder = Path(text)
    try:
        for name in (MNIST_TRAIN, MNIST_TEST):
            _find_file(folder, name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return folder


def make_parser(docstring: str | None, *, output_dir: str) -> argparse.ArgumentParser:
    """A parser with the options of all examples, the docstring as its help.

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


def load_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST's images for training and for testing, bytes of shape ``(N, 784)``.

    :param Path folder: has the IDX files, gzipped or not.
    :raises ValueError: if one is not there, or is not an IDX file of images.
    """
    train, test = (_read_images(_find_file(folder, name)) for name in (MNIST_TRAIN, MNIST_TEST))
    return train, test


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"expected {name} or {name}.gz in {folder}; got neither")


def _read_images(path: Path) -> Tensor:
    """Images of an IDX file as rows: a header of four big-endian integers, and the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzipped file; got {error}") from error
    magic, count, height, width = struct.unpack(">4I", content[:16].ljust(16, b"\0"))
    if magic != IDX_IMAGES or len(content) != 16 + count * height * width:
        raise ValueError(
            f"{path}: expected an IDX file of images; got {len(content)} bytes, "
            f"the first of them {content[:16].hex()}"
        )
    pixels = np.frombuffer(content, dtype=np.uint8, offset=16)
    return torch.from_numpy(pixels.reshape(count, height * width).copy())


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
