"""An error of the backward pass where a gradient is not finite, before an optimizer sees it.

A value that is not finite passes through the layers, so that the loss shows it. A gradient must
not: an optimizer would write it to the parameters, and all later losses were NaN. (Stacks of layers
do not wait for the backward pass if their input is finite and their output is not: Pyro's check of
the latter would be an error that does not know where it began.)

Gradients that are not finite stay so on their way back through a flow. So it is enough to look at
the last gradient of a backward pass, that in the output of the first layer: at its norm, as squares
of gradients are what Adam keeps. What lies between, the outputs of all layers, is looked at only
where it is bad, to name the layer in which it began. Rows that are not finite, but of which the
loss is no function, do no harm.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_snf.precision import singular
from pyro_snf.processes import is_dtensor
from pyro_snf.tracing import has_saved_tensor_hooks, is_batched_gradient, is_plain

__all__ = ["check_gradient", "check_value"]

_BAD = "NaN, infinite, or too large for its square to be a number"

# Of the metadata of a node of autograd's graph, which is neither copied nor saved with a tensor.
_KEY = "pyro_snf.gradient_check"


def check_gradient(layer: nn.Module, source: Tensor, result: Tensor) -> None:
    """Let the backward pass raise an error if a gradient on its way through a layer is not finite.

    Not on a GPU, for which it would wait. Not in what is traced or evaluated again, nor for
    float16 and autocast: gradients that overflow are to be expected there, and a gradient scaler
    skips them.

    :param layer: named in the error.
    :param Tensor source: its input.
    :param Tensor result: its output.
    :raises torch.linalg.LinAlgError: in the backward pass, with what helps.
    """
    if not is_plain() or has_saved_tensor_hooks():
        return
    before: Any = source.grad_fn
    node: Any = result.grad_fn
    if node is None:
        return
    check = None if before is None else before.metadata.get(_KEY)
    if check is None:
        device = result.device
        if device.type == "cuda" or torch.is_autocast_enabled(device.type):
            return
        if result.dtype == torch.float16 or is_dtensor(result):
            return
        check = _Check(before)
        result.register_hook(check)
    # Weakly, and detached: a strong reference in the graph would keep what keeps the graph.
    check.calls.append(_Call(weakref.ref(layer), source.detach(), result.detach()))
    node.metadata[_KEY] = check


def check_value(result: Tensor) -> None:
    """Raise if the output of some layers is not finite, though their input is.

    Where :func:`check_gradient` has been called for the layers.

    :param Tensor result: a function of the last output.
    :raises torch.linalg.LinAlgError: which names the layer where it began.
    """
    if not is_plain() or result.grad_fn is None or result.is_cuda or _is_fine(result):
        return
    calls = _calls_before(result.grad_fn)
    if any(not _is_fine(call.result) for call in calls) and _is_fine(calls[0].source):
        raise _error(calls)


class _Call(NamedTuple):
    layer: weakref.ref[nn.Module]
    source: Tensor
    result: Tensor


class _Check:
    """The hook of the first of some layers of which each takes the output of another one.

    :param before: the node of the first layer's input, None for none.
    """

    def __init__(self, before: Any) -> None:
        self.before = before
        self.calls: list[_Call] = []

    def __call__(self, gradient: Tensor | None) -> None:
        # What the graph kept after its backward pass would be memory lost. So a second pass through
        # it is not checked.
        calls, self.calls = self.calls, []
        if not calls or gradient is None:  # which stands for 0
            return
        if not is_plain() or is_batched_gradient(gradient):
            return
        if not _is_fine(gradient):
            raise _error([*_calls_before(self.before), *calls])


def _is_fine(tensor: Tensor) -> bool:
    return math.isfinite(torch.linalg.vector_norm(tensor.detach()).item())


def _calls_before(node: Any) -> list[_Call]:
    """The calls of which a node of autograd's graph is a function, in their order."""
    seen, checks, nodes = {None}, [], [node]
    while nodes:
        node = nodes.pop(0)
        if node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            check = node.metadata.get(_KEY)
            if check is not None and check not in checks:
                checks.append(check)
    return [call for check in reversed(checks) for call in check.calls]


def _error(calls: list[_Call]) -> torch.linalg.LinAlgError:
    """The error of the first layer whose output is not finite; else of the last one with such a
    gradient."""
    for layer, source, result in calls:
        if not _is_fine(source):
            return singular(f"{layer()}: its input is {_BAD}")
        if not _is_fine(result):
            return singular(f"{layer()}: its output is {_BAD}; its input is finite")
    last = next((call for call in reversed(calls) if _has_bad_gradient(call)), calls[0])
    return singular(f"{last.layer()}: its gradient is {_BAD}; all outputs are finite")


def _has_bad_gradient(call: _Call) -> bool:
    layer = call.layer()
    parameters = [] if layer is None else layer.parameters()
    return not all(one.grad is None or _is_fine(one.grad) for one in parameters)
