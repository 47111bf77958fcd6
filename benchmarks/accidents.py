"""Whether a run of the paper's experiments survives being killed, Ctrl-C, and a full disk.

The run is made once without accidents, and twice with 20 of them: its process gets a SIGKILL, or a
SIGINT as by Ctrl-C, at a random moment or while a checkpoint is being written, and is resumed. Each
process has to go on from a checkpoint and to write a later one. In the end, weights, optimizer,
history and result have to equal those of the first run, to the last bit.

Then the space runs out (by a limit on the sizes of files, as on a full disk): the run has to end
with one line and an exit code that is not 0, the latest checkpoint has to be whole, and no other
file may be left over.

    python benchmarks/accidents.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
#: What is not the same in every run: how long it took, and when it was.
INCIDENTAL = ("seconds", "date", "exact_ms", "one_pass_ms")


def start(folder: Path, args: argparse.Namespace, *more: str, **options: Any) -> subprocess.Popen:
    """Start the run, with one thread, so that its sums are always in the same order."""
    command = [sys.executable, str(ROOT / "benchmarks" / "paper"), "run", "--data", "digits"]
    command += ["--preset", args.preset, "--log-det", args.log_det, "--epochs", str(args.epochs)]
    command += ["--num-blocks", "2"] if args.preset.startswith("conv") else []  # of 8 × 8 pixels
    command += ["--seed", str(args.seed), "--output-dir", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def steps_of(folder: Path) -> int:
    """Those of the checkpoint, which has to be whole; −1 if there is none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return -1
    return torch.load(path, weights_only=True)["num_steps"]


def finish(process: subprocess.Popen) -> None:
    """Wait for the end of a run that has to succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors}")


def end(
    folder: Path, process: subprocess.Popen, number: int, chance: random.Random, *, amid: bool
) -> None:
    """Send it a signal after its next checkpoint: at a random moment, or while it writes one."""
    checkpoint, part = folder / "checkpoint.pt", folder / "checkpoint.pt.part"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while process.poll() is None:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
            break
        time.sleep(0.001)
    if amid:
        while process.poll() is None and not part.exists():  # for a moment only
            pass
    else:
        time.sleep(chance.uniform(0, 0.5))
    if process.poll() is not None:
        raise SystemExit("the run was over before the signal: take more --epochs")
    process.send_signal(number)
    process.communicate()


def comparable(value: Any) -> Any:
    """Without what is incidental."""
    if isinstance(value, dict):
        kept = {k: comparable(v) for k, v in value.items() if k not in INCIDENTAL}
        if "history" in kept:  # in checkpoints, the third of each evaluation is its seconds
            kept["history"] = [
                one if isinstance(one, dict) else one[:2] + one[3:] for one in kept["history"]
            ]
        return kept
    return [comparable(one) for one in value] if isinstance(value, list | tuple) else value


def are_equal(one: Any, other: Any) -> bool:
    """To the last bit; NaNs are equal to NaNs."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other or (one != one and other != other)


def outcome(folder: Path) -> list[Any]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return comparable([checkpoint, json.loads((folder / "result.json").read_text())])


def survive_signals(root: Path, args: argparse.Namespace, number: signal.Signals) -> None:
    folder, chance, num_amid = root / number.name, random.Random(args.seed), 0
    for index in tqdm(range(args.count), desc=number.name):
        before = steps_of(folder)
        process = start(folder, args, *(["--resume"] if index else []))
        end(folder, process, number, chance, amid=index % 2 == 1)
        is_amid = (folder / "checkpoint.pt.part").exists()
        if is_amid and number == signal.SIGINT:
            raise SystemExit("an interrupted process left a file that it had begun")
        num_amid += is_amid
        if steps_of(folder) <= before:
            raise SystemExit(f"process {index} did not go on from step {before}")
    finish(start(folder, args, "--resume"))
    is_equal = are_equal(outcome(root / "peace"), outcome(folder))
    print(
        f"{number.name} {args.count} times, {num_amid} of them left a file half written; "
        f"resumed {args.count} times; the outcome is "
        + ("equal to that of the run in peace" if is_equal else "NOT that of the run in peace")
    )
    if not is_equal:
        raise SystemExit(1)


def survive_a_full_disk(folder: Path, args: argparse.Namespace) -> None:
    peace = folder / "peace" / "checkpoint.pt"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (peace.stat().st_size * 9 // 10,) * 2)

    full = folder / "full"
    full.mkdir()
    content = (folder / "peace" / "checkpoint.pt").read_bytes()
    (full / "checkpoint.pt").write_bytes(content)
    process = start(full, args, "--resume", preexec_fn=limit)  # it would replace the checkpoint
    _, errors = process.communicate()
    last = errors.strip().splitlines()[-1]
    left = sorted(path.name for path in full.iterdir())
    print(f"no space left: exit code {process.returncode}, {last!r}, in the folder: {left}")
    is_whole = (full / "checkpoint.pt").read_bytes() == content
    is_named = last.startswith("error: cannot write") and "Traceback" not in errors
    if not (is_whole and is_named and process.returncode and left == ["checkpoint.pt"]):
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="of accidents of each kind")
    parser.add_argument("--preset", default="conv-mnist", help="of benchmarks/paper")
    parser.add_argument("--log-det", default="refined")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        finish(start(Path(folder) / "peace", args))
        survive_signals(Path(folder), args, signal.SIGKILL)
        survive_signals(Path(folder), args, signal.SIGINT)
        survive_a_full_disk(Path(folder), args)


if __name__ == "__main__":
    main()
