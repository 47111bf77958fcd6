"""Time against dimension: what is measured, that a run goes on, and the picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXACT = 1e-9


@pytest.fixture
def timescaling(benchmark_modules: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("timescaling")
    # It would change the whole process of the tests.
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("timing.MIN_STEPS", 2)
    return module


def test_dimensions_and_images(timescaling: ModuleType) -> None:
    assert (timescaling.DIMS[:3], timescaling.DIMS[-1]) == ((32, 128, 224), 4064)
    for dim in timescaling.DIMS:
        height, width = timescaling.image_size(dim)
        assert height * width == dim
        assert 3 < height <= width <= 4 * height


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_every_log_determinant(timescaling: ModuleType, kind: str) -> None:
    height, width = timescaling.image_size(12)
    shape = (12,) if kind == "dense" else (1, height, width)
    x = torch.randn(2, *shape)
    for method in timescaling.METHODS[1:]:
        layer = timescaling._make_layer(kind, method, 12)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        layer.eval()
        jacobian = torch.autograd.functional.jacobian(lambda row, f=layer: f(row[None])[0], x[0])
        expected = torch.linalg.slogdet(jacobian.reshape(12, 12)).logabsdet
        found = layer.log_abs_det_jacobian(x, layer(x))
        assert torch.allclose(found, expected, rtol=EXACT, atol=EXACT), method


def test_a_run_goes_on_and_is_drawn(
    timescaling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "results.jsonl", tmp_path / "picture.png"
    options = {"seconds": 1e-3, "turns": 2, "batch_size": 4}
    rows = timescaling.run(path, dims=[32, 128], **options)
    expected = [
        (kind, dim, method)
        for kind in timescaling.KINDS
        for dim in (32, 128)
        for method in timescaling.METHODS
    ]
    assert [(row["kind"], row["dim"], row["method"]) for row in rows] == expected
    assert all(row["step_ms"] > 0 and row["adam_ms"] > 0 and row["steps"] > 1 for row in rows)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed as it wrote the last one
    again = timescaling.run(path, dims=[32, 128], **options)
    assert again[:-1] == rows[:-1]
    assert again[-1]["method"] == "slogdet"

    # A method that has taken too long is not run at a larger D.
    rows = timescaling.run(
        path, kinds=["dense"], dims=[32, 128, 224], max_seconds_per_step=0.0, **options
    )
    assert rows == again[:10]
    timescaling.run(path, kinds=["dense"], dims=[224], methods=["plain"], **options)
    rows = timescaling.run(path, dims=[32, 128, 224], max_seconds_per_step=0.0, **options)
    timescaling.plot(rows, picture)
    assert picture.stat().st_size > 1000
    capsys.readouterr()
    timescaling.print_tables(rows)
    tables = capsys.readouterr().out
    assert tables.count("| slogdet |") == 2
    assert "fully connected" in tables
    for name in ("kinds", "methods"):
        with pytest.raises(ValueError, match=f"expected {name} of .*; got none"):
            timescaling.run(path, **{name: ["none"]})


def test_slopes_are_powers(timescaling: ModuleType) -> None:
    points = [(dim, 7 * dim**2.5) for dim in (1024, 2048, 4064)]
    assert timescaling._slope([(512, 1.0), *points]) == pytest.approx(2.5)
    assert timescaling._slope([(512, 1.0), (1024, 2.0)]) is None
