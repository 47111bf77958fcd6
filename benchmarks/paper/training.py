"""Training of a flow, evaluated after epochs, that can be interrupted and resumed bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Images
from files import deferred_interrupt, save_state
from models import layers_of, make_density, make_flow, whiten_first
from settings import BUDGETS, Settings
from torch import Tensor

from pyro_snf import images
from pyro_snf.density_fitting import copy_unaveraged
from pyro_snf.progress import Progress

# Evaluations have the same noise whatever the seed of the training.
_EVALUATION_SEED = 0
# Images that are evaluated at once.
_EVALUATION_BATCH = 500


class Evaluation(NamedTuple):
    """What was measured after so many epochs."""

    epoch: float
    num_steps: int
    seconds: float
    """Of training, by the clock of the settings; without evaluations."""
    training: float
    """The mean loss since the last evaluation, NaN at the start; for methods that give no value of
    the log-determinant in training, without it."""
    validation: float
    """Exact, in nats per image."""
    bits_per_dim: float
    error_estimate: float
    """The largest of the layers', of refined; NaN for others."""


class Best(NamedTuple):
    """The weights that were best in validation."""

    epoch: float
    validation: float
    state: dict[str, Any]


class Run:
    """A flow in training, and what was measured on the way."""

    def __init__(self, settings: Settings, data: Images) -> None:
        self.settings = settings
        self.data = data._replace(
            train=data.train[: settings.num_train or None],
            validation=data.validation[: settings.num_evaluated or None],
            test=data.test[: settings.num_evaluated or None],
        )
        self.clock = time.process_time if settings.clock == "processor" else time.perf_counter
        self.flow = make_flow(settings, data.event_shape)
        if settings.inputs == "whitened":
            generator = torch.Generator().manual_seed(settings.seed)
            pixels = self._dequantize(self.data.train, generator)
            to_logits = images.LogitTransform(data.num_levels)
            self.flow = whiten_first(self.flow, to_logits(pixels))
        self.evaluated = copy.deepcopy(self.flow) if settings.averaging else self.flow
        self.density, self.evaluated_density = (
            make_density(flow, data.event_shape, data.num_levels)
            for flow in (self.flow, self.evaluated)
        )
        self.optimizer = torch.optim.Adam(self._groups(), fused=True)
        self.steps_per_epoch = math.ceil(len(self.data.train) / settings.batch_size)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.num_steps = 0
        self.seconds = 0.0
        self.order = torch.empty(0, dtype=torch.long)
        """In which the images are taken in this epoch."""
        self.losses: list[float] = []
        """Since the last evaluation."""
        self.history: list[Evaluation] = []
        self.best: Best | None = None

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters and their rates, relative to that of raw weights.

        A step on θ = √n (A − I), n being the number of inputs of an output, at √n times the rate
        is one on A at the rate.
        """
        raw = {
            name: math.sqrt(parameter[0].numel()) if name.endswith("theta") else 1.0
            for name, parameter in self.flow.named_parameters()
        }
        return [
            {"params": [p for name, p in self.flow.named_parameters() if raw[name] == factor]}
            | {"factor": factor, "lr": 0.0}
            for factor in sorted(set(raw.values()))
        ]

    @property
    def epoch(self) -> float:
        return self.num_steps / self.steps_per_epoch

    def learning_rate(self) -> float:
        """Of the next step."""
        one = self.settings
        warm_up = one.warm_up_epochs * self.steps_per_epoch
        rate = one.learning_rate * min(1.0, (self.num_steps + 1) / max(warm_up, 1.0))
        if one.schedule == "cosine":
            rest = max(self.num_steps - warm_up, 0.0)
            rate *= (
                1 + math.cos(math.pi * rest / (one.epochs * self.steps_per_epoch - warm_up))
            ) / 2
        return rate

    def step(self) -> float:
        """One step of Adam; its loss, NaN where a layer is singular or not finite."""
        position = self.num_steps % self.steps_per_epoch
        if position == 0:
            self.order = torch.randperm(len(self.data.train), generator=self.generator)
        size = self.settings.batch_size
        batch = self._dequantize(self.data.train[self.order[position * size :][:size]])
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        start = self.clock()
        self.optimizer.zero_grad()
        try:
            loss = -self.density.log_prob(batch).mean()
            loss.backward()
            value = loss.item()  # waits for the device
            if self.settings.max_gradient_norm:
                torch.nn.utils.clip_grad_norm_(
                    self.flow.parameters(), self.settings.max_gradient_norm
                )
            if math.isfinite(value):
                self.optimizer.step()
        except (torch.linalg.LinAlgError, ValueError):  # Pyro refuses what is not finite
            if self.num_steps == 0:
                raise
            value = math.nan
        self.num_steps += 1
        if self.settings.averaging:
            self._average()
        self.seconds += self.clock() - start
        self.losses.append(value)
        return value

    @torch.no_grad()
    def _average(self) -> None:
        if self.num_steps == 1:  # what the first batch has initialized
            self.evaluated.load_state_dict(self.flow.state_dict())
            return
        window = min(self.settings.averaging * self.steps_per_epoch, self.num_steps)
        averages, latest = (list(flow.parameters()) for flow in (self.evaluated, self.flow))
        torch._foreach_lerp_(averages, latest, 1 / max(window, 1.0))

    def evaluate(self) -> None:
        """Add to the history."""
        if self.settings.averaging:
            # Such as inverses of the latest weights: approximate ones of the averages.
            copy_unaveraged(self.flow, self.evaluated)
        loss = self.negative_log_likelihood(self.data.validation)
        bits = images.bits_per_dim(torch.tensor(-loss), self.data.event_shape).item()
        training = sum(self.losses) / len(self.losses) if self.losses else math.nan
        estimates = [getattr(layer, "error_estimate", None) for layer in layers_of(self.flow)]
        error = max((one for one in estimates if one is not None), default=math.nan)
        self.losses = []
        self.history.append(
            Evaluation(self.epoch, self.num_steps, self.seconds, training, loss, bits, error)
        )
        if self.best is None or loss < self.best.validation:
            # Copies, for what a state_dict holds goes on to change.
            state = copy.deepcopy(dict(self.evaluated.state_dict()))
            self.best = Best(self.epoch, loss, state)

    @torch.no_grad()
    def negative_log_likelihood(self, pixels: Tensor) -> float:
        """The mean over dequantized images, in nats; exact, as always in ``eval()`` mode. NaN where
        a layer is singular or not finite."""
        self.evaluated.eval()
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        total = 0.0
        try:
            for batch in pixels.split(_EVALUATION_BATCH):
                log_prob = self.evaluated_density.log_prob(self._dequantize(batch, generator))
                total -= log_prob.double().sum().item()
        except torch.linalg.LinAlgError:
            total = math.nan
        self.flow.train()
        return total / len(pixels)

    def _dequantize(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """On the device; but the noise is of the CPU, so that it is the same on every device."""
        dtype = getattr(torch, self.settings.dtype)
        values = images.dequantize(
            pixels.to(dtype),
            num_levels=self.data.num_levels,
            generator=generator or self.generator,
        )
        return values.to(self.settings.device)

    def use_best(self) -> None:
        """Make the evaluated flow the one that was best in validation."""
        assert self.best is not None
        self.evaluated.load_state_dict(self.best.state)
        self.evaluated.eval()

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        assert self.best is not None
        return {
            "settings": dataclasses.asdict(self.settings),
            "num_images": [len(part) for part in self.data[:3]],
            "flow": self.flow.state_dict(),
            "evaluated": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "random_state": torch.get_rng_state(),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "order": self.order,
            "losses": self.losses,
            "history": [tuple(one) for one in self.history],
            "best": tuple(self.best),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        :raises ValueError: if it is that of a run with other settings or data.
        """
        free = {*BUDGETS, *(["epochs"] if self.settings.schedule == "constant" else [])}
        sizes = [len(part) for part in self.data[:3]]
        for name, value in {**dataclasses.asdict(self.settings), "num_images": sizes}.items():
            before = state.get(name, state["settings"].get(name))
            if name not in free and before != value:
                raise ValueError(
                    f"expected {name} to be {before!r}, as in the checkpoint; got {value!r}"
                )
        self.flow.load_state_dict(state["flow"])
        self.evaluated.load_state_dict(state["evaluated"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["random_state"].cpu())
        self.num_steps = state["num_steps"]
        self.seconds = state["seconds"]
        self.order = state["order"].cpu()
        self.losses = state["losses"]
        self.history = [Evaluation(*one) for one in state["history"]]
        self.best = Best(*state["best"])


def load_checkpoint(path: Path, device: str) -> dict[str, Any]:
    """The state in a file.

    :raises ValueError: where there is none, or not a whole one.
    """
    if not path.is_file():
        raise ValueError(f"expected a checkpoint to resume from; got no {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = "".join(str(error).splitlines()[:1])
        raise ValueError(f"{path}: expected a whole checkpoint; got {reason}") from error


def train(run: Run, checkpoint: Path, write: Callable[[], object]) -> str:
    """Train from wherever the run is, until there is a reason to stop, which is returned.

    There is a checkpoint at the start, after each evaluation, and at the end. The end is evaluated
    too; where it is not the end of an epoch, that is not in the checkpoint.

    :param write: called after each evaluation.
    """
    if not run.history:
        run.evaluate()
        save_state(checkpoint, run.state())  # now, for a disk that is full should show at once
    num_steps = run.settings.epochs * run.steps_per_epoch
    with (
        Progress(True, num_steps, num_done=run.num_steps) as bar,
        deferred_interrupt() as is_interrupted,
    ):
        while (reason := _reason_to_stop(run, num_steps, is_interrupted())) is None:
            loss = run.step()
            latest = run.history[-1]
            bar.update(
                f"loss {loss:.1f}, validation {latest.validation:.2f} nats "
                f"({latest.bits_per_dim:.3f} bits/dim) after {latest.epoch:g} epochs"
            )
            if run.num_steps % (run.settings.evaluate_every * run.steps_per_epoch) == 0:
                run.evaluate()
                save_state(checkpoint, run.state())
                write()
    if reason != "diverged":
        save_state(checkpoint, run.state())
        if run.history[-1].num_steps < run.num_steps:
            run.evaluate()
    return reason


def _reason_to_stop(run: Run, num_steps: int, is_interrupted: bool) -> str | None:
    one = run.settings
    assert run.best is not None
    if run.losses and not math.isfinite(run.losses[-1]):
        return "diverged"
    if run.num_steps >= num_steps:
        return "epochs"
    if one.max_seconds and run.seconds >= one.max_seconds:
        return "max_seconds"
    if one.patience and run.history[-1].epoch - run.best.epoch >= one.patience:
        return "patience"
    return "interrupted" if is_interrupted else None
