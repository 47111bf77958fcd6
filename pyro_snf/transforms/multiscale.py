"""A flow of images in levels, each of which passes half of the channels on to the next."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_snf.caching import PairCache, can_remember
from pyro_snf.options import as_image_shape, as_list, expect
from pyro_snf.transforms.base import InverseTransformModule, InvertibleTransformModule, check_input
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.first_batch import initializing_nothing

__all__ = ["MultiScale"]


class MultiScale(InvertibleTransformModule):
    r"""The multi-scale architecture (Dinh et al., 2017).

    For an image :math:`h_0 = x`,

    .. math::
        (h_l, z_l) = T_l(h_{l-1}), \quad l < L, \qquad z_L = T_L(h_{L-1}), \qquad
        y = (z_1, \ldots, z_L),

    where :math:`h_l` is the first half of the channels of :math:`T_l`'s output and :math:`z_l` the
    second, which a coupling at the end of the level has just changed. T maps images
    ``(..., C, H, W)`` to *flat* latents ``(..., D)``, ``D = C·H·W``: the concatenated :math:`z_l`,
    each flattened from the shape that ``latent_shapes`` gives. So the base of a density of images
    is a distribution of vectors:

    >>> flow = MultiScale(
    ...     [Compose([Squeeze2d(), ActNorm(4)]), Compose([Squeeze2d(), ActNorm(8)])], (1, 8, 8)
    ... )
    >>> base = dist.Normal(torch.zeros(64), 1.0).to_event(1)
    >>> dist.TransformedDistribution(base, [flow.inv]).sample((5,)).shape
    torch.Size([5, 1, 8, 8])
    >>> flow.latent_shapes
    [torch.Size([2, 4, 4]), torch.Size([8, 2, 2])]

    The log-det is the sum of those of the levels. Value, log-det and inverse are as exact as those
    of the levels. T caches no pair of its own; the pairs that its levels cache are found again.

    :param levels: bijections of images, those of Pyro and torch too.
    :param event_shape: ``(C, H, W)``.
    :raises ValueError: for levels that do not fit their images, as far as ``forward_shape`` of the
        levels can tell; for an odd number of channels to be halved; and for inputs of other shapes.

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.real_vector

    def __init__(self, levels: Sequence[Transform], event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = as_image_shape(event_shape)
        self.levels = nn.ModuleList(map(_as_module, as_list("levels, in a list", levels)))
        if len(self.levels) == 0:
            raise ValueError("expected at least one level; got none")
        #: The shapes of the parts of a latent, in their order.
        self.latent_shapes: list[torch.Size] = []
        # Of the outputs of all levels but the last into halves.
        self._halves: list[_Partition] = []
        shape = self.event_shape
        for index, level in enumerate(self._transforms()):
            shape = _output_shape(level, shape, index)
            if index < len(self.levels) - 1:
                channels, *size = whole = shape
                if channels % 2:
                    raise ValueError(
                        "expected an even number of channels, of which half are split off; "
                        f"got images {tuple(shape)} from level {index}"
                    )
                shape = torch.Size((channels // 2, *size))
                self._halves.append(_Partition(whole, [shape, shape]))
            self.latent_shapes.append(shape)
        self._dim = self.event_shape.numel()
        # Of the flat latent into the latents of the levels.
        self._latents = _Partition(torch.Size([self._dim]), self.latent_shapes)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, {len(self.levels)} levels"

    # Without a cache of its own: a level knows when its cached pair becomes invalid, a cache here
    # would have to know that of all levels. The levels find their pairs by the identity of tensors,
    # which the partitions preserve.
    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverse(y)

    def _call(self, x: Tensor) -> Tensor:
        check_input(self, x, tuple(self.event_shape))
        *levels, last = self._transforms()
        latents = []
        for level, halves in zip(levels, self._halves, strict=True):
            x, latent = halves.split(level(x))
            latents.append(latent)
        return self._latents.join([*latents, last(x)])

    def _inverse(self, y: Tensor) -> Tensor:
        check_input(self, y, (self._dim,))
        *levels, last = self._transforms()
        *latents, z = self._latents.split(y)
        x = last.inv(z)
        for level, halves in zip(reversed(levels), reversed(self._halves), strict=True):
            x = level.inv(halves.join([x, latents.pop()]))
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        check_input(self, x, tuple(self.event_shape))
        check_input(self, y, (self._dim,))
        *levels, last = self._transforms()
        log_dets = []
        with initializing_nothing():
            for level, halves in zip(levels, self._halves, strict=True):
                output = level(x)
                log_dets.append(_log_det(level, x, output))
                x, _ = halves.split(output)
            return sum(log_dets, _log_det(last, x, self._latents.split(y)[-1]))

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._replace(shape, self.event_shape, torch.Size([self._dim]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._replace(shape, torch.Size([self._dim]), self.event_shape)

    def copy_with_own_cache(self) -> MultiScale:
        other = super().copy_with_own_cache()
        # Copies of partitions remember nothing.
        other._halves, other._latents = copy.deepcopy((self._halves, self._latents))
        return other

    def with_cache(self, cache_size: int = 1) -> MultiScale:
        """This transform with another cache size; with 0, the levels' pairs are not found again."""
        other = super().with_cache(cache_size)
        for partition in (*other._halves, other._latents):
            partition.is_caching = cache_size == 1
        return other

    def clear_cache(self) -> None:
        """Drop the cached pairs of all levels."""
        for partition in (*self._halves, self._latents):
            partition.clear()
        for level in self._transforms():
            level.clear_cache()  # type: ignore[attr-defined]  # Pyro adds it to torch's class

    def _transforms(self) -> list[Transform]:
        return list(self.levels)  # type: ignore[arg-type]  # all are both

    def _replace(self, shape: torch.Size, old: torch.Size, new: torch.Size) -> torch.Size:
        """The shape, with another event shape."""
        batch_shape = shape[: max(len(shape) - len(old), 0)]
        if shape != batch_shape + old:
            expected = ", ".join(["...", *map(str, old)])
            raise ValueError(f"{self}: expected a shape ({expected}); got {tuple(shape)}")
        return batch_shape + new


class _Partition:
    """Splits a tensor into pieces and joins them; the last whole and its pieces are remembered.

    The entries of an event, in their order, are those of its pieces, one piece after the other. A
    whole that has been split, or pieces that have been joined, come back as the same tensors.

    :param torch.Size shape: of an event.
    :param shapes: those of the pieces.
    """

    def __init__(self, shape: torch.Size, shapes: list[torch.Size]) -> None:
        self.shape = shape
        self.shapes = shapes
        self.is_caching = True
        self._pairs = [PairCache() for _ in shapes]  # of each piece and the whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """The pieces of the whole, of shapes ``(*batch_shape, *shape)``."""
        pairs = self._pairs if can_remember() else []
        found = [pair.x_of(whole, (), ()) for pair in pairs]
        known = [piece for piece in found if piece is not None]
        if found and len(known) == len(found):
            return known
        batch_shape = whole.shape[: whole.dim() - len(self.shape)]
        flat = whole.reshape(*batch_shape, self.shape.numel())
        parts = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        pieces = [
            part.reshape(batch_shape + shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        self._store(pieces, whole, is_joined=False)
        return pieces

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole, of shape ``(*batch_shape, *shape)``."""
        if can_remember():
            pairs = zip(self._pairs, pieces, strict=True)
            known = [pair.y_of(piece, (), ()) for pair, piece in pairs]
            if known[0] is not None and all(whole is known[0] for whole in known):
                return known[0]
        batch_shape = pieces[0].shape[:-3]
        flat = torch.cat([piece.reshape(*batch_shape, -1) for piece in pieces], dim=-1)
        whole = flat.reshape(batch_shape + self.shape)
        self._store(pieces, whole, is_joined=True)
        return whole

    def clear(self) -> None:
        for pair in self._pairs:
            pair.clear()

    def _store(self, pieces: list[Tensor], whole: Tensor, *, is_joined: bool) -> None:
        if self.is_caching and can_remember():
            for pair, piece in zip(self._pairs, pieces, strict=True):
                pair.store(piece, whole, (), (), computed=whole if is_joined else piece)


def _as_module(level: Transform) -> nn.Module:
    """The level as a module with a safe cache."""
    fits = isinstance(level, Transform) and level.bijective
    expect("levels, bijective transforms", fits, level)
    if isinstance(level, InvertibleTransformModule | InverseTransformModule | Compose):
        return level
    return Compose([level])


def _output_shape(level: Transform, shape: torch.Size, index: int) -> torch.Size:
    """The shape of the level's output, for images of a shape; a ValueError if it does not fit."""
    try:
        output = level.forward_shape(shape)
    except ValueError as error:
        raise ValueError(f"level {index}, with images {tuple(shape)}: {error}") from error
    event_dims = (level.domain.event_dim, level.codomain.event_dim)
    if len(output) != 3 or event_dims[0] != event_dims[1] or event_dims[0] > 3:
        raise ValueError(
            f"expected levels that map images to images; level {index} maps shape {tuple(shape)} "
            f"to {tuple(output)}, and its event dimensions are {event_dims}"
        )
    return output


def _log_det(level: Transform, x: Tensor, y: Tensor) -> Tensor:
    """The log-det of a level, summed over the event of an image."""
    return sum_rightmost(level.log_abs_det_jacobian(x, y), 3 - level.domain.event_dim)
