"""Stacks of transforms whose inverse is a module too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from pyro.distributions.transforms import ComposeTransformModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pyro_snf.gradient_check import check_value
from pyro_snf.options import as_list, check_cache_size, expect
from pyro_snf.transforms.base import InvertibleTransformModule, with_safe_cache
from pyro_snf.transforms.context_scale import ContextScale
from pyro_snf.transforms.first_batch import FirstBatchTransform, initializing_nothing

__all__ = ["Compose", "ConditionalCompose", "initialize_parts"]


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
        if self.training:
            check_value(y)
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        with initializing_nothing():
            return super().log_abs_det_jacobian(x, y)

    def _inv_call(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inv(y)
        return y

    def with_cache(self, cache_size: int = 1) -> Compose:
        """The stack with another cache size."""
        if cache_size == self._cache_size:
            return self
        return Compose(self.parts, cache_size=cache_size)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Initialize the parts that a first batch in training would, such as
        :class:`~pyro_snf.ActNorm`, one after the other, unless they have been.

        :param Tensor x: data, the input of the first part: all of them, if they are at hand.
        """
        initialize_parts(self.parts, x)

    def clear_cache(self) -> None:
        """Drop the cached pairs of all parts."""
        for part in self.parts:
            part.clear_cache()  # type: ignore[attr-defined]  # Pyro adds it to torch's class


class ConditionalCompose(ConditionalTransformModule):
    """The composition of transforms some of which depend on a context.

    >>> parts = [SelfNormalizingLinear(3), ConditionalSplineAutoregressive(3, 2)]
    >>> flow = ConditionalCompose(parts)
    >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> density = dist.ConditionalTransformedDistribution(base, [flow.inv])
    >>> density.condition(torch.ones(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])

    :param parts: transforms and conditional transforms, in the order in which they are applied. All
        conditional ones have the same context.
    :raises ValueError: if there are no parts, or other things among them.
    """

    def __init__(self, parts: Sequence[Transform | ConditionalTransform]) -> None:
        super().__init__()
        listed = as_list("transforms in a list", parts)
        expect("at least one transform", len(listed) > 0, parts)
        for part in listed:
            fits = isinstance(part, Transform | ConditionalTransform)
            expect("transforms or conditional transforms, in a list", fits, part)
        safe = [with_safe_cache(one) if isinstance(one, Transform) else one for one in listed]
        #: In the order in which they are applied.
        self.parts = list(safe)
        self.modules_of_parts = nn.ModuleList(one for one in safe if isinstance(one, nn.Module))

    def condition(self, context: Tensor) -> Compose:
        """The stack for a context, or for a batch of contexts.

        :param Tensor context: of the conditional parts.
        """
        parts = [
            part.condition(context) if isinstance(part, ConditionalTransform) else part
            for part in self.parts
        ]
        return Compose(parts).train(self.training)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor) -> None:
        """Initialize the parts that data initialize, and standardize the contexts, where neither
        has been done yet.

        :param Tensor x: data, the input of the first part.
        :param Tensor context: as many contexts.
        """
        for module in self.modules():
            if isinstance(module, ContextScale) and module.is_as_reset():
                module.fit(context)
        initialize_parts(self.condition(context).parts, x)


@torch.no_grad()
def initialize_parts(parts: Sequence[Transform], x: Tensor) -> None:
    """See :meth:`Compose.initialize`."""
    needed = [index for index, part in enumerate(parts) if _needs_data(part)]
    for index, part in enumerate(parts[: max(needed, default=-1) + 1]):
        if index in needed:
            part.initialize(x)  # type: ignore[attr-defined]  # _needs_data
        if index < needed[-1]:
            x = part(x)


def _needs_data(part: Transform) -> bool:
    if isinstance(part, Compose):
        return any(map(_needs_data, part.parts))
    if isinstance(part, FirstBatchTransform):
        return part.is_new()
    return hasattr(part, "initialize")
