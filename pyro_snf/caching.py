"""Caches of what is expensive to compute, dropped as soon as what it was computed from changes."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache, singledispatch
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_snf.precision import at_least_float32, without_autocast
from pyro_snf.tracing import has_saved_tensor_hooks, is_traced, is_transformed

__all__ = [
    "Memo",
    "PairCache",
    "ParameterState",
    "StateCache",
    "TensorMemo",
    "TensorState",
    "can_remember",
    "fingerprint_of",
    "fixed_directions",
    "state_of",
    "version",
]

Value = TypeVar("Value")

# Integers of as many bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SUMS = {2: torch.int32, 4: torch.int32, 8: torch.int64}

# Values of one state that a cache keeps, such as the factors for images of several sizes.
_MAX_VALUES = 4


def version(tensor: Tensor) -> int:
    """Autograd's counter of writes in place; inference tensors have none."""
    # The name is private, but is the one that torch's own documentation of autograd gives.
    return -1 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=16)
def fixed_directions(
    count: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """The same random vectors at every call, each of shape ``(D,)``.

    The entries have random signs and distinct sizes, none near 0, and mean square 1 in each vector:
    ``‖M w‖²`` is an unbiased estimate of ``‖M‖_F²``.
    """
    generator = np.random.Generator(np.random.PCG64(dim))
    shape = (count, dim)
    rows = generator.uniform(0.5, 1.5, shape) * generator.choice([-1, 1], shape)
    rows /= np.sqrt(np.mean(rows**2, axis=-1, keepdims=True))
    with torch.inference_mode(False):  # for use outside it too
        return torch.tensor(rows, dtype=dtype, device=device).unbind()


@singledispatch
def fingerprint_of(tensor: Tensor) -> Tensor:
    """A copy of a vector; of a matrix, a fixed combination of its columns. O(numel).

    The combination gives every column another weight, so that permuted rows or columns show too.
    It does not show changes below the rounding of a row sum. A tensor whose parts lie on several
    devices registers a function of its own.
    """
    tensor = tensor.detach()
    if tensor.dim() < 2:
        return tensor.clone()
    if tensor.dim() > 2:
        tensor = tensor.flatten(1)
    # In half precision, and under autocast, the products would round away small changes.
    tensor = at_least_float32(tensor)
    (direction,) = fixed_directions(1, tensor.shape[-1], tensor.dtype, tensor.device)
    with without_autocast(tensor.device):
        return torch.mv(tensor, direction)


def can_remember() -> bool:
    """Whether a value may be kept for later here, and looked up.

    Not in a program that torch.compile records, nor in the functional transforms of torch.func,
    whose tensors do not outlive them. And not under hooks on saved tensors: activation
    checkpointing evaluates a layer twice, and both times the same tensors have to be saved.
    """
    return not (torch.compiler.is_compiling() or is_transformed() or has_saved_tensor_hooks())


class TensorState:
    """What a tensor was at one moment, to be compared with what it is now.

    Autograd's version counter alone is not enough. Writes to ``parameter.data``, as Pyro's own
    ``ClippedAdam`` makes them, do not change it, nor do the steps of torch's fused optimizers. So
    the contents are compared too.

    :param Tensor tensor: the tensor, dense.
    """

    def __init__(self, tensor: Tensor) -> None:
        traced = is_traced()
        self.version = -1 if traced else version(tensor)
        # A trace records operations on tensors, and would record the comparison's outcome as a
        # constant. Within one trace no parameter is written to.
        #: A copy of a vector; of a matrix M, its product ``M w`` with a fixed random w.
        self.fingerprint = None if traced else fingerprint_of(tensor)

    def __eq__(self, other: object) -> bool:
        """Whether the tensor was the same at both moments. NaNs never are."""
        if self is other:
            return True
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


class StateCache(Generic[Value]):
    """Values computed from some tensors, kept until one of the tensors changes.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        # One attribute, which every method reads once, and a dictionary that is not written to:
        # other threads may replace it.
        self._entry: tuple[object, dict[Hashable, Value]] = None, {}

    def get(self, state: object, compute: Callable[[], Value], key: Hashable = None) -> Value:
        """The cached value of a key if the state is what it was, else ``compute()``, cached.

        :param state: of the tensors, from :class:`TensorState` or :func:`state_of`.
        :param key: distinguishes values of the same state; the latest four are kept.
        """
        known, values = self._entry
        if known != state:
            values = {}
        value = values[key] if key in values else compute()
        if not is_transformed():  # whose tensors do not outlive it
            others = [one for one in values.items() if one[0] != key]
            self._entry = state, dict([*others[1 - _MAX_VALUES :], (key, value)])
        return value

    def __reduce__(self) -> tuple[type[StateCache[Value]], tuple[()]]:
        return type(self), ()


class Memo(Protocol):
    """A by-product of the computation of a pair that its log-determinant can use."""

    @property
    def handle(self) -> Tensor | None:
        """A tensor of the pair's graph, whose backward pass drops the pair; None for none."""


class TensorMemo(NamedTuple):
    """One tensor of the pair's graph, such as the logarithms that the log-determinant sums."""

    handle: Tensor


def _contents(tensor: Tensor) -> tuple[Tensor, ...]:
    """What to compare a tensor with later, to see whether it has been written to.

    The sum of all entries, their bits taken for integers, which shows the smallest change of one.
    And a fingerprint, which shows entries that have changed places, as rows of data may.
    """
    bits = tensor.detach().resolve_neg().view(_INTEGERS[tensor.element_size()])
    total = bits.sum(dtype=_SUMS[tensor.element_size()])
    return (total,) if tensor.grad_fn is not None else (total, fingerprint_of(tensor))


class _Pair(NamedTuple):
    """A pair, and what it depends on."""

    x: Tensor
    y: Tensor
    contents: tuple[Tensor, ...] | None
    conditions: list[object]
    parameters: list[Tensor]
    state: ParameterState
    has_graph: bool
    memo: Memo | None

    def is_valid(self, parameters: Sequence[Tensor], state: ParameterState) -> bool:
        if not (self.is_under_conditions(parameters) and self._has_contents()):
            return False
        if self.x.is_cuda and self.has_graph:
            # Comparing contents would wait for the device. In training it is not necessary: the
            # backward pass, after which parameters are written to, drops the pair.
            return [one.version for one in state] == [one.version for one in self.state]
        return state == self.state

    def is_under_conditions(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the modes have not changed, nor the tensors, by autograd's counters."""
        if _conditions_of(self.x, self.y, parameters) != self.conditions:
            return False
        return all(map(operator.is_, parameters, self.parameters))

    def _has_contents(self) -> bool:
        if self.contents is None or is_traced():
            return self.contents is None
        return all(map(torch.equal, (*_contents(self.x), *_contents(self.y)), self.contents))


def _conditions_of(x: Tensor, y: Tensor, parameters: Sequence[Tensor]) -> list[object]:
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(x.device.type),
        version(x),
        version(y),
        x.requires_grad,
        y.requires_grad,
        *(tensor.requires_grad for tensor in parameters),
    ]


class PairCache:
    """The last pair ``(x, y = T(x))``, for as long as it is valid.

    To be used where :func:`can_remember` says so.

    A pair is dropped when a parameter changes or is replaced, when the contents of ``x`` or ``y``
    change (autograd's counter does not see writes to the memory that a tensor shares with a NumPy
    array; it is relied on for GPUs where gradients are recorded), and when the graph between them
    would now be a different one: gradients are recorded and were not (a pair from under ``no_grad``
    has no graph), or ``x``, ``y`` or a parameter requires a gradient and did not; and the other way
    round; likewise with autocast and inference mode. It is also dropped when a backward pass frees
    its graph. Copies and pickles of a cache are empty.
    """

    # One attribute, which every method reads once: other threads may replace it.
    _pair: _Pair | None = None

    def clear(self) -> None:
        self._pair = None

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
        :param memo: a by-product of the computation.
        """
        has_graph = computed.grad_fn is not None
        # Where gradients are recorded, a GPU is not waited for.
        traced = is_traced()
        is_compared = not (traced or (x.is_cuda and torch.is_grad_enabled()))
        contents = (*_contents(x), *_contents(y)) if is_compared else None
        conditions = _conditions_of(x, y, parameters)
        self._pair = _Pair(x, y, contents, conditions, list(parameters), state, has_graph, memo)
        if has_graph and not traced:
            self.drop_at_backward(computed)
            handle = None if memo is None else memo.handle
            if handle is not None and handle.requires_grad:
                self.drop_at_backward(handle)

    def drop_at_backward(self, tensor: Tensor) -> None:
        """Drop the pair when the gradient of a tensor is computed, which frees the graph."""
        # Weakly: a strong reference in the graph would keep this cache, which keeps the graph.
        cache = weakref.ref(self)
        tensor.register_hook(lambda gradient: _clear_if_alive(cache))

    def y_of(self, x: Tensor, parameters: Sequence[Tensor], state: ParameterState) -> Tensor | None:
        """The ``y`` that belongs to this very tensor ``x``, or None."""
        pair = self._pair
        if pair is None or pair.x is not x:
            return None
        return pair.y if pair.is_valid(parameters, state) else None

    def x_of(self, y: Tensor, parameters: Sequence[Tensor], state: ParameterState) -> Tensor | None:
        """The ``x`` that belongs to this very tensor ``y``, or None."""
        pair = self._pair
        if pair is None or pair.y is not y:
            return None
        return pair.x if pair.is_valid(parameters, state) else None

    def memo_of(self, x: Tensor, y: Tensor, parameters: Sequence[Tensor]) -> Memo | None:
        """The by-product of the computation of this very pair, or None.

        It belongs to the pair even if parameters have been written to since then.
        """
        pair = self._pair
        if pair is None or pair.x is not x or pair.y is not y:
            return None
        return pair.memo if pair.is_under_conditions(parameters) else None

    def state_at(
        self, x: Tensor, y: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[ParameterState | None, Memo | None]:
        """The parameters' state when this very pair was computed, and the by-product.

        Both are None if the parameters are not what they were, and for pairs without a graph. With
        one, a backward pass drops the pair before parameters are written to, so that autograd's
        version counters suffice, which are cheaper than comparing contents.
        """
        pair = self._pair
        if pair is None or pair.x is not x or pair.y is not y or not pair.has_graph:
            return None, None
        for state, parameter in zip(pair.state, parameters, strict=True):
            if state.version != version(parameter):
                return None, None
        return (pair.state, pair.memo) if pair.is_under_conditions(parameters) else (None, None)

    def __reduce__(self) -> tuple[type[PairCache], tuple[()]]:
        return type(self), ()


def _clear_if_alive(reference: weakref.ref[PairCache]) -> None:
    cache = reference()
    if cache is not None:
        cache.clear()
