"""How good is the gradient of a convolution's log-determinant, and what does a step cost?

    python benchmarks/conv.py gradient       (errors against the condition number, with a plot)
    python benchmarks/conv.py layer          (the error of the layer itself, on larger images)
    python benchmarks/conv.py step           (time of a training step, against conv2d)
    python benchmarks/conv.py pointwise      (the same of 1 × 1 kernels, against the peers)
    python benchmarks/conv.py exact          (exact log-determinants: time, and against SciPy)

``gradient`` takes random kernels, scaled until J has the wanted condition number, and compares
estimates of ``∂ log|det J|/∂a`` with the exact one, in float64:

- *learned kernel*: what the paper's method has when its reconstruction has converged. The kernel r
  minimizes ``‖r ⋆ (J x) − x‖²`` over white images x; the estimate is ``flip(r) ⊙ m``. With n
  iterations, it is from 8 probes v, ``Σ ⟨v, ∂J u⟩/8``, after n steps ``u ← u + r ⋆ (v − J u)``, of
  which the best is kept; or from GMRES, preconditioned by r.
- *periodic*, *factors*: ``log_det="refined"``, that is, the probes estimate only what J and a
  control variate P differ by. P is the convolution with the same kernel and a periodic boundary; or
  J as it was before the kernel moved, by as much as the layer admits (‖(J − P)P⁻¹‖_F/√D = 0.05).

``layer`` asks the method itself, in float32, for a kernel of condition number 100, a little away
from the factorized one (a drift of 0.045): with factors, and with a periodic boundary, which it
takes where factors cost too much.

``step`` trains one layer on images with a power-law spectrum. The methods take turns of some steps;
the median over turns counts, but for refined the mean over all steps: it does some things only now
and then. "dense" is slogdet of the D × D matrix and autograd.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from results import print_header, print_row, print_table
from timing import TimedTraining, forward_of, take_turns
from torch import Tensor, nn

from pyro_snf import SelfNormalizingConv2d
from pyro_snf.caching import TensorState
from pyro_snf.krylov import krylov
from pyro_snf.log_dets import control_variate_log_det
from pyro_snf.maps import convolution, kernels
from pyro_snf.maps.convolution_factors import ConvolutionFactors
from pyro_snf.maps.convolution_solve import one_pass_kernel

CONDITIONS = (3, 10, 100, 1000)
WINDOWS = (3, 5, 7)
ITERATIONS = (0, 1, 3, 10)
NUM_PROBES = 8


# --- Gradients ----------------------------------------------------------------------------------


def kernel_of_condition(
    channels: int, size: tuple[int, int], condition: float, generator: torch.Generator
) -> Tensor:
    """A random 3 × 3 kernel near the identity, scaled to a condition number of J."""
    direction = torch.randn(channels, channels, 3, 3, generator=generator)

    def found(scale: float) -> float:
        matrix = kernels.matrix(kernels.near_identity(scale * direction), size, "zeros")
        return torch.linalg.cond(matrix).item()

    low, high = 0.0, 0.1
    while found(high) < condition:
        low, high = high, 1.2 * high
        if high > 100:  # it is well conditioned without the identity too
            return kernel_of_condition(channels, size, condition, generator)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < condition else (low, middle)
    return kernels.near_identity(high * direction)


def richardson(
    kernel: Tensor, inverse_kernel: Tensor, probes: Tensor, num_iterations: int
) -> Tensor:
    """u ← u + r ⋆ (v − J u) from u = r ⋆ v, the best of them."""
    current = best = kernels.convolve(probes, inverse_kernel, "zeros")
    least = math.inf
    for _ in range(num_iterations + 1):
        residual = probes - kernels.convolve(current, kernel, "zeros")
        if not residual.norm() < least:
            break
        best, least = current, residual.norm()
        current = current + kernels.convolve(residual, inverse_kernel, "zeros")
    return best


def periodic_gradient(factors: ConvolutionFactors) -> Tensor:
    """``∂ tr(P⁻¹ J)/∂a``, P having a periodic boundary and J zeros beyond the edges."""
    inverse = kernels.flip(factors.inverse_kernel((3, 3)))
    size, device = factors.image_size, inverse.device
    return inverse * kernels.multiplicity((3, 3), size, "zeros", inverse.dtype, device)


def refined_gradient(
    kernel: Tensor,
    factors: ConvolutionFactors,
    gradient: Tensor,
    probes: Tensor,
    num_iterations: int,
) -> Tensor:
    """What :mod:`pyro_snf.log_dets.control_variate_log_det` estimates in a number of iterations.

    :param factors: of the control variate P.
    :param Tensor gradient: ``∂ tr(P⁻¹ J)/∂a``.
    """
    if num_iterations == 0:
        return gradient
    start = factors.solve(probes)
    space = krylov(
        lambda images: kernels.convolve(images, kernel, "zeros"),
        factors.solve,
        probes,
        tolerance=0.0,
        max_steps=num_iterations,
    )
    correction = kernels.kernel_gradient(space.solution - start, probes, (3, 3), "zeros")
    return gradient + correction / len(probes)


def estimates(
    kernel: Tensor, size: tuple[int, int], generator: torch.Generator
) -> dict[tuple[str, int], Tensor]:
    """Every method's gradient, by its name and its number of iterations."""
    signs = torch.randint(0, 2, (NUM_PROBES, len(kernel), *size), generator=generator)
    probes = 2.0 * signs - 1
    found = {}
    for window in WINDOWS:
        inverse = one_pass_kernel(kernel, (window, window), size, "zeros")
        name = f"learned kernel {window} × {window}"
        count = kernels.multiplicity((3, 3), size, "zeros", kernel.dtype, kernel.device)
        found[name, 0] = kernels.resize(kernels.flip(inverse), (3, 3)) * count
        for num_iterations in ITERATIONS[1:]:
            solution = richardson(kernel, inverse, probes, num_iterations)
            gradient = kernels.kernel_gradient(solution, probes, (3, 3), "zeros")
            found[name, num_iterations] = gradient / NUM_PROBES
            space = krylov(
                lambda images: kernels.convolve(images, kernel, "zeros"),
                lambda images, r=inverse: kernels.convolve(images, r, "zeros"),
                probes,
                tolerance=0.0,
                max_steps=num_iterations,
            )
            gradient = kernels.kernel_gradient(space.solution, probes, (3, 3), "zeros")
            found[f"{name}, GMRES", num_iterations] = gradient / NUM_PROBES
    periodic = ConvolutionFactors(kernel, size, "circular")
    earlier = ConvolutionFactors(moved(kernel, size, generator), size, "zeros")
    for num_iterations in ITERATIONS:
        found["refined, periodic", num_iterations] = refined_gradient(
            kernel, periodic, periodic_gradient(periodic), probes, num_iterations
        )
        found["refined, factors", num_iterations] = refined_gradient(
            kernel, earlier, earlier.gradient, probes, num_iterations
        )
    return found


def moved(kernel: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The kernel some steps earlier: as far away as the layer admits."""
    direction = torch.randn(kernel.shape, generator=generator)

    def drift(scale: float) -> float:
        before = kernels.matrix(kernel - scale * direction, size, "zeros")
        change = kernels.matrix(scale * direction, size, "zeros")
        return (torch.linalg.solve(before, change, left=False).norm() / len(change) ** 0.5).item()

    scale = 1e-6
    for _ in range(20):
        scale *= control_variate_log_det._MAX_DRIFT / drift(scale)
    return kernel - scale * direction


def gradient(args: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    tables = {}
    for channels, *size in args.images:
        size = tuple(size)
        errors: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for condition in CONDITIONS:
            for seed in range(args.num_kernels):
                generator = torch.Generator().manual_seed(seed)
                kernel = kernel_of_condition(channels, size, condition, generator)
                exact = ConvolutionFactors(kernel, size, "zeros").gradient
                for key, value in estimates(kernel, size, generator).items():
                    error = ((value - exact).norm() / exact.norm()).item()
                    errors[key][condition].append(error)
        title = f"C = {channels}, {size[0]} × {size[1]}"
        print(f"\n{title}: relative error of the gradient, median of {args.num_kernels} kernels")
        medians = {
            key: [statistics.median(row[condition]) for condition in CONDITIONS]
            for key, row in sorted(errors.items())
        }
        print_table(
            ["method", "iterations", *CONDITIONS],
            ([*key, *(f"{error:.2g}" for error in row)] for key, row in medians.items()),
        )
        tables[title] = medians
    plot(tables).savefig(args.picture, dpi=110)


def plot(tables: dict[str, dict[tuple[str, int], list[float]]]) -> Figure:
    figure = Figure(figsize=(4.5 * len(tables), 4.8), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    shown = {
        ("learned kernel 3 × 3", 0): ("tab:red", "o-"),
        ("learned kernel 7 × 7", 0): ("tab:red", "s--"),
        ("learned kernel 7 × 7", 10): ("tab:orange", "s-"),
        ("refined, periodic", 0): ("tab:blue", "o:"),
        ("refined, periodic", 10): ("tab:blue", "o-"),
        ("refined, factors", 3): ("tab:green", "o-"),
    }
    for axis, (title, medians) in zip(axes, tables.items(), strict=True):
        for (name, num_iterations), (color, style) in shown.items():
            label = f"{name}, {num_iterations} iterations"
            axis.loglog(CONDITIONS, medians[name, num_iterations], style, color=color, label=label)
        axis.axhline(0.05, color="gray", linewidth=0.8)
        axis.text(CONDITIONS[-1], 0.053, "5 %", color="gray", fontsize=9, ha="right")
        axis.set(title=title, xlabel="condition number of J")
    axes[0].set_ylabel("relative error of ∂ log|det J|/∂a")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def singular_value(
    product: Callable[[Tensor], Tensor], shape: tuple[int, ...], num_iterations: int
) -> float:
    """The largest singular value of A, from products with AᵀA."""
    vector = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    for _ in range(num_iterations):
        vector = product(vector / vector.norm())
    return vector.norm().sqrt().item()


def condition_of(kernel: Tensor, size: tuple[int, int]) -> float:
    """By power iteration on J and on its inverse."""
    factors = ConvolutionFactors(kernel, size, "zeros")

    def square(images: Tensor) -> Tensor:
        product = kernels.convolve(images, kernel, "zeros")
        return kernels.convolve_transposed(product, kernel, "zeros")

    def inverse_square(images: Tensor) -> Tensor:
        return factors.solve(factors.solve(images), transposed=True)

    shape = (len(kernel), *size)
    return singular_value(square, shape, 20) * singular_value(inverse_square, shape, 10)


def layer_errors(kernel: Tensor, before: Tensor, size: tuple[int, int]) -> dict[bool, list[float]]:
    """Relative error of the gradient, error of the value, residual, and seconds of an estimate.

    :return: with factors (True), and with a periodic boundary.
    """
    exact, found = ConvolutionFactors(kernel, size, "zeros"), {}
    shape, limit = torch.Size([len(kernel), *size]), convolution._MAX_COST_IN_PRODUCTS
    for has_factors in (True, False):
        convolution._MAX_COST_IN_PRODUCTS = limit if has_factors else 0.0
        part = convolution.Convolution("zeros")
        thetas = [part.theta_of(one).float() for one in (before, kernel)]
        estimator = control_variate_log_det.ControlVariateLogDet(
            part, thetas[0], num_probes=NUM_PROBES, tolerance=0.02, krylov_steps=20, seed=0
        )
        estimator.update(thetas[0], shape, TensorState(thetas[0]))
        start = time.process_time()
        estimate = estimator.update(thetas[1], shape, TensorState(thetas[1]))
        seconds = time.process_time() - start
        error = (estimate.gradient() - exact.gradient).norm() / exact.gradient.norm()
        off = (estimate.value - exact.log_abs_det).abs().item()
        found[has_factors] = [error.item(), off, estimator.error_estimate, seconds]
    convolution._MAX_COST_IN_PRODUCTS = limit
    return found


def layer(args: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    print_header("C", "image", "P", "gradient", "value, nats", "residual", "an estimate, ms")
    for channels, *size in args.images:
        results = defaultdict(list)
        for seed in range(args.num_kernels):
            generator = torch.Generator().manual_seed(seed)
            direction, other = torch.randn(2, channels, channels, 3, 3, generator=generator)
            low, high = 0.0, 0.4
            while condition_of(kernels.near_identity(high * direction), size) < 100:
                low, high = high, 1.25 * high
            for _ in range(6):
                middle = (low + high) / 2
                is_less = condition_of(kernels.near_identity(middle * direction), size) < 100
                low, high = (middle, high) if is_less else (low, middle)
            kernel = kernels.near_identity(high * direction)
            probes = torch.randn(2, channels, *size, generator=generator)
            solution = ConvolutionFactors(kernel, size, "zeros").solve(probes)
            change = kernels.convolve(solution, other, "zeros").norm() / probes.norm()
            before = kernel - 0.045 / change * other
            for has_factors, numbers in layer_errors(kernel, before, size).items():
                results[has_factors].append(numbers)
        for has_factors, rows in results.items():
            error, off, residual, seconds = map(statistics.median, zip(*rows, strict=True))
            name = "factors" if has_factors else "periodic"
            print_row(
                channels,
                f"{size[0]}×{size[1]}",
                name,
                *(f"{error:.3f}", f"{off:.2f}", f"{residual:.3f}", f"{1e3 * seconds:.0f}"),
            )


# --- Time ---------------------------------------------------------------------------------------


def correlated_images(
    num_images: int, channels: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Images with a power-law spectrum, of unit variance."""
    noise = torch.fft.rfft2(torch.randn(num_images, channels, *size, generator=generator))
    rows = torch.fft.fftfreq(size[0]).view(-1, 1)
    columns = torch.fft.rfftfreq(size[1])
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(size))
    images = torch.fft.irfft2(noise / frequency, s=size)
    return images / images.std()


class _Dense(nn.Module):
    """A convolution whose log-determinant is that of its matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.convolve(x, kernels.near_identity(self.theta), "zeros")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        matrix = kernels.matrix(kernels.near_identity(self.theta), size, "zeros")
        return torch.linalg.slogdet(matrix).logabsdet


def make_layer(method: str, channels: int, kernel_size: int) -> nn.Module:
    if method == "conv2d":
        return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
    if method == "dense":
        return _Dense(channels)
    return SelfNormalizingConv2d(channels, kernel_size, log_det=method)


def make_training(method: str, data: Tensor, kernel_size: int, rate: float) -> TimedTraining:
    torch.manual_seed(0)
    channels = data.shape[2]
    layer = make_layer(method, channels, kernel_size).to(data.device)
    # A step on θ at rate·√(C k²) is one on the kernel at the rate.
    factor = 1 if method == "conv2d" else math.sqrt(channels) * kernel_size
    steady = method != "refined"
    forward = forward_of(layer)
    return TimedTraining(forward, layer.parameters(), data, rate * factor, is_steady=steady)


#: The largest D of a dense matrix that is tried.
MAX_DENSE = 3200


def step(args: argparse.Namespace) -> None:
    kernel_size = 3
    print_header("C", "image", *args.methods, "refined / conv2d")
    for channels, height, width in args.images:
        generator = torch.Generator().manual_seed(0)
        count = 4 * args.batch
        images = correlated_images(count, channels, (height, width), generator)
        data = images.view(4, args.batch, channels, height, width).to(args.device)
        dim = channels * height * width
        runs = {
            method: make_training(method, data, kernel_size, args.learning_rate)
            for method in args.methods
            if (method != "dense" or dim <= MAX_DENSE)
            and (method != "exact" or channels * min(height, width) <= 1024)
        }
        take_turns(list(runs.values()), seconds=args.seconds, turns=args.turns)
        times = {method: sum(run.average()[1:3]) for method, run in runs.items()}
        cells = [f"{times[m]:.2f}" if m in times else "–" for m in args.methods]
        ratio = times["refined"] / times["conv2d"]
        print_row(channels, f"{height}×{width}", *cells, f"{ratio:.2f}")


def pointwise_methods(channels: int) -> dict[str, Callable[[], tuple[nn.Module, Callable]]]:
    """Layers of 1 × 1 kernels: a module, and ``x -> (y, log-det)``."""
    import FrEIA.modules
    import nflows.transforms
    import normflows
    from pyro.distributions.transforms import GeneralizedChannelPermute

    def ours(log_det: str) -> tuple[nn.Module, Callable]:
        layer = SelfNormalizingConv2d(channels, 1, log_det=log_det)
        return layer, forward_of(layer)

    def pyro_permute() -> tuple[nn.Module, Callable]:
        layer = GeneralizedChannelPermute(channels)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            layer.clear_cache()
            y = layer(x)
            return y, layer.log_abs_det_jacobian(x, y)

        return layer, forward

    def freia() -> tuple[nn.Module, Callable]:
        # Its 1 × 1 convolution is orthogonal and fixed; the learnable one is of reflections.
        layer = FrEIA.modules.HouseholderPerm([(channels,)], n_reflections=min(16, channels))

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            rows = x.movedim(1, -1).reshape(-1, channels)
            (y,), log_det = layer([rows])
            return y, torch.as_tensor(log_det)

        return layer, forward

    def plain() -> tuple[nn.Module, Callable]:
        layer = nn.Conv2d(channels, channels, 1)
        return layer, forward_of(layer)

    def library(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Callable]]:
        def build() -> tuple[nn.Module, Callable]:
            layer = make()
            return layer, layer

        return build

    return {
        "conv2d": plain,
        "refined": lambda: ours("refined"),
        "exact": lambda: ours("exact"),
        "learned": lambda: ours("learned"),
        "pyro GeneralizedChannelPermute": pyro_permute,
        "nflows OneByOneConvolution": library(
            lambda: nflows.transforms.OneByOneConvolution(channels)
        ),
        "normflows Invertible1x1Conv, LU": library(
            lambda: normflows.flows.Invertible1x1Conv(channels, use_lu=True)
        ),
        "normflows Invertible1x1Conv, W": library(
            lambda: normflows.flows.Invertible1x1Conv(channels)
        ),
        "FrEIA HouseholderPerm, 16": freia,
    }


def pointwise(args: argparse.Namespace) -> None:
    print_header("C", "image", "method", "ms a step", "/ conv2d")
    for channels, height, width in args.images:
        generator = torch.Generator().manual_seed(0)
        data = correlated_images(args.batch, channels, (height, width), generator).unsqueeze(0)
        runs = {}
        for name, make in pointwise_methods(channels).items():
            layer, forward = make()
            runs[name] = TimedTraining(
                forward,
                layer.parameters(),
                data,
                args.learning_rate,
                is_steady=name != "refined",
            )
        take_turns(list(runs.values()), seconds=args.seconds, turns=args.turns)
        times = {name: sum(run.average()[1:3]) for name, run in runs.items()}
        for name, ms in times.items():
            ratio = ms / times["conv2d"]
            print_row(channels, f"{height}×{width}", name, f"{ms:.2f}", f"{ratio:.2f}")


def exact(args: argparse.Namespace) -> None:
    from pyro_snf.maps.convolution_factors import _Dense as DenseFactors
    from pyro_snf.maps.convolution_factors import _Sparse as SparseFactors

    print_header(
        *("C", "image", "D", "value, s", "and gradient, s"),
        *("SciPy splu, value, s", "dense, value, s"),
    )

    def seconds(compute: Callable[[], object], turns: int) -> str:
        found = []
        for _ in range(turns):
            start = time.process_time()
            compute()
            found.append(time.process_time() - start)
        return f"{statistics.median(found):.4f}"

    for channels, height, width in args.images:
        size = (height, width)
        generator = torch.Generator().manual_seed(0)
        theta = 0.3 * torch.randn(channels, channels, 3, 3, generator=generator)
        kernel = kernels.near_identity(theta)
        dim = channels * height * width
        factors = partial(ConvolutionFactors, kernel, size, "zeros")
        value = seconds(lambda make=factors: make().log_abs_det, 5)
        both = seconds(lambda make=factors: make().gradient, 5)
        sparse = seconds(lambda k=kernel, s=size: SparseFactors(k, s).log_abs_det, 3)
        dense = "–"
        if dim <= 4096:
            dense = seconds(lambda k=kernel, s=size: DenseFactors(k, s).log_abs_det, 3)
        print_row(channels, f"{height}×{width}", dim, value, both, sparse, dense)


def image(text: str) -> tuple[int, int, int]:
    """``C,H,W``."""
    channels, height, width = map(int, text.split(","))
    return channels, height, width


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("gradient")
    command.set_defaults(run=gradient)
    command.add_argument("--images", type=image, nargs="+", default=[(1, 28, 28), (4, 14, 14)])
    command.add_argument("--num-kernels", type=int, default=10)
    command.add_argument("--picture", type=Path, default=Path("docs/images/conv_gradient.png"))

    command = commands.add_parser("layer")
    command.set_defaults(run=layer)
    images = [(12, 32, 32), (16, 28, 28), (4, 64, 64), (16, 64, 64), (64, 28, 28)]
    command.add_argument("--images", type=image, nargs="+", default=images)
    command.add_argument("--num-kernels", type=int, default=3)

    sizes = [(c, s, s) for s in (28, 64) for c in (1, 4, 16, 64)]
    for name, run, images in [
        ("step", step, sizes),
        ("pointwise", pointwise, [(4, 28, 28), (16, 28, 28), (64, 14, 14), (256, 8, 8)]),
        ("exact", exact, [(1, 28, 28), (4, 14, 14), (16, 7, 7), (12, 32, 32), (1, 256, 256)]),
    ]:
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--images", type=image, nargs="+", default=images)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        if name != "exact":
            command.add_argument("--batch", type=int, default=128)
            command.add_argument("--learning-rate", type=float, default=1e-3)
            command.add_argument("--seconds", type=float, default=4.0, help="of a method")
            command.add_argument("--turns", type=int, default=6)
        if name == "step":
            command.add_argument("--device", default="cpu")
            command.add_argument(
                "--methods",
                nargs="+",
                default=["conv2d", "refined", "learned", "exact", "dense"],
            )
    args = parser.parse_args(argv)
    if hasattr(args, "threads"):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
