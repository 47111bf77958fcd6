"""A density of any two networks: two spirals, by one self-normalizing pair.

A free-form layer takes any network f for the flow, and a second one, g, learns to be its inverse.
Here both are plain residual networks, without what makes other flows invertible: no couplings, no
bounds on weights. The spirals are a mixture of 800 round Gaussians, so their density is known.

    python examples/free_form.py    # half a minute; with seed 0:

    density   test NLL (nats)  above truth       ±  integral
    truth                2.37            0       0    1.0000
    pair                 2.38        0.011  0.0046    1.0000
    Gaussian             2.92         0.55   0.028    0.9997

Nothing makes f invertible but training. Where it folds, two points have one latent, and the
likelihood looks better than it is. So the program checks three things, and finds no fold: all
determinants have one sign, all test points are recovered from their latents, and the density
integrates to one.

The picture, free_form.png: the density of the pair, beside the true one and a Gaussian's.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from common import finish, make_parser
from torch import Tensor, nn

from pyro_snf import ResidualMLP, SelfNormalizingPair
from pyro_snf.diagnostics import pair_report
from pyro_snf.plotting import plot_densities
from pyro_snf.progress import Progress

BATCH_SIZE, NUM_TEST, LEARNING_RATE = 256, 1000, 3e-3
LIMIT, NUM_CELLS = 4.0, 120  # of the square that the density is integrated over


def make_spirals() -> dist.Distribution:
    angles = 3 * math.pi * torch.linspace(0, 1, 400).sqrt()
    arm = torch.stack([-angles * angles.cos(), angles * angles.sin()], dim=1) / 4.5
    means = torch.cat([arm, -arm])
    parts = dist.Normal(means, 0.13).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(means))), parts)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


def make_pair() -> SelfNormalizingPair:
    f, g = (ResidualMLP(2, [64, 64], num_blocks=3, activation=Sine) for _ in range(2))
    return SelfNormalizingPair(f, g, event_shape=2, log_det="exact")


def fit(density: dist.Distribution, pair: nn.Module, truth: dist.Distribution, steps: int) -> None:
    optimizer = torch.optim.Adam(pair.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with Progress(True, steps) as progress:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -density.log_prob(truth.sample((BATCH_SIZE,))).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(f"−log p {loss.item():.3f}")
    pair.eval()  # likelihoods are exact from here on


def integral(density: dist.Distribution) -> float:
    """Over a square, by the midpoints of its cells."""
    width = 2 * LIMIT / NUM_CELLS
    line = width * (torch.arange(NUM_CELLS) + 0.5) - LIMIT
    return density.log_prob(torch.cartesian_prod(line, line)).exp().sum().item() * width**2


def main(argv: list[str] | None = None) -> list[dict]:
    args = make_parser(__doc__, num_steps=1000).parse_args(argv)
    torch.manual_seed(args.seed)
    truth, pair = make_spirals(), make_pair()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [pair.inv])
    fit(density, pair, truth, args.num_steps)

    test = truth.sample((NUM_TEST,))
    gaussian = dist.MultivariateNormal(test.mean(0), torch.cov(test.T))
    densities = {"truth": truth, "pair": density, "Gaussian": gaussian}
    table = []
    with torch.no_grad():
        for name, one in densities.items():
            above = truth.log_prob(test) - one.log_prob(test)
            row = {"density": name, "test NLL (nats)": -one.log_prob(test).mean().item()}
            row["above truth"], row["±"] = above.mean().item(), above.std().item() / NUM_TEST**0.5
            table.append({**row, "integral": f"{integral(one):.4f}"})
        panels = {"data": test, **{name: one.log_prob for name, one in densities.items()}}
        figure = plot_densities({"": panels}, limit=3.0, title="Two spirals: log densities")
    found = pair_report(pair, test)
    print(f"det J has one sign at {found.num_oriented} of {found.num_events} test points")
    print(f"{found.num_recovered} of {found.num_events} are recovered from their latents")
    print(f"{found.num_unique} of {found.num_events} share no latent with a point that was found\n")
    finish(table, figure, args.output_dir, "free_form")
    return table


if __name__ == "__main__":
    main()
