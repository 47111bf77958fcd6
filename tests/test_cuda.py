"""On a CUDA device: every layer computes what it does on the CPU, and rarely waits for the device.

Without a GPU, ``tests/test_simulated_cuda.py`` runs this file on a simulated one.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyro
import pytest
import torch
from torch import Tensor, nn

from tests.registry import (
    CASES,
    CONDITIONAL_CASES,
    Case,
    batch,
    density_loss,
    guide_loss,
    output_batch,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# What a GPU's sums and products in another order than the CPU's leave after some steps of training.
ROUNDING = 1e-6

# How often a steady step of training waits for the device; layers that are not named never do.
# A refined convolution and a refined pair read their Krylov spaces.
WAITS = {}


class Trained(NamedTuple):
    """What became of a transform."""

    losses: list[Tensor]
    outputs: list[Tensor]
    """``T(x)``, its log-det, and ``T.inv(y)``, in eval() mode."""
    state: dict[str, Tensor]
    waits: Counter[str]
    """The lines of the library that waited for the device in the last step."""


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    """Counts what torch reports as synchronizing, by the line of Python that called it."""
    waits: Counter[str] = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            waits[f"{one.filename}:{one.lineno}"] += 1


def train(transform: nn.Module, losses: Callable[[int], Tensor], steps: int) -> list[Tensor]:
    parameters = [one for one in transform.parameters() if one.requires_grad]
    found = []
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = None
        loss = losses(step)
        if parameters:
            loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.01 * parameter.grad
        found.append(loss.detach())
    return found


@functools.cache
def trained(name: str, device: str) -> Trained:
    case = CASES[name]
    transform = case.make().to(device)
    data = [batch(case, seed=seed).to(device) for seed in range(4)]

    def loss(step: int) -> Tensor:
        if step % 2 == 0:
            return density_loss(transform, data[step])
        return guide_loss(transform, data[step])

    def log_density(step: int) -> Tensor:
        y = transform(data[step])
        log_det = transform.log_abs_det_jacobian(data[step], y)
        return 0.5 * y.square().mean() - log_det.mean() / data[step][0].numel()

    losses = train(transform, loss, 3)
    with no_validation():
        losses += train(transform, log_density, 2)
        with counting_waits() if device == "cuda" else nullcounter() as waits:
            losses += train(transform, log_density, 1)
    transform.eval()
    y = transform(data[0])
    outputs = [y, transform.log_abs_det_jacobian(data[0], y)]
    outputs.append(transform.inv(output_batch(case).to(device)))
    state = {key: one for key, one in transform.state_dict().items() if isinstance(one, Tensor)}
    return Trained(losses, outputs, state, waits)


@contextmanager
def nullcounter() -> Iterator[Counter[str]]:
    yield Counter()


@contextmanager
def no_validation() -> Iterator[None]:
    """Without Pyro's checks of values, each of which waits for the device."""
    pyro.enable_validation(False)
    yield
    pyro.enable_validation(True)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_training_gives_what_it_does_on_the_cpu(name: str) -> None:
    actual, expected = trained(name, "cuda"), trained(name, "cpu")
    assert_equal(actual.losses, expected.losses)
    assert_equal(actual.outputs, expected.outputs)
    assert_equal(list(actual.state.values()), list(expected.state.values()))


@pytest.mark.parametrize("name", CASES)
def test_steady_step_does_not_wait(name: str) -> None:
    waits = trained(name, "cuda").waits
    assert sum(waits.values()) <= WAITS.get(name, 0), waits
