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
import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import densities_2d
import numpy as np
import pictures
import pyro
import report
import timescaling
import torch
from datasets import load_images
from files import save_json
from settings import PRESETS, Settings, add_options, make_settings
from training import Run, load_checkpoint, train

import pyro_snf


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "pyro_snf": pyro_snf.__version__,
        "machine": f"{platform.system()}, {platform.machine()}, {torch.get_num_threads()} threads",
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


def run(args: argparse.Namespace) -> None:
    names = {one.name for one in dataclasses.fields(Settings)}
    options = {name: value for name, value in vars(args).items() if name in names}
    one = make_settings(args.preset, options)
    torch.set_num_threads(one.threads or torch.get_num_threads())
    folder = args.output_dir or Path(f"outputs/paper/{args.preset}-{one.log_det}-{one.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"{checkpoint} is there already: expected --resume or another --output-dir")
    this = Run(one, load_images(one.data, args.data_dir))
    if args.resume:
        this.load_state(load_checkpoint(checkpoint, one.device))

    def write(**found: Any) -> None:
        assert this.best is not None
        result = {
            "preset": args.preset,
            "settings": dataclasses.asdict(one),
            "versions": versions(),
            "commit": commit(),
            "started": started,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "num_images": [len(part) for part in this.data[:3]],
            "num_parameters": sum(parameter.numel() for parameter in this.flow.parameters()),
            "num_steps": this.num_steps,
            "seconds": this.seconds,
            "best_epoch": this.best.epoch,
            "validation": this.best.validation,
            **found,
            "history": [_json_values(row._asdict()) for row in this.history],
        }
        save_json(folder / "result.json", _json_values(result))

    reason = train(this, checkpoint, write)
    this.use_best()
    test = this.negative_log_likelihood(this.data.test)
    dim = this.data.event_shape.numel()
    found = {"reason": reason, "test": test, "test_bits_per_dim": test / dim / math.log(2)}
    found |= pictures.draw(this, folder) if math.isfinite(test) else {}
    write(**found)
    print(f"{folder}: stopped: {reason}, after {this.epoch:g} epochs, {this.seconds:.0f} s")
    print(
        f"best in validation after {this.best.epoch:g} epochs: test {test:.2f} nats, "
        f"{found['test_bits_per_dim']:.3f} bits/dim"
    )


def _json_values(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
