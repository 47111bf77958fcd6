"""Pareto-smoothed importance sampling, against ArviZ, known tails and analytic posteriors."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated
from pyro.infer import SVI, Trace_ELBO, autoguide, config_enumerate
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_snf import self_normalizing_linear
from pyro_snf.diagnostics import PSIS, psis
from pyro_snf.importance import _pareto_quantiles, pareto_smooth
from tests.conftest import DEVICES
from tests.registry import LOG_DETS
from tests.test_pyro import Conjugate, flow_guide

# Float64: the same definitions, summed in another order.
EXACT = 1e-9
# Pyro warns of sites that only one of model and guide has.
MAY_WARN = pytest.mark.filterwarnings("ignore::UserWarning")
BOTH_WAYS = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])


# --- Smoothing ----------------------------------------------------------------------------------


def pareto_weights(count: int, shape: float) -> Tensor:
    """The logs of weights with a known tail index: of 1 + a generalized Pareto variable."""
    logs = -torch.rand(count).log()
    return torch.log1p(torch.expm1(shape * logs) / shape if shape else logs)


def arviz_psislw(log_weights: Tensor) -> tuple[Tensor, float]:
    with warnings.catch_warnings():
        # ArviZ announces changes when it is imported, and its fit overflows in exp.
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
        smoothed, khat = arviz.psislw(log_weights.numpy().copy())
    return torch.from_numpy(smoothed), float(khat)


@pytest.mark.parametrize(
    ("count", "shape", "num_zeros"),
    [
        *itertools.product(
            (25, 26, 100, 1000, 20000), (-1.0, -0.3, 0.0, 0.2, 0.5, 0.7, 1.0, 3.0, 30.0), (0,)
        ),
        *[(1000, 0.3, num_zeros) for num_zeros in (1, 500, 950, 994, 997, 999)],
    ],
)
def test_smoothing_is_that_of_arviz(count: int, shape: float, num_zeros: int) -> None:
    raw = pareto_weights(count, shape) - 800  # weights that underflow
    raw[:num_zeros] = -math.inf
    expected, expected_khat = arviz_psislw(raw)
    smoothed, khat = pareto_smooth(raw)
    assert khat == pytest.approx(expected_khat, rel=EXACT, abs=EXACT)
    assert (khat == math.inf) == (num_zeros > 995)
    assert torch.allclose(smoothed, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.5, 0.640827734266076), (0.7, 0.46123219241598756), (2.0, -1.5851556814480448)],
)
def test_tail_index_recorded_from_arviz(scale: float, expected: float) -> None:
    # Without ArviZ: values of its version 0.23.4 for N(0, 1) from quantiles of N(0, scale²).
    proposal = dist.Normal(0.0, scale)
    draws = proposal.icdf((torch.arange(1000) + 0.5) / 1000)
    raw = dist.Normal(0.0, 1.0).log_prob(draws) - proposal.log_prob(draws)
    assert pareto_smooth(raw)[1] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize(
    ("target", "proposal", "expected"),
    [
        # w = exp((r − 1) x)/r with x ~ Exp(r): P(w > t) = (r t)^(−r/(r − 1)), so k = 1 − 1/r. For
        # r < 1, w is at most 1/r, and about uniform near it: k = −1.
        *[
            (dist.Exponential(1.0), dist.Exponential(r), 1 - 1 / r if r > 1 else -1.0)
            for r in (0.8, 1.25, 2.0, 4.0)
        ],
        # The densities decay as |x|^−(ν + 1) and |x|^−(2ν + 1): w ~ |x|^ν, P(w > t) ~ t^−2.
        *[(dist.StudentT(nu), dist.StudentT(2 * nu), 0.5) for nu in (1.0, 2.0)],
    ],
)
def test_tail_index_of_known_tails(
    target: dist.Distribution, proposal: dist.Distribution, expected: float
) -> None:
    draws = proposal.sample((200_000,)).double()
    raw = target.log_prob(draws) - proposal.log_prob(draws)
    # With a tail of M = 1342, the standard deviation of k̂ is (1 + k)/√M, at most 0.05; its prior
    # has the weight 10/(M + 10).
    assert pareto_smooth(raw)[1] == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_weights_have_no_tail(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for raw in (
        torch.full((100,), -7.0),
        -7 + 20 * eps * torch.randn(100, dtype=torch.float64),  # to rounding
        torch.arange(100).remainder(2).to(dtype),  # the largest ones
        torch.arange(100).remainder(2).log(),  # draws outside the support
    ):
        smoothed, khat = pareto_smooth(raw.to(dtype))
        assert khat == -math.inf
        expected = raw - raw.logsumexp(0)
        assert torch.allclose(smoothed, expected.to(dtype), rtol=eps * 100)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1e-12, 0.7, 3.0])
def test_pareto_quantiles_are_those_of_scipy(shape: float) -> None:
    probabilities = torch.linspace(0.0, 0.999, 50)
    expected = scipy.stats.genpareto(shape, scale=1.7).ppf(probabilities.numpy())
    actual = _pareto_quantiles(probabilities, shape, 1.7)
    assert torch.allclose(actual, torch.from_numpy(expected), rtol=EXACT)


def test_smoothing_keeps_type_order_and_input() -> None:
    raw = pareto_weights(500, 0.6)
    before = raw.clone()
    smoothed, khat = pareto_smooth(raw)
    assert torch.equal(raw, before)
    assert torch.equal(smoothed.argsort(), raw.argsort())
    assert smoothed.exp().sum().item() == pytest.approx(1.0, rel=EXACT)
    single, single_khat = pareto_smooth(raw.float())
    assert single.dtype == torch.float32
    assert single_khat == pytest.approx(khat, abs=1e-4)
    assert torch.allclose(single.double(), smoothed, atol=1e-4)


def test_bad_weights_are_errors() -> None:
    raw = pareto_weights(100, 0.3)
    raw[3], raw[5] = math.nan, math.inf
    with pytest.raises(ValueError, match="got 2 of 100 that are NaN or infinite"):
        pareto_smooth(raw)
    with pytest.raises(ValueError, match="expected weights above zero; got 30 zeros"):
        pareto_smooth(torch.full((30,), -math.inf))
    for shape in ((24,), (25, 25), ()):
        with pytest.raises(ValueError, match=r"expected log-weights of shape \(S,\) with S >= 25"):
            pareto_smooth(torch.zeros(shape))


# --- Conjugate models ---------------------------------------------------------------------------


def normal(loc: float | Tensor = 0.0, scale: float = 1.0) -> Callable[[], None]:
    """A program with one normal site."""

    def program() -> None:
        pyro.sample("z", dist.Normal(loc, scale))

    return program


class Gammas:
    """A rate of Poisson counts with a Gamma prior: a skewed posterior, Gamma(shape, rate)."""

    def __init__(self) -> None:
        self.counts = torch.tensor([1.0, 0.0, 2.0])
        self.shape = 2.0 + self.counts.sum().item()
        self.rate = 1.0 + len(self.counts)
        self.log_evidence = (
            math.lgamma(self.shape)
            - math.lgamma(2.0)
            - self.shape * math.log(self.rate)
            - torch.lgamma(self.counts + 1).sum().item()
        )

    def model(self) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(self.counts)):
            pyro.sample("count", dist.Poisson(rate), obs=self.counts)

    def guide(self, shape: float, rate: float) -> None:
        pyro.sample("rate", dist.Gamma(shape, rate))


@BOTH_WAYS
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_exact_flow_is_recognized(log_det: str, mode: str, vectorize: bool) -> None:
    # In training mode, the log-determinants would be estimates, or 0 with "learned".
    conjugate = Conjugate()
    layer = conjugate.optimal(log_det=log_det).train(mode == "train")
    result = psis(conjugate, flow_guide(layer, conjugate.dim), num_samples=200, vectorize=vectorize)
    assert result.khat == -math.inf
    assert result.is_reliable
    assert result.elbo == pytest.approx(conjugate.log_evidence, rel=EXACT)
    assert result.iw_elbo == pytest.approx(conjugate.log_evidence, rel=EXACT)
    assert result.elbo_error < EXACT
    assert result.ess == pytest.approx(200)
    assert result.samples["z"].shape == (200, 4)
    assert "the largest weights are equal" in str(result)


@BOTH_WAYS
def test_moments_of_a_skewed_posterior(vectorize: bool) -> None:
    gammas = Gammas()
    guide = partial(gammas.guide, 3.0, 3.0)  # mean 1, variance 1/3; Gamma(5, 4): 1.25, 0.3125
    result = psis(gammas.model, guide, num_samples=4000, vectorize=vectorize)
    assert result.verdict == "usable with weights"
    # Four standard errors, by the effective number of draws.
    mean, deviation = gammas.shape / gammas.rate, math.sqrt(gammas.shape) / gammas.rate
    error = 4 * deviation / math.sqrt(result.ess)
    draws = result.resample(20_000)["rate"]
    assert draws.shape == (20_000,)
    for found, expected in (
        (result.samples["rate"].mean(), 1.0),
        (result.mean()["rate"], mean),
        (result.std()["rate"], deviation),
        (draws.mean(), mean),
        (draws.std(), deviation),
    ):
        assert found.item() == pytest.approx(expected, abs=error)
    assert result.iw_elbo == pytest.approx(gammas.log_evidence, abs=4 / math.sqrt(result.ess))
    # The ELBO is the evidence less the divergence, which is known.
    proposal = dist.Gamma(3.0, 3.0)
    posterior = dist.Gamma(gammas.shape, gammas.rate)
    divergence = torch.distributions.kl_divergence(proposal, posterior).item()
    assert result.elbo == pytest.approx(gammas.log_evidence - divergence, abs=4 * result.elbo_error)
    assert result.elbo < result.iw_elbo


@BOTH_WAYS
def test_numbers_are_their_definitions(vectorize: bool) -> None:
    gammas = Gammas()
    result = psis(gammas.model, partial(gammas.guide, 8.0, 4.0), vectorize=vectorize)
    rate = result.samples["rate"]
    raw = (
        dist.Gamma(2.0, 1.0).log_prob(rate)
        + dist.Poisson(rate.unsqueeze(-1)).log_prob(gammas.counts).sum(-1)
        - dist.Gamma(8.0, 4.0).log_prob(rate)
    )
    smoothed, khat = pareto_smooth(raw)
    weights = smoothed.exp()
    mean = (weights * rate).sum()
    assert torch.allclose(result.log_weights, smoothed, rtol=EXACT)
    for found, expected in (
        (result.khat, khat),
        (result.elbo, raw.mean()),
        (result.elbo_error, raw.std() / math.sqrt(1000)),
        (result.iw_elbo, raw.exp().mean().log()),
        (result.ess, 1 / weights.square().sum()),
        (result.mean()["rate"], mean),
        (result.std()["rate"], (weights * (rate - mean) ** 2).sum().sqrt()),
    ):
        assert float(found) == pytest.approx(float(expected), rel=EXACT)


def constrained_model(counts: Tensor, successes: Tensor) -> None:
    """A conjugate model with sites of three kinds of support, one of them with a batch shape."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("counts", dist.Multinomial(probs=weights, total_count=9), obs=counts)
    scale = pyro.sample("scale", dist.LogNormal(0.5, 1.0))
    pyro.sample("y", dist.LogNormal(scale.log(), 0.5), obs=torch.tensor(2.0))
    with pyro.plate("groups", 2):
        chance = pyro.sample("chance", dist.Beta(2.0, 3.0))
        pyro.sample("successes", dist.Binomial(5, chance), obs=successes)


class Constrained:
    """The posterior of ``constrained_model``, and its evidence."""

    def __init__(self) -> None:
        self.data = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 4.0])
        counts, successes = self.data
        prior = torch.tensor([1.0, 2.0, 3.0])
        precision = 1 + 1 / 0.25
        mean = (0.5 + math.log(2.0) / 0.25) / precision
        self.posterior = {
            "weights": dist.Dirichlet(prior + counts),
            "scale": dist.LogNormal(mean, precision**-0.5),
            "chance": dist.Beta(2 + successes, 8 - successes),
        }
        at = {name: posterior.mean for name, posterior in self.posterior.items()}
        trace = poutine.trace(poutine.condition(constrained_model, at)).get_trace(*self.data)
        densities = [self.posterior[name].log_prob(value).sum() for name, value in at.items()]
        self.log_evidence = (trace.log_prob_sum() - sum(densities)).item()

    def guide(self, counts: Tensor, successes: Tensor) -> None:
        pyro.sample("weights", self.posterior["weights"])
        pyro.sample("scale", self.posterior["scale"])
        with pyro.plate("groups", 2):
            pyro.sample("chance", self.posterior["chance"])


@BOTH_WAYS
def test_exact_guide_over_constrained_sites(vectorize: bool) -> None:
    constrained = Constrained()
    options = {"num_samples": 200, "vectorize": vectorize}
    options["successes"] = constrained.data[1]  # an argument by its name
    result = psis(constrained_model, constrained.guide, constrained.data[0], **options)
    assert result.khat == -math.inf
    assert result.iw_elbo == pytest.approx(constrained.log_evidence, rel=EXACT)
    shapes = {name: tuple(values.shape) for name, values in result.samples.items()}
    assert shapes == {"weights": (200, 3), "scale": (200,), "chance": (200, 2)}


FLOW = partial(iterated, 1, self_normalizing_linear, init_scale=0.7)


@pytest.mark.parametrize(
    ("kind", "options", "vectorize"),
    [
        (autoguide.AutoNormalizingFlow, {"init_transform_fn": FLOW}, True),
        (autoguide.AutoNormal, {"init_scale": 0.7}, True),
        (autoguide.AutoMultivariateNormal, {"init_scale": 0.7}, True),
        (autoguide.AutoNormalizingFlow, {"init_transform_fn": FLOW}, False),
        (autoguide.AutoNormalMessenger, {"init_scale": 0.7}, False),
    ],
)
def test_autoguides_over_constrained_sites(
    kind: Callable[..., nn.Module], options: dict[str, Any], vectorize: bool
) -> None:
    # Densities in the unconstrained space, Jacobians of the supports, auxiliary sites: a mistake
    # in any of them shifts the evidence and the moments.
    constrained = Constrained()
    guide = kind(constrained_model, **options)
    guide(*constrained.data)
    svi = SVI(constrained_model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(200):
        svi.step(*constrained.data)
    count = 3000 if vectorize else 500
    sizes = {"num_samples": count, "vectorize": vectorize}
    result = psis(constrained_model, guide, *constrained.data, **sizes)
    assert result.verdict != "unreliable"
    assert result.iw_elbo == pytest.approx(constrained.log_evidence, abs=4 / math.sqrt(result.ess))
    assert result.samples.keys() == constrained.posterior.keys()
    draws = result.resample(20_000)
    for name, posterior in constrained.posterior.items():
        mean, deviation = posterior.mean, posterior.stddev
        error = 4 * deviation / math.sqrt(result.ess)
        assert result.samples[name].shape == (count, *posterior.shape())
        assert ((result.mean()[name] - mean).abs() < error).all(), name
        assert ((draws[name].mean(0) - mean).abs() < error).all(), name
        assert ((result.std()[name] - deviation).abs() < error).all(), name


@BOTH_WAYS
def test_discrete_sites_that_the_guide_samples(vectorize: bool) -> None:
    def model() -> None:
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        number = pyro.sample("number", dist.Categorical(torch.tensor([0.2, 0.8])))
        pyro.sample("x", dist.Normal(coin + number, 1.0), obs=torch.tensor(1.5))

    def guide() -> None:
        pyro.sample("coin", dist.Bernoulli(0.5))
        pyro.sample("number", dist.Categorical(torch.tensor([0.5, 0.5])))

    result = psis(model, guide, num_samples=2000, vectorize=vectorize)
    joint = torch.tensor([[0.7 * 0.2, 0.7 * 0.8], [0.3 * 0.2, 0.3 * 0.8]])
    sums = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    joint = joint * dist.Normal(sums, 1.0).log_prob(torch.tensor(1.5)).exp()
    error = 4 * 0.5 / math.sqrt(result.ess)
    assert result.iw_elbo == pytest.approx(joint.sum().log().item(), abs=2 * error)
    expected = (joint[:, 1].sum() / joint.sum()).item()
    assert result.mean()["number"].item() == pytest.approx(expected, abs=error)
    assert result.resample(10)["number"].dtype == torch.long

    def certain() -> None:
        pyro.sample("z", dist.Normal(pyro.sample("coin", dist.Bernoulli(1.0)), 1.0))

    # It is no point mass.
    assert psis(certain, certain, num_samples=25, vectorize=vectorize).khat == -math.inf


@BOTH_WAYS
def test_weights_of_zero_are_legal(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("above", torch.where(z > 0, 0.0, -math.inf))

    result = psis(model, normal(0.0, 2.0), num_samples=2000, vectorize=vectorize)
    assert result.elbo == -math.inf
    assert math.isnan(result.elbo_error)
    assert result.iw_elbo == pytest.approx(math.log(0.5), abs=4 / math.sqrt(result.ess))
    assert (result.resample(1000)["z"] > 0).all()
    assert result.mean()["z"].item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)


def test_nested_plates_and_scales() -> None:
    # Two plates, one inside the other, and a likelihood of weight 3.
    data = torch.randn(3, 4, 2)

    def model() -> None:
        outer = pyro.plate("outer", 3, dim=-2)
        inner = pyro.plate("inner", 4, dim=-1)
        with outer:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with inner:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with outer, inner, poutine.scale(scale=3.0):
            mean = a.unsqueeze(-1) + b
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=data)

    guide = autoguide.AutoNormal(model, init_scale=0.3)
    guide()
    for vectorize in (False, True):
        result = psis(model, guide, num_samples=50, vectorize=vectorize)
        a, b = result.samples["a"], result.samples["b"]
        assert (a.shape, b.shape) == ((50, 3, 1), (50, 4, 2))
        prior = dist.Normal(0.0, 1.0)
        likelihood = dist.Normal(a.unsqueeze(-1) + b.unsqueeze(1), 1.0)
        log_joint = sum(prior.log_prob(each).sum((-1, -2)) for each in (a, b))
        log_joint = log_joint + 3 * likelihood.log_prob(data).sum((-1, -2, -3))
        log_guide = sum(
            dist.Normal(guide.median()[name], 0.3).log_prob(values).flatten(1).sum(-1)
            for name, values in result.samples.items()
        )
        expected, _ = pareto_smooth(log_joint - log_guide)
        assert torch.allclose(result.log_weights, expected, rtol=EXACT)


@pytest.mark.parametrize("vectorize", [None, False, True])
@pytest.mark.parametrize("where", ["model", "guide"])
def test_subsampled_plates_are_errors(where: str, vectorize: bool | None) -> None:
    data = torch.zeros(20)

    def likelihood() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def locals_of(size: int | None) -> None:
        with pyro.plate("data", 20, subsample_size=size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    programs = {
        "model": (likelihood, normal()),
        "guide": (partial(locals_of, None), partial(locals_of, 5)),
    }
    with pytest.raises(ValueError, match="called with all data; got 5 of 20 in 'data'"):
        psis(*programs[where], vectorize=vectorize)


# --- Enumeration --------------------------------------------------------------------------------


@config_enumerate
def mixture(data: Tensor) -> None:
    """A global and a local discrete site, and continuous ones beside them."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("data", len(data)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        outlier = pyro.sample("outlier", dist.Bernoulli(0.3))
        mean = shift + z[..., 0] + outlier * kind
        pyro.sample("x", dist.Normal(mean, z[..., 1].exp()), obs=data)


def mixture_guide(data: Tensor) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 0.8).to_event(1))
    with pyro.plate("data", len(data)):
        pyro.sample("shift", dist.Normal(0.1, 1.0))


@BOTH_WAYS
def test_enumerated_sites_are_summed_out(vectorize: bool) -> None:
    data = torch.tensor([0.3, -1.0, 2.0])
    result = psis(mixture, mixture_guide, data, num_samples=60, vectorize=vectorize)
    assert result.samples.keys() == {"z", "shift"}
    # The sum over all 3 · 2³ values, one by one.
    terms = []
    for kind, outliers in itertools.product(range(3), itertools.product((0.0, 1.0), repeat=3)):
        at = {"kind": torch.tensor(kind), "outlier": torch.tensor(outliers)}
        at_draws = [
            {**at, **{name: values[i] for name, values in result.samples.items()}}
            for i in range(60)
        ]
        traces = [
            poutine.trace(poutine.condition(mixture, each)).get_trace(data) for each in at_draws
        ]
        terms.append(torch.stack([trace.log_prob_sum() for trace in traces]))
    guides = [
        poutine.trace(
            poutine.condition(mixture_guide, {name: v[i] for name, v in result.samples.items()})
        ).get_trace(data)
        for i in range(60)
    ]
    raw = torch.stack(terms).logsumexp(0) - torch.stack([each.log_prob_sum() for each in guides])
    assert result.iw_elbo == pytest.approx(raw.exp().mean().log().item(), rel=EXACT)
    assert torch.allclose(result.log_weights, pareto_smooth(raw)[0], rtol=EXACT)


@BOTH_WAYS
def test_scale_of_enumerated_sites_applies_to_their_sum(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=3.0):
            coin = pyro.sample("coin", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + coin, 1.0), obs=torch.tensor(0.5))

    result = psis(model, normal(), num_samples=30, vectorize=vectorize)
    z = result.samples["z"]
    terms = [
        math.log(chance) + dist.Normal(z + coin, 1.0).log_prob(torch.tensor(0.5))
        for coin, chance in enumerate((0.7, 0.3))
    ]
    # Model and guide have the same density of z.
    raw = 3 * torch.stack(terms).logsumexp(0)
    assert torch.allclose(result.log_weights, pareto_smooth(raw)[0], rtol=EXACT)


@BOTH_WAYS
def test_enumerated_sites_that_the_guide_samples(vectorize: bool) -> None:
    @config_enumerate
    def model() -> None:
        coin = pyro.sample("coin", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(coin, 1.0), obs=torch.tensor(1.5))

    @config_enumerate
    def guide() -> None:
        pyro.sample("coin", dist.Bernoulli(0.5))

    result = psis(model, guide, num_samples=100, vectorize=vectorize)
    coin = result.samples["coin"]
    assert 0 < coin.sum() < 100
    raw = dist.Bernoulli(0.3).log_prob(coin) + dist.Normal(coin, 1.0).log_prob(torch.tensor(1.5))
    assert torch.allclose(result.log_weights, raw - raw.logsumexp(0), rtol=EXACT)


def test_enumerated_markov_chain() -> None:
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    data = torch.tensor([0.1, 1.2, 0.9, -0.3])

    @config_enumerate
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        state: Any = 0
        for i in pyro.markov(range(len(data))):
            state = pyro.sample(f"state {i}", dist.Categorical(transition[state]))
            pyro.sample(f"x {i}", dist.Normal(z + state, 1.0), obs=data[i])

    for vectorize in (False, True):
        result = psis(model, normal(), num_samples=30, vectorize=vectorize)
        z = result.samples["z"]
        # The forward algorithm.
        forward = torch.tensor([0.0, -math.inf]).expand(30, 2)
        for x in data:
            emission = dist.Normal(z.unsqueeze(-1) + torch.arange(2), 1.0).log_prob(x)
            forward = (forward.unsqueeze(-1) + transition.log()).logsumexp(-2) + emission
        expected, _ = pareto_smooth(forward.logsumexp(-1))
        assert torch.allclose(result.log_weights, expected, rtol=EXACT)


# --- One call or a loop -------------------------------------------------------------------------


def mixes_draws() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "vectorized"), [(partial(constrained_model), True), (mixes_draws, False)]
)
def test_default_is_the_way_that_is_right(model: Any, vectorized: bool) -> None:
    guide, args = (normal(), ()) if model is mixes_draws else (None, Constrained().data)
    guide = guide or Constrained().guide
    results = []
    for vectorize in (None, vectorized):
        pyro.set_rng_seed(0)
        results.append(psis(model, guide, *args, num_samples=30, vectorize=vectorize))
    assert torch.equal(results[0].log_weights, results[1].log_weights)
    for name, values in results[0].samples.items():
        assert torch.equal(values, results[1].samples[name])


# --- Side effects -------------------------------------------------------------------------------


@BOTH_WAYS
@MAY_WARN
def test_modes_of_all_submodules_are_restored(vectorize: bool) -> None:
    seen = []

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.0))
            self.first = nn.Sequential(nn.Dropout(0.5))
            self.second = nn.Sequential(self.first[0])

        def forward(self) -> None:
            seen.append([module.training for module in self.modules()])
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    guide = Guide()
    guide.second.eval()
    guide.first.train()  # and with it the module that both have
    before = [module.training for module in guide.modules()]
    assert before == [True, True, True, False]
    # The same for a method of the module, and after an error.
    error = pytest.raises(ValueError, match="expected a guide for the model's")
    for model, program, outcome in (
        (normal(0.5), guide, nullcontext()),
        (lambda: None, guide.forward, error),
    ):
        seen.clear()
        with outcome:
            psis(model, program, num_samples=30, vectorize=vectorize)
        assert seen
        assert not any(any(modes) for modes in seen)
        assert [module.training for module in guide.modules()] == before


@BOTH_WAYS
def test_results_are_reproducible_and_nothing_else_changes(vectorize: bool) -> None:
    conjugate = Conjugate()
    guide = autoguide.AutoNormalizingFlow(
        conjugate, partial(self_normalizing_linear, init_scale=0.3)
    )
    svi = SVI(conjugate, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(20):
        svi.step()
    store = copy.deepcopy(pyro.get_param_store().get_state()["params"])
    state = copy.deepcopy(guide.state_dict())
    results = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        results.append(psis(conjugate, guide, num_samples=50, vectorize=vectorize))
    first, second = results
    assert str(first) == str(second)
    assert torch.equal(first.log_weights, second.log_weights)
    assert not first.log_weights.requires_grad
    assert not first.samples["z"].requires_grad
    after = pyro.get_param_store().get_state()["params"]
    assert store.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in store.items())
    assert repr(guide.state_dict()) == repr(state)
    svi.step()  # training can continue


@BOTH_WAYS
def test_random_stream_is_that_of_the_draws(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    pyro.set_rng_seed(1)
    if vectorize:
        expected = torch.normal(torch.zeros(30, 1), torch.ones(30, 1)).squeeze(-1)
    else:
        expected = torch.stack([torch.normal(0.0, torch.tensor(1.0)) for _ in range(30)])
    after = torch.get_rng_state()
    pyro.set_rng_seed(1)
    result = psis(model, normal(), num_samples=30, vectorize=vectorize)
    assert torch.equal(result.samples["z"], expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_resampling_with_a_generator_of_its_own() -> None:
    gammas = Gammas()
    result = psis(gammas.model, partial(gammas.guide, 3.0, 3.0), num_samples=50)
    state = torch.get_rng_state()
    first, second = (result.resample(7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first["rate"], second["rate"])
    assert torch.equal(torch.get_rng_state(), state)
    for count in (0, -1, 2.0):
        with pytest.raises(ValueError, match="expected num_samples, an integer >= 1; got"):
            result.resample(count)


@pytest.mark.parametrize("where", DEVICES)
def test_single_precision_on_every_device(where: str) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3, device=where), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3, device=where))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.full((3,), 0.4, device=where), 0.8).to_event(1))

    torch.set_default_dtype(torch.float32)
    result = psis(model, guide, num_samples=500, vectorize=True)
    expected = 3 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).item()
    assert result.iw_elbo == pytest.approx(expected, abs=4 / math.sqrt(result.ess))
    assert result.log_weights.dtype == result.mean()["z"].dtype == torch.float32
    assert result.log_weights.device.type == result.resample(5)["z"].device.type == where


# --- Errors and the table -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [24, 0, -5, 100.0, True, "30"])
def test_options_are_checked(count: object) -> None:
    with pytest.raises(ValueError, match=f"expected num_samples, an integer >= 25; got {count!r}"):
        psis(normal(), normal(), num_samples=count)
    with pytest.raises(ValueError, match="expected vectorize to be True, False or None; got 1"):
        psis(normal(), normal(), vectorize=1)
    assert len(psis(normal(), normal(), num_samples=np.int64(30)).log_weights) == 30


def other() -> None:
    pyro.sample("other", dist.Normal(0.0, 1.0))


def discrete(infer: dict[str, Any]) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("component", dist.Bernoulli(0.5), infer=infer)
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def half_is_nan() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("log", torch.where(z > 0, math.nan, 0.0))


def comes_and_goes() -> None:
    if pyro.sample("coin", dist.Bernoulli(0.5)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@BOTH_WAYS
@MAY_WARN
@pytest.mark.parametrize(
    ("model", "make_guide", "message"),
    [
        (
            normal(),
            lambda model: other,
            r"\['z'\], .* got none for \['z'\], and others: \['oth",
        ),
        (lambda: None, lambda model: model, r"expected a guide .* sites \[\]"),
        (partial(discrete, {}), lambda model: normal(), r"got none for \['component'\]"),
        (
            partial(discrete, {"enumerate": "parallel", "num_samples": 2}),
            lambda model: normal(),
            r"got none for \['component'\]",
        ),
        # All weights are equal, as for an exact guide.
        (normal(), autoguide.AutoDelta, r"the same value in all draws of \['z'\]"),
        (half_is_nan, lambda model: normal(), r"got \d+ of 30 that are NaN or infinite"),
    ],
    ids=["other", "none", "not enumerated", "enumerated at random", "point mass", "NaN"],
)
def test_errors(model: Any, make_guide: Any, message: str, vectorize: bool) -> None:
    guide = make_guide(model)
    guide()
    pyro.enable_validation(False)
    with pytest.raises(ValueError, match=message):
        psis(model, guide, num_samples=30, vectorize=vectorize)


def test_errors_of_one_way() -> None:
    with pytest.raises(ValueError, match="expected vectorize=False for a guide that is a messeng"):
        psis(normal(), autoguide.AutoNormalMessenger(normal()), vectorize=True)
    with pytest.raises(ValueError, match="expected the same sites in every draw"):
        psis(comes_and_goes, comes_and_goes, num_samples=30)


# --- The verdict ---------------------------------------------------------------------------------


def outcome(khat: float, ess: float, gap: float, count: int = 1000) -> PSIS:
    return PSIS(khat, -1.5, 0.01, -1.5 + gap, ess, torch.zeros(count), {})


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (outcome(0.3, 970.0, 0.02), "reliable"),
        (outcome(-math.inf, 1000.0, 0.0), "reliable"),
        # A fit whose weights hardly vary, but for a few.
        (outcome(1.07, 1969.0, 0.013, 2000), "reliable but for the tails"),
        (outcome(0.69, 950.0, 0.05), "reliable but for the tails"),
        # A fit of 300 steps.
        (outcome(0.5, 220.0, 1.2), "usable with weights"),
        (outcome(0.5, 99.0, 1.2), "unreliable"),
        (outcome(0.8, 220.0, 1.2), "unreliable"),
        (outcome(0.3, 690.0, 0.05), "usable with weights"),
        (outcome(0.3, 900.0, 0.11), "usable with weights"),
        (outcome(math.inf, 3.0, 5.0), "unreliable"),
        (outcome(0.3, 900.0, math.inf), "usable with weights"),
    ],
    ids=str,
)
def test_verdict_of_bulk_and_tail(result: PSIS, verdict: str) -> None:
    assert result.verdict == verdict
    assert result.is_reliable == verdict.startswith("reliable")
    assert str(result).startswith(f"verdict  {verdict}: ")


def test_threshold_of_khat() -> None:
    assert outcome(0.3, 900.0, 0.0).threshold == pytest.approx(2 / 3)
    assert outcome(0.3, 900.0, 0.0, 100_000).threshold == 0.7


@pytest.mark.parametrize(
    ("posterior", "guide", "verdict"),
    [
        (dist.Normal(0.0, 1.0), dist.Normal(0.1, 0.95), "reliable"),
        (dist.StudentT(10.0), dist.Normal(0.0, 1.05), "reliable but for the tails"),
        (dist.Normal(0.0, 1.0), dist.Normal(1.2, 1.0), "usable with weights"),
        (dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0), "usable with weights"),
        (dist.Normal(0.0, 1.0), dist.Normal(3.0, 1.0), "unreliable"),
        (dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.4), "unreliable"),
    ],
    ids=str,
)
def test_verdict_is_that_of_the_errors(
    posterior: dist.Distribution, guide: dist.Distribution, verdict: str
) -> None:
    result = psis(
        lambda: pyro.sample("z", posterior), lambda: pyro.sample("z", guide), num_samples=4000
    )
    assert result.verdict == verdict
    mean, sd = posterior.mean.item(), posterior.stddev.item()

    def error(found_mean: Tensor, found_sd: Tensor) -> float:
        """The larger of the two errors, in posterior standard deviations."""
        return max(abs(found_mean.item() - mean), abs(found_sd.item() - sd)) / sd

    plain = error(result.samples["z"].mean(), result.samples["z"].std())
    weighted = error(result.mean()["z"], result.std()["z"])
    # The largest errors within the bounds of gap and ESS, 0.45 and 0.24, are those of guides that
    # are Gaussians; that of the weights has a Monte Carlo error of 0.1 at ESS = 100.
    if result.is_reliable:
        assert plain < 0.2
        assert weighted < 0.2
    elif verdict == "usable with weights":
        assert plain > 0.5
        assert weighted < 0.2
    else:  # the weights may be right by chance
        assert plain > 0.5


def test_a_mode_that_is_missed_is_not_seen_and_that_is_said() -> None:
    posterior = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 30.0]), 1.0)
    )
    result = psis(lambda: pyro.sample("z", posterior), normal())
    assert result.verdict == "reliable"
    assert str(result).splitlines()[-1].startswith("unseen   a mode from which the guide never")


@pytest.mark.parametrize("shape", [0.0, 0.3, 0.7, 1.0, 2.0])
def test_standard_error_of_khat(shape: float) -> None:
    # 300 fits give their standard deviation to 4 %; see the docstring for the rest.
    khats = torch.tensor([pareto_smooth(pareto_weights(1000, shape))[1] for _ in range(300)])
    result = outcome(khats.mean().item(), 900.0, 0.0)
    assert result.khat_error == pytest.approx(khats.std().item(), rel=0.2)


@pytest.mark.parametrize("khat", [-math.inf, -0.6, math.inf])
def test_khat_without_a_standard_error(khat: float) -> None:
    assert math.isnan(outcome(khat, 900.0, 0.0).khat_error)
    assert "±" not in str(outcome(khat, 900.0, 0.0)).splitlines()[2]


@pytest.mark.parametrize(
    ("khat", "words"),
    [
        (-math.inf, "khat -inf: the largest weights are equal"),
        (-0.9, "khat -0.90 (goal: below 0.67)"),
        (0.3, "khat 0.30 ± 0.12 (goal: below 0.67)"),
        (0.6, "khat 0.60 ± 0.15 (goal: below 0.67, which is within the error)"),
        (0.69, "khat 0.69 ± 0.16 (goal: below 0.67, which is within the error); 1682 draws woul"),
        (1.2, "khat 1.20 ± 0.20 (goal: below 0.67)"),
        (math.inf, "khat inf (goal: below 0.67)"),
    ],
)
def test_tail_in_words(khat: float, words: str) -> None:
    assert str(outcome(khat, 900.0, 0.0)).splitlines()[2].startswith(f"tail     {words}")


def test_result_prints_as_a_table() -> None:
    result = outcome(0.123, 876.54, 0.1234)
    assert repr(result) == str(result)
    assert str(result).splitlines() == [
        "verdict  usable with weights: use mean(), std() and resample(), not the guide's own draws",
        "bulk     ESS 876.5 of 1000 draws, 88 % (goal: 70 %); gap 0.123 nats (goal: 0.1)",
        "tail     khat 0.12 ± 0.10 (goal: below 0.67)",
        "ELBO     -1.5000 ± 0.0100",
        "IW-ELBO  -1.3766",
        "unseen   a mode from which the guide never draws shows in none of these numbers",
    ]


# --- Results to take away -----------------------------------------------------------------------


def weighted(values: Tensor, log_weights: Tensor) -> PSIS:
    """A result with given draws of one site, ``theta``."""
    log_weights = log_weights - log_weights.logsumexp(0)
    return PSIS(0.3, -1.5, 0.01, -1.4, 900.0, log_weights, {"theta": values})


def test_summary_has_one_row_for_each_element() -> None:
    result = weighted(torch.randn(100, 2, 3), torch.randn(100))
    result.samples["scale"] = torch.rand(100)
    summary = result.summary()
    elements = [f"theta[{i},{j}]" for i in range(2) for j in range(3)]
    assert list(summary) == [*elements, "scale"]
    mean, std = result.mean()["theta"], result.std()["theta"]
    for (i, j), name in zip(itertools.product(range(2), range(3)), elements, strict=True):
        assert list(summary[name]) == ["mean", "sd", "5%", "median", "95%", "mcse_mean"]
        assert summary[name]["mean"] == pytest.approx(mean[i, j].item(), rel=EXACT)
        assert summary[name]["sd"] == pytest.approx(std[i, j].item(), rel=EXACT)


def test_summary_has_weighted_quantiles() -> None:
    pytest.importorskip("numpy", minversion="2.0")  # for weighted quantiles
    result = weighted(torch.randn(200), torch.randn(200))
    (draws, weights) = result.to_numpy()
    row = result.summary()["theta"]
    for name, probability in (("5%", 0.05), ("median", 0.5), ("95%", 0.95)):
        expected = np.quantile(draws["theta"], probability, weights=weights, method="inverted_cdf")
        assert row[name] == pytest.approx(expected, rel=EXACT)


def test_summary_of_draws_with_weights_of_zero() -> None:
    values = torch.arange(30.0)
    row = weighted(values, torch.where(values < 20, -math.inf, 0.0)).summary()["theta"]
    assert (row["5%"], row["median"], row["95%"]) == (20.0, 24.0, 29.0)


def test_standard_errors_of_the_mean_are_those_of_replications() -> None:
    proposal, posterior = dist.Normal(0.5, 1.2), dist.Normal(0.0, 1.0)
    draws = proposal.sample((500, 400))
    rows = [
        weighted(each, posterior.log_prob(each) - proposal.log_prob(each)).summary()["theta"]
        for each in draws
    ]
    means, errors = (torch.tensor([row[name] for row in rows]) for name in ("mean", "mcse_mean"))
    # 500 replications give the standard deviation to 3 %.
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.12)


def test_summary_prints_as_a_table() -> None:
    result = weighted(torch.arange(50.0).reshape(25, 2), torch.zeros(25))
    assert str(result.summary()).splitlines() == [
        "               mean         sd         5%     median        95%  mcse_mean",
        "theta[0]         24      14.42          2         24         46      2.884",
        "theta[1]         25      14.42          3         25         47      2.884",
    ]


def test_arrays_of_draws_and_weights() -> None:
    result = weighted(torch.randn(30, 2, dtype=torch.float32), torch.randn(30))
    samples, weights = result.to_numpy()
    assert samples["theta"].dtype == np.float32
    assert np.array_equal(samples["theta"], result.samples["theta"].numpy())
    assert weights.sum() == pytest.approx(1.0, rel=EXACT)
    assert np.array_equal(weights, result.log_weights.exp().numpy())


@pytest.mark.filterwarnings("ignore")  # ArviZ announces changes when it is imported
def test_draws_for_arviz() -> None:
    arviz = pytest.importorskip("arviz")
    result = weighted(torch.randn(30, 2), torch.randn(30))
    data = result.to_arviz(1000, torch.Generator().manual_seed(0))
    assert isinstance(data, arviz.InferenceData)
    expected = result.resample(1000, torch.Generator().manual_seed(0))["theta"]
    assert np.array_equal(data.posterior["theta"].values, expected.numpy()[None])
    assert result.to_arviz().posterior.sizes["draw"] == 30


def test_arviz_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"expected ArviZ: pip install 'pyro-snf\[arviz\]'"):
        weighted(torch.randn(30), torch.randn(30)).to_arviz()
