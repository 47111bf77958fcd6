"""Stacks of transforms whose inverse is a module too."""

from __future__ import annotations

from collections.abc import Sequence

from pyro.distributions.transforms import ComposeTransformModule
from torch import Tensor
from torch.distributions import ComposeTransform, Transform

from pyro_snf.gradient_check import check_value
from pyro_snf.options import as_list, check_cache_size, expect
from pyro_snf.transforms.base import InvertibleTransformModule, with_safe_cache

__all__ = ["Compose"]


class Compose(ComposeTransformModule):
    r"""The composition :math:`T = T_n \circ \cdots \circ T_1` of transforms.

    Pyro's ``ComposeTransformModule``, except that ``.inv`` is a registered module (Pyro's is a
    bare transform, whose parameters ``pyro.module`` does not find), and remains one through
    ``with_cache``. So one stack serves as a guide, ``TransformedDistribution(base, [T])``, and as
    a density model, ``TransformedDistribution(base, [T.inv])``.

    >>> flow = Compose([SelfNormalizingLinear(3), SmoothLeakyReLU(), SelfNormalizingLinear(3)])
    >>> density = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [flow.inv])
    >>> density.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])

    :param parts: the transforms, in the order in which they are applied; those of Pyro and torch
        too. Transforms with a cache of their own, such as Pyro's ``Spline``, are wrapped: see
        :func:`~pyro_snf.transforms.base.with_safe_cache`. Compositions of Pyro and torch are
        replaced by their parts.
    :param int cache_size: 1 to turn the caches of all parts on.
    :raises ValueError: if there are no parts, or other things than transforms among them.
    """

    def __init__(self, parts: Sequence[Transform], cache_size: int = 0) -> None:
        flat: list[Transform] = []
        check_cache_size(cache_size)
        expected = "a transform, or transforms in a list"
        for part in [parts] if isinstance(parts, Transform) else as_list(expected, parts):
            expect("transforms, in a list", isinstance(part, Transform), part)
            if isinstance(part, ComposeTransform) and not isinstance(part, Compose):
                flat.extend(part.parts)
            else:
                flat.append(part)
        if len(flat) == 0:
            raise ValueError("expected at least one transform; got none")
        if cache_size:  # here: the base class would register the parts before it replaces them
            flat = [part.with_cache(cache_size) for part in flat]
        flat = [with_safe_cache(part) for part in flat]  # after with_cache, which may add a cache
        super().__init__(flat, cache_size=cache_size)

    inv = InvertibleTransformModule.inv
    __dir__ = InvertibleTransformModule.__dir__

    @property
    def has_continuous_log_det(self) -> bool:
        """Whether the path derivative is right: see :mod:`pyro_snf.path_gradient`."""
        return all(getattr(part, "has_continuous_log_det", False) for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        check_value(y)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inv(y)
        return y

    def with_cache(self, cache_size: int = 1) -> Compose:
        """The stack with another cache size."""
        if cache_size == self._cache_size:
            return self
        return Compose(self.parts, cache_size=cache_size)

    def clear_cache(self) -> None:
        """Drop the cached pairs of all parts."""
        for part in self.parts:
            part.clear_cache()  # type: ignore[attr-defined]  # Pyro adds it to torch's class
