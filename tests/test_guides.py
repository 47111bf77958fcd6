"""AutoSelfNormalizingFlow: its start, its state, every objective of Pyro, clipping, bad options."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
    init_to_median,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from pyro_snf import (
    AutoSelfNormalizingFlow,
    LowRankAutoregressive,
    Refined,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
)
from pyro_snf.path_gradient import PathGradientDistribution
from tests.registry import COPIES, by_pickle, randomize
from tests.test_pyro import Conjugate

# Float64, the same operations in another order.
EXACT = 1e-9
# The moments of 4,000 draws, of a deviation of 1: five standard errors of a mean are 0.08, those of
# a quantile of 10 % 0.14.
SAMPLED = 0.15
# Posterior means and covariances of a Gaussian after a few hundred steps: the path gradient's noise
# vanishes with the distance, what is left is Adam's.
TRAINED = 0.03
# The ELBO's distance from the evidence, in nats, after as many steps, over seeds: 0.05 at most
# where the Gaussian is one of the family's simplest members, 0.11 where it has to be undone.
TIGHT = 0.08
NEARLY_TIGHT = 0.2

DIM = 4


class Recorder(Conjugate):
    """The conjugate model, which keeps the latent values that it was called with."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__(dim)
        self.values: list[Tensor] = []

    def __call__(self) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
        self.values.append(z)
        mean = (z.unsqueeze(-2) * self.matrix).sum(-1)
        pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=self.data)

    def log_joint(self, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1).log_prob(z)
        mean = z @ self.matrix.mT
        return prior + dist.Normal(mean, self.noise).to_event(1).log_prob(self.data)


class Switch(Recorder):
    """With a discrete site, to be enumerated."""

    @property
    def visible(self) -> Callable[[], None]:
        return poutine.block(self, hide=["k"])

    def __call__(self) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
        self.values.append(z)
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z.sum(-1) + 2 * k, 0.5), obs=torch.tensor(1.0))

    def log_joint(self, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros(self.dim), 1.0).to_event(1).log_prob(z)
        terms = [
            math.log(weight) + dist.Normal(z.sum(-1) + 2 * k, 0.5).log_prob(torch.tensor(1.0))
            for k, weight in [(0, 0.7), (1, 0.3)]
        ]
        return prior + torch.stack(terms).logsumexp(0)


def mixed() -> None:
    """Sites of all kinds of support and shape."""
    pyro.sample("scale", dist.LogNormal(0.5, 1.0))
    pyro.sample("share", dist.Beta(2.0, 3.0))
    pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    pyro.sample("root", dist.LKJCholesky(3, 1.0))
    pyro.sample("bounded", dist.Uniform(-1.0, 2.0))
    pyro.sample("table", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
        pyro.sample("cells", dist.Gamma(2.0, 2.0))
        pyro.sample("vectors", dist.Normal(torch.zeros(2), 1.0).to_event(1))


SHAPES = {
    "scale": (),
    "share": (),
    "shares": (3,),
    "root": (3, 3),
    "bounded": (),
    "table": (2, 3),
    "cells": (3, 2),
    "vectors": (3, 2, 2),
}


@pytest.fixture
def conjugate() -> Recorder:
    return Recorder()


def created(model: Callable[..., Any], num_layers: int = 2, **options: Any) -> Any:
    """A guide that has been called."""
    guide = AutoSelfNormalizingFlow(model, num_layers, **options)
    guide()
    return guide


def random(model: Callable[..., Any], num_layers: int = 2, **options: Any) -> Any:
    """One with random parameters, R being exact."""
    guide = created(model, num_layers, **options)
    randomize(guide.transform)
    return guide


def optimal(conjugate: Conjugate, **options: Any) -> Any:
    """One that is the posterior."""
    guide = created(conjugate, 1, **options)
    guide.transform.parts[0].load_state_dict(conjugate.optimal().state_dict())
    return guide


def trained(model: Callable[..., Any], steps: int = 3, **options: Any) -> Any:
    guide = AutoSelfNormalizingFlow(model, **options)
    fit(guide, model, steps)
    return guide


def fit(guide: Any, model: Callable[..., Any], steps: int, lr: float = 0.02) -> None:
    svi = SVI(model, guide, Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        svi.step()


def close(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def parameters_of(guide: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in guide.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draws(guide: Any, seed: int = 5) -> Tensor:
    """Of its only site, from a given seed."""
    pyro.set_rng_seed(seed)
    return guide.sample_posterior(3)["z"]


# --- The start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_it_starts_as_a_mean_field_gaussian(num_layers: int) -> None:
    guide = created(mixed, num_layers, init_scale=0.3)
    x = torch.randn(guide.latent_dim)
    assert close(guide.transform(x), guide.transform(torch.zeros_like(x)) + 0.3 * x)
    jacobian = torch.autograd.functional.jacobian(guide.transform, x)
    assert close(jacobian, 0.3 * torch.eye(len(x)))
    # Dense layers and activations alternate, and the last one is dense.
    kinds = [type(part) for part in guide.transform.parts]
    assert kinds == ([SelfNormalizingLinear, LowRankAutoregressive] * 3)[:num_layers][::-1]


INITS = {
    "mean": (init_to_mean, math.exp(0.5 + 0.5)),
    "value": (init_to_value(values={"scale": torch.tensor(7.0)}), 7.0),
}


@pytest.mark.parametrize("init", INITS)
def test_it_starts_where_the_init_function_says(init: str) -> None:
    init_loc_fn, expected = INITS[init]
    guide = created(mixed, init_loc_fn=init_loc_fn, init_scale=1e-9)
    assert guide.sample_posterior(1)["scale"].item() == pytest.approx(expected, abs=1e-6)


def test_it_starts_where_pyros_guides_start() -> None:
    # The median is drawn: from the same seed.
    starts = []
    for kind, options in ((AutoSelfNormalizingFlow, {"init_scale": 1e-12}), (AutoNormal, {})):
        pyro.set_rng_seed(0)
        guide = kind(mixed, init_loc_fn=init_to_median(num_samples=3), **options)
        guide()
        starts.append(guide.median())
    assert all(close(starts[0][name], value) for name, value in starts[1].items())


def test_options_reach_every_dense_layer() -> None:
    options = {"log_det": Refined(tolerance=0.01, seed=3), "inverse": "exact"}
    first, _, last = created(mixed, 3, **options).transform.parts
    for layer in (first, last):
        assert layer.log_det.tolerance == 0.01
        assert layer.inverse == "exact"
    assert first.log_det is not last.log_det


# --- Samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
def test_samples_have_the_shapes_and_supports_of_their_sites(called: bool) -> None:
    guide = random(mixed) if called else AutoSelfNormalizingFlow(mixed)
    samples, sites = guide.sample_posterior(7), poutine.trace(mixed).get_trace().nodes
    assert list(samples) == list(SHAPES)
    for values, batch in ((samples, (7,)), (guide(), ())):
        for name, value in values.items():
            assert value.shape == (*batch, *SHAPES[name])
            assert sites[name]["fn"].support.check(value).all()
            assert not (batch and value.requires_grad)


def test_posterior_samples_are_those_of_the_guide() -> None:
    # The same numbers, at the same sites.
    guide = random(mixed).eval()
    pyro.set_rng_seed(3)
    expected = guide()
    pyro.set_rng_seed(3)
    for name, values in guide.sample_posterior(1).items():
        assert close(values[0], expected[name]), name


def test_guides_density_is_that_of_the_change_of_variables() -> None:
    # On constrained spaces too: the log-dets of all sites' supports.
    guide = random(mixed).eval()
    trace = poutine.trace(guide).get_trace()
    latent = trace.nodes["_AutoSelfNormalizingFlow_latent"]["value"]
    expected = guide.get_posterior().log_prob(latent)
    for name, (site, value) in {
        site["name"]: (site, value) for site, value in guide._unpack_latent(latent)
    }.items():
        support = biject_to(site["fn"].support)
        constrained = trace.nodes[name]["value"]
        expected = expected - support.log_abs_det_jacobian(value, constrained).sum()
    assert close(trace.log_prob_sum(), expected)


def test_posterior_is_a_distribution(conjugate: Conjugate) -> None:
    guide = random(conjugate)
    assert isinstance(guide.get_posterior(), PathGradientDistribution)
    assert guide.get_transform() is guide.transform
    base = guide.get_base_dist()
    assert guide.get_posterior().event_shape == base.event_shape == (DIM,)
    z = torch.randn(3, DIM)
    assert close(base.log_prob(z), -0.5 * z.square().sum(-1) - DIM / 2 * math.log(2 * math.pi))
    pyro.clear_param_store()
    guide = created(conjugate, gradient="total")
    assert type(guide.get_posterior()) is dist.TransformedDistribution


def test_quantiles_of_a_known_posterior(conjugate: Conjugate) -> None:
    guide = optimal(conjugate)
    levels = [0.1, 0.5, 0.9]
    scale = conjugate.covariance.diagonal().sqrt()
    expected = dist.Normal(conjugate.mean, scale).icdf(torch.tensor(levels).unsqueeze(-1))
    assert ((guide.quantiles(levels)["z"] - expected) / scale).abs().max() < SAMPLED
    assert ((guide.median()["z"] - conjugate.mean) / scale).abs().max() < SAMPLED


def test_quantiles_and_medians_are_shaped_as_pyros() -> None:
    def shapes(found: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in found.items()}

    levels, ours, theirs = [0.25, 0.75], created(mixed), AutoMultivariateNormal(mixed)
    theirs()
    expected = shapes(theirs.quantiles(levels))
    assert (
        shapes(ours.quantiles(levels)) == shapes(ours.quantiles(torch.tensor(levels))) == expected
    )
    assert shapes(ours.median()) == shapes(theirs.median())


def test_quantiles_are_ordered() -> None:
    found = random(mixed).quantiles([0.0, 0.1, 0.5, 0.9, 1.0])
    for name in ("scale", "share", "bounded", "cells", "table"):
        assert (found[name].diff(dim=0) >= 0).all(), name


def test_quantiles_of_many_latents() -> None:
    # torch's quantile takes so many numbers at once: they go by 1,024 latent variables.
    def wide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(1030), 1.0).to_event(1))

    guide = created(wide, 1, log_det="exact")
    found = guide.quantiles([0.1, 0.5])["z"]
    start = guide.transform(torch.zeros(1030))
    expected = start + 0.1 * dist.Normal(0.0, 1.0).icdf(torch.tensor([[0.1], [0.5]]))
    assert ((found - expected) / 0.1).abs().max() < SAMPLED


@pytest.mark.parametrize("levels", [0.5, [-0.1], [1.1], [math.nan], [[0.5]]], ids=str)
def test_bad_quantiles(levels: object) -> None:
    with pytest.raises(ValueError, match=r"expected a list of quantiles in \[0, 1\]; got"):
        created(mixed).quantiles(levels)


@pytest.mark.parametrize("number", [0, -1, 2.0, None])
def test_bad_number_of_samples(number: object) -> None:
    with pytest.raises(ValueError, match=f"num_samples, an integer >= 1; got {number!r}"):
        created(mixed).sample_posterior(number)


# --- Lazy creation ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["get_posterior", "get_transform", "median"])
def test_methods_that_create_it(method: str) -> None:
    guide = AutoSelfNormalizingFlow(mixed)
    getattr(guide, method)()
    assert guide.transform is not None
    guide()


DTYPES: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "that of the model": (lambda guide: guide, torch.float64),
    "float": (lambda guide: guide.float(), torch.float32),
    "half": (lambda guide: guide.half(), torch.float16),
    "to(bfloat16)": (lambda guide: guide.to(torch.bfloat16), torch.bfloat16),
    "half().double()": (lambda guide: guide.half().double(), torch.float64),
    "float().cpu()": (lambda guide: guide.float().cpu(), torch.float32),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", DTYPES)
def test_dtype(change: str, when: str, conjugate: Conjugate) -> None:
    convert, dtype = DTYPES[change]
    guide = AutoSelfNormalizingFlow(conjugate)
    if when == "after":
        guide()
    convert(guide)
    assert guide()["z"].dtype == dtype
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    assert guide.sample_posterior(3)["z"].dtype == dtype
    assert guide.quantiles([0.1, 0.9])["z"].dtype == dtype
    pyro.clear_param_store()
    fresh = convert(AutoSelfNormalizingFlow(conjugate))
    fresh.load_state_dict(guide.state_dict())
    assert {parameter.dtype for parameter in fresh.parameters()} == {dtype}


@pytest.mark.parametrize("when", ["before", "after"])
def test_training_in_single_precision(when: str, conjugate: Conjugate) -> None:
    torch.set_default_dtype(torch.float32)
    model = Conjugate(DIM)
    model.matrix, model.data = model.matrix.float(), model.data.float()
    guide = AutoSelfNormalizingFlow(model)
    if when == "after":
        torch.set_default_dtype(torch.float64)
        guide()
        torch.set_default_dtype(torch.float32)
    guide.float()
    fit(guide, model, 3)
    assert guide()["z"].dtype == torch.float32


def test_device_before_and_after(device: torch.device) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1))

    for move_first in (False, True):
        pyro.clear_param_store()
        guide = AutoSelfNormalizingFlow(model)
        if not move_first:
            guide()
        guide.to(device)
        fit(guide, model, 2)
        for tensor in [*guide.parameters(), *guide.buffers()]:
            assert tensor.device.type == device.type


def test_mode_before_the_first_call(conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate).eval()
    guide()
    assert not any(module.training for module in guide.modules())


@pytest.mark.parametrize("where", ["model", "activation"])
def test_interrupted_creation(where: str, conjugate: Conjugate) -> None:
    # The first call raises; the second one is as if it were the first.
    calls = []

    def interrupt() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt

    def model() -> None:
        conjugate()
        if where == "model":
            interrupt()

    def activation(dim: int) -> Transform:
        if where == "activation":
            interrupt()
        return SmoothLeakyReLU()

    guide = AutoSelfNormalizingFlow(model, activation=activation)
    with pytest.raises(KeyboardInterrupt):
        guide()
    assert guide()["z"].shape == (DIM,)
    assert len(calls) == 2


# --- State: state_dict --------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_state_dict_into_a_fresh_guide(when: str, num_layers: int, conjugate: Conjugate) -> None:
    guide = trained(conjugate, num_layers=num_layers)
    buffer = io.BytesIO()
    torch.save(nn.ModuleDict({"guide": guide}).state_dict(), buffer)
    buffer.seek(0)
    expected = draws(guide)
    pyro.clear_param_store()
    fresh = AutoSelfNormalizingFlow(conjugate, num_layers)
    if when == "after":
        fresh()
    whole = nn.ModuleDict({"guide": fresh})
    whole.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert same(parameters_of(fresh), parameters_of(guide))
    assert torch.equal(fresh.log_gradient_length, guide.log_gradient_length)
    assert fresh.num_gradients == guide.num_gradients == 3
    fresh()  # creation draws numbers, too, and keeps what was loaded
    assert torch.equal(draws(fresh), expected)
    fit(fresh, conjugate, 2)


@pytest.mark.parametrize("method", ["sample_posterior", "quantiles", "median", "get_posterior"])
def test_use_between_loading_and_the_first_call(method: str, conjugate: Conjugate) -> None:
    fresh = AutoSelfNormalizingFlow(conjugate)
    fresh.load_state_dict(random(conjugate).state_dict())
    arguments = {"sample_posterior": [2], "quantiles": [[0.5]]}.get(method, [])
    getattr(fresh, method)(*arguments)


def test_state_dict_before_the_first_call(conjugate: Conjugate) -> None:
    # There is nothing in it but the average of gradients.
    guide = AutoSelfNormalizingFlow(conjugate)
    AutoSelfNormalizingFlow(conjugate).load_state_dict(guide.state_dict(), strict=True)
    assert set(guide.state_dict()) == {"log_gradient_length", "num_gradients"}


def test_state_of_another_model_or_number_of_layers() -> None:
    state = created(Recorder(4)).state_dict()
    fresh = AutoSelfNormalizingFlow(Recorder(3))
    fresh.load_state_dict(state)
    for _ in range(2):  # the second time, too
        with pytest.raises(RuntimeError, match=r"of latent dimension 4, as in the state .* got 3"):
            fresh()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AutoSelfNormalizingFlow(Recorder(4), 3).load_state_dict(state)


def test_training_resumed_repeats_exactly(conjugate: Conjugate) -> None:
    def steps(guide: Any, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            pyro.set_rng_seed(step)
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(conjugate, guide).backward()
            optimizer.step()

    guide = created(conjugate)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    steps(guide, optimizer, range(6))
    saved = copy.deepcopy((guide.state_dict(), optimizer.state_dict()))
    steps(guide, optimizer, range(6, 12))

    pyro.clear_param_store()
    other = AutoSelfNormalizingFlow(conjugate)
    other.load_state_dict(saved[0])
    optimizer = torch.optim.Adam(other.parameters(), lr=0.02)
    optimizer.load_state_dict(saved[1])
    other()  # registers the parameters, and draws
    steps(other, optimizer, range(6, 12))
    assert same(parameters_of(other), parameters_of(guide))
    assert torch.equal(other.log_gradient_length, guide.log_gradient_length)


# --- State: the parameter store -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["guide()", "sample_posterior", "training"])
@pytest.mark.parametrize("created_before", [False, True])
def test_parameter_store_into_a_fresh_guide(
    created_before: bool, first: str, conjugate: Conjugate, tmp_path: Path
) -> None:
    guide = trained(conjugate, 10)
    expected = parameters_of(guide)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    fresh = AutoSelfNormalizingFlow(conjugate)
    if created_before:
        fresh()
    pyro.get_param_store().load(str(tmp_path / "store"))
    if created_before or first == "guide()":
        fresh()
    if first == "sample_posterior":
        fresh.sample_posterior(2)
    if first == "training":
        fit(fresh, conjugate, 1, lr=0.0)
    assert same(parameters_of(fresh), expected)
    assert torch.equal(draws(fresh.eval()), draws(guide.eval()))
    # The store's and the guide's are the same, so that training trains.
    fit(fresh, conjugate, 1)
    stored = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert stored == {id(parameter) for parameter in fresh.parameters()}
    assert not same(parameters_of(fresh), expected)


def test_second_guide_of_the_same_name(conjugate: Conjugate) -> None:
    # As with Pyro's guides: it goes on from the values in the store, and training trains it.
    first = trained(conjugate)
    second = created(conjugate)
    before = parameters_of(second)
    assert same(before, parameters_of(first))
    fit(second, conjugate, 2)
    assert not same(parameters_of(second), before)
    with pytest.raises(RuntimeError, match=r"pyro\.clear_param_store\(\) first"):
        created(Recorder(3))
    pyro.clear_param_store()
    created(Recorder(3))


def test_local_parameters(conjugate: Conjugate) -> None:
    with pyro.settings.context(module_local_params=True):
        guide = AutoSelfNormalizingFlow(conjugate)
        guide()
        before = parameters_of(guide)
        loss = Trace_ELBO()(conjugate, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        other = AutoSelfNormalizingFlow(conjugate)
        other()
    assert not list(pyro.get_param_store())
    assert not any(map(torch.equal, before, parameters_of(guide)))
    assert not same(parameters_of(other), parameters_of(guide))


SUBPROCESS = """
import sys, torch, pyro
import pyro.distributions as dist
from pyro_snf import AutoSelfNormalizingFlow
torch.set_default_dtype(torch.float64)

def model():
    pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

store, state, pickled, out = sys.argv[1:]
by_state = AutoSelfNormalizingFlow(model)
by_state.load_state_dict(torch.load(state, weights_only=True))
by_state.sample_posterior(1)
pyro.clear_param_store()
by_pickle = torch.load(pickled, weights_only=False)
pyro.get_param_store().load(store)
by_store = AutoSelfNormalizingFlow(model)
result = []
for guide in (by_state, by_store, by_pickle):
    guide.sample_posterior(1)  # creation draws numbers, too
    pyro.set_rng_seed(5)
    result.append(guide.eval().sample_posterior(3)["z"])
torch.save(result, out)
"""


def test_in_another_process(conjugate: Conjugate, tmp_path: Path) -> None:
    # Without any state of this process.
    guide = trained(conjugate, 5).eval()
    files = [str(tmp_path / name) for name in ("store", "state", "pickled", "out")]
    pyro.get_param_store().save(files[0])
    torch.save(guide.state_dict(), files[1])
    torch.save(guide, files[2])
    subprocess.run([sys.executable, "-W", "ignore", "-c", SUBPROCESS, *files], check=True)
    for found in torch.load(files[3], weights_only=True):
        assert close(found, draws(guide))


# --- State: copies ------------------------------------------------------------------------------


COPIED = pytest.mark.parametrize("make_copy", COPIES, ids=lambda make: make.__name__)
STAGES: dict[str, Callable[[Any], Any]] = {
    "called": created,
    "trained": trained,
    "in eval()": lambda model: trained(model).eval(),
    "with a lambda": lambda model: trained(model, activation=lambda dim: SmoothLeakyReLU()),
    # Pyro's own, which keep tensors that have a graph.
    "with a spline": lambda model: trained(model, activation=dist.transforms.spline),
    "with a coupling": lambda model: trained(model, activation=dist.transforms.affine_coupling),
}


@pytest.mark.parametrize("stage", STAGES)
@COPIED
def test_copy_is_equal_and_independent(
    make_copy: Callable[[Any], Any], stage: str, conjugate: Conjugate
) -> None:
    guide = STAGES[stage](conjugate)
    before, expected = parameters_of(guide), draws(guide)
    other = make_copy(make_copy(guide))
    assert other.training == guide.training
    assert torch.equal(draws(other), expected)
    assert repr(other) == repr(guide)
    fit(guide, conjugate, 2)  # Pyro's own guides lose their model to the pickle
    assert guide.model is not None
    assert not same(parameters_of(guide), before)
    assert same(parameters_of(other), before)
    pyro.clear_param_store()  # else the copy would take the parameters of its name
    after = parameters_of(guide)
    fit(other, conjugate, 2)
    assert same(parameters_of(guide), after)
    assert not same(parameters_of(other), before)


def test_copies_before_the_first_call(conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate, activation=lambda dim: SmoothLeakyReLU())
    other = copy.deepcopy(guide)
    assert other.model is guide.model
    for each in (guide, other):
        pyro.clear_param_store()
        fit(each, conjugate, 2)
    guide = AutoSelfNormalizingFlow(conjugate)
    with pytest.raises(RuntimeError, match="models are left out of pickles: make it anew"):
        by_pickle(guide)()
    guide()


# --- Objectives: the gradient at the same samples -----------------------------------------------


def elbo(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q - log_p).mean()


def renyi(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of order 1/2."""
    return -2 * ((0.5 * (log_p - log_q)).logsumexp(0) - math.log(len(log_p)))


def tail_adaptive(log_p: Tensor, log_q: Tensor) -> Tensor:
    # Pyro's: rank[argsort], not the ranks themselves, and divided by their number once more.
    ranks = 1.0 + torch.argsort(log_p - log_q)
    weights = (ranks**-1.0).detach()
    return ((log_q - log_p) * weights).sum() / weights.sum() / len(weights)


VECTORIZED = {"num_particles": 5, "vectorize_particles": True}


class Objective:
    """One of Pyro's, and what it is by hand."""

    def __init__(
        self,
        make: Callable[[], Any],
        loss: Callable[[Tensor, Tensor], Tensor] = elbo,
        gradients: tuple[str, ...] = ("path", "total"),
        model: type[Recorder] = Recorder,
    ) -> None:
        self.make, self.loss, self.gradients, self.model = make, loss, gradients, model


OBJECTIVES = {
    "Trace_ELBO": Objective(Trace_ELBO),
    "Trace_ELBO loop": Objective(lambda: Trace_ELBO(num_particles=3)),
    "Trace_ELBO vectorized": Objective(lambda: Trace_ELBO(**VECTORIZED)),
    "TraceMeanField_ELBO": Objective(lambda: TraceMeanField_ELBO(**VECTORIZED)),
    "TraceGraph_ELBO": Objective(lambda: TraceGraph_ELBO(num_particles=3)),
    "TraceGraph_ELBO vectorized": Objective(lambda: TraceGraph_ELBO(**VECTORIZED)),
    "TraceEnum_ELBO": Objective(lambda: TraceEnum_ELBO(max_plate_nesting=0), model=Switch),
    "TraceEnum_ELBO loop": Objective(
        lambda: TraceEnum_ELBO(max_plate_nesting=0, num_particles=3), model=Switch
    ),
    "TraceEnum_ELBO vectorized": Objective(
        lambda: TraceEnum_ELBO(max_plate_nesting=0, **VECTORIZED), model=Switch
    ),
    "RenyiELBO": Objective(lambda: RenyiELBO(0.5, **VECTORIZED), renyi, ("total",)),
    "RenyiELBO loop": Objective(lambda: RenyiELBO(0.5, num_particles=3), renyi, ("total",)),
    "TraceTailAdaptive_ELBO": Objective(
        lambda: TraceTailAdaptive_ELBO(**VECTORIZED), tail_adaptive, ("total",)
    ),
}


def gradients_by_hand(
    guide: Any, model: Recorder, samples: Tensor, objective: Objective
) -> list[Tensor]:
    """From the samples' noise, through plain densities."""
    transform = guide.transform
    fixed = copy.deepcopy(transform).requires_grad_(False).eval()
    with torch.no_grad():
        noise = fixed.inv(samples.detach())
    transform.eval()
    z = transform(noise)
    scored_by = fixed if guide.gradient == "path" else transform
    log_q = dist.TransformedDistribution(guide.get_base_dist(), [scored_by]).log_prob(z.clone())
    loss = objective.loss(model.log_joint(z), log_q)
    return list(torch.autograd.grad(loss, list(transform.parameters())))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("gradient", ["path", "total"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name: str, gradient: str, num_layers: int) -> None:
    objective = OBJECTIVES[name]
    model = objective.model()
    visible = model.visible if isinstance(model, Switch) else model
    guide = random(visible, num_layers, gradient=gradient, clip=None)
    loss = objective.make()
    if gradient not in objective.gradients:
        with pytest.raises(RuntimeError, match="use gradient='total' instead"):
            loss.loss_and_grads(model, guide)
        return
    loss.loss_and_grads(model, guide)  # looks for plates at first, by another run
    guide.zero_grad()
    model.values.clear()
    loss.loss_and_grads(model, guide)
    found = [parameter.grad for parameter in guide.parameters()]
    samples = torch.cat([value.reshape(-1, DIM) for value in model.values])
    for one, other in zip(found, gradients_by_hand(guide, model, samples, objective), strict=True):
        assert (one - other).norm() < EXACT * max(1.0, other.norm().item())


@pytest.mark.parametrize("gradient", ["path", "total"])
def test_reweighted_wake_sleep(gradient: str, conjugate: Recorder) -> None:
    # Samples are fixed: Σ w ∇ log q(z) of the parameters themselves, with either gradient.
    guide = random(conjugate, gradient=gradient)
    loss = ReweightedWakeSleep(num_particles=5, vectorize_particles=True)
    loss.loss_and_grads(conjugate, guide)
    guide.zero_grad()
    conjugate.values.clear()
    loss.loss_and_grads(conjugate, guide)
    found = [parameter.grad.clone() for parameter in guide.parameters()]
    z = conjugate.values[-1].detach().reshape(-1, DIM)
    guide.eval()
    log_q = dist.TransformedDistribution(guide.get_base_dist(), [guide.transform]).log_prob(z)
    weights = (conjugate.log_joint(z) - log_q).detach().softmax(0)
    expected = torch.autograd.grad(-(weights * log_q).sum(), list(guide.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert close(one, other, 10 * EXACT)


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("gradient", ["path", "total"])
def test_jit(gradient: str, conjugate: Conjugate) -> None:
    # With either gradient the total one; in a guide that the jit is the first to call.
    guide = AutoSelfNormalizingFlow(conjugate, gradient=gradient)
    jit = JitTrace_ELBO(ignore_jit_warnings=True)
    jit.loss_and_grads(conjugate, guide)
    randomize(guide.transform)
    runs = []
    for loss in (jit, Trace_ELBO()):
        guide.gradient, guide.clip = "total", None
        guide.zero_grad()
        pyro.set_rng_seed(4)
        loss.loss_and_grads(conjugate, guide)
        runs.append([parameter.grad.clone() for parameter in guide.parameters()])
    for found, expected in zip(*runs, strict=True):
        assert close(found, expected)


def test_scale(conjugate: Conjugate) -> None:
    guide = random(conjugate, clip=None)
    gradients = []
    for factor in (1.0, 0.01):
        guide.zero_grad()
        pyro.set_rng_seed(1)
        Trace_ELBO().loss_and_grads(poutine.scale(conjugate, factor), poutine.scale(guide, factor))
        gradients.append([parameter.grad.clone() for parameter in guide.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert close(0.01 * one, other, 1e-7)


def test_mask(conjugate: Recorder) -> None:
    # A guide that is masked has no entropy: the gradient is the model's alone.
    guide = random(conjugate, clip=None)
    conjugate.values.clear()
    Trace_ELBO().loss_and_grads(conjugate, poutine.mask(guide, mask=False))
    found = guide.transform.parts[-1].bias.grad
    z = conjugate.values[-1].detach().requires_grad_()
    (expected,) = torch.autograd.grad(-conjugate.log_joint(z), z)
    assert close(found, expected)


def test_subsampled_plate() -> None:
    # The scaled likelihood of the rows that were drawn.
    data = torch.randn(20)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[index])

    guide = AutoSelfNormalizingFlow(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO())
    for _ in range(400):
        svi.step()
    z = guide.sample_posterior(4000)["z"]
    # The rate has fallen to a fiftieth: subsampling noise is no more than the tolerance.
    assert z.mean().item() == pytest.approx(data.sum().item() / 21, abs=0.1)
    assert z.std().item() == pytest.approx(21**-0.5, rel=0.3)


def test_beside_another_guide() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1), s), obs=torch.tensor(2.0))

    guide = AutoGuideList(model)
    ours = AutoSelfNormalizingFlow(poutine.block(model, hide=["s"]))
    guide.append(ours)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))
    fit(guide, model, 5)
    names = {name for name in pyro.get_param_store() if "transform" in name}
    assert len(names) == len(list(ours.parameters()))
    assert set(guide()) == {"z", "s"}
    assert set(guide.median()) == {"z", "s"}
    assert all(parameter.any() for parameter in ours.transform.parts[-1].parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    guide = random(mixed)
    predictive = Predictive(mixed, guide=guide, num_samples=6, parallel=parallel)
    for name, value in predictive().items():
        assert value.shape[0] == 6
        assert value.numel() == 6 * math.prod(SHAPES[name])
    samples = guide.sample_posterior(5)
    found = Predictive(mixed, posterior_samples=samples, return_sites=list(SHAPES))()
    for name, value in samples.items():
        assert torch.equal(found[name].reshape(value.shape), value), name


@pytest.mark.parametrize("gradient", ["path", "total"])
def test_neutra(gradient: str, conjugate: Conjugate) -> None:
    guide = created(conjugate, gradient=gradient, init_scale=0.5)
    guide.requires_grad_(False).eval()
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(
        NUTS(neutra.reparam(conjugate), max_tree_depth=4),
        num_samples=100,
        warmup_steps=40,
        disable_progbar=True,
    )
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])["z"]
    deviations = conjugate.covariance.diagonal().sqrt()
    # 100 samples: 0.1 deviations of the mean, four times.
    assert ((samples.mean(0) - conjugate.mean).abs() / deviations).max() < 0.4


def test_model_with_arguments() -> None:
    def model(data: Tensor, scale: float = 1.0) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=data)

    guide = AutoSelfNormalizingFlow(model)
    assert guide.sample_posterior(3, torch.ones(5), scale=2.0)["z"].shape == (3, 2)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for size in (5, 7):
        svi.step(torch.ones(size), scale=2.0)
    assert guide.quantiles([0.5], torch.ones(5))["z"].shape == (1, 2)


# --- Training to the posterior ------------------------------------------------------------------


GUIDES: dict[str, dict[str, Any]] = {
    "1 layer": {"num_layers": 1},
    "2 layers": {},
    "3 layers": {"num_layers": 3},
    "4 layers": {"num_layers": 4},
    # Its random start has a score so rough that a path gradient takes hundreds of particles.
    "spline": {"num_layers": 3, "activation": dist.transforms.spline, "gradient": "total"},
    "leaky relu": {"num_layers": 3, "activation": lambda dim: SmoothLeakyReLU(learnable=True)},
    "coupling": {"num_layers": 3, "activation": dist.transforms.affine_coupling},
    "exact": {"num_layers": 1, "log_det": "exact"},
    "learned": {"num_layers": 1, "log_det": "learned", "gradient": "total"},
    "total, not clipped": {"num_layers": 1, "gradient": "total", "clip": None},
}


@pytest.mark.parametrize("options", GUIDES)
def test_posterior_of_a_conjugate_model_is_recovered(options: str, conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate, init_scale=0.3, **GUIDES[options])
    steps = 250
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / steps)})
    loss = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(conjugate, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
    guide.eval()  # where densities are exact
    loss = Trace_ELBO(num_particles=400, vectorize_particles=True).loss(conjugate, guide)
    tolerance = NEARLY_TIGHT if options in ("spline", "leaky relu") else TIGHT
    assert -loss == pytest.approx(conjugate.log_evidence, abs=tolerance)
    if GUIDES[options].get("num_layers") == 1:
        layer = guide.transform.parts[0]
        tolerance = TRAINED if guide.gradient == "path" else 2 * TRAINED
        weight = layer.weight.detach()
        assert (layer.bias - conjugate.mean).abs().max() < tolerance
        assert (weight @ weight.mT - conjugate.covariance).abs().max() < tolerance


def test_gradient_at_the_posterior_is_zero(conjugate: Conjugate) -> None:
    guide = optimal(conjugate)
    Trace_ELBO(num_particles=3).loss_and_grads(conjugate, guide)
    assert all(parameter.grad.abs().max() < EXACT for parameter in guide.parameters())


# --- Clipping -----------------------------------------------------------------------------------


def passed(guide: Any, gradient: Tensor) -> Tensor:
    """The gradient in a sample as it reaches the flow, or the sum of those in several samples.

    That of the bias of the only layer.
    """
    guide.zero_grad()
    rows = pyro.plate("rows", len(gradient)) if gradient.dim() > 1 else nullcontext()
    with rows:
        z = guide()["z"]
    z.backward(gradient)
    return guide.transform.parts[0].bias.grad.clone()


def clipping(dim: int = DIM, clip: float | None = 10.0, seen: int = 20) -> Any:
    """A guide that has seen so many gradients of length about 1."""
    guide = created(Recorder(dim), 1, clip=clip)
    for _ in range(seen if clip is not None else 0):
        passed(guide, nn.functional.normalize(torch.randn(dim), dim=-1))
    return guide


def test_huge_gradient_is_cut() -> None:
    guide, gradient = clipping(), 1e8 * torch.randn(DIM)
    found = passed(guide, gradient)
    assert found.norm().item() == pytest.approx(10.0, rel=0.2)
    assert close(found / found.norm(), gradient / gradient.norm())
    assert close(passed(clipping(clip=None), gradient), gradient)


def test_each_row_is_cut_by_itself() -> None:
    # Each row has an entry of its own in the sum.
    gradient = torch.diag(torch.tensor([1.0, 0.5, 1e5, 2.0]))
    found = passed(clipping(), gradient)
    others = [0, 1, 3]
    assert torch.equal(found[others], gradient.diagonal()[others])
    assert 5 < found[2] < 20


@pytest.mark.parametrize("dim", [1, 100])
def test_gaussian_gradients_are_not_changed(dim: int) -> None:
    # In one dimension a typical length is 0.53 deviations: the limit is at 5.3.
    guide = clipping(dim)
    gradients = torch.randn(1000, dim) * dim**-0.5
    for some in gradients.split(10):
        assert close(passed(guide, some), some.sum(0))


def test_average_follows_the_gradients() -> None:
    guide = clipping()
    for _ in range(600):
        passed(guide, 1e-3 * nn.functional.normalize(torch.randn(DIM), dim=-1))
    # A memory of 100 gradients: e⁻⁶ of the distance is left.
    assert guide.log_gradient_length.exp().item() == pytest.approx(1e-3, rel=0.1)


def test_single_outlier_hardly_moves_the_average() -> None:
    guide = clipping(seen=100)
    before = guide.log_gradient_length.item()
    passed(guide, torch.full((DIM,), 1e30))
    assert guide.log_gradient_length.item() - before == pytest.approx(math.log(10) / 100, rel=0.1)


@pytest.mark.parametrize("seen", [0, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_surfaces_and_does_no_harm(bad: float, seen: int) -> None:
    guide = clipping(seen=seen)
    expected = guide.log_gradient_length.clone()
    gradient = torch.tensor([[0.0, bad, 0.0, 0.0], [0.5, 0.0, 0.5, 0.5]])
    found = passed(guide, gradient)
    assert not found[1].isfinite()
    assert torch.equal(found[[0, 2, 3]], torch.full((3,), 0.5))
    passed(guide, torch.full((DIM,), bad))
    # The average is as if the bad ones had not been.
    passed(guide, torch.full((DIM,), 0.5))
    assert guide.log_gradient_length.isfinite()
    assert (guide.log_gradient_length - expected).abs() < 0.1


@pytest.mark.parametrize("size", [1.0, 1e20])
def test_zeros_are_ignored_and_the_first_gradient_is_typical(size: float) -> None:
    guide = clipping(seen=0)
    zeros = torch.zeros(3, DIM)
    assert torch.equal(passed(guide, zeros), zeros[0])
    assert guide.num_gradients == 0
    gradient = torch.full((DIM,), size)
    assert torch.equal(passed(guide, gradient), gradient)
    assert guide.log_gradient_length.exp().item() == pytest.approx(2 * size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_clipping_after_a_change_of_dtype(dtype: torch.dtype) -> None:
    guide = clipping().to(dtype)
    gradient = torch.diag(torch.tensor([0.5, 1e4, 1.0, 1.0], dtype=dtype))
    found = passed(guide, gradient)
    assert found.dtype == dtype
    assert found[0] == 0.5
    assert found[1].item() == pytest.approx(10.0, rel=0.3)
    passed(guide.double(), gradient.double())


def test_heavy_tail_does_not_throw_training_off() -> None:
    # One sample in a hundred has a gradient ten million times as long.
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        is_bad = len(calls) % 100 == 99
        calls.append(None)
        pyro.factor("tail", 1e7 * z.sum() if is_bad else 0.0 * z.sum())

    lengths = {}
    for clip in (10.0, None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        calls: list[None] = []
        guide = AutoSelfNormalizingFlow(model, 1, clip=clip)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        for _ in range(99):  # the last one is the bad one: the model is called once more, at first
            svi.step()
        lengths[clip] = guide.transform.parts[0].bias.norm().item()
    assert lengths[10.0] < 1
    assert lengths[None] > 100


# --- Bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers, an integer >= 1; got 0"),
        ({"num_layers": 1.5}, "num_layers, an integer >= 1; got 1.5"),
        ({"activation": "relu"}, "activation, a factory of transforms; got 'relu'"),
        ({"gradient": "score"}, "gradient to be one of .*; got 'score'"),
        ({"clip": 1.0}, "clip > 1, or None; got 1.0"),
        ({"clip": math.inf}, "clip > 1, or None; got inf"),
        ({"clip": math.nan}, "clip > 1, or None; got nan"),
        ({"init_scale": 0.0}, "init_scale > 0; got 0.0"),
        ({"log_det": "learned"}, "gradient='total' with log_det='learned'; got 'path'"),
        ({"log_det": "none"}, "log_det to be .*; got 'none'"),
        ({"inverse": "none"}, "inverse, with log_det=Refined, .*; got 'none'"),
        ({"bias": False}, "options of the layers; got bias=False"),
        ({"dtype": torch.float32}, "options of the layers; got dtype=torch.float32"),
        ({"device": "cpu"}, "options of the layers; got device='cpu'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoSelfNormalizingFlow(mixed, **options)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'hidden'"):
        AutoSelfNormalizingFlow(mixed, hidden=3)


def test_model_without_latent_variables() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    guide = AutoSelfNormalizingFlow(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="AutoSelfNormalizingFlow found no latent variables"):
            guide()


def test_discrete_latent_variable_is_refused() -> None:
    @config_enumerate
    def model() -> None:
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"[Cc]ontinuous"):
        AutoSelfNormalizingFlow(model)()


def test_model_is_called_once_to_create_it() -> None:
    calls = []

    def model() -> None:
        calls.append(None)
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoSelfNormalizingFlow(model)
    assert not calls
    for _ in range(2):
        guide()
        guide.sample_posterior(2)
    assert len(calls) == 1


def test_repr_before_and_after() -> None:
    guide = AutoSelfNormalizingFlow(mixed, 3)
    assert "num_layers=3, gradient='path', clip=10.0" in repr(guide)
    guide()
    assert "SelfNormalizingLinear(" in repr(guide)
