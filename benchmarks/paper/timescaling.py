"""Time of a training step against dimension (the paper's figure).

One fully connected layer, and one 3 × 3 convolution of a single channel; batch 128, and
D = 32 · (1, 4, 7, …, 127). An image of D pixels is as near to a square as D allows: its height is
the largest divisor of D that is at most √D. That is 16×32 for D = 512, but 32×127 for D = 4064.

What is timed is forward, log-determinant and backward, with a gradient to x as inside a flow; Adam
(fused) apart from it. Each layer trains a density model z = T(x) on images with a power-law
spectrum, at the paper's rates: 1e-4 for a matrix, 1e-3 for a kernel. The methods:

- *plain*: ``nn.Linear`` or ``nn.Conv2d``, without a log-determinant: the limit;
- *learned*, *refined*, *exact*: this library's;
- *slogdet*: ``torch.linalg.slogdet`` of the D × D matrix and autograd, of a convolution too. It is
  the paper's "exact".

Times are CPU times of one thread: of a machine that is also used otherwise, no other time means
anything. The methods take turns; the median over turns of the mean over a turn's steps counts, for
*refined* the mean over all steps, for it does some things only now and then.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from conv import correlated_images
from matplotlib.figure import Figure
from results import Row, append, load, print_table, select, slope
from timing import TimedTraining, forward_of, take_turns
from torch import Tensor, nn
from tqdm import tqdm

from pyro_snf import SelfNormalizingConv2d, SelfNormalizingLinear
from pyro_snf.maps.base import LinearMap
from pyro_snf.maps.convolution import Convolution
from pyro_snf.maps.dense import Dense

__all__ = ["DIMS", "KINDS", "METHODS", "image_size", "plot", "print_tables", "run"]

DIMS = tuple(32 * n for n in range(1, 128, 3))
METHODS = ("plain", "learned", "refined", "exact", "slogdet")
#: What the figure calls each kind, and its plain layer.
KINDS = {
    "dense": ("fully connected", "nn.Linear"),
    "conv": ("convolution, 3 × 3, one channel", "nn.Conv2d"),
}
#: The paper's learning rates, of a matrix and of a kernel.
RATES = {"dense": 1e-4, "conv": 1e-3}
#: Different batches of data.
NUM_BATCHES = 8
#: The slope is fitted from here up, where a step is not all overhead.
FIT_FROM = 1024
#: The columns of the tables.
SHOWN_DIMS = (32, 128, 512, 1088, 2048, 3104, 4064)

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def image_size(dim: int) -> tuple[int, int]:
    """(H, W) of the image of D pixels that is nearest to a square, H ≤ W.

    >>> image_size(992)
    (31, 32)
    """
    height = next(h for h in range(math.isqrt(dim), 0, -1) if dim % h == 0)
    return height, dim // height


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as allocators of GPUs do.

    glibc returns every block above 32 MiB to the system when it is freed, and takes a new one from
    it the next time, page by page. (A matrix of float32 is that large from D = 2897 up.) But if a
    hole of that size happens to lie in its heap, it takes that; so the time of a step depends on
    what the process has done before, and jumps from one D to the next. Without glibc, do nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


class _Slogdet(nn.Module):
    """A linear map whose log-determinant is that of its D × D matrix, by autograd.

    :param LinearMap linear_map: the map.
    :param shape: of its parameter.
    """

    def __init__(self, linear_map: LinearMap, shape: Sequence[int]) -> None:
        super().__init__()
        self.linear_map = linear_map
        self.theta = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_map.multiply(self.theta, x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear_map.exact_log_abs_det(self.theta, x.shape[1:])


def _make_layer(kind: str, method: str, dim: int) -> nn.Module:
    if kind == "dense":
        if method == "plain":
            return nn.Linear(dim, dim)
        if method == "slogdet":
            return _Slogdet(Dense(), (dim, dim))
        return SelfNormalizingLinear(dim, log_det=method)
    if method == "plain":
        return nn.Conv2d(1, 1, 3, padding=1)
    if method == "slogdet":
        return _Slogdet(Convolution("zeros"), (1, 1, 3, 3))
    return SelfNormalizingConv2d(1, 3, log_det=method)


def _make_training(kind: str, method: str, data: Tensor, seed: int) -> TimedTraining:
    torch.manual_seed(seed)
    dim = data[0, 0].numel()
    layer = _make_layer(kind, method, dim)
    # The weight is the identity plus θ/√D, or θ/3: a step on θ is that much longer.
    factor = 1 if method == "plain" else math.sqrt(dim) if kind == "dense" else 3
    steady = method != "refined"
    rate = RATES[kind] * factor
    return TimedTraining(forward_of(layer), layer.parameters(), data, rate, is_steady=steady)


def _measure(
    kind: str,
    dim: int,
    methods: Sequence[str],
    *,
    batch_size: int,
    seconds: float,
    turns: int,
    seed: int,
) -> dict[str, Row]:
    """The figures of each method at one size."""
    size = image_size(dim)
    generator = torch.Generator().manual_seed(seed)
    images = correlated_images(NUM_BATCHES * batch_size, 1, size, generator)
    event = (dim,) if kind == "dense" else (1, *size)
    data = images.view(NUM_BATCHES, batch_size, *event)
    runs = [_make_training(kind, method, data, seed) for method in methods]
    take_turns(runs, seconds=seconds, turns=turns)
    found = {}
    for method, one in zip(methods, runs, strict=True):
        times = one.average()
        found[method] = {
            "step_ms": times.step_ms,
            "adam_ms": times.adam_ms,
            "steps": times.num_steps,
            "faults": times.faults,
        }
    return found


def run(
    path: Path,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    dims: Iterable[int] = DIMS,
    methods: Sequence[str] = METHODS,
    batch_size: int = 128,
    seconds: float = 0.3,
    turns: int = 3,
    seed: int = 0,
    max_seconds_per_step: float = 2.0,
    keep_memory: bool = True,
) -> list[Row]:
    """Measure what is not in a file yet, and add it there.

    :param Path path: of JSON lines.
    :param kinds: of :data:`KINDS`.
    :param dims: values of D.
    :param methods: of :data:`METHODS`.
    :param int batch_size: rows of a batch.
    :param float seconds: for a method at a size, about.
    :param int turns: that the methods take at a size.
    :param int seed: of the data and the layers.
    :param float max_seconds_per_step: a method that has taken longer is not run at larger D.
    :param bool keep_memory: whether the process keeps the memory that it frees, from now on (see
        :func:`keep_freed_memory`). ``False`` leaves it as it is.
    :return: a row for each kind, size and method, from the file too.
    :raises ValueError: for kinds and methods that are not of these.
    """
    for name, given, known in (("kinds", kinds, KINDS), ("methods", methods, METHODS)):
        if not set(given) <= set(known):
            raise ValueError(f"expected {name} of {', '.join(known)}; got {', '.join(given)}")
    settings = {
        "batch_size": batch_size,
        "seconds": seconds,
        "turns": turns,
        "seed": seed,
        "keep_memory": keep_memory,
    }
    dims = sorted(dims)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if keep_memory:
        keep_freed_memory()
    try:
        for kind, dim in tqdm([(kind, dim) for kind in kinds for dim in dims]):
            found = select(load(path), kind=kind, **settings)
            too_slow = {
                row["method"]
                for row in found
                if row["dim"] < dim and row["step_ms"] > 1e3 * max_seconds_per_step
            }
            done = {row["method"] for row in select(found, dim=dim)}
            missing = [name for name in methods if name not in too_slow | done]
            rows = _measure(
                kind,
                dim,
                missing,
                batch_size=batch_size,
                seconds=seconds,
                turns=turns,
                seed=seed,
            )
            for method, figures in rows.items():
                key = {"kind": kind, "dim": dim, "method": method}
                append(path, key | settings | figures | {"torch": torch.__version__})
    finally:
        torch.set_num_threads(num_threads)
    return [
        row
        for row in select(load(path), **settings)
        if row["kind"] in kinds and row["dim"] in dims and row["method"] in methods
    ]


def _points(rows: Iterable[Row], kind: str, method: str) -> list[tuple[int, float]]:
    """``(D, milliseconds of a step)``, by D."""
    return sorted((row["dim"], row["step_ms"]) for row in select(rows, kind=kind, method=method))


def _slope(points: Iterable[tuple[int, float]]) -> float | None:
    return slope([point for point in points if point[0] >= FIT_FROM])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of time against dimension, a panel for each kind.

    The end of a curve before the largest D is marked: there, a step took too long.
    """
    kinds = [kind for kind in KINDS if select(rows, kind=kind)]
    figure = Figure(figsize=(6 * len(kinds), 5.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        title, plain = KINDS[kind]
        last = max(row["dim"] for row in select(rows, kind=kind))
        for number, method in enumerate(METHODS):
            points = _points(rows, kind, method)
            if not points:
                continue
            power, (end, milliseconds) = _slope(points), points[-1]
            label = plain if method == "plain" else method
            if power is not None:
                label += f": D^{power:.2f}"
            if end < last:
                label += f", stopped at {milliseconds / 1e3:.1f} s a step"
                axes.plot(end, milliseconds, "x", color=f"C{number}", markersize=10)
            axes.loglog(*zip(*points, strict=True), ".-", color=f"C{number}", label=label)
        axes.set(title=title, xlabel="dimension D")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("forward, log-determinant and backward: ms of CPU time")
    figure.savefig(path, dpi=110)


def print_tables(rows: Sequence[Row]) -> None:
    """Milliseconds of a step and multiples of the plain layer's, at some sizes; slopes."""
    for kind in (kind for kind in KINDS if select(rows, kind=kind)):
        plain = dict(_points(rows, kind, "plain"))
        sizes = sorted({row["dim"] for row in select(rows, kind=kind)})
        sizes = [dim for dim in sizes if dim in SHOWN_DIMS] or sizes
        lines = []
        for method in METHODS:
            points = _points(rows, kind, method)
            cells = {
                dim: f"{ms:.3g}" + (f" ({ms / plain[dim]:.2f})" if dim in plain else "")
                for dim, ms in points
            }
            power = _slope(points)
            name = KINDS[kind][1] if method == "plain" else method
            shown = [cells.get(dim, "–") for dim in sizes]
            lines.append([name, *shown, "–" if power is None else f"{power:.2f}"])
        print(f"\n{KINDS[kind][0]}")
        print_table(["method", *map(str, sizes), f"slope from {FIT_FROM}"], lines)
