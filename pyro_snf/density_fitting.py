"""Fits a density to data, in one line."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_snf.options import (
    as_count,
    as_number,
    as_positive,
    as_pyro_seed,
    check_flag,
    expect,
    has_values,
    shown,
)
from pyro_snf.plotting import plot_losses
from pyro_snf.processes import check_one_process
from pyro_snf.progress import Progress
from pyro_snf.transforms.compose import ConditionalCompose, initialize_parts
from pyro_snf.transforms.first_batch import FirstBatchTransform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DensityFit", "fit_density"]

# The benchmarks take the clock of the processor, for which other processes do not count.
_clock = time.perf_counter

# The steps in which the learning rate rises, and the share of the budget from which on it falls.
_WARM_UP_STEPS = 50
_DECAY_FROM = 0.5

# Where nothing is gained any more, rates fall for half as long as it took to get there.
_LENGTH_OF_DECAY = 1.5

# The parameters that are validated are averages over the latest tenth of the steps.
_AVERAGED_SHARE, _FEWEST_AVERAGED = 0.1, 10.0

# Validations without a gain until something is changed, and the share of all so far, and the steps,
# that they have to be.
_PATIENCE, _SHARE_OF_PATIENCE = 10, 0.2
_STEPS_OF_PATIENCE = 100

# The decay of weights (AdamW's), at first and where rows are learned by heart, times 1000 over the
# number of rows. 3,700 rows of 57 columns need 3 to 10, which gain six nats; on 15,000 rows of 10
# columns, 1 costs 0.4 nats.
_WEIGHT_DECAYS = (1.0, 5.0, 25.0)

# What the learning rate is multiplied by where steps are too large to gain anything, and how often.
_RATE_FACTOR, _MAX_REDUCTIONS = 0.3, 2

# Of the gradient of a mean of log densities, in nats.
_MAX_GRADIENT_NORM = 10.0

# How often training may fail, each time but the first to go on at half the rate; a failure so many
# steps after the last one is a first one again, as of an event at which a log-det is infinite.
_MAX_FAILURES, _STEPS_TO_FORGET = 8, 200

# The errors of parameters that are not finite, or singular: Pyro refuses such values.
_FAILURES = (torch.linalg.LinAlgError, ValueError)

# Rows at which the flow is evaluated for warnings, before training and after it.
_NUM_TRIED = 256

# Of the data, the numbers that are looked at, at random; and the share of distinct ones up to which
# they are taken for rounded: scaled pixels have 256.
_NUM_COMPARED, _SHARE_OF_DISTINCT = 10_000, 0.05

# The largest scale of what is about unit scale, and one over the smallest.
_MAX_SCALE = 10.0

# Rows of which densities are computed at a time, where no gradients are.
_CHUNK = 4096


@dataclass
class DensityFit:
    """What :func:`fit_density` did. The flow itself has been trained in place."""

    density: Any
    """The density: a distribution or, of a flow with a context, a conditional one. Of a module with
    a ``log_prob`` of its own, the module."""
    losses: NDArray[np.float64]
    """The mean loss of the training data in every epoch, in nats: −log p(x), without the
    log-determinants for which layers add 0 in training (pairs by "refined", and "learned")."""
    validation_losses: NDArray[np.float64]
    """The mean of −log p(x) of the validation data after every epoch; empty without such data."""
    best_epoch: int
    """The epoch, from 1, whose parameters were kept; 0 for those from before training."""
    reason: str
    """Why it stopped: ``"converged"``, ``"num_epochs"``, ``"max_seconds"``, ``"interrupted"`` or
    ``"diverged"``."""
    num_steps: int
    """Of the optimizer."""
    seconds: float
    """Of training and validation."""
    loss: float
    """The validation loss of the parameters that were kept; without such data, the training loss of
    the last epoch; NaN where there is none."""

    def plot(self) -> Figure:
        """The losses in every epoch."""
        losses = {"training": self.losses, "validation": self.validation_losses}
        return plot_losses({name: ones for name, ones in losses.items() if len(ones)}, unit="epoch")

    def __str__(self) -> str:
        has_validation = len(self.validation_losses) > 0
        name = "−log p(x) in validation" if has_validation else "training loss"
        return (
            f"{len(self.losses)} epochs, {self.num_steps} steps in {self.seconds:.1f} s, stopped: "
            f"{self.reason}\n{name}: {self.loss:.4f} nats, of epoch {self.best_epoch}"
        )

    __repr__ = __str__


class _Rows(NamedTuple):
    """Data, and the contexts that go with them."""

    data: Tensor
    context: Tensor | None

    def at(self, index: Any) -> _Rows:
        return _Rows(self.data[index], None if self.context is None else self.context[index])


def fit_density(
    flow: Any,
    data: Tensor,
    *,
    context: Tensor | None = None,
    validation: float | Tensor | tuple[Tensor, Tensor] = 0.1,
    base: Distribution | None = None,
    num_epochs: int = 200,
    max_seconds: float | None = None,
    batch_size: int = 256,
    learning_rate: float = 6e-3,
    seed: int | None = None,
    progress: bool = True,
) -> DensityFit:
    """Fit a density to data by maximum likelihood.

    >>> from pyro_snf import flows
    >>> data = torch.randn(500, 2) @ torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    >>> result = fit_density(flows.tabular(2), data, num_epochs=5, seed=0, progress=False)
    >>> result.density.log_prob(data).shape
    torch.Size([500])
    >>> result.density.sample((3,)).shape
    torch.Size([3, 2])

    AdamW, with gradients that are clipped. The training data initialize the layers that a first
    batch would, unless they have been (:meth:`Compose.initialize <pyro_snf.Compose.initialize>`).
    After every epoch, the averages of the parameters over the latest tenth of the steps are
    validated; those of the lowest loss are kept, or those from before training, if none are better.
    The learning rate falls to 0 in the second half of the budget, which is ``num_epochs`` and
    ``max_seconds``, whichever is used up first. Until then, when the validation loss has not fallen
    for a while, training goes back to the best parameters. If the loss of training data has fallen
    since then, they are being learned by heart, and training goes on with a larger decay of the
    weights of ``nn.Linear`` layers; if not, at a lower rate; and where that has been tried, with
    falling rates, so that it stops before the budget is used up. Where a loss is not finite,
    training goes back to the averages; where that happens again soon, at half the rate. Ctrl-C
    stops it, and what there is is kept.

    :param flow: from data to latents: a transform that is a module, or a conditional one; or any
        module with a method ``log_prob(data)``, or ``log_prob(data, context)``. It is trained in
        place, and is in ``eval()`` mode afterwards.
    :param Tensor data: shape ``(N, *event)``.
    :param context: shape ``(N, *context)``, for a conditional flow.
    :param validation: the share of the data for validation, in [0, 1), of one row at least, or
        other data, with a context ``(data, context)``. 0 for none; then the parameters of the end
        are kept.
    :param base: the distribution of latents, by default standard normal.
    :param int num_epochs: the most passes through the data.
    :param max_seconds: the longest training, in seconds, after the flow has been initialized; None
        for any.
    :param int batch_size: of a step.
    :param float learning_rate: of Adam, at the highest.
    :param seed: for ``pyro.set_rng_seed``; None leaves the random number generators as they are.
    :param bool progress: whether to show a progress bar or, where there is no terminal, a line
        every ten seconds, on the standard error stream.
    :raises ValueError: for options outside these ranges, and for data that are not finite.
    :raises RuntimeError: in several processes, and where gradients are not recorded.
    :warns UserWarning: if the loss was not finite again and again, or that of the validation data
        never was; for data of whole numbers, or of few distinct ones; and where training begins
        with latents that are far from unit scale.
    """
    check_one_process("fit_density")
    num_epochs = as_count("num_epochs", num_epochs)
    max_seconds = None if max_seconds is None else as_positive("max_seconds", max_seconds)
    batch_size = as_count("batch_size", batch_size)
    learning_rate = as_positive("learning_rate", learning_rate)
    check_flag("progress", progress)
    seed = as_pyro_seed(seed)
    fits = base is None or isinstance(base, Distribution)
    expect("base, a distribution or None", fits, base)
    rows = _checked("data", data, context)
    if seed is not None:
        pyro.set_rng_seed(seed)
    training, held_out = _split(rows, validation)
    density, log_prob = _density_of(flow, base, rows)
    if not torch.is_grad_enabled():
        raise RuntimeError("expected gradients to be recorded; they are not, as under no_grad")
    if not any(one.requires_grad for one in flow.parameters()):
        raise ValueError("expected a flow with parameters to train; none requires a gradient")
    is_transform = isinstance(flow, Transform | ConditionalTransform)
    if is_transform:
        _check_numbers(flow, rows.data)
    _initialize(flow, training)
    run = _Run(flow, log_prob, learning_rate, batch_size, len(training.data))
    if is_transform and base is None:
        _check_scale(run.averaged, training.at(slice(_NUM_TRIED)))
    start = _clock()
    reason = "num_epochs"
    with Progress(progress, num_epochs, "epoch") as bar:
        try:
            reason = run.train(training, held_out, num_epochs, max_seconds, bar)
        except KeyboardInterrupt:
            reason = "interrupted"
    run.finish(held_out)
    if reason == "diverged":
        warnings.warn(
            f"the loss was not finite {_MAX_FAILURES} times: lower the learning rate, and look at "
            "the data for outliers; the log-determinant of a network with ReLU can be infinite",
            stacklevel=2,
        )
    elif run.validation_losses and not math.isfinite(run.best_loss):
        warnings.warn(
            "the loss of the validation data was not finite after any epoch, so the parameters of "
            "the last one are kept: look at these data for outliers",
            stacklevel=2,
        )
    last_loss = run.losses[-1] if run.losses else math.nan
    return DensityFit(
        density=density,
        losses=np.array(run.losses),
        validation_losses=np.array(run.validation_losses),
        best_epoch=run.best_epoch if held_out is not None else len(run.losses),
        reason=reason,
        num_steps=run.num_steps,
        seconds=_clock() - start,
        loss=last_loss if held_out is None else run.best_loss,
    )


def copy_unaveraged(flow: nn.Module, averaged: nn.Module) -> None:
    """Give a flow's averages what is not averaged: its latest buffers and extra state."""
    names = {name for name, _ in flow.named_parameters(remove_duplicate=False)}
    rest = {name: value for name, value in flow.state_dict().items() if name not in names}
    averaged.load_state_dict(rest, strict=False)


def _initialize(flow: Any, rows: _Rows) -> None:
    """Initialize the layers that a first batch would, unless they have been."""
    if isinstance(flow, Transform):
        initialize_parts([flow], rows.data)
    elif isinstance(flow, ConditionalTransform) and rows.context is not None:
        ConditionalCompose([flow]).initialize(rows.data, rows.context)
    elif hasattr(flow, "initialize"):
        flow.initialize(*(one for one in rows if one is not None))


def _checked(name: str, data: Any, context: Any) -> _Rows:
    _check_tensor(name, data)
    if context is None:
        return _Rows(data.detach(), None)
    _check_tensor(f"the context of {name}", context)
    if len(context) != len(data):
        raise ValueError(f"expected as many contexts as {name}; got {len(context)}, {len(data)}")
    return _Rows(data.detach(), context.detach())


def _check_numbers(flow: Any, data: Tensor) -> None:
    """Raise if the parameters of a transform are of another dtype, and warn of numbers that repeat,
    to which modules with a log_prob of their own may add noise."""
    dtype = next(flow.parameters()).dtype
    if dtype != data.dtype:
        raise ValueError(
            f"expected data of {dtype}, as the flow's parameters are; got {data.dtype}: use "
            f"data.to({dtype}), or make the flow with dtype={data.dtype}"
        )
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(data.numel(), (_NUM_COMPARED,), generator=generator)
    count = min(data.numel(), _NUM_COMPARED)
    num_distinct = len(data.flatten()[index.to(data.device)].unique())
    found = None
    if torch.equal(data, data.round()):
        found = "all of the data are whole numbers"
    elif num_distinct <= _SHARE_OF_DISTINCT * count:
        found = f"the data have few distinct values, {num_distinct} among {count} numbers"
    if found is not None:
        warnings.warn(
            f"{found}, at which a density has no bound: add noise of the size of the rounding, "
            "data + step * torch.rand_like(data), or pyro_snf.images.dequantize",
            stacklevel=3,
        )


@torch.no_grad()
def _check_scale(flow: Any, rows: _Rows) -> None:
    """Warn of latents far from unit scale: by steps of Adam, layers get there slowly, or never.

    Not where the first batch is still to initialize a layer, as those within levels of images.
    """
    if any(isinstance(one, FirstBatchTransform) and one.is_new() for one in flow.modules()):
        return
    transform = flow if rows.context is None else flow.condition(rows.context)
    latents = transform(rows.data).flatten(1)
    largest = latents.square().mean(0).sqrt().max()
    # Of a column that is mostly zeros, these rows may have no other numbers.
    typical = latents.std(0, correction=0).median()
    if not (largest <= _MAX_SCALE and typical >= 1 / _MAX_SCALE):
        warnings.warn(
            f"training begins with latents far from unit scale: root mean squares up to "
            f"{largest:.2g}, and a median standard deviation of {typical:.2g}; scale the data, or "
            "begin the flow with an ActNorm or a GaussianCopula, as in "
            "Compose([ActNorm(D, event_dim=1), flow])",
            stacklevel=3,
        )


def _check_alike(name: str, rows: Tensor, others: Tensor) -> None:
    """Raise unless others are of the type of rows, and each of the same shape."""
    if (rows.shape[1:], rows.dtype) != (others.shape[1:], others.dtype):
        shape = ", ".join(["N", *map(str, rows.shape[1:])])
        raise ValueError(
            f"expected {name} to be {rows.dtype} of shape ({shape}), as for training; got "
            f"{others.dtype} of shape {tuple(others.shape)}"
        )


def _check_tensor(name: str, tensor: Any) -> None:
    """Raise unless it is a tensor of finite, floating-point rows."""
    expected = f"{name}, a non-empty floating-point tensor of shape (N, ...)"
    if not has_values(tensor):
        got = type(tensor).__name__
        if isinstance(tensor, Tensor):
            got = "one without numbers" if tensor.is_meta else f"one of layout {tensor.layout}"
        raise ValueError(f"expected {expected}; got {got}")
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() == 0:
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        if not tensor.is_floating_point():
            got += ", to be converted by .float()"
        if tensor.dim() == 1:
            got += "; one column is x.unsqueeze(1)"
        raise ValueError(f"expected {expected}; got {got}")
    is_bad = ~torch.isfinite(tensor)
    if is_bad.any():
        count = int(is_bad.flatten(1).any(1).sum())
        columns = is_bad.flatten(1).any(0).nonzero().flatten().tolist()
        raise ValueError(
            f"expected {name} to be finite; got NaN or infinity in {count} of {len(tensor)} rows, "
            f"in the columns {shown(columns)}: drop or impute these rows"
        )


def _split(rows: _Rows, validation: Any) -> tuple[_Rows, _Rows | None]:
    if isinstance(validation, Tensor | tuple):
        parts = validation if isinstance(validation, tuple) else (validation, None)
        fits = len(parts) == 2 and (parts[1] is None) == (rows.context is None)
        expect("validation, (data, context) where there is a context", fits, type(validation))
        held_out = _checked("validation", *parts)
        _check_alike("validation", rows.data, held_out.data)
        if rows.context is not None and held_out.context is not None:
            _check_alike("the context of validation", rows.context, held_out.context)
        return rows, held_out
    share = as_number("validation in [0, 1), or data", validation, lambda number: 0 <= number < 1)
    if share == 0:
        return rows, None
    count = max(1, round(share * len(rows.data)))
    expect("data for training besides those for validation", count < len(rows.data), count)
    order = torch.randperm(len(rows.data)).to(rows.data.device)
    return rows.at(order[count:]), rows.at(order[:count])


def _density_of(
    flow: Any, base: Distribution | None, rows: _Rows
) -> tuple[Any, Callable[[nn.Module, _Rows], Tensor]]:
    """The density of a flow, and a function that computes log p with the flow or a copy of it."""
    is_flow = isinstance(flow, Transform | ConditionalTransform)
    fits = isinstance(flow, nn.Module) and (is_flow or callable(getattr(flow, "log_prob", None)))
    expect("flow, a module that is a transform or has a log_prob", fits, flow)
    conditional = isinstance(flow, ConditionalTransform)
    if not is_flow:

        def own_log_prob(module: Any, batch: _Rows) -> Tensor:
            return module.log_prob(*(one for one in batch if one is not None))

        return flow, own_log_prob
    if conditional != (rows.context is not None):
        wanted = "a context for a conditional flow" if conditional else "a conditional flow"
        got = "none" if conditional else f"a context for {type(flow).__name__}, which has none"
        raise ValueError(f"expected {wanted}; got {got}")

    transform = flow
    if rows.context is not None:  # of a copy, for conditioning may look at the contexts' scale
        transform = copy.deepcopy(flow).eval().condition(rows.context[:1])
    latent = transform.forward_shape(rows.data[:1].shape)[1:]
    zero = rows.data.new_zeros(latent)
    chosen = base or dist.Normal(zero, torch.ones_like(zero)).to_event(len(latent))
    fits = chosen.batch_shape + chosen.event_shape == latent
    expect(f"base, a distribution of shape {tuple(latent)}", fits, base)

    def make(module: Any) -> Any:
        kind = dist.TransformedDistribution
        if conditional:
            kind = dist.ConditionalTransformedDistribution
        return kind(chosen, [module.inv])

    def log_prob(module: nn.Module, batch: _Rows) -> Tensor:
        density = make(module)
        if conditional:
            density = density.condition(batch.context)
        return density.log_prob(batch.data)

    return make(flow), log_prob


class _Run:
    """Training: the parameters, their averages, and the best of these."""

    def __init__(
        self,
        flow: nn.Module,
        log_prob: Callable[[nn.Module, _Rows], Tensor],
        learning_rate: float,
        batch_size: int,
        num_rows: int,
    ) -> None:
        self.flow, self.log_prob = flow.train(), log_prob
        self.learning_rate, self.batch_size = learning_rate, batch_size
        self.averaged = copy.deepcopy(flow).eval()
        self.pairs = list(zip(self.averaged.parameters(), flow.parameters(), strict=True))
        self.losses: list[float] = []
        self.validation_losses: list[float] = []
        self.num_steps = self.num_failures = self.latest_failure = 0
        self.best_epoch = self.latest_change = 0
        self.decays = (1000 * decay / num_rows for decay in _WEIGHT_DECAYS)
        self.weight_decay = next(self.decays)
        self.num_reductions = 0
        self.best: Any = copy.deepcopy(self.averaged.state_dict())
        self.best_loss = math.nan
        self.best_decay = self.weight_decay
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        trained = [one for one in self.flow.parameters() if one.requires_grad]
        layers = [one for one in self.flow.modules() if isinstance(one, nn.Linear)]
        weights = {id(layer.weight) for layer in layers}
        groups = [
            {
                "params": [one for one in trained if (id(one) in weights) == is_weight],
                "weight_decay": self.weight_decay if is_weight else 0.0,
            }
            for is_weight in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, self.learning_rate, fused=True)

    def train(
        self,
        training: _Rows,
        held_out: _Rows | None,
        num_epochs: int,
        max_seconds: float | None,
        bar: Progress,
    ) -> str:
        """Train until there is a reason to stop."""
        if held_out is not None:
            self._keep_best(self._mean_loss(held_out))
        start = _clock()
        count = len(training.data)
        steps_an_epoch = math.ceil(count / self.batch_size)
        # The budget that is used up where the rates begin to fall, and where they are 0.
        decay_from, decay_to = _DECAY_FROM, 1.0
        used = 0.0
        for epoch in range(num_epochs):
            order = torch.randperm(count).to(training.data.device)
            total = num_rows = 0.0
            for step, index in enumerate(order.split(self.batch_size)):
                used = (epoch + step / steps_an_epoch) / num_epochs
                if max_seconds is not None:
                    used = max(used, (_clock() - start) / max_seconds)
                if used >= decay_to:
                    break
                share = min(1.0, (decay_to - used) / (decay_to - decay_from))
                loss = self._step(training.at(index), share)
                if math.isfinite(loss):
                    total, num_rows = total + loss * len(index), num_rows + len(index)
                elif self.num_failures >= _MAX_FAILURES:
                    return "diverged"
            self.losses.append(total / num_rows if num_rows else math.nan)
            text = f"loss {self.losses[-1]:.4g}"
            copy_unaveraged(self.flow, self.averaged)
            if held_out is not None:
                self._keep_best(self._mean_loss(held_out))
                text += f", −log p in validation {self.validation_losses[-1]:.4g}"
            bar.update(text)
            if used >= decay_to:
                return "converged" if decay_to < 1 else "max_seconds"
            since = epoch + 1 - max(self.best_epoch, self.latest_change)
            patience = max(
                _PATIENCE, _SHARE_OF_PATIENCE * (epoch + 1), _STEPS_OF_PATIENCE / steps_an_epoch
            )
            if held_out is not None and since >= patience and used < decay_from:
                self.latest_change = epoch + 1
                every = math.ceil(count / len(held_out.data))
                if not self._change(training.at(slice(None, None, every))):
                    decay_from, decay_to = used, used * _LENGTH_OF_DECAY
            elif used >= decay_from and self.weight_decay > self.best_decay:
                self.weight_decay = self.best_decay
                self._go_back(self.best)
        return "num_epochs" if decay_to == 1 else "converged"

    def finish(self, held_out: _Rows | None) -> None:
        """Make the best averages the flow's parameters; without validation, those of the end."""
        if held_out is None:
            copy_unaveraged(self.flow, self.averaged)
            self.best = self.averaged.state_dict()
        self.flow.load_state_dict(self.best)
        self.flow.eval()
        if held_out is not None:  # of what is still wrong with them, such as a fold, layers warn
            with torch.no_grad(), suppress(*_FAILURES):
                self.log_prob(self.flow, held_out.at(slice(_NUM_TRIED)))

    def _step(self, batch: _Rows, share: float) -> float:
        """One step at a share of the rate; its loss, which is not finite if it failed."""
        for group in self.optimizer.param_groups:
            warm_up = min(1.0, (self.num_steps + 1) / _WARM_UP_STEPS)
            group["lr"] = self.learning_rate * share * warm_up
        self.optimizer.zero_grad()
        try:
            loss = -self.log_prob(self.flow, batch).mean()
            loss.backward()
        except _FAILURES:
            if self.num_steps == 0:
                raise
            loss = torch.tensor(math.nan)
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), _MAX_GRADIENT_NORM)
        value = (loss + 0 * norm).item()
        if not math.isfinite(value):
            if self.num_steps - self.latest_failure >= _STEPS_TO_FORGET:
                self.num_failures = 0
            self.num_failures += 1
            self.latest_failure = self.num_steps
            if self.num_failures > 1:
                self.learning_rate /= 2
            self._go_back(self.averaged.state_dict())
            return math.nan
        self.optimizer.step()
        self.num_steps += 1
        window = _FEWEST_AVERAGED + _AVERAGED_SHARE * self.num_steps
        weight = 1.0 if self.num_steps == 1 else 1 / window
        with torch.no_grad():
            for average, parameter in self.pairs:
                average.lerp_(parameter, weight)
        return value

    def _change(self, rows: _Rows) -> bool:
        """Go back to the best, and change what has kept the loss from falling since then.

        :param rows: of the training data.
        :return: whether there was something left to change.
        """
        latest = self._mean_loss(rows)
        self.averaged.load_state_dict(self.best)
        is_by_heart = latest < self._mean_loss(rows)
        has_failed = self.weight_decay > self.best_decay  # then a larger decay would fail as well
        before = self.best_decay, self.learning_rate
        self.weight_decay = self.best_decay
        if is_by_heart and not has_failed:
            self.weight_decay = next(self.decays, self.best_decay)
        elif not has_failed and self.num_reductions < _MAX_REDUCTIONS:
            self.num_reductions += 1
            self.learning_rate *= _RATE_FACTOR
        self._go_back(self.best)
        return (self.weight_decay, self.learning_rate) != before

    def _go_back(self, state: Any) -> None:
        self.flow.load_state_dict(state)
        self.averaged.load_state_dict(state)
        self._new_optimizer()

    @torch.no_grad()
    def _mean_loss(self, rows: _Rows) -> float:
        total = 0.0
        try:
            with warnings.catch_warnings():
                # Of folds: most do not last, and those that do are told at the end.
                warnings.simplefilter("ignore", RuntimeWarning)
                for index in torch.arange(len(rows.data), device=rows.data.device).split(_CHUNK):
                    total -= self.log_prob(self.averaged, rows.at(index)).double().sum().item()
        except _FAILURES:
            if self.num_steps == 0:
                raise
            return math.nan
        return total / len(rows.data)

    def _keep_best(self, loss: float) -> None:
        is_better = math.isfinite(loss) and loss < self.best_loss
        if is_better or not math.isfinite(self.best_loss):
            self.best_loss = loss
            self.best = copy.deepcopy(self.averaged.state_dict())
            self.best_decay = self.weight_decay
            self.best_epoch = len(self.losses)
        if self.losses:
            self.validation_losses.append(loss)
