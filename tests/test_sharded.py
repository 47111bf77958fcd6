"""A sharded layer is the layer that it was, and no rank has a D × D matrix.

All that two and four processes do is in :func:`measure`, which reports numbers and errors; the
tests look at these. The processes compare with a plain layer of their own.
"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import torch.distributed
import torch.distributed.checkpoint
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pyro_snf import Refined, SelfNormalizingLinear
from pyro_snf.distributed import shard
from pyro_snf.maps import sharded_inverse
from pyro_snf.maps.dense import Dense

# On the path of the processes that are forked, too.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
Allocations = importlib.import_module("sharded").Allocations

DIM = 24
# Large enough that a thin matrix, of a batch or of sixteen fixed directions, is smaller than a
# rank's share of a D × D one.
LARGE_DIM = 96
BATCH = 6
# Float64: sums in another order, over some steps of Adam.
ROUNDING = 1e-9
# Float32, over twenty steps.
ROUNDING_32 = 1e-5


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(one: Tensor, other: Tensor) -> float:
    return (whole(one) - whole(other)).abs().max().item()


def batches(count: int, dtype: torch.dtype, dim: int = DIM) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, dim, generator=generator, dtype=dtype)
    for _ in range(count):
        noise = torch.randn(BATCH, dim + 4, generator=generator, dtype=dtype)
        yield noise[:, :dim] + noise[:, dim:] @ mixing


def loss_of(layer: SelfNormalizingLinear, x: Tensor) -> Tensor:
    base = dist.Normal(torch.zeros_like(x[0]), torch.ones_like(x[0])).to_event(1)
    return -dist.TransformedDistribution(base, [layer.inv]).log_prob(x).mean()


def train(
    layer: SelfNormalizingLinear, learning_rate: float, num_steps: int = 20
) -> SelfNormalizingLinear:
    optimizer = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    for x in batches(num_steps, layer.log_scale.dtype, layer.input_dim):
        optimizer.zero_grad()
        loss_of(layer, x).backward()
        optimizer.step()
    return layer


def trained_alike(mesh: DeviceMesh, dtype: torch.dtype, learning_rate: float) -> dict[str, Any]:
    """Train a plain layer and a sharded one."""
    method = Refined(seed=0)
    plain = train(SelfNormalizingLinear(DIM, log_det=method, dtype=dtype), learning_rate)
    sharded = SelfNormalizingLinear(DIM, log_det=method, device="meta", dtype=dtype)
    train(shard(sharded, mesh), learning_rate)
    x = next(batches(1, dtype))
    found = {
        name: difference(getattr(sharded, name), getattr(plain, name))
        for name in ("theta", "log_scale", "bias", "weight", "inverse_weight")
    }
    for mode in (True, False):
        plain.train(mode), sharded.train(mode)
        values = [one.log_abs_det_jacobian(x, x) for one in (sharded, plain)]
        found[f"log_det, {mode=}"] = difference(*values)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for one, y in zip((sharded, plain), inputs, strict=True):
            one.zero_grad()
            (one.inv(y).sin().sum() + one.log_abs_det_jacobian(y, y).sum()).backward()
        found[f"gradient in y, {mode=}"] = difference(inputs[0].grad, inputs[1].grad)
        found[f"gradient in theta, {mode=}"] = difference(sharded.theta.grad, plain.theta.grad)
    corrections = [
        (one.num_refactorizations, one.log_det.estimator.num_updates) for one in (sharded, plain)
    ]
    return {"differences": found, "corrections": corrections}


def guided_alike(mesh: DeviceMesh, log_det: str | Refined) -> dict[str, float]:
    """Compare a guide of two plain layers with one of two sharded ones: density and gradients."""
    torch.manual_seed(0)
    plain = [SelfNormalizingLinear(DIM, log_det=log_det, dtype=torch.float64) for _ in range(2)]
    for layer in plain:
        torch.nn.init.normal_(layer.theta)
    sharded = [shard(copy.deepcopy(layer), mesh) for layer in plain]
    base = dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1)
    densities = []
    for layers in (plain, sharded):
        torch.manual_seed(1)
        guide = dist.TransformedDistribution(base, layers)
        x = guide.rsample((BATCH,))
        densities.append(guide.log_prob(x))
        (densities[-1] + x.square().sum(-1)).mean().backward()
    found = {"density": difference(*densities)}
    for index, (one, other) in enumerate(zip(plain, sharded, strict=True)):
        found[f"gradient of layer {index}"] = difference(one.theta.grad, other.theta.grad)
    return found


def inverses(mesh: DeviceMesh) -> dict[str, float]:
    """The errors of sharded inverses of some matrices, by panels of at most five columns."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    no_pivot_on_diagonal = torch.eye(DIM, dtype=torch.float64).roll(1, 0) + 1e-3 * random
    rank, size = mesh.get_local_rank(), DIM // mesh.size()
    sharded_inverse._PANEL_WIDTH = 5
    found = {}
    for name, matrix in {"random": random, "rolled": no_pivot_on_diagonal}.items():
        rows = slice(rank * size, (rank + 1) * size)
        result, log_abs_det = sharded_inverse.inverse_transposed(matrix[rows], mesh.get_group())
        error = difference(result, torch.linalg.inv(matrix).mT[rows])
        found[name] = error + difference(log_abs_det, torch.linalg.slogdet(matrix).logabsdet)
    return found


def errors(mesh: DeviceMesh) -> dict[str, str]:
    def with_weight(weight: Tensor) -> SelfNormalizingLinear:
        layer = SelfNormalizingLinear(DIM, dtype=torch.float64)
        layer.theta.data.copy_(Dense().theta_of(weight))
        return shard(layer.eval(), mesh)

    def second_derivative() -> None:
        layer = shard(SelfNormalizingLinear(DIM, device="meta").eval(), mesh)
        x = torch.ones(1, DIM)
        value = layer.log_abs_det_jacobian(x, x).sum()
        torch.autograd.grad(value, layer.theta, create_graph=True)

    x = torch.ones(1, DIM, dtype=torch.float64)
    singular = torch.eye(DIM, dtype=torch.float64)
    singular[3] = 0
    not_finite = torch.full((DIM, DIM), torch.nan, dtype=torch.float64)
    sharded = shard(SelfNormalizingLinear(DIM, device="meta"), mesh)
    attempts: dict[str, Callable[[], object]] = {
        "size": lambda: shard(SelfNormalizingLinear(DIM + 1), mesh),
        "learned": lambda: shard(SelfNormalizingLinear(DIM, log_det="learned"), mesh),
        "twice": lambda: shard(sharded, mesh),
        "singular": lambda: with_weight(singular).log_abs_det_jacobian(x, x),
        "not finite": lambda: with_weight(not_finite).log_abs_det_jacobian(x, x),
        "second derivative": second_derivative,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def everything(mesh: DeviceMesh, folder: str) -> dict[str, int]:
    """What a rank allocates and receives in all that a layer does."""
    with Allocations() as allocations:
        method = Refined(num_probes=1)
        layer = SelfNormalizingLinear(LARGE_DIM, log_det=method, device="meta")
        shard(layer, mesh)
        train(layer, 0.1, num_steps=6)
        corrections = layer.num_refactorizations + layer.log_det.estimator.num_updates
        layer.refactorize()
        x = next(batches(1, torch.float32, LARGE_DIM))[:2]
        layer.inv(x)
        layer.eval()
        layer.log_abs_det_jacobian(x, x).sum().backward()
        layer.inv(layer(x).clone())
        torch.distributed.checkpoint.save(layer.state_dict(), checkpoint_id=folder)
        layer.train()
        layer.theta.data += 1e-6
        received = allocations.received
        loss_of(layer, x).backward()
    return {
        "corrections": corrections,
        "largest": allocations.largest,
        "received": allocations.received - received,
    }


def first_of_all(mesh: DeviceMesh) -> dict[str, Any]:
    """Shard layers that differ from rank to rank: that of the first is what all have then."""
    torch.manual_seed(mesh.get_local_rank())
    layer = train(SelfNormalizingLinear(DIM, dtype=torch.float64), 0.1, mesh.get_local_rank() + 3)
    first = [copy.deepcopy(layer.state_dict())]
    torch.distributed.broadcast_object_list(first)
    shard(layer, mesh)
    state = layer.state_dict()
    return {
        "differences": {name: difference(state[name], value) for name, value in first[0].items()},
        "copy": difference(copy.deepcopy(layer).theta, layer.theta),
    }


def resumed(mesh: DeviceMesh, folder: str) -> dict[str, float]:
    """Load what two processes have saved."""
    dtype, path = torch.float64, f"{folder}/trained"
    layer = SelfNormalizingLinear(DIM, log_det=Refined(seed=0), device="meta", dtype=dtype)
    train(shard(layer, mesh), 0.02, num_steps=6)
    if mesh.size() == 2:
        torch.distributed.checkpoint.save(layer.state_dict(), checkpoint_id=path)
    new = shard(SelfNormalizingLinear(DIM, device="meta", dtype=dtype), mesh)
    state = new.state_dict()
    torch.distributed.checkpoint.load(state, checkpoint_id=path)
    new.load_state_dict(state)
    x = next(batches(1, dtype))
    return {
        "T": difference(new(x), layer(x)),
        "log_det": difference(new.log_abs_det_jacobian(x, x), layer.log_abs_det_jacobian(x, x)),
        "inverse": difference(new.inverse_weight, layer.inverse_weight),
    }


def data_and_tensor(mesh: DeviceMesh) -> float:
    """Train with the batch over one dimension of the mesh, and the layer over the other."""
    halves = mesh["data"]
    layer = SelfNormalizingLinear(DIM, log_det=Refined(seed=0), device="meta", dtype=torch.float64)
    shard(layer, mesh["tensor"])
    plain = SelfNormalizingLinear(DIM, log_det=Refined(seed=0), dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for x in batches(20, torch.float64):
        optimizer.zero_grad()
        loss_of(layer, x.chunk(halves.size())[halves.get_local_rank()]).backward()
        for parameter in layer.parameters():
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            torch.distributed.all_reduce(local, group=halves.get_group())
            local /= halves.size()
        optimizer.step()
    return difference(layer.theta, train(plain, 0.1).theta)


def measure(rank: int, num_ranks: int, folder: str) -> None:
    """All that one process does. What it has found is in a file afterwards."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{num_ranks}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    found: dict[str, Any] = {
        "float64": trained_alike(mesh, torch.float64, 0.05),
        "refined guide": guided_alike(mesh, Refined(seed=0)),
        "exact guide": guided_alike(mesh, "exact"),
        "inverses": inverses(mesh),
        "errors": errors(mesh),
        "everything": everything(mesh, f"{folder}/everything-{num_ranks}"),
        "first": first_of_all(mesh),
        "resumed": resumed(mesh, folder),
    }
    if num_ranks == 2:
        found["float32"] = trained_alike(mesh, torch.float32, 0.02)
    else:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        found["grid"] = data_and_tensor(grid)
    torch.save(found, f"{folder}/{num_ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process has found, by the number of processes."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    # The processes are forked from one that has imported what they need, and has no threads.
    multiprocessing.set_forkserver_preload([__name__])
    for num_ranks in (2, 4):
        torch.multiprocessing.start_processes(
            measure, (num_ranks, folder), nprocs=num_ranks, start_method="forkserver"
        )
    return {
        num_ranks: [torch.load(f"{folder}/{num_ranks}-{rank}.pt") for rank in range(num_ranks)]
        for num_ranks in (2, 4)
    }


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, found: dict[int, Any]) -> list[dict[str, Any]]:
    """What each of two or four processes has found."""
    return found[request.param]


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "rounding"),
    [(2, "float64", ROUNDING), (4, "float64", ROUNDING), (2, "float32", ROUNDING_32)],
)
def test_trains_as_one_process_does(
    found: dict[int, list[dict[str, Any]]], num_ranks: int, dtype: str, rounding: float
) -> None:
    for rank in found[num_ranks]:
        for name, value in rank[dtype]["differences"].items():
            assert value < rounding, name
        sharded, plain = rank[dtype]["corrections"]
        assert sharded == plain
        assert max(sharded) > 0


@pytest.mark.parametrize("guide", ["refined guide", "exact guide"])
def test_guide_has_the_same_gradients(ranks: list[dict[str, Any]], guide: str) -> None:
    for rank in ranks:
        for name, value in rank[guide].items():
            assert value < ROUNDING, name


def test_training_updates_and_refactorizes(ranks: list[dict[str, Any]]) -> None:
    assert min(ranks[0]["float64"]["corrections"][0]) > 0


def test_inverse(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, error in rank["inverses"].items():
            assert error < ROUNDING, name


def test_no_rank_has_a_whole_matrix(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["everything"]["corrections"] > 0
        assert rank["everything"]["largest"] == LARGE_DIM**2 // len(ranks)


def test_a_step_communicates_the_batch_once(ranks: list[dict[str, Any]]) -> None:
    # T(x) for two events, two fingerprints of Θ, three products of a check, ⟨Rᵀ, A⟩ and tr R.
    for rank in ranks:
        assert rank["everything"]["received"] <= (2 + 2 + 3) * LARGE_DIM + 2


def test_first_rank_is_distributed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert max(rank["first"]["differences"].values()) == 0
        assert rank["first"]["copy"] == 0


def test_checkpoint_of_two_ranks_on_others(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, value in rank["resumed"].items():
            assert value < ROUNDING, name


def test_data_and_tensor_parallel(found: dict[int, list[dict[str, Any]]]) -> None:
    for rank in found[4]:
        assert rank["grid"] < ROUNDING


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("size", "ValueError: expected input_dim, a multiple of the . ranks; got 25"),
        ("learned", "ValueError: expected a SelfNormalizingLinear with log_det 'refined' or"),
        ("twice", "ValueError: expected a layer that is not sharded"),
        ("singular", ".*LinAlgError: .*singular"),
        ("not finite", ".*LinAlgError: .*NaN or infinite"),
        ("second derivative", "RuntimeError: a sharded log-determinant has no second derivative"),
    ],
)
def test_errors(ranks: list[dict[str, Any]], name: str, message: str) -> None:
    for rank in ranks:
        assert re.match(message, rank["errors"][name])
