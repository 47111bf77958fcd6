"""Two processes that train one model: as one process with the data of both.

The two processes are started once, do all jobs of :data:`JOBS`, and send back what came of each.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from pyro.infer import Trace_ELBO
from torch import Tensor, multiprocessing, nn
from torch import distributed as torch_distributed
from torch.nn.parallel import DistributedDataParallel

import pyro_snf
from pyro_snf import (
    GECO,
    ActNorm,
    AutoSelfNormalizingFlow,
    Compose,
    Learned,
    PairLearned,
    PairRefined,
    Reconstruction,
    Refined,
    ResidualMLP,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    SmoothLeakyReLU,
    conditional_self_normalizing_linear,
    flows,
)
from pyro_snf.optim import NaturalGradient
from pyro_snf.processes import (
    column_moments,
    mean_over_processes,
    num_processes,
    process_rank,
    set_data_group,
)

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "distributed.rst"

NUM_PROCESSES = 2
NUM_STEPS, NUM_ROWS = 8, 6

# Float64: sums over processes have another order than sums over a batch. A decision to correct an
# inverse, or another probe, would make a difference of 1e-3.
TOLERANCE = 1e-7
# Of the ratio of two variances, each from 200 draws of a gradient of 16 entries.
VARIANCE_TOLERANCE = 0.15
NUM_DRAWS = 200

# --- Models -------------------------------------------------------------------------------------


class Loss(nn.Module):
    """The negative log-likelihood of a flow, as a module to be wrapped."""

    def __init__(self, flow: Any, dim: int) -> None:
        super().__init__()
        self.flow = flow
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        base = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1)
        return -dist.TransformedDistribution(base, [self.flow.inv]).log_prob(x).mean()


def dense(dim: int, *, start: float = 0.0, **options: Any) -> Compose:
    layers = [SelfNormalizingLinear(dim, **options) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.theta, std=start)
    return Compose([layers[0], SmoothLeakyReLU(0.3), layers[1]])


def geco() -> GECO:
    return GECO(0.02, rate=0.1)


def pair(dim: int = 3, **options: Any) -> SelfNormalizingPair:
    networks = [ResidualMLP(dim, [8]) for _ in range(2)]
    return SelfNormalizingPair(*networks, event_shape=dim, **{"log_det": "refined", **options})


SMALL_GLOW = {"num_levels": 1, "num_steps": 2, "hidden_channels": 4}
# With D orthogonal probes and complete solves, the gradient of a pair has no noise.
WITHOUT_NOISE = PairRefined(num_probes=3, tolerance=1e-12, krylov_steps=3)


def pair_without_penalty() -> SelfNormalizingPair:
    layer = pair(log_det=WITHOUT_NOISE, reconstruction=Reconstruction(0.0))
    layer.inverse_net.requires_grad_(False)  # which nothing trains
    return layer


TOLERANT = Refined(num_probes=2, tolerance=0.1)

#: The flow, the shape of its events, and Adam's rate. The rate of "dense" is so high that R is
#: updated and refactorized on the way.
CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...], float]] = {
    "dense": (lambda: dense(32, start=0.5, log_det=TOLERANT), (32,), 0.3),
    "dense from 0": (lambda: dense(32, log_det=TOLERANT), (32,), 0.3),
    "learned": (lambda: dense(4, log_det=Learned(reconstruction_weight=geco())), (4,), 1e-2),
    "conv": (lambda: flows.convolutional((2, 4, 4), num_blocks=1), (2, 4, 4), 1e-2),
    "glow": (
        lambda: flows.glow((1, 4, 4), num_levels=1, num_steps=2, hidden_channels=4),
        (1, 4, 4),
        1e-3,
    ),
    # Without the penalty, whose events around the data are other ones in each process.
    "pair": (pair_without_penalty, (3,), 1e-2),
}
WRAPPERS = ["broadcast", "no broadcast", "fully_shard"]
SVI_WRAPPERS = ["no broadcast", "fully_shard"]


def batches(shape: tuple[int, ...]) -> Tensor:
    """Shape ``(NUM_STEPS, NUM_PROCESSES · NUM_ROWS, *shape)``, far from unit scale."""
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(NUM_STEPS, NUM_PROCESSES * NUM_ROWS, *shape, generator=generator) + 1


def share(batch: Tensor, rank: int) -> Tensor:
    return batch.chunk(NUM_PROCESSES)[rank]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, whole."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    full = {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in state.items()}
    return {name: one.detach().clone() for name, one in full.items()}


def wrapped(module: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        return fully_shard(module, mesh=init_device_mesh("cpu", (NUM_PROCESSES,)))
    if wrapper == "broadcast":
        return DistributedDataParallel(module)
    return DistributedDataParallel(module, broadcast_buffers=False)


def train(case: str, wrapper: str | None, rank: int | None) -> dict[str, Tensor]:
    """Some steps of Adam; of one process without a wrapper."""
    make, shape, lr = CASES[case]
    torch.manual_seed(0)
    module = Loss(make(), math.prod(shape))
    data = batches(shape)
    if rank is not None:
        data = torch.stack([share(batch, rank) for batch in data])
    if case == "glow" and wrapper == "fully_shard":
        module(data[0])  # ActNorm is to be initialized before
    whole = module if wrapper is None else wrapped(module, wrapper)
    optimizer = torch.optim.Adam(whole.parameters(), lr=lr)
    for batch in data:
        optimizer.zero_grad()
        whole(batch).backward()
        optimizer.step()
    if case.startswith("dense"):  # or there would be nothing to be decided
        estimators = [layer.log_det.estimator for layer in module.flow.parts[::2]]
        assert sum(one.num_updates for one in estimators) > 0
        assert sum(one.num_refactorizations for one in estimators) > 0
    return state_of(module)


# --- Jobs of both processes ---------------------------------------------------------------------


def gradients_of_a_pair(rank: int | None) -> Tensor:
    """Gradients with noise, shape ``(NUM_DRAWS, N)``: the probes of all events see one Jacobian."""
    torch.manual_seed(0)
    f, g = (nn.Linear(4, 4) for _ in range(2))
    method = PairLearned(probe="gaussian")
    layer = SelfNormalizingPair(
        f, g, event_shape=4, log_det=method, reconstruction=Reconstruction(0.0)
    )
    x = batches((4,))[0]
    x = x if rank is None else share(x, rank)
    gradients = []
    for _ in range(NUM_DRAWS):
        log_det = layer.log_abs_det_jacobian(x, layer(x))
        gradients.append(torch.autograd.grad(log_det.mean(), f.weight)[0].flatten())
    return torch.stack(gradients)


def draws(rank: int | None) -> dict[str, Tensor]:
    """What is random in a layer, in its first step."""
    torch.manual_seed(0)
    layer = pair(log_det="refined")
    streams = {
        "pair": layer.log_det.probes,
        "reconstruction": layer.reconstruction.probes,
        "dense": SelfNormalizingLinear(3).log_det.estimator.probes,
        "conv": flows.convolutional((1, 3, 3), num_blocks=1).parts[0].log_det.estimator.probes,
    }
    device = torch.device("cpu")
    found = {
        f"{name} {stream}": torch.randn(3, generator=probes.generator(0, device, stream=stream))
        for name, probes in streams.items()
        for stream in range(4)
    }
    return found


def rows_far_from_zero() -> Tensor:
    """Shape ``(30, 3)``, in float32; the last column is constant in the first ten rows."""
    rows = 1e4 + torch.randn(30, 3, dtype=torch.float32)
    rows[:10, 2] = 1e4
    return rows


def moments(rank: int | None) -> list[Tensor]:
    torch.manual_seed(0)
    rows = rows_far_from_zero()
    if rank is not None:
        rows = (rows[:10], rows[10:])[rank]
    found = [*column_moments(rows)]
    layer = conditional_self_normalizing_linear(2, 3).float()
    layer.standardize_contexts(rows)
    return [*found, layer.context_scale.mean, layer.context_scale.deviation]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors_in_one_process(rank: int) -> list[str]:
    """Of a first batch that is not finite, or is constant, in the second process only."""
    found = []
    for value in (math.nan, 1.0):
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(rank))
        if rank == 1:
            x[:, 1] = value
        layer = ActNorm(2, event_dim=1)
        found.append(error_of(lambda layer=layer, x=x: layer(x)))
    return found


def errors_of_fully_shard(rank: int) -> list[str]:
    module = wrapped(Loss(ActNorm(3, event_dim=1), 3), "fully_shard")
    layers = SelfNormalizingLinear(3), SelfNormalizingLinear(3).inv, pair()
    return [
        error_of(lambda: module(torch.randn(5, 3))),
        *[error_of(lambda layer=layer: wrapped(layer, "fully_shard")) for layer in layers],
    ]


def errors_of_natural_gradients(rank: int) -> list[str]:
    rows = data_of_regression()
    guide = AutoSelfNormalizingFlow(regression)
    return [
        error_of(lambda: pyro_snf.fit(regression, guide, *rows, progress=False)),
        error_of(lambda: NaturalGradient(guide)),
    ]


def groups_of_one(rank: int) -> tuple[Any, ...]:
    group, _ = torch_distributed.new_subgroups(1)
    set_data_group(group)
    size = num_processes(), process_rank()
    layer = ActNorm(1, event_dim=1)
    layer(torch.tensor([[0.0], [2.0]]) + 10 * rank)
    set_data_group(None)
    return *size, layer.bias.item(), process_rank()


def data_of_regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    return x, x.sum(-1) + torch.randn(64, generator=generator)


def regression(x: Tensor, y: Tensor) -> None:
    """x and y are rows of a process, as a sample of all 64."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("rows", 64, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def svi(wrapper: str, rank: int) -> dict[str, Tensor]:
    x, y = (share(one, rank) for one in data_of_regression())
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(0)
        guide = AutoSelfNormalizingFlow(regression, num_layers=1)
        guide(x, y)
        loss = wrapped(Trace_ELBO(num_particles=2)(regression, guide), wrapper)
        pyro.set_rng_seed(1 + rank)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        return state_of(guide)


def programs_of_the_documentation(rank: int) -> list[Any]:
    """Those of docs/distributed.rst, one after the other, in the group that is there."""
    blocks = re.findall(r"code-block:: python\n\n((?:   .*\n|\n)+)", DOCUMENTATION.read_text())
    program = "\n".join(map(textwrap.dedent, blocks))
    said = "torch.distributed.init_process_group()"
    assert program.count(said) == 1
    program = program.replace(said, "")
    x, y = (share(one, rank) for one in data_of_regression())
    names: dict[str, Any] = {}
    with pyro.settings.context():
        exec(compile(program, DOCUMENTATION, "exec"), names)
        group = num_processes(), process_rank()
        set_data_group(None)
        value = names["loss"](x, y)
        value.backward()
    return [*group, math.isfinite(value.item()), len(names["model_state"]) > 0]


JOBS: dict[str, Callable[[int], Any]] = {
    **{
        f"{case}, {wrapper}": lambda rank, case=case, wrapper=wrapper: train(case, wrapper, rank)
        for case in CASES
        for wrapper in WRAPPERS
    },
    **{
        f"svi, {wrapper}": lambda rank, wrapper=wrapper: svi(wrapper, rank)
        for wrapper in SVI_WRAPPERS
    },
    **{
        job.__name__: job
        for job in (
            gradients_of_a_pair,
            draws,
            moments,
            errors_in_one_process,
            errors_of_fully_shard,
            errors_of_natural_gradients,
            groups_of_one,
            programs_of_the_documentation,
        )
    },
}


def work(rank: int, folder: Path) -> None:
    """All jobs, in one of the processes."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch_distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    torch.save({name: job(rank) for name, job in JOBS.items()}, folder / f"{rank}.pt")
    torch_distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What came of each job, in the order of the ranks."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers, of which the first one does the jobs
    folder = root / "processes"
    with FileLock(root / "processes.lock"):
        if not folder.exists():
            folder.mkdir()
            # One server imports what both processes need, and starts them.
            multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
            multiprocessing.start_processes(
                work, (folder,), nprocs=NUM_PROCESSES, start_method="forkserver"
            )
    found = [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]
    return {name: [one[name] for one in found] for name in JOBS}


# --- Tests --------------------------------------------------------------------------------------


def check_close(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Buffers are NaN that are not in use yet."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(results: Any, case: str, wrapper: str) -> None:
    first, second = results[f"{case}, {wrapper}"]
    check_close(first, second)
    check_close(first, train(case, None, None), TOLERANCE)


def test_noise_of_pairs_averages_over_processes(results: Any) -> None:
    first, second = results["gradients_of_a_pair"]
    one = gradients_of_a_pair(None)
    noise = ((first + second) / 2).var(0).mean()
    assert noise / one.var(0).mean() == pytest.approx(1, abs=VARIANCE_TOLERANCE)


def test_what_averages_over_data_differs_and_what_is_state_does_not(results: Any) -> None:
    first, second = results["draws"]
    check_close(first, draws(None))  # as without processes
    for name in first:
        is_equal = torch.equal(first[name], second[name])
        assert is_equal == name.startswith(("dense", "conv")), name


def test_moments_are_those_of_all_rows(results: Any) -> None:
    first, second = results["moments"]
    check_close(first, second)
    torch.testing.assert_close(first, moments(None), rtol=1e-6, atol=0)
    torch.manual_seed(0)
    rows = rows_far_from_zero().double()
    # The rounding of the rows is 1e-3 of their deviation; E[x²] − μ² would have no digit right.
    torch.testing.assert_close(first[1].double(), rows.std(0, correction=0), rtol=1e-3, atol=0)


def test_errors_of_one_process_are_those_of_all(results: Any) -> None:
    first, second = results["errors_in_one_process"]
    assert first == second
    assert "expected a first batch of finite mean" in first[0]
    assert first[1] == "none"


def test_errors_of_fully_shard(results: Any) -> None:
    for first, *layers in results["errors_of_fully_shard"]:
        assert "RuntimeError: expected ActNorm(3, event_dim=1) to be initialized before" in first
        names = ["SelfNormalizingLinear", "InverseTransformModule", "SelfNormalizingPair"]
        for name, message in zip(names, layers, strict=True):
            assert "TypeError: expected fully_shard of the module whose forward()" in message
            assert message.endswith(f"got fully_shard of a {name}")


def test_natural_gradients_are_for_one_process(results: Any) -> None:
    for messages in results["errors_of_natural_gradients"]:
        for name, message in zip(["fit", "NaturalGradient"], messages, strict=True):
            assert f"RuntimeError: expected one process for {name}; got 2: wrap" in message


def test_data_group(results: Any) -> None:
    assert results["groups_of_one"] == [(1, 0, -1.0, 0), (1, 0, -11.0, 1)]


@pytest.mark.parametrize("wrapper", SVI_WRAPPERS)
def test_svi(results: Any, wrapper: str) -> None:
    first, second = results[f"svi, {wrapper}"]
    check_close(first, second)
    x, y = data_of_regression()
    expected = torch.linalg.solve(x.T @ x + torch.eye(4), x.T @ y)
    assert torch.allclose(first["transform.0.bias"], expected, atol=0.3)


def test_one_process_is_as_without() -> None:
    assert (num_processes(), process_rank()) == (1, 0)
    x = torch.randn(3)
    assert torch.equal(mean_over_processes(x), x)


def test_programs_of_the_documentation(results: Any) -> None:
    for rank, found in enumerate(results["programs_of_the_documentation"]):
        assert found == [NUM_PROCESSES, rank, True, rank == 0]  # the first gets the whole state


# --- The example --------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that it started in /proc")
def test_example_goes_on_after_a_process_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--num-steps", "130", "--output-dir", str(tmp_path)]
    with subprocess.Popen([*TORCHRUN, "--max-restarts=1", EXAMPLE, *options]) as launcher:
        while not (tmp_path / "distributed.pt").exists():
            assert launcher.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        commands = {int(one): Path(f"/proc/{one}/cmdline").read_text() for one in children}
        (worker,) = (one for one, command in commands.items() if str(EXAMPLE) in command)
        os.kill(worker, signal.SIGKILL)
        assert launcher.wait() == 0
    table = (tmp_path / "distributed.txt").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"distributed.txt", "distributed.png"}
    # The same in this process, without an interruption.
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**address, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    torch.set_default_dtype(torch.float32)
    rows = importlib.import_module("distributed").main(options)
    assert table == f"{importlib.import_module('common').format_table(rows)}\n"
    assert rows[0]["test NLL (nats)"] == pytest.approx(rows[1]["test NLL (nats)"], rel=1e-6)
    assert rows[1]["weights off by"] < 1e-4
