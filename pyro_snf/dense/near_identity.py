"""The matrix ``A = I + Θ/√D`` that dense layers are parametrized by.

With a raw matrix, one Adam step of rate ``lr`` moves it by ``lr·D`` in Frobenius norm against a
norm of ``√D``, so a good learning rate shrinks as D grows. In this form it does not: a step on
``Θ`` at rate ``lr·√D`` equals a step on a raw matrix at ``lr``.

Vectors are rows here, as PyTorch stores batches. No function but :func:`matrix` builds ``A``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_snf.precision import at_least_float32

__all__ = ["add_trace", "log_abs_det", "matrix", "multiply", "multiply_transposed"]


def matrix(theta: Tensor) -> Tensor:
    """``A = I + Θ/√D``, shape ``(D, D)``."""
    dim = theta.shape[-1]
    eye = torch.eye(dim, dtype=theta.dtype, device=theta.device)
    return torch.add(eye, theta, alpha=1 / math.sqrt(dim))


def log_abs_det(theta: Tensor) -> Tensor:
    """``log|det A|``, shape ``()``, by ``slogdet``: exact, differentiable, O(D³)."""
    return torch.linalg.slogdet(matrix(at_least_float32(theta))).logabsdet


def multiply(theta: Tensor, rows: Tensor) -> Tensor:
    """``A x`` for every row ``x`` of ``rows``, shape ``(B, D)``."""
    # The rows are scaled, not the product: autograd would scale the D² gradient in another pass.
    return torch.addmm(rows, rows / math.sqrt(theta.shape[-1]), theta.mT)


def multiply_transposed(theta: Tensor, rows: Tensor) -> Tensor:
    """``Aᵀ x`` for every row ``x`` of ``rows``, shape ``(B, D)``."""
    return torch.addmm(rows, rows / math.sqrt(theta.shape[-1]), theta)


def add_trace(offset: Tensor, inverse_t: Tensor, theta: Tensor) -> Tensor:
    """``offset + tr(R Θ)/√D`` from ``Rᵀ`` (``inverse_t``) and ``Θ``, exactly and in O(D²).

    With ``tr R`` in the offset that is ``tr(R A)``. The identity's share is summed apart: next to
    D ones, a running sum in float32 over D² products with Θ would lose the small ones.

    :param Tensor offset: shape ``()``, in float64.
    :return: shape ``()``, in the type of ``inverse_t``.
    """
    product = torch.dot(inverse_t.view(-1), theta.view(-1))
    return torch.add(offset, product, alpha=1 / math.sqrt(theta.shape[-1])).to(inverse_t.dtype)
