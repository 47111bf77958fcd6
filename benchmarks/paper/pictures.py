"""Pictures of a trained flow: samples, reconstructions, and kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import layers_of, layers_with_shapes
from torch import Tensor
from training import Run

from pyro_snf import SelfNormalizingLinear, images, plotting

#: Images, or kernels, in a row of a picture, and rows of samples of each kind.
_COLUMNS, _SAMPLE_ROWS = 12, 2
#: How often the time of sampling is measured.
_NUM_TIMES = 5


def draw(run: Run, folder: Path) -> dict[str, float]:
    """Write the pictures of the evaluated flow.

    :return: how far one-pass inverses are off, in levels of a pixel, and milliseconds for a batch
        of samples; nothing where no layer has a one-pass inverse.
    """
    layers = layers_of(run.evaluated)
    has_one_pass = len(layers) > 0 and all("one_pass" in layer.log_det.inverses for layer in layers)
    methods = ["one_pass", "exact"] if has_one_pass else ["exact"]
    names = [{"one_pass": "one pass", "exact": "true inverse"}[method] for method in methods]
    generator = torch.Generator().manual_seed(run.settings.seed)
    count = _COLUMNS * _SAMPLE_ROWS
    latents = torch.randn(count, run.data.event_shape.numel(), generator=generator)
    latents = latents.to(next(run.evaluated.parameters()))
    shown = run.data.test[:_COLUMNS]
    samples = [decode(run, latents, method) for method in methods]
    again = [decode(run, encode(run, shown), method) for method in methods]
    data = run.data.train[:count]
    labels = ["data", *names]
    figure = plotting.plot_image_grid(
        torch.cat([data, *samples]),
        columns=_COLUMNS,
        row_labels=[label if row == 0 else "" for label in labels for row in range(_SAMPLE_ROWS)],
        title="Data, and samples from the same latents",
    )
    figure.savefig(folder / "samples.png", dpi=150)
    figure = plotting.plot_image_grid(
        torch.cat([shown, *again]),
        columns=_COLUMNS,
        row_labels=["test images", *names],
        title="Test images, to latents and back",
    )
    figure.savefig(folder / "reconstructions.png", dpi=150)
    if not has_one_pass:
        return {}
    figure = plotting.plot_kernels(
        kernel_rows(run),
        title="Weights of layers, and below each those of its approximate inverse:\n"
        "red is positive, blue negative; δ is the identity",
    )
    figure.savefig(folder / "kernels.png", dpi=150)
    found = {
        "one_pass_samples_off_by": _mean_difference(*samples),
        "one_pass_reconstructions_off_by": _mean_difference(shown, again[0]),
        "reconstructions_off_by": _mean_difference(shown, again[1]),
    }
    for method in methods:
        found[f"{method}_ms"] = min(_time(run, latents, method) for _ in range(_NUM_TIMES))
    return found


@contextmanager
def _inverted(flow: Any, method: str) -> Iterator[None]:
    """All layers' inverses are by the same method meanwhile, if they have it."""
    layers = [layer for layer in layers_of(flow) if method in layer.log_det.inverses]
    before = [layer.inverse for layer in layers]
    for layer in layers:
        layer.inverse = method
    flow.clear_cache()
    try:
        yield
    finally:
        for layer, inverse in zip(layers, before, strict=True):
            layer.inverse = inverse
        flow.clear_cache()


@torch.no_grad()
def decode(run: Run, latents: Tensor, method: str) -> Tensor:
    """Integer pixels for latents, by the layers' ``"one_pass"`` or ``"exact"`` inverses.

    A pixel that is NaN, for approximate inverses may diverge, is black.
    """
    run.evaluated.eval()
    with _inverted(run.evaluated, method):
        # A clone, for a latent that comes of an image would find that image again.
        logits = run.evaluated.inv(latents.clone())
    pixels = images.LogitTransform(run.data.num_levels).inv(logits).nan_to_num(0.0)
    return images.quantize(pixels, num_levels=run.data.num_levels).cpu()


@torch.no_grad()
def encode(run: Run, pixels: Tensor) -> Tensor:
    """The latents of images, dequantized by ½."""
    run.evaluated.eval()
    values = pixels.to(next(run.evaluated.parameters())) + 0.5
    return run.evaluated(images.LogitTransform(run.data.num_levels)(values))


@torch.no_grad()
def _time(run: Run, latents: Tensor, method: str) -> float:
    """Milliseconds of an inversion, without what is factorized once for the weights."""
    with _inverted(run.evaluated, method):
        run.evaluated.inv(latents.clone())
        start = time.perf_counter()
        run.evaluated.inv(latents.clone()).sum().item()
        return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def kernel_rows(run: Run) -> dict[str, Tensor]:
    """For each layer W and its approximate inverse R, as rows of small images.

    Of a convolution, the first kernels, and of a dense layer, rows at equal distances, as images;
    both less the identity, which they start from and which would outshine the rest. Of 1 × 1
    convolutions, the matrices.
    """
    rows: dict[str, list[Tensor]] = {}
    for index, (layer, shape) in enumerate(layers_with_shapes(run.evaluated, run.data.event_shape)):
        place = f"layer {index + 1}"
        if isinstance(layer, SelfNormalizingLinear):
            image = run.data.event_shape
            step = max(layer.input_dim // _COLUMNS, 1)
            for name, matrix in [("W", layer.weight), ("R", layer.inverse_weight)]:
                chosen = (matrix - torch.eye(len(matrix)).to(matrix))[step // 2 :: step][:_COLUMNS]
                rows[f"{place}, {name} − I"] = list(chosen.view(-1, *image)[:, 0])
            continue
        size = (shape[1], shape[2])
        for name, kernel in [("w", layer.weight), ("r", layer.inverse_weight(size))]:
            if layer.kernel_size == (1, 1):
                label = f"1 × 1 at {'×'.join(map(str, shape))}, {name.upper()}"
                rows.setdefault(label, []).append(kernel[:, :, 0, 0])
            else:
                height, width = kernel.shape[-2:]
                kernel[:, :, height // 2, width // 2] -= torch.eye(len(kernel)).to(kernel)
                rows[f"{place}, {name} − δ"] = list(kernel.flatten(0, 1)[:_COLUMNS])
    return {label: torch.stack(row[:_COLUMNS]) for label, row in rows.items()}


def _mean_difference(first: Tensor, second: Tensor) -> float:
    """The mean absolute difference of pixels, in levels."""
    return (first.double() - second.double()).abs().mean().item()
