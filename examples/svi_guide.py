"""The posterior of a log-Gaussian Cox process, by a self-normalizing guide and by three of Pyro's.

    field ~ GaussianProcess(0, Matérn),    intensity = exp(mean + field),
    counts ~ Poisson(intensity)

By default the counts are real: yearly sunspot numbers, 1700 to 2008 (D = 309). ``--grid N``
simulates N × N cells of the unit square instead (D = N²). Each guide has the same model, the same
start (mean 0, scale 0.1), the same learning rate and the same wall-clock time; they take turns, so
that whatever else the machine does slows all of them alike. Lower −ELBO is better.

    python examples/svi_guide.py                      # sunspots, about a minute
    python examples/svi_guide.py --grid 16 --seconds 20

With the default seed 0, on one core of a server, −ELBO in nats was roughly

    data         seconds  self-normalizing  multivariate  low rank  diagonal
    sunspots          12              1297          1344      1349      1354
    --grid 16         20               549           578       571       574
    --grid 30         20              1959          2402      2090      2092

Results are in outputs/svi_guide: result.json, convergence.png, and intensity.png.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pyro
import pyro.distributions as dist
import torch
from common import (
    format_table,
    late_limits,
    make_parser,
    positive_float,
    positive_int,
    write_result,
)
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from torch import Tensor
from tqdm import tqdm

from pyro_snf import AutoSelfNormalizingFlow, diagnostics, plotting

SUNSPOTS = Path(__file__).parent / "data" / "sunspots_yearly.csv"

SELF_NORMALIZING = "self-normalizing"

#: Guides take turns of so many seconds, or so many steps.
TURN_SECONDS, TURN_STEPS = 0.2, 10


@dataclass(frozen=True)
class CoxProcess:
    """A log-Gaussian Cox process on D cells, and what was counted there."""

    counts: Tensor
    """Shape ``(D,)``."""
    mean: float
    """The prior mean of the logarithm of the intensity, that is, of the expected count."""
    scale_tril: Tensor
    """The Cholesky factor of the field's prior covariance, shape ``(D, D)``."""
    positions: Tensor
    """Where the cells are, shape ``(D, 1)`` or ``(D, 2)``."""
    intensity: Tensor | None = None
    """The true intensity, where it is known, shape ``(D,)``."""


def load_sunspots(path: Path = SUNSPOTS) -> CoxProcess:
    """Yearly sunspot numbers, D = 309.

    The constants of the prior were chosen by Laplace's approximation of the evidence, on a coarse
    grid: the length scale of 3 years is about a quarter of the solar cycle.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    years = torch.tensor([[float(row["year"])] for row in rows])
    counts = torch.tensor([float(row["sunspots"]) for row in rows])
    scale_tril = matern_cholesky(years, smoothness=2.5, length_scale=3.0, amplitude=1.2)
    return CoxProcess(counts, mean=3.5, scale_tril=scale_tril, positions=years)


def simulate_grid(size: int, seed: int, *, mean_count: float = 3.0) -> CoxProcess:
    """A draw from the prior on ``size`` × ``size`` cells of the unit square.

    The area of a cell is part of the mean, so that the counts average ``mean_count`` at any size.
    """
    centers = (torch.arange(size) + 0.5) / size
    positions = torch.cartesian_prod(centers, centers)
    amplitude = 1.0
    scale_tril = matern_cholesky(positions, smoothness=1.5, length_scale=0.1, amplitude=amplitude)
    mean = math.log(mean_count) - amplitude**2 / 2  # E exp(field) = exp(amplitude² / 2)
    generator = torch.Generator().manual_seed(seed)
    intensity = torch.exp(mean + scale_tril @ torch.randn(size**2, generator=generator))
    counts = torch.poisson(intensity, generator=generator)
    return CoxProcess(counts, mean, scale_tril, positions, intensity)


def matern_cholesky(
    positions: Tensor, *, smoothness: float, length_scale: float, amplitude: float
) -> Tensor:
    """The Cholesky factor of a Matérn covariance, shape ``(D, D)``.

    :param Tensor positions: shape ``(D, d)``.
    :param float smoothness: ν, 1.5 or 2.5.
    """
    distance = (positions.double().unsqueeze(1) - positions.double()).norm(dim=-1)
    scaled = math.sqrt(2 * smoothness) * distance / length_scale
    polynomial = {1.5: 1 + scaled, 2.5: 1 + scaled + scaled**2 / 3}[smoothness]
    covariance = amplitude**2 * polynomial * torch.exp(-scaled)
    covariance.diagonal().add_(1e-6 * amplitude**2)  # for the factorization of fine grids
    return torch.linalg.cholesky(covariance).to(positions.dtype)


def make_model(process: CoxProcess, device: torch.device | str = "cpu") -> Callable[[], None]:
    """The Pyro model, with one latent site ``"field"`` of shape ``(D,)``."""
    counts = process.counts.to(device)
    scale_tril = process.scale_tril.to(device)
    prior = dist.MultivariateNormal(torch.zeros_like(counts), scale_tril=scale_tril)

    def model() -> None:
        field = pyro.sample("field", prior)
        intensity = torch.exp(process.mean + field)
        pyro.sample("counts", dist.Poisson(intensity).to_event(1), obs=counts)

    return model


def make_guides(
    model: Callable[[], None], *, num_layers: int = 2, init_scale: float = 0.1
) -> dict[str, AutoContinuous]:
    """The guides to compare, all with mean 0 and (the low-rank one roughly) the same scale."""
    return {
        SELF_NORMALIZING: AutoSelfNormalizingFlow(model, num_layers, init_scale=init_scale),
        "AutoMultivariateNormal": AutoMultivariateNormal(model, init_scale=init_scale),
        "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal(
            model, init_scale=init_scale
        ),
        "AutoDiagonalNormal": AutoDiagonalNormal(model, init_scale=init_scale),
    }


@dataclass
class History:
    """The losses of one guide, and the seconds of training after which each was seen."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def milliseconds_per_step(self) -> float:
        return 1e3 * self.seconds[-1] / len(self.seconds)

    def smoothed(self, num_blocks: int = 100) -> tuple[list[float], list[float]]:
        """Seconds and losses, averaged over blocks of steps, equal to one step."""
        count = len(self.losses)
        blocks = min(num_blocks, count)
        edges = [index * count // blocks for index in range(blocks + 1)] if count else []
        return tuple(
            [fmean(values[start:end]) for start, end in pairwise(edges)]
            for values in (self.seconds, self.losses)
        )


@pyro.validation_enabled(False)  # for the checks would cost some guides more than others
def train(
    model: Callable[[], None],
    guides: Mapping[str, AutoContinuous],
    *,
    learning_rate: float,
    seconds: float | None = None,
    num_steps: int | None = None,
    show_progress: bool = True,
) -> dict[str, History]:
    """Train guides side by side by SVI (Adam, one sample a step), for equal time or equal steps.

    The time is that of the training steps alone. Ctrl-C ends the training early. A guide whose
    loss is no longer finite has diverged: it is left as it is.

    :param seconds: of training for each guide.
    :param num_steps: for each guide; exactly one of the two is to be given.
    """
    if (seconds is None) == (num_steps is None):
        raise ValueError(f"expected seconds or num_steps; got {seconds} and {num_steps}")
    in_steps = num_steps is not None
    budget, turn = (num_steps, TURN_STEPS) if in_steps else (seconds, TURN_SECONDS)
    histories = {name: History() for name in guides}

    def spent(name: str) -> float:
        history = histories[name]
        return len(history.seconds) if in_steps else (history.seconds or [0.0])[-1]

    steps = {}
    for name, guide in guides.items():
        guide()  # creates its parameters
        guide.train()
        steps[name] = _make_step(Trace_ELBO()(model, guide), learning_rate, histories[name])

    bar = tqdm(
        total=budget * len(guides),
        disable=not show_progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit}",
        desc=f"training {len(guides)} guides",
        unit="steps" if in_steps else "s",
    )
    unfinished = set(guides)
    with bar:
        try:
            while unfinished:
                name = min(sorted(unfinished), key=spent)
                start = spent(name)
                while spent(name) < min(start + turn, budget) and name in unfinished:
                    if not math.isfinite(steps[name]()):
                        unfinished.remove(name)
                bar.update(min(spent(name) - start, bar.total - bar.n))
                if spent(name) >= budget:
                    unfinished.discard(name)
        except KeyboardInterrupt:
            if not all(history.losses for history in histories.values()):
                raise  # there is nothing to go on with
            bar.write("Interrupted: going on with the guides as they are.")
    return histories


def _make_step(
    objective: torch.nn.Module, learning_rate: float, history: History
) -> Callable[[], float]:
    """One step of Adam as a function that notes and returns the loss."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=learning_rate, fused=True)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        try:
            loss = objective()
            loss.backward()
            optimizer.step()
            value = loss.item()  # waits for the device
        except torch.linalg.LinAlgError:  # a matrix that is singular or not finite
            value = math.nan
        before = history.seconds[-1] if history.seconds else 0.0
        history.seconds.append(before + time.perf_counter() - start)
        history.losses.append(value)
        return value

    return step


@pyro.validation_enabled(False)
@torch.no_grad()
def evaluate(
    model: Callable[[], None], guide: AutoContinuous, num_samples: int = 200
) -> tuple[float, float]:
    """An estimate of −ELBO from fresh samples, with exact log-dets, and its standard error.

    NaN for a guide that has diverged.
    """
    was_training = guide.training
    guide.eval()
    objective = Trace_ELBO()(model, guide)
    try:
        losses = torch.stack([objective() for _ in range(num_samples)])
    except torch.linalg.LinAlgError:  # a matrix that is singular or not finite
        return math.nan, math.nan
    finally:
        guide.train(was_training)
    return losses.mean().item(), losses.std().item() / math.sqrt(num_samples)


@torch.no_grad()
def sample_intensity(process: CoxProcess, guide: AutoContinuous, num_samples: int = 500) -> Tensor:
    """Samples of the intensity from the guide, shape ``(num_samples, D)``."""
    fields = torch.stack([guide()["field"] for _ in range(num_samples)])
    return torch.exp(process.mean + fields).cpu()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="outputs/svi_guide")
    parser.add_argument(
        "--grid",
        type=positive_int,
        metavar="N",
        help="simulated counts on N × N cells in place of the sunspots",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=positive_float, default=12.0, help="of training a guide (default 12)"
    )
    length.add_argument(
        "--num-steps", type=positive_int, help="steps of training a guide, whatever time they take"
    )
    parser.add_argument(
        "--learning-rate", type=positive_float, default=3e-3, help="of Adam (default 0.003)"
    )
    parser.add_argument(
        "--num-layers",
        type=positive_int,
        default=2,
        help="of the self-normalizing guide (default 2; 1 makes it Gaussian)",
    )
    return parser.parse_args(argv)


# Guides own their parameters, instead of sharing Pyro's global store of them.
@pyro.settings.context(module_local_params=True)
def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    process = load_sunspots() if args.grid is None else simulate_grid(args.grid, args.seed)
    pyro.set_rng_seed(args.seed)
    model = make_model(process, args.device)
    guides = make_guides(model, num_layers=args.num_layers)
    histories = train(
        model,
        guides,
        learning_rate=args.learning_rate,
        seconds=None if args.num_steps else args.seconds,
        num_steps=args.num_steps,
    )

    table, samples = [], {}
    for name, guide in guides.items():
        loss, error = evaluate(model, guide)
        if math.isfinite(loss):
            samples[name] = sample_intensity(process, guide)
        table.append(
            {
                "guide": name,
                "-ELBO (nats)": loss,
                "standard error": error,
                "steps": len(histories[name].losses),
                "ms/step": histories[name].milliseconds_per_step,
            }
        )
    print(f"\nD = {len(process.counts)}\n{format_table(table)}")
    print(f"\nThe self-normalizing guide:\n{diagnostics.report(guides[SELF_NORMALIZING])}")

    if samples:
        _plot_posterior(process, samples).savefig(args.output_dir / "intensity.png", dpi=150)
    _plot_convergence(histories).savefig(args.output_dir / "convergence.png", dpi=150)
    result = write_result(args, table)
    print(f"\nPictures and result.json are in {args.output_dir}")
    return result


def _plot_convergence(histories: Mapping[str, History]) -> Figure:
    curves = {name: history.smoothed() for name, history in histories.items()}
    return plotting.plot_curves(
        curves,
        xlabel="training time (s)",
        ylabel="−ELBO (nats), mean over 1 % of the steps",
        title="Log-Gaussian Cox process: guides in training",
        ylim=late_limits(curves, skip=0.25),
    )


def _plot_posterior(process: CoxProcess, samples: Mapping[str, Tensor]) -> Figure:
    if process.intensity is None:
        return plotting.plot_intensity(
            process.positions[:, 0],
            process.counts,
            samples,
            xlabel="year",
            ylabel="sunspot number",
            title="Sunspots: posterior of the intensity",
        )
    size = math.isqrt(len(process.counts))
    fields = {"truth": process.intensity, "counts": process.counts}
    fields.update({f"{name}\nposterior mean": draws.mean(0) for name, draws in samples.items()})
    return plotting.plot_fields(
        {label: values.reshape(size, size) for label, values in fields.items()},
        colorbar_label="events per cell",
        title="Simulated Cox process: intensity",
    )


if __name__ == "__main__":
    main()
