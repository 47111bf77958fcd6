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


def test_intensity_has_a_panel_for_each_posterior() -> None:
    positions, counts = torch.arange(4.0), torch.tensor([1, 0, 2, 5])
    samples = {"first": torch.rand(20, 4), "second": torch.rand(30, 4, requires_grad=True)}

    def draw(truth: torch.Tensor | None) -> Figure:
        return plotting.plot_intensity(
            positions, counts, samples, truth=truth, xlabel="year", ylabel="events", title="t"
        )

    assert [axes.get_title("left") for axes in draw(None).axes] == ["first", "second"]
    assert _differ(draw(None), draw(torch.ones(4)))


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_fields_share_one_colour_scale(number: int) -> None:
    fields = {f"field {index}": index + torch.rand(3, 3) for index in range(number)}
    figure = plotting.plot_fields(fields, colorbar_label="events", title="t")
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    highest = max(field.max().item() for field in fields.values())
    assert len(shown) == number
    assert {image.norm.vmax for image in shown} == {highest}
    assert _png(figure)


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
    assert _png(plotting.plot_fields({"a": torch.ones(2, 2).float()}, colorbar_label="events"))


def test_matplotlib_is_imported_by_the_first_plot() -> None:
    program = (
        "import sys, torch, pyro_snf.plotting; assert 'matplotlib' not in sys.modules;"
        "pyro_snf.plotting.plot_image_grid(torch.ones(1, 2, 2), columns=1);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


LABELS = {"xlabel": "x", "ylabel": "y"}
LINE, THREE = torch.arange(3.0), torch.ones(5, 3)
curves = partial(plotting.plot_curves, **LABELS)
grid = partial(plotting.plot_image_grid, columns=2)
intensity = partial(plotting.plot_intensity, **LABELS)
fields = partial(plotting.plot_fields, colorbar_label="events")
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
        (lambda: intensity(LINE, LINE, {}), "samples for at least one label"),
        (
            lambda: intensity(LINE[:, None], LINE, {"a": THREE}),
            r"positions: .*\(D,\); got \(3, 1\)",
        ),
        (lambda: intensity(LINE, LINE[:2], {"a": THREE}), r"counts: .* \(3,\); got \(2,\)"),
        (lambda: intensity(LINE, LINE, {"a": LINE}), r"samples of 'a': .*\(S, 3\); got \(3,\)"),
        (
            lambda: intensity(LINE, LINE, {"a": THREE}, truth=torch.ones(4)),
            r"truth: expected shape \(3,\); got \(4,\)",
        ),
        (lambda: fields({}), "at least one field"),
        (lambda: fields({"a": LINE}), r"field 'a': expected shape \(H, W\); got \(3,\)"),
        (lambda: fields({"a": -THREE}), "field 'a': expected values >= 0; got -1"),
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
