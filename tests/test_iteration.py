"""Iterative solution, event by event: convergence, what is not finite, the exact solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_snf.iteration import Iterate, refine_linear_solution
from tests.registry import relative_error

DIM = 6

# Float64, condition numbers below 10.
EXACT = 1e-12


class System:
    """``A u = h`` with a random A, an approximate inverse, and the h that are solved for exactly.

    :param float error: of the approximate inverse, relative to the exact one.
    """

    def __init__(self, error: float, dtype: torch.dtype = torch.float64) -> None:
        noise = torch.randn(2, DIM, DIM)
        noise /= torch.linalg.matrix_norm(noise, 2)[:, None, None]
        self.matrix = (torch.eye(DIM) + 0.5 * noise[0]).to(dtype)
        inverse = torch.linalg.inv(self.matrix.double())
        self.inverse = (inverse @ (torch.eye(DIM) + error * noise[1])).to(dtype)
        self.exactly: list[Tensor] = []

    def solve_exactly(self, h: Tensor) -> Tensor:
        self.exactly.append(h)
        return torch.linalg.solve(self.matrix, h.mT).mT

    def refine(self, h: Tensor) -> Tensor:
        return refine_linear_solution(
            lambda u: u @ self.matrix.mT,
            lambda h: h @ self.inverse.mT,
            self.solve_exactly,
            h,
            norm=torch.linalg.matrix_norm(self.matrix, 2),
        )

    def residuals(self, u: Tensor, h: Tensor) -> Tensor:
        """``‖h − A u‖/‖u‖``, shape ``(B,)``."""
        residual = h.double() - u.double() @ self.matrix.double().mT
        return residual.norm(dim=-1) / u.double().norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("error", [0.0, 1e-6, 0.1, 0.4])
def test_refined_solution_is_right_to_rounding(error: float, dtype: torch.dtype) -> None:
    system, h = System(error, dtype), torch.randn(20, DIM, dtype=dtype)
    u = system.refine(h)
    assert u.dtype == dtype
    assert (system.residuals(u, h) < 4 * torch.finfo(dtype).eps).all()
    assert not system.exactly


def test_events_do_not_depend_on_each_other() -> None:
    system, h = System(0.1), torch.randn(6, DIM)
    h[:4] *= torch.tensor([1, 1e100, 1e-100, 0]).view(4, 1)
    h[4, 2], h[5, 0] = math.nan, -math.inf
    u = system.refine(h)
    for index in (0, 1, 2):
        alone = system.refine(h[index : index + 1])[0]
        assert relative_error(u[index], alone) < EXACT
        assert system.residuals(u[index], h[index]) < 1e-14
    assert not u[3].any()
    assert torch.isnan(u[4:]).all()
    assert torch.isnan(system.refine(h[4:])).all()
    assert not system.exactly


def unit_scale(x: Tensor, rows: Tensor) -> Tensor:
    return torch.ones(len(rows))


@pytest.mark.parametrize("spoiled", ["one direction", "NaN", "everything"])
def test_events_that_do_not_converge_are_solved_exactly(spoiled: str) -> None:
    system, h = System(0.0), torch.randn(5, DIM)
    h[:, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])  # the direction in which P is no inverse
    h[3, 1] = math.nan
    if spoiled == "everything":
        system.inverse = torch.randn(DIM, DIM)
    else:
        system.inverse[:, 0] = math.nan if spoiled == "NaN" else 5.0
    u = system.refine(h)
    others = [0, 1, 2, 4]
    assert relative_error(u[others], torch.linalg.solve(system.matrix, h[others].mT).mT) < EXACT
    assert torch.isnan(u[3]).all()
    (exactly,) = system.exactly
    if spoiled == "one direction":
        assert torch.equal(exactly, h[[1, 4]])
    assert torch.isfinite(exactly).all()  # an h that is not finite is no business of the solver


def test_nonlinear_events_converge_each_at_its_own_pace() -> None:
    # x + c sin x = y by x ← x + (y − F(x)): linear, with the rate c.
    rates, y = torch.tensor([0.0, 0.1, 0.4, 0.4, 5.0]), torch.full((5, 2), 0.7)
    y[3, 0] = math.nan
    asked: list[list[int]] = []

    def evaluate(x: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return x + rates[rows, None] * x.sin()

    state = Iterate(evaluate, y, lambda y: y / 2, scale=unit_scale, tolerance=1e-10)
    assert state.unsolved(state.all_rows()).tolist() == [0, 1, 2, 4]
    state.iterate(lambda residual, rows: residual)
    solved = [0, 1, 2]
    x = state.solution()
    assert (x + rates[:, None] * x.sin() - y)[solved].norm() < 1e-9
    assert torch.isnan(x[3]).all()
    # A residual that is not halved ends the iteration, and the last x is kept.
    assert state.unsolved(state.all_rows()).tolist() == [4]
    assert (x[4] == 0.35).all()
    counts = [sum(row in rows for rows in asked) for row in range(5)]
    assert counts[0] < counts[1] < counts[2]
    assert counts[4] == 2


@pytest.mark.parametrize(
    ("trial", "factor", "moves"),
    [(0.6, 0.5, True), (0.4, 0.5, False), (0.4, 1.0, True), (-0.1, 1.0, False)],
)
def test_trial_reduces_the_residual_or_is_dropped(trial: float, factor: float, moves: bool) -> None:
    start, y = torch.tensor([[0.0], [1.0], [math.inf]]), torch.ones(3, 1)
    state = Iterate(lambda x, rows: x, y, lambda y: start, scale=unit_scale, tolerance=1e-3)
    assert state.x.tolist() == [[0], [1], [0]]  # to start from infinity would lead nowhere
    taken = state.try_move(torch.tensor([0, 1]), torch.full((2, 1), trial), factor)
    assert taken.tolist() == [moves, False]
    assert state.solution().tolist() == [[trial if moves else 0.0], [1], [0]]
    assert state.try_move(torch.tensor([2]), torch.full((1, 1), math.nan), 1.0).tolist() == [False]
