"""Next to Zuko: our layers in its flows, and its transforms in Pyro's and in ours."""

from __future__ import annotations

import copy
import pickle
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import Compose, SelfNormalizingLinear, SmoothLeakyReLU
from pyro_snf.diagnostics import psis, report
from tests.registry import LOG_DETS, is_close, linear, nudge_inverses
from tests.test_pyro import Conjugate

# Float64: the same operations in another order.
EXACT = 1e-9
DIM, CONTEXT = 3, 2


def lazy(transform: Transform) -> nn.Module:
    """A transform as Zuko wants it."""
    return zuko.lazy.UnconditionalTransform(nn.Identity(), transform)


def standard_normal() -> nn.Module:
    return zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(DIM), torch.ones(DIM), buffer=True
    )


def ours(log_det: str) -> list[Transform]:
    return [
        linear(DIM, log_det=log_det),
        SmoothLeakyReLU(learnable=True),
        linear(DIM, log_det=log_det, seed=1).inv,
    ]


def plain_flow(log_det: str) -> nn.Module:
    return zuko.lazy.Flow([lazy(part) for part in ours(log_det)], standard_normal())


def composed_flow(log_det: str) -> nn.Module:
    return zuko.lazy.Flow(lazy(Compose(ours(log_det))), standard_normal())


def extended(constructor: str, context: int, log_det: str) -> nn.Module:
    """One of Zuko's own flows, with a layer before its transform and more after it."""
    make = getattr(zuko.flows, constructor)
    flow = make(DIM, context, transforms=1, hidden_features=[8])
    flow.transform.transforms.insert(0, lazy(linear(DIM, log_det=log_det, seed=2)))
    flow.transform.transforms.extend([lazy(part) for part in ours(log_det)])
    return flow


FLOWS: dict[str, Callable[[str], nn.Module]] = {
    "flow": plain_flow,
    "flow of a Compose": composed_flow,
    "MAF": partial(extended, "MAF", 0),
    "NSF": partial(extended, "NSF", 0),
    "MAF with a context": partial(extended, "MAF", CONTEXT),
    "NSF with a context": partial(extended, "NSF", CONTEXT),
}


def context_of(name: str, count: int) -> Tensor | None:
    return torch.randn(count, CONTEXT) if "context" in name else None


def oracle(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """The log-densities, a row at a time, by autodiff and ``slogdet``."""
    densities = []
    for row, point in enumerate(x):
        distribution = flow(None if context is None else context[row])
        jacobian = torch.autograd.functional.jacobian(
            distribution.transform, point, create_graph=True
        )
        log_det = torch.linalg.slogdet(jacobian).logabsdet
        densities.append(distribution.base.log_prob(distribution.transform(point)) + log_det)
    return torch.stack(densities)


# --- Our layers in Zuko's flows -----------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_density_of_data_and_samples_is_that_of_slogdet(log_det: str, name: str) -> None:
    flow = FLOWS[name](log_det).eval()
    nudge_inverses(flow, 0.3)
    x, context = torch.randn(4, DIM), context_of(name, 4)
    density = flow(context).log_prob(x)
    assert density.shape == (4,)
    assert is_close(density, oracle(flow, x, context), EXACT)
    batch = () if context is None else (4,)
    x, density = flow(context).rsample_and_log_prob((5,))
    assert x.shape == (5, *batch, DIM)
    assert density.shape == (5, *batch)
    assert torch.allclose(flow(context).log_prob(x), density, rtol=1e-6, atol=1e-6)
    assert flow(context).rsample((5,)).shape == x.shape
    (gradient,) = torch.autograd.grad(x.sum(), [next(flow.parameters())])
    assert gradient.any()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_gradient_in_training_is_that_of_slogdet(log_det: str, name: str) -> None:
    # With an exact R, as at first, the surrogate's gradient is the exact one.
    flow, exact = FLOWS[name](log_det), FLOWS[name]("exact")
    exact.load_state_dict(flow.state_dict(), strict=False)
    x, context = torch.randn(4, DIM), context_of(name, 4)
    actual = torch.autograd.grad(flow(context).log_prob(x).sum(), list(flow.parameters()))
    density = oracle(exact, x, context).sum()
    expected = torch.autograd.grad(density, list(exact.parameters()))
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() < EXACT * (1 + other.norm())


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_flow_is_trained(log_det: str, name: str) -> None:
    flow = FLOWS[name](log_det)
    before = copy.deepcopy(flow.state_dict())
    context = context_of(name, 100)
    x = torch.randn(100, DIM).exp()
    with torch.no_grad():
        initial = -flow(context).log_prob(x).mean().item()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(40):
        loss = -flow(context).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert -flow(context).log_prob(x).mean().item() < initial - 0.5
    assert not any(torch.equal(p, before[name]) for name, p in flow.named_parameters())
    assert len(report(flow).layers) == (2 if name.startswith("flow") else 3)


@pytest.mark.parametrize("name", ["flow", "NSF with a context"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_copies_and_state_dicts(log_det: str, name: str) -> None:
    flow, fresh = FLOWS[name](log_det), FLOWS[name](log_det).eval()
    x, context = torch.randn(4, DIM), context_of(name, 4)
    flow(context).log_prob(x).sum().backward()  # caches are full
    expected = flow.eval()(context).log_prob(x)
    fresh.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh):
        assert torch.equal(other(context).log_prob(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        assert torch.equal(flow(context).log_prob(x), expected)


# --- Zuko's transforms next to ours -------------------------------------------------------------


def spline() -> Transform:
    """Elementwise, of an event dimension of 0, with constants for parameters."""
    generator = torch.Generator().manual_seed(3)
    shapes = [torch.randn(DIM, bins, generator=generator) for bins in (8, 8, 7)]
    return zuko.transforms.MonotonicRQSTransform(*shapes)


def autoregressive() -> Transform:
    """Built by a network: the composition of two."""
    torch.manual_seed(3)
    return zuko.flows.NSF(DIM, transforms=2, hidden_features=[8]).transform()


ZUKOS: dict[str, Callable[[], Transform]] = {
    "spline": spline,
    "autoregressive": autoregressive,
    "inverse autoregressive": lambda: autoregressive().inv,
    "LU": lambda: zuko.transforms.LULinearTransform(torch.eye(DIM) + 0.1 * torch.ones(DIM, DIM)),
}


@pytest.mark.parametrize("stack", ["Compose", "TransformedDistribution"])
@pytest.mark.parametrize("name", ZUKOS)
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_zukos_transform_between_ours(log_det: str, name: str, stack: str) -> None:
    parts = [linear(DIM, log_det=log_det), ZUKOS[name](), SmoothLeakyReLU(), linear(DIM, seed=1)]
    flow = Compose(parts).eval()
    x = torch.randn(4, DIM)
    y = flow(x)
    # Zuko inverts its splines by a formula, and what it inverts by bisection to about 1e-6.
    assert torch.allclose(flow.inv(y.clone()), x, rtol=1e-6, atol=1e-6)
    jacobians = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    log_dets = torch.linalg.slogdet(jacobians).logabsdet
    assert is_close(flow.log_abs_det_jacobian(x, y), log_dets, EXACT)
    base = dist.Normal(torch.zeros(DIM), 1.0)
    density = dist.TransformedDistribution(base, [flow] if stack == "Compose" else parts)
    expected = base.log_prob(x).sum(-1) - log_dets
    assert density.event_shape == (DIM,)
    assert torch.allclose(density.log_prob(y.clone()), expected, rtol=1e-6, atol=1e-6)
    reverse = dist.TransformedDistribution(base, [flow.inv])
    expected = base.log_prob(y).sum(-1) + log_dets
    assert is_close(reverse.log_prob(x), expected, EXACT)
    assert reverse.rsample((5,)).shape == (5, DIM)


def test_nothing_stale_is_remembered() -> None:
    # The same data, scored step after step by the transform of a network that is being trained.
    network = zuko.flows.NSF(DIM, transforms=1, hidden_features=[8]).transform
    flow = Compose([linear(DIM), network(), linear(DIM, seed=1)]).eval()
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(DIM), 1.0), [flow.inv])
    x = torch.randn(4, DIM)
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        assert torch.equal(density.log_prob(x), density.log_prob(x.clone()))


def test_guide_of_both_is_trained() -> None:
    conjugate = Conjugate(dim=DIM)
    layer = SelfNormalizingLinear(DIM, init_scale=0.3)
    network = zuko.flows.NSF(DIM, transforms=1, hidden_features=[8]).transform

    def guide() -> None:
        pyro.module("layer", layer)
        pyro.module("network", network)
        base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [network(), layer]))

    before = copy.deepcopy([*layer.parameters(), *network.parameters()])
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    steps = 300
    optimizer = ClippedAdam({"lr": 0.03, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(conjugate, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()
    for parameter, old in zip([*layer.parameters(), *network.parameters()], before, strict=True):
        assert not torch.equal(parameter, old)
    result = psis(conjugate, guide, vectorize=True)
    assert result.is_reliable
    assert result.elbo == pytest.approx(conjugate.log_evidence, abs=0.3)
    assert result.iw_elbo == pytest.approx(conjugate.log_evidence, abs=0.1)


@pytest.mark.parametrize("order", ["Zuko's first", "ours first"])
def test_gradient_of_a_guide_of_both_is_the_exact_one(order: str) -> None:
    gradients: list[list[Tensor]] = []
    conjugate = Conjugate(dim=DIM)
    for log_det in ("refined", "exact"):
        pyro.clear_param_store()
        layer = linear(DIM, log_det=log_det)
        torch.manual_seed(0)
        network = zuko.flows.NSF(DIM, transforms=1, hidden_features=[8]).transform

        def guide(layer: Any = layer, network: Any = network) -> None:
            parts = [network(), layer] if order == "Zuko's first" else [layer, network()]
            base = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, parts))

        Trace_ELBO().differentiable_loss(conjugate, guide).backward()
        gradients.append([p.grad for p in [*layer.parameters(), *network.parameters()]])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < EXACT * other.norm()


# --- The documentation --------------------------------------------------------------------------

USING = Path(__file__).parents[1] / "docs" / "using.rst"


def test_documented_programs() -> None:
    _, heading, section = USING.read_text(encoding="utf-8").partition("With Zuko\n---------\n")
    if not heading:
        pytest.skip("docs/using.rst has no section on Zuko")
    section = re.split(r"\n.+\n-{3,}\n", section)[0]
    programs = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", section)
    assert len(programs) == 2
    names: dict[str, Any] = {}
    exec(textwrap.dedent(programs[0]), names)
    assert all(parameter.grad is not None for parameter in names["flow"].parameters())
    assert names["layer"].theta.grad.any()
    exec(textwrap.dedent(programs[1]), names)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    SVI(model, names["guide"], ClippedAdam({"lr": 0.01}), Trace_ELBO()).step()
    count = len([*names["spline"].parameters(), *names["layer"].parameters()])
    assert len(pyro.get_param_store()) == count
