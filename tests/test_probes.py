"""Random probes: their moments, and the generators that they are drawn from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyro_snf.probes import PROBES, draw_probes, probe_generator

# Float64, QR decompositions of a few columns.
EXACT = 1e-12
# For means over independent draws: a deviation beyond five has a probability of one in two million.
STANDARD_ERRORS = 5

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", PROBES)


def draw(
    kind: str,
    num_probes: int,
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
) -> Tensor:
    return draw_probes(kind, num_probes, shape, probe_generator(seed, 0, device), dtype)


# --- Probes -------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shape_and_type(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    probes = draw(kind, 3, 4, 2, 1, 5, dtype=dtype, device=device)
    assert probes.shape == (3, 4, 2, 1, 5)
    assert probes.dtype == dtype
    assert probes.device.type == device.type
    assert torch.isfinite(probes).all()


@KINDS
@pytest.mark.parametrize("num_probes", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_second_moment_is_the_identity(kind: str, num_probes: int, dim: int) -> None:
    if kind == "orthogonal" and num_probes > dim:
        pytest.skip("no more than D vectors are orthogonal")
    for probes in draw(kind, num_probes, 20_000, dim):  # each of the k, not their mean alone
        products = probes.unsqueeze(2) * probes.unsqueeze(1)
        mean, error = products.mean(0), products.std(0) / math.sqrt(len(products))
        assert ((mean - torch.eye(dim)).abs() <= STANDARD_ERRORS * error + EXACT).all()
        # The trace estimate does not depend on odd moments, but they should vanish too.
        if kind != "orthogonal" or num_probes == 1:
            mean, error = probes.mean(0), probes.std(0) / math.sqrt(len(probes))
            assert (mean.abs() <= STANDARD_ERRORS * error).all()


@KINDS
def test_trace_estimates_are_unbiased(kind: str) -> None:
    matrix = torch.randn(8, 8)
    probes = draw(kind, 2, 20_000, 8)
    estimates = ((probes @ matrix) * probes).sum(2).mean(0)
    error = estimates.std() / math.sqrt(len(estimates))
    assert (estimates.mean() - matrix.trace()).abs() < STANDARD_ERRORS * error


def test_gaussian_probes_are_standard_normal() -> None:
    probes = draw("gaussian", 1, 40_000, 1).flatten()
    for power, moment, variance in [(2, 1, 2), (4, 3, 96)]:
        error = math.sqrt(variance / len(probes))
        assert abs(probes.pow(power).mean().item() - moment) < STANDARD_ERRORS * error


def test_rademacher_probes_are_signs() -> None:
    # So the diagonal of a matrix adds no noise to the trace estimate.
    probes = draw("rademacher", 2, 50, 6)
    assert probes.abs().eq(1).all()
    diagonal = torch.randn(6)
    assert torch.allclose(probes.square() @ diagonal, diagonal.sum(), rtol=EXACT)


@pytest.mark.parametrize("shape", [(1,), (2,), (8,), (2, 1, 3)])
def test_orthogonal_probes_are_orthogonal_and_of_equal_length(shape: tuple[int, ...]) -> None:
    dim = math.prod(shape)
    for num_probes in {1, 2, dim} if dim > 1 else {1}:
        probes = draw("orthogonal", num_probes, 5, *shape).flatten(2).transpose(0, 1)
        gram = probes @ probes.mT
        assert torch.allclose(gram, dim * torch.eye(num_probes).expand_as(gram), atol=dim * EXACT)


@pytest.mark.parametrize("dim", [1, 2, 8, 32])
def test_trace_estimate_of_d_orthogonal_probes_is_exact(dim: int) -> None:
    probes = draw("orthogonal", dim, 5, dim)
    second_moment = torch.einsum("kbi,kbj->bij", probes, probes) / dim
    assert torch.allclose(second_moment, torch.eye(dim).expand(5, -1, -1), atol=EXACT)


@KINDS
def test_events_and_probes_are_independent(kind: str) -> None:
    probes = draw(kind, 2, 3, 8).flatten(0, 1)
    for one, other in itertools.combinations(probes, 2):
        assert not torch.equal(one, other)
        assert not torch.equal(one, -other)


@KINDS
def test_no_probe_is_rounded_to_another_length(kind: str) -> None:
    # In half precision, the result of a QR decomposition would not be orthogonal.
    low, high = draw(kind, 2, 4, 6, dtype=torch.bfloat16), draw(kind, 2, 4, 6, dtype=torch.float32)
    assert torch.equal(low, high.bfloat16())


# --- Generators ---------------------------------------------------------------------------------


@KINDS
def test_probes_are_a_function_of_seed_and_count(kind: str, device: torch.device) -> None:
    def probes(*key: int, stream: int = 0) -> Tensor:
        generator = probe_generator(*key, device, stream=stream)
        return draw_probes(kind, 2, (3, 8), generator, torch.float64)

    assert torch.equal(probes(1, 2), probes(1, 2))
    assert torch.equal(probes(1, 2, stream=1), probes(1, 2, stream=1))
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [probes(*key, stream=stream) for key in keys for stream in (0, 1, 2)]
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one, other)


def test_seeds_do_not_collide() -> None:
    seeds = {
        probe_generator(seed, count, CPU, stream=stream).initial_seed()
        for seed in range(10)
        for count in range(20)
        for stream in range(3)
    }
    assert len(seeds) == 600
    # They are not small numbers, which a user may have chosen.
    assert min(seeds) > 10_000


@KINDS
def test_global_stream_is_left_alone(kind: str) -> None:
    state = torch.get_rng_state()
    draw(kind, 2, 3, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_of_one_key_go_on_from_each_other() -> None:
    # The second draw from one generator differs from the first.
    generator = probe_generator(0, 0, CPU)
    first, second = (draw_probes("gaussian", 1, (4,), generator, torch.float64) for _ in range(2))
    assert not torch.equal(first, second)
