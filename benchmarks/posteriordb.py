"""Posteriors of posteriordb: the guide's means and standard deviations against the reference.

    https://github.com/stan-dev/posteriordb

The folder has ``data-*.json.zip`` and ``draws-*.json.zip``, as published there. Each guide is
trained by Adam at one learning rate that decays to 0 by a cosine; the same for all. Errors are
the largest of any quantity: of a mean in posterior standard deviations, and of the logarithm of a
standard deviation; by themselves, and after Pareto-smoothed importance sampling.

    python benchmarks/posteriordb.py --data-dir DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import annealing
import pyro
import torch
from posteriordb_models import POSTERIORS, errors, load
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median, init_to_value

from pyro_snf import AutoSelfNormalizingFlow
from pyro_snf.diagnostics import PSIS, psis

GUIDES = {
    "AutoSelfNormalizingFlow": AutoSelfNormalizingFlow,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}


@pyro.settings.context(module_local_params=True)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--num-steps", type=int, default=40000)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--num-particles", type=int, default=8)
    parser.add_argument("--num-draws", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # as Stan has it
    pyro.enable_validation(False)

    print("| posterior | guide | mean | log sd | k̂ | mean, weighted | log sd, weighted | s |")
    print("|---" * 8 + "|")
    for name in args.posteriors:
        posterior = load(name, args.data_dir)
        model, reference = posterior.model, posterior.reference
        start = init_to_value(values=posterior.start, fallback=init_to_median)
        for guide_name, make_guide in GUIDES.items():
            pyro.set_rng_seed(args.seed)
            guide = make_guide(model, init_loc_fn=start)
            _, seconds = annealing.train(
                model,
                guide,
                rate=args.learning_rate,
                num_particles=args.num_particles,
                num_steps=args.num_steps,
            )
            result: PSIS = psis(model, guide, num_samples=args.num_draws, vectorize=True)
            draws = posterior.quantities(result.samples)
            plain = errors(
                draws, torch.full_like(result.log_weights.double(), 1 / args.num_draws), reference
            )
            weighted = errors(draws, result.log_weights.double().exp(), reference)
            cells = [*plain, result.khat, *weighted]
            print(f"| {name} | {guide_name} | " + " | ".join(f"{c:.3f}" for c in cells), end="")
            print(f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
