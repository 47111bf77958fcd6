"""How many sunspots were to be expected? A log-Gaussian Cox process, by a self-normalizing guide.

    field ~ GaussianProcess(0, Matérn 5/2),    counts_t ~ Poisson(exp(3.5 + field_t))

The counts are the yearly sunspot numbers of 1700 to 2008, so that D = 309. Two guides are fitted by
as many steps: AutoSelfNormalizingFlow, and Pyro's AutoNormal, in which all years are independent.

    python examples/svi_guide.py    # half a minute; with seed 0:

    guide                    -ELBO (nats)    gap  khat  90 % in 1810
    AutoSelfNormalizingFlow       1287.39   0.24  0.34    0.9 to 3.1
    AutoNormal                    1351.23  27.31  3.42    1.5 to 2.1

Lower −ELBO is better: the difference of two is that of their divergences KL(q‖p). The gap is an
estimate of this divergence, good where it is small. Below khat = 0.7 the weights p(x, z)/q(z) can
correct what is left (`pyro_snf.diagnostics.psis`); above, the guide is not to be trusted. The last
column has the number of sunspots to be expected in 1810, when none was seen.

The picture, svi_guide.png, shows why. In the posterior, a year is correlated with its neighbours;
AutoNormal cannot know, and its 90 % bands are much too narrow where counts say little.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import finish, make_parser
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_snf import AutoSelfNormalizingFlow, fit
from pyro_snf.diagnostics import psis

MEAN = 3.5  # of the logarithm of the intensity
SHOWN = slice(1798 - 1700, 1824 - 1700)  # the years of the picture, around the minimum of 1810


def load_sunspots() -> tuple[Tensor, Tensor]:
    path = Path(__file__).parent / "data" / "sunspots_yearly.csv"
    table = np.loadtxt(path, delimiter=",", skiprows=4)
    return tuple(torch.tensor(table.T, dtype=torch.get_default_dtype()))


def make_model(years: Tensor, counts: Tensor) -> Callable[[], None]:
    # The length scale of 3 years and the amplitude of 1.2 have about the highest evidence.
    scaled = 5**0.5 * (years.double()[:, None] - years).abs() / 3.0
    covariance = 1.2**2 * (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)
    covariance.diagonal().add_(1e-6)  # for the factorization
    scale_tril = torch.linalg.cholesky(covariance).to(counts.dtype)
    prior = dist.MultivariateNormal(torch.zeros_like(counts), scale_tril=scale_tril)

    def model() -> None:
        field = pyro.sample("field", prior)
        intensity = torch.exp(MEAN + field)
        pyro.sample("counts", dist.Poisson(intensity).to_event(1), obs=counts)

    return model


def plot(years: Tensor, counts: Tensor, draws: dict[str, Tensor]) -> Figure:
    """The bands of the guides, one upon the other, and the draws of two years side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for (name, intensity), color in zip(draws.items(), ["#0072B2", "#D55E00"], strict=True):
        low, high = torch.quantile(intensity[:, SHOWN], torch.tensor([0.05, 0.95]), dim=0)
        left.fill_between(years[SHOWN], low, high, color=color, alpha=0.5, lw=0, label=name)
        right.plot(*intensity[:2000, 110:112].T, ".", color=color, ms=3, mew=0, alpha=0.5)
    left.plot(years[SHOWN], counts[SHOWN], "k.", markersize=4, label="counts")
    left.set(title="Expected sunspots, 90 % bands", xlabel="year", yscale="log", ylim=(0.7, 90))
    left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    left.legend(frameon=False, loc="lower right", fontsize="small")
    right.set(title="Draws of two years", xlabel="1810", ylabel="1811", xlim=(0, 5), ylim=(0, 6))
    return figure


def main(argv: list[str] | None = None) -> list[dict]:
    args = make_parser(__doc__, num_steps=1500).parse_args(argv)
    years, counts = load_sunspots()
    model = make_model(years, counts)
    table, draws = [], {}
    # In as few steps, AutoNormal needs larger ones than fit() would take.
    adam = ClippedAdam({"lr": 0.05, "lrd": 0.002 ** (1 / args.num_steps)})
    for make_guide, optim in [(AutoSelfNormalizingFlow, None), (AutoNormal, adam)]:
        pyro.clear_param_store()
        name, guide = make_guide.__name__, make_guide(model)
        budget = {"num_steps": args.num_steps, "tolerance": None, "seed": args.seed}
        fit(model, guide, optim=optim, **budget)
        check = psis(model, guide, num_samples=4000)  # its log-dets are exact
        draws[name] = torch.exp(MEAN + check.samples["field"])
        low, high = np.quantile(draws[name][:, 110], [0.05, 0.95])
        row = {"guide": name, "-ELBO (nats)": -check.elbo, "gap": check.gap, "khat": check.khat}
        table.append({**row, "90 % in 1810": f"{low:.1f} to {high:.1f}"})
    finish(table, plot(years, counts, draws), args.output_dir, "svi_guide")
    return table


if __name__ == "__main__":
    main()
