"""What all transforms share: a cache that is dropped in time, and an inverse that is a module."""

from __future__ import annotations

import copy
import weakref
from typing import Any, TypeVar

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform
from torch.distributions.constraints import Constraint, dependent_property
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from pyro_snf.caching import Memo, PairCache, ParameterState, can_remember, state_of
from pyro_snf.gradient_check import check_gradient
from pyro_snf.options import check_cache_size, expect, is_dense

__all__ = [
    "InverseTransformModule",
    "InvertibleTransformModule",
    "SafelyCachedTransform",
    "check_image",
    "check_input",
    "with_safe_cache",
]

Self = TypeVar("Self", bound="InvertibleTransformModule")


def check_input(
    transform: Transform,
    x: Tensor,
    event_shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise a ValueError unless ``x`` is a floating, non-empty batch of events.

    :param Transform transform: named in the error.
    :param Tensor x: the input.
    :param event_shape: the trailing shape to expect; ``()`` for elementwise transforms.
    :param dtype: the type to expect, outside autocast; None if any will do.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{transform}: expected a floating-point tensor; got {got}")
    if not is_dense(x):
        layout = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise ValueError(f"{transform}: expected a dense tensor; got {layout}")
    fits = x.shape[max(x.dim() - len(event_shape), 0) :] == torch.Size(event_shape)
    if not fits or x.numel() == 0:
        expected = ", ".join(["...", *map(str, event_shape)])
        raise ValueError(
            f"{transform}: expected a non-empty tensor of shape ({expected}); got {tuple(x.shape)}"
        )
    if dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{transform}: expected dtype {dtype}; got {x.dtype}")


def check_events(
    transform: Transform, x: Tensor, event_dim: int, dtype: torch.dtype | None = None
) -> torch.Size:
    """Raise a ValueError unless ``x`` is a floating, non-empty batch of events of any size.

    :param Transform transform: named in the error.
    :param Tensor x: the input.
    :param int event_dim: the number of dimensions of an event.
    :param dtype: as for :func:`check_input`.
    :return: the shape of an event.
    """
    check_input(transform, x, (), dtype)
    if x.dim() < event_dim:
        raise ValueError(
            f"{transform}: expected at least {event_dim} dimensions; got {tuple(x.shape)}"
        )
    return x.shape[x.dim() - event_dim :]


def broadcast_with_context(
    transform: Transform, shape: torch.Size, event_dim: int, batch_shape: torch.Size
) -> torch.Size:
    """The shape of events whose batch is broadcast with that of a context.

    :param Transform transform: named in the error.
    :param shape: of the input, ``(..., *event)``.
    :param int event_dim: the number of dimensions of an event.
    :param batch_shape: that of the context.
    :raises ValueError: if the batches do not broadcast.
    """
    batch, event = shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]
    try:
        return torch.broadcast_shapes(batch, batch_shape) + event
    except RuntimeError:
        raise ValueError(
            f"{transform}: expected a batch that broadcasts with the context's "
            f"{tuple(batch_shape)}; got {tuple(batch)}"
        ) from None


def check_image(
    transform: Transform,
    x: Tensor,
    num_channels: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise a ValueError unless ``x`` is a floating, non-empty batch of images.

    :param Transform transform: named in the error.
    :param Tensor x: the input, of shape ``(..., C, H, W)``.
    :param num_channels: C; None if any will do.
    :param dtype: as for :func:`check_input`.
    """
    if not is_dense(x):
        check_input(transform, x, ())  # raises
    if x.dim() < 3 or num_channels not in (None, x.shape[-3]):
        channels = "C" if num_channels is None else num_channels
        raise ValueError(
            f"{transform}: expected a non-empty tensor of shape (..., {channels}, H, W); "
            f"got {tuple(x.shape)}"
        )
    check_input(transform, x, tuple(x.shape[-3:]), dtype)


class InvertibleTransformModule(TransformModule):
    """A :class:`~pyro.distributions.TransformModule` for learnable bijections.

    Over Pyro's class it adds:

    - ``T.inv`` is a module as well (:class:`InverseTransformModule`): whatever is handed the
      inverse alone, ``pyro.module`` or a ``PyroModule``, finds the parameters.
    - The pair that is cached between ``T(x)`` and ``T.inv(y)`` is dropped when it stops being
      true: see :class:`~pyro_snf.caching.PairCache`. Copies and pickles carry no cache.
    - :meth:`with_cache` and :meth:`clear_cache`, here and through ``.inv``.
    - A backward pass raises where a gradient is not finite (:mod:`pyro_snf.gradient_check`).

    To write a transform:

    1. Define ``domain``, ``codomain`` and ``extra_repr``.
    2. Define ``_call`` and ``_inverse``, which begin with :func:`check_input`.
    3. Define ``log_abs_det_jacobian``.

    Optional: :meth:`_call_with_memo`, where the log-determinant has something in common with the
    value; :meth:`_map_parameters`, where the value depends on fewer or more tensors than the
    parameters; :meth:`_inverse_is_exact`, where it is approximate; ``forward_shape`` and
    ``inverse_shape``, where shapes change; :attr:`has_continuous_log_det`, for path gradients.
    """

    bijective = True

    #: Whether the path derivative is right: see :mod:`pyro_snf.path_gradient`.
    has_continuous_log_det: bool = False

    #: Whether a gradient that is not finite is an error in training: see
    #: :mod:`pyro_snf.gradient_check`.
    checks_gradients: bool = True

    def __init__(self, cache_size: int = 1) -> None:
        check_cache_size(cache_size)
        super().__init__(cache_size=cache_size)
        self._pair = PairCache()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_not_sharded(cls)

    def __repr__(self) -> str:
        # Transform.__repr__ comes first in the method resolution order, and says nothing.
        return f"{type(self).__name__}({self.extra_repr()})"

    def __dir__(self) -> list[str]:
        # torch.jit looks up all of these names, and "sign" is an error unless T is elementwise.
        return [name for name in nn.Module.__dir__(self) if name != "sign"]

    def __call__(self, x: Tensor) -> Tensor:
        self._update_reparametrized()
        if self._cache_size == 0 or not can_remember():
            y = self._call(x)
            self._check_gradient(x, y)
            return y
        parameters = self._map_parameters()
        state = state_of(parameters)
        y = self._pair.y_of(x, parameters, state)
        if y is None:
            y, memo = self._call_with_memo(x)
            self._pair.store(x, y, parameters, state, computed=y, memo=memo)
            self._check_gradient(x, y)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        self._update_reparametrized()
        if self._cache_size == 0 or not can_remember():
            x = self._inverse(y)
            self._check_gradient(y, x)
            return x
        parameters = self._map_parameters()
        state = state_of(parameters)
        x = self._pair.x_of(y, parameters, state)
        if x is None:
            x = self._inverse(y)
            if self._inverse_is_exact():
                self._pair.store(x, y, parameters, state, computed=x)
            self._check_gradient(y, x)
        return x

    def _check_gradient(self, source: Tensor, result: Tensor) -> None:
        if self.checks_gradients and self.training:
            check_gradient(self, source, result)

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, Memo | None]:
        """``T(x)``, and what :meth:`log_abs_det_jacobian` may want of its computation."""
        return self._call(x), None

    def _memo_of(self, x: Tensor, y: Tensor) -> Any:
        """The by-product of the computation ``y = T(x)``, or None."""
        return self._pair.memo_of(x, y, self._map_parameters()) if can_remember() else None

    def _state_at(self, x: Tensor, y: Tensor) -> tuple[ParameterState | None, Memo | None]:
        """The parameters' state when ``y = T(x)`` was computed, and the by-product, or Nones."""
        if not can_remember():
            return None, None
        return self._pair.state_at(x, y, self._map_parameters())

    def _map_parameters(self) -> list[Tensor]:
        """The tensors on which ``y = T(x)`` depends: a cached pair dies when one changes."""
        return list(self.parameters())

    def _update_reparametrized(self) -> None:
        """Compute anew what torch's prune and weight_norm keep as an attribute.

        They do so in hooks of ``Module.__call__``, which transforms do not pass through.
        """
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm):
                hook(self, ())

    def _inverse_is_exact(self) -> bool:
        """Whether ``_inverse`` may be taken for the inverse of ``_call``, to rounding."""
        return True

    @property
    def inv(self) -> InverseTransformModule:
        """The inverse transform, always the same object; ``T.inv.inv is T``."""
        inverse = self._inv
        return (
            inverse if isinstance(inverse, InverseTransformModule) else InverseTransformModule(self)
        )

    def with_cache(self: Self, cache_size: int = 1) -> Self:
        """This transform with another cache size; it shares parameters, buffers and children."""
        if cache_size == self._cache_size:
            return self
        check_cache_size(cache_size)
        other = self.copy_with_own_cache()
        other._cache_size = cache_size
        return other

    def copy_with_own_cache(self: Self) -> Self:
        """This transform with a cache of its own; it shares parameters, buffers and children."""
        other = copy.copy(self)  # shares their dictionaries
        other._pair = PairCache()
        other.__dict__["_inv"] = None
        return other

    def train(self: Self, mode: bool = True) -> Self:
        self._pair.clear()  # the other mode may have another graph between x and y
        return super().train(mode)

    def clear_cache(self) -> None:
        """Drop the cached pair."""
        self._pair.clear()


def check_not_sharded(cls: type) -> None:
    """Raise a TypeError for a class that ``fully_shard`` makes of the class of a transform.

    It gathers the parameters in ``nn.Module.__call__``, through which transforms are not called.
    """
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        name = cls.__mro__[2].__name__
        raise TypeError(
            "expected fully_shard of the module whose forward() returns log_prob or a loss, for "
            f"transforms are not called through nn.Module; got fully_shard of a {name}"
        )


class SafelyCachedTransform(InvertibleTransformModule):
    """A transform of Pyro or torch, with this library's cache in the place of its own.

    Pyro's learnable transforms return the cached value of a tensor even after their parameters have
    changed: the same data tensor, scored step after step, would keep its first density.

    :param Transform transform: the transform, with a cache; if it is a module, it is registered.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    @dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return self.transform.domain

    @dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return self.transform.codomain

    @property
    def bijective(self) -> bool:  # type: ignore[override]  # a property, as in torch's own inverse
        return self.transform.bijective

    @property
    def sign(self) -> Any:
        return self.transform.sign

    @property
    def has_continuous_log_det(self) -> bool:  # type: ignore[override]  # as for bijective
        return getattr(self.transform, "has_continuous_log_det", False)

    def extra_repr(self) -> str:
        return repr(self.transform)

    def _call(self, x: Tensor) -> Tensor:
        self._clear_own_cache()
        return self.transform(x)

    def _inverse(self, y: Tensor) -> Tensor:
        self._clear_own_cache()
        return self.transform._inv_call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = self._map_parameters()
        if self._pair.y_of(x, parameters, state_of(parameters)) is not y:
            self._clear_own_cache()
        return self.transform.log_abs_det_jacobian(x, y)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def clear_cache(self) -> None:
        """Drop the cached pair, here and in the transform."""
        super().clear_cache()
        self._clear_own_cache()

    def _clear_own_cache(self) -> None:
        self.transform.clear_cache()  # type: ignore[attr-defined]  # Pyro adds it to torch's class


class InverseTransformModule(TransformModule):
    """The inverse of a transform, registered as a module that holds the transform.

    The ``.inv`` of the transforms of this library is one. Use the class itself to invert a
    transform of Pyro without losing sight of its parameters:

    >>> inverse = InverseTransformModule(dist.transforms.Spline(3))
    >>> len(list(inverse.parameters()))
    4

    :param Transform transform: any bijective transform; if it is a module, it is registered.
    """

    _evaluator: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_not_sharded(cls)

    def __init__(self, transform: Transform) -> None:
        expect("transform, a transform", isinstance(transform, Transform), transform)
        super().__init__(cache_size=transform._cache_size)
        self.transform = transform
        # What evaluates it; not registered as a second child.
        self.__dict__["_evaluator"] = with_safe_cache(transform)
        self._link()

    @dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return self.transform.codomain

    @dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return self.transform.domain

    @property
    def bijective(self) -> bool:  # type: ignore[override]  # a property, as in torch's own inverse
        return self.transform.bijective

    @property
    def sign(self) -> Any:
        return self.transform.sign

    @property
    def has_continuous_log_det(self) -> bool:
        """Whether the path derivative is right: see :mod:`pyro_snf.path_gradient`."""
        return getattr(self.transform, "has_continuous_log_det", False)

    @property
    def inv(self) -> Transform:
        """The transform itself."""
        return self.transform

    __dir__ = InvertibleTransformModule.__dir__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform!r})"

    def __call__(self, x: Tensor) -> Tensor:
        return self._evaluator._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._evaluator(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self._evaluator.log_abs_det_jacobian(y, x)  # this one's output is T's input

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.forward_shape(shape)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """The inverse of the transform with another cache size."""
        if cache_size == self.transform._cache_size:
            return self
        return InverseTransformModule(self.transform.with_cache(cache_size))

    def clear_cache(self) -> None:
        """Drop the transform's cached pair."""
        self._evaluator.clear_cache()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A transform leaves its link to the inverse out of pickles and copies.
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Make this module the ``.inv`` of the transform."""
        # Past nn.Module.__setattr__: as a registered child of the transform, this module, which
        # registers the transform in turn, would send .to() and state_dict() into endless recursion.
        is_torchs = type(self.transform).inv is Transform.inv
        self.transform.__dict__["_inv"] = _as_torch_links(self) if is_torchs else self


def _as_torch_links(inverse: Transform) -> Any:
    """What torch's own ``Transform.inv`` expects in ``_inv``: earlier ones, a weak reference."""
    plain = Transform()
    _ = plain.inv
    return weakref.ref(inverse) if isinstance(plain._inv, weakref.ref) else inverse


def with_safe_cache(transform: Transform) -> Transform:
    """The transform itself if its cache can be trusted, else a :class:`SafelyCachedTransform`.

    For torch's inverse of a module, which does not register the module's parameters, it is an
    :class:`InverseTransformModule`.
    """
    if isinstance(transform, InvertibleTransformModule | InverseTransformModule):
        return transform
    if isinstance(transform, ComposeTransform) and all(
        with_safe_cache(part) is part for part in transform.parts
    ):
        return transform  # a composition caches nothing itself
    if not isinstance(transform, nn.Module) and isinstance(transform.inv, nn.Module):
        return InverseTransformModule(transform.inv)
    return SafelyCachedTransform(transform) if transform._cache_size else transform
