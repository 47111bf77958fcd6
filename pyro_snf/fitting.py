"""Fits a guide to a model, in one line."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import ClippedAdam, PyroOptim
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_snf.guides import AutoSelfNormalizingFlow
from pyro_snf.optim import NaturalGradient
from pyro_snf.options import as_count, as_positive, as_pyro_seed, check_flag, expect
from pyro_snf.plotting import plot_losses
from pyro_snf.processes import check_one_process
from pyro_snf.progress import Progress
from pyro_snf.vectorization import can_vectorize, nesting_of, single_traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Fit", "fit"]

# For guides that NaturalGradient is not for: Pyro's usual rates, from the first step to the last.
_ADAM_RATE, _LAST_ADAM_RATE = 1e-2, 1e-4

# Particles of a step. A product of the D² weights with some more of them takes hardly more time.
_NUM_PARTICLES, _MAX_PARTICLES, _DIMENSIONS_PER_PARTICLE = 8, 64, 32

# The last quarter of the losses is compared with the one before, every so many steps.
_FIRST_CHECK = 200
_CHECK_EVERY = 25

# Once nothing is gained, rates decay for half as many steps as there were, and for so many at
# least: a hundred steps average the noise of the last rate.
_MIN_DECAY = 100

# Steps in a row at which the guide is the posterior. One may be chance, of a part of the data.
_NUM_EXACT = 3

# Losses in a row that are not finite, or steps at which the model raised an error.
_MAX_FAILURES = 100

_DEFAULT_TOLERANCE = 0.005

# Starts, and the share of the steps that each of them gets before the best one goes on: a hundred
# of two thousand steps bring most posteriors to the Gaussian of their mode.
_NUM_STARTS = 4
_MIN_TRIAL = 25
_SHARE_OF_TRIAL = 0.05
# Of the first locations of further starts, each unconstrained number: as in Stan.
_START_RADIUS = 2.0

# The loss is still falling where it does so by ten times the tolerance and three standard errors.
_FALL, _FALL_ERRORS = 10.0, 3.0

# It has risen where it ends so many nats, and standard errors, above the best tenth of the steps.
_RISE, _RISE_ERRORS, _FEWEST_FOR_RISE = 1.0, 5.0, 200


@dataclass
class Fit:
    """What :func:`fit` did. The guide itself has been trained in place."""

    losses: NDArray[np.float64]
    """The loss at every step, shape ``(num_steps,)``: estimates of −ELBO in nats."""
    reason: str
    """Why it stopped: ``"converged"``, ``"num_steps"``, ``"interrupted"`` or ``"diverged"``."""
    is_falling: bool
    """Whether the loss was still falling at the end."""
    seconds: float
    """Of the steps of all starts."""
    start_losses: list[float] = field(default_factory=list)
    """With several starts, the loss that each had reached when the best one was chosen."""

    @property
    def num_steps(self) -> int:
        """The number of steps of the start that was kept."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The mean loss of the last tenth of the steps; NaN without any."""
        tail = self.losses[-max(1, self.num_steps // 10) :]
        return float(tail.mean()) if len(tail) else math.nan

    def plot(self) -> Figure:
        """The loss of every step; of many steps, means over groups of them."""
        return plot_losses({"−ELBO": self.losses})

    def __str__(self) -> str:
        text = f"{self.num_steps} steps in {self.seconds:.1f} s, stopped: {self.reason}\n"
        text += f"−ELBO: {self.loss:.6g} nats" + (", still falling" if self.is_falling else "")
        if self.start_losses:
            text += f"\nof the starts: {', '.join(f'{loss:.6g}' for loss in self.start_losses)}"
        return text

    __repr__ = __str__


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_steps: int = 2000,
    num_particles: int | None = None,
    optim: PyroOptim | None = None,
    num_starts: int | None = None,
    tolerance: float | None = _DEFAULT_TOLERANCE,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    """Fit a guide to a model by SVI.

    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    >>> guide = AutoSelfNormalizingFlow(model)
    >>> result = fit(model, guide, num_steps=300, seed=0, progress=False)
    >>> print(f"{result.loss:.2f}")  # log p(x) is -1.52
    1.52

    An :class:`~pyro_snf.AutoSelfNormalizingFlow` is trained by
    :class:`~pyro_snf.optim.NaturalGradient`, any other guide by Pyro's ``ClippedAdam`` at a rate
    that decays from 1e-2 to 1e-4, or by ``optim``. The particles of a step are drawn in one call
    where the model allows it (:func:`~pyro_snf.vectorization.can_vectorize`), else one after the
    other. Sites that are marked to be enumerated are summed out.

    Training stops when the guide is the posterior, but for rounding, and when the mean loss has not
    changed by the tolerance, give or take its standard error, from one quarter of the steps to the
    last one; with natural gradients, the rates decay first, in half as many steps. Ctrl-C stops it
    too, and what there is is returned.

    :param model: a Pyro model; it is called with ``args`` and ``kwargs``, as the guide is.
    :param guide: a Pyro guide, which is trained in place. If it is a module, it is in ``eval()``
        mode afterwards, in which its densities are exact.
    :param int num_steps: the most steps.
    :param num_particles: draws from the guide for the gradient of a step. None stands for 8; for
        D/32 of them, but 64 at most, where that is more, the particles are drawn in one call, and
        the guide is an ``AutoSelfNormalizingFlow`` of dimension D: all of them read the D² weights
        at once.
    :param optim: an optimizer of Pyro's, or a ``NaturalGradient``.
    :param num_starts: how many locations to start from, for an ``AutoSelfNormalizingFlow``: its
        own, and others whose unconstrained numbers are uniform on (−2, 2). Each gets a twentieth of
        the steps; the one of the lowest loss gets all of the others. A posterior with several modes
        shows in :attr:`Fit.start_losses`. None stands for four if the guide has not been called
        yet, no ``optim`` is given, and there are 500 steps or more; else for one.
    :param tolerance: in nats; None for no stop before ``num_steps``.
    :param seed: for ``pyro.set_rng_seed``; None leaves the random number generators as they are.
    :param bool progress: whether to show a progress bar or, where there is no terminal, a line
        every ten seconds, on the standard error stream.
    :raises ValueError: for options outside these ranges, and for an autoguide that has been called
        with a plate of another size, around sites that it samples.
    :raises RuntimeError: in several processes, where gradients are not recorded, and where there is
        nothing to train.
    :warns UserWarning: if the loss was still falling, if it ended far above what it had been, and
        if it was not finite in 100 steps in a row.
    """
    check_one_process("fit")
    num_steps = as_count("num_steps", num_steps)
    num_particles = None if num_particles is None else as_count("num_particles", num_particles)
    tolerance = None if tolerance is None else as_positive("tolerance", tolerance)
    check_flag("progress", progress)
    seed = as_pyro_seed(seed)
    expect("optim, one of Pyro's, or None", optim is None or isinstance(optim, PyroOptim), optim)
    num_trial_steps = math.ceil(_SHARE_OF_TRIAL * num_steps)
    is_flow = isinstance(guide, AutoSelfNormalizingFlow) and NaturalGradient.is_for(guide)
    # The guide, if natural gradients train it.
    flow: Any = guide if is_flow and optim is None else None
    if num_starts is None:
        is_new = flow is not None and flow.transform is None
        num_starts = _NUM_STARTS if is_new and num_trial_steps >= _MIN_TRIAL else 1
    num_starts = as_count("num_starts", num_starts)
    expected = "num_starts=1 with an optim, and for guides that NaturalGradient is not for"
    expect(expected, flow is not None or num_starts == 1, num_starts)
    if seed is not None:
        pyro.set_rng_seed(seed)
    if not torch.is_grad_enabled():
        raise RuntimeError("expected gradients to be recorded; they are not, as under no_grad")
    if isinstance(guide, nn.Module):
        guide.train()
    elbo = _make_elbo(model, guide, args, kwargs, num_particles)
    num_steps_of_best = num_steps - (num_starts - 1) * num_trial_steps
    expect("fewer starts: each takes 5 % of the steps", num_steps_of_best > 0, num_starts)
    start_losses: list[float] = []
    start = time.perf_counter()
    with Progress(progress, num_steps) as bar:

        def backward() -> float:
            return elbo.loss_and_grads(model, guide, *args, **kwargs)

        def new_run() -> _Run:
            if flow is not None:
                return _Run(backward, NaturalGradient(flow, num_steps_of_best), bar)
            if optim is not None:
                return _Run(backward, optim, bar)
            decay = (_LAST_ADAM_RATE / _ADAM_RATE) ** (1 / num_steps)
            return _Run(backward, ClippedAdam({"lr": _ADAM_RATE, "lrd": decay}), bar)

        if flow is not None and num_starts > 1:
            run, start_losses = _best_start(new_run, flow, num_starts, num_trial_steps)
        else:
            run = new_run()
        if run.reason != "interrupted":
            run.train(num_steps_of_best, tolerance)
    if flow is not None:
        flow.record(None)  # now, not when the optimizer happens to be collected
    if isinstance(guide, nn.Module):
        guide.eval()
    losses = np.array(run.losses)
    result = Fit(
        losses=losses,
        reason=run.reason,
        is_falling=run.reason != "converged"
        and _is_falling(losses, tolerance or _DEFAULT_TOLERANCE),
        seconds=time.perf_counter() - start,
        start_losses=start_losses,
    )
    if result.reason == "diverged":
        warnings.warn(f"the loss was not finite in {_MAX_FAILURES} steps in a row", stacklevel=2)
    elif result.is_falling and result.reason == "num_steps":
        warnings.warn(
            f"the loss was still falling after {num_steps} steps: take more", stacklevel=2
        )
    if (rise := _rise(losses)) > 0:
        warnings.warn(
            f"the loss ended {rise:.3g} nats above what it had been before: the guide has become "
            "worse; take Adam at a lower rate, optim=ClippedAdam({'lr': 1e-3}), or another guide",
            stacklevel=2,
        )
    return result


class _Run:
    """Steps of an optimizer, and their losses."""

    def __init__(self, backward: Callable[[], float], optim: Any, bar: Progress) -> None:
        self.backward, self.optim, self.bar = backward, optim, bar
        self.losses: list[float] = []
        self.reason = "num_steps"
        #: Whether the model may raise an error at the first step, too.
        self.may_fail_at_once = False

    def train(self, num_steps: int, tolerance: float | None = None) -> None:
        """Go on until there are so many losses, or a reason to stop."""
        try:
            self._train(num_steps, tolerance)
        except KeyboardInterrupt:
            self.reason = "interrupted"

    def _train(self, num_steps: int, tolerance: float | None) -> None:
        is_natural = isinstance(self.optim, NaturalGradient)
        num_failures, num_exact, first_check = 0, 0, _FIRST_CHECK
        while len(self.losses) < num_steps:
            has_started = self.may_fail_at_once or len(self.losses) > 0
            loss = self._step(may_fail=is_natural and has_started)
            self.losses.append(loss)
            self.bar.update(f"−ELBO {loss:.4g}")
            num_failures = 0 if math.isfinite(loss) else num_failures + 1
            if num_failures == _MAX_FAILURES:
                self.reason = "diverged"
                return
            count = len(self.losses)
            is_exact = is_natural and self.optim.is_at_posterior and num_failures == 0
            num_exact = num_exact + 1 if is_exact else 0
            if tolerance is not None and num_exact == _NUM_EXACT:
                self.reason = "converged"
                return
            if is_natural and not self.optim.trains_all_layers:
                first_check = max(_FIRST_CHECK, 2 * count)
            is_decaying = is_natural and self.optim.decay < 1
            if tolerance is None or is_decaying or count < first_check or count % _CHECK_EVERY:
                continue
            if _has_converged(np.array(self.losses), tolerance):
                self.reason = "converged"
                if not is_natural:
                    return
                num_steps = min(num_steps, count + max(_MIN_DECAY, count // 2))
                self.optim.start_decay(max(1, num_steps - count))

    def _step(self, may_fail: bool) -> float:
        try:
            # As in Pyro's SVI, which does not take parameters that modules own themselves.
            with poutine.trace(param_only=True) as capture:
                loss = self.backward()
            sites = capture.trace.nodes.values()
            params = list(dict.fromkeys(_unconstrained(site["value"]) for site in sites))
            if not any(one.requires_grad for one in params):
                raise RuntimeError("expected parameters to train; none requires a gradient")
            self.optim(params)
            zero_grads(params)
            return torch_item(loss)
        except (torch.linalg.LinAlgError, ValueError):
            # Of a model far from its posterior: a covariance that is not positive definite, or a
            # value that is not in the support any more.
            if not may_fail:
                raise
            self.optim.recover()
            return math.nan


def _unconstrained(value: Any) -> Tensor:
    """What an optimizer trains, of the value of a ``pyro.param``."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _make_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_particles: int | None,
) -> Trace_ELBO | TraceEnum_ELBO:
    traces = single_traces(model, guide, args, kwargs)
    _check_plates(guide, traces[0])
    nesting = nesting_of(*traces)
    is_enumerated = any(
        (site["infer"] or {}).get("enumerate")
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["is_observed"]
    )
    kind: Any = TraceEnum_ELBO if is_enumerated else Trace_ELBO
    vectorize = num_particles != 1 and can_vectorize(model, guide, args, kwargs, nesting)
    if num_particles is None:
        num_particles = _NUM_PARTICLES
        if vectorize and isinstance(guide, AutoSelfNormalizingFlow):
            by_dim = guide.last_layer.input_dim // _DIMENSIONS_PER_PARTICLE
            num_particles = min(max(num_particles, by_dim), _MAX_PARTICLES)
    return kind(num_particles, max_plate_nesting=nesting, vectorize_particles=vectorize)


def _check_plates(guide: Callable[..., Any], trace: Trace) -> None:
    """Raise where an autoguide was made for plates of other sizes: it would go on with those.

    :param trace: of the model.
    """
    prototype = getattr(guide, "prototype_trace", None)
    if prototype is None:
        return
    sizes, made_for = (
        {
            frame.name: frame.full_size
            for site in one.nodes.values()
            if site["type"] == "sample" and not site["is_observed"]
            for frame in site["cond_indep_stack"]
        }
        for one in (trace, prototype)
    )
    for name in sizes.keys() & made_for.keys():
        if sizes[name] != made_for[name]:
            raise ValueError(
                f"expected the plate {name!r} to be of size {made_for[name]}, for which the guide "
                f"was made in its first call; got {sizes[name]}: make a new guide"
            )


def _best_start(
    new_run: Callable[[], _Run],
    guide: AutoSelfNormalizingFlow,
    num_starts: int,
    num_steps: int,
) -> tuple[_Run, list[float]]:
    """Short runs from several locations: the best one, and the losses that they came to."""
    fresh = copy.deepcopy(guide.state_dict())
    best: tuple[float, _Run, Any, Any] | None = None
    losses = []
    for index in range(num_starts):
        guide.load_state_dict(fresh)
        if index:
            with torch.no_grad():
                guide.last_layer.bias.uniform_(-_START_RADIUS, _START_RADIUS)
        run = new_run()
        run.may_fail_at_once = index > 0  # at a location that is not the user's
        run.train(num_steps)
        tail = np.array(run.losses[-max(1, len(run.losses) // 5) :])
        loss = float(np.nan_to_num(np.median(tail), nan=math.inf)) if len(tail) else math.inf
        losses.append(loss)
        if best is None or loss < best[0]:
            state = copy.deepcopy((guide.state_dict(), run.optim.get_state()))
            best = loss, run, *state
        is_interrupted = run.reason == "interrupted"
        if is_interrupted:
            break
    assert best is not None
    _, run, guide_state, optim_state = best
    guide.load_state_dict(guide_state)
    going_on = new_run()
    going_on.optim.set_state(optim_state)
    going_on.losses = run.losses
    going_on.reason = "interrupted" if is_interrupted else "num_steps"
    return going_on, losses


def _fall(losses: NDArray[np.float64], size: int) -> tuple[float, float]:
    """How much the loss has fallen from the last but one to the last of so many losses each, and
    the standard error of that. Outliers count as the 1 % or 99 % quantile."""
    parts = [losses[-2 * size : -size], losses[-size:]]
    parts = [part[np.isfinite(part)] for part in parts]
    if min(map(len, parts)) < 2:
        return math.inf, math.inf
    parts = [np.clip(part, *np.quantile(part, [0.01, 0.99])) for part in parts]
    fall = parts[0].mean() - parts[1].mean()
    return float(fall), float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))


def _has_converged(losses: NDArray[np.float64], tolerance: float) -> bool:
    # A loss that has risen will fall again, if rates decay.
    fall, error = _fall(losses, len(losses) // 4)
    return abs(fall) + error < tolerance


def _is_falling(losses: NDArray[np.float64], tolerance: float) -> bool:
    if len(losses) < 20:
        return True
    fall, error = _fall(losses, len(losses) // 10)
    return fall > max(_FALL * tolerance, _FALL_ERRORS * error)


def _rise(losses: NDArray[np.float64]) -> float:
    """How far the loss ends above the best tenth of the steps, by medians; 0 for what is noise."""
    losses = losses[np.isfinite(losses)]
    if len(losses) < _FEWEST_FOR_RISE:
        return 0.0
    *before, last = np.array_split(losses, 10)
    best = min(before, key=np.median)
    # Of a median of normal losses, from their median absolute deviation.
    errors = [
        1.25 * 1.48 * np.median(np.abs(one - np.median(one))) / math.sqrt(len(one))
        for one in (best, last)
    ]
    rise = float(np.median(last) - np.median(best))
    return rise if rise > max(_RISE, _RISE_ERRORS * math.hypot(*errors)) else 0.0
