"""AutoSelfNormalizingFlow: its start, its state, every objective of Pyro, clipping, bad options."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions import transforms
from pyro.infer import autoguide
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from pyro_snf import (
    ActNorm,
    AutoSelfNormalizingFlow,
    Compose,
    Learned,
    LowRankAutoregressive,
    Refined,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    low_rank_autoregressive,
    rational_quadratic_spline,
    self_normalizing_linear,
)
from pyro_snf.path_gradient import PathGradientDistribution
from tests.registry import COPIES, all_equal, by_pickle, is_close, randomize, standard_normal
from tests.test_pyro import Conjugate, error_of_neutra

# Float64, the same operations in another order.
EXACT = 1e-9
# Log-dets of Pyro's transforms have constants of 1e-6 to 1e-8 in them, or are truncated series.
FOREIGN = 1e-5
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
        trace = poutine.trace(super().__call__).get_trace()
        self.values.append(trace.nodes["z"]["value"])

    def log_joint(self, z: Tensor) -> Tensor:
        likelihood = dist.Normal(z @ self.matrix.mT, self.noise).to_event(1)
        return standard_normal(self.dim).log_prob(z) + likelihood.log_prob(self.data)


class Switch(Recorder):
    """With a discrete site, to be enumerated."""

    def __call__(self) -> None:
        z = pyro.sample("z", standard_normal(self.dim))
        self.values.append(z)
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z.sum(-1) + 2 * k, 0.5), obs=torch.tensor(1.0))

    def log_joint(self, z: Tensor) -> Tensor:
        terms = [
            math.log(weight) + dist.Normal(z.sum(-1) + 2 * k, 0.5).log_prob(torch.tensor(1.0))
            for k, weight in [(0, 0.7), (1, 0.3)]
        ]
        return standard_normal(self.dim).log_prob(z) + torch.stack(terms).logsumexp(0)


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
    svi = infer.SVI(model, guide, Adam({"lr": lr}), infer.Trace_ELBO())
    for _ in range(steps):
        svi.step()


def all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT) -> bool:
    return all(is_close(*pair, tolerance) for pair in zip(actual, expected, strict=True))


def parameters_of(guide: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in guide.parameters()]


def gradients_of(guide: Any, loss: Any, model: Any, program: Any = None) -> list[Tensor]:
    """With the samples of a given seed."""
    guide.zero_grad()
    pyro.set_rng_seed(4)
    loss.loss_and_grads(model, guide if program is None else program)
    return [parameter.grad.clone() for parameter in guide.parameters()]


def draws(guide: Any, seed: int = 5) -> Tensor:
    """Of its only site, from a given seed."""
    pyro.set_rng_seed(seed)
    return guide.sample_posterior(3)["z"]


# --- The start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_it_starts_as_a_mean_field_gaussian(num_layers: int) -> None:
    guide = created(mixed, num_layers, init_scale=0.3)
    x = torch.randn(guide.latent_dim)
    assert is_close(guide.transform(x), guide.transform(torch.zeros_like(x)) + 0.3 * x)
    jacobian = torch.autograd.functional.jacobian(guide.transform, x)
    assert is_close(jacobian, 0.3 * torch.eye(len(x)))
    # Dense layers and activations alternate, and the last one is dense.
    kinds = [type(part) for part in guide.transform.parts]
    assert kinds == ([SelfNormalizingLinear, LowRankAutoregressive] * 3)[:num_layers][::-1]


@pytest.mark.parametrize(
    ("init_loc_fn", "expected"),
    [
        (autoguide.init_to_mean, math.e),
        (autoguide.init_to_value(values={"scale": torch.tensor(7.0)}), 7.0),
    ],
    ids=["mean", "value"],
)
def test_it_starts_where_the_init_function_says(init_loc_fn: Any, expected: float) -> None:
    guide = created(mixed, init_loc_fn=init_loc_fn, init_scale=1e-9)
    assert guide.sample_posterior(1)["scale"].item() == pytest.approx(expected, abs=1e-6)


def test_it_starts_where_pyros_guides_start() -> None:
    # The median is drawn: from the same seed.
    starts = []
    for kind, options in (
        (AutoSelfNormalizingFlow, {"init_scale": 1e-12}),
        (autoguide.AutoNormal, {}),
    ):
        pyro.set_rng_seed(0)
        guide = kind(mixed, init_loc_fn=autoguide.init_to_median(num_samples=3), **options)
        guide()
        starts.append(guide.median())
    assert all(is_close(starts[0][name], value) for name, value in starts[1].items())


def test_options_reach_every_dense_layer() -> None:
    options = {"log_det": Refined(tolerance=0.01, seed=3), "inverse": "exact"}
    guide = AutoSelfNormalizingFlow(mixed, 3, **options)
    assert "num_layers=3, gradient=None, clip=10.0" in repr(guide)
    guide()
    assert "num_layers=3, gradient='path', clip=10.0" in repr(guide)
    assert "SelfNormalizingLinear(" in repr(guide)
    first, _, last = guide.transform.parts
    assert [layer.log_det.tolerance for layer in (first, last)] == [0.01, 0.01]
    assert first.inverse == last.inverse == "exact"
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


def test_samples_and_density_of_the_guide_are_those_of_its_posterior() -> None:
    guide = random(mixed).eval()
    pyro.set_rng_seed(3)
    samples = guide.sample_posterior(1)
    pyro.set_rng_seed(3)
    trace = poutine.trace(guide).get_trace()
    latent = trace.nodes["_AutoSelfNormalizingFlow_latent"]["value"]
    expected = guide.get_posterior().log_prob(latent)
    # On constrained spaces: the log-dets of all sites' supports.
    for name, (site, value) in {
        site["name"]: (site, value) for site, value in guide._unpack_latent(latent)
    }.items():
        support = biject_to(site["fn"].support)
        constrained = trace.nodes[name]["value"]
        assert is_close(samples[name][0], constrained), name
        expected = expected - support.log_abs_det_jacobian(value, constrained).sum()
    assert is_close(trace.log_prob_sum(), expected)


def test_posterior_is_a_distribution(conjugate: Conjugate) -> None:
    guide = random(conjugate)
    assert isinstance(guide.get_posterior(), PathGradientDistribution)
    assert guide.get_transform() is guide.transform
    base = guide.get_base_dist()
    assert guide.get_posterior().event_shape == base.event_shape == (DIM,)
    z = torch.randn(3, DIM)
    assert is_close(base.log_prob(z), -0.5 * z.square().sum(-1) - DIM / 2 * math.log(2 * math.pi))
    pyro.clear_param_store()
    guide = created(conjugate, gradient="total")
    assert type(guide.get_posterior()) is dist.TransformedDistribution


def test_quantiles_of_a_gaussian_are_exact(conjugate: Conjugate) -> None:
    guide = optimal(conjugate)
    levels = [0.1, 0.5, 0.9]
    scale = conjugate.covariance.diagonal().sqrt()
    expected = dist.Normal(conjugate.mean, scale).icdf(torch.tensor(levels).unsqueeze(-1))
    assert is_close(guide.quantiles(levels)["z"], expected)
    assert is_close(guide.median()["z"], conjugate.mean)


def test_quantiles_of_a_flow_are_those_of_its_draws() -> None:
    guide = random(mixed)
    levels = torch.tensor([0.1, 0.5, 0.9])
    draws = torch.cat([guide.sample_posterior(4000)["table"] for _ in range(10)])
    error = (guide.quantiles(levels)["table"] - draws.quantile(levels, dim=0)) / draws.std(0)
    assert error.abs().max() < SAMPLED


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_median_of_a_fresh_guide_is_its_start(num_layers: int) -> None:
    start = {"scale": torch.tensor(7.0), "share": torch.tensor(0.3)}
    init = autoguide.init_to_value(values=start)
    medians = created(mixed, num_layers, init_loc_fn=init).median()
    assert all(is_close(medians[name], value) for name, value in start.items())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_quantile_has_no_leading_dimension(num_layers: int) -> None:
    guide = random(mixed, num_layers)
    for level in (0.3, torch.tensor(0.3)):
        pyro.set_rng_seed(0)
        one = guide.quantiles(level)
        pyro.set_rng_seed(0)
        several = guide.quantiles([0.3])
        assert {name: value.shape for name, value in one.items()} == SHAPES
        assert all(is_close(one[name], values[0]) for name, values in several.items())


def test_quantiles_and_medians_are_shaped_as_pyros_and_ordered() -> None:
    def shapes(found: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in found.items()}

    levels, ours, theirs = (
        [0.0, 0.1, 0.5, 0.9, 1.0],
        random(mixed),
        autoguide.AutoMultivariateNormal(mixed),
    )
    theirs()
    found, expected = ours.quantiles(levels), shapes(theirs.quantiles(levels))
    assert shapes(found) == shapes(ours.quantiles(torch.tensor(levels))) == expected
    assert shapes(ours.median()) == shapes(theirs.median())
    for name in ("scale", "share", "bounded", "cells", "table"):
        assert (found[name].diff(dim=0) >= 0).all(), name


def test_quantiles_of_many_latents() -> None:
    # torch's quantile takes so many numbers at once: they go by 1,024 latent variables.
    def wide() -> None:
        pyro.sample("z", standard_normal(1030))

    guide = created(wide, 1, log_det="exact")
    guide.num_layers = 2  # so that they are those of draws
    found = guide.quantiles([0.1, 0.5])["z"]
    start = guide.transform(torch.zeros(1030))
    expected = start + 0.1 * dist.Normal(0.0, 1.0).icdf(torch.tensor([[0.1], [0.5]]))
    assert ((found - expected) / 0.1).abs().max() < SAMPLED


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        *[
            ("quantiles", x, r"quantiles in \[0, 1\], a number or a list; got")
            for x in (-0.1, [-0.1], [1.1], [math.nan], [[0.5]])
        ],
        *[("sample_posterior", x, f"an integer >= 1; got {x!r}") for x in (0, -1, 2.0, None)],
    ],
    ids=str,
)
def test_bad_arguments(method: str, argument: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(created(mixed), method)(argument)


# --- Lazy creation ------------------------------------------------------------------------------


ARGUMENTS: dict[str, list[Any]] = {"sample_posterior": [2], "quantiles": [[0.5]]}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("method", [*ARGUMENTS, "median", "get_posterior", "get_transform"])
def test_methods_that_create_it(method: str, loaded: bool, conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate).eval()
    if loaded:
        guide.load_state_dict(random(conjugate).state_dict())
    getattr(guide, method)(*ARGUMENTS.get(method, []))
    assert guide.transform is not None
    assert not any(module.training for module in guide.modules())
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
def test_training_in_single_precision(when: str) -> None:
    model = Conjugate(DIM)
    guide = AutoSelfNormalizingFlow(model)
    if when == "after":
        guide()
    torch.set_default_dtype(torch.float32)
    model.matrix, model.data = model.matrix.float(), model.data.float()
    fit(guide.float(), model, 3)
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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_first_call_without_gradients(context: Any, conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate)
    with context():
        assert not guide()["z"].requires_grad
        guide.median()
    fit(guide, conjugate, 2)


@pytest.mark.parametrize("where", ["model", "activation"])
def test_interrupted_creation(where: str, conjugate: Conjugate) -> None:
    # The first call raises; the second one is as if it were the first.
    calls = []

    def interrupt(here: str) -> None:
        calls.extend([None] * (here == where))
        if len(calls) == 1 and here == where:
            raise KeyboardInterrupt

    def model() -> None:
        conjugate()
        interrupt("model")

    def activation(dim: int) -> Transform:
        interrupt("activation")
        return SmoothLeakyReLU()

    guide = AutoSelfNormalizingFlow(model, activation=activation)
    with pytest.raises(KeyboardInterrupt):
        guide()
    assert guide()["z"].shape == (DIM,)
    assert len(calls) == 2


# --- State --------------------------------------------------------------------------------------


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
    assert all_equal(parameters_of(fresh), parameters_of(guide))
    assert torch.equal(fresh.log_gradient_length, guide.log_gradient_length)
    assert fresh.num_gradients == guide.num_gradients == 3
    fresh()  # creation draws numbers, too, and keeps what was loaded
    assert torch.equal(draws(fresh), expected)
    fit(fresh, conjugate, 2)


def test_state_dict_that_does_not_fit() -> None:
    # Before the first call, there is nothing in it but the average of gradients.
    fresh = AutoSelfNormalizingFlow(Recorder(3))
    empty = fresh.state_dict()
    fresh.load_state_dict(empty, strict=True)
    assert set(empty) == {"log_gradient_length", "num_gradients"}
    state = created(Recorder(4)).state_dict()
    fresh.load_state_dict(state)
    for _ in range(2):  # the second time, too
        with pytest.raises(RuntimeError, match=r"of latent dimension 4, as in the state .* got 3"):
            fresh()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AutoSelfNormalizingFlow(Recorder(4), 3).load_state_dict(state)


def adam(guide: Any, loss: Any, state: Any = None, seeds: range = range(3)) -> Any:
    """The state of Adam after a step for each seed."""
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for seed in seeds:
        pyro.set_rng_seed(seed)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return optimizer.state_dict()


def test_training_resumed_repeats_exactly(conjugate: Conjugate) -> None:
    def train(guide: Any, state: Any, seeds: range) -> Any:
        loss = partial(infer.Trace_ELBO().differentiable_loss, conjugate, guide)
        state = adam(guide, loss, state, seeds)
        return copy.deepcopy((guide.state_dict(), state))

    guide = created(conjugate)
    state, state_of_adam = train(guide, None, range(6))
    train(guide, state_of_adam, range(6, 12))
    pyro.clear_param_store()
    other = AutoSelfNormalizingFlow(conjugate)
    other.load_state_dict(state)
    other()  # registers the parameters, and draws
    train(other, state_of_adam, range(6, 12))
    assert all_equal(parameters_of(other), parameters_of(guide))
    assert torch.equal(other.log_gradient_length, guide.log_gradient_length)


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
    assert all_equal(parameters_of(fresh), expected)
    assert torch.equal(draws(fresh.eval()), draws(guide.eval()))
    # The store's and the guide's are the same, so that training trains.
    fit(fresh, conjugate, 1)
    stored = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert stored == {id(parameter) for parameter in fresh.parameters()}
    assert not all_equal(parameters_of(fresh), expected)


def test_second_guide_of_the_same_name(conjugate: Conjugate) -> None:
    # As with Pyro's guides: it goes on from the values in the store, and training trains it.
    first = trained(conjugate)
    second = created(conjugate)
    before = parameters_of(second)
    assert all_equal(before, parameters_of(first))
    fit(second, conjugate, 2)
    assert not all_equal(parameters_of(second), before)
    with pytest.raises(RuntimeError, match=r"pyro\.clear_param_store\(\) first"):
        created(Recorder(3))
    pyro.clear_param_store()
    created(Recorder(3))


def test_local_parameters(conjugate: Conjugate) -> None:
    with pyro.settings.context(module_local_params=True):
        guide = created(conjugate)
        before = parameters_of(guide)
        adam(guide, infer.Trace_ELBO()(conjugate, guide))
        other = created(conjugate)
    assert not list(pyro.get_param_store())
    assert not any(map(torch.equal, before, parameters_of(guide)))
    assert not all_equal(parameters_of(other), parameters_of(guide))


SUBPROCESS = """
import sys, torch, pyro
import pyro.distributions as dist
from pyro_snf import AutoSelfNormalizingFlow
torch.set_default_dtype(torch.float64)

def model():
    pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

store, state, pickled, out = sys.argv[1:]
by_state, by_store = AutoSelfNormalizingFlow(model), AutoSelfNormalizingFlow(model)
by_state.load_state_dict(torch.load(state, weights_only=True))
by_state.sample_posterior(1)
pyro.clear_param_store()
by_pickle = torch.load(pickled, weights_only=False)
pyro.get_param_store().load(store)
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
        assert is_close(found, draws(guide))


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
@pytest.mark.parametrize("make_copy", COPIES, ids=lambda make: make.__name__)
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
    assert not all_equal(parameters_of(guide), before)
    assert all_equal(parameters_of(other), before)
    pyro.clear_param_store()  # else the copy would take the parameters of its name
    after = parameters_of(guide)
    fit(other, conjugate, 2)
    assert all_equal(parameters_of(guide), after)
    assert not all_equal(parameters_of(other), before)


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


def wake(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of samples that are fixed."""
    return -((log_p - log_q).detach().softmax(0) * log_q).sum()


VECTORIZED = {"num_particles": 5, "vectorize_particles": True}
LOOP = {"num_particles": 3}
OBJECTIVES: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[..., Tensor]]] = {
    "Trace_ELBO": (infer.Trace_ELBO, {}, elbo),
    "Trace_ELBO loop": (infer.Trace_ELBO, LOOP, elbo),
    "Trace_ELBO vectorized": (infer.Trace_ELBO, VECTORIZED, elbo),
    "TraceMeanField_ELBO": (infer.TraceMeanField_ELBO, VECTORIZED, elbo),
    "TraceGraph_ELBO": (infer.TraceGraph_ELBO, LOOP, elbo),
    "TraceGraph_ELBO vectorized": (infer.TraceGraph_ELBO, VECTORIZED, elbo),
    "TraceEnum_ELBO": (infer.TraceEnum_ELBO, {"max_plate_nesting": 0}, elbo),
    "TraceEnum_ELBO loop": (infer.TraceEnum_ELBO, {"max_plate_nesting": 0, **LOOP}, elbo),
    "TraceEnum_ELBO vectorized": (
        infer.TraceEnum_ELBO,
        {"max_plate_nesting": 0, **VECTORIZED},
        elbo,
    ),
    "RenyiELBO": (partial(infer.RenyiELBO, 0.5), VECTORIZED, renyi),
    "RenyiELBO loop": (partial(infer.RenyiELBO, 0.5), LOOP, renyi),
    "TraceTailAdaptive_ELBO": (infer.TraceTailAdaptive_ELBO, VECTORIZED, tail_adaptive),
    "ReweightedWakeSleep": (infer.ReweightedWakeSleep, VECTORIZED, wake),
}


def gradients_by_hand(
    guide: Any, model: Recorder, samples: Tensor, loss: Callable[..., Tensor]
) -> list[Tensor]:
    """From the samples' noise, through plain densities."""
    transform = guide.transform.eval()
    fixed = copy.deepcopy(transform).requires_grad_(False)
    z = samples.detach()
    if loss is not wake:
        with torch.no_grad():
            noise = fixed.inv(z)
        z = transform(noise)
    scored_by = fixed if guide.gradient == "path" and loss is not wake else transform
    log_q = dist.TransformedDistribution(guide.get_base_dist(), [scored_by]).log_prob(z.clone())
    return list(torch.autograd.grad(loss(model.log_joint(z), log_q), list(transform.parameters())))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("gradient", ["path", "total"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name: str, gradient: str, num_layers: int) -> None:
    make, options, by_hand = OBJECTIVES[name]
    model = Switch() if make is infer.TraceEnum_ELBO else Recorder()
    guide = random(poutine.block(model, hide=["k"]), num_layers, gradient=gradient, clip=None)
    loss = make(**options)
    if gradient == "path" and by_hand in (renyi, tail_adaptive):
        with pytest.raises(RuntimeError, match="use gradient='total' instead"):
            loss.loss_and_grads(model, guide)
        return
    loss.loss_and_grads(model, guide)  # looks for plates at first, by another run
    model.values.clear()
    found = gradients_of(guide, loss, model)
    values = model.values[-1:] if by_hand is wake else model.values
    samples = torch.cat([value.reshape(-1, DIM) for value in values])
    for one, other in zip(found, gradients_by_hand(guide, model, samples, by_hand), strict=True):
        assert (one - other).norm() < EXACT * max(1.0, other.norm().item())


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("gradient", ["path", "total"])
def test_jit(gradient: str, conjugate: Conjugate) -> None:
    # With either gradient the total one; in a guide that the jit is the first to call.
    guide = AutoSelfNormalizingFlow(conjugate, gradient=gradient)
    jit = infer.JitTrace_ELBO(ignore_jit_warnings=True)
    jit.loss_and_grads(conjugate, guide)
    randomize(guide.transform)
    guide.gradient, guide.clip = "total", None
    found, expected = (gradients_of(guide, loss, conjugate) for loss in (jit, infer.Trace_ELBO()))
    assert all_close(found, expected)


def test_scale(conjugate: Conjugate) -> None:
    guide = random(conjugate, clip=None)
    gradients = []
    for factor in (1.0, 0.01):
        scaled = [poutine.scale(each, factor) for each in (conjugate, guide)]
        gradients.append(gradients_of(guide, infer.Trace_ELBO(), *scaled))
    one, other = gradients
    assert all_close([0.01 * gradient for gradient in one], other, 1e-7)


def test_mask(conjugate: Recorder) -> None:
    # A guide that is masked has no entropy: the gradient is the model's alone.
    guide = random(conjugate, clip=None)
    conjugate.values.clear()
    infer.Trace_ELBO().loss_and_grads(conjugate, poutine.mask(guide, mask=False))
    found = guide.transform.parts[-1].bias.grad
    z = conjugate.values[-1].detach().requires_grad_()
    (expected,) = torch.autograd.grad(-conjugate.log_joint(z), z)
    assert is_close(found, expected)


def test_subsampled_plate() -> None:
    # The scaled likelihood of the rows that were drawn.
    data = torch.randn(20)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[index])

    guide = AutoSelfNormalizingFlow(model)
    svi = infer.SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), infer.Trace_ELBO())
    for _ in range(400):
        svi.step()
    z = guide.sample_posterior(4000)["z"]
    # The rate has fallen to a fiftieth: subsampling noise is no more than the tolerance.
    assert z.mean().item() == pytest.approx(data.sum().item() / 21, abs=0.1)
    assert z.std().item() == pytest.approx(21**-0.5, rel=0.3)


def test_beside_another_guide() -> None:
    def model() -> None:
        z = pyro.sample("z", standard_normal(3))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1), s), obs=torch.tensor(2.0))

    guide = autoguide.AutoGuideList(model)
    ours = AutoSelfNormalizingFlow(poutine.block(model, hide=["s"]))
    guide.append(ours)
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["z"])))
    fit(guide, model, 5)
    names = {name for name in pyro.get_param_store() if "transform" in name}
    assert len(names) == len(list(ours.parameters()))
    assert set(guide()) == {"z", "s"}
    assert set(guide.median()) == {"z", "s"}
    assert all(parameter.any() for parameter in ours.transform.parts[-1].parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    guide = random(mixed)
    predictive = infer.Predictive(mixed, guide=guide, num_samples=6, parallel=parallel)
    for name, value in predictive().items():
        assert value.shape[0] == 6
        assert value.numel() == 6 * math.prod(SHAPES[name])
    samples = guide.sample_posterior(5)
    found = infer.Predictive(mixed, posterior_samples=samples, return_sites=list(SHAPES))()
    for name, value in samples.items():
        assert torch.equal(found[name].reshape(value.shape), value), name


def test_neutra(conjugate: Conjugate) -> None:
    guide = created(conjugate, init_scale=0.5).requires_grad_(False).eval()
    # 100 samples: 0.1 deviations of the mean, four times.
    assert error_of_neutra(conjugate, guide, num_samples=100, warmup_steps=40) < 0.4


def test_model_with_arguments() -> None:
    def model(data: Tensor, scale: float = 1.0) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=data)

    guide = AutoSelfNormalizingFlow(model)
    assert guide.sample_posterior(3, torch.ones(5), scale=2.0)["z"].shape == (3, 2)
    svi = infer.SVI(model, guide, Adam({"lr": 0.01}), infer.Trace_ELBO())
    for size in (5, 7):
        svi.step(torch.ones(size), scale=2.0)
    assert guide.quantiles([0.5], torch.ones(5))["z"].shape == (1, 2)


# --- Activations --------------------------------------------------------------------------------


def elementwise(transform: Transform) -> Callable[[int], Transform]:
    return lambda dim: transform


#: All factories of Pyro for vectors, and torch's transforms that are useful between dense layers.
FACTORIES: dict[str, Callable[[int], Any]] = {
    "affine_autoregressive": transforms.affine_autoregressive,
    "affine_coupling": transforms.affine_coupling,
    "block_autoregressive": transforms.block_autoregressive,
    "elu": lambda dim: transforms.elu(),
    "householder": transforms.householder,
    "leaky_relu": lambda dim: transforms.leaky_relu(),
    "matrix_exponential": transforms.matrix_exponential,
    "neural_autoregressive": transforms.neural_autoregressive,
    "permute": transforms.permute,
    "planar": transforms.planar,
    "polynomial": transforms.polynomial,
    "radial": transforms.radial,
    "spline": transforms.spline,
    "spline, quadratic": partial(transforms.spline, order="quadratic"),
    "spline_autoregressive": transforms.spline_autoregressive,
    "spline_coupling": transforms.spline_coupling,
    "iterated": lambda dim: transforms.iterated(2, transforms.planar, dim),
    "tanh": elementwise(transforms.TanhTransform()),
    "sigmoid": elementwise(transforms.SigmoidTransform()),
    "softplus": elementwise(transforms.SoftplusTransform()),
    "exp": elementwise(transforms.ExpTransform()),
}
#: Those of this library, for which the path derivative is right.
OWN_FACTORIES: dict[str, Callable[[int], Transform]] = {
    "low_rank_autoregressive": low_rank_autoregressive,
    "its inverse": lambda dim: low_rank_autoregressive(dim).inv,
    "self_normalizing_linear": self_normalizing_linear,
    "smooth_leaky_relu": lambda dim: SmoothLeakyReLU(),
    "rational_quadratic_spline": rational_quadratic_spline,
    "a stack": lambda dim: Compose([low_rank_autoregressive(dim), SmoothLeakyReLU()]),
}
REFUSED = {"batchnorm", "sylvester"}
NOT_FOR_VECTORS = {"generalized_channel_permute", "identity_transform"}


def test_all_factories_of_pyro_are_here() -> None:
    names = {name for name in transforms.__all__ if name.islower()}
    names = {name for name in names if not name.startswith("conditional_")}
    assert names - REFUSED - NOT_FOR_VECTORS <= set(FACTORIES)


@pytest.mark.parametrize("factory", FACTORIES)
def test_gradient_with_an_activation_of_pyro(factory: str) -> None:
    # The oracle: log q(T(z)) = log N(z) − log|det J(z)|, the Jacobian being that of autodiff.
    model = Recorder(3)
    guide = created(model, 3, activation=FACTORIES[factory], log_det="exact")
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert guide.gradient == "total"
    flow, base = guide.transform, guide.get_base_dist()
    parameters = list(flow.parameters())
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = infer.Trace_ELBO().differentiable_loss(model, guide)
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        flow.clear_cache()
        pyro.set_rng_seed(seed)
        z = base.sample()
        jacobian = torch.autograd.functional.jacobian(flow, z, create_graph=True)
        log_q = base.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
        flow.clear_cache()
        expected_loss = log_q - model.log_joint(flow(z))
        expected = torch.autograd.grad(expected_loss, parameters, materialize_grads=True)
        assert is_close(loss, expected_loss, FOREIGN)
        assert all_close(list(found), list(expected), FOREIGN)


@pytest.mark.parametrize("factory", OWN_FACTORIES)
def test_path_is_the_default_where_it_is_right(factory: str, conjugate: Conjugate) -> None:
    guide = created(conjugate, 3, activation=OWN_FACTORIES[factory])
    assert (guide.gradient, guide.clip) == ("path", 10.0)


@pytest.mark.parametrize("log_det", ["learned", Learned()], ids=["name", "object"])
def test_total_is_the_default_with_a_method_that_has_parameters(
    log_det: Any, conjugate: Conjugate
) -> None:
    guide = created(conjugate, 1, log_det=log_det)
    assert (guide.gradient, guide.clip) == ("total", None)


@pytest.mark.parametrize(
    ("factory", "part"),
    [("leaky_relu", "LeakyReLU"), ("planar", "Planar"), ("spline", "Spline"), ("iterated", "Plan")],
)
def test_path_is_refused_where_it_may_be_biased(factory: str, part: str) -> None:
    options: dict[str, Any] = {"activation": FACTORIES[factory], "gradient": "path"}
    with pytest.raises(ValueError, match=rf"expected gradient='total' with .*{part}.*; got 'path'"):
        created(Recorder(), **options)
    options["gradient"] = "total"  # the remedy that the message names
    fit(created(Recorder(), **options), Recorder(), 2)


def test_path_is_refused_with_an_activation_that_it_would_leave_untrained() -> None:
    activation = partial(self_normalizing_linear, log_det="learned")
    with pytest.raises(ValueError, match="gradient='total' if a log_det has parameters; got"):
        created(Recorder(), activation=activation, gradient="path")
    assert created(Recorder(), activation=activation).gradient == "total"


def test_activation_can_declare_its_log_det_to_be_continuous(conjugate: Conjugate) -> None:
    def activation(dim: int) -> Transform:
        coupling = transforms.affine_coupling(dim)
        coupling.has_continuous_log_det = True
        return coupling

    assert trained(conjugate, activation=activation).gradient == "path"


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        *[
            (lambda dim, name=name: getattr(transforms, name)(dim), "whose log-det is that of its")
            for name in sorted(REFUSED)
        ],
        (partial(transforms.iterated, 2, transforms.batchnorm), "log-det is that of its map; got"),
        *[
            (elementwise(transform), r"a bijective transform of vectors of length 4; got")
            for transform in (
                transforms.AbsTransform(),  # not bijective
                transforms.StickBreakingTransform(),  # to 5 numbers
                transforms.PowerTransform(torch.tensor(3.0)),  # of positive numbers
                transforms.SigmoidTransform().inv,  # of the unit interval
                ActNorm(4),  # of images
                "relu",
            )
        ],
    ],
)
def test_bad_activations(activation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        created(Recorder(), activation=activation)


# --- Models that have no joint posterior, or are made for other guides --------------------------


def test_latents_in_a_subsampled_plate_are_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 3, dim=-2), pyro.plate("data", 20, subsample_size=5, dim=-1):
            z = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3, 5))

    guide = AutoSelfNormalizingFlow(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'local' in plate 'data', 5 of 20: use AutoNormal"):
            guide()


def test_guide_list_for_a_subsampled_plate() -> None:
    # What the error recommends.
    def model() -> None:
        z = pyro.sample("global", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5):
            local = pyro.sample("local", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(local, 1.0), obs=torch.zeros(5))

    guide = autoguide.AutoGuideList(model)
    guide.append(AutoSelfNormalizingFlow(poutine.block(model, hide=["local"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["global"])))
    fit(guide, model, 3)
    assert guide()["local"].shape == (5,)


POSITIVE, REAL = constraints.positive, constraints.real


@pytest.mark.parametrize(
    "prior",
    [
        standard_normal(DIM).mask(False),
        dist.LogNormal(torch.zeros(DIM), 1.0).mask(torch.tensor(False)).to_event(1),
        dist.ImproperUniform(REAL, (), (DIM,)),
        dist.ImproperUniform(POSITIVE, (DIM,), ()).to_event(1),
    ],
    ids=["mask(False)", "a tensor", "ImproperUniform", "on positive numbers"],
)
def test_latents_without_prior_and_data_are_refused(prior: Any) -> None:
    def model() -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("alone", prior)

    guide = AutoSelfNormalizingFlow(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a prior or data for 'alone'; got neither, .*hide="):
            guide()


@pytest.mark.parametrize("mask", [False, torch.tensor(False)])
def test_masked_context_around_latents_and_data_is_refused(mask: Any, conjugate: Recorder) -> None:
    with pytest.raises(ValueError, match="expected a prior or data for 'z'; got neither"):
        created(poutine.mask(conjugate, mask=mask))


def test_masked_latents_on_a_bounded_space_are_uniform() -> None:
    def model() -> None:
        pyro.sample("share", dist.Beta(2.0, 3.0).mask(False))

    guide = AutoSelfNormalizingFlow(model, 1)
    loss = infer.Trace_ELBO(32, vectorize_particles=True)
    svi = infer.SVI(model, guide, Adam({"lr": 0.03}), loss)
    for _ in range(200):
        svi.step()
    # Of a uniform distribution: the best Gaussian of the logit is close to it.
    assert guide.quantiles([0.25, 0.75])["share"].tolist() == pytest.approx([0.25, 0.75], abs=0.05)


@pytest.mark.parametrize("start", [None, 0.0])
def test_flat_prior_that_the_data_bound(start: float | None) -> None:
    # At the start 0, the gradient of this model is 0 by symmetry.
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        pyro.sample("y", dist.Normal(z**2, 1.0).to_event(1), obs=torch.ones(2))

    values = {} if start is None else {"z": torch.full((2,), start)}
    created(model, init_loc_fn=autoguide.init_to_value(values=values))


@pytest.mark.parametrize(
    ("support", "batch_shape", "event_shape", "expected"),
    [
        (constraints.real, (), (), 0.0),
        (constraints.positive, (2,), (), [1.0, 1.0]),
        (constraints.unit_interval, (2,), (), [0.5, 0.5]),
        (constraints.real_vector, (2,), (3,), [[0.0] * 3] * 2),
        (constraints.simplex, (), (3,), [1 / 3] * 3),
        (constraints.corr_cholesky, (), (2, 2), [[1.0, 0.0], [0.0, 1.0]]),
    ],
    ids=str,
)
def test_flat_priors_start_at_zero(
    support: Any, batch_shape: Any, event_shape: Any, expected: Any
) -> None:
    prior = dist.ImproperUniform(support, batch_shape, event_shape).to_event(len(batch_shape))

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z.flatten(), 1.0).to_event(1), obs=torch.zeros(z.numel()))

    assert is_close(created(model).median()["z"], torch.tensor(expected))


def test_init_function_is_preferred_to_the_start_of_flat_priors() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    init = autoguide.init_to_value(values={"z": torch.tensor(3.0)})
    assert created(model, init_loc_fn=init).median()["z"].item() == pytest.approx(3.0)


def missing_values() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mask = torch.tensor([True, False, True, False])
    with pyro.plate("data", 4):
        data = torch.tensor([1.0, math.nan, 3.0, math.nan])
        data = torch.where(mask, data, 0.0)
        pyro.sample("y", dist.Normal(z, 0.5), obs=data, obs_mask=mask)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_missing_values_are_imputed(num_layers: int) -> None:
    # z has precision 1 + 2 · 4 and mean 4 · (1 + 3) / 9; a missing y adds its variance, ¼. The
    # site of the missing values has elements for the others, too, which are masked.
    guide = AutoSelfNormalizingFlow(missing_values, num_layers)
    loss = infer.Trace_ELBO(8, vectorize_particles=True)
    svi = infer.SVI(missing_values, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss)
    for _ in range(400):
        svi.step()
    draws = guide.sample_posterior(4000)
    assert draws["z"].mean().item() == pytest.approx(16 / 9, abs=0.1)
    missing = draws["y_unobserved"][:, [1, 3]]
    assert (missing.mean(0) - 16 / 9).abs().max() < 0.1
    assert (missing.var(0) - (1 / 9 + 0.25)).abs().max() < 0.1


def test_elbo_with_missing_values_is_a_bound_of_the_same_evidence() -> None:
    # The elements that nothing reaches have a prior that integrates to 1. Here the posterior is
    # Gaussian, so the bound is tight.
    guide = AutoSelfNormalizingFlow(missing_values, 1)
    loss = infer.Trace_ELBO(16, vectorize_particles=True)
    svi = infer.SVI(missing_values, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss)
    for _ in range(600):
        svi.step()
    observed = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + 0.25 * torch.eye(2))
    expected = observed.log_prob(torch.tensor([1.0, 3.0])).item()
    loss = infer.Trace_ELBO(1000, vectorize_particles=True)
    assert -loss.loss(missing_values, guide) == pytest.approx(expected, abs=TIGHT)


def test_missing_values_in_every_objective_and_predictive() -> None:
    guide = AutoSelfNormalizingFlow(missing_values)
    assert guide()["y_unobserved"].shape == (4,)
    options: dict[str, Any] = {"max_plate_nesting": 1, "strict_enumeration_warning": False}
    for vectorized in ({}, {"num_particles": 3, "vectorize_particles": True}):
        for make in (infer.Trace_ELBO, infer.TraceGraph_ELBO, infer.TraceEnum_ELBO):
            loss = make(**options, **vectorized)
            loss.loss_and_grads(missing_values, guide)
    for parallel in (False, True):
        predictive = infer.Predictive(missing_values, guide=guide, num_samples=5, parallel=parallel)
        assert predictive()["y"].shape == (5, 4)


def test_mask_on_observations_is_fine(conjugate: Conjugate) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 99.0, 1.0]))

    assert not created(model)._unreached


# --- Frozen parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("frozen", ["all", "the first layer", "the last layer"])
def test_frozen_parameters_stay_and_do_not_warn(
    frozen: str, local: bool, conjugate: Conjugate
) -> None:
    # Warnings are errors here.
    with pyro.settings.context(module_local_params=local):
        guide = created(conjugate)
        randomize(guide.transform)
        parts = list(guide.transform.parts)
        chosen = {"all": parts, "the first layer": parts[:1], "the last layer": parts[-1:]}[frozen]
        for part in chosen:
            part.requires_grad_(False)
        before = parameters_of(guide)
        is_free = [parameter.requires_grad for parameter in guide.parameters()]
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
        for _ in range(2):
            loss = infer.Trace_ELBO().differentiable_loss(conjugate, guide)
            if any(is_free):
                loss.backward()
            optimizer.step()
        if not local:  # Pyro's optimizers need the store
            fit(guide, conjugate, 2)
    for parameter, old, moves in zip(guide.parameters(), before, is_free, strict=True):
        assert torch.equal(parameter, old) != moves


# --- torch.jit ----------------------------------------------------------------------------------


class Traceable(nn.Module):
    """Predictions as a tensor: torch.jit cannot return dictionaries."""

    def __init__(self, model: Any, guide: Any, num_samples: int, parallel: bool) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.predictive = infer.Predictive(
            model, guide=guide, num_samples=num_samples, parallel=parallel, return_sites=("z",)
        )

    def forward(self) -> Tensor:
        return self.predictive()["z"].reshape(self.num_samples, DIM)


def saved_and_loaded(traced: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_traced_guide(mode: str, num_layers: int, conjugate: Conjugate) -> None:
    guide = random(conjugate, num_layers).train(mode == "train")
    traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    for seed in range(2):
        results = []
        for each in (guide, saved_and_loaded(traced)):
            pyro.set_rng_seed(seed)
            results.append(each.call()[0])
        assert is_close(*results)


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize(("parallel", "num_samples"), [(False, 3), (True, 200)])
def test_traced_predictive(parallel: bool, num_samples: int, conjugate: Conjugate) -> None:
    module = Traceable(conjugate, optimal(conjugate), num_samples, parallel)
    loaded = saved_and_loaded(torch.jit.trace(module, (), check_trace=False))
    scale = conjugate.covariance.diagonal().sqrt()
    for seed in range(2):
        pyro.set_rng_seed(seed)
        draws = loaded()
        standard_errors = math.sqrt(num_samples) * (draws.mean(0) - conjugate.mean) / scale
        assert standard_errors.abs().max() < 4.5  # has a probability of 10⁻⁵
        assert len(draws.unique(dim=0)) == num_samples


# --- Training to the posterior ------------------------------------------------------------------


GUIDES: dict[str, dict[str, Any]] = {
    "1 layer": {"num_layers": 1},
    "2 layers": {},
    "3 layers": {"num_layers": 3},
    "4 layers": {"num_layers": 4},
    "spline": {"num_layers": 3, "activation": dist.transforms.spline},
    "leaky relu": {"num_layers": 3, "activation": lambda dim: SmoothLeakyReLU(learnable=True)},
    "coupling": {"num_layers": 3, "activation": dist.transforms.affine_coupling},
    "exact": {"num_layers": 1, "log_det": "exact"},
    "learned": {"num_layers": 1, "log_det": "learned"},
    "total, not clipped": {"num_layers": 1, "gradient": "total", "clip": None},
}


@pytest.mark.parametrize("options", GUIDES)
def test_posterior_of_a_conjugate_model_is_recovered(options: str, conjugate: Conjugate) -> None:
    guide = AutoSelfNormalizingFlow(conjugate, init_scale=0.3, **GUIDES[options])
    steps = 250
    optimizer = ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / steps)})
    loss = infer.Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = infer.SVI(conjugate, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
    guide.eval()  # where densities are exact
    loss = infer.Trace_ELBO(num_particles=400, vectorize_particles=True).loss(conjugate, guide)
    tolerance = NEARLY_TIGHT if options in ("spline", "leaky relu") else TIGHT
    assert -loss == pytest.approx(conjugate.log_evidence, abs=tolerance)
    if GUIDES[options].get("num_layers") == 1:
        layer = guide.transform.parts[0]
        tolerance = TRAINED if guide.gradient == "path" else 2 * TRAINED
        weight = layer.weight.detach()
        assert (layer.bias - conjugate.mean).abs().max() < tolerance
        assert (weight @ weight.mT - conjugate.covariance).abs().max() < tolerance


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


def test_huge_gradient_is_cut_in_each_row_by_itself() -> None:
    guide, gradient = clipping(), 1e8 * torch.randn(DIM)
    found = passed(guide, gradient)
    assert found.norm().item() == pytest.approx(10.0, rel=0.2)
    assert is_close(found / found.norm(), gradient / gradient.norm())
    assert is_close(passed(clipping(clip=None), gradient), gradient)
    # Each row has an entry of its own in the sum.
    gradient = torch.diag(torch.tensor([1.0, 0.5, 1e5, 2.0]))
    found, others = passed(clipping(), gradient), [0, 1, 3]
    assert torch.equal(found[others], gradient.diagonal()[others])
    assert 5 < found[2] < 20


@pytest.mark.parametrize("dim", [1, 100])
def test_gaussian_gradients_are_not_changed(dim: int) -> None:
    # In one dimension a typical length is 0.53 deviations: the limit is at 5.3.
    guide = clipping(dim)
    gradients = torch.randn(1000, dim) * dim**-0.5
    for some in gradients.split(10):
        assert is_close(passed(guide, some), some.sum(0))


def test_average_follows_the_gradients_but_hardly_an_outlier() -> None:
    guide = clipping(seen=100)
    before = guide.log_gradient_length.item()
    passed(guide, torch.full((DIM,), 1e30))
    assert guide.log_gradient_length.item() - before == pytest.approx(math.log(10) / 100, rel=0.1)
    for _ in range(600):
        passed(guide, 1e-3 * nn.functional.normalize(torch.randn(DIM), dim=-1))
    # A memory of 100 gradients: e⁻⁶ of the distance is left.
    assert guide.log_gradient_length.exp().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("seen", [0, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_surfaces_and_does_no_harm(bad: float, seen: int) -> None:
    guide = clipping(seen=seen)
    guide.transform.parts[0].checks_gradients = False
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
        svi = infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), infer.Trace_ELBO())
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
        ({"gradient": "score"}, "gradient, if not None, to be one of .*; got 'score'"),
        ({"clip": 1.0}, "clip > 1, or None; got 1.0"),
        ({"clip": math.inf}, "clip > 1, or None; got inf"),
        ({"clip": math.nan}, "clip > 1, or None; got nan"),
        ({"init_scale": 0.0}, "init_scale > 0; got 0.0"),
        (
            {"log_det": "learned", "gradient": "path"},
            "gradient='total' with log_det='learned'; got 'path'",
        ),
        ({"log_det": "none"}, "log_det to be .*; got 'none'"),
        ({"inverse": "none"}, "inverse, with log_det=Refined, .*; got 'none'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoSelfNormalizingFlow(mixed, **options)


@pytest.mark.parametrize("name", ["hidden", "bias", "dtype", "device"])
def test_unknown_options_are_errors_of_the_guide(name: str) -> None:
    message = rf"AutoSelfNormalizingFlow\S* got an unexpected keyword argument '{name}'"
    with pytest.raises(TypeError, match=message):
        AutoSelfNormalizingFlow(mixed, **{name: 3})


def test_what_there_is_no_guide_for() -> None:
    @infer.config_enumerate
    def discrete() -> None:
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"[Cc]ontinuous"):
        AutoSelfNormalizingFlow(discrete)()
    observed = poutine.condition(Recorder(), {"z": torch.zeros(DIM)})
    guide = AutoSelfNormalizingFlow(observed)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="AutoSelfNormalizingFlow found no latent variables"):
            guide()


def test_model_is_called_once_to_create_it() -> None:
    calls = []

    def model() -> None:
        calls.append(None)
        pyro.sample("z", standard_normal(3))

    guide = AutoSelfNormalizingFlow(model)
    assert not calls
    for _ in range(2):
        guide()
        guide.sample_posterior(2)
    assert len(calls) == 1
