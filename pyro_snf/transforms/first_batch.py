"""Transforms that the first batch of data initializes."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_snf.caching import version
from pyro_snf.processes import is_dtensor
from pyro_snf.tracing import is_traced
from pyro_snf.transforms.base import InvertibleTransformModule

__all__ = ["FirstBatchTransform", "initializing_nothing"]


class _Local(threading.local):
    initializes = True


_local = _Local()


def initializing_nothing() -> AbstractContextManager[None]:
    """A context in which no batch initializes a layer.

    For log-determinants: with x = T⁻¹(y) by layers that are new, T would be another one if x
    initialized them. Data, from which they are to be initialized, have passed through T before.
    """
    return nullcontext() if is_traced() else _initializing_nothing()  # in traces nothing does


@contextmanager
def _initializing_nothing() -> Iterator[None]:
    before, _local.initializes = _local.initializes, False
    try:
        yield
    finally:
        _local.initializes = before


class FirstBatchTransform(InvertibleTransformModule):
    """A transform whose parameters are set by the first batch that passes through it in training.

    To write one:

    1. Call :meth:`_make_initialized` in ``__init__``, and :meth:`_reset_initialized` in
       ``reset_parameters``.
    2. Define :meth:`initialize`, which begins with :meth:`_check_not_sharded` and ends with
       :meth:`_note_initialized`.
    3. Define :meth:`_is_as_reset`.
    """

    initialized: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if is_dtensor(value):
            self.__dict__["_is_sharded"] = True
        super().__setattr__(name, value)

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_training() and self.is_new():
            self.initialize(x)
        return super().__call__(x)

    @abstractmethod
    def initialize(self, x: Tensor) -> None:
        """Set the parameters from a batch of events."""

    @abstractmethod
    def _is_as_reset(self) -> bool:
        """Whether the parameters are those of ``reset_parameters``."""

    def _make_initialized(self, device: torch.device | str | None) -> None:
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool, device=device))

    def _reset_initialized(self) -> None:
        self.initialized.fill_(False)
        self.clear_cache()
        # The version of ``initialized`` at which it was last found True. To look at its value in
        # every call would be to wait for the GPU in every call.
        self._initialized_version: int | None = None

    def _check_not_sharded(self) -> None:
        if self.__dict__.get("_is_sharded", False):
            # In a forward pass fully_shard puts copies of the parameters in their place, and what
            # is written to these is lost.
            raise RuntimeError(
                f"expected {self} to be initialized before its parameters are sharded: pass a "
                "first batch through the flow, in train() mode, before fully_shard"
            )

    def _note_initialized(self) -> None:
        self.initialized.fill_(True)
        self.clear_cache()

    def _is_training(self) -> bool:
        return (
            self.training
            and torch.is_grad_enabled()
            and all(parameter.requires_grad for parameter in self.parameters())
            and not is_traced()  # a trace would repeat the initialization in every call
            and _local.initializes
        )

    @torch.no_grad()
    def is_new(self) -> bool:
        """Whether the parameters have been set by nothing yet: no batch, and no saved values."""
        if self._has_been_initialized():
            return False
        if self._is_as_reset():
            return True
        self.initialized.fill_(True)
        self._initialized_version = version(self.initialized)
        return False

    def _has_been_initialized(self) -> bool:
        if self._initialized_version == version(self.initialized):
            return True
        if not self.initialized:
            return False
        self._initialized_version = version(self.initialized)
        return True
