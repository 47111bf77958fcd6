"""Time and memory of a sharded layer, and whether it computes what one process does.

A refined layer is fitted to correlated Gaussian data by Adam: in one process as it is, and sharded
over some processes (gloo, one CPU thread each). They are never more than the machine's cores can
run at once where times are to mean anything; memory and agreement do not depend on that.

- *step*: the median time of a training step; *refactorization*: the time of one.
- *peak memory*: how far the resident memory of a rank rises, in units of D² numbers, the largest of
  all ranks: in training, and with a refactorization and the exact log-determinant of ``eval()``.
- *largest tensor*: of all that a rank makes from construction to checkpoint, in the same unit.
- *communication*: what a rank receives in a step, in units of D numbers.
- *difference*: of Θ/√D and of the exact log-determinant a feature, from the one process.

    python benchmarks/sharded.py --dims 1024 4096 --processes 1 2 4
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
import torch.distributed
import torch.distributed.checkpoint
import torch.multiprocessing as mp
from results import print_table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_snf import Refined, SelfNormalizingLinear
from pyro_snf.distributed import shard

MEASURED_STEPS = 3
COLLECTIVES = ("c10d::allgather_", "c10d::allreduce_", "c10d::broadcast_")


class Allocations(TorchDispatchMode):
    """The largest tensor that this process makes, and what collectives give it, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.received = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it computes with its shards, which come by here
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # DTensor derives shapes from tensors on "meta", which have no memory; and a checkpoint
            # has bytes in tensors.
            if (
                isinstance(tensor, Tensor)
                and tensor.is_floating_point()
                and tensor.untyped_storage().device.type != "meta"
            ):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, stored)
        if func._schema.name in COLLECTIVES:
            self.received += sum(one.numel() for one in tree_leaves(args[0]))
        return result


class Memory:
    """The peak of this process's resident memory since this object was made, in bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._peak()

    def risen(self) -> int:
        return self._peak() - self.start

    def _peak(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Run(NamedTuple):
    """One row of the table."""

    dim: int
    num_processes: int
    is_sharded: bool
    num_steps: int
    batch_size: int
    learning_rate: float
    dtype: torch.dtype
    folder: str


class Fit:
    """A density model with one layer, and its optimizer."""

    def __init__(self, run: Run, make: Callable[[int, torch.dtype], SelfNormalizingLinear]) -> None:
        self.run = run
        self.layer = make(run.dim, run.dtype)
        zero, one = torch.zeros((), dtype=run.dtype), torch.ones((), dtype=run.dtype)
        base = dist.Normal(zero, one).expand([run.dim]).to_event(1)
        self.density = dist.TransformedDistribution(base, [self.layer.inv])
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=run.learning_rate)
        self.generator = torch.Generator().manual_seed(0)
        self.mixing = self.draw(32, run.dim)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.run.dtype)

    def batch(self) -> Tensor:
        size = self.run.batch_size
        return self.draw(size, self.run.dim) + self.draw(size, 32) @ self.mixing / 4

    def step(self) -> None:
        x = self.batch()
        self.optimizer.zero_grad()
        (-self.density.log_prob(x).mean()).backward()
        self.optimizer.step()


def measure(run: Run, make: Callable[[int, torch.dtype], SelfNormalizingLinear]) -> dict[str, Any]:
    """Train, and measure this process."""
    memory, allocations = Memory(), Allocations()
    with allocations:
        fit = Fit(run, make)
        fit.step()
    times = []
    for _ in range(run.num_steps - 1 - MEASURED_STEPS):
        start = time.perf_counter()
        fit.step()
        times.append(time.perf_counter() - start)
    before = allocations.received
    with allocations:
        for _ in range(MEASURED_STEPS):
            fit.step()
    received, in_training = allocations.received - before, memory.risen()
    layer = fit.layer
    num_corrections = layer.num_refactorizations + layer.log_det.estimator.num_updates
    theta = layer.theta.detach().clone()
    with allocations:
        start = time.perf_counter()
        layer.refactorize()
        refactorization = time.perf_counter() - start
        layer.eval()
        x = fit.batch()[:4]
        log_det = layer.log_abs_det_jacobian(x, x)[0].detach()
        error = (layer.inv(layer(x).clone()) - x).abs().max().item()
        layer.train()
        peak = memory.risen()
        if run.is_sharded:
            folder = f"{run.folder}/checkpoint-{run.dim}"
            torch.distributed.checkpoint.save(layer.state_dict(), checkpoint_id=folder)
    return {
        "step": statistics.median(times),
        "refactorization": refactorization,
        "in_training": in_training,
        "peak": peak,
        "largest": allocations.largest,
        "received": received / MEASURED_STEPS,
        "corrections": num_corrections,
        "inverse": error,
        "theta": theta,
        "log_det": log_det,
    }


def work(rank: int, run: Run) -> None:
    """One process of a run. The first writes what all have measured to a file."""
    torch.set_num_threads(1)
    store = f"file://{run.folder}/store-{run.dim}-{run.num_processes}-{run.is_sharded}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=run.num_processes
    )
    mesh = init_device_mesh("cpu", (run.num_processes,))

    def make(dim: int, dtype: torch.dtype) -> SelfNormalizingLinear:
        device = "meta" if run.is_sharded else "cpu"
        layer = SelfNormalizingLinear(dim, log_det=Refined(seed=0), device=device, dtype=dtype)
        return shard(layer, mesh) if run.is_sharded else layer

    measure(run._replace(dim=64), make)  # so that what torch allocates once is there
    result = measure(run, make)
    theta, log_det = result.pop("theta"), result.pop("log_det")
    reference = Path(run.folder) / f"reference-{run.dim}.pt"
    if run.is_sharded:
        theta = theta.to_local()
        one = torch.load(reference, mmap=True)
        rows = slice(rank * len(theta), (rank + 1) * len(theta))
        result["theta"] = (theta - one["theta"][rows]).abs().max().item() / math.sqrt(run.dim)
        result["log_det"] = (log_det - one["log_det"]).abs().item() / run.dim
    else:
        torch.save({"theta": theta, "log_det": log_det}, reference)
    results: list[Any] = [None] * run.num_processes
    torch.distributed.all_gather_object(results, result)
    if rank == 0:
        torch.save(results, f"{run.folder}/results.pt")
    torch.distributed.destroy_process_group()


def row_of(run: Run) -> list[str]:
    mp.start_processes(work, (run,), nprocs=run.num_processes, start_method="fork")
    results = torch.load(f"{run.folder}/results.pt")
    unit, size = run.dim**2, torch.finfo(run.dtype).bits // 8

    def largest(name: str) -> float:
        return max(result[name] for result in results)

    differences = ["–", "–"]
    if run.is_sharded:
        differences = [f"{largest('theta'):.1g}", f"{largest('log_det'):.1g}"]
    return [
        str(run.dim),
        f"{run.num_processes}, {'sharded' if run.is_sharded else 'plain'}",
        f"{1e3 * largest('step'):.0f}",
        f"{largest('refactorization'):.1f}",
        f"{largest('in_training') / (unit * size):.2f}",
        f"{largest('peak') / (unit * size):.2f}",
        f"{largest('largest') / unit:.2f}",
        f"{largest('received') / run.dim:.0f}",
        str(results[0]["corrections"]),
        f"{largest('inverse'):.0e}",
        *differences,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = parser.parse_args()
    header = [
        "D",
        "processes",
        "step, ms",
        "refactorization, s",
        "peak memory, training, D²",
        "peak memory, D²",
        "largest tensor, D²",
        "communication a step, D",
        "corrections",
        "error of T.inv",
        "difference of Θ/√D",
        "of log-det / D",
    ]
    rows = []
    for dim in args.dims:
        runs = [(1, False), *((count, True) for count in args.processes)]
        with tempfile.TemporaryDirectory() as folder:  # of each D its own, for the reference's size
            for num_processes, is_sharded in runs:
                run = Run(
                    dim,
                    num_processes,
                    is_sharded,
                    args.num_steps,
                    args.batch_size,
                    args.learning_rate,
                    getattr(torch, args.dtype),
                    folder,
                )
                rows.append(row_of(run))
                print(rows[-1], flush=True)
    print_table(header, rows)


if __name__ == "__main__":
    main()
