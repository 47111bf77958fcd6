"""Images are read as they were written, from tiny files of every kind; other files are named."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def datasets(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("datasets")


def _pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write(folder: Path, files: dict[str, Any]) -> None:
    """Write bytes as they are, an array as an IDX file, and several as an NPZ file."""
    for name, content in files.items():
        if isinstance(content, dict):
            np.savez(folder / name, **content)
            continue
        if isinstance(content, np.ndarray):
            content = struct.pack(">4I", 0x0803, *content.shape) + content.tobytes()
            content = gzip.compress(content) if name.endswith(".gz") else content
        (folder / name).write_bytes(content)


def _expect(images: Any, train: np.ndarray, test: np.ndarray, num_validation: int) -> None:
    """Images are these, of shape (N, C, H, W), and the last of training are for validation."""
    found = torch.cat([images.train, images.validation])
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(train))
    assert torch.equal(images.test, torch.from_numpy(test))
    assert len(images.validation) == num_validation
    assert images.num_levels == 256
    assert images.event_shape == train.shape[1:]
    assert all(part.is_contiguous() for part in images[:3])


def test_names(datasets: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"expected name to be one of digits, .*; got 'cifar'"):
        datasets.load_images("cifar")
    for name in datasets.NAMES[1:]:
        with pytest.raises(ValueError, match=f"{name}: expected data_dir, .*; got None"):
            datasets.load_images(name)


def test_digits_are_all_there_and_always_alike(datasets: ModuleType) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits, again = (datasets.load_images("digits") for _ in range(2))
    assert digits.event_shape == (1, 8, 8)
    assert digits.num_levels == 17
    assert [len(part) for part in digits[:3]] == [1297, 250, 250]
    assert all(map(torch.equal, digits[:3], again[:3]))
    found = torch.cat(digits[:3])
    assert found.dtype == torch.uint8
    expected = sklearn_datasets.load_digits().data
    assert sorted(found.flatten(1).tolist()) == sorted(expected.tolist())
    # They are shuffled: as published, writers come one after the other.
    assert found.flatten(1).tolist() != expected.tolist()


# --- IDX and NPZ files --------------------------------------------------------------------------

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("kind", ["", "emnist-letters-"])
@pytest.mark.parametrize("parts", [("train", "t10k"), ("train", "test")])
@pytest.mark.parametrize(
    "end", ["-images-idx3-ubyte", "-images-idx3-ubyte.gz", "-images.idx3-ubyte"]
)
def test_idx_images_are_read(
    datasets: ModuleType, tmp_path: Path, kind: str, parts: tuple[str, str], end: str
) -> None:
    pixels = {f"{kind}{part}{end}": _pixels(12 + index, 5, 6) for index, part in enumerate(parts)}
    labels = {name.replace("images", "labels").replace("idx3", "idx1"): b"" for name in pixels}
    _write(tmp_path, pixels | labels)
    train, test = (array[:, None] for array in pixels.values())
    names = ["mnist", "folder"] if (kind, parts[1], "-idx3" in end) == ("", "t10k", True) else []
    for _ in range(2):
        for name in names or ["folder"]:
            _expect(datasets.load_images(name, tmp_path), train, test, 2)
        # Gzipped or not, it is one file.
        _write(tmp_path, {name.removesuffix(".gz"): array for name, array in pixels.items()})


@pytest.mark.parametrize("names", [("train", "test"), ("x_train", "x_test")])
@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC", "N1HW", "NHW1"])
def test_npz_images_are_read(
    datasets: ModuleType, tmp_path: Path, names: tuple[str, str], layout: str
) -> None:
    arrays = [_pixels(count, 3 if "C" in layout else 1, 5, 6) for count in (4, 2)]
    last = layout in ("NHWC", "NHW1")
    stored = [np.moveaxis(array, 1, -1) if last else array for array in arrays]
    stored = [array[:, 0] for array in arrays] if layout == "NHW" else stored
    _write(tmp_path, {"a.npz": dict(zip(names, stored, strict=True)) | {"y_train": np.zeros(3)}})
    _expect(datasets.load_images("folder", tmp_path), *arrays, 1)


SMALL = _pixels(2, 4, 4)
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
        (_npz(_pixels(2, 4, 5)), "one for testing at least; got (2, 1, 4, 5) and (2, 1, 4, 4)"),
        (_npz(SMALL[:1]), "expected images of one size, two for training and one for testing"),
    ],
)
def test_other_files_are_named(
    datasets: ModuleType, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    _write(tmp_path, files)
    with pytest.raises(ValueError, match=re.escape(message)):
        datasets.load_images("folder", tmp_path)
    if "IDX file of" in message or "gzip" in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            datasets.load_images("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "expected the file .*train-images-idx3-ubyte or .*ubyte.gz; got none"),
        ("cifar10", "expected data_batch_1, cifar-10-batches-py/data_batch_1 or .*; got none"),
        ("imagenet32", "the file .*train_data_batch_1.npz or .*train_npz.*1.npz; got none"),
        ("folder", "expected an NPZ file, or one IDX file named .*; got none"),
    ],
)
def test_missing_files_are_named(
    datasets: ModuleType, tmp_path: Path, name: str, message: str
) -> None:
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(ValueError, match=message):
            datasets.load_images(name, folder)


# --- CIFAR-10 -----------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def _python2_pickle(array: np.ndarray) -> bytes:
    """What Python 2 wrote, opcode by opcode: the batches are published in this form."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(content)) + content

    rows, columns = (
        b"K" + bytes([n]) if n < 256 else b"M" + struct.pack("<H", n) for n in array.shape
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    )
    data = (
        empty
        + b"(K\x01"
        + rows
        + columns
        + b"\x86"
        + dtype
        + b"\x89"
        + text(array.tobytes())
        + b"tb"
    )
    labels = b"](K\x03K\x07e"
    return b"\x80\x02}(" + text(b"data") + data + text(b"labels") + labels + b"u."


def _python3_pickle(array: np.ndarray) -> bytes:
    return pickle.dumps({b"data": array, b"labels": [3, 7]}, protocol=2)


@pytest.mark.parametrize("dump", [_python2_pickle, _python3_pickle])
@pytest.mark.parametrize("place", ["", "cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_cifar10_is_read(
    datasets: ModuleType, tmp_path: Path, dump: Callable[[np.ndarray], bytes], place: str
) -> None:
    arrays = [_pixels(4, 3, 32, 32, seed=index) for index in range(6)]
    files = {name: dump(array.reshape(4, -1)) for name, array in zip(BATCHES, arrays, strict=True)}
    if place.endswith(".gz"):
        with tarfile.open(tmp_path / place, "w:gz") as archive:
            for name, content in reversed(files.items()):
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / place).mkdir(exist_ok=True)
        _write(tmp_path / place, files)
    found = datasets.load_images("cifar10", tmp_path)
    _expect(found, np.concatenate(arrays[:5]), arrays[5], 2)
    assert found.train.flatten(1)[0, 1024] == arrays[0][0, 1, 0, 0]  # green comes after all of red


class _Malicious:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        return self.reduced


def _pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


ROWS = _pixels(2, 3072)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_pickled({b"data": _Malicious(os.system, "touch executed")}), r"(posix|nt).system, which"),
        (
            _pickled(_Malicious(eval, "open('executed', 'w')")),
            r"__builtin__.eval, which is not part",
        ),
        (_pickled(_Malicious(np.load, "a.npy"), 4), r"numpy.*load, which is not part of an array"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", "numpy.ndarray.dump, which is not"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "rot13"),
        (_pickled({b"data": np.array([None])}), "an array that is not of bytes"),
        (_pickled({b"data": ROWS.astype(np.int16)}), "an array that is not of bytes"),
        (_pickled({b"data": np.asfortranarray(ROWS)}), "not row after row"),
        (_pickled({b"data": ROWS[:, 1:]}), r"expected shape \(N, 3072\); got \(2, 3071\)"),
        (_pickled({b"data": [1]}), "expected a dict with an array, data; got .*b'data'"),
        (_pickled({b"labels": [1]}), "expected a dict with an array, data; got .*b'labels'"),
        (_pickled([1]), "expected a dict with an array, data; got list"),
        (_python2_pickle(ROWS)[:-100], "expected a pickle of CIFAR-10; got"),
        (_python2_pickle(ROWS).replace(b"M\x00\x0c", b"M\x00\x0d"), "a pickle of CIFAR-10; got"),
        (b"", "expected a pickle of CIFAR-10; got EOFError"),
        (b"no pickle", "expected a pickle of CIFAR-10; got"),
    ],
)
def test_other_pickles_are_named_and_not_executed(
    datasets: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, dict.fromkeys(BATCHES, _python2_pickle(ROWS)) | {"data_batch_3": content})
    with pytest.raises(ValueError, match=f"data_batch_3: .*{message}"):
        datasets.load_images("cifar10", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(BATCHES)


def test_damaged_archives_of_cifar10_are_named(datasets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
        archive.addfile(tarfile.TarInfo("elsewhere/test_batch"))
    missing = ", ".join(f"cifar-10-batches-py/{name}" for name in BATCHES[1:])
    with pytest.raises(ValueError, match=f"expected {missing}; got none"):
        datasets.load_images("cifar10", tmp_path)
    for content in (path.read_bytes()[:60], b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tar.gz: expected a gzipped tar file; got"):
            datasets.load_images("cifar10", tmp_path)


# --- ImageNet-32 --------------------------------------------------------------------------------

PARTS = [f"train_data_batch_{number}.npz" for number in range(1, 11)]


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_imagenet32_is_read(
    datasets: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_flat: bool,
    save: Callable[..., None],
) -> None:
    monkeypatch.setattr(datasets, "CHUNK", 5000)  # more than one row, and not whole rows
    arrays = [_pixels(4 + index % 2, 3, 32, 32, seed=index) for index in range(11)]
    for name, array in zip([*PARTS, "val_data.npz"], arrays, strict=True):
        kind = "val" if name.startswith("val") else "train"
        folder = tmp_path if is_flat else tmp_path / f"Imagenet32_{kind}_npz"
        folder.mkdir(exist_ok=True)
        save(folder / name, data=array.reshape(len(array), -1), labels=[1], mean=np.zeros(3072))
    found = datasets.load_images("imagenet32", tmp_path)
    _expect(found, np.concatenate(arrays[:10]), arrays[10], 2)
    assert found.train.data_ptr() == found.validation.data_ptr() - found.train.numel()  # no copy


def _npy(header_rows: int) -> bytes:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (header_rows, 3072)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + ROWS.tobytes()


def _archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.npy", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": np.zeros(2)}, "There is no item named 'data.npy'"),
        ({"data": ROWS / 255}, r"got shape \(2, 3072\), float64"),
        ({"data": ROWS[:, 1:]}, r"got shape \(2, 3071\), uint8"),
        ({"data": np.array([None])}, r"got shape \(1,\), object"),
        (_archive(_npy(10**9)), r"got 6144 bytes for shape \(1000000000, 3072\)"),
        (_archive(_npy(1)), r"got 6144 bytes for shape \(1, 3072\)"),
        (_archive(_npy(2)).replace(ROWS[0].tobytes(), ROWS[1].tobytes()), "Bad CRC-32"),
        (_archive(b"no array"), "got "),
        (_archive(_npy(2))[:-9], "File is not a zip file"),
        (b"", "File is not a zip file"),
    ],
)
def test_other_parts_of_imagenet32_are_named(
    datasets: ModuleType, tmp_path: Path, content: Any, message: str
) -> None:
    good = {name: {"data": ROWS} for name in [*PARTS, "val_data.npz"]}
    _write(tmp_path, good | {PARTS[6]: content})
    message = f"{PARTS[6]}: expected an NPZ file with an array, data, of bytes .*{message}"
    with pytest.raises(ValueError, match=message):
        datasets.load_images("imagenet32", tmp_path)
    (tmp_path / PARTS[9]).unlink()
    with pytest.raises(ValueError, match=rf"expected the file .*{PARTS[9]} or .*; got none"):
        datasets.load_images("imagenet32", tmp_path)
