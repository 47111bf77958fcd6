"""Pareto-smoothed importance sampling from a guide: does it approximate the posterior?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import fit_generalized_pareto
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_snf.options import as_count, check_flag

__all__ = ["PSIS", "pareto_smooth", "psis"]

_Program = Callable[..., Any]

# The tail is fitted to at least 5 draws, and they are at most a fifth of all.
_MIN_DRAWS = 25
_MIN_TAIL_SIZE = 5
# At this k̂, 10^(1/(1 − k̂)) = 2200 draws are needed. Above it, that number becomes impractically
# large, and the error of the estimates is mostly bias (Vehtari et al., 2024, section 3.2).
_MAX_KHAT = 0.7


@dataclass(frozen=True, eq=False)
class PSIS:
    r"""The result of :func:`psis`, which prints as a table.

    For S draws z from the guide q and their weights :math:`w = p(x, z)/q(z)`:
    """

    khat: float
    """k̂, the tail index of w: its moments of order 1/k and above are infinite. −∞ if the largest
    weights are equal; if the guide is the posterior, all are."""
    elbo: float
    """The mean of log w."""
    elbo_error: float
    """The standard error of ``elbo``; NaN if there are weights of zero."""
    iw_elbo: float
    """The importance-weighted ELBO, the log of the mean of the raw w; its expectation is at most
    log p(x)."""
    ess: float
    """The effective sample size, 1/Σw² of the smoothed and normalized weights."""
    log_weights: Tensor
    """The logs of the smoothed and normalized weights, shape ``(S,)``."""
    samples: dict[str, Tensor]
    """The guide's draws of the model's latent sites, each of shape ``(S, *shape)``."""

    @property
    def threshold(self) -> float:
        """The bound of k̂ for a reliable result: min(1 − 1/log₁₀ S, 0.7)."""
        return min(1 - 1 / math.log10(len(self.log_weights)), _MAX_KHAT)

    @property
    def is_reliable(self) -> bool:
        """Whether k̂ is below the threshold."""
        return self.khat < self.threshold

    @property
    def verdict(self) -> str:
        """What k̂ means, in words."""
        if self.khat == -math.inf:
            return "reliable: the largest weights are equal"
        if self.is_reliable:
            return f"reliable: below {self.threshold:.2f}"
        if self.khat < _MAX_KHAT:
            draws = math.ceil(10 ** (1 / (1 - self.khat)))
            return f"unreliable: not below {self.threshold:.2f}; {draws} draws would do"
        if self.khat < 1:
            return f"unreliable: not below {_MAX_KHAT}; more draws would hardly help"
        return "unreliable: the weights have no finite mean"

    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of every site."""
        return {name: self._mean(values) for name, values in self.samples.items()}

    def std(self) -> dict[str, Tensor]:
        """The posterior standard deviation of every site."""
        means = self.mean()
        return {
            name: self._mean((values - means[name]) ** 2).sqrt()
            for name, values in self.samples.items()
        }

    def resample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draws from the posterior: the guide's draws, resampled by the smoothed weights.

        :param int num_samples: the number of draws, with replacement.
        :param torch.Generator generator: of the random numbers, on the weights' device.
        :raises ValueError: for a number below 1.
        """
        num_samples = as_count("num_samples", num_samples)
        weights = self.log_weights.exp()
        chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        return {name: values[chosen] for name, values in self.samples.items()}

    def __str__(self) -> str:
        rows = {
            "khat": f"{self.khat:.2f}, {self.verdict}",
            "ESS": f"{self.ess:.1f} of {len(self.log_weights)} draws",
            "ELBO": f"{self.elbo:.4f} ± {self.elbo_error:.4f}",
            "IW-ELBO": f"{self.iw_elbo:.4f}",
        }
        return "\n".join(f"{name:<7}  {text}" for name, text in rows.items())

    __repr__ = __str__

    def _mean(self, values: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        mean = torch.tensordot(weights, values.to(weights.dtype), dims=1)
        return mean.to(values.dtype) if values.is_floating_point() else mean


@torch.no_grad()
def psis(
    model: _Program,
    guide: _Program,
    *args: Any,
    num_samples: int = 1000,
    vectorize: bool = False,
    **kwargs: Any,
) -> PSIS:
    r"""Pareto-smoothed importance sampling from a guide to the posterior.

    Draws z from the guide have the weights :math:`w = p(x, z)/q(z)`. The tail index k̂, fitted to
    the largest weights, measures how far the guide is from the posterior. If k̂ is below
    :math:`\min(1 - 1/\log_{10} S, 0.7)`, the smoothed weights give posterior expectations; if not,
    neither the weights nor the guide are reliable. k̂ cannot detect regions from which the guide
    never draws, such as a mode that it misses.

    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    >>> def guide():  # the posterior is Normal(0.5, 0.7071)
    ...     pyro.sample("z", dist.Normal(0.3, 0.6))
    >>> pyro.set_rng_seed(0)
    >>> result = psis(model, guide)
    >>> print(result)
    khat     0.51, reliable: below 0.67
    ESS      750.2 of 1000 draws
    ELBO     -1.5697 ± 0.0105
    IW-ELBO  -1.4942
    >>> result.mean()["z"], result.std()["z"]
    (tensor(0.5340), tensor(0.7362))

    Log-densities are exact: they are computed under ``no_grad`` with model and guide (or the
    modules whose methods they are) in ``eval()`` mode; the modes are restored afterwards. The guide
    has to sample all latent sites of the model, including discrete ones; sites that Pyro's
    enumeration sums out have no weights. Auxiliary sites are treated as in Pyro's ELBOs, which is
    correct for autoguides; it is not for auxiliary variables that the draws do not determine. With
    a subsampled plate, w is the weight for a random part of the data and does not estimate that for
    all data: pass all of them.

    :param model: the model; with ``guide``, called with ``args`` and ``kwargs``.
    :param guide: the guide.
    :param int num_samples: S, the number of draws, at least 25.
    :param bool vectorize: whether to make all draws in one call, under a plate, as
        ``vectorize_particles`` of Pyro's ELBOs does. Much faster, for models that allow it. One
        more call determines the plates of the model.
    :raises ValueError: for options outside these ranges; if weights are NaN or +∞ or all zero; if
        model and guide do not have the same latent sites; or if a continuous one has the same value
        in all draws, as in an ``AutoDelta``.

    References:

    Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto Smoothed Importance
    Sampling. JMLR 25(72), 2024. [arXiv:1507.02646]

    Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but Did It Work?: Evaluating
    Variational Inference. ICML 2018. [arXiv:1802.02538]
    """
    num_samples = as_count("num_samples", num_samples, _MIN_DRAWS)
    check_flag("vectorize", vectorize)
    draw = _draw_at_once if vectorize else _draw_one_by_one
    with _eval_mode(model, guide):
        log_weights, samples, sites = draw(num_samples, model, guide, *args, **kwargs)
    _check_not_constant(samples, sites)
    smoothed, khat = pareto_smooth(log_weights)
    raw, normalized = log_weights.cpu().double(), smoothed.cpu().double()
    return PSIS(
        khat=khat,
        elbo=raw.mean().item(),
        elbo_error=raw.std().item() / math.sqrt(num_samples),
        iw_elbo=raw.logsumexp(0).item() - math.log(num_samples),
        ess=torch.exp(-torch.logsumexp(2 * normalized, 0)).item(),
        log_weights=smoothed,
        samples=samples,
    )


def pareto_smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Pareto-smoothed, normalized log-weights, and k̂.

    The ``M = ⌈min(S/5, 3√S)⌉`` largest weights are replaced by the quantiles, at (i − ½)/M, of the
    generalized Pareto distribution that is fitted to them, and truncated at the largest raw weight.

    If less than 5 weights exceed the (M + 1)-th largest, there is no tail to fit: k̂ is +∞, and the
    weights are not smoothed. If the M + 1 largest are equal, to :math:`\sqrt\varepsilon` of their
    dtype, k̂ is −∞.

    :param Tensor log_weights: of independent draws, not normalized, shape ``(S,)``, S ≥ 25. −∞ is a
        weight of zero.
    :raises ValueError: for other shapes, and for values that are NaN, +∞, or all −∞.
    """
    if log_weights.dim() != 1 or len(log_weights) < _MIN_DRAWS:
        raise ValueError(
            f"expected log-weights of shape (S,) with S >= {_MIN_DRAWS}; "
            f"got {tuple(log_weights.shape)}"
        )
    num_bad = int((log_weights.isnan() | (log_weights == math.inf)).sum())
    if num_bad:
        raise ValueError(
            f"expected finite weights; got {num_bad} of {len(log_weights)} that are NaN or infinite"
        )
    shifted = log_weights.detach().cpu().double()
    shifted = shifted - shifted.max()
    if shifted.isnan().any():
        raise ValueError(f"expected weights above zero; got {len(log_weights)} zeros")

    order = shifted.argsort()
    tail_size = math.ceil(min(len(shifted) / 5, 3 * math.sqrt(len(shifted))))
    # Weights that underflow relative to the largest one do not count as a tail.
    cutoff = max(shifted[order[-tail_size - 1]].item(), math.log(torch.finfo(shifted.dtype).tiny))
    tail = order[shifted[order] > cutoff]
    if cutoff >= -math.sqrt(torch.finfo(log_weights.dtype).eps):
        khat = -math.inf
    elif len(tail) < _MIN_TAIL_SIZE:
        khat = math.inf
    else:
        # Relative to the cutoff's weight, so that rounding does not hide small differences.
        khat, scale = fit_generalized_pareto(torch.expm1(shifted[tail] - cutoff))
        probabilities = (torch.arange(len(tail)).double() + 0.5) / len(tail)
        excess = _pareto_quantiles(probabilities, khat, scale)
        shifted[tail] = (torch.log1p(excess) + cutoff).clamp(max=0.0)
    return (shifted - shifted.logsumexp(0)).to(log_weights), khat


def _pareto_quantiles(probabilities: Tensor, shape: float, scale: float) -> Tensor:
    """``σ((1 − p)⁻ᵏ − 1)/k``, and its limit ``−σ log(1 − p)`` at k = 0."""
    logs = -torch.log1p(-probabilities)
    return scale * (torch.expm1(shape * logs) / shape if shape else logs)


def _draw_one_by_one(
    num_samples: int, model: _Program, guide: _Program, *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Raw log-weights of S draws, the draws, and the model's latent sites."""
    log_weights, draws = [], []
    for _ in range(num_samples):
        traces = get_importance_trace("flat", math.inf, model, guide, args, kwargs)
        log_weights.append(traces[0].log_prob_sum() - traces[1].log_prob_sum())
        sites = _latent_sites(*traces)
        draws.append({name: site["value"] for name, site in sites.items()})
    shapes = {tuple((name, value.shape) for name, value in sorted(draw.items())) for draw in draws}
    if len(shapes) > 1:
        raise ValueError(f"expected the same sites in every draw; got {shapes}")
    samples = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    return torch.stack(log_weights), samples, sites


def _draw_at_once(
    num_samples: int, model: _Program, guide: _Program, *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """The same under a plate of size S, to the left of all plates of the model and the guide."""
    if isinstance(poutine.unwrap(guide), Messenger):  # Pyro would run the model in its place
        raise ValueError(f"expected vectorize=False for a guide that is a messenger; got {guide!r}")
    random_state = pyro.util.get_rng_state()
    traces = get_importance_trace("flat", math.inf, model, guide, args, kwargs)
    pyro.util.set_rng_state(random_state)
    sites = _latent_sites(*traces)
    dims = [
        frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    plates = {"num_samples": num_samples, "max_plate_nesting": -min(dims, default=0)}
    log_weights, model_trace, _ = vectorized_importance_weights(
        model, guide, *args, **plates, **kwargs
    )
    samples = {
        name: model_trace.nodes[name]["value"].reshape(num_samples, *site["value"].shape)
        for name, site in sites.items()
    }
    return log_weights, samples, sites


def _latent_sites(model_trace: Trace, guide_trace: Trace) -> dict[str, Any]:
    """The model's latent sites; a ValueError unless the guide samples all of them and no others."""
    sites = {name: model_trace.nodes[name] for name in model_trace.stochastic_nodes}
    proposed = set(guide_trace.stochastic_nodes)
    auxiliary = {
        name for name in proposed if (guide_trace.nodes[name]["infer"] or {}).get("is_auxiliary")
    }
    missing = sites.keys() - proposed
    unknown = proposed - auxiliary - sites.keys()
    if not sites or missing or unknown:
        raise ValueError(
            f"expected a guide for the model's latent sites {sorted(sites)}; "
            f"got none for {sorted(missing)}, and others: {sorted(unknown)}"
        )
    return sites


def _check_not_constant(samples: dict[str, Tensor], sites: dict[str, Any]) -> None:
    """A ValueError if a continuous site has the same value in all draws."""
    constant = [
        name
        for name, values in samples.items()
        if bool((values == values[0]).all()) and not sites[name]["fn"].support.is_discrete
    ]
    if constant:
        raise ValueError(
            f"expected a guide with a density; got the same value in all draws of {constant}"
        )


@contextmanager
def _eval_mode(*programs: _Program) -> Iterator[None]:
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
