"""The usual recipe for guides: Pyro's ``ClippedAdam``, its rate decaying from 1e-2 to 1e-4.

It is also what ``pyro_snf.fit`` does with Pyro's guides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.optim.clipped_adam import ClippedAdam

FIRST_RATE, LAST_RATE = 1e-2, 1e-4


class Length(NamedTuple):
    """How long a training was."""

    steps: int
    seconds: float


def train(
    model: Callable[[], object],
    guide: AutoContinuous,
    *,
    num_particles: int,
    num_steps: float = math.inf,
    seconds: float = math.inf,
) -> Length:
    """Train the guide for so many steps or seconds, of which one is to be given.

    It ends early if a covariance of the model is no longer positive definite.
    """
    elbo = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=0)
    objective = elbo(model, guide)
    guide()
    guide.train()
    optimizer = ClippedAdam(objective.parameters(), lr=FIRST_RATE)
    start = time.perf_counter()
    done = Length(0, 0.0)
    while (share := done.steps / num_steps + done.seconds / seconds) < 1:
        optimizer.param_groups[0]["lr"] = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** share
        optimizer.zero_grad()
        try:
            objective().backward()
        except torch.linalg.LinAlgError:
            break
        optimizer.step()
        done = Length(done.steps + 1, time.perf_counter() - start)
    return done
