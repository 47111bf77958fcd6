"""Plots of draws, losses, densities and images.

Every function returns a new :class:`matplotlib.figure.Figure` without using pyplot's global state:
save it with ``figure.savefig("name.png")``; a notebook displays it. Matplotlib is imported in the
first call. The colours are those of Okabe and Ito, which colour-blind readers can distinguish;
lines differ in their dashes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_snf.options import as_count, as_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_curves",
    "plot_densities",
    "plot_image_grid",
    "plot_kernels",
    "plot_losses",
    "plot_pairs",
    "plot_posterior",
]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))

_ROW_LABEL: dict[str, Any] = {"rotation": "horizontal", "ha": "right", "va": "center"}

# Losses in a curve.
_MAX_POINTS = 200

# Of marginals: the share of draws beyond either end of a panel, and its bins; and what a figure
# has room for.
_TAIL, _NUM_BINS = 0.005, 40
_MAX_MARGINALS, _MARGINALS_IN_A_ROW, _MAX_PAIRED = 24, 4, 8

# Points in a panel of pairs.
_MAX_SHOWN = 2000

# The range of the colours of log densities, in nats below the highest value.
_LOG_DENSITY_RANGE = 8.0


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Curves in one panel, with a legend.

    >>> figure = plot_curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.5])}, xlabel="step", ylabel="nats")

    :param curves: for every label, the positions and the values, of equal length.
    :param str xlabel: what the positions are, and their unit.
    :param str ylabel: what the values are, and their unit.
    :param str title: above the panel.
    :param ylim: the lowest and the highest value to show; None to show all.
    :raises ValueError: if there are no curves, or a curve is empty or has two different lengths.
    """
    if not curves:
        raise ValueError("expected at least one curve; got none")
    figure, ((axes,),) = _panels(1, 1, (7.0, 4.2))
    for index, (label, (positions, values)) in enumerate(curves.items()):
        if len(positions) != len(values) or len(values) == 0:
            raise ValueError(
                f"curve {label!r}: expected as many positions as values, at least one; "
                f"got {len(positions)} and {len(values)}"
            )
        color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
        axes.plot(positions, values, label=label, color=color, linestyle=dashes, linewidth=1.8)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=ylim)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return figure


def plot_image_grid(
    images: Tensor, *, columns: int, row_labels: Sequence[str] = (), title: str = ""
) -> Figure:
    """Images in rows, all on one scale from the lowest to the highest value.

    >>> figure = plot_image_grid(torch.rand(12, 8, 8), columns=6, row_labels=["data", "samples"])

    :param Tensor images: grey, of shape ``(N, H, W)`` or ``(N, 1, H, W)``, or coloured, of shape
        ``(N, 3, H, W)``; row after row.
    :param int columns: the number of images in a row; the last row may have fewer.
    :param row_labels: a label to the left of every row; or none.
    :param str title: above the images.
    :raises ValueError: for images of other shapes, and for another number of labels than of rows.
    """
    if images.dim() == 4 and images.shape[1] == 1:
        images = images.squeeze(1)
    is_grey = images.dim() != 4
    values = _values(images, "images", ("N", "H", "W") if is_grey else ("N", 3, "H", "W"))
    columns = as_count("columns", columns)
    *_, height, width = values.shape
    rows = math.ceil(len(values) / columns)
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"expected {rows} row_labels, one a row; got {len(row_labels)}")
    inches = 0.55  # of one image
    size = (inches * columns + 1.2 * bool(row_labels), inches * rows * height / width + 0.4)
    figure, grid = _panels(rows, columns, size, title)
    low, high = values.min(), values.max()
    if not is_grey:  # imshow does not scale colours
        values = np.moveaxis((values - low) / (high - low or 1.0), 1, -1)
    _show(grid.flat, values, cmap="gray", vmin=low, vmax=high)
    for label, axes in zip(row_labels, grid[:, 0], strict=False):
        axes.set_ylabel(label, **_ROW_LABEL)
    return figure


def plot_kernels(kernels: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Kernels or matrices in rows, positive in red and negative in blue, each row on its own scale.

    >>> rows = {"w": torch.randn(4, 3, 3), "inverse": torch.randn(4, 7, 7)}
    >>> figure = plot_kernels(rows, title="A convolution")

    :param kernels: for every label, a row of N kernels, shape ``(N, H, W)``. The label is to the
        left of the row, with the absolute value of the deepest colours.
    :param str title: above the rows.
    :raises ValueError: if there are no kernels, and for tensors of other shapes.
    """
    if not kernels:
        raise ValueError("expected kernels for at least one label; got none")
    rows = {
        label: _values(tensor, f"kernels of {label!r}", ("N", "H", "W"))
        for label, tensor in kernels.items()
    }
    columns = max(len(row) for row in rows.values())
    inches = 0.7  # of one kernel
    size = (inches * columns + 1.8, inches * len(rows) + 0.4)
    figure, grid = _panels(len(rows), columns, size, title)
    for line, (label, row) in zip(grid, rows.items(), strict=True):
        largest = np.abs(row).max()
        _show(line, row, cmap="RdBu_r", vmin=-largest, vmax=largest)
        line[0].set_ylabel(f"{label}\n± {largest:.3g}", fontsize="small", **_ROW_LABEL)
    return figure


def plot_losses(
    losses: Mapping[str, Sequence[float] | NDArray[np.float64]], *, unit: str = "step"
) -> Figure:
    """Losses of one or more fits, on the scale of the last nine tenths of each.

    Of more than 200 steps, means over groups of them are shown.

    >>> figure = plot_losses({"first fit": [3.0, 2.0, 1.5], "second fit": [4.0, 2.0, 1.0]})

    :param losses: for every label, the loss of every step or epoch, such as ``result.losses``.
    :param str unit: what there is a loss of.
    :raises ValueError: if there are no losses.
    """
    if not losses or any(len(values) == 0 for values in losses.values()):
        raise ValueError("expected losses for at least one label, and at least one of each")
    curves, late = {}, []
    for label, values in losses.items():
        parts = np.array_split(np.asarray(values, dtype=float), min(len(values), _MAX_POINTS))
        ends = np.cumsum([len(part) for part in parts])
        curves[label] = (ends.tolist(), [float(part.mean()) for part in parts])
        late += [part.mean() for part in parts[len(parts) // 10 :]]
    finite = np.asarray(late)[np.isfinite(late)]
    limits = None
    if len(finite):
        margin = 0.05 * (finite.max() - finite.min()) or 1.0
        limits = (float(finite.min() - margin), float(finite.max() + margin))
    return plot_curves(curves, xlabel=unit, ylabel="loss (nats)", ylim=limits)


#: Draws: of each site of a model, shape ``(N, ...)``, or of a vector, shape ``(N, D)``.
Draws = Mapping[str, Tensor] | Tensor


def plot_posterior(draws: Mapping[str, Draws], *, title: str = "") -> Figure:
    """The marginal distributions of draws, a panel for each number, one upon the other.

    >>> guide = {"scale": torch.rand(500), "slopes": torch.randn(500, 2)}
    >>> figure = plot_posterior({"guide": guide, "NUTS": {"slopes": torch.randn(900, 2)}})

    :param draws: for every label, draws of the sites by name, such as
        ``guide.sample_posterior(1000)``, or a tensor. The first label says what is shown; sites
        that others do not have are missing there.
    :param str title: above the panels.
    :raises ValueError: if there are no draws, not finite ones, or more than 24 numbers, of which to
        choose some.
    """
    columns = _columns(draws, _MAX_MARGINALS)
    names = list(next(iter(columns.values())))
    width = min(len(names), _MARGINALS_IN_A_ROW)
    rows = math.ceil(len(names) / width)
    figure, grid = _panels(rows, width, (2.4 * width, 1.9 * rows + 0.4), title)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        _plot_marginals(axes, {label: found.get(name) for label, found in columns.items()})
        axes.set_title(name, fontsize="medium")
    if len(columns) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def plot_pairs(draws: Mapping[str, Draws], *, title: str = "") -> Figure:
    """Draws in every plane of two numbers, one upon the other, with the marginals on the diagonal.

    >>> figure = plot_pairs({"data": torch.randn(300, 3), "samples": torch.randn(300, 3)})

    :param draws: see :func:`plot_posterior`. The first 2,000 draws are shown as points.
    :param str title: above the panels.
    :raises ValueError: likewise, but for more than 8 numbers.
    """
    columns = _columns(draws, _MAX_PAIRED)
    names = list(next(iter(columns.values())))
    limits = {
        name: _limits([found[name] for found in columns.values() if name in found])
        for name in names
    }
    size = 1.6 * len(names) + 0.6
    figure, grid = _panels(len(names), len(names), (size, size), title, sharex="col")
    for row, below in enumerate(names):
        for column, left in enumerate(names):
            axes = grid[row, column]
            if column > row:
                axes.set_axis_off()
                continue
            if column == row:
                _plot_marginals(axes, {label: found.get(left) for label, found in columns.items()})
            else:
                for index, found in enumerate(columns.values()):
                    if left in found and below in found:
                        x, y = found[left][:_MAX_SHOWN], found[below][:_MAX_SHOWN]
                        color = _COLORS[index % len(_COLORS)]
                        axes.plot(x, y, ".", color=color, markersize=2, mew=0, alpha=0.5)
                axes.set_ylim(*limits[below])
            axes.set_xlim(*limits[left])
            if row == len(names) - 1:
                axes.set_xlabel(left)
            if column == 0 and row > 0:
                axes.set_ylabel(below)
            elif column < row:
                axes.set_yticklabels([])
    if len(columns) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _columns(draws: Mapping[str, Draws], most: int) -> dict[str, dict[str, NDArray[np.float64]]]:
    """For every label, every single number's draws by name."""
    if not draws:
        raise ValueError("expected draws for at least one label; got none")
    columns: dict[str, dict[str, NDArray[np.float64]]] = {}
    for label, sites in draws.items():
        named = {"": sites} if isinstance(sites, Tensor) else sites
        columns[label] = {}
        for site, values in named.items():
            if values.dim() == 0 or values.numel() == 0:
                raise ValueError(
                    f"{label!r}: expected draws of shape (N, ...); got {tuple(values.shape)}"
                )
            if not torch.isfinite(values).all():
                raise ValueError(f"{label!r}: expected finite draws of {site or 'all numbers'}")
            table = values.detach().cpu().double().reshape(len(values), -1).numpy()
            places = np.ndindex(tuple(values.shape[1:]))
            for place, column in zip(places, table.T, strict=True):
                index = f"[{','.join(map(str, place))}]" if place else ""
                columns[label][f"{site}{index}"] = column
    count = len(next(iter(columns.values())))
    if not 0 < count <= most:
        raise ValueError(f"expected draws of 1 to {most} numbers; got {count}: choose some of them")
    return columns


def _limits(draws: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Where nearly all draws of a number are."""
    low = min(float(np.quantile(values, _TAIL)) for values in draws)
    high = max(float(np.quantile(values, 1 - _TAIL)) for values in draws)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _plot_marginals(axes: Axes, columns: Mapping[str, NDArray[np.float64] | None]) -> None:
    """Histograms of all labels with the same bins; the outermost draws are left out."""
    shown = {label: values for label, values in columns.items() if values is not None}
    edges = np.linspace(*_limits(list(shown.values())), _NUM_BINS + 1)
    for index, (label, values) in enumerate(columns.items()):
        if values is not None:
            color = _COLORS[index % len(_COLORS)]
            weights = np.full(len(values), 1 / (len(values) * (edges[1] - edges[0])))
            heights, _ = np.histogram(values, edges, weights=weights)
            axes.stairs(heights, edges, color=color, label=label, linewidth=1.3)
            axes.stairs(heights, edges, color=color, alpha=0.15, fill=True)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)


def plot_densities(
    rows: Mapping[str, Mapping[str, Tensor | Callable[[Tensor], Tensor]]],
    *,
    limit: float,
    resolution: int = 120,
    title: str = "",
) -> Figure:
    """Samples and log densities in the plane side by side, in rows.

    The log densities of a row share one scale of colours: 8 nats, down from the highest value of
    the first of them.

    >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    >>> panels = {"samples": base.sample((500,)), "log density": base.log_prob}
    >>> figure = plot_densities({"normal": panels}, limit=3.0)

    :param rows: for the label of every row, its panels, the same number for every row: for the
        label of every panel, samples of shape ``(N, 2)``, or a function from points of shape
        ``(M, 2)``, of torch's default dtype and on the CPU, to log densities of shape ``(M,)``. The
        labels of the first row's panels are shown above them.
    :param float limit: L > 0, for panels that show ``[−L, L]²``.
    :param int resolution: the number of points in a line of the grid, at least 2.
    :param str title: above the rows.
    :raises ValueError: if there are no panels, or not the same number in every row; for tensors of
        other shapes; and for other limits and resolutions.
    """
    limit, resolution = as_positive("limit", limit), as_count("resolution", resolution, 2)
    counts = {len(panels) for panels in rows.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            "expected rows of as many panels each, at least one; "
            f"got {[len(panels) for panels in rows.values()]}"
        )
    columns = counts.pop()
    line = torch.linspace(-limit, limit, resolution)
    points = torch.cartesian_prod(line, line).flip(1)  # row by row, from the lowest
    inches = 1.25  # of one panel
    size = (inches * columns + 0.3, inches * len(rows) + 0.6)
    figure, grid = _panels(len(rows), columns, size, title)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    for row, (row_label, panels) in enumerate(rows.items()):
        highest: float | None = None
        for axes, (label, panel) in zip(grid[row], panels.items(), strict=True):
            name = f"{label!r} of {row_label!r}"
            axes.set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
            axes.set_aspect("equal")
            if row == 0:
                axes.set_title(label, fontsize="small")
            if isinstance(panel, Tensor):
                x, y = _values(panel, f"samples {name}", ("N", 2)).T
                axes.plot(x, y, ".", color=_COLORS[0], markersize=1.2, markeredgewidth=0, alpha=0.7)
                continue
            with torch.no_grad():
                values = _values(panel(points), f"log density {name}", (len(points),))
            if highest is None:
                highest = float(values.max())
            axes.imshow(
                np.maximum(values, highest - _LOG_DENSITY_RANGE).reshape(resolution, resolution),
                cmap="viridis",
                vmin=highest - _LOG_DENSITY_RANGE,
                vmax=highest,
                origin="lower",
                extent=(-limit, limit, -limit, limit),
            )
        grid[row, 0].set_ylabel(row_label, fontsize="small")
    return figure


def _panels(
    rows: int, columns: int, size: tuple[float, float], title: str = "", **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A new figure of a size in inches, and its panels, an array of shape ``(rows, columns)``."""
    from matplotlib.figure import Figure  # here, so that pyro_snf can be imported without it

    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _show(panels: Iterable[Axes], images: Iterable[NDArray[Any]], **options: Any) -> None:
    """Show one image in each panel; the panels beyond the last image stay blank."""
    for axes, image in zip_longest(panels, images):
        if image is None:
            axes.set_axis_off()
        else:
            axes.imshow(image, **options)
            axes.set(xticks=[], yticks=[])


def _values(tensor: Tensor, name: str, shape: tuple[int | str, ...]) -> NDArray[np.float64]:
    """The values of a tensor as an array; a ValueError for another shape.

    :param shape: the expected sizes; a letter means any size from 1.
    """
    fits = tensor.dim() == len(shape) and all(
        size == expected if isinstance(expected, int) else size > 0
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected_shape = ", ".join(map(str, shape))
        raise ValueError(
            f"{name}: expected shape ({expected_shape}{',' * (len(shape) == 1)}); "
            f"got {tuple(tensor.shape)}"
        )
    return tensor.detach().cpu().double().numpy()
