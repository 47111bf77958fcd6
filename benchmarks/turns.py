"""Guides in training side by side, for equal time.

They take turns of 0.2 s, so that whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import pyro
import torch
from annealing import Length
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoContinuous

TURN_SECONDS = 0.2


@pyro.validation_enabled(False)  # for the checks would cost some guides more than others
def train(
    model: Callable[[], object],
    guides: Mapping[str, AutoContinuous],
    *,
    learning_rate: float,
    seconds: float,
) -> dict[str, Length]:
    """Train guides by SVI (Adam, one sample a step) for so many seconds each.

    The time is that of the training steps alone. A guide whose loss is no longer finite has
    diverged: it is left as it is.
    """
    steps = {}
    for name, guide in guides.items():
        guide()  # creates its parameters
        guide.train()
        steps[name] = _make_step(Trace_ELBO()(model, guide), learning_rate)
    lengths = dict.fromkeys(guides, Length(0, 0.0))
    unfinished = set(guides)
    while unfinished:
        name = min(sorted(unfinished), key=lambda name: lengths[name].seconds)
        end_of_turn = min(lengths[name].seconds + TURN_SECONDS, seconds)
        while lengths[name].seconds < end_of_turn and name in unfinished:
            start = time.perf_counter()
            if not math.isfinite(steps[name]()):
                unfinished.remove(name)
            taken = time.perf_counter() - start
            lengths[name] = Length(lengths[name].steps + 1, lengths[name].seconds + taken)
        if lengths[name].seconds >= seconds:
            unfinished.discard(name)
    return lengths


def _make_step(objective: torch.nn.Module, learning_rate: float) -> Callable[[], float]:
    """A step of Adam as a function that returns the loss; NaN if a matrix has no factors."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=learning_rate, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        try:
            loss = objective()
            loss.backward()
            optimizer.step()
        except torch.linalg.LinAlgError:  # it is singular or not finite
            return math.nan
        return loss.item()

    return step
