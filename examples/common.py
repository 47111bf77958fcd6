"""What the examples need around their subject: options, data, checkpoints, a table, a result."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

#: MNIST's images, as they are named where they are published; there with ".gz" at the end.
MNIST_TRAIN, MNIST_TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
#: What stands in the names of IDX files of images, and what else for training and for testing.
IDX_WORDS = {"train": ("train",), "test": ("t10k", "test")}
#: The names of the arrays in NPZ files, for training and for testing.
NPZ_NAMES = [("train", "test"), ("x_train", "x_test")]
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


def image_folder(text: str) -> Path:
    """An option's value that is a folder with images; see :func:`load_images`."""
    folder = Path(text)
    try:
        load_images(folder)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return folder


def output_folder(text: str) -> Path:
    """An option's value that is a folder, made if it is not there: before any work is done."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make {folder}: {error.strerror}") from error
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
        type=output_folder,
        default=output_dir,
        help=f"where pictures and result.json go (default {output_dir})",
    )
    return parser


def load_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST's images for training and for testing, bytes of shape ``(N, 784)``.

    :param Path folder: has the IDX files, gzipped or not.
    :raises ValueError: if one is not there, or is not an IDX file of images.
    """
    paths = [_find_file(folder, name) for name in (MNIST_TRAIN, MNIST_TEST)]
    train, test = (_read_images(path).flatten(1) for path in paths)
    return train, test


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images for training and for testing, bytes of shape ``(N, C, H, W)``.

    :param Path folder: has two IDX files, gzipped or not, named as those of MNIST and of what
        follows it are, ``…train…images…idx3…`` and ``…t10k…`` or ``…test…images…idx3…``; or one NPZ
        file with the arrays ``train`` and ``test``, or ``x_train`` and ``x_test``: bytes of shape
        ``(N, H, W)``, ``(N, C, H, W)`` or ``(N, H, W, C)``, where C is 1 or 3.
    :raises ValueError: for anything else.
    """
    archives = sorted(folder.glob("*.npz"))
    if len(archives) > 1:
        names = ", ".join(path.name for path in archives)
        raise ValueError(f"expected one NPZ file in {folder}; got {names}")
    if archives:
        train, test = _read_archive(archives[0])
    else:
        paths = [_find_idx(folder, part) for part in IDX_WORDS]
        train, test = (_read_images(path).unsqueeze(1) for path in paths)
    if train.shape[1:] != test.shape[1:] or 0 in train.shape or 0 in test.shape:
        raise ValueError(
            f"{folder}: expected images of one size for training and testing; got "
            f"{tuple(train.shape)} and {tuple(test.shape)}"
        )
    return train, test


def _find_idx(folder: Path, part: str) -> Path:
    words = IDX_WORDS[part]
    found = {
        path.name.removesuffix(".gz"): path
        for path in sorted(folder.glob("*images*idx3*"), reverse=True)  # gzipped ones first
        if any(word in path.name for word in words)
    }
    if len(found) != 1:
        pattern = " or ".join(f"*{word}*images*idx3*" for word in words)
        got = ", ".join(sorted(found)) or "none"
        raise ValueError(
            f"expected an NPZ file, or one IDX file named {pattern}, in {folder}; got {got}"
        )
    return next(iter(found.values()))


def _read_archive(path: Path) -> tuple[Tensor, Tensor]:
    got = "none"
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            got = ", ".join(archive.files) or got
            names = next((pair for pair in NPZ_NAMES if set(pair) <= set(archive.files)), ())
            arrays = {name: archive[name] for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{path}: expected an NPZ file; got {error}") from error
    if not arrays:
        expected = " or ".join(" and ".join(names) for names in NPZ_NAMES)
        raise ValueError(f"{path}: expected arrays {expected}; got {got}")
    train, test = (_as_images(array, f"{path}: {name}") for name, array in arrays.items())
    return train, test


def _as_images(array: np.ndarray, name: str) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: expected bytes, dtype uint8; got {array.dtype}")
    images = torch.from_numpy(array)
    if images.dim() == 3:
        return images.unsqueeze(1)
    if images.dim() == 4 and images.shape[1] in (1, 3):
        return images
    if images.dim() == 4 and images.shape[-1] in (1, 3):
        return images.movedim(-1, 1).contiguous()
    raise ValueError(
        f"{name}: expected shape (N, H, W), (N, C, H, W) or (N, H, W, C), with C 1 or 3; "
        f"got {array.shape}"
    )


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"expected {name} or {name}.gz in {folder}; got neither")


def _read_images(path: Path) -> Tensor:
    """Images of an IDX file, ``(N, H, W)``: a header of four big-endian integers, and the bytes."""
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
    return torch.from_numpy(pixels.reshape(count, height, width).copy())


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


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C does not break off what is being done: the function yielded tells if it was pressed.

    Pressed again, it does.
    """
    is_pressed = False

    def note(*_: object) -> None:
        nonlocal is_pressed
        is_pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: is_pressed
    finally:
        signal.signal(signal.SIGINT, before)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half written, whatever happens meanwhile.

    Until the new content is on the disk, the old file stays as it is.

    :raises SystemExit: if it cannot be written, as on a full disk.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the new name could outlive the content in a power cut
        os.replace(part, path)
        if os.name == "posix":  # elsewhere, folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # of the new name
            finally:
                os.close(folder)
    except BaseException as error:  # Ctrl-C among them
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SystemExit(f"error: cannot write {path}: {error.strerror}") from error
        raise


# All contents are made in memory first: torch.save, for one, reports a full disk as an error of its
# own that says nothing of disks.


def save_state(path: Path, state: Mapping[str, object]) -> None:
    """``torch.save``, by :func:`write_whole`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def save_figure(path: Path, figure: Figure, *, dpi: int = 150) -> None:
    """``figure.savefig``, likewise."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=dpi)
    write_whole(path, buffer.getvalue())


def save_json(path: Path, value: object) -> None:
    """``json.dump``, likewise."""
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())


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
    save_json(args.output_dir / "result.json", result)
    return result


def _json_value(value: object) -> object:
    """JSON has no NaN and no infinities: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
