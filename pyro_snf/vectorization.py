"""Many draws in one call of model and guide: whether it is right, and how to do it.

Pyro's ``vectorize_particles`` runs model and guide once under a plate of draws, to the left of all
plates of their own. Models whose statements mix draws, as ``x.sum()`` or ``x[0]`` do, raise no
error there; their log-densities are wrong. :func:`can_vectorize` finds out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.subsample_messenger import _Subsample
from torch import nn

__all__ = [
    "PARTICLES",
    "can_vectorize",
    "draw_traces",
    "evaluation_mode",
    "is_subsampled",
    "keep_random_state",
    "nesting_of",
    "plate_frames",
    "single_traces",
]

Program = Callable[..., Any]

PARTICLES = "num_particles_vectorized"
"""The name of the plate of draws, as in Pyro's ELBOs."""

# Continuous draws differ, so that two would do. Of a discrete site, ten draws show a mistake that
# appears at one value in four with a probability of 1 − (3/4)^10 = 94 %.
_NUM_TRIALS = 10


def single_traces(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide for one draw, in which no site is enumerated.

    Model and guide are run once, in ``eval()`` mode, which creates the parameters and modules that
    they create in their first call. The state of the global random number generators is kept.
    """
    with torch.no_grad(), keep_random_state(), evaluation_mode(model, guide):
        messenger = poutine.unwrap(guide)
        if isinstance(messenger, GuideMessenger):
            guide(*args, **kwargs)
            return messenger.get_traces()
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def nesting_of(*traces: Trace) -> int:
    """The number of batch dimensions that the plates in some traces take: of those of one draw,
    Pyro's ``max_plate_nesting``.
    """
    dims = (frame.dim for frame in plate_frames(*traces))
    return max((-dim for dim in dims if dim is not None), default=0)


def plate_frames(*traces: Trace) -> Iterator[CondIndepStackFrame]:
    """The plates around the sites in some traces, repeated for each site."""
    for trace in traces:
        for site in trace.nodes.values():
            yield from site.get("cond_indep_stack", ())


def is_subsampled(frame: CondIndepStackFrame) -> bool:
    """Whether a plate is for a part of its size only."""
    return frame.full_size not in (None, frame.size)


def can_vectorize(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    max_plate_nesting: int,
) -> bool:
    """Whether ``vectorize_particles=True`` gives what single draws give.

    Ten draws are made in one call, and the log-density of every site of model and guide is compared
    with that of a call for each draw alone, with the same latent values and the same subsamples of
    plates. Model-side sites with ``infer={"enumerate": "parallel"}`` are enumerated in both. Errors
    in these calls mean False, and so do log-densities that are random or that cannot be computed
    for a given value, as those of a guide with Pyro's ``planar``, and a guide that is a messenger.
    A mistake that only appears at rare values of a discrete site can be missed.

    Model and guide are run in ``eval()`` mode and without gradients. The state of the global random
    number generators is kept, and the modes of the modules are.

    :param args: the positional arguments of model and guide.
    :param kwargs: their keyword arguments.
    :param int max_plate_nesting: the number of batch dimensions of their plates, as
        :func:`nesting_of` finds it.
    """
    if isinstance(poutine.unwrap(guide), GuideMessenger):  # Pyro would run the model in its place
        return False
    with (
        torch.no_grad(),
        keep_random_state(),
        evaluation_mode(model, guide),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            return _agrees_with_single_draws(model, guide, args, kwargs, max_plate_nesting)
        except Exception:  # of any kind: programs that are not made for batches fail in all ways
            return False


def draw_traces(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    max_plate_nesting: float,
    num_particles: int | None = None,
) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide, whose draws the model is run with.

    Model-side sites with ``infer={"enumerate": "parallel"}`` that the guide does not sample are
    enumerated, in dimensions to the left of all plates.

    :param max_plate_nesting: the number of batch dimensions of the plates; infinite for programs
        whose plates are not known, of which no site is enumerated.
    :param int num_particles: the number of draws in one call, under a plate in dimension
        ``-max_plate_nesting - 1``; None for one draw without such a plate.
    """
    if max_plate_nesting < math.inf:
        dim = -int(max_plate_nesting) - 1
        if num_particles is not None:
            # One plate for each: a plate is not made to be entered twice.
            guide = pyro.plate(PARTICLES, num_particles, dim=dim)(guide)
            model = pyro.plate(PARTICLES, num_particles, dim=dim)(model)
        model = poutine.enum(model, first_available_dim=dim - 1)
    return get_importance_trace("flat", max_plate_nesting + 1, model, guide, args, kwargs)


@contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """A context in which modules, and the modules whose methods these are, are in eval mode."""
    owners = [getattr(program, "__self__", program) for program in programs]
    roots = [owner for owner in owners if isinstance(owner, nn.Module)]
    modes = {module: module.training for root in roots for module in root.modules()}
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.train(mode)  # modules may override it, to drop caches for instance
        for module, mode in modes.items():
            module.training = mode  # train() has changed their children too


@contextmanager
def keep_random_state() -> Iterator[None]:
    """A context after which the global generators (torch's, NumPy's, Python's) are as before."""
    state = pyro.util.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        pyro.util.set_rng_state(state)


def _agrees_with_single_draws(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    max_plate_nesting: int,
) -> bool:
    singles = single_traces(model, guide, args, kwargs)
    fixed = Trace()
    for trace in singles:
        for name, site in trace.nodes.items():
            if isinstance(site.get("fn"), _Subsample) and name not in fixed:
                fixed.add_node(name, **site)

    def run(fixed: Trace, num_particles: int | None) -> tuple[Trace, Trace]:
        replayed_model, replayed_guide = (
            poutine.replay(program, trace=fixed) for program in (model, guide)
        )
        return draw_traces(
            replayed_model, replayed_guide, args, kwargs, max_plate_nesting, num_particles
        )

    together = run(fixed, _NUM_TRIALS)
    for index in range(_NUM_TRIALS):
        given = fixed.copy()
        for name in together[1].stochastic_nodes:
            node: Any = together[1].nodes[name]
            single: Any = singles[1].nodes[name]
            # A point mass is a function of the other sites. It is zero at its own value of before
            # if that is rounded in another way.
            if not _is_point_mass(node["fn"]):
                value = node["value"][index].reshape(single["value"].shape)
                given.add_node(name, **{**node, "value": value})
        alone = run(given, None)
        if not all(
            _traces_agree(*pair, index, -max_plate_nesting - 1)
            for pair in zip(together, alone, strict=True)
        ):
            return False
    return True


def _is_point_mass(distribution: Any) -> bool:
    while isinstance(distribution, dist.Independent | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


def _traces_agree(together: Trace, alone: Trace, index: int, dim: int) -> bool:
    """Whether draw ``index``, along ``dim``, has the log-densities of the draw alone."""

    def log_probs(trace: Trace) -> dict[str, torch.Tensor]:
        sites = trace.nodes.items()
        return {name: site["log_prob"] for name, site in sites if site["type"] == "sample"}

    expected, batches = log_probs(alone), log_probs(together)
    return expected.keys() == batches.keys() and all(
        _close(batches[name].select(dim, index), value) for name, value in expected.items()
    )


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    # Half of the digits: inverses and sums are computed in another order.
    tolerance = math.sqrt(torch.finfo(expected.dtype).eps)
    return actual.numel() == expected.numel() and torch.allclose(
        actual.reshape(expected.shape), expected, tolerance, tolerance, equal_nan=True
    )
