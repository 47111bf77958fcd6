"""Four posteriors of posteriordb: the guide's means and standard deviations against the reference.

    https://github.com/stan-dev/posteriordb

The folder has ``data-*.json.zip`` and ``draws-*.json.zip``, as published there. Each guide is
trained by Adam at one learning rate that decays to 0 by a cosine; the same for all four. Errors are
the largest of any quantity: of a mean in posterior standard deviations, and of the logarithm of a
standard deviation; by themselves, and after Pareto-smoothed importance sampling.

    python benchmarks/posteriordb.py --data-dir DIR
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import annealing
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median, init_to_value
from torch import Tensor

from pyro_snf import AutoSelfNormalizingFlow
from pyro_snf.diagnostics import PSIS, psis

#: What the reference draws are of, from draws of a model's latent variables.
Quantities = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def eight_schools(data: Mapping[str, Any]) -> tuple[Callable[[], object], Quantities]:
    y, sigma = torch.tensor(data["y"]).double(), torch.tensor(data["sigma"]).double()

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        standardized = pyro.sample("standardized", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * standardized
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mu, tau = draws["mu"], draws["tau"]
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * draws["standardized"]
        return {"mu": mu, "tau": tau, "theta": theta}

    return model, quantities


def kidscore(data: Mapping[str, Any]) -> tuple[Callable[[], object], Quantities]:
    columns = [torch.tensor(data[name]).double() for name in ("mom_hs", "mom_iq")]
    design = torch.stack([torch.ones_like(columns[0]), *columns], dim=-1)
    y = torch.tensor(data["kid_score"]).double()

    def model() -> None:
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (3,))
        beta = pyro.sample("beta", flat)
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        mean = beta @ design.mT
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)

    return model, lambda draws: {"beta": draws["beta"], "sigma": draws["sigma"]}


def gp_regression(data: Mapping[str, Any]) -> tuple[Callable[[], object], Quantities]:
    x, counts = torch.tensor(data["x"]).double(), torch.tensor(data["k"]).double()
    squares = (x.unsqueeze(-1) - x).square()

    def field(rho: Tensor, alpha: Tensor, standardized: Tensor) -> Tensor:
        rho, alpha = rho[..., None, None], alpha[..., None, None]
        covariance = alpha**2 * torch.exp(-0.5 * squares / rho**2)
        tril = torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(x)))
        return (tril @ standardized.unsqueeze(-1)).squeeze(-1)

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        standardized = pyro.sample(
            "standardized", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1)
        )
        f = field(rho, alpha, standardized)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=counts)

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        f = field(draws["rho"], draws["alpha"], draws["standardized"])
        return {"rho": draws["rho"], "alpha": draws["alpha"], "f": f}

    return model, quantities


def autoregression(data: Mapping[str, Any]) -> tuple[Callable[[], object], Quantities]:
    y, order = torch.tensor(data["y"]).double(), data["K"]
    lagged = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], dim=-1)

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(order), 10.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        mean = alpha.unsqueeze(-1) + beta @ lagged.mT
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y[order:])

    return model, lambda draws: {name: draws[name] for name in ("alpha", "beta", "sigma")}


POSTERIORS = {
    "eight_schools-eight_schools_noncentered": ("eight_schools", eight_schools),
    "kidiq-kidscore_momhsiq": ("kidiq", kidscore),
    "gp_pois_regr-gp_pois_regr": ("gp_pois_regr", gp_regression),
    "arK-arK": ("arK", autoregression),
}

GUIDES = {
    "AutoSelfNormalizingFlow": AutoSelfNormalizingFlow,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}


def read(path: Path) -> Any:
    """The content of a zipped JSON file."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def read_draws(path: Path) -> dict[str, Tensor]:
    """The draws of all chains, ``name → (S,)`` or ``(S, n)``."""
    chains = read(path)
    result: dict[str, Any] = {}
    for name in chains[0]:
        values = torch.tensor([value for chain in chains for value in chain[name]])
        stem = name.partition("[")[0]
        if stem == name:
            result[name] = values
        else:
            result.setdefault(stem, []).append(values)  # in the order of their indices
    return {
        name: torch.stack(values, dim=-1) if isinstance(values, list) else values
        for name, values in result.items()
    }


def errors(
    draws: Mapping[str, Tensor], weights: Tensor, reference: Mapping[str, Tensor]
) -> tuple[float, float]:
    """The largest errors of a mean and of the logarithm of a standard deviation.

    :param Tensor weights: of the draws, normalized.
    """
    mean_error, deviation_error = 0.0, 0.0
    for name, exact in reference.items():
        values = draws[name].reshape(len(weights), -1)
        exact = exact.reshape(len(exact), -1)
        mean = weights @ values
        deviation = (weights @ (values - mean).square()).sqrt()
        mean_error = max(mean_error, ((mean - exact.mean(0)) / exact.std(0)).abs().max().item())
        ratio = (deviation / exact.std(0)).log().abs().max().item()
        deviation_error = max(deviation_error, ratio)
    return mean_error, deviation_error


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

    start = init_to_value(values={"beta": torch.zeros(3)}, fallback=init_to_median)
    print("| posterior | guide | mean | log sd | k̂ | mean, weighted | log sd, weighted | s |")
    print("|---" * 8 + "|")
    for name in args.posteriors:
        data_name, make = POSTERIORS[name]
        model, quantities = make(read(args.data_dir / f"data-{data_name}.json.zip"))
        reference = read_draws(args.data_dir / f"draws-{name}.json.zip")
        for guide_name, make_guide in GUIDES.items():
            pyro.set_rng_seed(args.seed)
            init_loc_fn = start if name.startswith("kidiq") else init_to_median
            guide = make_guide(model, init_loc_fn=init_loc_fn)
            _, seconds = annealing.train(
                model,
                guide,
                rate=args.learning_rate,
                num_particles=args.num_particles,
                num_steps=args.num_steps,
            )
            result: PSIS = psis(model, guide, num_samples=args.num_draws, vectorize=True)
            draws = quantities(result.samples)
            plain = errors(
                draws, torch.full_like(result.log_weights.double(), 1 / args.num_draws), reference
            )
            weighted = errors(draws, result.log_weights.double().exp(), reference)
            cells = [*plain, result.khat, *weighted]
            print(f"| {name} | {guide_name} | " + " | ".join(f"{c:.3f}" for c in cells), end="")
            print(f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
