"""A flow of images in levels, each of which is done with half of the channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_snf.caching import PairCache
from pyro_snf.transforms.base import (
    InverseTransformModule,
    InvertibleTransformModule,
    check_input,
)
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.options import as_image_shape

__all__ = ["MultiScale"]


class MultiScale(InvertibleTransformModule):
    r"""The multi-scale architecture (Dinh et al., 2017): of an image :math:`h_0 = x`,

    .. math::
        (h_l, z_l) = T_l(h_{l-1}), \quad l < L, \qquad z_L = T_L(h_{L-1}), \qquad
        y = (z_1, \ldots, z_L),

    where :math:`h_l` is the first half of the channels of :math:`T_l`'s output and :math:`z_l` the
    second: what a coupling at the level's end has just changed. T maps images ``(..., C, H, W)`` to
    *flat* latents ``(..., D)``, ``D = C·H·W``: the :math:`z_l` one after the other, each channels
    first, of the shapes ``latent_shapes``. So a density of images has a base of vectors:

    >>> flow = MultiScale(
    ...     [Compose([Squeeze2d(), ActNorm(4)]), Compose([Squeeze2d(), ActNorm(8)])], (1, 8, 8)
    ... )
    >>> base = dist.Normal(torch.zeros(64), 1.0).to_event(1)
    >>> dist.TransformedDistribution(base, [flow.inv]).sample((5,)).shape
    torch.Size([5, 1, 8, 8])
    >>> flow.latent_shapes
    [torch.Size([2, 4, 4]), torch.Size([8, 2, 2])]

    The log-det is the sum of those of the levels; it, the value and the inverse are what the levels
    make of them. T keeps no pair itself, but finds its levels' pairs again.

    :param levels: bijections of images, those of Pyro and torch too.
    :param event_shape: ``(C, H, W)``.
    :raises ValueError: for levels that do not fit the images that they get, as far as their
        ``forward_shape`` tells; where the channels to be halved are odd in number; and for inputs
        of other shapes.

    References:

    Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio. Density Estimation Using Real NVP. ICLR 2017.
    [arXiv:1605.08803]
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.real_vector

    def __init__(self, levels: Sequence[Transform], event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = as_image_shape(event_shape)
        self.levels = nn.ModuleList(_as_module(level) for level in levels)
        if len(self.levels) == 0:
            raise ValueError("expected at least one level; got none")
        #: The shapes of the parts of a latent, in their order.
        self.latent_shapes: list[torch.Size] = []
        cuts: list[tuple[torch.Size, list[torch.Size]]] = []
        shape = self.event_shape
        for index, level in enumerate(self._transforms()):
            shape = _output_shape(level, shape, index)
            if index == len(self.levels) - 1:
                self.latent_shapes.append(shape)
                break
            channels, *size = shape
            if channels % 2:
                raise ValueError(
                    "expected an even number of channels, of which half are split off; "
                    f"got images {tuple(shape)} from level {index}"
                )
            half = torch.Size((channels // 2, *size))
            self.latent_shapes.append(half)
            cuts.append((shape, [half, half]))
            shape = half
        cuts.append((torch.Size([math.prod(self.event_shape)]), self.latent_shapes))
        self._cuts = [_Cut(*cut) for cut in cuts]

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, {len(self.levels)} levels"

    # What the levels remember is true for as long as they say, and they find it by the identity of
    # tensors, which the cuts keep up. A pair kept here would have to know of all their reasons.
    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverse(y)

    def _call(self, x: Tensor) -> Tensor:
        check_input(self, x, tuple(self.event_shape))
        latents = []
        for level, cut in self._steps():
            x = level(x)
            if cut is not None:
                x, latent = cut.split(x)
                latents.append(latent)
        return self._cuts[-1].join([*latents, x])

    def _inverse(self, y: Tensor) -> Tensor:
        *latents, x = self._latents(y)
        for level, cut in reversed(self._steps()):
            if cut is not None:
                x = cut.join([x, latents.pop()])
            x = level.inv(x)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        check_input(self, x, tuple(self.event_shape))
        terms = []
        for level, cut in self._steps():
            output = self._latents(y)[-1] if cut is None else level(x)
            log_det = level.log_abs_det_jacobian(x, output)
            terms.append(sum_rightmost(log_det, 3 - level.domain.event_dim))
            if cut is not None:
                x, _ = cut.split(output)
        return sum(terms[1:], terms[0])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._replace(shape, self.event_shape, torch.Size([math.prod(self.event_shape)]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._replace(shape, torch.Size([math.prod(self.event_shape)]), self.event_shape)

    def twin(self) -> MultiScale:
        twin = super().twin()
        twin._cuts = [_Cut(cut.shape, cut.pieces, is_kept=cut.is_kept) for cut in self._cuts]
        return twin

    def with_cache(self, cache_size: int = 1) -> MultiScale:
        """This transform with another cache size; with 0, it keeps no cuts, so nothing is found."""
        twin = super().with_cache(cache_size)
        for cut in twin._cuts:
            cut.is_kept = cache_size == 1
        return twin

    def clear_cache(self) -> None:
        """Drop the cached pairs of all levels."""
        for cut in self._cuts:
            cut.clear()
        for level in self._transforms():
            level.clear_cache()  # type: ignore[attr-defined]  # Pyro adds it to torch's class

    def _transforms(self) -> list[Transform]:
        return list(self.levels)  # type: ignore[arg-type]  # all are both

    def _steps(self) -> list[tuple[Transform, _Cut | None]]:
        """The levels, each with the cut after it, which the last has not."""
        return list(zip_longest(self._transforms(), self._cuts[:-1]))

    def _latents(self, y: Tensor) -> list[Tensor]:
        check_input(self, y, (math.prod(self.event_shape),))
        return self._cuts[-1].split(y)

    def _replace(self, shape: torch.Size, old: torch.Size, new: torch.Size) -> torch.Size:
        batch_shape = shape[: max(len(shape) - len(old), 0)]
        if shape != batch_shape + old:
            expected = ", ".join(["...", *map(str, old)])
            raise ValueError(f"{self}: expected a shape ({expected}); got {tuple(shape)}")
        return batch_shape + new


class _Cut:
    """A tensor and the pieces that it is cut into: each finds the other again, by identity.

    The entries of an event, in their order, are those of its pieces, one piece after the other.

    :param torch.Size shape: of an event.
    :param pieces: their shapes.
    :param bool is_kept: whether anything is remembered.
    """

    def __init__(
        self, shape: torch.Size, pieces: list[torch.Size], *, is_kept: bool = True
    ) -> None:
        self.shape = shape
        self.pieces = pieces
        self.is_kept = is_kept
        self._pairs = [PairCache() for _ in pieces]  # of each piece with the whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """Views of the whole, of shapes ``(*batch_shape, *piece)``."""
        known = [pair.x_of(whole, (), ()) for pair in self._pairs]
        found = [piece for piece in known if piece is not None]
        if len(found) == len(known):
            return found
        batch_shape = whole.shape[: whole.dim() - len(self.shape)]
        flat = whole.reshape(*batch_shape, math.prod(self.shape))
        parts = flat.split([math.prod(piece) for piece in self.pieces], dim=-1)
        pieces = [
            part.reshape(batch_shape + piece)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]
        for pair, piece in zip(self._pairs, pieces, strict=True):
            if self.is_kept:
                pair.store(piece, whole, (), (), computed=piece)
        return pieces

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole, of shape ``(*batch_shape, *shape)``."""
        known = [pair.y_of(piece, (), ()) for pair, piece in zip(self._pairs, pieces, strict=True)]
        if known[0] is not None and all(whole is known[0] for whole in known):
            return known[0]
        batch_shape = pieces[0].shape[:-3]
        flat = torch.cat([piece.reshape(*batch_shape, -1) for piece in pieces], dim=-1)
        whole = flat.reshape(batch_shape + self.shape)
        for pair, piece in zip(self._pairs, pieces, strict=True):
            if self.is_kept:
                pair.store(piece, whole, (), (), computed=whole)
        return whole

    def clear(self) -> None:
        for pair in self._pairs:
            pair.clear()


def _as_module(level: Transform) -> nn.Module:
    """The level as a module whose cache can be trusted."""
    if not isinstance(level, Transform) or not level.bijective:
        raise ValueError(f"expected levels, bijective transforms; got {level!r}")
    if isinstance(level, InvertibleTransformModule | InverseTransformModule | Compose):
        return level
    return Compose([level])


def _output_shape(level: Transform, shape: torch.Size, index: int) -> torch.Size:
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
