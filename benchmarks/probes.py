"""Random probes, or a subspace iteration? Tracked inverses of the same weights, on MNIST.

The paper's dense flow, of two layers, is trained with the exact gradient and a warm-up over 10
epochs; trackers that do not take part follow its layers. Each does one update a step: the block
Broyden update of :mod:`pyro_snf.log_dets.tracked_inverse` along k directions, either Gaussian, or
turned towards the error E = I − RA by one subspace iteration. Nothing is ever refactorized.

    python benchmarks/probes.py --data-dir DIR      (DIR has the IDX files, gzipped or not)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pyro.distributions as dist
import torch
from datasets import load_images
from results import print_table
from torch import Tensor
from tqdm import tqdm

from pyro_snf import flows
from pyro_snf.images import LogitTransform, dequantize
from pyro_snf.maps import Dense

DIM = 784
BATCH = 100
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 5000
DENSE = Dense()
#: Singular directions of E whose share of its energy is reported.
LARGEST = 16


class Tracker:
    def __init__(self, num_probes: int, iterates: bool) -> None:
        self.num_probes, self.iterates = num_probes, iterates
        self.inverse_t = torch.eye(DIM)
        self.generator = torch.Generator().manual_seed(1)

    def update(self, theta: Tensor) -> None:
        probes = torch.randn(self.num_probes, DIM, generator=self.generator)
        if self.iterates:
            residual = probes - DENSE.multiply(theta, probes) @ self.inverse_t
            probes = residual - DENSE.multiply_transposed(theta, residual @ self.inverse_t.mT)
        probes = torch.linalg.qr(probes.mT).Q.mT
        image = DENSE.multiply(theta, probes) @ self.inverse_t
        step = torch.linalg.solve((probes @ image.mT).mT, probes - image)
        self.inverse_t.addmm_((probes @ self.inverse_t.mT).mT, step)

    def measure(self, theta: Tensor) -> tuple[float, float, float]:
        """‖E‖_F/√D, the relative error of the gradient, and the energy in few directions."""
        matrix = DENSE.weight(theta)
        inverse_t = torch.linalg.inv(matrix).mT
        energies = torch.linalg.svdvals(torch.eye(DIM) - self.inverse_t.mT @ matrix).square()
        return (
            math.sqrt(energies.sum().item() / DIM),
            ((self.inverse_t - inverse_t).norm() / inverse_t.norm()).item(),
            (energies[:LARGEST].sum() / energies.sum()).item(),
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    images = load_images("mnist", args.data_dir).train.flatten(1)
    to_logits = LogitTransform(event_dim=1)
    noise = torch.Generator().manual_seed(args.seed)
    flow = flows.fully_connected(DIM, log_det="exact")
    layers = [flow.parts[0], flow.parts[-1]]
    base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow.inv])
    # Of a matrix as it is; θ is √D times that.
    optimizer = torch.optim.Adam(flow.parameters(), lr=LEARNING_RATE * math.sqrt(DIM))
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS)
    )
    trackers = [
        {
            f"{kind}, k = {k}": Tracker(k, kind == "iterated")
            for kind, k in [("random", 8), ("random", 16), ("iterated", 4), ("iterated", 8)]
        }
        for _ in layers
    ]
    order = torch.randint(len(images), (args.steps, BATCH), generator=noise)
    for index in tqdm(order, mininterval=5):
        logits = to_logits(dequantize(images[index], generator=noise))
        optimizer.zero_grad()
        (-density.log_prob(logits).mean()).backward()
        for layer, followers in zip(layers, trackers, strict=True):
            for tracker in followers.values():
                tracker.update(layer.theta.detach())
        optimizer.step()
        warm_up.step()

    rows = []
    for number, (layer, followers) in enumerate(zip(layers, trackers, strict=True), start=1):
        for name, tracker in followers.items():
            # The weights of one step later: as the next update would find R.
            error, gradient, share = tracker.measure(layer.theta.detach())
            rows.append([number, name, f"{error:.4f}", f"{gradient:.2%}", f"{share:.0%}"])
    energy = f"energy in {LARGEST} of {DIM} directions"
    print_table(["layer", "probes", "‖E‖/√D", "gradient error", energy], rows)


if __name__ == "__main__":
    main()
