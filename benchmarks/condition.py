"""Steps to 0.1 nats of a Gaussian posterior, against its condition number.

The covariance has log-uniform eigenvalues around 1 and random directions; along each of them the
mean is 3 ε standard deviations, ε ~ N(0, 1). Guides start at N(0, 0.1² I). Eight samples a step,
float64, one thread. The Kullback–Leibler divergence from the guide is checked after every 5 steps,
or 5 % more steps: exactly where the guide is Gaussian, and otherwise from 500 samples, with the
known density.

``NaturalGradient`` without a decay; ``Adam`` at three constant rates, of which the best one counts.

    python benchmarks/condition.py run --max-steps 20000
    python benchmarks/condition.py table
    python benchmarks/condition.py plot

``run`` appends to ``--results`` as they come, and does not repeat what is there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import results
import torch
from matplotlib.figure import Figure
from posteriors import Gaussian
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal
from torch import Tensor

from pyro_snf import AutoSelfNormalizingFlow
from pyro_snf.optim import NaturalGradient

GOAL = 0.1
NUM_PARTICLES = 8
NUM_SAMPLES = 500
RATES = (3e-3, 1e-2, 3e-2)

#: The guide, and whether it is NaturalGradient that trains it.
METHODS: dict[str, tuple[Callable[..., AutoContinuous], bool]] = {
    "NaturalGradient, num_layers=1": (partial(AutoSelfNormalizingFlow, num_layers=1), True),
    "NaturalGradient, num_layers=2": (AutoSelfNormalizingFlow, True),
    "Adam, num_layers=1": (partial(AutoSelfNormalizingFlow, num_layers=1), False),
    "Adam, num_layers=2": (AutoSelfNormalizingFlow, False),
    "Adam, AutoMultivariateNormal": (AutoMultivariateNormal, False),
}


def make_target(dim: int, condition: float, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    limit = math.log10(condition) / 4  # of a standard deviation
    deviations = torch.logspace(-limit, limit, dim)
    mean = rotation @ (deviations * 3 * torch.randn(dim, generator=generator))
    triangle = torch.linalg.qr((rotation * deviations).mT).R  # RᵀR is the covariance
    return Gaussian(mean, (triangle * triangle.diagonal().sign().unsqueeze(-1)).mT)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    for seed in args.seeds:
        for dim in args.dims:
            for condition in args.conditions:
                target = make_target(dim, condition, seed)
                for method in args.methods:
                    for rate in [None] if METHODS[method][1] else RATES:
                        key = {"dim": dim, "condition": condition, "seed": seed}
                        key |= {"method": method, "rate": rate, "max_steps": args.max_steps}
                        if not results.select(results.load(args.results), **key):
                            pyro.set_rng_seed(seed)
                            found = train(target, method, rate, args.max_steps)
                            results.append(args.results, {**key, **found})


def train(target: Gaussian, method: str, rate: float | None, max_steps: int) -> results.Row:
    """The number of steps to the goal, or infinity, and the divergence at the end."""
    dim = len(target.mean)
    posterior = dist.MultivariateNormal(target.mean, scale_tril=target.tril)

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("posterior", posterior.log_prob(z))

    make_guide, _ = METHODS[method]
    pyro.clear_param_store()
    guide = make_guide(model, init_loc_fn=lambda site: torch.zeros(dim))
    optim = NaturalGradient(guide) if rate is None else pyro.optim.Adam({"lr": rate})
    elbo = Trace_ELBO(NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, optim, elbo)
    divergence, steps, check_at = math.inf, 0, 5
    start = time.perf_counter()
    while steps < max_steps and not divergence < GOAL:
        svi.step()
        steps += 1
        if steps in (check_at, max_steps):
            divergence = estimate(target, posterior, guide)
            check_at += max(5, steps // 20)
    seconds = time.perf_counter() - start
    reached = steps if divergence < GOAL else math.inf
    return {"steps": reached, "divergence": divergence, "ms_per_step": 1e3 * seconds / steps}


@torch.no_grad()
def estimate(target: Gaussian, posterior: dist.Distribution, guide: AutoContinuous) -> float:
    """The divergence from the guide to the posterior, exact if the guide is Gaussian."""
    if isinstance(guide, AutoMultivariateNormal) or guide.num_layers == 1:
        return target.divergence_from(guide)
    guide.eval()
    approximation = guide.get_posterior()
    z: Tensor = approximation.sample((NUM_SAMPLES,))
    divergence = (approximation.log_prob(z) - posterior.log_prob(z)).mean().item()
    guide.train()
    return divergence


def best_steps(rows: Sequence[results.Row], **key: object) -> float:
    """The median over the seeds at the best rate; NaN if there are no results."""
    found = results.select(rows, **key)
    rates = {row["rate"] for row in found}
    medians = [
        statistics.median(row["steps"] for row in results.select(found, rate=rate))
        for rate in rates
    ]
    return min(medians, default=math.nan)


def table(args: argparse.Namespace) -> None:
    """Steps, of the median seed at the best rate, and the ms a step with what it takes to check."""
    rows = results.select(results.load(args.results), max_steps=args.max_steps)
    lines = []
    for dim in args.dims:
        for method in args.methods:
            here = results.select(rows, dim=dim, method=method)
            if here:
                counts = [best_steps(here, condition=condition) for condition in args.conditions]
                cells = [
                    "–"
                    if math.isnan(count)
                    else f"> {args.max_steps}"
                    if count == math.inf
                    else f"{count:.0f}"
                    for count in counts
                ]
                milliseconds = statistics.median(row["ms_per_step"] for row in here)
                lines.append([str(dim), method, *cells, f"{milliseconds:.1f}"])
    results.print_table(
        ["D", "method", *(f"{condition:g}" for condition in args.conditions), "ms/step"], lines
    )


def plot(args: argparse.Namespace) -> None:
    """A panel for each D. Where the goal is not reached, a triangle at the largest number."""
    rows = results.select(results.load(args.results), max_steps=args.max_steps)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panels = figure.subplots(1, len(args.dims), sharey=True, squeeze=False)[0]
    styles = dict(
        zip(METHODS, ["#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73"], strict=True)
    )
    methods = [method for method in args.methods if results.select(rows, method=method)]
    for axes, dim in zip(panels, args.dims, strict=True):
        for method in methods:
            here = results.select(rows, dim=dim, method=method)
            counts = [best_steps(here, condition=condition) for condition in args.conditions]
            heights = [min(count, args.max_steps) for count in counts]  # of NaN, NaN
            color, dashes = styles[method], "-" if METHODS[method][1] else "--"
            axes.plot(args.conditions, heights, color=color, linestyle=dashes, label=method)
            for condition, count, height in zip(args.conditions, counts, heights, strict=True):
                axes.plot(condition, height, "^" if count == math.inf else "o", color=color, ms=5)
        axes.set(xscale="log", yscale="log", title=f"D = {dim}")
        axes.set_xticks([1e0, 1e4, 1e8])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"steps to {GOAL} nats")
    figure.supxlabel("condition number of the posterior covariance", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=200)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument("--results", type=Path, default=Path("outputs/condition.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/condition.png"))
    parser.add_argument("--dims", nargs="+", type=int, default=[10, 64, 256])
    conditions = [1e0, 1e2, 1e4, 1e6, 1e8]
    parser.add_argument("--conditions", nargs="+", type=float, default=conditions)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--max-steps", type=int, default=5000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(argv)
    {"run": run, "table": table, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
