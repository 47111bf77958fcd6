"""When were they infected? HIV infections from AIDS diagnoses, by neural posterior estimation.

    θ_1 ~ Normal(log 30, 1.5),    θ_s ~ Normal(θ_{s−1}, 0.4),    x_t ~ Poisson(Σ_s F_ts exp(θ_s))

θ has the logs of the numbers infected in the 48 quarters of 1978 to 1989, x the diagnoses in the
last 26. F_ts is the probability that an incubation from quarter s ends in t: Weibull, with median
9.8 years (Bacchetti and Moss, 1989) and shape 2.5. A network learns q(θ | x) from simulated pairs,
by the loss −log q(θ | x). England and Wales, observed, is then one more x, without another fit.

    python examples/amortized.py    # a minute or two; with seed 0:

    posterior      -log q   bound  ellipsoids  intervals      observed
    mean field      57.68  -27.86        0.79        0.5  2092 to 5516
    dense, rank 0   22.47   19.21         0.9       0.89  535 to 17734
    dense, rank 4   21.70   18.83        0.91        0.9  1122 to 8883

The table: −log q(θ | x) of new pairs in nats; a bound that no q is below, on average; the shares of
θ in 90 % ellipsoids and of numbers infected since 1986 in 90 % intervals; the interval observed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from common import finish, make_parser
from matplotlib.figure import Figure
from torch import Tensor

from pyro_snf import ActNorm, conditional_self_normalizing_linear
from pyro_snf.progress import Progress

D, NUM_TEST, NUM_DRAWS = 48, 500, 1000
RANKS = {"mean field": 0, "dense, rank 0": 0, "dense, rank 4": 4}


class Epidemic:
    def __init__(self) -> None:
        path = Path(__file__).parent / "data" / "aids_quarterly.csv"
        counts = np.loadtxt(path, delimiter=",", skiprows=3, usecols=2)
        self.observed = torch.tensor(counts[None], dtype=torch.get_default_dtype())
        steps = torch.ones(D, D).tril() * torch.tensor([1.5] + [0.4] * (D - 1))
        self.prior = dist.MultivariateNormal(torch.full((D,), np.log(30)), scale_tril=steps)
        years = (torch.arange(D - len(counts), D + 1).unsqueeze(1) - torch.arange(D) - 0.5) / 4
        self.incubation = -torch.exp(-np.log(2) * (years.relu() / 9.8) ** 2.5).diff(dim=0)

    def diagnoses(self, theta: Tensor) -> dist.Distribution:
        return dist.Poisson(theta.clamp(max=60).exp() @ self.incubation.mT).to_event(1)  # finite

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = self.prior.sample([count])
        return theta, self.diagnoses(theta).sample()


def fit(epidemic: Epidemic, name: str, num_steps: int) -> dist.ConditionalTransformedDistribution:
    theta, x = epidemic.simulate(1000)  # for the scales of θ, and of the context, log(1 + x)
    layer = conditional_self_normalizing_linear(D, x.shape[1], [128, 128], rank=RANKS[name])
    layer.standardize_contexts(x.log1p())
    layer.linear.theta.requires_grad_(name != "mean field")  # where W stays the identity
    norm = ActNorm(D, event_dim=1)
    norm.initialize(theta)
    base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    q = dist.ConditionalTransformedDistribution(base, [layer.inv, norm.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    with Progress(True, num_steps) as progress:
        for _ in range(num_steps):
            theta, x = epidemic.simulate(256)
            optimizer.zero_grad()
            loss = -q.condition(x.log1p()).log_prob(theta).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 20.0)  # of rare, extreme epidemics
            optimizer.step()
            schedule.step()
            progress.update(f"{name}, loss {loss.item():.1f}")
    return q


@torch.no_grad()  # so log-dets are exact
def evaluate(epidemic: Epidemic, q: dist.Distribution, theta: Tensor, x: Tensor) -> dict:
    draws = q.sample([NUM_DRAWS])
    joint, joint_of_draws = (
        epidemic.prior.log_prob(one) + epidemic.diagnoses(one).log_prob(x) for one in (theta, draws)
    )
    evidence = (joint_of_draws - q.log_prob(draws)).logsumexp(0) - np.log(NUM_DRAWS)
    distance = q.transforms[0].inv(q.transforms[1].inv(theta)).square().sum(-1)
    total, drawn = (one[..., 32:].exp().sum(-1) for one in (theta, draws))
    return {
        "-log q": -q.log_prob(theta).mean().item(),
        "bound": (evidence - joint).mean().item(),
        "ellipsoids": (dist.Chi2(D).cdf(distance) < 0.9).float().mean().item(),
        "intervals": (((drawn < total).float().mean(0) - 0.5).abs() < 0.45).float().mean().item(),
    }


def main(argv: list[str] | None = None) -> list[dict]:
    args = make_parser(__doc__, num_steps=3000).parse_args(argv)
    epidemic, years = Epidemic(), 1978.125 + np.arange(D) / 4
    table, levels, figure = [], (0.05, 0.95), Figure(figsize=(10, 3.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, 3, sharey=True), RANKS, strict=True):
        torch.manual_seed(args.seed)
        theta, x = epidemic.simulate(NUM_TEST)
        q = fit(epidemic, name, args.num_steps)
        row = {"posterior": name, **evaluate(epidemic, q.condition(x.log1p()), theta, x)}
        draws = q.condition(epidemic.observed.log1p()).sample([4000])[:, 0]
        infections = draws.exp().numpy()
        low, high = np.quantile(infections[:, 32:].sum(1), levels)
        table.append({**row, "observed": f"{low:.0f} to {high:.0f}"})
        panel.fill_between(years, *np.quantile(infections, levels, axis=0), alpha=0.3)
        panel.semilogy(years, infections[:5].T, linewidth=1)
        panel.set(title=name, ylim=(1, 1e4), xlabel="year", xticks=range(1978, 1991, 4))
    figure.supylabel("infections in a quarter", fontsize="medium")
    finish(table, figure, args.output_dir, "amortized")
    return table


if __name__ == "__main__":
    main()
