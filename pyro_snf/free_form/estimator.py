"""What a pair of networks adds to ``log|det J|`` in training: its gradient, and the penalty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_snf.caching import ParameterCache
from pyro_snf.free_form.linearization import Context, Linearization
from pyro_snf.free_form.log_det import (
    estimated_log_abs_det,
    exact_slogdet,
    probe_gradient,
)
from pyro_snf.free_form.pair import NetworkPair
from pyro_snf.free_form.solve import Convergence
from pyro_snf.geco import GECO
from pyro_snf.precision import at_least_float32
from pyro_snf.probes import draw_probes, probe_generator
from pyro_snf.surrogate import attach_penalty, gated, with_surrogate

__all__ = ["PairEstimator", "Weight"]

#: λ, fixed, as a function of the number of steps taken, or under control.
Weight = float | Callable[[int], float] | GECO

# Streams of random numbers: of the gradient's probes and the latents' noise; of the value's probes;
# and of the base's samples.
_GRADIENT, _VALUE, _BASE = 0, 1, 2


class PairEstimator(nn.Module):
    """``log|det J|`` in training, with its gradient and the reconstruction penalty.

    :param str log_det: ``"refined"``, ``"learned"`` or ``"exact"``.
    :param int num_probes: k, for each event.
    :param str probe: what they are, one of :data:`pyro_snf.probes.PROBES`.
    :param float tolerance: of the residuals of the solves.
    :param int max_iterations: of a solve.
    :param int value_iterations: of Lanczos' process for the value; 0 for the value 0.
    :param int seed: of all random numbers.
    :param reconstruction_weight: λ.
    :param str reconstruction: what the penalty trains, ``"both"`` or ``"inverse"``.
    :param float reconstruction_tolerance: τ, the root mean square error of an element up to which
        the penalty leaves f alone.
    :param float data_noise: σ of events around those of the data.
    :param float latent_noise: σ of latents around those of the data.
    :param base: whose samples are reconstructed; None for none.
    """

    RECONSTRUCTIONS = ("both", "inverse")

    def __init__(
        self,
        *,
        log_det: str,
        num_probes: int,
        probe: str,
        tolerance: float,
        max_iterations: int,
        value_iterations: int,
        seed: int,
        reconstruction_weight: Weight,
        reconstruction: str,
        reconstruction_tolerance: float,
        data_noise: float,
        latent_noise: float,
        base: Distribution | None,
    ) -> None:
        super().__init__()
        self.log_det = log_det
        self.num_probes = num_probes
        self.probe = probe
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.value_iterations = value_iterations
        self.seed = seed
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction = reconstruction
        self.reconstruction_tolerance = reconstruction_tolerance
        self.data_noise = data_noise
        self.latent_noise = latent_noise
        self.base = base
        #: Batches of probes drawn so far.
        self.num_draws = 0
        #: Changes of the parameters seen so far.
        self.num_steps = 0
        # Of the latest residuals: on a GPU, nobody waits for it until it is asked for.
        self._mean_square_residual = torch.tensor(math.nan)
        #: What came of the latest inverse; None before the first.
        self.convergence: Convergence | None = None
        #: What was found to be right with the networks, in the mode that they are in: nothing yet,
        #: "values", or the values and the "derivatives".
        self.checked: str | None = None
        self._step: ParameterCache[int] = ParameterCache()

    def training_log_abs_det(
        self,
        pair: NetworkPair,
        near: Linearization,
        context: Context,
        *,
        is_constant: bool,
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """The value, shape ``(B,)``, with its gradient in all that f depends on, and the penalty.

        :param near: f near x, with the graph of x and the context.
        :param bool is_constant: whether x and the context have no graph.
        :param parameters: of both networks.
        """
        steps_before = self.num_steps
        self._step.get(parameters, self._next_step)
        draw = self.num_draws
        self.num_draws += 1
        generator = self._generator(draw, near, _GRADIENT)
        weight = self._current_weight()
        fixed = tuple(one.detach() for one in context)
        x = near.source.detach()

        # Gradients of the penalty are to go to f, but not to where x comes from.
        is_shared = is_constant or not self._trains_forward
        latent = near.output if is_shared else pair.forward(x, *fixed)
        back, data_error = self._reconstruct(pair, x, latent, fixed)

        if self.log_det == "exact":
            forward_parameters = tuple(pair.forward_net.parameters())
            _, value = exact_slogdet(pair.forward, near.source, context, forward_parameters)
        else:
            probes = self._draw(near, generator)
            surrogate, residual = probe_gradient(
                near,
                back,
                probes,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
            )
            self._mean_square_residual = residual.square().mean()
            value = with_surrogate(
                self._value(near).to(surrogate),
                surrogate,
                (near.source, *context, *pair.forward_net.parameters()),
            )
        if _is_zero(weight):
            return value
        error = data_error
        is_free = self._trains_forward and self.reconstruction_tolerance == 0
        forward = pair.forward if is_free else pair.frozen_forward
        for other in self._other_latents(latent.detach(), generator, draw):
            error = error + _square(forward(pair.inverse(other, *fixed), *fixed) - other)
        if self.data_noise > 0:
            other = x + self.data_noise * _noise_like(x, generator)
            _, other_error = self._reconstruct(pair, other, pair.forward(other, *fixed), fixed)
            error = error + other_error
        factor: float | Tensor
        if isinstance(weight, GECO):
            # One step for each step of the optimizer, however often a log-determinant is asked for.
            if self.num_steps > steps_before:
                weight.update(data_error.detach().mean() / x[0].numel())
            factor = weight.weight
        else:
            factor = weight
        return attach_penalty(value, (factor * error).to(value))

    @property
    def certificate(self) -> float:
        """The root mean square of the latest ``‖v − Jᵀ w‖/‖v‖``; NaN before the first."""
        return self._mean_square_residual.sqrt().item()

    @property
    def _trains_forward(self) -> bool:
        return self.reconstruction == "both" and not _is_zero(self.reconstruction_weight)

    def _reconstruct(
        self, pair: NetworkPair, x: Tensor, latent: Tensor, context: Context
    ) -> tuple[Linearization, Tensor]:
        """g near the latents, and ``‖g(f(x)) − x‖²`` for every event, shape ``(B,)``.

        Of the latter's gradient, f has none where it is within the tolerance.

        :param Tensor latent: ``f(x)``, with the graph of f's parameters.
        """
        is_open = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if not self._trains_forward:
            latent = latent.detach().requires_grad_()
        elif self.reconstruction_tolerance > 0:
            latent = gated(latent, is_open)
        back = Linearization(latent, pair.inverse(latent, *context))
        error = _square(back.output - x)
        is_open.copy_(error > self.reconstruction_tolerance**2 * x[0].numel())
        return back, error

    def _next_step(self) -> int:
        self.num_steps += 1
        return self.num_steps

    def _current_weight(self) -> float | GECO:
        weight = self.reconstruction_weight
        if isinstance(weight, float | int | GECO):
            return weight
        step = self.num_steps - 1
        number = float(weight(step))
        if not 0 <= number < math.inf:
            raise ValueError(
                f"expected reconstruction_weight({step}) to be a number >= 0; got {number}"
            )
        return number

    def _value(self, near: Linearization) -> Tensor:
        if self.value_iterations == 0:
            return at_least_float32(near.output.new_zeros(len(near.output)))
        # The same probes for the same parameters: a density asked for twice is the same number.
        probes = self._draw(near, self._generator(self.num_steps, near, _VALUE))
        return estimated_log_abs_det(near, probes, max_iterations=self.value_iterations)

    def _other_latents(self, latent: Tensor, generator: torch.Generator, draw: int) -> list[Tensor]:
        """Latents to be reconstructed besides those of the data."""
        others = []
        if self.latent_noise > 0:
            others.append(latent + self.latent_noise * _noise_like(latent, generator))
        if self.base is not None:
            sample = self._sample_base(len(latent), latent.device, draw).to(latent)
            if sample.shape != latent.shape:
                raise ValueError(
                    f"expected a base of events of shape {tuple(latent.shape[1:])}; "
                    f"got {tuple(sample.shape[1:])}"
                )
            others.append(sample)
        return others

    def _sample_base(self, count: int, device: torch.device, draw: int) -> Tensor:
        """Samples that leave the global random stream, which distributions draw from, as it is."""
        assert self.base is not None
        seed = probe_generator(self.seed, draw, device, stream=_BASE).initial_seed()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            return self.base.sample(torch.Size([count]))

    def _draw(self, near: Linearization, generator: torch.Generator) -> Tensor:
        shape, dtype = near.output.shape, near.output.dtype
        dim = near.output[0].numel()
        if self.probe == "orthogonal" and self.num_probes > dim:
            raise ValueError(f"expected num_probes <= D = {dim}; got {self.num_probes}")
        return draw_probes(self.probe, self.num_probes, shape, generator, dtype)

    def _generator(self, count: int, near: Linearization, stream: int) -> torch.Generator:
        return probe_generator(self.seed, count, near.output.device, stream=stream)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_draws": self.num_draws,
            "num_steps": self.num_steps,
            "certificate": self.certificate,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
        self.num_draws = state["num_draws"]
        self.num_steps = state["num_steps"]
        self._mean_square_residual = torch.tensor(state["certificate"]).square()
        self._step.clear()


def _is_zero(weight: Weight) -> bool:
    return isinstance(weight, float | int) and weight == 0


def _noise_like(events: Tensor, generator: torch.Generator) -> Tensor:
    return draw_probes("gaussian", 1, events.shape, generator, events.dtype)[0]


def _square(difference: Tensor) -> Tensor:
    """``‖·‖²`` for every event, shape ``(B,)``."""
    return at_least_float32(difference).square().flatten(1).sum(1)
