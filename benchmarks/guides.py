"""Guides on posteriors of 20 to 2,500 dimensions, at equal wall-clock time.

Every guide is trained by SVI with Adam and one sample a step, at three learning rates, from three
seeds; the guides of one posterior, rate and seed take turns of 0.2 s, so that whatever else the
machine does slows all of them alike. Then −ELBO is estimated from 500 fresh samples, with exact
log-determinants. One thread. A guide that has diverged has no −ELBO: it counts as infinite.

``fit`` is ``pyro_snf.fit`` with its defaults, for the same time: as many steps as fit in according
to 50 steps before, which do not count. It runs by itself: best on a machine that does nothing else.

    python benchmarks/guides.py run
    python benchmarks/guides.py fit
    python benchmarks/guides.py table
    python benchmarks/guides.py run --guides variants --results outputs/variants.jsonl

``run`` and ``fit`` append to ``--results`` as they come, and do not repeat what is there; so more
than one may run at a time. ``table`` prints them, ``plot`` draws them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyro
import results
import torch
import turns
import zuko
from matplotlib.figure import Figure
from posteriors import POSTERIORS, Posterior, evaluate
from pyro.distributions import TransformModule
from pyro.distributions.transforms import block_autoregressive
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from torch import Tensor
from torch.distributions import constraints

from pyro_snf import AutoSelfNormalizingFlow, fit

RATES = (1e-3, 3e-3, 1e-2)
OURS = "AutoSelfNormalizingFlow"
FIT = "fit"
NUM_TIMED_STEPS = 50

#: A −ELBO of this size, of either sign, is nothing but overflow.
DIVERGED = 1e6


class ZukoTransform(TransformModule):
    """A flow of Zuko's as a transform of Pyro's, ending in a scale of 0.1 that is learned.

    Its autoregressive networks are evaluated once from latent to data, as in an inverse
    autoregressive flow: a guide goes that way in each step. As a density model, which Zuko makes
    them for, they go the other way.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: zuko.lazy.Flow, dim: int) -> None:
        super().__init__(cache_size=1)
        self.flow = flow.transform
        self.loc = torch.nn.Parameter(torch.zeros(dim))
        self.log_scale = torch.nn.Parameter(torch.full((dim,), math.log(0.1)))

    def _call(self, x: Tensor) -> Tensor:
        y, self._log_det = self.flow().call_and_ladj(x)
        return self.loc + self.log_scale.exp() * y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._log_det + self.log_scale.sum()  # of the sample that is scored


def zuko_guide(flow: Callable[..., zuko.lazy.Flow], model: Callable[[], object]) -> AutoContinuous:
    return AutoNormalizingFlow(model, lambda dim: ZukoTransform(flow(dim), dim))


#: The largest D for each, where there is one. Above, the time is not enough for some hundred steps.
GUIDES: dict[str, tuple[Callable[..., AutoContinuous], float]] = {
    OURS: (AutoSelfNormalizingFlow, math.inf),
    "AutoNormal": (AutoNormal, math.inf),
    "AutoDiagonalNormal": (AutoDiagonalNormal, math.inf),
    "AutoMultivariateNormal": (AutoMultivariateNormal, math.inf),
    "AutoLowRankMultivariateNormal": (AutoLowRankMultivariateNormal, math.inf),
    "AutoIAFNormal": (AutoIAFNormal, 1000),
    "block_autoregressive": (
        lambda model: AutoNormalizingFlow(model, block_autoregressive),
        300,
    ),
    "Zuko MAF": (partial(zuko_guide, zuko.flows.MAF), 1000),
    "Zuko NSF": (partial(zuko_guide, zuko.flows.NSF), 1000),
}

#: What each choice is worth: run with ``--guides variants``.
VARIANTS: dict[str, tuple[Callable[..., AutoContinuous], float]] = {
    OURS: GUIDES[OURS],
    "gradient='total'": (partial(AutoSelfNormalizingFlow, gradient="total"), math.inf),
    "clip=None": (partial(AutoSelfNormalizingFlow, clip=None), math.inf),
    "num_layers=1": (partial(AutoSelfNormalizingFlow, num_layers=1), math.inf),
    "num_layers=3": (partial(AutoSelfNormalizingFlow, num_layers=3), math.inf),
}

CHOICES = {"all": GUIDES, "variants": VARIANTS}


def seconds_for(dim: int) -> float:
    """How long a guide is trained."""
    return 8.0 if dim < 600 else 20.0 if dim < 1000 else 40.0


@pyro.settings.context(module_local_params=True)
def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Encountered", UserWarning)  # a guide that has diverged
    chosen = CHOICES[args.guides]
    for seed in args.seeds:
        for name in args.posteriors or POSTERIORS:
            posterior = POSTERIORS[name]()
            for rate in args.rates:
                key = {"posterior": name, "rate": rate, "seed": seed}
                done = {row["guide"] for row in results.select(results.load(args.results), **key)}
                wanted = {guide: make for guide, make in chosen.items() if guide not in done}
                for row in compare(posterior, wanted, rate, seed):
                    results.append(args.results, {**key, **row})


@pyro.validation_enabled(False)  # as for the others
def run_fit(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the loss was still falling", UserWarning)
    for seed in args.seeds:
        for name in args.posteriors or POSTERIORS:
            key = {"posterior": name, "rate": None, "seed": seed, "guide": FIT}
            if not results.select(results.load(args.results), **key):
                results.append(args.results, {**key, **fit_for_seconds(POSTERIORS[name](), seed)})


def fit_for_seconds(posterior: Posterior, seed: int) -> results.Row:
    """``pyro_snf.fit`` for as long as the others are trained."""
    model = posterior.model
    for _ in range(2):  # the first time, torch and Pyro prepare themselves
        pyro.clear_param_store()
        trial = fit(
            model, AutoSelfNormalizingFlow(model), num_steps=NUM_TIMED_STEPS, progress=False
        )
    num_steps = max(1, int(seconds_for(posterior.dim) / trial.seconds * NUM_TIMED_STEPS))
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoSelfNormalizingFlow(model)
    done = fit(model, guide, num_steps=num_steps, progress=False)
    loss, error = evaluate(model, guide, 500)
    return {
        "loss": loss,
        "error": error,
        "steps": num_steps,
        "ms_per_step": 1e3 * done.seconds / num_steps,
        "seconds": done.seconds,
        "reason": done.reason,
    }


def compare(
    posterior: Posterior,
    chosen: Mapping[str, tuple[Callable[..., AutoContinuous], float]],
    rate: float,
    seed: int,
) -> list[dict[str, object]]:
    """A row for each guide."""
    pyro.set_rng_seed(seed)
    guides = {
        name: make(posterior.model)
        for name, (make, largest) in chosen.items()
        if posterior.dim <= largest
    }
    lengths = turns.train(
        posterior.model, guides, learning_rate=rate, seconds=seconds_for(posterior.dim)
    )
    rows = []
    for name, guide in guides.items():
        loss, error = evaluate(posterior.model, guide, 500)
        rows.append(
            {
                "guide": name,
                "loss": loss,
                "error": error,
                "steps": lengths[name].steps,
                "ms_per_step": 1e3 * lengths[name].seconds / lengths[name].steps,
            }
        )
    return rows


def collect(path: Path) -> tuple[dict, dict]:
    """For each posterior and guide the losses by rate, and the times of a step."""
    losses = defaultdict(lambda: defaultdict(list))
    times = defaultdict(list)
    for row in results.load(path):
        key = row["posterior"], row["guide"]
        diverged = not abs(row["loss"]) < DIVERGED or row["loss"] < lowest(row["posterior"])
        losses[key][row["rate"]].append(math.inf if diverged else row["loss"])
        times[key].append(row["ms_per_step"])
    return losses, times


def table(args: argparse.Namespace) -> None:
    """For each guide the mean over the seeds at each rate, and the ms a step; then the best rates.

    ``fit`` has no rate: its mean is its best and its worst.
    """
    losses, times = collect(args.results)
    posteriors = [name for name in POSTERIORS if any(key[0] == name for key in losses)]
    guides = [name for name in (FIT, *{**GUIDES, **VARIANTS}) if any(k[1] == name for k in losses)]
    for posterior in posteriors:
        print(f"\n**{posterior}**")
        rows = []
        for guide in guides:
            found = losses.get((posterior, guide))
            if found:
                means = [statistics.fmean(values) for values in found.values()]
                cells = [spread(found.get(rate, [])) for rate in RATES]
                cells += [number(min(means)), number(max(means))]
                cells.append(f"{statistics.median(times[posterior, guide]):.1f}")
                rows.append([guide, *cells])
        results.print_table(
            ["guide", *(f"{rate:g}" for rate in RATES), "best", "worst", "ms/step"], rows
        )

    rows = []
    for posterior in posteriors:
        best = {
            guide: min(losses[posterior, guide].values(), key=statistics.fmean)
            for guide in guides
            if losses.get((posterior, guide))
        }
        rivals = [guide for guide in best if guide not in (FIT, OURS)]
        rival = min(rivals, key=lambda guide: statistics.fmean(best[guide]), default="–")
        fits = results.select(results.load(args.results), posterior=posterior, guide=FIT)
        cells = [results.spread([row["seconds"] for row in fits]), rival]
        rows.append([posterior, *cells, *(spread(best.get(guide, [])) for guide in guides)])
    print("\nEvery guide at its best rate:")
    results.print_table(["posterior", "fit, s", "best rival", *guides], rows)


def plot(args: argparse.Namespace) -> None:
    """How far each guide, at its best rate, is above the lowest of all: numbers in a grid."""
    losses, _ = collect(args.results)
    best = {
        key: min(statistics.fmean(found) for found in by_rate.values())
        for key, by_rate in losses.items()
    }
    draw(best, args.picture)


def draw(best: dict[tuple[str, str], float], path: Path) -> None:
    """:param best: for posteriors and guides, the −ELBO at the best rate."""
    guides = [name for name in (FIT, *GUIDES) if any(key[1] == name for key in best)]
    posteriors = [name for name in POSTERIORS if any(key[0] == name for key in best)]
    figure = Figure(figsize=(9, 0.42 * len(guides) + 1.6), layout="constrained")
    axes = figure.subplots()
    above = np.full((len(guides), len(posteriors)), np.nan)
    for column, posterior in enumerate(posteriors):
        found = [best.get((posterior, guide), math.nan) for guide in guides]
        above[:, column] = np.array(found) - np.nanmin(found)
    shades = np.log10(np.clip(above, 0.1, 1e3))
    axes.imshow(shades, cmap="YlOrRd", aspect="auto", vmin=-1, vmax=4)
    for (row, column), value in np.ndenumerate(above):
        text = "–" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"
        weight = "bold" if value == 0 else "normal"
        axes.text(column, row, text, ha="center", va="center", fontsize=10, weight=weight)
    labels = ["fit, with its defaults" if name == FIT else name for name in guides]
    axes.set_yticks(range(len(guides)), labels, fontsize=10)
    names = ["\n".join(textwrap.fill(part, 11) for part in name.split(", ")) for name in posteriors]
    axes.set_xticks(range(len(posteriors)), names, fontsize=9)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.supxlabel(
        "−ELBO above the lowest (nats), after equal time; all but fit by Adam, best of 3 rates",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


@cache  # to make the posterior may take seconds
def lowest(name: str) -> float:
    """What no −ELBO can be below, but by the error of its estimate."""
    evidence = POSTERIORS[name]().negative_log_evidence
    return -math.inf if evidence is None else evidence - 1.0


def spread(values: Sequence[float]) -> str:
    return results.spread(values) if all(value < DIVERGED for value in values) else "diverged"


def number(value: float) -> str:
    return results.number(value if value < DIVERGED else math.inf)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "fit", "table", "plot"])
    parser.add_argument("--results", type=Path, default=Path("outputs/guides.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/guides.png"))
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, metavar="NAME")
    parser.add_argument("--guides", choices=CHOICES, default="all")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args(argv)
    {"run": run, "fit": run_fit, "table": table, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
