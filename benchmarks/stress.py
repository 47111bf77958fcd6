"""What happens to a tracked inverse that loses its matrix.

A refined layer (D = 256 by default) is fitted to correlated Gaussian data. Then, one at a time,

- the learning rate is multiplied by 30;
- W is edited in place: under ``no_grad``, and through ``.data``, which autograd does not see;
- rows of W are swapped through ``.data``;
- another run's parameters are loaded, without R and with it.

A row of the table follows each of them for 20 training steps: what the relative error of the
gradient of log|det W| would be with R as it was left; what it was *as the steps used it*, at the
first, at the worst and at the last of them; the largest error of the value that a step reported,
in nats; and how many refactorizations it took.

    python benchmarks/stress.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from long_run import exact_log_abs_det
from results import print_header, print_row
from torch import Tensor

from pyro_snf import Refined, SelfNormalizingLinear
from pyro_snf.diagnostics import gradient_error

STEPS = 20


@torch.no_grad()
def error_of_r(layer: SelfNormalizingLinear) -> float:
    """The relative error of the gradient of ``log|det A|`` that R has, if it is not corrected."""
    method, shape = layer.log_det, layer.theta.shape[:1]
    exact = method.linear_map.inverse_weight(layer.theta.double(), shape)
    return ((method.inverse_weight(layer.theta, shape) - exact).norm() / exact.norm()).item()


def make_data(dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(4096, dim, generator=generator) @ mixing + 1


class Run:
    """One training run of a density model with one layer."""

    def __init__(self, dim: int, learning_rate: float, seed: int, tolerance: float) -> None:
        self.layer = SelfNormalizingLinear(dim, log_det=Refined(tolerance=tolerance))
        base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
        self.density = dist.TransformedDistribution(base, [self.layer.inv])
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=learning_rate)
        self.data = make_data(dim, seed)
        self.batches = torch.Generator().manual_seed(seed)

    def step(self) -> tuple[float, float]:
        """Train once; return the errors of the gradient and of the value that were used."""
        index = torch.randint(len(self.data), (128,), generator=self.batches)
        self.optimizer.zero_grad()
        (-self.density.log_prob(self.data[index]).mean()).backward()
        point = self.data[:1]
        value = self.layer.log_abs_det_jacobian(point, point).item()
        exact = exact_log_abs_det(self.layer)
        error = gradient_error(self.layer).relative
        self.optimizer.step()
        return error, abs(value - exact)


@torch.no_grad()
def edit(run: Run) -> None:
    run.layer.theta.add_(torch.randn_like(run.layer.theta))


def edit_data(run: Run) -> None:
    run.layer.theta.data.add_(torch.randn_like(run.layer.theta))


def edit_entry(run: Run) -> None:
    run.layer.theta.data[3, 5] += 50.0


def swap_rows(run: Run) -> None:
    linear_map = run.layer.log_det.linear_map
    weight = linear_map.weight(run.layer.theta.detach()).roll(1, 0)
    run.layer.theta.data.copy_(linear_map.theta_of(weight))


def raise_learning_rate(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] *= 30


def another_run(run: Run) -> Run:
    other = Run(run.layer.input_dim, 1e-2, 1, run.layer.log_det.tolerance)
    for _ in range(200):
        other.step()
    return other


def load_parameters(run: Run) -> None:
    other = another_run(run)
    with torch.no_grad():
        for mine, theirs in zip(run.layer.parameters(), other.layer.parameters(), strict=True):
            mine.data = theirs.clone()


def load_state_dict(run: Run) -> None:
    other = another_run(run)
    run.layer.load_state_dict(other.layer.state_dict())


CHANGES: dict[str, Callable[[Run], None]] = {
    "learning rate × 30": raise_learning_rate,
    "all of W edited, no_grad": edit,
    "all of W edited, .data": edit_data,
    "one entry edited, .data": edit_entry,
    "rows of W rotated, .data": swap_rows,
    "another run's parameters, alone": load_parameters,
    "another run's state_dict": load_state_dict,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    print_header(
        *("change", "gradient error: R left alone", "step 1", "worst", "step 20"),
        *("value", "refactorizations"),
    )
    for name, change in CHANGES.items():
        torch.manual_seed(args.seed)
        run = Run(args.dim, args.learning_rate, args.seed, args.tolerance)
        for _ in range(300):
            run.step()
        change(run)
        if change is raise_learning_rate:
            run.step()  # it acts from the next step on
        before = run.layer.num_refactorizations  # read now: a state_dict brings its own count
        stale = error_of_r(run.layer)
        errors, values = zip(*[run.step() for _ in range(STEPS)], strict=True)
        print_row(
            name,
            *(f"{error:.2%}" for error in (stale, errors[0], max(errors), errors[-1])),
            f"{max(values):.3f}",
            run.layer.num_refactorizations - before,
        )


if __name__ == "__main__":
    main()
