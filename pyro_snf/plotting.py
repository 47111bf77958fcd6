"""Plots for examples and users.

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
    "plot_fields",
    "plot_image_grid",
    "plot_intensity",
    "plot_kernels",
]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))

_ROW_LABEL: dict[str, Any] = {"rotation": "horizontal", "ha": "right", "va": "center"}

# The probability outside a 90 % band, on either side.
_TAIL = 0.05

_MAX_PANELS_IN_A_ROW = 3

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


def plot_intensity(
    positions: Tensor,
    counts: Tensor,
    samples: Mapping[str, Tensor],
    *,
    truth: Tensor | None = None,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Posteriors of an intensity along a line, a panel each, with mean, 90 % band and counts.

    The scale is that of square roots, on which Poisson noise has the same width for all counts.

    >>> counts = torch.tensor([3.0, 5.0, 4.0])
    >>> figure = plot_intensity(
    ...     torch.arange(3.0), counts, {"guide": torch.rand(50, 3)}, xlabel="year", ylabel="events"
    ... )

    :param Tensor positions: of the counts on the line, shape ``(D,)``.
    :param Tensor counts: the data, shape ``(D,)``.
    :param samples: for every label, S posterior samples of the intensity, shape ``(S, D)``.
    :param Tensor truth: the true intensity, shape ``(D,)``, or None.
    :param str xlabel: what the positions are, and their unit.
    :param str ylabel: what the counts are, and their unit.
    :param str title: above the panels.
    :raises ValueError: if there are no samples, and for tensors of other shapes.
    """
    if not samples:
        raise ValueError("expected samples for at least one label; got none")
    line = _values(positions, "positions", ("D",))
    points = _values(counts, "counts", (len(line),))
    true_values = None if truth is None else _values(truth, "truth", (len(line),))
    size = (9.0, 1.9 * len(samples) + 0.8)
    figure, grid = _panels(len(samples), 1, size, title, sharex=True, sharey=True)
    column = grid[:, 0]
    for index, (axes, (label, draws)) in enumerate(zip(column, samples.items(), strict=True)):
        values = _values(draws, f"samples of {label!r}", ("S", len(line)))
        lower, upper = np.quantile(values, [_TAIL, 1 - _TAIL], axis=0)
        color = _COLORS[index % len(_COLORS)]
        axes.fill_between(
            line, lower, upper, color=color, alpha=0.4, linewidth=0, label="90 % band"
        )
        axes.plot(line, values.mean(0), color=color, linewidth=1.0, label="mean")
        if true_values is not None:
            axes.plot(line, true_values, color="black", linewidth=1.0, linestyle=":", label="truth")
        axes.plot(line, points, ".", color="black", markersize=3, label="counts", clip_on=False)
        axes.set_title(label, loc="left", fontsize="medium")
        axes.set_yscale("function", functions=(_square_root, np.square))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(alpha=0.3)
    column[0].legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 0.97))
    column[-1].set_xlabel(xlabel)
    figure.supylabel(f"{ylabel} (square-root scale)", fontsize="medium")
    return figure


def _square_root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(values, 0))  # the margins of a plot can extend below 0


def plot_fields(fields: Mapping[str, Tensor], *, colorbar_label: str, title: str = "") -> Figure:
    """Intensities or counts on a grid side by side, on one scale of colours with a colour bar.

    The colours are linear in the square root of the values, as in :func:`plot_intensity`.

    >>> figure = plot_fields({"truth": torch.rand(4, 4)}, colorbar_label="events per cell")

    :param fields: for every label, values >= 0 on the grid, shape ``(H, W)``; row 0 at the bottom.
    :param str colorbar_label: what the values are, and their unit.
    :param str title: above the panels.
    :raises ValueError: if there are no fields, for tensors of other shapes, and for values below 0.
    """
    from matplotlib.colors import PowerNorm

    if not fields:
        raise ValueError("expected at least one field; got none")
    values = {
        label: _values(field, f"field {label!r}", ("H", "W")) for label, field in fields.items()
    }
    for label, field in values.items():
        if field.min() < 0:
            raise ValueError(f"field {label!r}: expected values >= 0; got {field.min():.3g}")
    columns = min(len(values), _MAX_PANELS_IN_A_ROW)
    rows = math.ceil(len(values) / columns)
    figure, grid = _panels(rows, columns, (2.8 * columns + 0.9, 2.9 * rows + 0.3), title)
    colors = PowerNorm(0.5, vmin=0, vmax=max(field.max() for field in values.values()))
    _show(grid.flat, values.values(), cmap="viridis", norm=colors, origin="lower")
    for axes, label in zip(grid.flat, values, strict=False):
        axes.set_title(label, fontsize="medium")
    figure.colorbar(grid[0, 0].images[0], ax=grid, label=colorbar_label, shrink=0.9)
    return figure


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
