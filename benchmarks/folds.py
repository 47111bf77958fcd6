"""Do pairs of networks fold, at their defaults? Determinants of the other sign, and integrals.

    python benchmarks/folds.py
    python benchmarks/folds.py --data moons eight --batch 256 --rates 1e-3
    python benchmarks/folds.py --conditional

Plain Adam at constant rates, with fresh events in every step. Ten times in training, and at its
end, the signs of det J are compared at events, halfway between two of them, and half of their
distance beyond. In up to two dimensions, the density is integrated at the end. With
``--conditional``, those of the plane are turned by an angle, whose cosine and sine are the context;
the integral is that, of three angles, which is farthest from 1.
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
from torch import Generator, Tensor, nn

from pyro_snf import conditional_self_normalizing_pair, self_normalizing_pair
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


#: What is turned with ``--conditional``.
TURNED = ("moons", "rings", "corners")


def turned(points: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the plane turned by angles, and their contexts."""
    context = torch.stack([angles.cos(), angles.sin()], dim=1)
    cosine, sine = context.unbind(1)
    x, y = points.unbind(1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=1), context


class Trial:
    """A pair in training on data of one kind.

    :param bool is_conditional: whether the data are turned.
    """

    def __init__(self, name: str, rate: float, log_det: str, *, is_conditional: bool, seed: int):
        torch.manual_seed(seed)
        self.generator = Generator().manual_seed(seed)
        self.draw, self.is_conditional = DATA[name], is_conditional
        self.dim = self.draw(1, self.generator).shape[1]
        if is_conditional:
            self.pair: nn.Module = conditional_self_normalizing_pair(
                self.dim, context_dim=2, log_det=log_det
            )
        else:
            self.pair = self_normalizing_pair(self.dim, log_det=log_det)
        self.layer = self.pair.transform if is_conditional else self.pair
        self.optimizer = torch.optim.Adam(self.pair.parameters(), rate)

    def log_prob(self, points: Tensor, angles: Tensor) -> Tensor:
        transform = self.pair
        if self.is_conditional:
            points, context = turned(points, angles)
            transform = self.pair.condition(context)
        base = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [transform.inv]).log_prob(points)

    def events(self, count: int) -> Tensor:
        return self.draw(count, self.generator)

    def angles(self, count: int) -> Tensor:
        return 2 * math.pi * torch.rand(count, generator=self.generator)

    def nll(self, count: int) -> Tensor:
        return -self.log_prob(self.events(count), self.angles(count)).mean()

    def step(self, batch: int) -> None:
        self.optimizer.zero_grad()
        self.nll(batch).backward()
        self.optimizer.step()

    @torch.no_grad()
    def share_of_other_signs(self, events: Tensor) -> float:
        difference = events.roll(1, 0) - events
        points = torch.cat([events, events + difference / 2, events + 1.5 * difference])
        context: tuple[Tensor, ...] = ()
        if self.is_conditional:
            points, *context = turned(points, self.angles(len(events)).repeat(3))
        sign, _ = exact_slogdet(self.layer.forward_net, points, tuple(context), ())
        share = (sign > 0).double().mean().item()
        return min(share, 1 - share)

    @torch.no_grad()
    def integral(self) -> float:
        if self.dim not in NUM_POINTS:
            return math.nan
        axis = torch.linspace(-BOUND[self.dim], BOUND[self.dim], NUM_POINTS[self.dim])
        grid = torch.cartesian_prod(*[axis] * self.dim).view(-1, self.dim)
        cell = (2 * BOUND[self.dim] / (NUM_POINTS[self.dim] - 1)) ** self.dim
        angles = [0.0, 2.0, 4.0] if self.is_conditional else [0.0]
        found = [
            self.log_prob(grid, torch.full((len(grid),), angle)).exp().sum().item() * cell
            for angle in angles
        ]
        return max(found, key=lambda value: abs(value - 1))


def run(name: str, rate: float, log_det: str, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    trial = Trial(name, rate, log_det, is_conditional=args.conditional, seed=args.seed)
    worst = 0.0
    for index in range(args.num_steps):
        trial.step(args.batch)
        if (index + 1) % max(1, args.num_steps // 10) == 0:
            worst = max(worst, trial.share_of_other_signs(trial.events(NUM_TRIED)))
    trial.pair.eval()
    with torch.no_grad():
        loss = trial.nll(NUM_TRIED_LAST).item()
    last = trial.share_of_other_signs(trial.events(NUM_TRIED_LAST))
    shares = [f"{100 * share:.2f} %" for share in (worst, last)]
    weight = trial.layer.reconstruction.weight.weight.item()
    found = [f"{loss:.3f}", *shares, f"{trial.integral():.4f}", f"{weight:.2g}"]
    return [name, f"{rate:g}", log_det, *found]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, metavar="NAME")
    parser.add_argument("--conditional", action="store_true")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 5e-3, 1e-2])
    parser.add_argument("--log-dets", nargs="+", default=["refined", "exact"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    names = args.data or (TURNED if args.conditional else list(DATA))
    if args.conditional and not set(names) <= set(TURNED):
        parser.error(f"--conditional: expected --data of {', '.join(TURNED)}")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # folds are counted
        rows = [run(*setting, args) for setting in product(names, args.rates, args.log_dets)]
    header = ["data", "rate", "log-det", "NLL", "other signs, worst", "at the end"]
    results.print_table([*header, "integral", "λ"], rows)


if __name__ == "__main__":
    main()
