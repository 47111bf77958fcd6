"""Pareto-smoothed importance sampling from a guide: does it approximate the posterior?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.stats import fit_generalized_pareto
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyro_snf.options import as_count, expect
from pyro_snf.summary import Summary, summarize
from pyro_snf.vectorization import (
    PARTICLES,
    Program,
    can_vectorize,
    draw_traces,
    evaluation_mode,
    is_subsampled,
    nesting_of,
    plate_frames,
    single_traces,
)

if TYPE_CHECKING:
    import arviz

__all__ = ["PSIS", "pareto_smooth", "psis"]

# The tail is fitted to at least 5 draws, and they are at most a fifth of all.
_MIN_DRAWS = 25
_MIN_TAIL_SIZE = 5
# At this k̂, 10^(1/(1 − k̂)) = 2200 draws are needed. Above it, that number becomes impractically
# large, and the error of the estimates is mostly bias (Vehtari et al., 2024, section 3.2).
_MAX_KHAT = 0.7
# The gap IW-ELBO − ELBO estimates KL(q‖p). A guide at 0.1 nats from the posterior that is off in
# one direction alone is off by √(2·0.1) = 0.45 posterior standard deviations there (Gaussians); a
# 95 % interval covers 93 %. In D directions alike, it is 0.45/√D.
_MAX_GAP = 0.1
# Heavy-tailed weights have a low share of effective draws and a gap that is too small for it. A
# Gaussian guide that is too narrow in one direction alone has this share at 0.76 of the posterior's
# standard deviation; a 95 % interval covers 87 %.
_MIN_ESS_SHARE = 0.7
# The Monte Carlo error of a weighted mean is then a tenth of a posterior standard deviation.
_MIN_ESS = 100

_ADVICE = {
    "reliable": "the guide's draws can be used as they are",
    "reliable but for the tails": "use means and central intervals; the tails may be too light",
    "usable with weights": "use mean(), std() and resample(), not the guide's own draws",
    "unreliable": "train for longer, or change the guide or the parametrization",
}


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
    def gap(self) -> float:
        """IW-ELBO − ELBO, in nats: an estimate of the divergence KL(q‖p) of the guide."""
        return self.iw_elbo - self.elbo

    @property
    def khat_error(self) -> float:
        r"""The standard error of k̂, :math:`(1 + \hat k)\sqrt M/(M + 10)`, for a tail of M draws.

        It is that of the maximum-likelihood estimate, :math:`(1 + k)/\sqrt M`, times the weight
        M/(M + 10) of the data in k̂, whose prior has that of 10 draws. In simulations of generalized
        Pareto tails with k from 0 to 2, it is within 10 % of the standard deviation of k̂ for
        M from 67 to 1342 (S from 500), and within 30 % at M = 20. NaN for k̂ ≤ −1/2, where the
        asymptotics do not hold, and for infinite k̂.
        """
        if not -0.5 < self.khat < math.inf:
            return math.nan
        size = _tail_size(len(self.log_weights))
        return (1 + self.khat) * math.sqrt(size) / (size + 10)

    @property
    def threshold(self) -> float:
        """The bound of k̂ for reliable weights: min(1 − 1/log₁₀ S, 0.7)."""
        return min(1 - 1 / math.log10(len(self.log_weights)), _MAX_KHAT)

    @property
    def verdict(self) -> str:
        """What the bulk of the weights and their tail say together.

        The bulk is good if ESS ≥ 0.7 S and the gap is at most 0.1 nats; the tail is good if k̂ is
        below the threshold.

        - ``"reliable"``: both are good. The guide's draws approximate the posterior, and the
          weighted ones do so better.
        - ``"reliable but for the tails"``: only the bulk is good. Means and central intervals are
          right, but the posterior has more mass outside the guide's region: standard deviations and
          tail probabilities may be too small, and a mode nearby may be missed.
        - ``"usable with weights"``: the tail is good, and ESS ≥ 100. The guide's own draws are not
          close enough to the posterior, but the weights correct them.
        - ``"unreliable"``: all others.
        """
        good_tail = self.khat < self.threshold
        if self.ess >= _MIN_ESS_SHARE * len(self.log_weights) and self.gap <= _MAX_GAP:
            return "reliable" if good_tail else "reliable but for the tails"
        return "usable with weights" if good_tail and self.ess >= _MIN_ESS else "unreliable"

    @property
    def is_reliable(self) -> bool:
        """Whether the guide's own draws have the posterior's means and central intervals.

        True for the verdicts ``"reliable"`` and ``"reliable but for the tails"``.
        """
        return self.verdict.startswith("reliable")

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

    def summary(self) -> Summary:
        """The weighted draws as a table that prints aligned.

        A dictionary of rows, one for each scalar element, named as ``theta[0,1]``; each row has the
        keys ``"mean"``, ``"sd"``, ``"5%"``, ``"median"``, ``"95%"`` and ``"mcse_mean"``, the Monte
        Carlo standard error of the mean. The unit is that of the site.
        """
        return summarize(self.samples, self.log_weights.cpu().double().exp())

    def to_numpy(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """``samples`` and the weights, which sum to 1, as NumPy arrays: shapes ``(S, *shape)`` and
        ``(S,)``."""
        samples = {name: values.cpu().numpy() for name, values in self.samples.items()}
        return samples, self.log_weights.exp().cpu().numpy()

    def to_arviz(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> arviz.InferenceData:
        """Resampled draws, as one chain of a posterior group, for ArviZ's plots and tables.

        Draws repeat: the effective sample sizes that ArviZ computes from them are too large.

        :param int num_samples: the number of draws, S by default.
        :param torch.Generator generator: as in :meth:`resample`.
        :raises ImportError: if ArviZ is not installed.
        :raises ValueError: as :meth:`resample` does.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("expected ArviZ: pip install 'pyro-snf[arviz]'") from error
        count = len(self.log_weights) if num_samples is None else num_samples
        draws = self.resample(count, generator)
        return arviz.from_dict(
            posterior={name: values.cpu().numpy()[None] for name, values in draws.items()}
        )

    def __str__(self) -> str:
        share = 100 * self.ess / len(self.log_weights)
        rows = {
            "verdict": f"{self.verdict}: {_ADVICE[self.verdict]}",
            "bulk": f"ESS {self.ess:.1f} of {len(self.log_weights)} draws, {share:.0f} % "
            f"(goal: {100 * _MIN_ESS_SHARE:.0f} %); gap {self.gap:.3f} nats (goal: {_MAX_GAP})",
            "tail": self._describe_tail(),
            "ELBO": f"{self.elbo:.4f} ± {self.elbo_error:.4f}",
            "IW-ELBO": f"{self.iw_elbo:.4f}",
            "unseen": "a mode from which the guide never draws shows in none of these numbers",
        }
        return "\n".join(f"{name:<7}  {text}" for name, text in rows.items())

    __repr__ = __str__

    def _describe_tail(self) -> str:
        if self.khat == -math.inf:
            return "khat -inf: the largest weights are equal"
        error = "" if math.isnan(self.khat_error) else f" ± {self.khat_error:.2f}"
        text = f"khat {self.khat:.2f}{error} (goal: below {self.threshold:.2f}"
        if abs(self.khat - self.threshold) < self.khat_error:
            text += ", which is within the error"
        text += ")"
        if self.threshold <= self.khat < _MAX_KHAT:
            text += f"; {math.ceil(10 ** (1 / (1 - self.khat)))} draws would do"
        return text

    def _mean(self, values: Tensor) -> Tensor:
        weights = self.log_weights.exp()
        mean = torch.tensordot(weights, values.to(weights.dtype), dims=1)
        return mean.to(values.dtype) if values.is_floating_point() else mean


@torch.no_grad()
def psis(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    vectorize: bool | None = None,
    **kwargs: Any,
) -> PSIS:
    r"""Pareto-smoothed importance sampling from a guide to the posterior.

    Draws z from the guide have the weights :math:`w = p(x, z)/q(z)`. How much they vary tells how
    far the guide is from the posterior, in two parts, of which :attr:`PSIS.verdict` makes one:

    - the bulk: the effective sample size, and the gap between the importance-weighted ELBO and the
      ELBO, which estimates KL(q‖p);
    - the tail: k̂, fitted to the largest weights. If it is below
      :math:`\min(1 - 1/\log_{10} S, 0.7)`, the smoothed weights give posterior expectations.

    Neither can detect regions from which the guide never draws, such as a mode that it misses.

    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
    >>> def guide():  # the posterior is Normal(0.5, 0.7071)
    ...     pyro.sample("z", dist.Normal(0.3, 0.6))
    >>> pyro.set_rng_seed(0)
    >>> result = psis(model, guide)
    >>> print(result)
    verdict  usable with weights: use mean(), std() and resample(), not the guide's own draws
    bulk     ESS 536.8 of 1000 draws, 54 % (goal: 70 %); gap 0.112 nats (goal: 0.1)
    tail     khat 0.62 ± 0.15 (goal: below 0.67, which is within the error)
    ELBO     -1.5647 ± 0.0115
    IW-ELBO  -1.4528
    unseen   a mode from which the guide never draws shows in none of these numbers
    >>> result.summary()
            mean         sd         5%     median        95%  mcse_mean
    z     0.6168     0.8237    -0.6233     0.5627      2.337    0.06234

    Log-densities are exact: they are computed under ``no_grad`` with model and guide (or the
    modules whose methods they are) in ``eval()`` mode; the modes are restored afterwards.

    The guide has to sample all latent sites of the model, except discrete ones that are marked with
    ``infer={"enumerate": "parallel"}`` (by ``config_enumerate``, for example): those that the guide
    does not sample are summed out of w, as in ``TraceEnum_ELBO``. Auxiliary sites are treated as in
    Pyro's ELBOs, which is correct for autoguides; it is not for auxiliary variables that the draws
    do not determine.

    :param model: the model; with ``guide``, called with ``args`` and ``kwargs``.
    :param guide: the guide.
    :param int num_samples: S, the number of draws, at least 25.
    :param bool vectorize: whether to make all draws in one call, under a plate, as
        ``vectorize_particles`` of Pyro's ELBOs does, which is about 100 times faster; False draws
        in a loop. By default, it does so if
        :func:`~pyro_snf.vectorization.can_vectorize` finds that this is right for ten draws.
    :raises ValueError: for options outside these ranges; if weights are NaN or +∞ or all zero; if
        model and guide do not have the same latent sites; if a continuous one has the same value
        in all draws, as in an ``AutoDelta``; or if a plate is subsampled, since w is then the
        weight for a random part of the data.

    References:

    Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto Smoothed Importance
    Sampling. JMLR 25(72), 2024. [arXiv:1507.02646]

    Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but Did It Work?: Evaluating
    Variational Inference. ICML 2018. [arXiv:1802.02538]
    """
    num_samples = as_count("num_samples", num_samples, _MIN_DRAWS)
    is_flag = vectorize is None or isinstance(vectorize, bool | np.bool_)
    expect("vectorize to be True, False or None", is_flag, vectorize)
    log_weights, samples = _draw(num_samples, vectorize, model, guide, args, kwargs)
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
    tail_size = _tail_size(len(shifted))
    # Weights that underflow relative to the largest one do not count as a tail.
    cutoff = max(shifted[order[-tail_size - 1]].item(), math.log(torch.finfo(shifted.dtype).tiny))
    tail = order[shifted[order] > cutoff]
    if cutoff >= -math.sqrt(torch.finfo(log_weights.dtype).eps):
        khat = -math.inf
    elif len(tail) < _MIN_TAIL_SIZE:
        khat = math.inf
    else:
        # Relative to the cutoff's weight, so that rounding does not hide small differences.
        with torch.device("cpu"):  # Pyro's function makes tensors on the default device
            khat, scale = fit_generalized_pareto(torch.expm1(shifted[tail] - cutoff))
            probabilities = (torch.arange(len(tail)).double() + 0.5) / len(tail)
        excess = _pareto_quantiles(probabilities, khat, scale)
        shifted[tail] = (torch.log1p(excess) + cutoff).clamp(max=0.0)
    return (shifted - shifted.logsumexp(0)).to(log_weights), khat


def _tail_size(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _pareto_quantiles(probabilities: Tensor, shape: float, scale: float) -> Tensor:
    """``σ((1 − p)⁻ᵏ − 1)/k``, and its limit ``−σ log(1 − p)`` at k = 0."""
    logs = -torch.log1p(-probabilities)
    return scale * (torch.expm1(shape * logs) / shape if shape else logs)


def _draw(
    num_samples: int,
    vectorize: bool | None,
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Raw log-weights of S draws, and the draws of the model's latent sites."""
    if vectorize and isinstance(poutine.unwrap(guide), GuideMessenger):
        # Pyro would run the model in its place.
        expect("vectorize=False for a guide that is a messenger", False, guide)
    singles = single_traces(model, guide, args, kwargs)
    _check_all_data(*singles)
    nodes: dict[str, Any] = singles[0].nodes
    nesting = nesting_of(*singles)
    if vectorize is None:
        vectorize = can_vectorize(model, guide, args, kwargs, nesting)
    with evaluation_mode(model, guide):
        if vectorize:
            traces = draw_traces(model, guide, args, kwargs, nesting, num_samples)
            sites = _latent_sites(*traces)
            samples = {
                name: site["value"].reshape(num_samples, *nodes[name]["value"].shape)
                for name, site in sites.items()
            }
            log_weights = _log_weights(*traces)
        else:
            # Without sites to enumerate, the plates of a program may vary between draws.
            marked = any(
                site["infer"].get("enumerate") == "parallel"
                for name, site in nodes.items()
                if site["type"] == "sample" and name not in singles[1]
            )
            log_weights, samples, sites = _draw_one_by_one(
                num_samples, model, guide, args, kwargs, nesting if marked else math.inf
            )
    _check_not_constant(samples, sites)
    return log_weights, samples


def _draw_one_by_one(
    num_samples: int,
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    max_plate_nesting: float,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Raw log-weights of S draws, the draws, and the model's latent sites."""
    log_weights: list[Any] = []
    draws = []
    for _ in range(num_samples):
        traces = draw_traces(model, guide, args, kwargs, max_plate_nesting)
        sites = _latent_sites(*traces)
        if max_plate_nesting < math.inf:
            log_weights.append(_log_weights(*traces))
        else:
            log_weights.append(traces[0].log_prob_sum() - traces[1].log_prob_sum())
        draws.append({name: site["value"] for name, site in sites.items()})
    shapes = {tuple((name, value.shape) for name, value in sorted(draw.items())) for draw in draws}
    if len(shapes) > 1:
        raise ValueError(f"expected the same sites in every draw; got {shapes}")
    samples = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    return torch.stack(log_weights), samples, sites


def _log_weights(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """log p(x, z) − log q(z), enumerated sites summed out: of one draw, or along the plate of draws
    if there is one."""
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    # As in TraceEnum_ELBO: the scale of enumerated sites applies to the logarithm of their sum.
    costs, factors, _, enumerated, scale = _compute_model_factors(model_trace, guide_trace)
    model_terms = [term for terms in costs.values() for term in terms]
    if factors:
        for terms in contract_tensor_tree(factors, enumerated).values():
            model_terms += [packed.scale_and_mask(term, scale) for term in terms]
    guide_terms = [
        site["packed"]["log_prob"]
        for site in guide_trace.nodes.values()
        if site["type"] == "sample"
    ]
    draws = guide_trace.plate_to_symbol.get(PARTICLES)
    return _sum_except(draws, model_terms) - _sum_except(draws, guide_terms)


def _sum_except(symbol: str | None, terms: list[Any]) -> Any:
    """The sum of packed tensors over all dimensions but the one with a symbol."""
    total = 0.0
    for term in terms:
        dims = [dim for dim, other in enumerate(term._pyro_dims) if other != symbol]
        total = total + (term.sum(dims) if dims else term)
    return total


def _check_all_data(*traces: Trace) -> None:
    """A ValueError if a plate is subsampled."""
    for frame in plate_frames(*traces):
        if is_subsampled(frame):
            raise ValueError(
                f"expected plates that are not subsampled, in a model and a guide called with all "
                f"data; got {frame.size} of {frame.full_size} in {frame.name!r}"
            )


def _latent_sites(model_trace: Trace, guide_trace: Trace) -> dict[str, Any]:
    """The model's latent sites but the enumerated ones; a ValueError unless the guide samples all
    of them and no others."""
    proposed = set(guide_trace.stochastic_nodes)
    sites: dict[str, Any] = {
        name: model_trace.nodes[name]
        for name in model_trace.stochastic_nodes
        if name in proposed or not _is_summed_out(model_trace.nodes[name])
    }
    auxiliary = {
        name for name in proposed if (guide_trace.nodes[name]["infer"] or {}).get("is_auxiliary")
    }
    missing = sites.keys() - proposed
    unknown = proposed - auxiliary - sites.keys()
    if not sites or missing or unknown:
        raise ValueError(
            f"expected a guide for the model's latent sites {sorted(sites)}, or "
            f'infer={{"enumerate": "parallel"}} at discrete ones to sum them out; '
            f"got none for {sorted(missing)}, and others: {sorted(unknown)}"
        )
    return sites


def _is_summed_out(site: Any) -> bool:
    # With num_samples, Pyro would draw some of the values at random.
    return "_enumerate_dim" in site["infer"] and site["infer"].get("num_samples") is None


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
