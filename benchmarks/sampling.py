"""Sampling from flows of data: one pass of an approximate inverse against the exact inverse.

    python benchmarks/sampling.py run         (six minutes)
    python benchmarks/sampling.py table

A density model of a map T from data to latents is sampled by ``T.inv``. Each map is trained for
some steps of Adam on correlated data, and then inverted at batches of normal latents z: by all the
inverses that its method offers, in turns. Times are medians over the turns, of a thread on a CPU;
"first" is the first call after training, in which factors are computed that later calls use. The
error is ``‖T(T.inv(z)) − z‖ / (‖z‖ + √N)`` for all N numbers of the batch, in float32. "T(x)" is
the time of the other direction.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import results
import torch
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import (
    Compose,
    LowRankAutoregressive,
    RationalQuadraticSpline,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    flows,
    self_normalizing_pair,
)
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform

WARM_UP = 2


def _autoregressive(dim: int) -> Compose:
    return Compose([SelfNormalizingLinear(dim), LowRankAutoregressive(dim, 32)])


def _splines(dim: int) -> Compose:
    parts = [SelfNormalizingLinear(dim), RationalQuadraticSpline(dim), SelfNormalizingLinear(dim)]
    return Compose(parts)


Make = Callable[..., Any]

#: A map as a function of a log-det method, its methods, and the shape of its data.
MAPS: dict[str, tuple[Make, tuple[str, ...], tuple[int, ...]]] = {
    **{
        f"dense, D = {dim}": (
            lambda log_det, dim=dim: SelfNormalizingLinear(dim, log_det=log_det),
            ("refined", "learned", "exact"),
            (dim,),
        )
        for dim in (64, 784)
    },
    "two dense layers, D = 784": (
        lambda log_det: flows.fully_connected(784, log_det=log_det),
        ("refined", "learned"),
        (784,),
    ),
    **{
        f"3 × 3 convolution, {'×'.join(map(str, shape))}": (
            lambda log_det, shape=shape: SelfNormalizingConv2d(shape[0], log_det=log_det),
            ("refined", "learned", "exact"),
            shape,
        )
        for shape in ((1, 28, 28), (16, 14, 14))
    },
    "nine convolutions, 1×28×28": (
        lambda log_det: flows.convolutional((1, 28, 28), log_det=log_det),
        ("refined", "learned"),
        (1, 28, 28),
    ),
    **{
        f"pair, D = {dim}": (
            lambda log_det, dim=dim: self_normalizing_pair(dim, [256, 256], log_det=log_det),
            ("refined", "learned"),
            (dim,),
        )
        for dim in (10, 64)
    },
    "glow, 1×28×28, 2 × 4 steps, 64 channels": (
        lambda log_det: flows.glow((1, 28, 28), num_steps=4, hidden_channels=64, log_det=log_det),
        ("refined", "learned"),
        (1, 28, 28),
    ),
    "dense + autoregressive, 32 hidden, D = 64": (
        lambda log_det: _autoregressive(64),
        ("refined",),
        (64,),
    ),
    "dense + splines + dense, D = 64": (lambda log_det: _splines(64), ("refined",), (64,)),
}


def make_data(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Standardized rows of a random walk, or images with a power-law spectrum."""
    noise = torch.randn(count, *shape, generator=generator)
    if len(shape) == 1:
        walk = noise.cumsum(-1)
        return (walk - walk.mean(0)) / walk.std(0)
    rows, columns = (torch.fft.fftfreq(size) for size in shape[-2:])
    distance = (rows[:, None].square() + columns.square()).sqrt() + 0.1
    images = torch.fft.ifft2(torch.fft.fft2(noise) / distance).real
    return images / images.std()


def train(map_: Any, data: Tensor, steps: int, batch: int, rate: float) -> None:
    dim = data[0].numel()
    is_image = map_.codomain.event_dim == 3
    shape = data.shape[1:] if is_image else torch.Size([dim])
    base = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    density = dist.TransformedDistribution(base, [map_.inv])
    optimizer = torch.optim.Adam(map_.parameters(), lr=rate, fused=True)
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,))
        optimizer.zero_grad()
        (-density.log_prob(data[rows]).mean() / dim).backward()
        optimizer.step()
    map_.eval()


def layers_of(map_: nn.Module) -> list[SelfNormalizingTransform]:
    return [one for one in map_.modules() if isinstance(one, SelfNormalizingTransform)]


def set_inverse(map_: Any, inverse: str) -> None:
    for layer in layers_of(map_):
        layer.inverse = inverse
    map_.clear_cache()


def inverses_of(map_: nn.Module) -> list[str]:
    """What the layers' method offers."""
    return list(getattr(layers_of(map_)[0].log_det, "inverses", ("iterative", "one_pass")))


def timed(function: Transform | Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    x = x.clone()  # not one whose image is remembered
    start = time.thread_time()
    y = function(x)
    return time.thread_time() - start, y


@torch.no_grad()
def measure(map_: Any, shape: tuple[int, ...], turns: int, batch: int) -> dict[str, results.Row]:
    """For each inverse, seconds of its calls and its error; ``T(x)`` is among them."""
    z_shape = map_.forward_shape(torch.Size([batch, *shape]))
    names = inverses_of(map_)
    seconds: dict[str, list[float]] = {name: [] for name in [*names, "T(x)"]}
    errors: dict[str, list[float]] = {name: [] for name in names}
    first = {}
    for name in names:
        fresh = copy.deepcopy(map_)  # without what is cached
        set_inverse(fresh, name)
        first[name], _ = timed(fresh.inv, torch.randn(z_shape))
    for _ in range(WARM_UP + turns):
        z = torch.randn(z_shape)
        for name in names:
            set_inverse(map_, name)
            taken, x = timed(map_.inv, z)
            seconds[name].append(taken)
            taken, again = timed(map_, x)
            seconds["T(x)"].append(taken)
            errors[name].append(((again - z).norm() / (z.norm() + z.numel() ** 0.5)).item())
    return {
        name: {
            "first": first[name],
            "seconds": statistics.median(seconds[name][WARM_UP:]),
            "T(x)": statistics.median(seconds["T(x)"][WARM_UP:]),
            "error": statistics.median(errors[name]),
        }
        for name in names
    }


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    settings = {name: getattr(args, name) for name in ("train_steps", "turns", "batch", "seed")}
    for name in args.maps or MAPS:
        make, methods, shape = MAPS[name]
        for method in methods:
            key = {"map": name, "log_det": method, **settings}
            if results.select(results.load(args.results), **key):
                continue
            torch.manual_seed(args.seed)
            data = make_data(shape, 2000, torch.Generator().manual_seed(args.seed))
            map_ = make(method)
            train(map_, data, args.train_steps, args.batch, args.rate)
            for inverse, found in measure(map_, shape, args.turns, args.batch).items():
                results.append(args.results, {**key, "inverse": inverse, **found})


def table(args: argparse.Namespace) -> None:
    lines = []
    for row in results.load(args.results):
        rate = row["batch"] / row["seconds"]
        lines.append(
            [
                row["map"],
                row["log_det"],
                row["inverse"],
                *(f"{1e3 * row[name]:.3g}" for name in ("T(x)", "seconds", "first")),
                f"{float(f'{rate:.2g}'):,.0f}",
                f"{row['error']:.1e}" if math.isfinite(row["error"]) else "not finite",
            ]
        )
    header = ["map", "log_det", "inverse", "T(x), ms", "T.inv(z), ms", "first, ms", "samples/s"]
    results.print_table([*header, "error"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=Path("outputs/sampling.jsonl"))
    parser.add_argument("--maps", nargs="+", choices=MAPS, metavar="MAP", help=f"of {list(MAPS)}")
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
