"""What does one dense layer cost? A training step and an inverse, against every peer.

Each method trains a density model z = T(x) by Adam: forward, log-determinant and backward are
timed (the gradient goes to x too, as inside a flow), and Adam (fused) apart from it. The methods
take turns of some steps in one process; a turn's figure is the mean over its steps, and the table's
the median over turns. Only for ``refined`` it is the mean over all steps, for it does some things
only now and then, and they must be counted. Peak memory is what one step allocates at most at a
time. ``nn.Linear`` has no log-determinant: it is the limit.

The data are correlated Gaussian vectors, for which Adam's steps are mostly noise; or, with
``--data-dir``, images of MNIST, resized to D pixels, dequantized, as logits.

    python benchmarks/linear.py                                (the whole table: half an hour)
    python benchmarks/linear.py --dims 1024 --batches 128      (a part of it)
    python benchmarks/linear.py --data-dir DIR --methods nn.Linear refined slogdet
    python benchmarks/linear.py --device cuda --dims 1024 4096 16384

Needs ``pip install -e .[benchmarks]``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import FrEIA.modules
import matplotlib.pyplot as plt
import nflows.transforms
import normflows
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko.transforms
from datasets import load_images
from files import save_json
from pyro.distributions import constraints
from results import print_table, select, slope
from timing import Forward, TimedTraining, forward_of, take_turns
from torch import Tensor, nn
from torch.distributions import transform_to
from tqdm import tqdm

from pyro_snf import SelfNormalizingLinear
from pyro_snf.images import LogitTransform, dequantize, quantize

DIMS = (64, 128, 256, 512, 784, 1024, 2048, 4096)
BATCHES = (1, 32, 128, 512)
#: Its steps are not all alike: the mean counts.
AMORTIZED = "refined"
#: Reflections of the peers that are products of them. D of them would be the full family, at D
#: passes in Python: seconds a step from D = 1024 up.
REFLECTIONS = 16
#: The exponent of the time in D is fitted from here up, where a step is not all overhead.
FIT_FROM = 1024


@dataclass
class Method:
    """A trainable map, seen by its two directions."""

    parameters: list[Tensor]
    forward: Forward
    inverse: Callable[[Tensor], Tensor] | None = None
    #: The state that a step's inverse is measured in, not its training.
    evaluate: Callable[[bool], object] = lambda training: None


def plain(dim: int) -> Method:
    layer = nn.Linear(dim, dim)
    return Method(list(layer.parameters()), forward_of(layer))


def slogdet(dim: int) -> Method:
    layer = nn.Linear(dim, dim)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(dim))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), torch.linalg.slogdet(layer.weight).logabsdet

    def inverse(z: Tensor) -> Tensor:
        return torch.linalg.solve(layer.weight, (z - layer.bias).mT).mT

    return Method(list(layer.parameters()), forward, inverse)


class _RelativeGradient(torch.autograd.Function):
    """z = xWᵀ, whose gradient in W is that of loss − log|det W|, times WᵀW from the right."""

    @staticmethod
    def forward(ctx, x, weight):
        z = x @ weight.mT
        ctx.save_for_backward(weight, z)
        return z

    @staticmethod
    def backward(ctx, gradient):
        weight, z = ctx.saved_tensors
        return gradient @ weight, torch.addmm(weight, gradient.mT, z @ weight, beta=-1)


def relative_gradient(dim: int) -> Method:
    """Gresele et al. 2020: no log-determinant, but the natural gradient's direction."""
    weight = nn.Parameter(torch.eye(dim))
    return Method([weight], lambda x: (_RelativeGradient.apply(x, weight), None))


def self_normalizing(log_det: str) -> Callable[[int], Method]:
    def make(dim: int) -> Method:
        layer = SelfNormalizingLinear(dim, log_det=log_det)
        return Method(list(layer.parameters()), forward_of(layer), layer.inv, layer.train)

    return make


def of_library(make_layer: Callable[[int], nn.Module]) -> Callable[[int], Method]:
    """A layer of nflows or normflows: ``forward`` and ``inverse`` give value and log-det."""

    def make(dim: int) -> Method:
        layer = make_layer(dim)
        return Method(list(layer.parameters()), layer, lambda z: layer.inverse(z)[0], layer.train)

    return make


def normflows_lu_permute(dim: int) -> Method:
    layer = normflows.flows.LULinearPermute(dim)  # its ``inverse`` is the cheap direction
    return Method(list(layer.parameters()), layer.inverse, lambda z: layer(z)[0], layer.train)


def zuko_lu(dim: int) -> Method:
    factors = nn.Parameter(torch.eye(dim))

    def transform() -> zuko.transforms.LULinearTransform:
        return zuko.transforms.LULinearTransform(factors)

    return Method([factors], lambda x: transform().call_and_ladj(x), lambda z: transform().inv(z))


def of_pyro(
    make_layer: Callable[[int], nn.Module], *, image: bool = False
) -> Callable[[int], Method]:
    """A transform of Pyro; ``image`` if it takes vectors as the channels of 1×1 images."""

    def make(dim: int) -> Method:
        layer = make_layer(dim)

        def shaped(x: Tensor) -> Tensor:
            return x[..., None, None] if image else x

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            x = shaped(x)
            z = layer._call(x)
            return z, layer.log_abs_det_jacobian(x, z)

        return Method(list(layer.parameters()), forward, lambda z: layer._inverse(shaped(z)))

    return make


def pyro_cholesky(dim: int) -> Method:
    """LowerCholeskyAffine with the parameters and constraints of AutoMultivariateNormal."""
    loc = nn.Parameter(torch.zeros(dim))
    scale = nn.Parameter(torch.zeros(dim))
    tril = nn.Parameter(torch.zeros(dim, dim))

    def transform() -> pyro_transforms.LowerCholeskyAffine:
        unit_tril = transform_to(constraints.unit_lower_cholesky)(tril)
        scales = transform_to(constraints.softplus_positive)(scale)
        return pyro_transforms.LowerCholeskyAffine(loc, scales[..., None] * unit_tril)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        layer = transform()
        z = layer(x)
        return z, layer.log_abs_det_jacobian(x, z)

    return Method([loc, scale, tril], forward, lambda z: transform().inv(z))


def freia_householder(dim: int) -> Method:
    layer = FrEIA.modules.HouseholderPerm([(dim,)], n_reflections=REFLECTIONS)

    def forward(x: Tensor) -> tuple[Tensor, None]:
        return layer([x])[0][0], None  # orthogonal: its log-determinant is 0

    return Method([layer.Vs], forward, lambda z: layer([z], rev=True)[0][0])


@dataclass(frozen=True)
class Entry:
    """A row of the tables."""

    #: The matrices that the parameters reach, up to their signs or order.
    family: str
    make: Callable[[int], Method]
    #: Left out above this dimension, which would take minutes a step.
    max_dim: int = 10**9
    #: Whether a step takes memory for a D×D matrix a row; left out above 2 GiB of that.
    matrix_a_row: bool = False


METHODS = {
    "nn.Linear": Entry("all, no log-det", plain),
    "refined": Entry("all", self_normalizing("refined")),
    "learned": Entry("all", self_normalizing("learned")),
    "exact": Entry("all", self_normalizing("exact")),
    "slogdet": Entry("all", slogdet),
    "relative gradient": Entry("all, no value", relative_gradient),
    "nflows NaiveLinear": Entry("all", of_library(nflows.transforms.NaiveLinear)),
    "nflows LULinear": Entry("LU", of_library(nflows.transforms.LULinear)),
    "nflows QRLinear": Entry(
        "QR", of_library(lambda dim: nflows.transforms.QRLinear(dim, dim)), max_dim=512
    ),
    f"nflows QRLinear, {REFLECTIONS}": Entry(
        "part of QR", of_library(lambda dim: nflows.transforms.QRLinear(dim, REFLECTIONS))
    ),
    f"nflows SVDLinear, {REFLECTIONS}": Entry(
        "part of SVD", of_library(lambda dim: nflows.transforms.SVDLinear(dim, REFLECTIONS))
    ),
    "normflows InvertibleAffine W": Entry(
        "all", of_library(lambda dim: normflows.flows.InvertibleAffine(dim, use_lu=False))
    ),
    "normflows InvertibleAffine LU": Entry("LU", of_library(normflows.flows.InvertibleAffine)),
    "normflows LULinearPermute": Entry("LU", normflows_lu_permute),
    "zuko LULinearTransform": Entry("LU", zuko_lu),
    "pyro MatrixExponential": Entry("exponentials", of_pyro(pyro_transforms.MatrixExponential)),
    "pyro LowerCholeskyAffine": Entry("triangular", pyro_cholesky),
    "pyro GeneralizedChannelPermute": Entry(
        "LU", of_pyro(pyro_transforms.GeneralizedChannelPermute, image=True), matrix_a_row=True
    ),
    f"pyro Householder, {REFLECTIONS}": Entry(
        "orthogonal", of_pyro(lambda dim: pyro_transforms.Householder(dim, REFLECTIONS))
    ),
    f"FrEIA HouseholderPerm, {REFLECTIONS}": Entry("orthogonal", freia_householder),
}


def correlated(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows with a power-law spectrum, as images have, of unit variance; shape (count, dim)."""
    noise = torch.fft.rfft(torch.randn(count, dim, generator=generator))
    rows = torch.fft.irfft(noise / torch.arange(1, noise.shape[-1] + 1).sqrt(), n=dim)
    return rows / rows.std()


def images(directory: Path, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Images of MNIST with D pixels, as logits; shape (count, dim)."""
    height = next(h for h in range(math.isqrt(dim), 0, -1) if dim % h == 0)
    pixels = load_images("mnist", directory).train
    pixels = pixels[torch.randint(len(pixels), (count,), generator=generator)]
    pixels = nn.functional.interpolate(
        pixels.float(), size=(height, dim // height), mode="bilinear"
    )
    integers = quantize(pixels.view(count, dim))
    return LogitTransform(event_dim=1)(dequantize(integers, generator=generator))


_COLORS = ["C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9"]  # all but red and grey
#: In the picture, and their names there.
SHOWN = {
    "nn.Linear": "nn.Linear, no log-det",
    "refined": "refined",
    "slogdet": "slogdet, autograd",
    "normflows InvertibleAffine LU": "normflows LU",
    "nflows LULinear": "nflows LU",
    "zuko LULinearTransform": "zuko LU",
    "pyro MatrixExponential": "pyro exponential",
    "pyro LowerCholeskyAffine": "pyro Cholesky (triangular)",
}


class Run(TimedTraining):
    """The training of one method, and its inverse."""

    def __init__(self, name: str, data: Tensor, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.name = name
        with torch.device(data.device):
            self.method = METHODS[name].make(data.shape[-1])
        super().__init__(
            self.method.forward,
            self.method.parameters,
            data,
            args.learning_rate,
            is_steady=name != AMORTIZED,
            input_gradient=args.input_gradient,
        )
        self.inverse_ms: list[float] = []

    def peak_bytes(self) -> int:
        """What one step allocates at most at a time, gradients included."""
        self.optimizer.zero_grad()
        if self.data.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.forward_backward()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with torch.profiler.profile(profile_memory=True) as profile:
                self.forward_backward()
            held = peak = 0
            for size in _allocations(profile):
                held += size
                peak = max(peak, held)
        self.optimizer.step()
        return peak

    def can_invert(self, z: Tensor) -> bool:
        """Whether there is an inverse that runs: nflows has some that call what torch removed."""
        if self.method.inverse is None:
            return False
        try:
            with torch.no_grad():
                self.method.inverse(z)
        except RuntimeError as error:
            tqdm.write(f"{self.name}: no inverse ({str(error).splitlines()[0]})")
            return False
        self.turn(1)  # new weights, for the first inverse by them
        return True

    def time_inverse(self, z: Tensor) -> None:
        """One inverse of a fresh batch, by weights that have been used for an inverse before."""
        self.method.evaluate(False)
        with torch.no_grad():
            start = self.clock.mark()
            self.method.inverse(z)
            self.inverse_ms.append(self.clock.milliseconds(start, self.clock.mark()))
        self.method.evaluate(True)


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative), in the order of time."""
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    found = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    return [size for _, size in sorted(found)]


def residual(run: Run, z: Tensor) -> float:
    """‖T(T⁻¹(z)) − z‖/‖z‖ of the inverse that is timed."""
    run.method.evaluate(False)
    with torch.no_grad():
        back = run.method.forward(run.method.inverse(z).reshape(z.shape))[0].reshape(z.shape)
    run.method.evaluate(True)
    return ((back - z).norm() / z.norm()).item()


def measure(dim: int, batch: int, args: argparse.Namespace) -> list[dict]:
    """One row for each method, at one size."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    count = args.pool * batch
    if args.data_dir is None:
        data = correlated(count, dim, generator)
    else:
        data = images(args.data_dir, count, dim, generator)
    data = data.view(args.pool, batch, dim).to(device)
    names = [
        name
        for name in args.methods
        if dim <= METHODS[name].max_dim
        and not (METHODS[name].matrix_a_row and 4 * batch * dim**2 > 2**31)
    ]
    runs = [Run(name, data, args) for name in names]
    take_turns(runs, seconds=args.seconds, turns=args.turns, max_steps=args.max_steps)
    rows = []
    for run in runs:
        times = run.average()
        row = {
            "method": run.name,
            "family": METHODS[run.name].family,
            "dim": dim,
            "batch": batch,
            "steps": times.num_steps,
            "step_ms": times.step_ms,
            "adam_ms": times.adam_ms,
            "peak_matrices": run.peak_bytes() / (4 * dim**2),
        }
        rows.append(row)
    if batch == args.inverse_batch:
        z = torch.randn(batch, dim, generator=generator).to(device)
        inverses = [run for run in runs if run.can_invert(z)]
        for number in range(args.turns + 2):
            z = torch.randn(batch, dim, generator=generator).to(device)
            for run in inverses:
                if number > 2 and run.inverse_ms[-1] > 2000:
                    continue
                run.time_inverse(z)
                if number == 1:  # the first was by new weights; the second may still prepare
                    first = run.inverse_ms[0]
                    run.inverse_ms.clear()
                    rows[runs.index(run)] |= {"inverse_first_ms": first}
        for run in inverses:
            rows[runs.index(run)] |= {
                "inverse_ms": statistics.median(run.inverse_ms),
                "inverse_residual": residual(run, z),
            }
    plain_rows = {row["method"]: row for row in rows}
    limit = plain_rows.get("nn.Linear")
    for row in rows:
        row["ratio"] = row["step_ms"] / limit["step_ms"] if limit else math.nan
    return rows


def exponent(rows: list[dict], method: str, batch: int) -> float | None:
    """The slope of log(time) against log(D), from FIT_FROM up."""
    found = select(rows, method=method, batch=batch)
    return slope([(row["dim"], row["step_ms"]) for row in found if row["dim"] >= FIT_FROM])


def print_tables(rows: list[dict], args: argparse.Namespace) -> None:
    batches = sorted({row["batch"] for row in rows})
    dims = sorted({row["dim"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["batch"], row["dim"]): row for row in rows}

    def table(title: str, head: list[str], cells: Callable[[str], list[str]]) -> None:
        print(f"\n{title}")
        print_table(["method", *head], ([name, *cells(name)] for name in names))

    for batch in batches:

        def of(name: str, show: Callable[[dict], str], batch: int = batch) -> list[str]:
            return [
                show(found[name, batch, dim]) if (name, batch, dim) in found else "–"
                for dim in dims
            ]

        def times(name: str, batch: int = batch) -> list[str]:
            power = exponent(rows, name, batch)
            cells = of(name, lambda row: f"{row['step_ms']:.3g} ({row['ratio']:.2f})")
            return [*cells, "–" if power is None else f"{power:.2f}"]

        table(
            f"Forward, log-det and backward, batch {batch}: ms (ratio to nn.Linear)",
            [*map(str, dims), f"exponent from {FIT_FROM}"],
            times,
        )
        table(
            f"The same with Adam (fused), batch {batch}: ms",
            list(map(str, dims)),
            lambda name: of(name, lambda row: f"{row['step_ms'] + row['adam_ms']:.3g}"),
        )
        table(
            f"Peak memory of a step, batch {batch}: in units of W (4 D² bytes)",
            list(map(str, dims)),
            lambda name: of(name, lambda row: f"{row['peak_matrices']:.2f}"),
        )
        if batch == args.inverse_batch:
            table(
                f"Inverse, batch {batch}: ms for the first by new weights / for the next ones",
                list(map(str, dims)),
                lambda name: of(
                    name,
                    lambda row: (
                        f"{row['inverse_first_ms']:.3g} / {row['inverse_ms']:.3g}"
                        if "inverse_ms" in row
                        else "–"
                    ),
                ),
            )


def plot(rows: list[dict], batch: int, path: Path) -> None:
    """Methods that can represent all matrices, or half of them; each named at its end."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, label) in enumerate(SHOWN.items()):
        points = [(row["dim"], row["step_ms"]) for row in select(rows, method=name, batch=batch)]
        if not points:
            continue
        is_ours = name in ("refined", "nn.Linear")
        color = {"refined": "tab:red", "nn.Linear": "black"}.get(name, _COLORS[number])
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            linewidth=2.5 if is_ours else 1.2,
            color=color,
        )
        x, y = points[-1]
        above = {"refined": 1.12, "nn.Linear": 0.85}.get(name, 1.0)
        axes.text(1.07 * x, above * y, label, color=color, va="center", fontsize=9)
    axes.loglog()
    low, high = axes.get_xlim()
    axes.set_xlim(low, 4.5 * high)  # room for the names
    axes.set_xlabel("dimension D")
    axes.set_ylabel("forward, log-det and backward (ms)")
    axes.set_title(f"A training step of one dense layer, batch {batch}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", nargs="+", type=int, default=DIMS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-dir", type=Path, help="with the IDX files of MNIST, gzipped")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a method at a size, about")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-steps", type=int, default=100, help="of a turn")
    parser.add_argument("--pool", type=int, default=32, help="different batches of data")
    parser.add_argument("--inverse-batch", type=int, default=128)
    parser.add_argument(
        "--no-input-gradient", dest="input_gradient", action="store_false", help="a first layer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/linear"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    rows: list[dict] = []
    sizes = [(dim, batch) for batch in args.batches for dim in args.dims]
    bar = tqdm(sizes)
    for dim, batch in bar:
        bar.set_description(f"D = {dim}, batch {batch}")
        rows.extend(measure(dim, batch, args))
        save_json(args.output / "result.json", rows)
    for batch in args.batches:
        plot(rows, batch, args.output / f"batch{batch}.png")
    print_tables(rows, args)


if __name__ == "__main__":
    main()
