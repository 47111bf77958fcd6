"""How near the guide gets to a posterior that is known: a dense Gaussian in 512 dimensions.

−ELBO less −log evidence is the Kullback–Leibler divergence from the guide to the posterior. Adam,
its rate falling to 0 by a cosine over the given time; several samples a step.

    python benchmarks/conjugate.py
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import posteriors
import pyro
import svi_guide  # found by posteriors
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal

from pyro_snf import AutoSelfNormalizingFlow


def train(
    posterior: posteriors.Posterior,
    guide: AutoContinuous,
    *,
    seconds: float,
    rate: float,
    num_particles: int,
) -> int:
    """Train the guide; the number of steps."""
    elbo = Trace_ELBO(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=0)
    objective = elbo(posterior.model, guide)
    guide()
    optimizer = torch.optim.Adam(objective.parameters(), lr=rate, fused=True)
    start = time.perf_counter()
    num_steps = 0
    while (share := (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
        num_steps += 1
    return num_steps


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

    posterior = posteriors.conjugate_gaussian()
    print("| guide | KL (nats) | standard error | KL per 100 dimensions | steps |")
    print("|---|---|---|---|---|")
    for name, guide in {
        "AutoSelfNormalizingFlow, num_layers=1": AutoSelfNormalizingFlow(posterior.model, 1),
        "AutoSelfNormalizingFlow": AutoSelfNormalizingFlow(posterior.model),
        "AutoMultivariateNormal": AutoMultivariateNormal(posterior.model),
    }.items():
        pyro.set_rng_seed(args.seed)
        steps = train(
            posterior,
            guide,
            seconds=args.seconds,
            rate=args.learning_rate,
            num_particles=args.num_particles,
        )
        loss, error = svi_guide.evaluate(posterior.model, guide, 2000)
        divergence = loss - posterior.negative_log_evidence
        per_hundred = 100 * divergence / posterior.dim
        print(
            f"| {name} | {divergence:.3f} | {error:.3f} | {per_hundred:.4f} | {steps} |", flush=True
        )


if __name__ == "__main__":
    main()
