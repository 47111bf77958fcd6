"""The pure pieces of a surrogate: a value with another's gradient, a penalty, a solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_snf.surrogate import (
    attach_penalty,
    implicit_solve,
    with_gradient,
    with_surrogate,
)


def test_with_gradient_keeps_the_value_and_its_own_gradient() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    parameter, gradient = torch.ones(2, 2, requires_grad=True), torch.randn(2, 2)
    result = with_gradient(value, parameter, gradient, scale=0.5)
    assert result.item() == 3
    (-4 * result).backward()
    assert value.grad.item() == -4
    assert torch.equal(parameter.grad, -4 * 0.5 * gradient)


def test_with_gradient_nests() -> None:
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    value = with_gradient(torch.tensor(1.0), first, torch.full((2,), 2.0))
    value = with_gradient(value, second, torch.full((3,), 5.0), scale=-1.0)
    (value.expand(4) * torch.tensor([1.0, 2.0, -1.0, 1.0])).sum().backward()
    assert first.grad.tolist() == [6.0] * 2
    assert second.grad.tolist() == [-15.0] * 3


def test_with_gradient_casts_to_the_parameter() -> None:
    parameter = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    value = with_gradient(torch.tensor(1.0), parameter, torch.tensor([1.0, 2.0]))
    value.backward()
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.tolist() == [1.0, 2.0]


def test_gradient_that_changed_before_the_backward_pass_is_an_error() -> None:
    parameter, gradient = torch.ones(2, requires_grad=True), torch.ones(2)
    value = with_gradient(torch.tensor(1.0), parameter, gradient)
    gradient.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_with_gradient_has_no_second_derivative() -> None:
    parameter = torch.ones(2, requires_grad=True)
    value = with_gradient(torch.tensor(1.0), parameter, torch.ones(2))
    (gradient,) = torch.autograd.grad(value, parameter, create_graph=True)
    assert gradient.tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_with_surrogate_keeps_the_value_and_its_own_gradient() -> None:
    value = torch.randn(3, requires_grad=True)
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    result = with_surrogate(value, x.square(), [x])
    assert torch.equal(result, value)
    cotangent = torch.tensor([-1.0, 0.5, 2.0])
    (cotangent * result).sum().backward()
    assert torch.equal(value.grad, cotangent)
    assert torch.equal(x.grad, cotangent * 2 * x.detach())


def test_with_surrogate_of_a_value_that_is_a_constant() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    result = with_surrogate(torch.zeros(2), 5 * x, [x])
    assert torch.equal(result, torch.zeros(2))
    (-3 * result.mean()).backward()
    assert x.grad.tolist() == [-7.5, -7.5]


def test_value_of_a_surrogate_is_of_no_account() -> None:
    x, value = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([1.0, -2.0])
    result = with_surrogate(value, x / 0.0, [x])
    assert torch.equal(result, value)


def test_with_surrogate_reaches_all_that_it_is_computed_from() -> None:
    # Also what is not named: the inputs are there for the error below alone.
    first, second, fixed = torch.ones(2, requires_grad=True), torch.ones(2).requires_grad_(), 3.0
    result = with_surrogate(torch.zeros(2), first * second * fixed, [first, torch.ones(2)])
    result.sum().backward()
    assert first.grad.tolist() == second.grad.tolist() == [3.0, 3.0]


def test_with_surrogate_nests() -> None:
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    value = with_surrogate(torch.zeros(2), 2 * first, [first])
    value = with_surrogate(value, -5 * second, [second])
    value.sum().backward()
    assert first.grad.tolist() == [2.0, 2.0]
    assert second.grad.tolist() == [-5.0, -5.0]


@pytest.mark.parametrize("which", [0, 1])
def test_with_surrogate_has_no_second_derivative(which: int) -> None:
    # In any of the inputs, whichever it is asked for in.
    inputs = [torch.ones(2, requires_grad=True) for _ in range(2)]
    value = with_surrogate(torch.zeros(2), (inputs[0] * inputs[1]).square(), inputs)
    gradients = torch.autograd.grad(value.sum(), inputs, create_graph=True)
    assert [one.tolist() for one in gradients] == [[2.0, 2.0]] * 2
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradients[0].sum(), inputs[which])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_penalty_is_minimized_whatever_the_sign(sign: float) -> None:
    value = torch.randn(3, requires_grad=True)
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    result = attach_penalty(value, x.square())
    assert torch.equal(result, value)
    cotangent = sign * torch.tensor([0.0, 0.5, 2.0])
    (cotangent * result).sum().backward()
    assert torch.equal(value.grad, cotangent)
    assert torch.equal(x.grad, cotangent.abs() * 2 * x.detach())


def solver_of(matrix: Tensor):
    def solve(rows: Tensor, transposed: bool) -> Tensor:
        used = matrix.detach().mT if transposed else matrix.detach()
        return torch.linalg.solve(used, rows.detach().mT).mT

    return solve


@pytest.mark.parametrize("transposed", [False, True])
def test_implicit_solve_is_differentiable_twice(transposed: bool) -> None:
    matrix = (torch.eye(3) + 0.3 * torch.randn(3, 3)).requires_grad_()
    rows = torch.randn(2, 3, requires_grad=True)

    def solve(matrix: Tensor, rows: Tensor) -> Tensor:
        used = matrix.mT if transposed else matrix
        return implicit_solve(used, rows, solver_of(used), lambda _, x, v: v.mT @ x)

    used = matrix.mT if transposed else matrix
    assert torch.allclose(solve(matrix, rows) @ used.mT, rows)
    assert gradcheck(solve, (matrix, rows))
    assert gradgradcheck(solve, (matrix, rows))
