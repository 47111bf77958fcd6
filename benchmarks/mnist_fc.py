"""The paper's fully connected MNIST experiment, for the three ways to get a log-determinant.

784 – SmoothLeakyReLU(0.3) – 784, batch 100, Adam at 1e-4 (on a raw W; on Θ that is 1e-4·√784, see
``pyro_snf.maps.dense``), linear warm-up over 10 epochs, 50,000 / 10,000 / 10,000 images,
λ = 1, start at the identity. The likelihood is of 0–255 pixels, in nats, exact (``eval()``).

For "refined", the value of the log-determinant in training is compared with slogdet in float64
on every step; that is left out of the times.

    python benchmarks/mnist_fc.py --data-dir DIR      (DIR has the IDX files, gzipped or not)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from datasets import load_images
from files import save_json
from torch import Tensor
from tqdm import tqdm

from pyro_snf import Compose, Refined, SelfNormalizingLinear, SmoothLeakyReLU
from pyro_snf.diagnostics import gradient_error, inverse_error, report

LOG_DETS = ("exact", "refined", "learned")
BATCH = 100
WARM_UP_EPOCHS = 10
SQUEEZE = 1e-6


def preprocess(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dequantized, squeezed logits and the log-det of getting there, per image."""
    pixels = images.float()
    pixels = (pixels + torch.rand(pixels.shape, generator=generator)) / 256
    pixels = (pixels + SQUEEZE) * (1 - 2 * SQUEEZE)
    logits = pixels.log() - torch.log1p(-pixels)
    log_slope = -(pixels.log() + torch.log1p(-pixels)) + math.log((1 - 2 * SQUEEZE) / 256)
    return logits, log_slope.sum(-1)


def negative_log_likelihood(density: dist.Distribution, images: Tensor, seed: int) -> float:
    """Exact test NLL of 0–255 pixels in nats, with fixed dequantization noise."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    with torch.no_grad():
        for batch in images.split(1000):
            logits, log_det = preprocess(batch, generator)
            total -= (density.log_prob(logits) + log_det).sum().item()
    return total / len(images)


def make_density(layers: Sequence[SelfNormalizingLinear]) -> tuple[Compose, dist.Distribution]:
    """The flow of two layers, and the density model that it makes."""
    flow = Compose([layers[0], SmoothLeakyReLU(0.3), layers[1]])
    dim = layers[0].input_dim
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    return flow, dist.TransformedDistribution(base, [flow.inv])


def make_optimizer(
    flow: Compose, learning_rate: float, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam at a rate that is meant for raw matrices, and its linear warm-up."""
    matrices = [p for p in flow.parameters() if p.dim() == 2]
    vectors = [p for p in flow.parameters() if p.dim() < 2]
    optimizer = torch.optim.Adam(
        [
            {"params": matrices, "lr": learning_rate * math.sqrt(matrices[0].shape[-1])},
            {"params": vectors, "lr": learning_rate},
        ]
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM_UP_EPOCHS * steps_per_epoch))
    )
    return optimizer, warm_up


def train(log_det: str, args: argparse.Namespace, images: Tensor, test_images: Tensor) -> dict:
    torch.manual_seed(args.seed)
    dim = images.shape[-1]
    method = Refined(num_probes=args.num_probes) if log_det == "refined" else log_det
    layers = [SelfNormalizingLinear(dim, log_det=method) for _ in range(2)]
    flow, density = make_density(layers)
    steps = len(images) // BATCH
    optimizer, warm_up = make_optimizer(flow, args.learning_rate, steps)
    noise = torch.Generator().manual_seed(args.seed)
    value_errors: list[float] = []
    estimates: list[float] = []
    curve = []
    seconds = 0.0
    bar = tqdm(total=args.epochs * steps, desc=log_det, mininterval=5)
    for epoch in range(1, args.epochs + 1):
        flow.train()
        for index in torch.randperm(len(images), generator=noise).split(BATCH):
            logits, _ = preprocess(images[index], noise)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = -density.log_prob(logits).mean()
            loss.backward()
            seconds += time.perf_counter() - start
            if log_det == "refined":
                value_errors.append(training_value_error(layers))
                estimates.append(max(layer.error_estimate for layer in layers))
            start = time.perf_counter()
            optimizer.step()
            seconds += time.perf_counter() - start
            warm_up.step()
            bar.update()
        if epoch % 2 == 0:
            flow.eval()
            curve.append((epoch, negative_log_likelihood(density, test_images, args.seed)))
            bar.set_postfix_str(f"test NLL {curve[-1][1]:.1f}")
    bar.close()
    row = {
        "log_det": log_det,
        "test_nll": curve,
        "ms_per_step": 1e3 * seconds / (args.epochs * steps),
        "inverse_error": max(inverse_error(layer) for layer in layers),
        "gradient_error": max(gradient_error(layer).relative for layer in layers),
    }
    if value_errors:
        errors = np.array(value_errors)
        row |= {
            "value_mean_error": errors.mean(),
            "value_mean_absolute_error": np.abs(errors).mean(),
            "value_largest_error": np.abs(errors).max(),
            "error_estimate_median": float(np.median(estimates)),
            "error_estimate_largest": max(estimates),
            "refactorizations": [layer.num_refactorizations for layer in layers],
        }
    print(report(flow))
    return row


def training_value_error(layers: Sequence[SelfNormalizingLinear]) -> float:
    """Training value of the flow's log|det W|, both layers, less slogdet in float64."""
    error = 0.0
    for layer in layers:
        point = torch.zeros(1, layer.input_dim)
        # The parameters have not changed since the step's own evaluation: R is not updated.
        value = layer.log_abs_det_jacobian(point, point).item()
        error += value - exact_log_abs_det(layer)
    return error


@torch.no_grad()
def exact_log_abs_det(layer: SelfNormalizingLinear) -> float:
    """``log|det W|`` in float64."""
    matrix = layer.log_det.linear_map.weight(layer.theta.double())
    return (torch.linalg.slogdet(matrix).logabsdet + layer.log_scale.double().sum()).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--log-det", nargs="+", choices=LOG_DETS, default=LOG_DETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/mnist_fc.json"))
    args = parser.parse_args(argv)

    data = load_images("mnist", args.data_dir)
    images, test_images = data.train.flatten(1), data.test.flatten(1)
    rows = []
    for log_det in args.log_det:
        rows.append(train(log_det, args, images, test_images))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_json(args.output, rows)

    epochs = [str(epoch) for epoch, _ in rows[0]["test_nll"]]
    print("| log_det | " + " | ".join(f"epoch {e}" for e in epochs) + " | ms a step |")
    print("|---" * (len(epochs) + 2) + "|")
    for row in rows:
        cells = [f"{value:.2f}" for _, value in row["test_nll"]] + [f"{row['ms_per_step']:.1f}"]
        print(f"| {row['log_det']} | " + " | ".join(cells) + " |")
    for row in rows:
        print({key: value for key, value in row.items() if key != "test_nll"})


if __name__ == "__main__":
    main()
