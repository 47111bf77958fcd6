"""MNIST by the paper's nine convolutions: exact, learned and refined log-determinants.

Nine 3 × 3 convolutions, three each at 1×28×28, 4×14×14 and 16×7×7, with an activation after all but
the last (Keller et al. 2021, section 5.2): ``train`` gives the exact test likelihood after some
steps of Adam at 1e-3 (for kernels as they are; for θ that is 1e-3·√(C·9)), batch 100, in nats of
0-255 pixels. All methods see the same images in the same order, with the same noise.

    python benchmarks/mnist_conv.py train --data-dir DIR --activation smooth_leaky_relu
    python benchmarks/mnist_conv.py train --data-dir DIR --activation spline
    python benchmarks/mnist_conv.py train --data-dir DIR --methods learned \\
        --reconstruction-weight 10
    python benchmarks/mnist_conv.py time --data-dir DIR      (ms a step, the methods taking turns)

"dense" in ``time`` is the exact gradient by ``slogdet`` of the three kinds of D × D matrices, D =
784, which is what there is without this library.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pyro.distributions as dist
import torch
from mnist_fc import load_mnist, save_json
from paper.rivals import SlogDet
from torch import Tensor
from tqdm import tqdm

from pyro_snf import Exact, Learned, Refined, SelfNormalizingConv2d, flows
from pyro_snf.images import LogitTransform, dequantize

METHODS = ("exact", "refined", "learned")
ACTIVATIONS = ("smooth_leaky_relu", "spline")
EVENT_SHAPE = (1, 28, 28)
DIM = 784
BATCH = 100
EVALUATE_AT = (250, 500, 750, 1000, 2000, 3000, 4000, 5000)


class Run:
    """One flow in training."""

    def __init__(
        self, method: str, activation: str, learning_rate: float, reconstruction_weight: float = 1.0
    ) -> None:
        torch.manual_seed(0)
        log_det = {
            "dense": SlogDet(),
            "exact": Exact(),
            "refined": Refined(),
            "learned": Learned(reconstruction_weight=reconstruction_weight),
        }[method]
        self.flow = flows.convolutional(EVENT_SHAPE, activation=activation, log_det=log_det)
        self.layers = [part for part in self.flow.parts if isinstance(part, SelfNormalizingConv2d)]
        base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
        self.density = dist.TransformedDistribution(base, [self.flow.inv, LogitTransform().inv])
        groups = []
        for name, parameter in self.flow.named_parameters():
            # A step on θ at rate·√(C k²) is one on the kernel at the rate.
            factor = math.sqrt(parameter[0].numel()) if name.endswith("theta") else 1.0
            groups.append({"params": [parameter], "lr": factor * learning_rate})
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(self, pixels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = -self.density.log_prob(pixels).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def negative_log_likelihood(self, images: Tensor) -> float:
        """Exact, in nats; the noise is the same in every call."""
        self.flow.eval()
        noise = torch.Generator().manual_seed(0)
        total = sum(
            -self.density.log_prob(dequantize(part, generator=noise)).sum().item()
            for part in images.split(1000)
        )
        self.flow.train()
        return total / len(images)

    def value_error(self) -> float:
        """Training value of the flow's log|det J| at the point where it was last asked, less
        the exact one in float64."""
        error = 0.0
        for layer in self.layers:
            image = layer.theta.new_zeros(1, *layer.event_shape)
            value = layer.log_abs_det_jacobian(image, image).item()
            factors = layer.log_det.linear_map.factorize(layer.theta.double(), image.shape[1:])
            scale = image[0, 0].numel() * layer.log_scale.double().sum().item()
            error += value - factors.log_abs_det.item() - scale
        return error


def batches(images: Tensor, seed: int):
    """Dequantized images, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            yield dequantize(images[index], generator=generator)


def load(data_dir: Path) -> tuple[Tensor, Tensor]:
    images, test = (part.view(-1, *EVENT_SHAPE) for part in load_mnist(data_dir))
    return images[:50_000], test


def train(args: argparse.Namespace) -> None:
    images, test = load(args.data_dir)
    rows = []
    for method in args.methods:
        weight = args.reconstruction_weight
        run = Run(method, args.activation, args.learning_rate, weight)
        curve: dict[int, float] = {}
        errors: list[float] = []
        start = time.perf_counter()
        seconds = 0.0
        with tqdm(total=args.num_steps, desc=method, mininterval=10) as bar:
            for step, pixels in enumerate(batches(images, args.seed), start=1):
                start = time.perf_counter()
                try:
                    run.step(pixels)
                except (torch.linalg.LinAlgError, ValueError) as error:
                    bar.write(f"{method}: step {step}: {str(error).splitlines()[-1][-200:]}")
                    break
                seconds += time.perf_counter() - start
                bar.update()
                if method == "refined" and step % 50 == 0:
                    # Of the next step's value, whose probes are then drawn already.
                    errors.append(run.value_error())
                if step in EVALUATE_AT:
                    try:
                        curve[step] = run.negative_log_likelihood(test)
                    except torch.linalg.LinAlgError as error:
                        bar.write(f"{method}: step {step}: {error}")
                        curve[step] = math.nan
                    bar.set_postfix_str(f"test NLL {curve[step]:.1f}")
                if step == args.num_steps:
                    break
        row = {
            "method": method,
            "reconstruction_weight": weight,
            "test_nll": curve,
            "ms": 1e3 * seconds / step,
        }
        if errors:
            row["value_error_mean"] = statistics.fmean(errors)
            row["value_error_rms"] = math.sqrt(statistics.fmean(e * e for e in errors))
            row["value_error_largest"] = max(map(abs, errors))
            row["refactorizations"] = [layer.num_refactorizations for layer in run.layers]
        rows.append(row)
        args.output.mkdir(parents=True, exist_ok=True)
        name = f"mnist_conv_{args.activation}_{'_'.join(args.methods)}.json"
        save_json(args.output / name, rows)

    steps = [step for step in EVALUATE_AT if step <= args.num_steps]
    print("| method | " + " | ".join(map(str, steps)) + " | ms a step |")
    print("|---" * (len(steps) + 2) + "|")
    for row in rows:
        cells = [f"{row['test_nll'].get(step, math.nan):.1f}" for step in steps]
        print(f"| {row['method']} | " + " | ".join(cells) + f" | {row['ms']:.1f} |")
    for row in rows:
        print({key: value for key, value in row.items() if key != "test_nll"})


def compare_times(args: argparse.Namespace) -> None:
    images, _ = load(args.data_dir)
    print("| activation | method | ms a step | dense / it |")
    print("|---|---|---|---|")
    for activation in ACTIVATIONS:
        runs = {
            method: Run(method, activation, args.learning_rate) for method in ("dense", *METHODS)
        }
        # The kernels are to be somewhere on their way.
        for method, run in runs.items():
            data = batches(images, args.seed)
            for _ in range(200 if method in ("refined", "learned") else 3):
                run.step(next(data))
        times: dict[str, list[float]] = {method: [] for method in runs}
        for _ in range(args.turns):
            for method, run in runs.items():
                count = 20 if method == "refined" else 5
                turn = [next(data) for _ in range(count)]
                start = time.perf_counter()
                for pixels in turn:
                    run.step(pixels)
                times[method].append(1e3 * (time.perf_counter() - start) / count)
        limit = statistics.median(times["dense"])
        for method, turns in times.items():
            average = statistics.fmean if method == "refined" else statistics.median
            ms = average(turns)
            print(f"| {activation} | {method} | {ms:.1f} | {limit / ms:.1f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run in [("train", train), ("time", compare_times)]:
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--data-dir", type=Path, required=True)
        command.add_argument("--learning-rate", type=float, default=1e-3)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        if name == "train":
            command.add_argument("--activation", choices=ACTIVATIONS, default=ACTIVATIONS[0])
            command.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
            command.add_argument("--reconstruction-weight", type=float, default=1.0)
            command.add_argument("--num-steps", type=int, default=5000)
            command.add_argument("--output", type=Path, default=Path("outputs"))
        else:
            command.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
