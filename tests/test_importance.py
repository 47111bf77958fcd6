"""Pareto-smoothed importance sampling, against ArviZ, known tails and analytic posteriors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
)
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


@pytest.mark.parametrize("count", [25, 26, 100, 1000, 20000])
@pytest.mark.parametrize("shape", [-1.0, -0.3, 0.0, 0.2, 0.5, 0.7, 1.0, 3.0, 30.0])
def test_smoothing_is_that_of_arviz(count: int, shape: float) -> None:
    raw = pareto_weights(count, shape) - 800  # weights that underflow
    expected, expected_khat = arviz_psislw(raw)
    smoothed, khat = pareto_smooth(raw)
    assert khat == pytest.approx(expected_khat, rel=EXACT, abs=EXACT)
    assert torch.allclose(smoothed, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_zeros", [1, 500, 950, 994, 997, 999])
def test_weights_of_zero_are_treated_as_by_arviz(num_zeros: int) -> None:
    raw = pareto_weights(1000, 0.3)
    raw[:num_zeros] = -math.inf
    expected, expected_khat = arviz_psislw(raw)
    smoothed, khat = pareto_smooth(raw)
    assert khat == pytest.approx(expected_khat, abs=EXACT)
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


@pytest.mark.parametrize("rate", [0.8, 1.25, 2.0, 4.0])
def test_tail_index_of_exponentials(rate: float) -> None:
    # w = exp((r − 1) x)/r with x ~ Exp(r): P(w > t) = (r t)^(−r/(r − 1)), so k = 1 − 1/r. For
    # r < 1, w is at most 1/r, and about uniform near it: k = −1.
    proposal = dist.Exponential(torch.tensor(rate))
    draws = proposal.sample((200_000,))
    raw = dist.Exponential(1.0).log_prob(draws) - proposal.log_prob(draws)
    # With a tail of M = 1342, the standard deviation of k̂ is (1 + k)/√M, at most 0.05; its prior
    # has the weight 10/(M + 10).
    expected = 1 - 1 / rate if rate > 1 else -1.0
    assert pareto_smooth(raw)[1] == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("degrees", [1.0, 2.0])
def test_tail_index_of_a_student_target(degrees: float) -> None:
    # The densities decay as |x|^−(ν + 1) and |x|^−(2ν + 1): w ~ |x|^ν, P(w > t) ~ t^−2, k = 1/2.
    proposal = dist.StudentT(2 * degrees)
    draws = proposal.sample((200_000,))
    raw = dist.StudentT(degrees).log_prob(draws) - proposal.log_prob(draws)
    assert pareto_smooth(raw)[1] == pytest.approx(0.5, abs=0.15)


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
    assert result.is_reliable
    # Four standard errors, by the effective number of draws.
    mean, deviation = gammas.shape / gammas.rate, math.sqrt(gammas.shape) / gammas.rate
    error = deviation / math.sqrt(result.ess)
    assert result.samples["rate"].mean().item() == pytest.approx(1.0, abs=4 * error)
    assert result.mean()["rate"].item() == pytest.approx(mean, abs=4 * error)
    assert result.std()["rate"].item() == pytest.approx(deviation, abs=4 * error)
    draws = result.resample(20_000)["rate"]
    assert draws.shape == (20_000,)
    assert draws.mean().item() == pytest.approx(mean, abs=4 * error)
    assert draws.std().item() == pytest.approx(deviation, abs=4 * error)
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
    assert result.khat == pytest.approx(khat, rel=EXACT)
    assert torch.allclose(result.log_weights, smoothed, rtol=EXACT)
    assert result.elbo == pytest.approx(raw.mean().item(), rel=EXACT)
    assert result.elbo_error == pytest.approx(raw.std().item() / math.sqrt(1000), rel=EXACT)
    assert result.iw_elbo == pytest.approx(raw.exp().mean().log().item(), rel=EXACT)
    assert result.ess == pytest.approx(1 / weights.square().sum().item(), rel=EXACT)
    mean = (weights * rate).sum()
    assert result.mean()["rate"].item() == pytest.approx(mean.item(), rel=EXACT)
    variance = (weights * (rate - mean) ** 2).sum().item()
    assert result.std()["rate"].item() == pytest.approx(math.sqrt(variance), rel=EXACT)


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
        at = {
            "weights": torch.tensor([0.2, 0.3, 0.5]),
            "scale": torch.tensor(1.7),
            "chance": torch.tensor([0.4, 0.7]),
        }
        trace = poutine.trace(poutine.condition(constrained_model, at)).get_trace(*self.data)
        densities = [self.posterior[name].log_prob(value).sum() for name, value in at.items()]
        self.log_evidence = (trace.log_prob_sum() - sum(densities)).item()

    def guide(self, *data: Tensor) -> None:
        pyro.sample("weights", self.posterior["weights"])
        pyro.sample("scale", self.posterior["scale"])
        with pyro.plate("groups", 2):
            pyro.sample("chance", self.posterior["chance"])


@BOTH_WAYS
def test_exact_guide_over_constrained_sites(vectorize: bool) -> None:
    constrained = Constrained()
    guide = constrained.guide
    result = psis(constrained_model, guide, *constrained.data, vectorize=vectorize)
    assert result.khat == -math.inf
    assert result.iw_elbo == pytest.approx(constrained.log_evidence, rel=EXACT)
    assert {name: values.shape for name, values in result.samples.items()} == {
        "weights": (1000, 3),
        "scale": (1000,),
        "chance": (1000, 2),
    }


AUTOGUIDES: dict[str, Callable[[Callable[..., None]], nn.Module]] = {
    "flow": lambda model: AutoNormalizingFlow(
        model, partial(iterated, 1, self_normalizing_linear, init_scale=0.7)
    ),
    "normal": lambda model: AutoNormal(model, init_scale=0.7),
    "multivariate": lambda model: AutoMultivariateNormal(model, init_scale=0.7),
    "messenger": lambda model: AutoNormalMessenger(model, init_scale=0.7),
}


@pytest.mark.parametrize(
    ("kind", "vectorize"),
    [
        ("flow", True),
        ("normal", True),
        ("multivariate", True),
        ("flow", False),
        ("messenger", False),
    ],
)
def test_autoguides_over_constrained_sites(kind: str, vectorize: bool) -> None:
    # Densities in the unconstrained space, Jacobians of the supports, auxiliary sites: a mistake
    # in any of them shifts the evidence and the moments.
    constrained = Constrained()
    guide = AUTOGUIDES[kind](constrained_model)
    guide(*constrained.data)
    svi = SVI(constrained_model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(300):
        svi.step(*constrained.data)
    count = 3000 if vectorize else 500
    result = psis(
        constrained_model, guide, *constrained.data, num_samples=count, vectorize=vectorize
    )
    assert result.is_reliable
    assert result.iw_elbo == pytest.approx(constrained.log_evidence, abs=4 / math.sqrt(result.ess))
    assert result.samples.keys() == constrained.posterior.keys()
    draws = result.resample(20_000)
    for name, posterior in constrained.posterior.items():
        error = 4 * posterior.stddev / math.sqrt(result.ess)
        assert result.samples[name].shape == (count, *posterior.shape())
        assert ((result.mean()[name] - posterior.mean).abs() < error).all(), name
        assert ((draws[name].mean(0) - posterior.mean).abs() < error).all(), name
        assert ((result.std()[name] - posterior.stddev).abs() < error).all(), name


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


def test_certain_discrete_site_is_no_point_mass() -> None:
    def model() -> None:
        coin = pyro.sample("coin", dist.Bernoulli(1.0))
        pyro.sample("z", dist.Normal(coin, 1.0))

    assert psis(model, model, num_samples=25).khat == -math.inf


@BOTH_WAYS
def test_weights_of_zero_are_legal(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("above", torch.where(z > 0, 0.0, -math.inf))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 2.0))

    result = psis(model, guide, num_samples=2000, vectorize=vectorize)
    assert result.elbo == -math.inf
    assert math.isnan(result.elbo_error)
    assert result.iw_elbo == pytest.approx(math.log(0.5), abs=4 / math.sqrt(result.ess))
    assert (result.resample(1000)["z"] > 0).all()
    assert result.mean()["z"].item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)


def test_arguments_go_to_model_and_guide() -> None:
    def model(data: Tensor, *, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data: Tensor, *, scale: float) -> None:
        precision = 1 + 1 / scale**2
        pyro.sample("z", dist.Normal(data / precision, precision**-0.5))

    for vectorize in (False, True):
        result = psis(model, guide, torch.tensor(1.5), scale=2.0, vectorize=vectorize)
        assert result.khat == -math.inf
        expected = dist.Normal(0.0, math.sqrt(5.0)).log_prob(torch.tensor(1.5)).item()
        assert result.iw_elbo == pytest.approx(expected, rel=EXACT)


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

    guide = AutoNormal(model, init_scale=0.3)
    guide()
    for vectorize in (False, True):
        result = psis(model, guide, num_samples=50, vectorize=vectorize)
        a, b = result.samples["a"], result.samples["b"]
        assert a.shape == (50, 3, 1)
        assert b.shape == (50, 4, 2)
        log_joint = dist.Normal(0.0, 1.0).log_prob(a).sum((-1, -2))
        log_joint = log_joint + dist.Normal(0.0, 1.0).log_prob(b).sum((-1, -2))
        mean = a.unsqueeze(-1) + b.unsqueeze(1)
        log_joint = log_joint + 3 * dist.Normal(mean, 1.0).log_prob(data).sum((-1, -2, -3))
        log_guide = sum(
            dist.Normal(guide.median()[name], 0.3).log_prob(values).flatten(1).sum(-1)
            for name, values in result.samples.items()
        )
        expected, _ = pareto_smooth(log_joint - log_guide)
        assert torch.allclose(result.log_weights, expected, rtol=EXACT)


def test_subsampled_plates_are_looped_over() -> None:
    data = torch.randn(20)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide() -> None:
        pyro.sample("z", dist.Normal(data.sum() / 21, 21**-0.5))

    result = psis(model, guide, num_samples=400)
    assert result.samples.keys() == {"z"}
    # The guide is exact, so all of the variance is due to the subsample.
    assert result.elbo_error > 0.01


# --- Side effects -------------------------------------------------------------------------------


@BOTH_WAYS
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

    def model() -> None:
        pyro.sample("z", dist.Normal(0.5, 1.0))

    guide = Guide()
    guide.second.eval()
    guide.first.train()  # and with it the module that both have
    before = [module.training for module in guide.modules()]
    assert before == [True, True, True, False]
    psis(model, guide, num_samples=30, vectorize=vectorize)
    assert not any(any(modes) for modes in seen)
    assert [module.training for module in guide.modules()] == before

    # The same for a method of the module, and after an error.
    seen.clear()
    with pyro_may_warn(), pytest.raises(ValueError, match="expected a guide for the model's"):
        psis(lambda: None, guide.forward, num_samples=30, vectorize=vectorize)
    assert not any(any(modes) for modes in seen)
    assert [module.training for module in guide.modules()] == before


@BOTH_WAYS
def test_results_are_reproducible_and_nothing_else_changes(vectorize: bool) -> None:
    conjugate = Conjugate()
    guide = AutoNormalizingFlow(conjugate, partial(self_normalizing_linear, init_scale=0.3))
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


def test_random_stream_is_that_of_the_draws() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(1)
    expected = torch.stack([torch.normal(0.0, torch.tensor(1.0)) for _ in range(30)])
    after = torch.get_rng_state()
    pyro.set_rng_seed(1)
    assert torch.equal(psis(model, guide, num_samples=30).samples["z"], expected)
    assert torch.equal(torch.get_rng_state(), after)

    pyro.set_rng_seed(1)
    expected = torch.normal(torch.zeros(30, 1), torch.ones(30, 1)).squeeze(-1)
    after = torch.get_rng_state()
    pyro.set_rng_seed(1)
    assert torch.equal(psis(model, guide, num_samples=30, vectorize=True).samples["z"], expected)
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


def normal_model() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


@contextmanager
def pyro_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("count", [24, 0, -5, 100.0, True, "30"])
def test_options_are_checked(count: object) -> None:
    with pytest.raises(ValueError, match=f"expected num_samples, an integer >= 25; got {count!r}"):
        psis(normal_model, normal_model, num_samples=count)
    with pytest.raises(ValueError, match="expected vectorize to be True or False; got 1"):
        psis(normal_model, normal_model, vectorize=1)
    assert len(psis(normal_model, normal_model, num_samples=np.int64(30)).log_weights) == 30


@BOTH_WAYS
def test_other_sites_are_an_error(vectorize: bool) -> None:
    def other() -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    expected = r"expected a guide .* sites \['z'\]; got none for \['z'\], and others: \['other'\]"
    with pyro_may_warn(), pytest.raises(ValueError, match=expected):
        psis(normal_model, other, vectorize=vectorize)
    with pytest.raises(ValueError, match=r"expected a guide .* sites \[\]"):
        psis(lambda: None, lambda: None, vectorize=vectorize)


@BOTH_WAYS
def test_enumerated_sites_are_an_error(vectorize: bool) -> None:
    @config_enumerate
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("component", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pyro_may_warn(), pytest.raises(ValueError, match=r"got none for \['component'\]"):
        psis(model, normal_model, vectorize=vectorize)


@BOTH_WAYS
def test_point_masses_are_an_error(vectorize: bool) -> None:
    # All weights are equal, as for an exact guide.
    conjugate = Conjugate()
    guide = AutoDelta(conjugate)
    guide()
    with pytest.raises(ValueError, match=r"the same value in all draws of \['z'\]"):
        psis(conjugate, guide, num_samples=30, vectorize=vectorize)


def test_vectorized_messenger_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected vectorize=False for a guide that is a messeng"):
        psis(normal_model, AutoNormalMessenger(normal_model), vectorize=True)


@BOTH_WAYS
def test_nan_weights_are_an_error(vectorize: bool) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("log", torch.where(z > 0, math.nan, 0.0))

    pyro.enable_validation(False)
    with pytest.raises(ValueError, match=r"got \d+ of 100 that are NaN or infinite"):
        psis(model, normal_model, num_samples=100, vectorize=vectorize)


def test_sites_that_come_and_go_are_an_error() -> None:
    def model() -> None:
        if pyro.sample("coin", dist.Bernoulli(0.5)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected the same sites in every draw"):
        psis(model, model, num_samples=30)


@pytest.mark.parametrize(
    ("khat", "reliable", "words"),
    [
        (-math.inf, True, "reliable: the largest weights are equal"),
        (-0.3, True, "reliable: below 0.67"),
        (0.66, True, "reliable: below 0.67"),
        (0.69, False, "unreliable: not below 0.67; 1682 draws would do"),
        (0.8, False, "unreliable: not below 0.7; more draws would hardly help"),
        (1.2, False, "unreliable: the weights have no finite mean"),
        (math.inf, False, "unreliable: the weights have no finite mean"),
    ],
)
def test_verdicts(khat: float, reliable: bool, words: str) -> None:
    result = PSIS(khat, -1.5, 0.01, -1.4, 900.0, torch.zeros(1000), {})
    assert result.is_reliable == reliable
    assert result.verdict == words
    assert result.threshold == pytest.approx(2 / 3)
    many = PSIS(khat, -1.5, 0.01, -1.4, 900.0, torch.zeros(100_000), {})
    assert many.threshold == 0.7


def test_result_prints_as_a_table() -> None:
    result = PSIS(0.123, -1.5, 0.01, -1.4, 876.54, torch.zeros(1000), {})
    assert repr(result) == str(result)
    assert str(result).splitlines() == [
        "khat     0.12, reliable: below 0.67",
        "ESS      876.5 of 1000 draws",
        "ELBO     -1.5000 ± 0.0100",
        "IW-ELBO  -1.4000",
    ]
