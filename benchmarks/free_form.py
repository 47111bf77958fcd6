"""Pairs of free networks: the gradient's cost, bias and noise, the value's error, and densities.

    python benchmarks/free_form.py products      (J_gᵀ v against J_g v in forward mode)
    python benchmarks/free_form.py bias          (of refined, against the number of Krylov steps)
    python benchmarks/free_form.py probes        (noise: kinds and numbers of probes)
    python benchmarks/free_form.py value         (the value in training, against the exact one)
    python benchmarks/free_form.py digits        (exact test likelihood, 8 × 8)
    python benchmarks/free_form.py mnist --data-dir DIR
    python benchmarks/free_form.py time          (a training step against D)

f and g are residual networks of the same kind. Where a *trained pair* is asked for, it is one of
:data:`SETTINGS`, trained on scikit-learn's digits for some steps (with ``--data-dir``, ``value``
also on MNIST). Times are the processor's, of one thread, so that other processes do not count;
medians over turns, which the methods take one after the other.

``digits`` and ``mnist`` train densities of dequantized pixels, ActNorm first (and splines, on
MNIST; or a Gaussian copula of 20,000 images), by Adam with a rate that falls to 0, and keep the
parameters that were best in validation. The likelihood is exact, D backward passes for every image
(of MNIST, a fixed part of the test images). Whether it is that of a density at all depends on f
being invertible, for which there are these signs: the share of test images x with ``T.inv(T(x)) =
x``; the share of base samples z for which ``T.inv(z)`` is found; and the share of test images, and
of points halfway between two of them, where ``det J`` has the sign that it starts with: a change of
sign is a fold.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from datasets import load_images
from files import save_json
from results import print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pyro_snf import (
    ActNorm,
    Compose,
    GaussianCopula,
    PairExact,
    PairLearned,
    PairMethod,
    PairRefined,
    RationalQuadraticSpline,
    Reconstruction,
    ResidualMLP,
    SelfNormalizingPair,
    self_normalizing_pair,
)
from pyro_snf.free_form.linearization import Linearization, linearize
from pyro_snf.free_form.log_det import (
    ValueEstimate,
    exact_slogdet,
    probe_gradient,
)
from pyro_snf.images import LogitTransform, dequantize
from pyro_snf.probes import PROBES, draw_probes

BATCH = 100
WARM_UP_STEPS = 200
MAX_GRADIENT_NORM = 100.0
#: Images of MNIST in validation, and in the test. A pair takes D passes for each.
NUM_VALIDATION, NUM_TEST = 100, 500
#: Images from which a copula is initialized.
NUM_INITIAL = 20_000
#: Test images at which f is tried for being invertible.
NUM_TRIED = 250
#: Of ‖T.inv(T(x)) − x‖/(‖x‖ + √D), for the two to be the same: float32's, times the condition.
SAME = 1e-3

#: The value in training is not looked at.
REFINED, LEARNED = PairRefined(lanczos_steps=0), PairLearned()


# --- Networks, data and training ----------------------------------------------------------------


class ResidualConv(nn.Module):
    """A residual network of images, given as rows, that starts as the identity.

    :param int height: of the image, which is a square of one channel.
    :param int squeeze: s; the convolutions see s² channels of an image s times smaller.
    :param int channels: of the hidden layers.
    :param int num_blocks: each of three convolutions, 3 × 3, 1 × 1 and 3 × 3.
    """

    def __init__(self, height: int, *, squeeze: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.height, self.squeeze = height, squeeze
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            last = nn.Conv2d(channels, squeeze**2, 3, padding=1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(squeeze**2, channels, 3, padding=1),
                    nn.SiLU(),
                    nn.Conv2d(channels, channels, 1),
                    nn.SiLU(),
                    last,
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        images = F.pixel_unshuffle(x.view(-1, 1, self.height, self.height), self.squeeze)
        for block in self.blocks:
            images = images + block(images)
        return F.pixel_shuffle(images, self.squeeze).flatten(1)


def make_network(dim: int, kind: str, width: int, num_blocks: int, channels: int) -> nn.Module:
    """An MLP; convolutions; or convolutions, on images and squeezed ones, and then an MLP."""
    mlp = partial(ResidualMLP, dim, [width], num_blocks=num_blocks)
    if kind == "mlp":
        return mlp()
    height = math.isqrt(dim)
    conv = partial(ResidualConv, height, num_blocks=num_blocks, channels=channels)
    squeezes = [2] if height < 28 else [2, 4]
    if kind == "coarse conv + mlp":
        squeezes = [4]
    convolutions = [conv(squeeze=squeeze) for squeeze in squeezes]
    return nn.Sequential(*convolutions, *([] if kind == "conv" else [mlp()]))


class Data(NamedTuple):
    """Pixels as rows of bytes, of shape ``(N, D)``."""

    train: Tensor
    validation: Tensor
    test: Tensor
    num_levels: int


def digits() -> Data:
    images = load_images("digits")
    train, validation, test = (part.flatten(1) for part in images[:3])
    return Data(train, validation, test, images.num_levels)


def mnist(folder: Path, num_validation: int = NUM_VALIDATION, num_test: int = NUM_TEST) -> Data:
    images = load_images("mnist", folder)
    train, validation, test = (part.flatten(1) for part in images[:3])
    return Data(train, validation[:num_validation], test[:num_test], images.num_levels)


class Evaluation(NamedTuple):
    """How good a density is, and whether it is one."""

    nll: float
    """Exact, in nats per test image."""
    standard_error: float
    same: float
    """Share of test images for which ``T.inv(T(x)) = x``."""
    found: float
    """Share of samples z of the base for which ``T.inv(z)`` was found."""
    positive: float
    """Share of test images with ``det J > 0``."""
    halfway: float
    """The same halfway between two test images."""
    reconstruction: float
    """Root mean square of ``g(f(x)) − x``, where standard deviations of pixels are 1."""


class Run:
    """A density of images by a pair, in training."""

    def __init__(
        self,
        data: Data,
        *,
        num_steps: int,
        spline: bool = False,
        copula: bool = False,
        network: str = "mlp",
        width: int = 256,
        num_blocks: int = 4,
        channels: int = 64,
        learning_rate: float = 1e-3,
        seed: int = 0,
        log_det: PairMethod = REFINED,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.num_steps = data, num_steps
        self.dim = data.train.shape[1]
        pair = (make_network(self.dim, network, width, num_blocks, channels) for _ in range(2))
        self.transform = SelfNormalizingPair(
            *pair, event_shape=self.dim, log_det=log_det, reconstruction=reconstruction
        )
        first: list[nn.Module] = [ActNorm(self.dim, event_dim=1)]
        if copula:
            first = [GaussianCopula(self.dim)]
        elif spline:
            first.append(RationalQuadraticSpline(self.dim))
        self.flow = Compose([*first, self.transform])
        self.to_logits = LogitTransform(data.num_levels, event_dim=1)
        base = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1)
        self.density = dist.TransformedDistribution(base, [self.flow.inv, self.to_logits.inv])
        self.batches = self._batches(seed)
        pixels = data.train[: NUM_INITIAL if copula else BATCH]
        generator = torch.Generator().manual_seed(seed)
        start = time.process_time()
        self.flow.initialize(self.to_logits(self._dequantize(pixels, generator)))
        self.seconds_before = time.process_time() - start
        self.optimizer = torch.optim.Adam(self.flow.parameters(), lr=learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: (
                min(1.0, (step + 1) / WARM_UP_STEPS)
                * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / num_steps)))
            ),
        )
        self.seconds = 0.0
        """Of the processor, of training steps alone."""
        self.count = 0

    def _batches(self, seed: int) -> Iterator[Tensor]:
        """Dequantized images, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.data.train), generator=generator)
            for index in order[: len(order) // BATCH * BATCH].split(BATCH):
                yield self._dequantize(self.data.train[index], generator)

    def _dequantize(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return dequantize(pixels, num_levels=self.data.num_levels, generator=generator)

    def step(self) -> None:
        pixels = next(self.batches)
        start = time.process_time()
        self.optimizer.zero_grad()
        loss = -self.density.log_prob(pixels).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.flow.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.seconds += time.process_time() - start
        self.count += 1

    def train(self, *, every: int = 200, name: str = "") -> dict[int, float]:
        """Train, and go back to the parameters that were best in validation.

        :return: the exact likelihood in validation after some steps.
        """
        curve: dict[int, float] = {}
        best, state = math.inf, copy.deepcopy(self.flow.state_dict())
        for _ in tqdm(range(self.num_steps), desc=name, mininterval=10, disable=not name):
            self.step()
            if self.count % every == 0 or self.count == self.num_steps:
                curve[self.count] = self.nll(self.data.validation).mean().item()
                if curve[self.count] < best:
                    best, state = curve[self.count], copy.deepcopy(self.flow.state_dict())
        self.flow.load_state_dict(state)
        return curve

    @torch.no_grad()
    def nll(self, pixels: Tensor) -> Tensor:
        """Exact, in nats; the noise is the same in every call."""
        self.flow.eval()
        x = self._dequantize(pixels, torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # folds are counted
            values = torch.cat([-self.density.log_prob(part) for part in x.split(250)])
        self.flow.train()
        return values

    @torch.no_grad()
    def input_of(self, pixels: Tensor) -> Tensor:
        """What the pair gets to see."""
        x = self.to_logits(pixels)
        for part in self.flow.parts[:-1]:
            x = part(x)
        return x

    @torch.no_grad()
    def evaluate(self, num_tried: int = NUM_TRIED) -> Evaluation:
        nll = self.nll(self.data.test)
        pixels = self._dequantize(self.data.test, torch.Generator().manual_seed(0))
        self.flow.eval()
        x = self.input_of(pixels[:num_tried])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what has not converged is counted
            y = self.transform(x)
            back = self.transform.inv(y.clone())
            self.transform.inv(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
        convergence = self.transform.convergence
        error = torch.linalg.vector_norm(back - x, dim=1)
        is_same = error <= SAME * (torch.linalg.vector_norm(x, dim=1) + self.dim**0.5)
        found = Evaluation(
            nll=nll.mean().item(),
            standard_error=nll.std().item() / math.sqrt(len(nll)),
            same=is_same.float().mean().item(),
            found=convergence.num_converged / convergence.num_samples,
            positive=self._share_positive(x),
            halfway=self._share_positive((x + x.roll(1, 0)) / 2),
            reconstruction=(self.transform.inverse_net(y) - x).square().mean().sqrt().item(),
        )
        self.flow.train()
        return found

    def _share_positive(self, x: Tensor) -> float:
        sign, _ = exact_slogdet(self.transform.forward_net, x, (), ())
        return (sign > 0).float().mean().item()


#: Networks for MNIST that are small enough for a step of a fifth of a second.
COARSE = {"network": "coarse conv + mlp", "channels": 48, "num_blocks": 2, "width": 256}

#: Of a run: of the pair, and of its training. What is not said is as :class:`Run` has it, and the
#: penalty is the default one.
SETTINGS: dict[str, dict[str, Any]] = {
    "refined": {"log_det": REFINED},
    "refined, rate 5e-3": {"log_det": REFINED, "learning_rate": 5e-3},
    "refined, g alone": {"log_det": REFINED, "reconstruction": Reconstruction(trains="inverse")},
    "refined, λ = 0.1": {"log_det": REFINED, "reconstruction": Reconstruction(0.1)},
    "refined, λ = 1": {"log_det": REFINED, "reconstruction": Reconstruction(1.0)},
    "refined, λ = 10": {"log_det": REFINED, "reconstruction": Reconstruction(10.0)},
    "refined, conv": {"log_det": REFINED, "network": "conv"},
    "refined, conv + mlp": {"log_det": REFINED, "network": "conv + mlp"},
    "refined, coarse conv + mlp": {"log_det": REFINED, **COARSE},
    "refined, copula": {"log_det": REFINED, **COARSE, "copula": True, "learning_rate": 6e-3},
    "learned": {"log_det": LEARNED},
    "learned, rate 5e-3": {"log_det": LEARNED, "learning_rate": 5e-3},
    "learned, conv": {"log_det": LEARNED, "network": "conv"},
    "exact": {"log_det": PairExact()},
}


#: Of all runs on MNIST, besides. The splines are for the marginals, many of which are of noise.
MNIST_OPTIONS: dict[str, Any] = {"spline": True, "width": 512, "learning_rate": 2e-3}


def make_run(data: Data, setting: str, num_steps: int, seed: int) -> Run:
    options = MNIST_OPTIONS if data.num_levels == 256 else {}
    return Run(data, num_steps=num_steps, seed=seed, **{**options, **SETTINGS[setting]})


def trained(data: Data, args: argparse.Namespace) -> Run:
    """The pair that noise and errors are measured on."""
    run = make_run(data, args.setting, args.num_steps, args.seed)
    run.train(every=max(args.num_steps // 4, 1), name=args.setting)
    return run


class _Point:
    """A pair near a batch of images, and gradients in the parameters of f there."""

    def __init__(self, forward: nn.Module, inverse: nn.Module, x: Tensor) -> None:
        self.forward, self.x = forward, x
        self.parameters = tuple(forward.parameters())
        self.near = linearize(forward, x, keep_graph=True)
        latent = self.near.output.detach().requires_grad_()
        self.back = Linearization(latent, inverse(latent))

    def gradient(self, values: Tensor) -> Tensor:
        """Of the mean over the batch, as a vector."""
        parts = torch.autograd.grad(
            values.mean(),
            self.parameters,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([part.flatten() for part in parts])

    def exact(self) -> Tensor:
        return self.gradient(exact_slogdet(self.forward, self.x, (), self.parameters)[1])

    def estimate(self, probes: Tensor, krylov_steps: int) -> tuple[Tensor, float]:
        """The gradient by probes, and the estimate of its error."""
        found = probe_gradient(
            self.near, self.back, probes, tolerance=0.0, krylov_steps=krylov_steps
        )
        return self.gradient(found.surrogate), found.residual.square().mean().sqrt().item()


def race(methods: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds of the processor for every method: medians over turns."""
    for method in methods.values():
        method()
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(turns):
        for name, method in methods.items():
            start = time.process_time()
            method()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def perturbed(network: nn.Module, size: float, generator: torch.Generator) -> nn.Module:
    """The network, no identity any more: random last layers of its blocks."""
    for block in network.blocks:
        weight = block[-1].weight
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        with torch.no_grad():
            weight.copy_(size * noise / weight.shape[1] ** 0.5)
    return network


# --- Products ------------------------------------------------------------------------------------


def autoencoder_loss(x: Tensor, y: Tensor, back: Tensor) -> Tensor:
    """What a step computes besides the log-determinant."""
    return (y.square().sum(1) / 2 + (back - x).square().sum(1)).mean()


def reverse_step(forward: nn.Module, inverse: nn.Module, x: Tensor, probes: Tensor) -> Tensor:
    """``w = J_gᵀ v`` by a backward pass; then ``⟨v, J_fᵀ w⟩``."""
    near = linearize(forward, x)
    back = Linearization(near.output, inverse(near.output))
    solution = back.vjp(probes)
    surrogate = (near.vjp(solution, create_graph=True) * probes).sum(1)
    return autoencoder_loss(x, near.output, back.output) - surrogate.mean()


def forward_step(forward: nn.Module, inverse: nn.Module, x: Tensor, probes: Tensor) -> Tensor:
    """``u = J_g v`` along with g in forward mode; then ``⟨J_fᵀ v, u⟩``, as Free-form flows do."""
    near = linearize(forward, x)
    output, tangent = torch.func.jvp(inverse, (near.output,), (probes,))
    surrogate = (near.vjp(probes, create_graph=True) * tangent.detach()).sum(1)
    return autoencoder_loss(x, near.output, output) - surrogate.mean()


def plain_step(forward: nn.Module, inverse: nn.Module, x: Tensor) -> Tensor:
    y = forward(x)
    return autoencoder_loss(x, y, inverse(y))


def products(args: argparse.Namespace) -> None:
    print("Milliseconds of one product, of vectors with a graph that is there, and of a step")
    print_header(
        *("D", "width", "forward pass", "Jᵀ v", "J v", "J v, its graph too"),
        *("J v, forward mode", "forward mode / J v"),
        *("step, reverse", "step, forward", "autoencoder", "forward / reverse"),
    )
    for dim, width in zip(args.dims, args.widths, strict=True):
        generator = torch.Generator().manual_seed(args.seed)
        torch.manual_seed(args.seed)
        forward, inverse = (
            perturbed(ResidualMLP(dim, [width, width]), 0.3, generator) for _ in range(2)
        )
        x, v = (torch.randn(BATCH, dim, generator=generator) for _ in range(2))
        near = linearize(forward, x)
        near.jvp(v)

        def fresh_jvp(near: Linearization = near, v: Tensor = v) -> Tensor:
            return Linearization(near.source, near.output).jvp(v)

        steps = {
            "reverse": partial(reverse_step, forward, inverse, x, v),
            "forward": partial(forward_step, forward, inverse, x, v),
            "plain": partial(plain_step, forward, inverse, x),
        }

        def no_grad(method: Callable[..., object], *arguments: object) -> None:
            with torch.no_grad():
                method(*arguments)

        ms = race(
            {
                "pass": partial(no_grad, forward, x),
                "vjp": partial(near.vjp, v),
                "jvp": partial(near.jvp, v),
                "fresh jvp": fresh_jvp,
                "forward mode": partial(no_grad, torch.func.jvp, forward, (x,), (v,)),
                **{name: lambda step=step: step().backward() for name, step in steps.items()},
            },
            args.turns,
        )
        print_row(
            dim,
            width,
            *(f"{ms[name]:.2f}" for name in ("pass", "vjp", "jvp", "fresh jvp", "forward mode")),
            f"{ms['forward mode'] / ms['jvp']:.2f}",
            *(f"{ms[name]:.2f}" for name in ("reverse", "forward", "plain")),
            f"{ms['forward'] / ms['reverse']:.2f}",
        )

    run = trained(digits(), args)
    print("\nThe gradient's standard deviation over probes and its bias, to its exact norm")
    print_header("estimate", "standard deviation", "bias")
    point = _Point(
        run.transform.forward_net, run.transform.inverse_net, run.input_of(next(run.batches))
    )

    def reverse(probes: Tensor) -> Tensor:
        return point.estimate(probes, 0)[0]

    def forward_mode(probes: Tensor) -> Tensor:
        latent = point.back.source.detach()
        (tangent,) = torch.func.jvp(run.transform.inverse_net, (latent,), (probes[0],))[1:]
        product = point.near.vjp(probes[0], create_graph=True)
        return point.gradient((product * tangent.detach()).sum(1))

    exact = point.exact()
    for name, estimate in [("⟨v, J_fᵀ (J_gᵀ v)⟩", reverse), ("⟨J_fᵀ v, J_g v⟩", forward_mode)]:
        generator = torch.Generator().manual_seed(args.seed)
        draw = partial(draw_probes, "orthogonal", 1, point.x.shape, generator, point.x.dtype)
        deviation, bias = moments((estimate(draw()) for _ in range(args.num_draws)), exact)
        print_row(name, f"{deviation:.3f}", f"{bias:.3f}")


def moments(draws: Iterable[Tensor], exact: Tensor) -> tuple[float, float]:
    """Standard deviation and bias of a random vector, to the norm of the exact one."""
    mean, square, num_draws = torch.zeros_like(exact), 0.0, 0
    for draw in draws:
        mean += draw
        square += draw.square().sum().item()
        num_draws += 1
    mean, square = mean / num_draws, square / num_draws
    variance = max(square - mean.square().sum().item(), 0.0) * num_draws / (num_draws - 1)
    # The mean's own noise is no bias.
    bias = (mean - exact).square().sum().item() - variance / num_draws
    norm = exact.norm().item()
    return math.sqrt(variance) / norm, math.sqrt(max(bias, 0.0)) / norm


# --- Bias ----------------------------------------------------------------------------------------

KRYLOV_STEPS = (0, 1, 2, 3, 4, 6, 8)


def bias(args: argparse.Namespace) -> None:
    print("Relative error of the mean gradient (its estimate), k = D orthogonal probes")
    print_header("pair", *(f"{n} steps" for n in KRYLOV_STEPS))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    dim = args.dim
    forward = ResidualMLP(dim, [2 * dim], dtype=torch.float64)
    forward = perturbed(forward, 0.5, generator)
    x = torch.randn(args.batch, dim, generator=generator, dtype=torch.float64)
    point = _Point(forward, nn.Identity(), x)
    jacobian = point.near.jacobian()
    condition = torch.linalg.cond(jacobian).median().item()
    # One for all rows of x: errors that differ from row to row would be averaged away.
    error = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    for size in args.sizes:
        inexact = torch.linalg.inv(jacobian) @ (torch.eye(dim, dtype=torch.float64) + size * error)
        source = point.back.source
        point.back = Linearization(source, (inexact @ source.unsqueeze(2)).squeeze(2))
        _print_bias(f"g off by {size:.0%}, D = {dim}, cond J = {condition:.1f}", point, generator)
    run = trained(digits(), args)
    pair = copy.deepcopy(run.transform).double()
    x = run.input_of(next(run.batches)).double()
    point = _Point(pair.forward_net, pair.inverse_net, x)
    condition = torch.linalg.cond(point.near.jacobian()).median().item()
    name = f"digits, {args.setting}, D = 64, cond J = {condition:.1f}"
    _print_bias(name, point, generator)


def _print_bias(name: str, point: _Point, generator: torch.Generator) -> None:
    dim = point.x.shape[1]
    exact = point.exact()
    probes = draw_probes("orthogonal", dim, point.x.shape, generator, point.x.dtype)
    cells = []
    for krylov_steps in KRYLOV_STEPS:
        gradient, estimate = point.estimate(probes, krylov_steps)
        error = (gradient - exact).norm().item() / exact.norm().item()
        cells.append(f"{error:.1e} ({estimate:.1e})")
    print_row(name, *cells)


# --- Probes --------------------------------------------------------------------------------------

NUM_PROBES = (1, 2, 4, 8)


def probes(args: argparse.Namespace) -> None:
    run = trained(digits(), args)
    pair = run.transform
    point = _Point(pair.forward_net, pair.inverse_net, run.input_of(next(run.batches)))
    exact = point.exact()
    full = []
    for _ in range(args.num_draws):
        other = _Point(pair.forward_net, pair.inverse_net, run.input_of(next(run.batches)))
        _, value = exact_slogdet(other.forward, other.x, (), other.parameters)
        full.append(other.gradient(other.near.output.square().sum(1) / 2 - value))
    of_batches = torch.stack(full).var(0).sum().sqrt().item()
    print(
        f"\nExact gradient of log|det J|: norm {exact.norm():.1f}. Standard deviation of the exact "
        f"gradient of the whole loss over batches of {BATCH}: {of_batches:.1f}\n"
    )
    print("Standard deviation over probes, to the norm (to that of the batches); ms of an estimate")
    for krylov_steps in args.krylov_steps:
        print(f"\n{krylov_steps} Krylov steps")
        print_header("probes", *(f"k = {k}" for k in NUM_PROBES))
        times = race(
            {
                f"{kind} {k}": partial(_draw_gradient, point, kind, k, krylov_steps, args.seed)
                for kind in PROBES
                for k in NUM_PROBES
            },
            args.turns,
        )
        for kind in PROBES:
            cells = []
            for k in NUM_PROBES:
                draw = partial(_draw_gradient, point, kind, k, krylov_steps)
                deviation, _ = moments(map(draw, range(args.num_draws)), exact)
                relative = deviation * exact.norm().item() / of_batches
                cells.append(f"{deviation:.3f} ({relative:.2f}); {times[f'{kind} {k}']:.1f}")
            print_row(kind, *cells)


def _draw_gradient(point: _Point, kind: str, k: int, krylov_steps: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    probes = draw_probes(kind, k, point.x.shape, generator, point.x.dtype)
    return point.estimate(probes, krylov_steps)[0]


# --- Value ---------------------------------------------------------------------------------------

LANCZOS_STEPS = (1, 2, 4, 8, 16)


def value(args: argparse.Namespace) -> None:
    data = {"digits": digits()}
    if args.data_dir is not None:
        data["mnist"] = mnist(args.data_dir)
    for name, images in data.items():
        run = trained(images, args)
        x = run.input_of(next(run.batches))
        pair = run.transform
        few = x[: BATCH if name == "digits" else 10]
        exact = exact_slogdet(pair.forward_net, few, (), ())[1].detach()
        condition = torch.linalg.cond(linearize(pair.forward_net, few).jacobian()).median()
        print(
            f"\n{name}, {args.setting}: log|det J| = {exact.mean():.1f} ± {exact.std():.1f} over "
            f"images, cond J = {condition:.1f}. Of a value in training, nats:"
        )
        steps = {str(n): partial(_value_step, run, n) for n in (0, *LANCZOS_STEPS)}
        times = race(steps, args.turns)
        print_header(
            *("Lanczos steps", "bias", "± its error", "sd of an image", "sd of a batch of 100"),
            *("ms a step", "share of the step"),
        )
        generator = torch.Generator().manual_seed(args.seed)
        few_near = linearize(pair.forward_net, few)
        for lanczos_steps in LANCZOS_STEPS:
            draws = []
            for _ in range(args.num_draws):
                probes = draw_probes("orthogonal", 1, few.shape, generator, few.dtype)
                estimate = ValueEstimate(few_near, probes, lanczos_steps=lanczos_steps)
                draws.append(estimate.value(estimate.numbers, few) - exact)
            errors = torch.stack(draws)
            of_an_image = errors.var(0).mean().sqrt().item()
            ms, rest = times[str(lanczos_steps)], times["0"]
            print_row(
                lanczos_steps,
                f"{errors.mean():+.2f}",
                f"{of_an_image / math.sqrt(errors.numel()):.2f}",
                f"{of_an_image:.2f}",
                f"{of_an_image / math.sqrt(BATCH):.2f}",
                f"{ms:.1f}",
                f"{1 - rest / ms:.0%}",
            )


def _value_step(run: Run, lanczos_steps: int) -> None:
    run.transform.log_det.lanczos_steps = lanczos_steps
    pixels = next(run.batches)
    run.optimizer.zero_grad()
    (-run.density.log_prob(pixels).mean()).backward()


# --- Densities -----------------------------------------------------------------------------------


def densities(args: argparse.Namespace) -> None:
    data = digits() if args.data_dir is None else mnist(args.data_dir)
    print_header(
        *("setting", "test NLL", "±", "at step", "validation", "train", "error estimate"),
        *("T.inv(T(x)) = x", "T.inv(z) found", "det J > 0", "halfway", "g(f(x)) − x"),
        *("ms a step", "minutes"),
    )
    for name in args.settings:
        for seed in args.seeds:
            run = make_run(data, name, args.num_steps, seed)
            curve = run.train(every=args.every, name=name)
            at = min(curve, key=curve.__getitem__)
            found = run.evaluate()
            estimate = run.transform.error_estimate
            train_nll = run.nll(data.train[: len(data.validation)]).mean().item()
            print_row(
                f"{name}, seed {seed}",
                f"{found.nll:.2f}",
                f"{found.standard_error:.2f}",
                f"{at} of {run.count}",
                f"{curve[at]:.2f}",
                f"{train_nll:.2f}",
                "exact" if estimate is None else f"{estimate:.3f}",
                *(f"{x:.1%}" for x in (found.same, found.found, found.positive, found.halfway)),
                f"{found.reconstruction:.3f}",
                f"{1e3 * run.seconds / run.count:.1f}",
                f"{(run.seconds_before + run.seconds) / 60:.1f}",
            )
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
                row = {"setting": name, "seed": seed, **found._asdict(), "validation": curve}
                file = args.output / f"free_form_{name}_{seed}.json".replace(", ", "_").replace(
                    " ", ""
                )
                save_json(file, row)


# --- Time ----------------------------------------------------------------------------------------

#: Of the pairs that are timed.
LOG_DETS = ("learned", "refined", "exact")
#: The largest D for "exact".
MAX_EXACT = 32


def step_times(args: argparse.Namespace) -> None:
    """Whole steps, Adam's included, of pairs at their defaults."""
    print(f"Milliseconds a step (to the autoencoder's), batch {args.batch}")
    print_header("D", "autoencoder", *LOG_DETS)
    for dim in args.dims:
        torch.manual_seed(args.seed)
        x = torch.randn(args.batch, dim) @ torch.randn(dim, dim) / dim**0.5
        x = (x + torch.sin(2 * x)) / x.std()
        plain = self_normalizing_pair(dim, [args.width] * 2)
        methods = {"autoencoder": _step_of(plain, lambda plain=plain, x=x: _plain_loss(plain, x))}
        for name in LOG_DETS:
            if name != "exact" or dim <= MAX_EXACT:
                pair = self_normalizing_pair(dim, [args.width] * 2, log_det=name)
                methods[name] = _step_of(pair, lambda pair=pair, x=x: _flow_loss(pair, x))
        for method in methods.values():  # g is the inverse of f at first, which needs no steps
            for _ in range(args.num_steps):
                method()
        ms = race(methods, args.turns)
        limit = ms["autoencoder"]
        cells = [f"{ms[m]:.2f} ({ms[m] / limit:.1f})" if m in ms else "–" for m in LOG_DETS]
        print_row(dim, f"{limit:.2f}", *cells)


def _plain_loss(pair: SelfNormalizingPair, x: Tensor) -> Tensor:
    return plain_step(pair.forward_net, pair.inverse_net, x)


def _flow_loss(pair: SelfNormalizingPair, x: Tensor) -> Tensor:
    y = pair(x)
    return (y.square().sum(1) / 2 - pair.log_abs_det_jacobian(x, y)).mean()


def _step_of(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


# --- Command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--seed", type=int, default=0)
        return command

    def add_training(command: argparse.ArgumentParser, num_draws: int) -> None:
        command.add_argument("--setting", choices=SETTINGS, default="refined")
        command.add_argument("--num-steps", type=int, default=2000)
        command.add_argument("--num-draws", type=int, default=num_draws)

    command = add("products", products)
    command.add_argument("--dims", type=int, nargs="+", default=[8, 64, 784])
    command.add_argument("--widths", type=int, nargs="+", default=[256, 256, 1024])
    command.add_argument("--turns", type=int, default=50)
    add_training(command, 200)
    command = add("bias", bias)
    command.add_argument("--dim", type=int, default=32)
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--sizes", type=float, nargs="+", default=[0.01, 0.1, 0.3])
    add_training(command, 0)
    command = add("probes", probes)
    command.add_argument("--krylov-steps", type=int, nargs="+", default=[0, 4])
    command.add_argument("--turns", type=int, default=20)
    add_training(command, 100)
    command = add("value", value)
    command.add_argument("--data-dir", type=Path)
    command.add_argument("--turns", type=int, default=20)
    add_training(command, 40)
    for name, steps in [("digits", 4000), ("mnist", 2500)]:
        command = add(name, densities)
        command.add_argument("--data-dir", type=Path, required=name == "mnist")
        command.add_argument(
            "--settings", nargs="+", choices=SETTINGS, default=["refined", "learned"]
        )
        command.add_argument("--num-steps", type=int, default=steps)
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--every", type=int, default=500)
        command.add_argument("--output", type=Path, default=Path("outputs"))
    command = add("time", step_times)
    command.add_argument("--dims", type=int, nargs="+", default=[2, 5, 10, 16, 64, 256])
    command.add_argument("--width", type=int, default=64)
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--num-steps", type=int, default=1000, help="before they are timed")
    command.add_argument("--turns", type=int, default=100)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
