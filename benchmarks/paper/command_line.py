"""The experiments of Keller et al. (2021), run again: https://arxiv.org/abs/2011.07248

    python benchmarks/paper run --preset fc-mnist --log-det refined --data-dir DIR
    python benchmarks/paper run --preset fc-mnist --log-det refined --data-dir DIR --resume
    python benchmarks/paper run --preset conv-mnist --log-det emerging --data-dir DIR --epochs 20
    python benchmarks/paper run --preset glow-mnist --kernel-size 3 --hidden-channels 64 \\
        --data-dir DIR
    python benchmarks/paper run --preset timescaling
    python benchmarks/paper run --preset densities-2d
    python benchmarks/paper report outputs/paper

``run`` writes result.json, checkpoint.pt and pictures to a folder of its own under outputs/paper,
result.json anew after each evaluation. Ctrl-C ends a run at the latest step, a killed one goes on
from the latest evaluation: with ``--resume``, on a CPU to the same bits as without the break.
``report`` makes tables and a picture of the results in a folder, wherever below it they are.

DIR has MNIST's IDX files, CIFAR-10's pickles, of which nothing is executed, or the NPZ files of the
downsampled ImageNet; ``--data digits`` needs none, ``--data folder`` takes any IDX or NPZ files.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import densities_2d
import numpy as np
import pyro
import report
import timescaling
import torch
from datasets import load_images
from files import save_json
from pictures import draw
from settings import (
    OTHERS,
    PRESETS,
    Densities2dSettings,
    Settings,
    TimescalingSettings,
    add_options,
    make_settings,
)
from training import Run, load_checkpoint, train

import pyro_snf


def versions(device: str) -> dict[str, str]:
    """Of what a result depends on."""
    machine = [platform.system(), platform.machine()]
    if torch.device(device).type == "cuda":
        machine.append(torch.cuda.get_device_name(device))
    num_threads = torch.get_num_threads()
    machine.append(f"{num_threads} threads" if num_threads > 1 else "one thread")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "pyro_snf": pyro_snf.__version__,
        "machine": ", ".join(machine),
    }


def commit() -> str | None:
    """Of the code, with a + if it has been changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def header(preset: str, one: Any) -> dict[str, Any]:
    """What a result begins with."""
    return {
        "preset": preset,
        "settings": dataclasses.asdict(one),
        "versions": versions(getattr(one, "device", "cpu")),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def run_images(preset: str, one: Settings, args: argparse.Namespace, folder: Path) -> None:
    """Train a flow, evaluate it, and draw it."""
    torch.set_num_threads(one.threads or torch.get_num_threads())
    try:
        torch.empty(0, device=one.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"expected a device of this machine; got {one.device!r}") from error
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise ValueError(
            f"expected no checkpoint in {folder}; got one: give --resume, or another --output-dir"
        )
    this = Run(one, load_images(one.data, args.data_dir))
    if args.resume:
        this.load_state(load_checkpoint(checkpoint, one.device))
    first = header(preset, one)

    def write(**found: Any) -> None:
        assert this.best is not None
        result = first | {
            "num_images": [len(part) for part in this.data[:3]],
            "num_parameters": sum(parameter.numel() for parameter in this.flow.parameters()),
            "num_steps": this.num_steps,
            "seconds": this.seconds,
            "best_epoch": this.best.epoch,
            "validation": this.best.validation,
            **found,
        }
        history = [_json_values(row._asdict()) for row in this.history]
        save_json(folder / "result.json", _json_values(result) | {"history": history})

    reason = train(this, checkpoint, write)
    this.use_best()
    test = this.negative_log_likelihood(this.data.test)
    bits = test / this.data.event_shape.numel() / math.log(2)
    pictures_found = draw(this, folder) if math.isfinite(test) else {}
    write(reason=reason, test=test, test_bits_per_dim=bits, **pictures_found)
    print(f"{folder}: stopped: {reason}, after {this.epoch:g} epochs, {this.seconds:.0f} s")
    print(
        f"best in validation after {this.best.epoch:g} epochs: test {test:.2f} nats, "
        f"{bits:.3f} bits/dim"
    )


def run_timescaling(one: TimescalingSettings, folder: Path) -> dict[str, Any]:
    options = dataclasses.asdict(one)
    rows = timescaling.run(folder / "times.jsonl", methods=options.pop("log_det"), **options)
    timescaling.plot(rows, folder / "times.png")
    timescaling.print_tables(rows)
    return {"table": rows}


def run_densities_2d(one: Densities2dSettings, folder: Path) -> dict[str, Any]:
    return {"table": [_json_values(row) for row in densities_2d.run(one, folder)]}


def run(args: argparse.Namespace, options: dict[str, Any]) -> None:
    one = make_settings(args.preset, options)
    name = f"{args.preset}-{one.log_det}-{one.seed}" if args.preset in PRESETS else args.preset
    folder = args.output_dir or Path("outputs/paper") / name
    folder.mkdir(parents=True, exist_ok=True)
    if args.preset in PRESETS:
        run_images(args.preset, one, args, folder)
        return
    first = header(args.preset, one)
    others = {"timescaling": run_timescaling, "densities-2d": run_densities_2d}
    save_json(folder / "result.json", first | others[args.preset](one, folder))


def _json_values(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser(
        "run",
        help="an experiment; --preset NAME --help for its settings",
        add_help=False,
        allow_abbrev=False,
    )
    runner.add_argument("--preset", choices=(*PRESETS, *OTHERS), required=True)
    runner.add_argument("--data-dir", type=Path, metavar="DIR", help="where the images are")
    runner.add_argument("--output-dir", type=Path, metavar="DIR", help="where results go")
    runner.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )
    reporter = commands.add_parser("report", help="tables and a picture of results")
    reporter.add_argument("folder", type=Path, help="results are in it, or below")
    reporter.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="for results.md and curves.png; the folder"
    )
    args, rest = parser.parse_known_args(argv)
    try:
        if args.command == "report":
            if rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            report.write_report(args.folder, args.output_dir or args.folder)
            return
        settings = argparse.ArgumentParser(
            usage=f"python benchmarks/paper run --preset {args.preset} [--data-dir DIR] [options]",
            parents=[runner],
            allow_abbrev=False,
        )
        add_options(settings, args.preset)
        names = {one.name for one in dataclasses.fields(make_settings(args.preset, {}))}
        given = vars(settings.parse_args(["--preset", args.preset, *rest]))
        run(args, {name: value for name, value in given.items() if name in names})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
