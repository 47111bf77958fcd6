"""Plots show their data, and errors name what has the wrong shape."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO

import pytest
import torch
from matplotlib.figure import Figure

from pyro_snf import plotting


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _differ(first: Figure, second: Figure) -> bool:
    """Whether two pictures of the same kind, but of other data, look different."""
    return _png(first) != _png(second)


def test_curves_show_their_data() -> None:
    def draw(values: list[float], **options: tuple[float, float]) -> Figure:
        curves = {"first": ([0, 1, 2], values), "second": ([0, 2], [1.0, 1.0])}
        return plotting.plot_curves(curves, xlabel="step", ylabel="nats", title="t", **options)

    assert _differ(draw([3.0, 2.0, 1.0]), draw([3.0, 1.0, 1.0]))
    assert draw([3.0, 2.0, 1.0], ylim=(0.0, 2.5)).axes[0].get_ylim() == (0.0, 2.5)
    axes = draw([3.0, 2.0, 1.0]).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "nats", "t")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


def test_image_grid_shows_its_images() -> None:
    images = torch.rand(5, 4, 6)
    figure = plotting.plot_image_grid(images, columns=3, row_labels=["a", "b"], title="t")
    assert len(figure.axes) == 6
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 1, 1, 0]
    assert torch.equal(torch.as_tensor(figure.axes[4].images[0].get_array().data), images[4])
    assert _differ(figure, plotting.plot_image_grid(images.flip(0), columns=3))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_takes_images_with_channels(channels: int) -> None:
    images = 5 * torch.rand(4, channels, 3, 6) - 2
    shown = plotting.plot_image_grid(images, columns=2).axes[3].images[0]
    array = torch.as_tensor(shown.get_array().data)
    if channels == 1:
        assert torch.equal(array, images[3, 0])
    else:
        unit = (images - images.min()) / (images.max() - images.min())
        assert torch.allclose(array, unit[3].permute(1, 2, 0))
    assert _png(plotting.plot_image_grid(torch.zeros(2, channels, 3, 3), columns=2))


def test_kernels_are_shown_in_rows_on_their_own_scales() -> None:
    first, second = torch.randn(3, 3, 3), torch.randn(2, 5, 7)
    figure = plotting.plot_kernels({"w": first, "inverse": second}, title="t")
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 1, 1, 0]
    assert torch.equal(torch.as_tensor(figure.axes[4].images[0].get_array().data), second[1])
    for axes, row in zip(figure.axes[:5], [first] * 3 + [second] * 2, strict=True):
        norm = axes.images[0].norm
        assert norm.vmax == -norm.vmin == row.abs().max().item()
    assert figure.axes[0].get_ylabel() == f"w\n± {first.abs().max():.3g}"
    assert _differ(figure, plotting.plot_kernels({"w": second, "inverse": first}))


def test_losses_are_on_the_scale_of_the_late_ones() -> None:
    losses = [1e6, *[10 - step / 100 for step in range(999)]]
    axes = plotting.plot_losses({"a": losses, "b": [7.0] * 20}).axes[0]
    line = axes.lines[0]
    assert line.get_xdata()[-1] == 1000
    assert line.get_ydata()[-1] == pytest.approx(sum(losses[-5:]) / 5)
    assert axes.get_ylim()[1] < 20
    assert plotting.plot_losses({"a": [float("nan")]}).axes


def test_marginals_of_all_labels_are_in_the_panels_of_the_first() -> None:
    first = {"scale": torch.rand(100), "slopes": torch.randn(100, 2, 1, requires_grad=True)}
    draws = {"guide": first, "NUTS": {"slopes": torch.randn(300, 2, 1), "more": torch.rand(9)}}
    figure = plotting.plot_posterior(draws, title="t")
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in shown] == ["scale", "slopes[0,0]", "slopes[1,0]"]
    assert [len(axes.patches) for axes in shown] == [2, 4, 4]
    heights, edges, _ = shown[1].patches[0].get_data()
    assert 0.97 < (heights * (edges[1] - edges[0])).sum() < 1 + 1e-9
    assert _png(plotting.plot_posterior({"constant": torch.ones(5, 1)}))


def test_pairs_of_numbers() -> None:
    draws = {"data": torch.randn(50, 3), "samples": torch.randn(40, 3)}
    figure = plotting.plot_pairs(draws, title="t")
    grid = [figure.axes[3 * row : 3 * row + 3] for row in range(3)]
    x, y = (grid[2][0].lines[1].get_data()[index] for index in (0, 1))
    assert torch.equal(torch.as_tensor(x), draws["samples"][:, 0])
    assert torch.equal(torch.as_tensor(y), draws["samples"][:, 2])
    assert [axes.get_xlabel() for axes in grid[2]] == ["[0]", "[1]", "[2]"]
    assert grid[1][0].get_ylabel() == "[1]"


def test_densities_are_beside_their_samples() -> None:
    points = torch.rand(50, 2) - 0.5

    def log_density(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.get_default_dtype()
        assert not torch.is_grad_enabled()
        return (x[:, 0] + 100 * x[:, 1]).masked_fill(x[:, 0] > 1, -torch.inf)

    panels = {"samples": points, "p": log_density, "q": lambda x: 1000 + x[:, 0]}
    rows = {"first": panels, "second": panels}
    figure = plotting.plot_densities(rows, limit=2.0, resolution=5, title="t")
    assert [axes.get_title() for axes in figure.axes] == ["samples", "p", "q", "", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["first", "", "", "second", "", ""]
    samples, p, q = figure.axes[:3]
    assert torch.equal(torch.as_tensor(samples.lines[0].get_xydata()), points.double())
    for axes in (samples, p, q):
        assert (axes.get_xlim(), axes.get_ylim()) == ((-2, 2), (-2, 2))
    # The row of y = 2, at the top, has the highest values; those 8 nats below it are all alike.
    shown = torch.as_tensor(p.images[0].get_array().data)
    assert shown[4].tolist() == [198, 199, 200, 201, 193]
    assert (shown[:4] == 193).all()
    assert p.images[0].origin == "lower"
    assert (p.images[0].norm.vmin, p.images[0].norm.vmax) == (193, 201)
    assert (q.images[0].norm.vmin, q.images[0].norm.vmax) == (193, 201)
    assert _differ(figure, plotting.plot_densities({"first": panels, "x": panels}, limit=2.0))


def test_integers_and_float32() -> None:
    assert _png(plotting.plot_image_grid(torch.zeros(2, 3, 3, dtype=torch.uint8), columns=2))
    assert _png(plotting.plot_posterior({"a": {"n": torch.arange(5)}, "b": torch.ones(2).float()}))


def test_matplotlib_is_imported_by_the_first_plot() -> None:
    program = (
        "import sys, torch, pyro_snf.plotting; assert 'matplotlib' not in sys.modules;"
        "pyro_snf.plotting.plot_image_grid(torch.ones(1, 2, 2), columns=1);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


LABELS = {"xlabel": "x", "ylabel": "y"}
THREE = torch.ones(5, 3)
curves = partial(plotting.plot_curves, **LABELS)
grid = partial(plotting.plot_image_grid, columns=2)
densities = partial(plotting.plot_densities, limit=1.0)
P = {"p": lambda x: x.sum(1)}
PANELS = r"rows of as many panels each, at least one; got "


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: curves({}), "at least one curve"),
        (lambda: curves({"a": ([0, 1], [0.0])}), r"curve 'a': expected as many.* got 2 and 1"),
        (lambda: curves({"a": ([], [])}), "at least one; got 0 and 0"),
        (lambda: grid(torch.rand(4, 4)), r"images: expected shape \(N, H, W\); got \(4, 4\)"),
        (lambda: grid(torch.rand(0, 4, 4)), r"images: expected shape .* got \(0, 4, 4\)"),
        (lambda: grid(torch.rand(1, 2, 4, 4)), r"images: .*\(N, 3, H, W\); got \(1, 2, 4,"),
        (lambda: grid(THREE[None], columns=0), "expected columns, an integer >= 1; got 0"),
        (lambda: grid(torch.rand(4, 4, 4), row_labels=["a"]), "2 row_labels, one a row; got 1"),
        (lambda: plotting.plot_kernels({}), "kernels for at least one label"),
        (lambda: plotting.plot_kernels({"w": THREE}), r"kernels of 'w': .*\(N, H, W\); got \(5, 3"),
        (lambda: plotting.plot_losses({}), "losses for at least one label"),
        (lambda: plotting.plot_losses({"a": []}), "at least one of each"),
        (lambda: plotting.plot_posterior({}), "draws for at least one label; got none"),
        (lambda: plotting.plot_posterior({"a": {}}), "draws of 1 to 24 numbers; got 0"),
        (lambda: plotting.plot_posterior({"a": torch.ones(5, 25)}), "1 to 24 numbers; got 25"),
        (lambda: plotting.plot_pairs({"a": torch.ones(5, 9)}), "1 to 8 numbers; got 9"),
        (lambda: plotting.plot_pairs({"a": torch.tensor(1.0)}), r"'a': .* \(N, ...\); got \(\)"),
        (lambda: plotting.plot_pairs({"a": {"s": THREE / 0}}), "'a': expected finite draws of s"),
        (lambda: densities({}), PANELS + r"\[\]"),
        (lambda: densities({"a": {}}), PANELS + r"\[0\]"),
        (lambda: densities({"a": P, "b": {**P, "q": P["p"]}}), PANELS + r"\[1, 2\]"),
        (lambda: densities({"a": {"x": THREE}}), r"samples 'x' of 'a': .*\(N, 2\); got \(5, 3\)"),
        (
            lambda: densities({"a": {"p": lambda x: x}}, resolution=3),
            r"log density 'p' of 'a': expected shape \(9,\); got \(9, 2\)",
        ),
        (lambda: densities({"a": P}, limit=0.0), "expected limit > 0; got 0"),
        (lambda: densities({"a": P}, resolution=1), "expected resolution, an integer >= 2; got 1"),
    ],
)
def test_bad_input_is_named(draw: Callable[[], Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
