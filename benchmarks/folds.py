"""Do pairs of networks fold, at their defaults? Determinants of the other sign, and integrals.

    python benchmarks/folds.py
    python benchmarks/folds.py --data moons eight --batch 256 --rates 1e-3

Plain Adam at constant rates, with fresh events in every step. Ten times in training, and at its
end, the signs of det J are compared at events, halfway between two of them, and half of their
distance beyond. In up to two dimensions, the density is integrated at the end.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import product

import pyro.distributions as dist
import results
import torch
from torch import Generator, Tensor

from pyro_snf import SelfNormalizingPair, self_normalizing_pair
from pyro_snf.free_form.log_det import exact_slogdet

#: Events of which the signs are compared ten times in training, and at its end.
NUM_TRIED, NUM_TRIED_LAST = 200, 1000
#: Points of the integral along each axis, by dimensions, and where they end.
NUM_POINTS, BOUND = {1: 40_001, 2: 241}, {1: 15.0, 2: 6.0}


def modes(dim: int, distance: float, width: float) -> Callable[[int, Generator], Tensor]:
    """2ᴰ normal modes at the corners of a cube."""

    def draw(count: int, generator: Generator) -> Tensor:
        corners = torch.randint(0, 2, (count, dim), generator=generator) - 0.5
        return distance * corners + width * torch.randn(count, dim, generator=generator)

    return draw


def moons(count: int, generator: Generator) -> Tensor:
    angle = math.pi * torch.rand(count, generator=generator)
    second = torch.randint(0, 2, (count,), generator=generator)
    x = angle.cos() * (1 - 2 * second) + second - 0.5
    y = angle.sin() * (1 - 2 * second) + 0.5 * second - 0.25
    noise = torch.randn(count, 2, generator=generator)
    return 1.5 * torch.stack([x, y], dim=1) + 0.08 * noise


def rings(count: int, generator: Generator) -> Tensor:
    radius = 0.6 * torch.randint(1, 5, (count,), generator=generator)
    radius = radius + 0.08 * torch.randn(count, generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


DATA: dict[str, Callable[[int, Generator], Tensor]] = {
    "line": modes(1, 8.0, 0.5),
    "narrow": modes(1, 4.0, 0.1),
    "moons": moons,
    "rings": rings,
    "corners": modes(2, 4.0, 0.2),
    "eight": modes(8, 3.0, 0.2),
}


@torch.no_grad()
def share_of_other_signs(pair: SelfNormalizingPair, events: Tensor) -> float:
    difference = events.roll(1, 0) - events
    points = torch.cat([events, events + difference / 2, events + 1.5 * difference])
    sign, _ = exact_slogdet(pair.forward_net, points, (), ())
    share = (sign > 0).double().mean().item()
    return min(share, 1 - share)


@torch.no_grad()
def integral(density: dist.TransformedDistribution, dim: int) -> float:
    if dim not in NUM_POINTS:
        return math.nan
    axis = torch.linspace(-BOUND[dim], BOUND[dim], NUM_POINTS[dim])
    grid = torch.cartesian_prod(*[axis] * dim).view(-1, dim)
    cell = (2 * BOUND[dim] / (NUM_POINTS[dim] - 1)) ** dim
    return density.log_prob(grid).exp().sum().item() * cell


def run(name: str, rate: float, log_det: str, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    torch.manual_seed(args.seed)
    generator = Generator().manual_seed(args.seed)
    dim = DATA[name](1, generator).shape[1]
    pair = self_normalizing_pair(dim, log_det=log_det)
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [pair.inv])
    optimizer = torch.optim.Adam(pair.parameters(), rate)
    worst = 0.0
    for index in range(args.num_steps):
        optimizer.zero_grad()
        (-density.log_prob(DATA[name](args.batch, generator)).mean()).backward()
        optimizer.step()
        if (index + 1) % max(1, args.num_steps // 10) == 0:
            share = share_of_other_signs(pair, DATA[name](NUM_TRIED, generator))
            worst = max(worst, share)
    pair.eval()
    events = DATA[name](NUM_TRIED_LAST, generator)
    with torch.no_grad():
        loss = -density.log_prob(events).mean().item()
    last = share_of_other_signs(pair, events)
    shares = [f"{100 * share:.2f} %" for share in (worst, last)]
    weight = pair.reconstruction.weight.weight.item()
    found = [f"{loss:.3f}", *shares, f"{integral(density, dim):.4f}", f"{weight:.2g}"]
    return [name, f"{rate:g}", log_det, *found]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 5e-3, 1e-2])
    parser.add_argument("--log-dets", nargs="+", default=["refined", "exact"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # folds are counted
        rows = [run(*setting, args) for setting in product(args.data, args.rates, args.log_dets)]
    header = ["data", "rate", "log-det", "NLL", "other signs, worst", "at the end"]
    results.print_table([*header, "integral", "λ"], rows)


if __name__ == "__main__":
    main()
