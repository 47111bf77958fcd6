"""An optimizer for guides that needs no learning rate, whatever the units of the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_snf.guides import AutoSelfNormalizingFlow
from pyro_snf.natural_step import Moments, Secants, SignalShare, moments, relative_step
from pyro_snf.options import as_count, as_positive, expect
from pyro_snf.processes import check_one_process
from pyro_snf.recording import Recording
from pyro_snf.transfer import read

__all__ = ["NaturalGradient"]

# Samples that a step of the dense layer is made from, at least: with fewer particles, those of
# several steps.
_MIN_SAMPLES = 8

# Of the layers before the dense one, in units of √D: see Recording.
_MAX_LENGTH = 4.0

# The secant step needs directions that hardly overlap: D is to be this many times their number.
_DIMENSIONS_PER_SECANT = 4

# Steps in which nothing but noise is found in the dense layer's gradient until the other layers
# are trained, and the first of them that count.
_CALM_STEPS = 5
_FIRST_CALM_STEP = 15
# A step is calm where the signal in M, in units of that for a Gaussian posterior, the length of y
# and that of d, in units of √D, and the signal in d are below these.
_CALM_MATRIX_SIGNAL = 0.25
_CALM_LENGTH = 2.0
_CALM_MEAN = 0.7
_CALM_MEAN_SIGNAL = 0.3
# A Gaussian whose y are so long has a divergence of 2e-6 nats a dimension: it is the posterior.
_NEGLIGIBLE_LENGTH = 3e-3
# The other layers are trained from here on at the latest, as a share of all steps.
_LATEST_START = 0.4

# The least rate of the location, relative to that of a Gaussian posterior: with less, a drift
# that is lost in the noise of ten steps would never be seen.
_LEAST_MEAN_RATE = 0.05
# Of what is optimal on a quadratic: half leaves room for noise.
_RELATIVE_RATE = 0.5
_MEAN_RATE = 0.5
_TRACE_RATE = 0.5

# The length of a location's step, in units of √D: it grows by up to exp(0.7) = 2 while successive
# steps agree, and shrinks likewise.
_TRUST_CHANGE = 0.7
_MIN_TRUST = 0.3
_MAX_TRUST = 1e12

_TINY = 1e-300

# After a gradient that is not finite, the guide returns to its last location, and narrows.
_NARROWING = 0.7

# Of rates, at the end of the run.
_LAST_DECAY = 0.01
# Where the decay starts, as a share of all steps.
_START_OF_DECAY = 0.5

# A row of A may be longer or shorter by this factor until its length moves to the layer's scale. It
# is looked for before each eighth step, with the rest of what is read.
_MAX_ROW_LENGTH = 2.0
_BALANCE_EVERY = 8


class NaturalGradient(PyroOptim):
    r"""Trains an :class:`~pyro_snf.AutoSelfNormalizingFlow`, without a learning rate to choose.

    The dense layer that ends the guide, ``x = W h + b``, makes natural-gradient steps
    (:mod:`pyro_snf.natural_step`), each of the rank of the number K of samples, in O(KD²). They do
    not depend on the units, the scales and the correlations of the posterior. The tracked inverse
    of W follows exactly. What precedes the layer is trained by Adam, in the coordinates of h, which
    the dense layer keeps near a standard normal; it starts when the dense layer has nothing left to
    gain. The guide's ``gradient`` is that of what precedes: the dense layer always follows the path
    derivative, for which an activation without an inverse takes some more backward passes.
    Parameters of the model are trained by Adam too.

    It is an optimizer for Pyro's ``SVI``:

    >>> def model():
    ...     locs, scales = torch.tensor([3e4, -1e-3]), torch.tensor([1e3, 1e-4])
    ...     pyro.sample("x", dist.Normal(locs, scales).to_event(1))
    >>> guide = AutoSelfNormalizingFlow(model)
    >>> elbo = pyro.infer.Trace_ELBO(num_particles=8, vectorize_particles=True)
    >>> svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, num_steps=300), elbo)
    >>> losses = [svi.step() for step in range(300)]
    >>> losses[-1] < 0.1  # the Kullback–Leibler divergence
    True

    and for loops of one's own, with ``loss.backward()`` and then :meth:`step`. :func:`pyro_snf.fit`
    does all of it.

    While the optimizer exists, the parameters of the dense layer get no gradients: the samples'
    gradients are recorded instead (:mod:`pyro_snf.recording`). The objective has to be an average
    over samples of the guide, such as the ELBO. ``clip`` of the guide has no effect: gradients are
    bounded in the coordinates of h.

    :param AutoSelfNormalizingFlow guide: before or after its first call.
    :param num_steps: the number of calls to come. In the second half of them, all rates decay to a
        hundredth. None for no decay.
    :param float lr: Adam's learning rate, for everything but the dense layer.
    :raises TypeError: for any other guide.
    :raises ValueError: for options outside these ranges; for a guide whose ``log_det`` has
        parameters to train, as ``"learned"`` has.
    :raises RuntimeError: in several processes.
    """

    def __init__(
        self, guide: AutoSelfNormalizingFlow, num_steps: int | None = None, *, lr: float = 2e-2
    ) -> None:
        if not isinstance(guide, AutoSelfNormalizingFlow):
            raise TypeError(
                f"expected an AutoSelfNormalizingFlow, for other guides use Pyro's optimizers; got "
                f"{type(guide).__name__}"
            )
        expect(
            "a guide whose log_det has no parameters to train, as 'learned' has",
            self.is_for(guide),
            guide.layer_options["log_det"],
        )
        check_one_process("NaturalGradient")
        super().__init__(torch.optim.Adam, {"lr": as_positive("lr", lr)})
        self.guide = guide
        self.lr = float(lr)
        self.num_steps = None if num_steps is None else as_count("num_steps", num_steps)
        self._recording = Recording(_MAX_LENGTH)
        guide.record(self._recording)
        self._decay_start, self._decay_steps = math.inf, 1.0
        if self.num_steps is not None:
            start = int(_START_OF_DECAY * self.num_steps)
            self.start_decay(self.num_steps - start, at=start)
        #: Calls so far, and the steps of the dense layer among them.
        self.num_calls = 0
        self.num_dense_steps = 0
        #: Whether the layers before the dense one are trained, too.
        self.trains_all_layers = guide.num_layers == 1
        #: Whether the latest gradients were 0 but for rounding, in every sample.
        self.is_at_posterior = False
        self._matrix_share, self._mean_share, self._trace_share = (SignalShare() for _ in range(3))
        self._trust = 1.0
        self._num_calm = 0
        self._last: Moments | None = None
        self._last_bias: Tensor | None = None
        self._start: Tensor | None = None  # W at the first step, until all layers are trained
        self._adams: dict[str, torch.optim.Adam] = {}
        self._adam_states: dict[str, Any] = {}
        self._unnamed: dict[int, str] = {}

    @staticmethod
    def is_for(guide: AutoSelfNormalizingFlow) -> bool:
        """Whether the guide's ``log_det`` has no parameters, which would be left untrained."""
        return not guide.trains_log_det

    def start_decay(self, num_steps: int, *, at: int | None = None) -> None:
        """Let all rates decay to a hundredth.

        :param int num_steps: in so many calls.
        :param at: the call from which on; by default the next one.
        """
        self._decay_start = self.num_calls if at is None else at
        self._decay_steps = as_count("num_steps", num_steps)

    @property
    def decay(self) -> float:
        """The factor of all rates, at most 1."""
        share = (self.num_calls - self._decay_start) / self._decay_steps
        return _LAST_DECAY ** min(max(share, 0.0), 1.0)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step, after a backward pass.

        :param params: the parameters that were used in it.
        """
        params = list(params)
        is_finite = self._step_dense()
        if is_finite:
            self._step_adam(params)
        else:
            self.recover()
        self.num_calls += 1
        self._update_phase()

    def step(self) -> None:
        """One step of the guide, after a backward pass; its gradients are then None.

        If the model has parameters, call the optimizer with them and those of the guide.
        """
        params = [one for one in self.guide.parameters() if one.requires_grad]
        self(params)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set the gradients of the guide to None."""
        for parameter in self.guide.parameters():
            parameter.grad = None

    #: What a resumed run needs, next to the averages, the recorded samples and the state of Adam.
    _SAVED = (
        "num_calls",
        "num_dense_steps",
        "trains_all_layers",
        "is_at_posterior",
        "_decay_start",
        "_decay_steps",
        "_trust",
        "_num_calm",
        "_last",
        "_start",
        "_last_bias",
    )

    @torch.no_grad()
    def _step_dense(self) -> bool:
        """A step of the dense layer, if there are samples enough; whether all gradients are finite.

        On a GPU all that is to be known is read at once.
        """
        if len(self._recording) < _MIN_SAMPLES:
            return len(self._recording) == 0 or _are_finite(*read(self._recording.norms()))
        layer = self.guide.last_layer
        norms = self._recording.norms()
        h, y, scores = self._recording.take()
        if self._is_gaussian:
            # The score of a normal h is −h. That of what does not start as the identity, as random
            # splines do not, is left out: secants are for a normal h.
            y = y - (scores + h)
        found = moments(h, y)
        count, dim = found.h.shape
        secants, one, other = None, found, self._last
        if self._is_gaussian and dim >= _DIMENSIONS_PER_SECANT * count:
            secants, half = Secants(found.h, found.y), len(h) // 2
            one, other = moments(h[:half], y[:half]), moments(h[half:], y[half:])
        nothing = norms.new_empty(0)
        looks_at_rows = (self.num_dense_steps + 1) % _BALANCE_EVERY == 0
        norms, imbalance, comparison, turn, lengths, product = read(
            norms,
            layer.row_imbalance() if looks_at_rows else nothing,
            nothing if other is None else _comparison(one, other, found),
            nothing if self._last is None else _turn(found.mean, self._last.mean),
            _lengths(found),
            nothing if secants is None else secants.product,
        )
        if not _are_finite(norms):
            return False
        if self._start is None and not self.trains_all_layers:
            self._start = layer.weight.clone()
        if other is not None:
            self._compare(comparison, dim)
        if self._last is not None:
            self._update_trust(turn, dim)
        # What the share is for a Gaussian posterior, where the only noise is that of few samples.
        gaussian_share = count / (count + dim + 1)
        matrix_share = self._matrix_share.value / gaussian_share
        longest, median, mean, trace = lengths.tolist()
        if secants is not None:
            step = secants.step(self.decay * min(1.0, matrix_share), product)
        else:
            rate = _RELATIVE_RATE * self.decay * self._matrix_share.value
            step = relative_step(found.h, found.y, rate)
        self._change_layer(found, *step, trace)
        if looks_at_rows:
            layer.balance(_MAX_ROW_LENGTH, imbalance.item())
        root = math.sqrt(dim)
        self._judge(longest / root, median / root, mean / root, matrix_share)
        return True

    def _change_layer(self, found: Moments, left: Tensor, right: Tensor, trace: float) -> None:
        """Change the dense layer: ``W ← W (I + P Qᵀ)``, its scale by the trace of M, and b by d.

        :param Tensor left: ``Pᵀ``, shape ``(n, D)``, like ``right``, which is ``Qᵀ``.
        :param float trace: ``tr M / D``.
        """
        layer, decay = self.guide.last_layer, self.decay
        growth = -_TRACE_RATE * decay * self._trace_share.value * min(max(trace, -1.0), 1.0)
        # d in the coordinates of the new h, whose scales fit the posterior better.
        mean = found.mean + right.mT @ (left @ found.mean)
        longest = self._trust * math.sqrt(len(mean))
        mean_rate = _MEAN_RATE * decay * max(self._mean_share.value, _LEAST_MEAN_RATE)
        mean *= -mean_rate * (longest / mean.norm().clamp(min=_TINY)).clamp(max=1.0)
        self._last, self._last_bias = found, layer.bias.clone()
        dtype = layer.theta.dtype
        layer.multiply_input(left.to(dtype), right.to(dtype))
        layer.log_scale.add_(growth)
        layer.shift_input(mean.to(dtype))
        self.num_dense_steps += 1

    def _judge(self, longest: float, median: float, mean: float, matrix_share: float) -> None:
        """Note whether the guide is the posterior, and whether nothing but noise has been found.

        :param float longest: the length of the longest y, in units of √D, like the next two.
        :param float median: the median length of y.
        :param float mean: the length of d.
        :param float matrix_share: the signal in M, in units of that for a Gaussian posterior.
        """
        self.is_at_posterior = max(longest, mean) < _NEGLIGIBLE_LENGTH
        is_calm = (
            median < _CALM_LENGTH
            and matrix_share < _CALM_MATRIX_SIGNAL
            and mean < _CALM_MEAN
            and self._mean_share.value < _CALM_MEAN_SIGNAL
        )
        self._num_calm = self._num_calm + 1 if is_calm else 0

    def _compare(self, comparison: Tensor, dim: int) -> None:
        """Estimate the signal from two independent estimates, and the power from the whole.

        :param Tensor comparison: from :func:`_comparison`.
        """
        *traces, inner, square, mean_inner, mean_square = comparison.tolist()
        signal = inner - dim * traces[0] * traces[1]
        self._matrix_share.update(signal, square - dim * traces[2] ** 2)
        self._trace_share.update(traces[0] * traces[1], traces[2] ** 2)
        self._mean_share.update(mean_inner, mean_square)

    @property
    def _is_gaussian(self) -> bool:
        """Whether h is still standard normal."""
        return not self.trains_all_layers or self.guide.num_layers == 1

    def _update_trust(self, turn: Tensor, dim: int) -> None:
        """Let the location's steps be longer while they agree, and shorter where they turn back.

        :param Tensor turn: from :func:`_turn`.
        """
        inner, length, last_length = turn.tolist()
        cosine = inner / max(length * last_length, _TINY)
        if cosine < 0 or length > self._trust * math.sqrt(dim):
            trust = self._trust * math.exp(_TRUST_CHANGE * cosine)
            self._trust = min(max(trust, _MIN_TRUST), _MAX_TRUST)

    @torch.no_grad()
    def recover(self) -> None:
        """Return to the last location, with smaller scales.

        As :meth:`step` does where gradients are not finite. For where the model raises an error.
        """
        self._recording.clear()
        self.zero_grad()
        for adam in self._adams.values():
            adam.zero_grad()
        layer = self.guide.last_layer
        if self._last_bias is not None:
            layer.bias.copy_(self._last_bias)
        layer.log_scale.add_(math.log(_NARROWING))
        self._trust = max(self._trust * _NARROWING**4, _MIN_TRUST)
        self._last = None

    def _update_phase(self) -> None:
        """Train all layers, once the dense one has found the Gaussian that is nearest."""
        if self.trains_all_layers:
            return
        if self._start is None:  # no sample has been recorded so far: is there to be one?
            self.trains_all_layers = not self.guide.last_layer.is_trained
            return
        is_late = self.num_steps is not None and self.num_calls >= _LATEST_START * self.num_steps
        is_calm = self._num_calm >= _CALM_STEPS and self.num_dense_steps >= _FIRST_CALM_STEP
        if (is_late or is_calm) and not self.is_at_posterior:
            # The Gaussian does not depend on rotations of h, and its steps have turned h at random.
            # What precedes may: the first of LowRankAutoregressive's features move the later ones.
            self.guide.last_layer.rotate_input(self._start)
            self.trains_all_layers, self._last, self._start = True, None, None

    def _step_adam(self, params: Iterable[Tensor]) -> None:
        """Adam, for what has a gradient and is to be trained."""
        own = {id(parameter): name for name, parameter in self.guide.named_parameters()}
        for parameter in params:
            name = own.get(id(parameter))
            if parameter.grad is None or (name is not None and not self.trains_all_layers):
                continue
            adam = self._adam_of(parameter, name)
            adam.param_groups[0]["lr"] = self.lr * self.decay
            adam.step()

    def _adam_of(self, parameter: Tensor, name: str | None) -> torch.optim.Adam:
        if name is None:
            name = pyro.get_param_store().param_name(parameter)
        if name is None:  # of a module that owns its parameters
            name = self._unnamed.setdefault(id(parameter), str(len(self._unnamed)))
        adam = self._adams.get(name)
        if adam is None or adam.param_groups[0]["params"][0] is not parameter:
            adam = self._adams[name] = torch.optim.Adam([parameter], lr=self.lr)
            state = self._adam_states.pop(name, None)
            if state is not None:
                adam.load_state_dict(state)
        return adam

    def get_state(self) -> dict[str, Any]:
        """The state, for :meth:`set_state` of an optimizer of a guide in the same state."""
        adams = {name: adam.state_dict() for name, adam in self._adams.items()}
        return {
            **{name: getattr(self, name) for name in self._SAVED},
            "shares": [vars(share).copy() for share in self._shares],
            "recorded": self._recording.state(),
            "adams": {**self._adam_states, **adams},
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in self._SAVED:
            setattr(self, name, state_dict[name])
        for share, values in zip(self._shares, state_dict["shares"], strict=True):
            vars(share).update(values)
        self._recording.load_state(state_dict["recorded"])
        self._adams, self._adam_states = {}, dict(state_dict["adams"])

    @property
    def _shares(self) -> list[SignalShare]:
        return [self._matrix_share, self._mean_share, self._trace_share]


def _are_finite(norms: Tensor) -> bool:
    return bool(torch.isfinite(norms).all())


def _comparison(one: Moments, other: Moments, both: Moments) -> Tensor:
    """Traces, inner products of M, and those of d, of estimates and the whole, shape ``(7,)``."""
    return torch.stack(
        [
            *(part.bounded.trace for part in (one, other, both)),
            one.bounded.inner(other.bounded),
            both.bounded.inner(both.bounded),
            one.bounded_mean @ other.bounded_mean,
            both.bounded_mean @ both.bounded_mean,
        ]
    )


def _turn(mean: Tensor, last: Tensor) -> Tensor:
    """The inner product of two directions, and their lengths, shape ``(3,)``."""
    return torch.stack([mean @ last, mean.norm(), last.norm()])


def _lengths(found: Moments) -> Tensor:
    """The largest and the median length of y, that of d, and the trace of the bounded M, shape
    ``(4,)``."""
    lengths = found.y.norm(dim=-1)
    return torch.stack([lengths.max(), lengths.median(), found.mean.norm(), found.bounded.trace])
