"""A "cuda" device for a CPU build of torch: real numbers, errors for mixed devices, late copies.

Its tensors say that they are on ``cuda:0``, and their numbers lie in the host's memory. What a GPU
does otherwise than a CPU, as far as a program's results depend on it, it does too:

- An operation on tensors of two devices is an error, and so is a generator of the other device.
- What makes the host wait for the device (``.item()``, a blocking copy, a Boolean index, a checked
  factorization) emits torch's own warning under ``torch.cuda.set_sync_debug_mode("warn")``, at the
  line of the library that is responsible.
- A copy to the host with ``non_blocking=True`` holds NaN or nonsense until the host has waited for
  it, unless :data:`copies_are_late` is False.

Kernels, streams and speed are not simulated. The device's numbers are those of the CPU, to the last
digit, and its random numbers are those of the CPU's generators.

:func:`install` replaces parts of torch for the rest of the process: use one of its own, as
``tests/test_simulated_cuda.py`` does.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.cpp_extension import include_paths

#: Set in the environment of a process whose ``tests/conftest.py`` is to call :func:`install`.
VARIABLE = "PYRO_SNF_SIMULATED_CUDA"

_SOURCE = Path(__file__).with_suffix(".cpp")
_LIBRARY = str(Path(__file__).parents[1] / "pyro_snf") + os.sep

_CUDA = torch.device("cuda", 0)
_Generator = torch.Generator

# Operations that wait for the device, besides those whose results are Python's own numbers.
_WAITING = {
    *("aten::nonzero", "aten::masked_select", "aten::repeat_interleave"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
    *("aten::_linalg_check_errors", "aten::_linalg_eigh", "aten::_linalg_eigvals"),
    *("aten::linalg_eig", "aten::_linalg_svd", "aten::linalg_lstsq"),
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

#: Whether copies that are not waited for arrive as late as they may.
copies_are_late = True

_late_copies: list[tuple[Tensor, Tensor]] = []
_simulated_generators: set[int] = set()
_warns = False


class SimulatedTensor(torch.Tensor):
    """A tensor on the device, whose numbers are in a tensor on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> SimulatedTensor:
        # Below autograd nobody heeds the marks of lazy conjugates and negatives.
        values = values.detach().resolve_conj().resolve_neg()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_CUDA,
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **kwargs: object) -> str:
        return f"{self.values!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = SimulatedTensor(self.values.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        _wait("tolist")
        return self.values.tolist()


class _SimulatedGenerator(_Generator):
    """A generator of the CPU that says it is one of the device."""

    device = _CUDA

    def __init__(self) -> None:
        _simulated_generators.add(self._cdata)

    def __del__(self) -> None:
        _simulated_generators.discard(self._cdata)


class _EitherGenerator(_Generator):
    """``torch.Generator``, of either device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        is_simulated = torch.device(device).type == "cuda"
        return _SimulatedGenerator() if is_simulated else _Generator.__new__(_Generator, device)


class _Event:
    """``torch.cuda.Event``: when it has happened, the copies that precede it have arrived."""

    def __init__(self, **kwargs: object) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: object = None) -> None:
        self._copies = list(_late_copies)

    def query(self) -> bool:
        return not any(one is copy for one in _late_copies for copy in self._copies)

    def synchronize(self) -> None:
        for copy in self._copies:
            _arrive(copy)


class _Mode(TorchDispatchMode):
    """Sees the operations that have no tensor of the device among their arguments, too."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports all of torch's compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _arrive(copy: tuple[Tensor, Tensor]) -> None:
    for index, one in enumerate(_late_copies):
        if one is copy:
            del _late_copies[index]
            copy[0].copy_(copy[1])
            return


def _wait(operation: str) -> None:
    """The host waits for all that the device has been told to do."""
    for copy in list(_late_copies):
        _arrive(copy)
    if not _warns:
        return
    frame = sys._getframe(1)
    caller = None
    while frame is not None and caller is None:
        caller = frame if frame.f_code.co_filename.startswith(_LIBRARY) else None
        frame = frame.f_back
    name, line = (
        ("elsewhere", 0) if caller is None else (caller.f_code.co_filename, caller.f_lineno)
    )
    message = f"called a synchronizing CUDA operation: {operation}"
    warnings.warn_explicit(message, UserWarning, name, line)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and those in lists and tuples."""
    for one in values:
        if type(one) in (list, tuple):
            yield from _flat(one)
        else:
            yield one


def _map(fn: Callable[[Any], Any], value: Any) -> Any:
    """A function of a value, or of those in lists and tuples."""
    if type(value) in (list, tuple):
        return type(value)(_map(fn, one) for one in value)
    return fn(value)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, SimulatedTensor) else value


def _simulated(value: Any) -> Any:
    return SimulatedTensor(value) if isinstance(value, Tensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an operation of torch on the values."""
    parts = [*_flat(args), *_flat(kwargs.values())]
    own = [one for one in parts if isinstance(one, SimulatedTensor)]
    device = kwargs.get("device")
    on_device = bool(own) if device is None else device.type == "cuda"
    for one in parts:
        if isinstance(one, _Generator) and (one._cdata in _simulated_generators) != on_device:
            raise RuntimeError(f"{func}: the generator is not one of the tensor's device")
    if kwargs.get("pin_memory"):
        if on_device:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        kwargs = {**kwargs, "pin_memory": False}
    if not own and not on_device:
        return func(*args, **kwargs)

    name = func._schema.name
    others = [one for one in parts if type(one) is not SimulatedTensor and isinstance(one, Tensor)]
    if own and name in _WAITING:
        _wait(name)
    if name == "aten::copy_" and own and others:
        return _copy(*args, **kwargs)
    if own and name in _INDEXING:
        _check_indices(args[1])
        if len(args) > 2 and not isinstance(args[2], SimulatedTensor):
            _wait("a number written to indices")
    elif own and any(one.dim() > 0 for one in others):
        found = [f"{one.device.type} {tuple(one.shape)}" for one in [*own, *others]]
        raise RuntimeError(f"expected all tensors on one device; {name} got {', '.join(found)}")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::_to_copy" and on_device != bool(own) and args[0].numel() > 0:
        return _copy_to_other_device(func, args, kwargs, on_device)

    own_args = [_map(_values, one) for one in args]
    result = func(*own_args, **{key: _map(_values, one) for key, one in kwargs.items()})
    if own and isinstance(result, bool | int | float):
        _wait(name)
    if not on_device:
        return result
    wrapped = _map(_simulated, result)
    has_aliases = any(one.alias_info is not None for one in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if has_aliases else wrapped


def _check_indices(indices: Any) -> None:
    for index in _flat([indices]):
        if isinstance(index, SimulatedTensor):
            if index.dtype == torch.bool:
                _wait("a Boolean index")
        elif isinstance(index, Tensor) and index.dim() > 0:
            _wait("an index on the CPU")


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(source)`` from one device to the other."""
    if source.numel() > 0 and not non_blocking:
        _wait("copy_")
    elif not isinstance(target, SimulatedTensor) and copies_are_late:
        _postpone(target, source)
        return target
    _values(target).copy_(_values(source))
    return target


def _copy_to_other_device(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool
) -> Tensor:
    if not kwargs.pop("non_blocking", False):
        _wait("_to_copy")
        result = func(*map(_values, args), **kwargs)
    else:
        result = func(*map(_values, args), **kwargs)
        if not on_device and copies_are_late:
            _postpone(result, SimulatedTensor(result.clone()))
    return SimulatedTensor(result) if on_device else result


def _postpone(target: Tensor, source: Tensor) -> None:
    """Copy to the host later; until then the target's contents are not what they seem."""
    _late_copies.append((target, _values(source).to(target.dtype, copy=True)))
    target.fill_(torch.nan if target.is_floating_point() else 1)


def _build() -> str:
    """The compiled guard, made at the first use."""
    source = _SOURCE.read_bytes()
    library = os.path.join(os.path.dirname(torch.__file__), "lib")
    key = hashlib.sha256(source + f"{torch.__version__} {library}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"pyro-snf-simulated-cuda-{os.getuid()}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [str(compiler()), "-std=c++20", "-w", "-shared", "-fPIC", str(_SOURCE)]
            command += [f"-I{path}" for path in include_paths()]
            command += [f"-L{library}", f"-Wl,-rpath,{library}", "-lc10", "-ltorch_cpu"]
            command += ["-o", str(built)]
            subprocess.run(command, check=True)
            built.replace(target)  # at once: other processes may do the same
    return str(target)


def environment() -> dict[str, str]:
    """The environment of a process that is to have the device."""
    # Loaded first: torch asks only once what devices there are.
    return {**os.environ, VARIABLE: "1", "LD_PRELOAD": _build()}


def compiler() -> str | None:
    """The C++ compiler; None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def install() -> None:
    """Give the device to a process that was started with :func:`environment`."""
    # torch's optimizers import the compiler, which is to see torch as it is.
    importlib.import_module("torch._dynamo")
    torch._C._set_only_lift_cpu_tensors(True)

    def set_sync_debug_mode(mode: str | int) -> None:
        global _warns
        _warns = mode in ("warn", 1)

    def nothing(*args: object, **kwargs: object) -> None:
        """What has no counterpart here: the device's random stream is the CPU's."""

    torch.Generator = _EitherGenerator
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cuda = torch.cuda
    cuda.Event, cuda.set_sync_debug_mode = _Event, set_sync_debug_mode
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.synchronize = lambda device=None: _wait("synchronize")
    cuda._lazy_init = cuda.manual_seed = cuda.manual_seed_all = nothing
    cuda.get_rng_state = lambda device=None: torch.zeros(0, dtype=torch.uint8)
    cuda.set_rng_state = nothing
    _Mode().__enter__()
