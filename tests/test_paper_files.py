"""Files are never seen half written, and an interrupt waits for what is being done."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def files(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("files")


def _fail(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_files_that_cannot_be_written_stay_as_they_were(
    files: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
) -> None:
    path = tmp_path / "checkpoint.pt"
    files.save_state(path, {"step": 1})
    is_interrupt = isinstance(error, KeyboardInterrupt)
    expected = KeyboardInterrupt if is_interrupt else SystemExit
    message = "^$" if is_interrupt else r"^error: cannot write .*checkpoint.pt: No space left on"
    with monkeypatch.context() as context:
        context.setattr(os, function, _fail(error))
        with pytest.raises(expected, match=message):
            files.save_state(path, {"step": 2})
    with pytest.raises(AttributeError, match=r"pickle|local object"):
        files.save_state(path, {"step": lambda: 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of Unix")
def test_a_write_that_breaks_off_leaves_the_file_whole(files: ModuleType, tmp_path: Path) -> None:
    import resource

    path, size = tmp_path / "checkpoint.pt", 2**23
    files.write_whole(path, b"whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(SystemExit, match=r"error: cannot write .*: File too large"):
            files.write_whole(path, bytes(2 * size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written(files: ModuleType, tmp_path: Path) -> None:
    files.save_json(tmp_path / "result.json", [{"nats": 947.1}])
    assert json.loads((tmp_path / "result.json").read_text()) == [{"nats": 947.1}]


def test_the_first_interrupt_waits(files: ModuleType) -> None:
    # In a background job of a shell without job control, interrupts are ignored from the start.
    before, handler = signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    try:
        with files.deferred_interrupt() as is_pressed:
            assert not is_pressed()
            signal.raise_signal(signal.SIGINT)
            assert is_pressed()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
