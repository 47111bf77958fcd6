"""Posteriors of posteriordb: means and standard deviations against the reference draws.

    https://github.com/stan-dev/posteriordb

The folder has ``data-*.json.zip`` and ``draws-*.json.zip``, as published there. The models are in
their raw units. Float64, one thread. Errors are the largest of any quantity: of a mean in posterior
standard deviations, and of the logarithm of a standard deviation, in 10,000 draws from the guide.

- ``fit``: ``pyro_snf.fit`` with its defaults, but to the last step, of 500, 1,000 and 2,000 steps.
- its rivals, for as many seconds as the 2,000 steps take, with as many particles: Pyro's guides,
  and the same guide as in ``fit``, by the recipe of ``annealing.py``. Pyro's guides cannot start
  where priors are flat: they get good values there (``Posterior.start``), to their advantage, but
  that AutoIAFNormal makes no use of any values: it starts near N(0, I), unconstrained.
- ``NUTS``: Pyro's, from these values, 500 steps of warmup; the seconds until the draws so far
  have both errors below 0.1, which is checked (without counting it) after every 100 draws.

    python benchmarks/posteriordb.py run --data-dir DIR
    python benchmarks/posteriordb.py run --data-dir DIR --methods fit --num-starts 1
    python benchmarks/posteriordb.py table

``run`` appends to ``--results`` as they come, and does not repeat what is there. Where a guide has
no finite weights, its errors count as infinite.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import annealing
import pyro
import results
import torch
from posteriordb_models import POSTERIORS, Posterior, errors, load
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoContinuous, AutoIAFNormal, AutoMultivariateNormal
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_median,
    init_to_uniform,
    init_to_value,
)
from torch import Tensor

from pyro_snf import AutoSelfNormalizingFlow, fit
from pyro_snf.diagnostics import psis

NUM_STEPS = (500, 1000, 2000)
RIVALS = ("ClippedAdam", "AutoMultivariateNormal", "AutoIAFNormal")
METHODS = ("fit", *RIVALS, "NUTS")

GOAL = 0.1
NUM_PARTICLES = 8  # fit's default
NUM_DRAWS = 10_000
NUM_WARMUP, CHECK_EVERY = 500, 100


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # as Stan has it
    pyro.enable_validation(False)
    warnings.filterwarnings("ignore", "the loss was still falling", UserWarning)
    for seed in args.seeds:
        for name in args.posteriors:
            run_one(load(name, args.data_dir), seed, args)


def run_one(posterior: Posterior, seed: int, args: argparse.Namespace) -> None:
    """Every method on a posterior."""
    key = {"posterior": posterior.name, "seed": seed}

    def add(make: Callable[[], results.Row], **names: object) -> None:
        if not results.select(results.load(args.results), **key, **names):
            pyro.set_rng_seed(seed)
            pyro.clear_param_store()
            results.append(args.results, {**key, "dim": posterior.dim, **names, **make()})

    if "fit" in args.methods:
        for num_steps in NUM_STEPS:
            add(
                lambda num_steps=num_steps: run_fit(posterior, num_steps, args.num_starts),
                method=fit_name(args.num_starts),
                num_steps=num_steps,
            )
    found = results.select(results.load(args.results), **key, method="fit", num_steps=NUM_STEPS[-1])
    for rival in RIVALS:
        if found and rival in args.methods:
            add(lambda rival=rival: run_rival(posterior, rival, found[0]["seconds"]), method=rival)
    if "NUTS" in args.methods:
        add(lambda: run_nuts(posterior, args.nuts_seconds), method="NUTS")


def fit_name(num_starts: int | None) -> str:
    return "fit" if num_starts is None else f"fit, num_starts={num_starts}"


def run_fit(posterior: Posterior, num_steps: int, num_starts: int | None) -> results.Row:
    guide = AutoSelfNormalizingFlow(posterior.model)
    done = fit(
        posterior.model,
        guide,
        num_steps=num_steps,
        num_starts=num_starts,
        tolerance=None,
        progress=False,
    )
    return {**evaluate(posterior, guide), "seconds": done.seconds, "reason": done.reason}


@pyro.settings.context(module_local_params=True)
def run_rival(posterior: Posterior, rival: str, seconds: float) -> results.Row:
    start = init_to_value(values=posterior.start, fallback=init_to_median)
    guide: AutoContinuous = {
        "ClippedAdam": lambda: AutoSelfNormalizingFlow(posterior.model),
        "AutoMultivariateNormal": lambda: AutoMultivariateNormal(posterior.model, start),
        "AutoIAFNormal": lambda: AutoIAFNormal(InitMessenger(start)(posterior.model)),
    }[rival]()
    done = annealing.train(posterior.model, guide, num_particles=NUM_PARTICLES, seconds=seconds)
    return {**evaluate(posterior, guide), "seconds": done.seconds, "steps": done.steps}


def evaluate(posterior: Posterior, guide: AutoContinuous) -> results.Row:
    """Errors of the guide's draws, and k̂."""
    try:
        found = psis(posterior.model, guide, num_samples=NUM_DRAWS, vectorize=True)
    except (ValueError, torch.linalg.LinAlgError):
        return dict.fromkeys(("mean", "log_sd", "khat"), math.inf)
    return {**errors_of(posterior, found.samples), "khat": found.khat}


def errors_of(posterior: Posterior, draws: dict[str, Tensor]) -> results.Row:
    num_draws = len(next(iter(draws.values())))
    weights = torch.full((num_draws,), 1 / num_draws)
    found = errors(posterior.quantities(draws), weights, posterior.reference)
    mean, log_sd = (value if math.isfinite(value) else math.inf for value in found)
    return {"mean": mean, "log_sd": log_sd}


def run_nuts(posterior: Posterior, limit: float) -> results.Row:
    """The errors when both were below the goal, or at the limit."""
    start = init_to_value(values=posterior.start, fallback=init_to_uniform)
    # The number of plates is not to be found out: flat priors cannot be sampled for it.
    kernel = NUTS(posterior.model, init_strategy=start, max_plate_nesting=0)
    draws: list[dict[str, Tensor]] = []
    found: results.Row = {"mean": math.inf, "log_sd": math.inf}
    begin = time.perf_counter()
    seconds = 0.0
    kernel.setup(NUM_WARMUP)
    sample = kernel.initial_params
    for step in range(1, 10**9):
        sample = kernel.sample(sample)
        seconds += time.perf_counter() - begin
        if step > NUM_WARMUP:
            draws.append(sample)
        if draws and (len(draws) % CHECK_EVERY == 0 or seconds > limit):
            found = errors_of(posterior, constrained(kernel, draws))
        if seconds > limit or max(found["mean"], found["log_sd"]) < GOAL:
            break
        begin = time.perf_counter()
    return {**found, "seconds": seconds, "draws": len(draws)}


def constrained(kernel: NUTS, draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Draws of every site, from those in unconstrained space."""
    return {
        name: kernel.transforms[name].inv(torch.stack([draw[name] for draw in draws]))
        for name in draws[0]
    }


def table(args: argparse.Namespace) -> None:
    """Errors of a mean and of a log sd, as the median over the seeds and the worst of them."""
    rows = results.load(args.results)
    fits = sorted({row["method"] for row in rows if row["method"].startswith("fit")})
    columns = [(name, count) for name in fits for count in NUM_STEPS]
    columns += [(rival, None) for rival in RIVALS]
    header = ["posterior", "D", *(f"{name}, {count}" if count else name for name, count in columns)]
    header += ["k̂", "s", "NUTS, s"]
    for title, reduce in {"median over the seeds": statistics.median, "worst seed": max}.items():
        lines, num_good = [], [0] * len(columns)
        for posterior in POSTERIORS:
            here = results.select(rows, posterior=posterior)
            if not here:
                continue
            line = [posterior, str(here[0]["dim"])]
            for index, (method, count) in enumerate(columns):
                found = results.select(here, method=method, num_steps=count)
                mean, log_sd = (
                    reduce([row[key] for row in found] or [math.nan]) for key in ("mean", "log_sd")
                )
                line.append(f"{error_text(mean)} / {error_text(log_sd)}")
                num_good[index] += max(mean, log_sd) < GOAL
            last = results.select(here, method="fit", num_steps=NUM_STEPS[-1])
            line += [
                f"{reduce([row[key] for row in last]):.{digits}f}" if last else "–"
                for key, digits in (("khat", 2), ("seconds", 0))
            ]
            nuts = results.select(here, method="NUTS")
            line.append(nuts_text(nuts, reduce))
            lines.append(line)
        summary = [f"{count} of {len(lines)}" for count in num_good]
        lines.append([f"both below {GOAL}", "", *summary, "", "", ""])
        print(f"\n{title[0].upper()}{title[1:]}:")
        results.print_table(header, lines)


def error_text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if value < 10 else results.number(value)


def nuts_text(rows: Sequence[results.Row], reduce: Callable[[list[float]], float]) -> str:
    if not rows:
        return "–"
    seconds = reduce([row["seconds"] for row in rows])
    missed = reduce([max(row["mean"], row["log_sd"]) for row in rows]) >= GOAL
    return f"{'> ' if missed else ''}{seconds:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--data-dir", type=Path, help="needed to run")
    parser.add_argument("--results", type=Path, default=Path("outputs/posteriordb.jsonl"))
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-starts", type=int, help="of fit")
    parser.add_argument("--nuts-seconds", type=float, default=300.0, help="the most for NUTS")
    args = parser.parse_args(argv)
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
