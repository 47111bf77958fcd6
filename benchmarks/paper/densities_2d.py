"""Nine densities in the plane, by the paper's dense flow with each log-determinant, and by a pair.

The toy densities of the paper's code, each about as wide as a standard normal. The flows:

    exact, refined, learned    eight dense 2 × 2 layers, with splines between any two
    pair                       SelfNormalizingPair: two residual networks, "exact"
    spline coupling            Pyro's, three layers with swaps between them, for comparison

For each density, all flows have the same batches in the same order, fresh samples at each step, and
the same number of steps of Adam, whose rate falls to 0 along a cosine.

All densities are known, and so is the lowest negative log-likelihood (NLL). Nothing makes the f of
a pair invertible: where two points have the same image, p is too large, and its NLL looks too good.
So the integral of p is in the table, and the share of test data that are the inverse of their
latents.

    python benchmarks/paper run --preset densities-2d
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from settings import Densities2dSettings
from torch import Tensor, nn

from pyro_snf import RationalQuadraticSpline, ResidualMLP, SelfNormalizingPair, flows, plotting
from pyro_snf.progress import Progress

__all__ = ["DENSITIES", "run"]

LOG_DETS = ("exact", "refined", "learned")
PAIR, COUPLING = "pair", "spline coupling"
FLOWS = (*LOG_DETS, PAIR, COUPLING)

#: Test data. Their seed is not that of the training.
NUM_TEST, TEST_SEED = 10_000, 2**32
#: Of them, those that are looked for again from their latents, and an inverse is one from here.
NUM_INVERTED, INVERSE_TOLERANCE = 2_000, 1e-3
#: The integral of p is a sum over the cells of a grid on [−EXTENT, EXTENT]²; their width of 0.03 is
#: 0.6 standard deviations of the narrowest noise, that of the rings.
EXTENT, NUM_CELLS = 5.0, 320
#: Points at a time where densities are evaluated.
CHUNK = 8_192
#: What the picture shows: [−VIEW, VIEW]², and so many points.
VIEW, NUM_POINTS = 2.8, 2_000
#: The splines' [−B, B].
BOUND = 4.0
#: Of Adam, for what is not the dense flow.
LEARNING_RATES = {PAIR: 5e-3, COUPLING: 1e-2}


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
    """``sin 2x``. With it, f learns the fine structure of a density faster than with SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


class Flow(NamedTuple):
    """A density that is to be trained."""

    density: dist.TransformedDistribution
    module: nn.Module
    """All that has parameters in it."""


def make_flow(name: str, *, num_layers: int, num_bins: int) -> Flow:
    """One of :data:`FLOWS`, on the way from latents to data as Pyro has it."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    if name in LOG_DETS:
        flow = flows.fully_connected(
            2,
            num_layers=num_layers,
            activation=lambda shape: RationalQuadraticSpline(shape, num_bins=num_bins, bound=BOUND),
            log_det=name,
        )
        return Flow(dist.TransformedDistribution(base, [flow.inv]), flow)
    if name == PAIR:
        f, g = (ResidualMLP(2, [64, 64], num_blocks=3, activation=SineActivation) for _ in range(2))
        pair = SelfNormalizingPair(f, g, event_shape=2, log_det="exact")
        return Flow(dist.TransformedDistribution(base, [pair.inv]), pair)
    swap = pyro_transforms.permute(2, torch.tensor([1, 0]))
    options = {"hidden_dims": [32, 32], "count_bins": 8, "bound": 3.0}
    layers = [pyro_transforms.spline_coupling(2, **options) for _ in range(3)]
    transforms = [part for layer in layers for part in (layer, swap)][:-1]
    return Flow(dist.TransformedDistribution(base, transforms), nn.ModuleList(layers))


def train(
    flow: Flow, density: Density, rate: float, settings: Densities2dSettings, progress: Progress
) -> float:
    """Milliseconds of processor time a step, on average, without drawing the data."""
    optimizer = torch.optim.Adam(flow.module.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
    generator = torch.Generator().manual_seed(settings.seed)
    seconds = 0.0
    for _ in range(settings.num_steps):
        batch = density.sample(settings.batch_size, generator)
        start = time.process_time()
        optimizer.zero_grad()
        loss = -flow.density.log_prob(batch).mean()
        loss.backward()
        optimizer.step()
        seconds += time.process_time() - start
        schedule.step()
        progress.update(f"{loss.item():.2f} nats")
    flow.module.eval()
    return 1e3 * seconds / settings.num_steps


@torch.no_grad()
def log_prob(flow: Flow, x: Tensor) -> Tensor:
    """The exact log density of points of shape ``(N, 2)``; the flow is in ``eval()`` mode."""
    # New tensors each time, for Pyro's transforms remember what they made of the last one.
    with warnings.catch_warnings():  # of folds: they are in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        return torch.cat([flow.density.log_prob(part.clone()) for part in x.split(CHUNK)])


@torch.no_grad()
def recovered_share(flow: Flow, x: Tensor) -> float:
    """The share of points x, of shape ``(N, 2)``, with ``T.inv(T(x)) = x``."""
    z = x
    for transform in reversed(flow.density.transforms):
        z = transform.inv(z)
    found = z.clone()  # as above
    with warnings.catch_warnings():  # of inverses that were not found: they are in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        for transform in flow.density.transforms:
            found = transform(found)
    return ((found - x).norm(dim=1) < INVERSE_TOLERANCE).double().mean().item()


def integral(flow: Flow) -> float:
    """Of p over [−EXTENT, EXTENT]²."""
    width = 2 * EXTENT / NUM_CELLS
    centers = (torch.arange(NUM_CELLS) + 0.5) * width - EXTENT
    values = log_prob(flow, torch.cartesian_prod(centers, centers))
    return values.double().exp().sum().item() * width**2


def evaluate(flow: Flow, density: Density, test: Tensor) -> dict[str, float]:
    """The exact NLL of test data in nats and how far it is above that of the true density, with
    the standard error of the difference; the integral of p; and the share of data recovered."""
    found = log_prob(flow, test)
    truth = density.log_prob(test)
    difference = truth - found
    return {
        "nll": -found.mean().item(),
        "above_truth": difference.mean().item(),
        "standard_error": difference.std().item() / math.sqrt(len(test)),
        "integral": integral(flow),
        "recovered": recovered_share(flow, test[:NUM_INVERTED]),
    }


@pyro.validation_enabled(False)  # a flow that has diverged is to be seen in the table
def run(settings: Densities2dSettings, output_dir: Path) -> list[dict[str, Any]]:
    """Train each flow for each density; a row for each, and ``densities.png`` in a folder.

    :raises ValueError: for a density that is not of these.
    """
    names = settings.densities or tuple(DENSITIES)
    unknown = [name for name in names if name not in DENSITIES]
    if unknown:
        raise ValueError(f"expected densities among {', '.join(DENSITIES)}; got {unknown[0]!r}")
    if settings.log_det in ("all", PAIR):
        chosen = list(FLOWS) if settings.log_det == "all" else [PAIR]
    else:
        chosen = [name for name in FLOWS if name == settings.log_det or name not in LOG_DETS]
    rows, pictures = [], {}
    with Progress(True, settings.num_steps * len(names) * len(chosen)) as progress:
        for density_name in names:
            density = DENSITIES[density_name]()
            test = density.sample(
                NUM_TEST, torch.Generator().manual_seed(TEST_SEED + settings.seed)
            )
            panels: dict[str, Any] = {"data": test[:NUM_POINTS], "truth": density.log_prob}
            for name in chosen:
                torch.manual_seed(settings.seed)
                flow = make_flow(name, num_layers=settings.num_layers, num_bins=settings.num_bins)
                rate = LEARNING_RATES.get(name, settings.learning_rate)
                milliseconds = train(flow, density, rate, settings, progress)
                row = {"density": density_name, "flow": name, **evaluate(flow, density, test)}
                rows.append({**row, "steps": settings.num_steps, "ms": milliseconds})
                panels[name] = partial(log_prob, flow)
            pictures[density_name] = panels
    figure = plotting.plot_densities(pictures, limit=VIEW, title="Data, and exact log densities")
    figure.savefig(output_dir / "densities.png", dpi=100)
    return rows
