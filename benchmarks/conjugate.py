"""How near the guide gets to a posterior that is known: a dense Gaussian in 512 dimensions.

−ELBO less −log evidence is the Kullback–Leibler divergence from the guide to the posterior. Adam,
its rate falling to 0 by a cosine over the given time; several samples a step.

    python benchmarks/conjugate.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import annealing
import pyro
import torch
from posteriors import conjugate_gaussian, svi_guide
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_snf import AutoSelfNormalizingFlow


@pyro.settings.context(module_local_params=True)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--num-particles", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)

    posterior = conjugate_gaussian()
    print("| guide | KL (nats) | standard error | KL per 100 dimensions | steps |")
    print("|---|---|---|---|---|")
    for name, guide in {
        "AutoSelfNormalizingFlow, num_layers=1": AutoSelfNormalizingFlow(posterior.model, 1),
        "AutoSelfNormalizingFlow": AutoSelfNormalizingFlow(posterior.model),
        "AutoMultivariateNormal": AutoMultivariateNormal(posterior.model),
    }.items():
        pyro.set_rng_seed(args.seed)
        steps, _ = annealing.train(
            posterior.model,
            guide,
            rate=args.learning_rate,
            num_particles=args.num_particles,
            seconds=args.seconds,
        )
        loss, error = svi_guide.evaluate(posterior.model, guide, 2000)
        divergence = loss - posterior.negative_log_evidence
        per_hundred = 100 * divergence / posterior.dim
        print(
            f"| {name} | {divergence:.3f} | {error:.3f} | {per_hundred:.4f} | {steps} |", flush=True
        )


if __name__ == "__main__":
    main()
