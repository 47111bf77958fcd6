"""The penalty that makes one network of a pair the inverse of the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.caching import ParameterState
from pyro_snf.free_form.linearization import Context, Linearization
from pyro_snf.free_form.network_pair import NetworkPair
from pyro_snf.options import as_seed, check_choice, is_dense
from pyro_snf.penalty import GECO, PenaltyWeight, StepCounter, as_penalty_weight, penalty_factor
from pyro_snf.precision import at_least_float32
from pyro_snf.probes import ProbeStream, draw_probes

__all__ = ["Reconstruction"]

# The stream of random numbers. The first two are those of the probes.
_NOISE = 2

# The smallest t, a scale on which f is almost linear.
_LEAST_SCALE = 0.01

# In standard deviations: in a given direction, hardly any normal latents are farther from their
# mean; nor, for large D, are their norms from √D.
_FARTHEST = 3.0

# The largest q that the default controller holds: below 1, and with a margin, for what is looked at
# does not have the largest q of all.
_TOLERANCE = 0.6

# The x̃ of a step of training are one for every four events; or for every two, for less noise, in so
# few dimensions that steps are cheap. They are no fewer than 32: with 16, folds away from the data
# are not found for long; and no more than for 256 events, for they are remembered. And the steps
# that are looked at again and again: with none, λ is too small; 16 gain little over 8.
_EVENTS_PER_NEW, _EVENTS_PER_NEW_IN_FEW, _FEW_DIMENSIONS = 4, 2, 3
_MIN_NEW, _MAX_EVENTS, _NUM_OLD = 32, 256, 8
_REMEMBERED = ("remembered_starts", "remembered_steps", "remembered_context")

# λ√D at first, with which the steps that Adam makes then do not fold f, and at most: where the
# penalty is all that counts, a larger λ reduces no q, and would take the longer to fall. And at
# least, for λ falls as long as f is almost linear, and would be too small for long when that ends.
# λ rises fast, and falls five times as slowly: so most batches are below what is held.
_MAX_WEIGHT, _MIN_WEIGHT, _RATE, _FALL = 10.0, 0.3, 0.1, 0.2

# D, where events may be of any size: that of small images.
_ANY_SIZE = 1000


class Reconstruction(nn.Module):
    r"""The reconstruction penalty of a pair of networks f and g.

    With ``e(x) = g(f(x)) − x``, it is

    .. math::
        \lambda D \left( \log\bigl(1 + c(x, \tilde x)\bigr)
        + \log\bigl(1 + \|e(x)\|^2/(D s^2)\bigr) \right), \qquad
        c(x, \tilde x) = \frac{\|e(\tilde x) - e(x)\|^2}{\|\tilde x - x\|^2},

    where s² is the variance of the batch, the mean over elements. It has no units, and there is no
    width of a noise to choose. The logarithms bound the gradients of what is far off.

    **Why.** With ``s = x̃ − x``, let

    .. math::
        q(x, \tilde x) = -\frac{\langle e(\tilde x) - e(x), s \rangle}{\|s\|^2}
        = 1 - \frac{\langle g(f(\tilde x)) - g(f(x)), s \rangle}{\|s\|^2}
        \le \sqrt{c(x, \tilde x)},

    the share of the step s that is lost by ``g ∘ f``. ``f(x) = f(x̃)`` implies q = 1. So f is one
    to one where all q are below 1: where ``g ∘ f`` is monotone. For :math:`\tilde x \to x`, q is
    :math:`1 - v^\top J_g J_f\,v` with a unit vector v, and :math:`J_f` is not singular where that
    is below 1 for all of them. Steps that become longer have a large c, but are no sign of a fold.

    **Where.** For a quarter of the batch, but 32 to 64 events (in up to three dimensions, half of
    it, but 32 to 128),

    .. math::
        \tilde x_i = x_i + t\,(x_j - x_i), \qquad \log t \sim U(\log 0.01, \log r),
        \quad r = \min(3, 1 + 3/\sqrt D),

    with another event, or ``x_i + t ε`` with normal noise ε of variance s² and t up to
    :math:`\sqrt{r^2 - 1}`: near and far, in all directions, between the data and beyond them. That
    is as far out as normal latents are, whose norm is :math:`\sqrt D` and hardly ever three more.
    (Farther out, some c are large whatever λ is: it would rise to its bound.)

    From x̃, another step is in the direction of ``e(x̃) − e(x)``: one of the power method, which
    turns to where c is large. It is as long as that to another x̃, but no longer than the data are
    wide, :math:`\sqrt D\,s`, and than 3 s, as far as normal latents are in a given direction. It is
    remembered, with the context, and looked at in the next step of training: so all errors are from
    one pass through f and g. The eight steps with the largest q are looked at again, each after
    another step of the power method. So a fold that a few events come to is not forgotten before it
    has gone.

    **How much.** By default λ is controlled: it rises fast while the largest q is above 0.6, and
    falls slowly while that is below. So f goes as far as g follows it.

    The first term is the mean over all steps. The penalty is weighted by the absolute value of the
    log-determinant's cotangent. It changes no value, and sends no gradient to x.

    >>> penalty = Reconstruction(trains="inverse")
    >>> transform = self_normalizing_pair(3, [32], reconstruction=penalty)

    :param weight: λ: a number, a function of the number of steps taken, or a
        :class:`~pyro_snf.GECO` that holds the largest q at its tolerance. By default it is
        ``GECO(0.6, weight=10 / r, min_weight=0.3 / r, max_weight=10 / r, rate=0.1, fall=0.2,
        decay=0.0)`` with r = √D, and D = 1000 for events of any size.
    :param str trains: ``"both"`` networks, or the ``"inverse"`` alone, for an f that is invertible
        as it is: then the penalty does not keep it so.
    :param seed: of the x̃, an integer from 0; by default one is drawn from torch's global
        random stream when a layer is made.
    :raises ValueError: for options that are not of these.
    """

    TRAINS = ("both", "inverse")

    remembered_starts: Tensor
    remembered_steps: Tensor
    remembered_context: Tensor

    def __init__(
        self,
        weight: PenaltyWeight | None = None,
        *,
        trains: str = "both",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._is_default = weight is None
        given = _controller(_ANY_SIZE) if weight is None else weight
        self.weight = as_penalty_weight("weight", given)
        check_choice("trains", trains, self.TRAINS)
        self.trains = trains
        self.seed = as_seed(seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight}, trains={self.trains!r}, seed={self.seed!r})"

    def setup(self, event_shape: torch.Size | None, like: Tensor) -> None:
        """Make the state; called once by each layer.

        :param event_shape: of events; None for any.
        :param Tensor like: of the networks' device and dtype.
        """
        is_few = event_shape is not None and event_shape.numel() <= _FEW_DIMENSIONS
        self._events_per_new = _EVENTS_PER_NEW_IN_FEW if is_few else _EVENTS_PER_NEW
        # The old steps first; 0 stands for none.
        shape = () if event_shape is None else (self._num_remembered, *event_shape)
        self.register_buffer("remembered_starts", like.new_zeros(shape or 0))
        self.register_buffer("remembered_steps", like.new_zeros(shape or 0))
        # Of contexts, and of events of any shape, there are none before the first use.
        self.register_buffer("remembered_context", like.new_zeros(0))
        self._made_at_use = _REMEMBERED[2 if shape else 0 :]
        if self._is_default and event_shape is not None:
            self.weight = _controller(event_shape.numel())
        if isinstance(self.weight, GECO):
            self.weight.to(like.device)
        self.probes = ProbeStream(self.seed, device=like.device, differs_by_process=True)
        self.steps = StepCounter()

    def _num_new(self, num_events: int) -> int:
        """The number of new steps, for a batch of so many events."""
        return max(_MIN_NEW, min(num_events, _MAX_EVENTS) // self._events_per_new)

    @property
    def _num_remembered(self) -> int:
        return _NUM_OLD + self._num_new(_MAX_EVENTS)

    def reset_parameters(self) -> None:
        """Forget the steps that are remembered."""
        for name in _REMEMBERED:
            known = getattr(self, name)
            setattr(self, name, known.new_zeros(0 if name in self._made_at_use else known.shape))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._made_at_use:
            saved = state_dict.get(prefix + name)
            if is_dense(saved) and saved.shape[:1] in ((0,), (self._num_remembered,)):
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def is_off(self) -> bool:
        """Whether λ is 0."""
        return isinstance(self.weight, float) and self.weight == 0

    @property
    def trains_forward(self) -> bool:
        """Whether f is trained by the penalty."""
        return self.trains == "both" and not self.is_off

    def reconstruct(self, pair: NetworkPair, latent: Tensor, context: Context) -> Linearization:
        """g, linearized at the latents ``f(x)``, which keep their graph if f is trained."""
        if not self.trains_forward:
            latent = latent.detach().requires_grad_()
        return Linearization(latent, pair.inverse(latent, *context))

    def penalty(
        self,
        pair: NetworkPair,
        x: Tensor,
        back: Linearization,
        context: Context,
        state: Callable[[], ParameterState],
        is_folded: Tensor | None = None,
    ) -> Tensor:
        """The penalty of every event, shape ``(B,)``.

        :param Tensor x: a constant.
        :param back: from :meth:`reconstruct`.
        :param state: returns the state of the networks' parameters.
        :param Tensor is_folded: whether f is known to be folded, shape ``()``: then the controller
            makes its largest step upwards.
        """
        error, variance = back.output - x, variance_of(x)
        contraction, lost = self._measure(pair, x, error, variance, context)
        largest = lost.max().clamp_min(0).square()
        if is_folded is not None:
            largest = torch.where(is_folded, torch.clamp_min(largest, 10.0), largest)
        factor = penalty_factor("weight", self.weight, self.steps, state, largest)
        dim = x[0].numel()
        mean_square = _square(error) / (dim * variance)
        return dim * factor * (contraction.log1p().mean() + mean_square.log1p())

    def _measure(
        self, pair: NetworkPair, x: Tensor, error: Tensor, variance: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """c and q of all steps, each in one dimension; q, infinite if not finite, has no graph.

        :param Tensor error: e(x).
        """
        generator = self.probes.next_generator(x.device, stream=_NOISE)
        # At random, for a batch may be all data in their order.
        chosen = torch.randperm(len(x), generator=generator, device=x.device)
        chosen = chosen[: self._num_new(len(x))]
        ends = x[chosen] + _steps(x, chosen, variance, generator)
        count, here = len(chosen), tuple(one[chosen] for one in context)
        starts, known, *known_context = self._remembered(x, context, count)
        steps = torch.cat([ends - x[chosen], known])  # with the rounding of the ends

        points = torch.cat([ends, starts, starts + known])
        contexts = tuple(
            torch.cat([*both, both[1]]) for both in zip(here, known_context, strict=True)
        )
        latent = pair.forward(points, *contexts)
        errors = self.reconstruct(pair, latent, contexts).output - points
        at_ends, at_starts, at_next = errors.split([count, len(known), len(known)])
        change = torch.cat([at_ends - error[chosen], at_next - at_starts])
        width = (x[0].numel() * variance).sqrt()
        # Of events next to each other, rounding is all that errors differ by.
        least = (width * _least_scale(x) / 10).square()
        square = _square(steps)
        divisor = square + least
        contraction = _square(change) / divisor
        change = change.detach()
        lost = -_inner(change, steps) / divisor
        lost = torch.where(lost.isfinite() & contraction.isfinite(), lost, math.inf)

        # The next steps. If the first ones were as long as those before, short ones would be looked
        # at close to the data alone.
        largest = variance.sqrt() * min(_FARTHEST, math.sqrt(x[0].numel()))
        new, old = square.sqrt().split([count, len(known)])
        lengths = torch.cat([new.roll(1).clamp(max=largest), old])
        turned = _along(change, steps, lengths)
        context = tuple(one[: len(turned)] for one in contexts)
        self._remember(lost, count, points[: len(turned)], turned, context)
        return contraction, lost

    def _remembered(self, x: Tensor, context: Context, num_new: int) -> tuple[Tensor, ...]:
        """The starts, the steps and the context that are remembered, the old ones first.

        An event and its context, and a step of 0, take the place of none.
        """
        like = (x, x, *context)
        known = self._memory(like)
        starts, steps, *rest = (
            one[: _NUM_OLD + num_new].to(other) for one, other in zip(known, like, strict=True)
        )
        is_none = _square(steps) == 0
        starts, *rest = (
            torch.where(_like_events(is_none, one), other[:1], one)
            for one, other in zip([starts, *rest], (x, *context), strict=True)
        )
        return starts, steps, *rest

    def _memory(self, like: tuple[Tensor, ...]) -> list[Tensor]:
        """The buffers for such events and contexts; new ones if they are of another shape."""
        names = _REMEMBERED[: len(like)]
        shapes = [(self._num_remembered, *one.shape[1:]) for one in like]
        if [getattr(self, name).shape for name in names] != shapes:
            for name, one, shape in zip(names, like, shapes, strict=True):
                setattr(self, name, one.new_zeros(shape))
        return [getattr(self, name) for name in names]

    @torch.no_grad()
    def _remember(
        self, lost: Tensor, num_new: int, starts: Tensor, steps: Tensor, context: Context
    ) -> None:
        """Keep the first steps, which are new, and the others with the largest q."""
        is_finite = lost.isfinite()
        old = torch.where(is_finite, lost, -math.inf)[num_new:]
        kept = num_new + old.topk(_NUM_OLD).indices
        found = (starts, steps, *context)
        for known, one in zip(self._memory(found), found, strict=True):
            one = torch.where(_like_events(is_finite, one), one, 0)
            known[: _NUM_OLD + num_new] = torch.cat([one[kept], one[:num_new]])


def _controller(dim: int) -> GECO:
    """The default weight for events of D elements."""
    root = math.sqrt(dim)
    return GECO(
        _TOLERANCE,
        weight=_MAX_WEIGHT / root,
        min_weight=_MIN_WEIGHT / root,
        max_weight=_MAX_WEIGHT / root,
        rate=_RATE,
        fall=_FALL,
        decay=0.0,
    )


def _along(change: Tensor, steps: Tensor, lengths: Tensor) -> Tensor:
    """Steps of these lengths in the directions of a change, or of the steps where that is 0."""
    direction = torch.where(_like_events(_square(change) > 0, steps), change, steps)
    length = _square(direction).sqrt()
    scale = lengths / torch.where(length > 0, length, 1.0)
    return (_like_events(scale, steps) * direction).to(steps.dtype)


def _steps(x: Tensor, rows: Tensor, variance: Tensor, generator: torch.Generator) -> Tensor:
    """From some events, differences to others, and noise, of random lengths.

    :param Tensor rows: the numbers of these events.
    :param Tensor variance: from :func:`variance_of`.
    """
    count, device = len(rows), x.device
    shift = torch.randint(1, max(len(x), 2), (count,), generator=generator, device=device)
    difference = x[(rows + shift) % len(x)] - x[rows]
    noise = draw_probes("gaussian", 1, difference.shape, generator, x.dtype)[0]
    noise = variance.sqrt().to(x.dtype) * noise
    random = torch.rand(2, count, generator=generator, device=device)
    # A batch of one event, or of equal ones, has no differences.
    is_noise = (_square(difference) == 0) | (random[0] < 0.5)
    largest = torch.where(is_noise, math.log(_largest_noise(x)), math.log(_reach(x)))
    least = math.log(_least_scale(x))
    scale = (least + (largest - least) * random[1]).exp().to(x.dtype)
    return _like_events(scale, x) * torch.where(_like_events(is_noise, x), noise, difference)


def _reach(x: Tensor) -> float:
    """r, how far out normal latents of D elements are, in units of their width √D; at most 3."""
    return min(3.0, 1 + _FARTHEST / math.sqrt(x[0].numel()))


def _largest_noise(x: Tensor) -> float:
    """In standard deviations of x: with it, a normal x is as far out."""
    return math.sqrt(_reach(x) ** 2 - 1)


def _least_scale(x: Tensor) -> float:
    """The smallest t: with fewer digits, rounding would be all that a smaller one shows."""
    return max(_LEAST_SCALE, torch.finfo(x.dtype).eps ** 0.5)


def variance_of(x: Tensor) -> Tensor:
    """The variance of a batch of events, the mean over elements, shape ``()``; never 0.

    Where all events are equal, or there is one alone, the mean square takes its place.
    """
    rows = at_least_float32(x).flatten(1)
    # Not by var(0), which takes ten times as long on a CPU.
    variance, square = (rows - rows.mean(0)).square().mean(), rows.square().mean()
    tiny = torch.finfo(rows.dtype).eps ** 2
    scale = torch.where(variance > tiny * square, variance, square)
    return torch.where(scale == 0, 1.0, scale)


def _square(difference: Tensor) -> Tensor:
    """``‖·‖²`` for every event, shape ``(B,)``."""
    return at_least_float32(difference).square().flatten(1).sum(1)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """``⟨·, ·⟩`` for every event, shape ``(B,)``."""
    return (at_least_float32(first) * at_least_float32(second)).flatten(1).sum(1)


def _like_events(numbers: Tensor, events: Tensor) -> Tensor:
    """Numbers of shape ``(B,)``, with a dimension for each of the events' own."""
    return numbers.view(-1, *[1] * (events.dim() - 1))
