"""Files that are never seen half written, and an interrupt that waits."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

__all__ = ["deferred_interrupt", "save_json", "save_state", "write_whole"]


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


def save_json(path: Path, value: object) -> None:
    """``json.dump``, likewise."""
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
