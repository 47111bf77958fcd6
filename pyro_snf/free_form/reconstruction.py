"""The penalty that makes one network of a pair the inverse of the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_snf.caching import ParameterState
from pyro_snf.free_form.linearization import Context, Linearization
from pyro_snf.free_form.network_pair import NetworkPair
from pyro_snf.options import as_number, as_seed, check_choice, expect
from pyro_snf.penalty import GECO, PenaltyWeight, StepCounter, as_penalty_weight, penalty_factor
from pyro_snf.precision import at_least_float32
from pyro_snf.probes import ProbeStream, draw_probes
from pyro_snf.surrogate import gated
from pyro_snf.transfer import send

__all__ = ["Reconstruction"]

# Streams of random numbers. The first two are those of the probes.
_NOISE, _BASE = 2, 3


class Reconstruction(nn.Module):
    r"""The reconstruction penalty of a pair of networks f and g,

    .. math::
        \lambda \left( \|g(f(x)) - x\|^2 + \|g(f(\tilde x)) - \tilde x\|^2
        + \|f(g(\tilde y)) - \tilde y\|^2 \right), \qquad
        \tilde x = x + \sigma_x \varepsilon, \quad \tilde y = f(x) + \sigma_y \varepsilon',

    where the second term is present with ``data_noise_std``, and the third with
    ``latent_noise_std``; with a ``base`` there is another third term, with samples of it. The
    penalty is weighted by the absolute value of the log-determinant's cotangent. It changes no
    value, and sends no gradient to x.

    >>> penalty = Reconstruction(3.0, data_noise_std=0.1)
    >>> transform = self_normalizing_pair(3, [32], reconstruction=penalty)

    :param weight: λ: a number, a function of the number of steps taken, or a
        :class:`~pyro_snf.GECO`. By default 10 for ``log_det="learned"`` and 1 otherwise, which
        suits events of some tens of entries with a variance of about 1. Larger events need more.
    :param str trains: ``"both"`` networks, or the ``"inverse"`` alone; then the penalty does not
        keep f invertible.
    :param float tolerance: τ, a root mean square error of an element. An event whose error is at
        most τ trains g alone. If τ > 0, the terms of latents train g alone, too.
    :param float data_noise_std: :math:`\sigma_x`; 0 for no such term. The term prevents f from
        mapping events near the data to the latents of the data.
    :param float latent_noise_std: :math:`\sigma_y`; 0 for no such term.
    :param base: a distribution of latents, whose samples are reconstructed, too; or None.
    :param seed: of the noise and the samples, an integer from 0; by default one is drawn from
        torch's global random stream when a layer is made.
    :raises ValueError: for options that are not of these.
    """

    TRAINS = ("both", "inverse")

    def __init__(
        self,
        weight: PenaltyWeight | None = None,
        *,
        trains: str = "both",
        tolerance: float = 0.0,
        data_noise_std: float = 0.0,
        latent_noise_std: float = 0.0,
        base: Distribution | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()

        def as_size(name: str, value: float) -> float:
            return as_number(f"{name} >= 0", value, lambda number: 0 <= number < math.inf)

        self.given_weight = None if weight is None else as_penalty_weight("weight", weight)
        check_choice("trains", trains, self.TRAINS)
        self.trains = trains
        self.tolerance = as_size("tolerance", tolerance)
        self.data_noise_std = as_size("data_noise_std", data_noise_std)
        self.latent_noise_std = as_size("latent_noise_std", latent_noise_std)
        expect("base, a distribution or None", base is None or isinstance(base, Distribution), base)
        self.base = base
        self._default_weight = 1.0
        self.seed = as_seed(seed)

    def __repr__(self) -> str:
        names = ("trains", "tolerance", "data_noise_std", "latent_noise_std", "base", "seed")
        options = [f"{name}={getattr(self, name)!r}" for name in names]
        return f"{type(self).__name__}({', '.join([str(self.weight), *options])})"

    def setup(self, default_weight: float, device: torch.device | None) -> None:
        """Make the state; called once by each layer.

        :param float default_weight: λ, unless the option was given.
        :param device: of the networks.
        """
        self._default_weight = default_weight
        if isinstance(self.weight, GECO):
            self.weight.to(device)
        self.probes = ProbeStream(self.seed, device=device, differs_by_process=True)
        self.steps = StepCounter()

    @property
    def weight(self) -> PenaltyWeight:
        """λ: the option, or the default of the layer's method."""
        return self._default_weight if self.given_weight is None else self.given_weight

    @property
    def is_off(self) -> bool:
        """Whether λ is 0."""
        return isinstance(self.weight, float) and self.weight == 0

    @property
    def trains_forward(self) -> bool:
        """Whether f is trained by the penalty."""
        return self.trains == "both" and not self.is_off

    def reconstruct(
        self, pair: NetworkPair, x: Tensor, latent: Tensor, context: Context
    ) -> tuple[Linearization, Tensor]:
        """g, linearized at the latents, and ``‖g(f(x)) − x‖²`` for every event, shape ``(B,)``.

        The gradient of the error in f is 0 where the error is within the tolerance.

        :param Tensor latent: ``f(x)``, with the graph of f's parameters.
        """
        is_open = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if not self.trains_forward:
            latent = latent.detach().requires_grad_()
        elif self.tolerance > 0:
            latent = gated(latent, is_open)
        back = Linearization(latent, pair.inverse(latent, *context))
        error = _square(back.output - x)
        is_open.copy_(error > self.tolerance**2 * x[0].numel())
        return back, error

    def penalty(
        self,
        pair: NetworkPair,
        x: Tensor,
        latent: Tensor,
        data_error: Tensor,
        context: Context,
        state: Callable[[], ParameterState],
    ) -> Tensor:
        """The penalty of every event, shape ``(B,)``.

        :param Tensor latent: ``f(x)``, a constant.
        :param Tensor data_error: from :meth:`reconstruct`.
        :param state: returns the state of the networks' parameters.
        """
        is_new = not isinstance(self.weight, float) and self.steps.count(state())
        mean_square_error = data_error.detach().mean() / x[0].numel()
        factor = penalty_factor(
            "weight", self.weight, self.steps.num_states - 1, mean_square_error, is_new=is_new
        )
        draw = self.probes.count
        generator = self.probes.next_generator(x.device, stream=_NOISE)
        error = data_error
        is_free = self.trains_forward and self.tolerance == 0
        forward = pair.forward if is_free else pair.frozen_forward
        for other in self._other_latents(latent, generator, draw):
            error = error + _square(forward(pair.inverse(other, *context), *context) - other)
        if self.data_noise_std > 0:
            other = x + self.data_noise_std * _noise_like(x, generator)
            latents = pair.forward(other, *context)
            error = error + self.reconstruct(pair, other, latents, context)[1]
        return factor * error

    def _other_latents(self, latent: Tensor, generator: torch.Generator, draw: int) -> list[Tensor]:
        """The latents to be reconstructed besides those of the data."""
        others = []
        if self.latent_noise_std > 0:
            others.append(latent + self.latent_noise_std * _noise_like(latent, generator))
        if self.base is not None:
            sample = send(self._sample_base(self.base, len(latent), latent.device, draw), latent)
            if sample.shape != latent.shape:
                raise ValueError(
                    f"expected a base of events of shape {tuple(latent.shape[1:])}; "
                    f"got {tuple(sample.shape[1:])}"
                )
            others.append(sample)
        return others

    def _sample_base(
        self, base: Distribution, count: int, device: torch.device, draw: int
    ) -> Tensor:
        """Samples of the base, drawn without changing the global random stream."""
        seed = self.probes.generator(draw, device, stream=_BASE).initial_seed()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            return base.sample(torch.Size([count]))


def _noise_like(events: Tensor, generator: torch.Generator) -> Tensor:
    return draw_probes("gaussian", 1, events.shape, generator, events.dtype)[0]


def _square(difference: Tensor) -> Tensor:
    """``‖·‖²`` for every event, shape ``(B,)``."""
    return at_least_float32(difference).square().flatten(1).sum(1)
