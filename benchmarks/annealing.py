"""Training a guide for as good an answer as it can give: several samples a step, and a rate that
falls to 0 by a cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoContinuous


class Length(NamedTuple):
    """How long a training was."""

    steps: int
    seconds: float


def train(
    model: Callable[[], object],
    guide: AutoContinuous,
    *,
    rate: float,
    num_particles: int,
    num_steps: float = math.inf,
    seconds: float = math.inf,
) -> Length:
    """Train the guide by Adam, for so many steps or seconds, of which one is to be given."""
    elbo = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=0)
    objective = elbo(model, guide)
    guide()
    optimizer = torch.optim.Adam(objective.parameters(), lr=rate, fused=True)
    start = time.perf_counter()
    done = Length(0, 0.0)
    while (share := done.steps / num_steps + done.seconds / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
        done = Length(done.steps + 1, time.perf_counter() - start)
    return done
