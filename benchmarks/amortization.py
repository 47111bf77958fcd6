"""The infections behind AIDS diagnoses: peers of the dense layer, and data in raw units.

    θ_1 ~ Normal(log 30, 1.5),    θ_s ~ Normal(θ_{s−1}, 0.4),    x_t ~ Poisson(Σ_s F_ts exp(θ_s))

The model is that of examples/amortized.py: 48 quarters of infections, diagnoses in the last 26.

Nats are −log q(θ | x) of 500 new pairs, in the units of the example.

    python benchmarks/amortization.py peers units
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms import (
    AffineTransform,
    LowerCholeskyAffine,
    Permute,
    conditional_affine_autoregressive,
    conditional_affine_coupling,
)
from pyro.nn import DenseNN
from results import print_header, print_row
from torch import Tensor, nn

from pyro_snf import ActNorm, conditional_self_normalizing_linear

D, NUM_DIAGNOSED = 48, 26
HIDDEN, BATCH_SIZE, LEARNING_RATE, MAX_NORM, NUM_TEST = [128, 128], 256, 4e-3, 20.0, 500


class Epidemic:
    """Infections, and the diagnoses that follow them."""

    def __init__(self) -> None:
        steps = torch.ones(D, D).tril() * torch.tensor([1.5] + [0.4] * (D - 1))
        self.prior = dist.MultivariateNormal(torch.full((D,), math.log(30)), scale_tril=steps)
        ends = torch.arange(D - NUM_DIAGNOSED, D + 1)
        years = (ends.unsqueeze(1) - torch.arange(D) - 0.5) / 4
        self.incubation = -torch.exp(-math.log(2) * (years.relu() / 9.8) ** 2.5).diff(dim=0)

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = self.prior.sample([count])
        return theta, dist.Poisson(theta.exp() @ self.incubation.mT).sample()


class BatchOfCholeskyFactors(LowerCholeskyAffine):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1).expand(x.shape[:-1])


class Cholesky(ConditionalTransformModule):
    """z = L(c) θ + b(c), with all D (D + 1) / 2 entries of L from the network."""

    def __init__(self, context_dim: int) -> None:
        super().__init__()
        self.nn = DenseNN(context_dim, HIDDEN, param_dims=[D, D, D * (D - 1) // 2])
        nn.init.zeros_(self.nn.layers[-1].weight)
        nn.init.zeros_(self.nn.layers[-1].bias)

    def condition(self, context: Tensor) -> BatchOfCholeskyFactors:
        bias, log_scale, below = self.nn(context)
        factor = torch.diag_embed(log_scale.exp())
        row, column = torch.tril_indices(D, D, -1)
        factor[..., row, column] = below
        return BatchOfCholeskyFactors(bias, factor)


def make_layers(name: str, context_dim: int) -> list:
    """From the base to θ, standardized."""
    if name == "affine autoregressive (MAF)":
        return [conditional_affine_autoregressive(D, context_dim, hidden_dims=HIDDEN)]
    if name == "4 affine couplings":
        layers = []
        for _ in range(4):
            coupling = conditional_affine_coupling(D, context_dim, hidden_dims=HIDDEN)
            layers += [coupling, Permute(torch.randperm(D))]
        return layers
    if name == "full Cholesky factor":
        return [Cholesky(context_dim).inv]
    rank = int(name.rsplit(maxsplit=1)[-1])
    return [conditional_self_normalizing_linear(D, context_dim, HIDDEN, rank=rank).inv]


def fit(
    layers: list,
    epidemic: Epidemic,
    context_of: Callable[[Tensor], Tensor],
    *,
    unit: float = 1.0,
    num_steps: int,
) -> tuple[float, float]:
    """Nats, and milliseconds a step.

    :param unit: of θ, which is a multiple of it.
    """
    base = dist.Normal(torch.zeros(D), 1.0).to_event(1)
    q = dist.ConditionalTransformedDistribution(base, layers)
    modules = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))
    optimizer = torch.optim.Adam(modules.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    theta, x = epidemic.simulate(BATCH_SIZE)
    test = epidemic.simulate(NUM_TEST)
    start = time.perf_counter()
    for _ in range(num_steps):
        theta, x = epidemic.simulate(BATCH_SIZE)
        optimizer.zero_grad()
        q.condition(context_of(x)).log_prob(theta / unit).mean().neg().backward()
        nn.utils.clip_grad_norm_(modules.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    milliseconds = 1e3 * (time.perf_counter() - start) / num_steps
    theta, x = test
    with torch.no_grad():
        loss = -q.condition(context_of(x)).log_prob(theta / unit).mean().item()
    return loss + D * math.log(unit), milliseconds


def run_peers(args: argparse.Namespace) -> None:
    print_header("posterior", "-log q (nats)", "ms/step")
    for name in [
        "dense, rank 0",
        "dense, rank 4",
        "full Cholesky factor",
        "4 affine couplings",
        "affine autoregressive (MAF)",
    ]:
        torch.manual_seed(args.seed)
        epidemic = Epidemic()
        theta, x = epidemic.simulate(1000)
        context = x.log1p()
        mean, scale = context.mean(0), context.std(0)
        to_theta = AffineTransform(theta.mean(0), theta.std(0), event_dim=1)
        layers = [*make_layers(name, x.shape[1]), to_theta]
        loss, milliseconds = fit(
            layers,
            epidemic,
            lambda x, mean=mean, scale=scale: (x.log1p() - mean) / scale,
            num_steps=args.num_steps,
        )
        print_row(name, f"{loss:.2f}", f"{milliseconds:.1f}")


def run_units(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", UserWarning)  # of the contexts' scale
    print_header("context ×", "standardize_contexts", "θ ×", "ActNorm", "-log q (nats)")
    for context_unit, is_standardized, unit, has_norm in [
        *[(factor, True, 1.0, True) for factor in (1.0, 1e3, 1e-3)],
        *[(factor, False, 1.0, True) for factor in (1.0, 10.0, 100.0, 1e3, 0.1, 1e-2, 1e-3)],
        *[(1.0, True, 1 / factor, True) for factor in (1e3, 1e-3)],
        *[(1.0, True, 1 / factor, False) for factor in (1.0, 1e3, 1e-3)],
    ]:
        torch.manual_seed(args.seed)
        epidemic = Epidemic()
        theta, x = epidemic.simulate(1000)
        (layer,) = make_layers("dense, rank 4", x.shape[1])
        layers = [layer, ActNorm(D, event_dim=1).inv] if has_norm else [layer]

        def context_of(x: Tensor, unit: float = context_unit) -> Tensor:
            return unit * x.log1p()

        if is_standardized:
            layer.inv.standardize_contexts(context_of(x))
        if has_norm:
            layers[1].inv.initialize(theta / unit)
            layers[1].requires_grad_(False)
        try:
            loss, _ = fit(layers, epidemic, context_of, unit=unit, num_steps=args.num_steps)
        except torch.linalg.LinAlgError:  # the training has diverged
            loss = math.nan
        yes = {True: "yes", False: "no"}
        print_row(
            f"{context_unit:g}",
            yes[is_standardized],
            f"{1 / unit:g}",
            yes[has_norm],
            f"{loss:.2f}",
        )


RUNS = {"peers": run_peers, "units": run_units}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=RUNS)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for part in args.parts:
        RUNS[part](args)


if __name__ == "__main__":
    main()
