"""Images for training, validation and testing, as bytes, from folders of files as published.

    digits        scikit-learn's, 8 × 8, 17 levels; needs no folder
    mnist         the IDX files, gzipped or not: also Fashion-MNIST and others with these names
    cifar10       the pickles for Python, in the folder, in cifar-10-batches-py there, or in
                  cifar-10-python.tar.gz; read without executing them
    imagenet32    the NPZ files of downsampled ImageNet, in the folder, or in Imagenet32_train_npz
                  and Imagenet32_val_npz there; 3.9 GB of memory
    folder        any two IDX files, or one NPZ file; see below

Of the published files, 50,000, 10,000 and 10,000 images of MNIST are for training, validation and
testing, 45,000, 5,000 and 10,000 of CIFAR-10, and 1,217,109, 64,058 and 50,000 of ImageNet-32,
whose official validation set is the test set here. Those for validation are the last of the
training files, but for the digits, which are shuffled, always alike.

The IDX files of "folder" are named as those of MNIST and of what follows it are,
``…train…images…idx3…`` and ``…t10k…`` or ``…test…images…idx3…``. The NPZ file has the arrays
``train`` and ``test``, or ``x_train`` and ``x_test``: bytes of shape ``(N, H, W)``,
``(N, C, H, W)`` or ``(N, H, W, C)``, where C is 1 or 3.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "Images", "load_images"]

#: MNIST's images, as they are named where they are published; there with ".gz" at the end.
MNIST_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
CIFAR10_TRAIN, CIFAR10_TEST = [f"data_batch_{number}" for number in range(1, 6)], "test_batch"
CIFAR10_FOLDER, CIFAR10_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
IMAGENET32_TRAIN = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
IMAGENET32_TEST = "val_data.npz"
IMAGENET32_FOLDERS = {"train": "Imagenet32_train_npz", "test": "Imagenet32_val_npz"}
#: Of CIFAR-10 and ImageNet-32: a row has all of red, then all of green, then all of blue.
ROW_SHAPE = (3, 32, 32)
ROW_SIZE = 3 * 32 * 32

#: What stands in the names of IDX files of images, and what else for training and for testing.
IDX_WORDS = {"train": ("train",), "test": ("t10k", "test")}
#: The first four bytes of an IDX file: two zeros, the code of bytes, the number of dimensions.
IDX_IMAGES = 0x0803
#: The names of the arrays in NPZ files, for training and for testing.
NPZ_NAMES = [("train", "test"), ("x_train", "x_test")]

#: Of the 1797 digits; the rest is for training.
NUM_DIGITS = 250
#: Bytes that are decompressed at a time: few, next to the images.
CHUNK = 2**24


class Images(NamedTuple):
    """Bytes of shape ``(N, C, H, W)``."""

    train: Tensor
    validation: Tensor
    test: Tensor
    num_levels: int
    """L; pixels are from 0 to L − 1."""

    @property
    def event_shape(self) -> torch.Size:
        """``(C, H, W)``."""
        return self.train.shape[1:]


def load_images(name: str, data_dir: Path | None = None) -> Images:
    """The images of one of :data:`NAMES`, which are described above.

    :param Path data_dir: the folder with the files; the digits need none.
    :raises ValueError: for another name, without a folder, and for files that are missing, damaged,
        or of another kind.
    """
    if name not in NAMES:
        raise ValueError(f"expected name to be one of {', '.join(NAMES)}; got {name!r}")
    if name == "digits":
        return _digits()
    if data_dir is None:
        raise ValueError(f"{name}: expected data_dir, the folder with its files; got None")
    return LOADERS[name](Path(data_dir))


def _digits() -> Images:
    from sklearn.datasets import load_digits  # an extra, which the other images do not need

    pixels = torch.as_tensor(load_digits().images, dtype=torch.uint8).unsqueeze(1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    sizes = [len(pixels) - 2 * NUM_DIGITS, NUM_DIGITS, NUM_DIGITS]
    return Images(*pixels[order].split(sizes), num_levels=17)


def _split(train: Tensor, test: Tensor, denominator: int, folder: Path) -> Images:
    """One of so many training images, the last ones, is for validation; there are no copies."""
    if train.shape[1:] != test.shape[1:] or 0 in test.shape or len(train) < 2:
        raise ValueError(
            f"{folder}: expected images of one size, two for training and one for testing at "
            f"least; got {tuple(train.shape)} and {tuple(test.shape)}"
        )
    count = max(len(train) // denominator, 1)
    return Images(train[:-count], train[-count:], test, num_levels=256)


def _find_file(*candidates: Path) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"expected the file {' or '.join(map(str, candidates))}; got none")


# --- IDX and NPZ files --------------------------------------------------------------------------


def _mnist(folder: Path) -> Images:
    paths = [_find_file(folder / name, folder / f"{name}.gz") for name in MNIST_FILES]
    train, test = (_read_idx(path) for path in paths)
    return _split(train, test, 6, folder)


def _folder(folder: Path) -> Images:
    archives = sorted(folder.glob("*.npz"))
    if len(archives) > 1:
        names = ", ".join(path.name for path in archives)
        raise ValueError(f"expected one NPZ file in {folder}; got {names}")
    if archives:
        train, test = _read_npz(archives[0])
    else:
        train, test = (_read_idx(path) for path in [_find_idx(folder, part) for part in IDX_WORDS])
    return _split(train, test, 6, folder)


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


def _read_idx(path: Path) -> Tensor:
    """``(N, 1, H, W)``. The file has four big-endian integers, of which three are N, H and W."""
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
    return torch.from_numpy(pixels.reshape(count, 1, height, width).copy())


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
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


# --- CIFAR-10 -----------------------------------------------------------------------------------


def _cifar10(folder: Path) -> Images:
    content = _cifar10_files(folder)
    arrays = {name: _read_pickle(f"{folder}: {name}", content[name]) for name in content}
    test = arrays.pop(CIFAR10_TEST)
    parts = (
        np.concatenate([arrays[name] for name in CIFAR10_TRAIN]),
        test.copy(),
    )  # frombuffer's is not writable
    train, test = (torch.from_numpy(part).view(-1, *ROW_SHAPE) for part in parts)
    return _split(train, test, 10, folder)


def _cifar10_files(folder: Path) -> dict[str, bytes]:
    """The content of each file, from where they are found first."""
    names = [*CIFAR10_TRAIN, CIFAR10_TEST]
    for place in (folder, folder / CIFAR10_FOLDER):
        if (place / names[0]).is_file():
            return {name: _find_file(place / name).read_bytes() for name in names}
    archive = folder / CIFAR10_ARCHIVE
    if not archive.is_file():
        raise ValueError(
            f"expected {names[0]}, {CIFAR10_FOLDER}/{names[0]} or {CIFAR10_ARCHIVE} in {folder}; "
            "got none"
        )
    content = {}
    try:
        with tarfile.open(archive) as members:
            for member in members:
                place, _, name = member.name.rpartition("/")
                if place.removeprefix("./") == CIFAR10_FOLDER and name in names:
                    file = members.extractfile(member)  # None for what is not a file
                    content[name] = b"" if file is None else file.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: expected a gzipped tar file; got {error}") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(
            f"{archive}: expected {', '.join(f'{CIFAR10_FOLDER}/{name}' for name in missing)}; "
            "got none"
        )
    return content


def _read_pickle(name: str, content: bytes) -> np.ndarray:
    """The array ``data`` of bytes, ``(N, 3072)``."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise errors of almost any kind
        raise ValueError(f"{name}: expected a pickle of CIFAR-10; got {error!r}") from error
    data = batch.get(b"data") if isinstance(batch, dict) else None
    if not isinstance(data, _Array) or data.values is None:
        got = sorted(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"{name}: expected a dict with an array, data; got {got}")
    if data.values.ndim != 2 or data.values.shape[1] != ROW_SIZE:
        raise ValueError(f"{name}: expected shape (N, {ROW_SIZE}); got {data.values.shape}")
    return data.values


# A pickle is a program: it calls whatever it names. Here it may name four things, which NumPy's
# arrays of bytes need, and gets stand-ins of them, so that nothing but the lines below is called.


class _Array:
    """Stands for an array, and has its values after ``__setstate__``."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1") or is_fortran:
            raise pickle.UnpicklingError("an array that is not of bytes, or not row after row")
        self.values = np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _Dtype:
    """Stands for a dtype; its state, the order of bytes, says nothing of single bytes."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


def _reconstruct(*_: object) -> _Array:
    """Stands for what makes an array that is still empty."""
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``codecs.encode``, by which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self.ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module_name}.{global_name}, which is not part of an array of bytes"
            ) from None


# --- ImageNet-32 --------------------------------------------------------------------------------


def _imagenet32(folder: Path) -> Images:
    """Once in memory, and a few chunks of it: parts are read to where they stay."""
    places = {part: (folder, folder / name) for part, name in IMAGENET32_FOLDERS.items()}
    paths = [_find_file(*(one / name for one in places["train"])) for name in IMAGENET32_TRAIN]
    test = _find_file(*(one / IMAGENET32_TEST for one in places["test"]))
    return _split(_read_rows(paths), _read_rows([test]), 20, folder)


def _read_rows(paths: Sequence[Path]) -> Tensor:
    """The arrays ``data`` of NPZ files, one after the other, ``(N, 3, 32, 32)``."""
    counts = []
    for path in paths:
        with _open_rows(path) as (count, _):
            counts.append(count)
    rows = torch.empty(sum(counts), *ROW_SHAPE, dtype=torch.uint8)
    for path, part in zip(paths, rows.split(counts), strict=True):
        target = part.view(-1).numpy()
        with _open_rows(path) as (_, file):
            for start in range(0, len(target), CHUNK):
                chunk = target[start : start + CHUNK]
                if file.readinto(chunk) != len(chunk):
                    raise ValueError("fewer bytes")
    return rows


@contextmanager
def _open_rows(path: Path) -> Iterator[tuple[int, BinaryIO]]:
    """The number of rows of the array ``data`` in an NPZ file, and the file at its first byte."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of NPY")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or is_fortran or len(shape) != 2 or shape[1] != ROW_SIZE:
                raise ValueError(f"shape {shape}, {dtype}")
            num_bytes = archive.getinfo("data.npy").file_size - file.tell()
            if num_bytes != shape[0] * ROW_SIZE:
                raise ValueError(f"{num_bytes} bytes for shape {shape}")
            yield shape[0], file
    # RuntimeErrors are those of files that are encrypted, or compressed in other ways.
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected an NPZ file with an array, data, of bytes (N, {ROW_SIZE}); "
            f"got {error}"
        ) from error


LOADERS: Mapping[str, Callable[[Path], Images]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagenet32": _imagenet32,
    "folder": _folder,
}
NAMES = ("digits", *LOADERS)
