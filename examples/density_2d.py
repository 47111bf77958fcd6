"""Nine densities in the plane, by pairs of free networks and by two of Pyro's flows.

The toy densities of the paper's code, each about as wide as a standard normal. The flows:

    exact, refined, learned    SelfNormalizingPair: residual networks f and g, one of the log-dets
    spline_coupling            Pyro's, layers with permutations between them
    affine_autoregressive      Pyro's, likewise

For each density, all flows have the same batches in the same order and the same wall-clock time of
training (Adam, fresh samples at each step); they take turns, so that whatever else the machine does
slows all of them alike. In two dimensions the exact log-determinant takes two backward passes, and
is as cheap as the probes of the other two, which are made for many dimensions.

Nothing in f makes it invertible. Where two points have the same image, p is too large, and its
negative log-likelihood (NLL) looks too good. So the integral of p is in the table, beside the NLL
and what it would be for the true density, on the same test data; and so is the share of latents z
for which an x with T(x) = z was found.

    python examples/density_2d.py                                  # about four minutes
    python examples/density_2d.py --densities rings --seconds 30
    python examples/density_2d.py --seconds 24                     # 20 minutes

With the default seed 0 and ``--flows exact``, after 24 s of processor time each on a busy server,
the test NLL above that of the true density came to 0.04 (eight-gaussians), 0.00 (one-gaussian),
0.02 (sine), 0.05 (moons), 0.04 (trimodal), 0.04 (smile), 0.14 (two-spirals), 0.20 (checkerboard)
and 0.38 (rings), and all integrals of p to 1.000.

Results are in outputs/density_2d: result.json and densities.png.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from common import (
    format_table,
    make_parser,
    positive_float,
    positive_int,
    save_figure,
    write_result,
)
from torch import Tensor, nn
from torch.distributions import Transform
from tqdm import tqdm

from pyro_snf import ResidualMLP, SelfNormalizingPair, plotting

LOG_DETS = ("exact", "refined", "learned")
SPLINE, AFFINE = "spline_coupling", "affine_autoregressive"
FLOWS = (*LOG_DETS, SPLINE, AFFINE)

#: Flows take turns of so many seconds.
TURN_SECONDS = 0.2

#: Test data, and the latents whose inverse is looked for. Their seed is not that of the training.
NUM_TEST, NUM_LATENTS = 10_000, 2_000
TEST_SEED = 2**32

#: The integral of p is a sum over the cells of a grid on [−EXTENT, EXTENT]²; their width of 0.03 is
#: 0.6 standard deviations of the narrowest noise, that of the rings.
EXTENT, NUM_CELLS = 5.0, 320

#: Points at a time where densities are evaluated.
CHUNK = 8_192

#: An inverse is one if T(x) is within this distance of z.
INVERSE_TOLERANCE = 1e-3

#: What the picture shows: [−VIEW, VIEW]², and so many points.
VIEW, NUM_POINTS = 2.8, 2_000

#: The free networks f and g: blocks, and the widths of the layers in each.
NUM_BLOCKS, HIDDEN_DIMS = 3, [64, 64]
#: How many radians the activations make of 1. What is fine in a density is learned the faster, the
#: more there are.
FREQUENCY = 2.0
#: Pyro's, the best of some that were tried for 10 s.
NUM_SPLINES, SPLINE_OPTIONS = 3, {"hidden_dims": [32, 32], "count_bins": 8, "bound": 3.0}
NUM_AFFINES, AFFINE_OPTIONS = 8, {"hidden_dims": [32, 32]}

#: Of Adam, at the start, from where they fall to 0 along a cosine.
LEARNING_RATES = {**dict.fromkeys(LOG_DETS, 5e-3), SPLINE: 1e-2, AFFINE: 5e-3}


class Density(Protocol):
    """A density in the plane that is known."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points, shape ``(count, 2)``."""

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density of points of shape ``(N, 2)``, shape ``(N,)``."""


class Mixture:
    """Of K round Gaussians; of very many, along curves, if need be.

    :param Tensor means: shape ``(K, 2)``.
    :param scales: the standard deviations, one for all or shape ``(K,)``.
    :param weights: shape ``(K,)``; equal unless given.
    """

    def __init__(
        self, means: Tensor, scales: Tensor | float, weights: Tensor | None = None
    ) -> None:
        self.means = means
        self.scales = torch.as_tensor(scales, dtype=means.dtype).expand(len(means))
        self.weights = torch.full((len(means),), 1 / len(means)) if weights is None else weights

    def standardized(self, center: tuple[float, float], scale: float) -> Mixture:
        """The mixture of ``(x − center) / scale``."""
        means = (self.means - torch.tensor(center)) / scale
        return Mixture(means, self.scales / scale, self.weights)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.means[index] + self.scales[index, None] * noise

    def log_prob(self, x: Tensor) -> Tensor:
        log_factor = self.weights.log() - 2 * self.scales.log() - math.log(2 * math.pi)
        values = []
        for part in x.split(CHUNK):
            # Not by matrix products, whose rounding would be seen.
            distance = torch.cdist(part, self.means, compute_mode="donot_use_mm_for_euclid_dist")
            values.append(
                torch.logsumexp(log_factor - (distance / self.scales).square() / 2, dim=1)
            )
        return torch.cat(values)


class Sine:
    """``x₁`` uniform on [−2, 2], and ``x₂ = sin(3 x₁) + 0.25 ε``."""

    noise = 0.25

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        first = 4 * torch.rand(count, generator=generator) - 2
        noise = self.noise * torch.randn(count, generator=generator)
        return torch.stack([first, torch.sin(3 * first) + noise], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        first, second = x.unbind(1)
        value = dist.Normal(torch.sin(3 * first), self.noise).log_prob(second) - math.log(4)
        return value.masked_fill(first.abs() > 2, -math.inf)


class Checkerboard:
    """Uniform on the eight black squares of 4 × 4, whose sides are ``side``."""

    side = 2 / 2.3

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        corner = torch.stack([column, row], 1) - 2
        return self.side * (corner + torch.rand(count, 2, generator=generator))

    def log_prob(self, x: Tensor) -> Tensor:
        square = (x / self.side).floor()
        is_black = (square.sum(1) % 2 == 0) & (square >= -2).all(1) & (square < 2).all(1)
        value = torch.full_like(x[:, 0], -math.log(8 * self.side**2))
        return value.masked_fill(~is_black, -math.inf)


def _arc(count: int, radius: float = 1.0, angle: float = 2 * math.pi) -> Tensor:
    """Points from the first axis onwards, shape ``(count, 2)``."""
    angles = angle * (torch.arange(count) + 0.5) / count
    return radius * torch.stack([angles.cos(), angles.sin()], 1)


def _make_moons() -> Mixture:
    upper = _arc(200, angle=math.pi)
    lower = torch.tensor([1.0, 0.5]) - upper
    return Mixture(torch.cat([upper, lower]), 0.05).standardized((0.5, 0.25), 0.7)


def _make_trimodal() -> Mixture:
    means = torch.tensor([[0.0, 0.0], [5.0, 5.0], [5.0, -5.0]])
    return Mixture(means, torch.tensor([1.0, 0.5, 0.5])).standardized((10 / 3, 0.0), 3.0)


def _make_smile() -> Mixture:
    eyes_and_nose = 4 * torch.tensor([[-0.5, 0.75**0.5], [0.5, 0.75**0.5], [0.0, 0.0]])
    angles = torch.deg2rad(torch.tensor([-45.0, -30.0, -15.0, 0.0, 15.0, 30.0, 45.0]))
    mouth = 4 * torch.stack([angles.sin(), -angles.cos()], 1)
    weights = torch.tensor([1 / 6] * 3 + [1 / 14] * 7)
    return Mixture(torch.cat([eyes_and_nose, mouth]), 0.5, weights).standardized((0.0, -0.6), 2.5)


def _make_two_spirals() -> Mixture:
    # The paper's code adds uniform noise to Gaussian noise: here it is all Gaussian, of the same
    # mean and variance.
    angles = 3 * math.pi * ((torch.arange(400) + 0.5) / 400).sqrt()
    arm = (torch.stack([-angles * angles.cos(), angles * angles.sin()], 1) + 0.25) / 3
    noise = math.sqrt(0.1**2 + (0.5 / 3) ** 2 / 12)
    return Mixture(torch.cat([arm, -arm]), noise).standardized((0.0, 0.0), 1.5)


def _make_rings() -> Mixture:
    circles = [_arc(250, radius) for radius in (0.75, 1.5, 2.25, 3.0)]
    return Mixture(torch.cat(circles), 0.08).standardized((0.0, 0.0), 1.5)


#: What makes each density.
DENSITIES: Mapping[str, Callable[[], Density]] = {
    "eight-gaussians": lambda: Mixture(_arc(8, 8**0.5), 8**-0.5).standardized((0.0, 0.0), 2.0),
    "one-gaussian": lambda: Mixture(torch.zeros(1, 2), 1.0),
    "sine": Sine,
    "moons": _make_moons,
    "trimodal": _make_trimodal,
    "smile": _make_smile,
    "two-spirals": _make_two_spirals,
    "checkerboard": Checkerboard,
    "rings": _make_rings,
}


class SineActivation(nn.Module):
    """``sin ωx``. With it, f learns the fine structure of a density faster than with SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(FREQUENCY * x)


class Flow(NamedTuple):
    """A density that is to be trained."""

    density: dist.TransformedDistribution
    module: nn.Module
    """All that has parameters in it."""
    pair: SelfNormalizingPair | None = None
    """The pair of free networks, if it is one."""


def make_flow(name: str, device: torch.device | str = "cpu") -> Flow:
    """One of :data:`FLOWS`, on the way from latents to data as Pyro has it."""
    base = dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1)
    if name in LOG_DETS:
        f, g = (
            ResidualMLP(2, HIDDEN_DIMS, num_blocks=NUM_BLOCKS, activation=SineActivation)
            for _ in range(2)
        )
        pair = SelfNormalizingPair(f, g, event_shape=2, log_det=name)
        transforms: list[Transform] = [pair.inv]
        module: nn.Module = pair
    else:
        swap = pyro_transforms.permute(2, torch.tensor([1, 0], device=device))
        make = {
            SPLINE: lambda: pyro_transforms.spline_coupling(2, **SPLINE_OPTIONS),
            # Its own direction is the fast one, which densities need from data to latents.
            AFFINE: lambda: pyro_transforms.affine_autoregressive(2, **AFFINE_OPTIONS).inv,
        }[name]
        count = {SPLINE: NUM_SPLINES, AFFINE: NUM_AFFINES}[name]
        layers = [make() for _ in range(count)]
        transforms = [part for layer in layers for part in (layer, swap)][:-1]
        pair = None
        module = nn.ModuleList(layer if name == SPLINE else layer.inv for layer in layers)
    module.to(device)
    return Flow(dist.TransformedDistribution(base, transforms), module, pair)


class Evaluation(NamedTuple):
    """What became of a flow."""

    nll: float
    """The exact negative log-likelihood of test data, in nats."""
    mass: float
    """The integral of p over [−EXTENT, EXTENT]²."""
    recovered: float
    """The share of test data that are the inverse of their latents."""
    inverted: float
    """The share of latents for which an inverse was found."""


class Run:
    """One flow in training for one density."""

    def __init__(
        self, name: str, *, seconds: float, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(seed)
        self.flow = make_flow(name, device)
        self.learning_rate = LEARNING_RATES[name]
        self.budget = seconds
        self.device = device
        # Fused, for the time of a step is that of its many small operations.
        self.optimizer = torch.optim.Adam(
            self.flow.module.parameters(), lr=self.learning_rate, fused=True
        )
        #: Of the data: the same for all flows.
        self.data_generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0
        """Of training alone."""
        self.num_steps = 0

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        progress = min(self.seconds / self.budget, 1.0)
        factor = (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.learning_rate
        self.optimizer.zero_grad()
        loss = -self.flow.density.log_prob(batch).mean()
        loss.backward()
        self.optimizer.step()
        loss.item()  # waits for the device
        self.seconds += time.perf_counter() - start
        self.num_steps += 1

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log density of points of shape ``(N, 2)``, wherever these are."""
        self.flow.module.eval()
        # New tensors each time, for Pyro's transforms remember what they made of the last one.
        parts = [
            _quietly(self.flow.density.log_prob, part.to(self.device)) for part in x.split(CHUNK)
        ]
        self.flow.module.train()
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def sample(self, count: int, seed: int) -> Tensor:
        """Points, from latents that depend on the seed alone."""
        latents = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        return self._to_data(latents.to(self.device)).cpu()

    @torch.no_grad()
    def evaluate(self, test: Tensor, seed: int = 0) -> Evaluation:
        """All that is in the table; the latents depend on the seed alone."""
        centers = (torch.arange(NUM_CELLS) + 0.5) * (2 * EXTENT / NUM_CELLS) - EXTENT
        grid = self.log_prob(torch.cartesian_prod(centers, centers))
        cell = (2 * EXTENT / NUM_CELLS) ** 2
        x = test[:NUM_LATENTS].to(self.device)
        z = torch.randn(NUM_LATENTS, 2, generator=torch.Generator().manual_seed(seed)).to(x)
        # Clones, for Pyro's transforms remember what they have made.
        recovered = self._to_data(self._to_latent(x).clone())
        reached = self._to_latent(self._to_data(z).clone())
        return Evaluation(
            nll=-self.log_prob(test).mean().item(),
            mass=grid.double().exp().sum().item() * cell,
            recovered=_share_alike(recovered, x),
            inverted=_share_alike(reached, z),
        )

    def _to_latent(self, x: Tensor) -> Tensor:
        for transform in reversed(self.flow.density.transforms):
            x = transform.inv(x)
        return x

    def _to_data(self, latents: Tensor) -> Tensor:
        for transform in self.flow.density.transforms:
            latents = _quietly(transform, latents)
        return latents


def _quietly(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Without the warnings of folds, and of inverses that were not found: they are in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(points)


def _share_alike(first: Tensor, second: Tensor) -> float:
    distance = (first - second).norm(dim=1)
    return (distance < INVERSE_TOLERANCE).double().mean().item()


@pyro.validation_enabled(False)  # for the checks would cost some flows more than others
def train(
    densities: Mapping[str, Density],
    flows: Sequence[str],
    *,
    seconds: float,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> dict[str, dict[str, Run]]:
    """Train flows side by side on one density after the other.

    The time is that of the training steps alone. Ctrl-C ends the training early: what was not begun
    is left out.

    :param flows: names of :data:`FLOWS`.
    :param float seconds: of training for each flow and density.
    :return: for every density, its runs.
    """
    runs: dict[str, dict[str, Run]] = {}
    bar = tqdm(
        total=seconds * len(flows) * len(densities),
        disable=not show_progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s",
    )
    with bar:
        try:
            for density_name, density in densities.items():
                bar.set_description(density_name)
                begun = {}
                for name in flows:
                    begun[name] = Run(name, seconds=seconds, seed=seed, device=device)
                    _take_turn(begun[name], density, batch_size, 0.0)
                runs[density_name] = begun
                while (run := min(begun.values(), key=lambda run: run.seconds)).seconds < seconds:
                    before = run.seconds
                    _take_turn(run, density, batch_size, TURN_SECONDS)
                    bar.update(min(run.seconds - before, bar.total - bar.n))
        except KeyboardInterrupt:
            if not runs:
                raise  # there is nothing to go on with
            bar.write("Interrupted: going on with the flows as they are.")
    return runs


def _take_turn(run: Run, density: Density, batch_size: int, seconds: float) -> None:
    """At least one step."""
    end = min(run.seconds + seconds, run.budget)
    while True:
        run.step(density.sample(batch_size, run.data_generator).to(run.device))
        if run.seconds >= end:
            return


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="outputs/density_2d")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=4.0,
        help="of training for each flow and density (default 4)",
    )
    parser.add_argument(
        "--densities",
        nargs="+",
        choices=DENSITIES,
        default=list(DENSITIES),
        metavar="NAME",
        help=f"of {', '.join(DENSITIES)} (default: all)",
    )
    parser.add_argument(
        "--flows",
        nargs="+",
        choices=FLOWS,
        default=list(FLOWS),
        metavar="NAME",
        help=f"of {', '.join(FLOWS)} (default: all)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, help="points a step (default 256)"
    )
    return parser.parse_args(argv)


@pyro.validation_enabled(False)  # a flow that has diverged is to be seen in the table
def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    densities = {name: DENSITIES[name]() for name in args.densities}
    runs = train(
        densities,
        args.flows,
        seconds=args.seconds,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
    )

    table, pictures = [], {}
    for density_name, begun in tqdm(runs.items(), desc="evaluating"):
        density = densities[density_name]
        test = density.sample(NUM_TEST, torch.Generator().manual_seed(TEST_SEED + args.seed))
        true_nll = -density.log_prob(test).mean().item()
        pictures[density_name] = {
            "test data": test[:NUM_POINTS],
            "truth:\nlog density": density.log_prob,
            **_panels(begun, args.seed),
        }
        for flow_name, run in begun.items():
            table.append(
                {
                    "density": density_name,
                    "flow": flow_name,
                    "true NLL": true_nll,
                    **run.evaluate(test, args.seed)._asdict(),
                    "steps": run.num_steps,
                    "ms/step": 1e3 * run.seconds / run.num_steps,
                }
            )
    print("\nExact test NLL (nats), and that of the true density")
    print(_pivot(table, "nll", {"truth": "true NLL"}))
    for key, title in (
        ("mass", f"Integral of p over [−{EXTENT:.0f}, {EXTENT:.0f}]²"),
        ("recovered", "Share of test data x with T.inv(T(x)) = x"),
        ("inverted", "Share of latents z with T(T.inv(z)) = z"),
    ):
        print(f"\n{title}\n{_pivot(table, key)}")
    milliseconds = {
        name: [row["ms/step"] for row in table if row["flow"] == name] for name in args.flows
    }
    print(
        "\nMilliseconds a step: "
        + ", ".join(f"{fmean(values):.1f} {name}" for name, values in milliseconds.items())
    )

    title = "Samples, and exact log densities"
    figure = plotting.plot_densities(pictures, limit=VIEW, title=title)
    save_figure(args.output_dir / "densities.png", figure, dpi=100)
    result = write_result(args, table)
    print(f"\nThe picture and result.json are in {args.output_dir}")
    return result


def _panels(runs: Mapping[str, Run], seed: int) -> dict[str, Tensor | Callable[[Tensor], Tensor]]:
    """Samples and the log density of every flow; samples of one pair of free networks will do."""
    panels: dict[str, Tensor | Callable[[Tensor], Tensor]] = {}
    has_pair = False
    for name, run in runs.items():
        label = name.partition("_")[0]  # what there is room for
        if run.flow.pair is None or not has_pair:
            panels[f"{label}:\nsamples"] = run.sample(NUM_POINTS, seed)
        panels[f"{label}:\nlog density"] = run.log_prob
        has_pair = has_pair or run.flow.pair is not None
    return panels


def _pivot(
    table: Sequence[Mapping[str, object]], key: str, constants: Mapping[str, str] | None = None
) -> str:
    """A line for each density, with a column for each flow; and for what all flows share."""
    lines: dict[object, dict[str, object]] = {}
    for row in table:
        line = lines.setdefault(row["density"], {"density": row["density"]})
        for label, constant in (constants or {}).items():
            line[label] = f"{row[constant]:.3f}"
        line[str(row["flow"])] = f"{row[key]:.3f}"
    return format_table(list(lines.values()))


if __name__ == "__main__":
    main()
