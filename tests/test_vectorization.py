"""Whether one call for many draws gives what single draws give."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated, planar
from pyro.infer import autoguide, config_enumerate
from torch import Tensor, nn

from pyro_snf import AutoSelfNormalizingFlow
from pyro_snf.vectorization import can_vectorize, nesting_of, single_traces
from tests.test_importance import normal


def plate_nesting(model: Any, guide: Any, args: tuple[Any, ...] = (), **kwargs: Any) -> int:
    return nesting_of(*single_traces(model, guide, args, kwargs))


def found(model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> bool:
    return can_vectorize(model, guide, args, {}, plate_nesting(model, guide, args))


def observed(mean_of: Callable[[Tensor], Any], value: float = 1.0) -> Callable[[], None]:
    """A program with one latent site, and an observation with a function of it as the mean."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mean_of(z), 1.0), obs=torch.tensor(value))

    return model


def vector_guide() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


# --- Models that it is right for ----------------------------------------------------------------


def nested(subsample_size: int | None = None) -> None:
    """Plates in each other, one of them perhaps subsampled, and a scale."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("outer", 3, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with (
            pyro.plate("inner", 8, dim=-1, subsample_size=subsample_size) as index,
            poutine.scale(scale=2.0),
        ):
            pyro.sample("x", dist.Normal(shift, scale), obs=torch.linspace(-1, 1, 8)[index])


def coins() -> None:
    chance = pyro.sample("chance", dist.Beta(2.0, 2.0))
    with pyro.plate("data", 4):
        coin = pyro.sample("coin", dist.Bernoulli(chance))
        pyro.sample("x", dist.Normal(coin, 1.0), obs=torch.linspace(-1, 1, 4))


@pytest.mark.parametrize(
    "guide", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, AutoSelfNormalizingFlow]
)
@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (observed(lambda z: z.sum(-1)), []),
        (nested, []),
        (partial(nested, 5), []),
        (config_enumerate(coins), ["coin"]),
    ],
    ids=["vector", "nested plates", "subsampled", "enumerated"],
)
def test_models_made_for_it(model: Any, hidden: list[str], guide: Any) -> None:
    assert found(model, guide(poutine.block(model, hide=hidden)))


def test_discrete_sites_that_the_guide_samples() -> None:
    assert found(coins, coins)


def test_weights_of_zero() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("above", torch.where(z > 0, 0.0, -torch.inf))

    assert found(model, normal())


# --- Models that it is wrong for ----------------------------------------------------------------


def stochastic() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("noise", z * torch.randn(()))


def branches() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("branch", z if z > 0 else -z)


def mixes_auxiliary() -> None:
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    value = noise.mean() + 0 * noise
    pyro.sample("z", dist.Delta(value, log_density=-value))


def mixes_in_guide() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(a.sum(), 1.0))


def pair_of_sites() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        # Nothing of the first four raises an error under the plate of draws.
        (observed(lambda z: z.sum()), vector_guide),
        (observed(lambda z: z.flatten()[0]), vector_guide),
        (observed(lambda z: z.sum(-1).sort(0).values if z.dim() > 1 else z.sum()), vector_guide),
        (pair_of_sites, mixes_in_guide),
        (normal(), mixes_auxiliary),
        (observed(lambda z: z[0]), vector_guide),
        (stochastic, normal()),
        (branches, normal()),
        (normal(), autoguide.AutoNormalMessenger(normal())),
        # The density is not known at a given value.
        (pair_of_sites, autoguide.AutoNormalizingFlow(pair_of_sites, partial(iterated, 1, planar))),
    ],
    ids=[
        "sum",
        "first",
        "sorted",
        "guide",
        "point mass of the guide",
        "shapes",
        "stochastic",
        "branches",
        "messenger",
        "no density",
    ],
)
def test_other_models(model: Any, guide: Any) -> None:
    assert not found(model, guide)


# --- Plates, and what is left as it was ---------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "guide", "expected"),
    [(normal(), normal(), 0), (coins, coins, 1), (nested, autoguide.AutoNormal(nested), 2)],
)
def test_plate_nesting(model: Any, guide: Any, expected: int) -> None:
    assert plate_nesting(model, guide) == expected


def test_plates_of_the_guide_count() -> None:
    def guide() -> None:
        with pyro.plate("rows", 2, dim=-3):
            pyro.sample("row", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert plate_nesting(normal(), guide) == 3


def test_random_state_is_kept() -> None:
    def state() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]

    pyro.set_rng_seed(0)
    expected = state()
    for model, guide in ((coins, coins), (stochastic, normal()), (branches, normal())):
        pyro.set_rng_seed(0)
        found(model, guide)
        assert state() == expected


def test_modes_are_kept_and_the_check_is_made_in_eval_mode() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self) -> None:
            # In training mode, the log-density would be random.
            pyro.sample("z", dist.Normal(self.dropout(torch.ones(1)).squeeze(-1), 1.0))

    guide = Guide()
    assert found(normal(), guide)
    assert guide.training
    assert guide.dropout.training


def test_arguments_are_passed_on() -> None:
    def model(data: Tensor, *, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide(data: Tensor, *, scale: float) -> None:
        pyro.sample("z", dist.Normal(0.0, scale))

    args, kwargs = (torch.ones(4),), {"scale": 2.0}
    assert plate_nesting(model, guide, args, **kwargs) == 1
    assert can_vectorize(model, guide, args, kwargs, 1)
    # More dimensions than the plates take are as good; fewer are an error of Pyro's.
    assert can_vectorize(model, guide, args, kwargs, 3)
    assert not can_vectorize(model, guide, args, kwargs, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)

    inputs = torch.linspace(-3, 3, 5000).reshape(100, 50)

    def model() -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        mean = weights @ inputs.T
        pyro.sample("x", dist.Normal(mean, 0.1).to_event(1), obs=torch.zeros(100))

    assert found(model, AutoSelfNormalizingFlow(model))
