"""Whether a long run of the refined layer stays as accurate, as fast and as small as it starts.

A dense layer (D = 256 by default, float32) is fitted by Adam, at a constant rate, to fresh draws of
a mixture of correlated Gaussians: the noise of the gradients never ends, so that W moves at every
one of the 50,000 steps. A row of the table tells, of the 1,000 steps before it,

- the largest error of the value of log|det W| that training reported, against slogdet in float64;
  it is measured at every tenth step, at the step itself, in nats;
- ‖I − RW‖_F/√D and the relative error of the gradient of log|det W|, exactly, at the last step;
- how often R has been refactorized, and the loss;
- milliseconds of processor time of a step, without the measurements (the machine may be shared),
  and the resident memory of the process.

    OMP_NUM_THREADS=1 python benchmarks/long_run.py

Rows are appended to a file as they come, JSON lines. Resident memory is read from /proc: Linux.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pyro.distributions as dist
import torch
from results import append, number, print_table
from torch import Tensor

from pyro_snf import SelfNormalizingLinear
from pyro_snf.diagnostics import gradient_error, inverse_error

#: Steps from one measurement of the value's error to the next.
MEASURE_EVERY = 10

NUM_COMPONENTS = 8


class Mixture:
    """Of Gaussians with random means, and covariances whose condition number is 10⁴ and more."""

    def __init__(self, dim: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(NUM_COMPONENTS, dim, generator=self.generator)
        scales = torch.logspace(-1, 1, dim)
        noise = torch.randn(NUM_COMPONENTS, dim, dim, generator=self.generator)
        self.mixings = scales * torch.linalg.qr(noise).Q.mT  # a component's samples: rows ε Mᵀ

    def sample(self, count: int) -> Tensor:
        """A batch of one component: its gradient is farther from the mean than a mixed batch's."""
        index = int(torch.randint(NUM_COMPONENTS, (), generator=self.generator))
        noise = torch.randn(count, self.means.shape[-1], generator=self.generator)
        return self.means[index] + noise @ self.mixings[index]


@torch.no_grad()
def exact_log_abs_det(layer: SelfNormalizingLinear) -> float:
    """``log|det W|`` in float64."""
    matrix = layer.log_det.linear_map.weight(layer.theta.double())
    return (torch.linalg.slogdet(matrix).logabsdet + layer.log_scale.double().sum()).item()


def resident_megabytes() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(args: argparse.Namespace) -> list[dict]:
    """Train; the rows of the table."""
    torch.manual_seed(args.seed)
    layer = SelfNormalizingLinear(args.dim, dtype=torch.float32)
    base = dist.Normal(torch.zeros(args.dim), torch.ones(args.dim)).to_event(1)
    density = dist.TransformedDistribution(base, [layer.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=args.learning_rate)
    data = Mixture(args.dim, args.seed)
    rows, losses, errors, seconds = [], [], [], 0.0
    for step in range(1, args.num_steps + 1):
        batch = data.sample(args.batch_size)
        start = time.process_time()
        optimizer.zero_grad()
        loss = -density.log_prob(batch).mean()
        loss.backward()
        seconds += time.process_time() - start
        if step % MEASURE_EVERY == 0:
            # The parameters are still those of the step: this is the value that it reported.
            point = batch[:1]
            value = layer.log_abs_det_jacobian(point, point).item()
            errors.append(abs(value - exact_log_abs_det(layer)))
        if step % args.print_every == 0:
            inverse, gradient = inverse_error(layer), gradient_error(layer).relative
        start = time.process_time()
        optimizer.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if step % args.print_every == 0:
            row = {
                "step": step,
                "loss": statistics.fmean(losses),
                "value_error": max(errors),
                "inverse_error": inverse,
                "gradient_error": gradient,
                "refactorizations": layer.num_refactorizations,
                "ms": 1e3 * seconds / args.print_every,
                "megabytes": resident_megabytes(),
            }
            rows.append(row)
            append(args.output, row)
            losses, errors, seconds = [], [], 0.0
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=50_000)
    parser.add_argument("--print-every", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/long_run.jsonl"))
    args = parser.parse_args(argv)

    rows = run(args)
    columns = "steps, loss, value in nats, ‖I − RW‖_F/√D, gradient, refactorizations, ms, MB"
    print_table(
        columns.split(", "),
        [
            [
                f"{row['step']:,}",
                number(row["loss"]),
                f"{row['value_error']:.4f}",
                f"{row['inverse_error']:.4f}",
                f"{row['gradient_error']:.2%}",
                str(row["refactorizations"]),
                f"{row['ms']:.2f}",
                f"{row['megabytes']:.0f}",
            ]
            for row in rows
        ],
    )
    return rows


if __name__ == "__main__":
    main()
