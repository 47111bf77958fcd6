"""The time of training steps: methods that take turns, so that what else the machine does slows all
of them alike."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: ``x -> (z, log|det|)``, the log-determinant None, a scalar or one for each row.
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]

#: The steps of a turn, at least, where they are not all alike.
MIN_STEPS = 30


def forward_of(layer: nn.Module) -> Forward:
    """A transform and its log-determinant; None for a layer that has none, such as nn.Linear."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        z = layer(x)
        has_log_det = hasattr(layer, "log_abs_det_jacobian")
        return z, layer.log_abs_det_jacobian(x, z) if has_log_det else None

    return forward


class Clock:
    """Marks in time: of a GPU's own work; of this process on one thread of a CPU, so that others do
    not count; else of the wall."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        if not self.is_cuda:
            return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, float):
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


class Turn(NamedTuple):
    """Some steps, and means over them."""

    num_steps: int
    step_ms: float
    """Forward, log-determinant and backward."""
    adam_ms: float
    faults: float
    """Pages that the system has given to the process."""


class TimedTraining:
    """The training of ``z = f(x)`` as a density of x, stopped and continued from turn to turn.

    :param forward: f and its log-determinant.
    :param Tensor data: batches of x, shape ``(n, B, *event)``, which are used again and again.
    :param float learning_rate: of Adam.
    :param bool is_steady: whether all steps are alike. If not, the mean over all of them counts,
        and not the median over the turns.
    :param bool input_gradient: whether x gets a gradient, as inside a flow.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: Iterable[Tensor],
        data: Tensor,
        learning_rate: float,
        *,
        is_steady: bool,
        input_gradient: bool = True,
    ) -> None:
        self.forward, self.data = forward, data
        self.optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        self.is_steady, self.input_gradient = is_steady, input_gradient
        self.clock = Clock(data.device)
        #: Steps so far.
        self.count = 0
        self.turns: list[Turn] = []

    def forward_backward(self) -> None:
        x = self.data[self.count % len(self.data)].requires_grad_(self.input_gradient)
        z, log_det = self.forward(x)
        loss = z.square().sum() / (2 * len(x))
        if log_det is not None:
            loss = loss - log_det.mean()
        loss.backward()
        x.grad = None
        self.count += 1

    def turn(self, num_steps: int) -> None:
        faults, marks = _num_faults(), []
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            start = self.clock.mark()
            self.forward_backward()
            middle = self.clock.mark()
            self.optimizer.step()
            marks.append((start, middle, self.clock.mark()))
        ms = self.clock.milliseconds
        self.turns.append(
            Turn(
                num_steps,
                statistics.fmean(ms(start, middle) for start, middle, _ in marks),
                statistics.fmean(ms(middle, end) for _, middle, end in marks),
                (_num_faults() - faults) / num_steps,
            )
        )

    def average(self) -> Turn:
        """Of all turns."""
        counts, step_ms, adam_ms, faults = zip(*self.turns, strict=True)
        total = sum(counts)
        mean = sum(n * ms for n, ms in zip(counts, step_ms, strict=True)) / total
        return Turn(
            total,
            statistics.median(step_ms) if self.is_steady else mean,
            statistics.median(adam_ms),
            sum(n * number for n, number in zip(counts, faults, strict=True)) / total,
        )


def take_turns(
    runs: Sequence[TimedTraining], *, seconds: float, turns: int, max_steps: int = 10_000
) -> None:
    """Train each method for about so many seconds, in so many turns. What comes before, to make
    buffers and to choose kernels, does not count."""
    counts = []
    for run in runs:
        run.turn(1)
        run.turn(1)
        taken = (run.turns[-1].step_ms + run.turns[-1].adam_ms) / 1e3
        affordable = min(max_steps, round(seconds / turns / max(taken, 1e-9)))
        counts.append(max(affordable, 1 if run.is_steady else MIN_STEPS))
        if taken < seconds:
            run.turn(counts[-1])
        run.turns.clear()
    for _ in range(turns):
        for run, count in zip(runs, counts, strict=True):
            run.turn(count)


def _num_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
