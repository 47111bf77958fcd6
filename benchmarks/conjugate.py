"""How near guides get to a posterior that is known: a dense Gaussian, in so many steps.

The prior is N(0, Σ) in 512 dimensions, with a condition number of 100 or a million, and the noise
has variance 1. ``pyro_snf.fit`` with its defaults, but to the last step, against the usual recipe
(``annealing.py``); 16 samples a step, float64, one thread. Each number of steps is its own run. The
Kullback–Leibler divergence from the guide to the posterior is exact where the guide is Gaussian,
and otherwise estimated from 2,000 samples.

    python benchmarks/conjugate.py run
    python benchmarks/conjugate.py table

``run`` appends to ``--results`` as they come, and does not repeat what is there.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import annealing
import pyro
import results
import torch
from posteriors import Posterior, conjugate_gaussian, evaluate
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal

from pyro_snf import AutoSelfNormalizingFlow, fit

NUM_SAMPLES = 2000

#: Whether it is ``fit`` that trains the guide, and the guide.
METHODS: dict[str, tuple[bool, Callable[..., AutoContinuous]]] = {
    "fit, num_layers=1": (True, lambda model: AutoSelfNormalizingFlow(model, 1)),
    "fit": (True, AutoSelfNormalizingFlow),
    "ClippedAdam, num_layers=1": (False, lambda model: AutoSelfNormalizingFlow(model, 1)),
    "ClippedAdam": (False, AutoSelfNormalizingFlow),
    "AutoMultivariateNormal": (False, AutoMultivariateNormal),
}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    warnings.filterwarnings("ignore", "the loss was still falling", UserWarning)
    for condition in args.conditions:
        posterior = conjugate_gaussian(args.dim, condition)
        for seed in args.seeds:
            for num_steps in args.num_steps:
                for method in METHODS:
                    key = {"dim": args.dim, "condition": condition, "seed": seed}
                    key |= {"method": method, "num_steps": num_steps}
                    if results.select(results.load(args.results), **key):
                        continue
                    pyro.set_rng_seed(seed)
                    pyro.clear_param_store()
                    # annealing.py needs parameters that are the guide's own; Pyro's SVI, in fit,
                    # parameters of Pyro's store.
                    with pyro.settings.context(module_local_params=not METHODS[method][0]):
                        found = train(posterior, method, num_steps, args.num_particles)
                    results.append(args.results, {**key, **found})


def train(posterior: Posterior, method: str, num_steps: int, num_particles: int) -> results.Row:
    is_fit, make_guide = METHODS[method]
    guide = make_guide(posterior.model)
    options = {"num_steps": num_steps, "num_particles": num_particles}
    if is_fit:
        seconds = fit(posterior.model, guide, tolerance=None, progress=False, **options).seconds
    else:
        seconds = annealing.train(posterior.model, guide, **options).seconds
    if isinstance(guide, AutoMultivariateNormal) or guide.num_layers == 1:
        divergence, error = posterior.gaussian.divergence_from(guide), 0.0
    else:
        loss, error = evaluate(posterior.model, guide, NUM_SAMPLES)
        divergence = loss - posterior.negative_log_evidence
    return {"divergence": divergence, "error": error, "seconds": seconds}


def table(args: argparse.Namespace) -> None:
    """The divergence in nats, mean ± standard deviation over the seeds, and the ms a step."""
    rows = results.select(results.load(args.results), dim=args.dim)
    lines = []
    for condition in args.conditions:
        for method in METHODS:
            here = results.select(rows, condition=condition, method=method)
            if here:
                found = [results.select(here, num_steps=count) for count in args.num_steps]
                cells = [results.spread([row["divergence"] for row in part]) for part in found]
                times = [1e3 * row["seconds"] / row["num_steps"] for row in here]
                lines.append([f"{condition:g}", method, *cells, f"{statistics.median(times):.1f}"])
    results.print_table(["condition", "method", *map(str, args.num_steps), "ms/step"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=Path("outputs/conjugate.jsonl"))
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--conditions", nargs="+", type=float, default=[1e2, 1e6])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[500, 1000, 2000])
    parser.add_argument("--num-particles", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(argv)
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
