"""Bits per dim of ``flows.glow`` at its defaults, at every step of Adam, on four kinds of images.

Digits (8 × 8, 17 levels), MNIST (28 × 28), smooth blobs (one bump each, 16 × 16) and uniform noise
(8 × 8). Nothing is done for stability but what ``glow`` does itself: no warm-up, no clipping, no
decay. A run ends at the first loss that is not finite, with an error, or after ``--seconds``.

    python benchmarks/glow.py run --data-dir DIR
    python benchmarks/glow.py run --data-dir DIR --kinds MNIST --hidden-channels 64
    python benchmarks/glow.py table

``run`` appends to ``--results`` as they come, and does not repeat what is there. No density of the
noise has fewer than 8 bits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyro.distributions as dist
import results
import torch
from datasets import load_images
from torch import Tensor
from tqdm import tqdm

from pyro_snf import flows
from pyro_snf.images import LogitTransform, bits_per_dim, dequantize

KINDS = ("digits", "MNIST", "blobs", "noise")
NUM_TEST = 200
LATE = 100  # steps, over which the last losses are averaged


def make_images(kind: str, data_dir: Path | None) -> tuple[Tensor, int]:
    """Integer images of shape ``(N, 1, H, W)``, and how many levels they have."""
    generator = torch.Generator().manual_seed(0)
    if kind in ("digits", "MNIST"):
        images = load_images(kind.lower(), data_dir)
        pixels = torch.cat([images.train, images.validation, images.test])
        return pixels[:10_000], images.num_levels
    if kind == "noise":
        return torch.randint(256, (2000, 1, 8, 8), generator=generator), 256
    size, count = 16, 2000
    pixels = torch.arange(size) + 0.5
    row, column = (size * torch.rand(2, count, 1, generator=generator)).unbind()
    width = 1.5 + 2.5 * torch.rand(count, 1, 1, generator=generator)
    distance = (pixels - row).square().unsqueeze(2) + (pixels - column).square().unsqueeze(1)
    return (255 * torch.exp(-distance / (2 * width**2))).round().unsqueeze(1), 256


def train(args: argparse.Namespace, kind: str, rate: float) -> results.Row:
    """The loss of every step, and what the flow is like afterwards."""
    images, num_levels = make_images(kind, args.data_dir)
    images = images.float()
    train_images, test = images[:-NUM_TEST], images[-NUM_TEST:]
    event_shape = tuple(images.shape[1:])
    torch.manual_seed(args.seed)
    options = {"num_steps": args.num_steps, "hidden_channels": args.hidden_channels}
    flow = flows.glow(event_shape, **options)
    base = dist.Normal(torch.tensor(0.0), 1.0).expand([math.prod(event_shape)]).to_event(1)
    logits = LogitTransform(num_levels)
    density = dist.TransformedDistribution(base, [flow.inv, logits.inv])
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate, fused=True)
    losses: list[float] = []
    error, start = None, time.process_time()
    for _ in tqdm(range(args.steps), desc=f"{kind}, {rate:g}"):
        rows = torch.randint(len(train_images), (args.batch_size,))
        pixels = dequantize(train_images[rows], num_levels=num_levels)
        optimizer.zero_grad()
        try:
            loss = bits_per_dim(density.log_prob(pixels), event_shape).mean()
            losses.append(loss.item())
            loss.backward()
        except (ValueError, RuntimeError) as raised:
            error = str(raised)
        if error is not None or not math.isfinite(losses[-1]):
            break
        optimizer.step()
        if time.process_time() - start > args.seconds:
            break
    seconds = time.process_time() - start
    flow.eval()
    with torch.no_grad():
        pixels = dequantize(test, num_levels=num_levels)
        parts = [bits_per_dim(density.log_prob(part), event_shape) for part in pixels.split(50)]
        latents = torch.randn(50, math.prod(event_shape))
        again = flow(flow.inv(latents).clone())
    off = (again - latents).norm() / (latents.norm() + latents.numel() ** 0.5)
    return {
        "losses": [float(f"{loss:.5g}") for loss in losses],
        "seconds": seconds,
        "error": error,
        "test": torch.cat(parts).mean().item(),
        "inverse error": off.item(),
    }


def key_of(args: argparse.Namespace, kind: str, rate: float) -> results.Row:
    names = ("num_steps", "hidden_channels", "batch_size", "steps", "seed")
    return {"kind": kind, "rate": rate, **{name: getattr(args, name) for name in names}}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for rate in args.rates:
        for kind in args.kinds:
            key = key_of(args, kind, rate)
            if not results.select(results.load(args.results), **key):
                results.append(args.results, {**key, **train(args, kind, rate)})


def table(args: argparse.Namespace) -> None:
    """In bits per dim."""
    lines = []
    for row in results.load(args.results):
        losses = torch.tensor(row["losses"])
        late = losses[-LATE:]
        lines.append(
            [
                row["kind"],
                f"{row['num_steps']}, {row['hidden_channels']}",
                f"{row['rate']:g}",
                str(len(losses)),
                *(results.number(value) for value in (losses[0].item(), losses.max().item())),
                results.number(late.mean().item()),
                results.number(row["test"]),
                f"{row['inverse error']:.0e}",
            ]
        )
    header = ["images", "steps, hidden channels", "rate", "steps of Adam", "first", "largest"]
    results.print_table([*header, "last 100", "test", "error of T.inv"], sorted(lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=Path("outputs/glow.jsonl"))
    parser.add_argument("--data-dir", type=Path, help="of MNIST")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-3])
    parser.add_argument("--num-steps", type=int, default=16)
    parser.add_argument("--hidden-channels", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of CPU time, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
