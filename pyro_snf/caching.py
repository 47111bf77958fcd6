"""Remembering what is expensive, and forgetting it as soon as it is no longer true."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_snf.precision import at_least_float32, without_autocast

__all__ = [
    "Memo",
    "PairCache",
    "ParameterCache",
    "ParameterState",
    "TensorMemo",
    "TensorState",
    "fixed_directions",
    "state_of",
    "version",
]

Value = TypeVar("Value")


def version(tensor: Tensor) -> int:
    """Autograd's counter of writes in place; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=16)
def fixed_directions(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same random directions at every call, as rows, shape ``(count, D)``.

    The entries have random signs and distinct sizes, none near 0, and mean square 1 in each row:
    ``‖M w‖²`` is an unbiased estimate of ``‖M‖_F²``.
    """
    generator = np.random.Generator(np.random.PCG64(dim))
    shape = (count, dim)
    rows = generator.uniform(0.5, 1.5, shape) * generator.choice([-1, 1], shape)
    rows /= np.sqrt(np.mean(rows**2, axis=-1, keepdims=True))
    with torch.inference_mode(False):  # for use outside it too
        return torch.tensor(rows, dtype=dtype, device=device)


def _fingerprint(tensor: Tensor) -> Tensor:
    """A copy of a vector; of a matrix, a fixed combination of its columns. O(numel) to compute.

    The combination weighs every column differently, so permuted rows or columns show too. What it
    cannot see is a change below the rounding of a row sum.
    """
    tensor = tensor.detach()
    if tensor.dim() < 2:
        return tensor.clone()
    tensor = at_least_float32(tensor)  # else the products would round away small changes
    with without_autocast(tensor.device):  # which would do the same
        return tensor @ fixed_directions(1, tensor.shape[-1], tensor.dtype, tensor.device)[0]


class TensorState:
    """What a tensor was at one moment, to be compared with what it is now.

    Autograd's version counter alone is not enough: writing to ``parameter.data``, as Pyro's own
    ``ClippedAdam`` does at every step, leaves it where it was. So the contents are compared too.

    :param Tensor tensor: the tensor, dense.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.version = version(tensor)
        # A trace (torch.jit) records operations on tensors, and would record the comparison's
        # outcome as a constant. Within one trace nobody writes to parameters.
        #: A copy of a vector; of a matrix M, its product ``M w`` with a fixed random w.
        self.fingerprint = None if torch.jit.is_tracing() else _fingerprint(tensor)

    def __eq__(self, other: object) -> bool:
        """Whether the tensor was the same at both moments. NaNs never are."""
        if not isinstance(other, TensorState):
            return NotImplemented
        if self.version != other.version:
            return False
        mine, theirs = self.fingerprint, other.fingerprint
        if mine is None or theirs is None:
            return mine is theirs
        if mine.device != theirs.device or mine.dtype != theirs.dtype:
            return False
        return torch.equal(mine, theirs)

    __hash__ = None  # type: ignore[assignment]


#: The states of a transform's parameters, in their order.
ParameterState = tuple[TensorState, ...]


def state_of(parameters: Iterable[Tensor]) -> ParameterState:
    """What the parameters are now. Two such states compare by ``==``."""
    return tuple(map(TensorState, parameters))


class ParameterCache(Generic[Value]):
    """One value that is computed from parameters, kept until one of them changes.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._state: ParameterState | None = None
        self._value: Value | None = None

    def get(self, parameters: Sequence[Tensor], compute: Callable[[], Value]) -> Value:
        """The kept value if the parameters are what they were, else ``compute()``, kept."""
        state = state_of(parameters)
        if self._value is None or self._state != state:
            self._value = compute()
            self._state = state
        return self._value

    def __reduce__(self) -> tuple[type[ParameterCache[Value]], tuple[()]]:
        return type(self), ()


class Memo(Protocol):
    """What else came of the computation of a pair."""

    @property
    def handle(self) -> Tensor:
        """A tensor that is a part of the pair's graph, and dies with it."""


class TensorMemo(NamedTuple):
    """One tensor of the pair's graph, such as the logarithms that the log-determinant sums."""

    handle: Tensor


class PairCache:
    """The last pair ``(x, y = T(x))``, for as long as it is true.

    A pair dies when a parameter changes or is replaced, when ``x`` or ``y`` is written to in place,
    and when the graph between them would be another one now: gradients are recorded and were not
    (a pair from under ``no_grad`` has no graph), or ``x``, ``y`` or a parameter requires a gradient
    and did not; and the other way round; likewise with autocast and inference mode. And it dies
    when a backward pass uses its graph up. Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None
        self._conditions: list[object] = []
        self._parameters: list[Tensor] = []
        self._has_graph = False
        self._state: ParameterState = ()
        self._memo: Memo | None = None

    def store(
        self,
        x: Tensor,
        y: Tensor,
        parameters: Sequence[Tensor],
        state: ParameterState,
        *,
        computed: Tensor,
        memo: Memo | None = None,
    ) -> None:
        """Keep a pair.

        :param parameters: those of the map.
        :param state: their state when the pair was computed.
        :param Tensor computed: the one of the two that was computed from the other.
        :param memo: what else came of it.
        """
        self._pair = (x, y)
        self._conditions = self._current_conditions(parameters)
        self._parameters = list(parameters)
        self._has_graph = computed.grad_fn is not None
        self._state = state
        self._memo = memo
        if self._has_graph and not torch.jit.is_tracing():
            self.end_with(computed)
            if memo is not None:
                self.end_with(memo.handle)

    def end_with(self, tensor: Tensor) -> None:
        """Drop the pair when the gradient of a tensor is computed, which uses the graph up."""
        # Weakly: a strong reference in the graph would keep this cache, which keeps the graph.
        cache = weakref.ref(self)
        tensor.register_hook(lambda gradient: _clear_if_alive(cache))

    def y_of(self, x: Tensor, parameters: Sequence[Tensor], state: ParameterState) -> Tensor | None:
        """The ``y`` that belongs to this very tensor ``x``, or None."""
        if self._pair is not None and self._pair[0] is x and self._is_valid(parameters, state):
            return self._pair[1]
        return None

    def x_of(self, y: Tensor, parameters: Sequence[Tensor], state: ParameterState) -> Tensor | None:
        """The ``x`` that belongs to this very tensor ``y``, or None."""
        if self._pair is not None and self._pair[1] is y and self._is_valid(parameters, state):
            return self._pair[0]
        return None

    def memo_of(
        self, x: Tensor, y: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Memo, ParameterState] | None:
        """What came of the computation of this very pair, and the parameters' state then.

        The parameters may have been written to since, past the version counters: the memo is that
        of the pair all the same.
        """
        pair = self._pair
        if pair is None or self._memo is None or pair[0] is not x or pair[1] is not y:
            return None
        return (self._memo, self._state) if self._is_under_conditions(parameters) else None

    def _is_valid(self, parameters: Sequence[Tensor], state: ParameterState) -> bool:
        if not self._is_under_conditions(parameters):
            return False
        assert self._pair is not None
        if self._pair[0].is_cuda and self._has_graph:
            # To compare contents would be to wait for the device. In training there is no need: a
            # backward pass, after which parameters are written to, ends the pair.
            return [one.version for one in state] == [one.version for one in self._state]
        return state == self._state

    def _is_under_conditions(self, parameters: Sequence[Tensor]) -> bool:
        if self._current_conditions(parameters) != self._conditions:
            return False
        return all(map(operator.is_, parameters, self._parameters))

    def _current_conditions(self, parameters: Sequence[Tensor]) -> list[object]:
        assert self._pair is not None
        x, y = self._pair
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(x.device.type),
            version(x),
            version(y),
            x.requires_grad,
            y.requires_grad,
            *[tensor.requires_grad for tensor in parameters],
        ]

    def __reduce__(self) -> tuple[type[PairCache], tuple[()]]:
        return type(self), ()


def _clear_if_alive(reference: weakref.ref[PairCache]) -> None:
    cache = reference()
    if cache is not None:
        cache.clear()
