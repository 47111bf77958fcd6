"""Where tensors are not plain: traces, functional transforms, and hooks on what autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "has_saved_tensor_hooks",
    "is_batched_gradient",
    "is_plain",
    "is_recomputing",
    "is_traced",
    "is_transformed",
    "is_wrapped",
    "run_eagerly",
    "without_saved_tensor_hooks",
]

_functorch = torch._C._functorch
_VMAP = _functorch.TransformType.Vmap

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


def is_traced() -> bool:
    """Whether no decision can depend on the values of tensors.

    So it is where operations are recorded, to be run later with other values (torch.jit,
    torch.compile, torch.export), or run for many values at once (torch.func.vmap).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if not is_transformed():
        return False
    return any(level.key() == _VMAP for level in _functorch.get_interpreter_stack())


def is_transformed() -> bool:
    """Whether a functional transform of torch.func is active: grad, vmap, …"""
    # There is no public way to ask; Function.apply itself asks like this.
    return torch._C._are_functorch_transforms_active()


def has_saved_tensor_hooks() -> bool:
    """Whether hooks replace what autograd saves, as in activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_plain() -> bool:
    """Whether operations are done here and now, once: neither traced nor transformed."""
    return not (is_traced() or is_transformed())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a functional transform is with respect to a tensor, or a function of it."""
    return isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor)


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether a tensor stands for those of ``is_grads_batched=True``."""
    return _functorch.is_legacy_batchedtensor(tensor)


def is_recomputing() -> bool:
    """Whether activation checkpointing evaluates a forward pass again, within a backward pass."""
    return has_saved_tensor_hooks() and torch._C._current_graph_task_id() != -1


def without_saved_tensor_hooks() -> AbstractContextManager[Any]:
    """A context in which autograd saves tensors as they are.

    For graphs that are differentiated within a forward pass: under activation checkpointing that
    would evaluate the forward pass again, and so on without end.
    """
    return saved_tensors_hooks(_same, _same) if has_saved_tensor_hooks() else _NO_CONTEXT


def _same(value: Tensor) -> Tensor:
    return value


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_eagerly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's result, computed outside of the graph that torch.compile records.

    For what depends on the values of tensors, and keeps a state.
    """
    return function(*arguments)
