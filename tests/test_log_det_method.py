"""Methods as objects: their options, copies and seeds; and a method of one's own."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyro_snf import (
    GECO,
    AutoSelfNormalizingFlow,
    Compose,
    ConditionalSelfNormalizingLinear,
    Exact,
    Learned,
    LogDetMethod,
    PairRefined,
    Reconstruction,
    Refined,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    flows,
    self_normalizing_linear,
    self_normalizing_pair,
)
from pyro_snf.diagnostics import gradient_error, inverse_error, report
from pyro_snf.extra_state import saved_count
from pyro_snf.probes import ProbeStream
from tests.registry import COPIES

# Float64: the same operations.
EXACT = 1e-12

IMAGES = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Kind(NamedTuple):
    make: Callable[..., Any]
    x: Tensor


KINDS = {
    "linear": Kind(partial(SelfNormalizingLinear, 4), IMAGES.reshape(-1, 4)),
    "conv": Kind(partial(SelfNormalizingConv2d, 2), IMAGES),
    "conv 1×1": Kind(partial(SelfNormalizingConv2d, 2, 1), IMAGES),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# --- A method of one's own ----------------------------------------------------------------------


class Diagonal(LogDetMethod):
    """``log|det A|`` by the diagonal of A alone."""

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: object) -> Tensor:
        return x[0].numel() / len(theta) * self.diagonal(theta).abs().log().sum()

    def diagonal(self, theta: Tensor) -> Tensor:
        """For a kernel, that of its centre; each entry stands for all pixels of a channel."""
        weight = self.linear_map.weight(theta)
        return weight[(..., *[size // 2 for size in weight.shape[2:]])].diagonal()


class SmoothedDiagonal(Diagonal):
    """The same, linearized at a running mean of the diagonal."""

    saved_attributes: ClassVar = {"num_steps": saved_count}

    def __init__(self, *, decay: float = 0.5) -> None:
        super().__init__()
        self.decay, self.num_steps = decay, 0

    def setup(self, linear_map: Any, theta: Tensor) -> None:
        super().setup(linear_map, theta)
        self.register_buffer("mean", self.diagonal(theta).clone())

    def extra_repr(self) -> str:
        return f"decay={self.decay}"

    def training_log_abs_det(self, theta: Tensor, x: Tensor, state: object) -> Tensor:
        diagonal = self.diagonal(theta)
        self.num_steps += 1
        self.mean = torch.lerp(diagonal.detach(), self.mean, self.decay)
        linear = (diagonal / self.mean - 1).sum()
        return x[0].numel() / len(theta) * (self.mean.log().sum() + linear)


TOYS = pytest.mark.parametrize("toy", [Diagonal(), SmoothedDiagonal(decay=0.8)], ids=repr)


def fit(layer: nn.Module, x: Tensor, steps: int) -> list[float]:
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
    for _ in range(steps):
        y = layer(x)
        loss = 0.5 * y.square().mean() - layer.log_abs_det_jacobian(x, y).mean() / x[0].numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@TOYS
def test_layer_trains_by_a_method_of_ones_own(kind: Kind, toy: Diagonal) -> None:
    layer, x = kind.make(log_det=toy), kind.x
    losses = fit(layer, 3 * x, 40)
    assert losses[-1] < losses[0] - 1
    # The value and its gradient are the method's own.
    method = copy.deepcopy(layer.log_det)
    value = layer.log_abs_det_jacobian(x, layer(x))
    own = method.training_log_abs_det(layer.theta, x, None)
    scale = x[0].numel() / len(layer.theta) * layer.log_scale.sum()
    assert torch.allclose(value, (own + scale).expand(len(x)), rtol=EXACT)
    gradients = [torch.autograd.grad(one, layer.theta)[0] for one in (value.mean(), own)]
    assert torch.allclose(*gradients, rtol=EXACT)
    # Outside training the log-determinant is exact, and so is the inverse.
    layer.eval()
    jacobian = torch.autograd.functional.jacobian(layer, x[0]).reshape(2 * [x[0].numel()])
    exact = torch.linalg.slogdet(jacobian).logabsdet
    assert layer.log_abs_det_jacobian(x, layer(x))[0].item() == pytest.approx(exact.item())
    assert torch.allclose(layer.inv(layer(x).clone()), x)
    assert layer.error_estimate is layer.num_refactorizations is layer.refactorize() is None
    assert f"log_det={toy!r}, inverse='exact', training_value='estimate'" in repr(layer)


@TOYS
def test_method_of_ones_own_is_saved(kind: Kind, toy: Diagonal) -> None:
    layer, x = kind.make(log_det=toy), kind.x
    fit(layer, x, 3)
    fresh = kind.make(log_det=toy)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    others = [fresh, *(make_copy(layer) for make_copy in COPIES)]
    expected = fit(layer, x, 3)
    assert [fit(other, x, 3) for other in others] == [expected] * len(others)
    if isinstance(toy, SmoothedDiagonal):
        assert fresh.log_det.num_steps == layer.log_det.num_steps == 6
        assert torch.equal(fresh.log_det.mean, layer.log_det.mean)


@TOYS
def test_method_of_ones_own_in_flows_guides_and_reports(toy: Diagonal) -> None:
    flow = flows.convolutional((1, 8, 8), num_blocks=2, layers_per_block=1, log_det=toy)
    assert [row.log_det for row in report(flow).layers] == [type(toy).__name__] * 2
    layer = SelfNormalizingLinear(3, log_det=toy)
    assert inverse_error(layer) < EXACT
    with torch.no_grad():
        layer.theta.copy_(0.5 * torch.randn(3, 3))
    assert 0.01 < gradient_error(layer).relative < 1

    guide = AutoSelfNormalizingFlow(model, log_det=toy)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    assert all(map(np.isfinite, [svi.step() for _ in range(3)]))


# --- Copies and seeds ---------------------------------------------------------------------------


def seeds(module: nn.Module) -> list[int]:
    return [part.seed.item() for part in module.modules() if isinstance(part, ProbeStream)]


def test_layers_take_copies_of_a_method_and_of_a_penalty() -> None:
    method = Learned(mixture=0.3, reconstruction_weight=GECO(0.1))
    first, second = Compose([SelfNormalizingLinear(dim, log_det=method) for dim in (3, 3)]).parts
    assert not list(method.parameters())
    for one in (first.log_det, second.log_det):
        assert one is not method
        assert one.mixture == 0.3
    assert first.log_det.theta is not second.log_det.theta
    assert first.log_det.reconstruction_weight is not second.log_det.reconstruction_weight
    # That of another layer serves too: the state is made anew.
    other = SelfNormalizingLinear(5, log_det=first.log_det)
    assert other.log_det.theta.shape == (5, 5)
    given = PairRefined(num_probes=np.int64(2)), Reconstruction(GECO(0.1))
    options = {"log_det": given[0], "reconstruction": given[1]}
    pairs = [self_normalizing_pair(2, [3], **options) for _ in range(2)]
    parts = [*given, *(part for one in pairs for part in (one.log_det, one.reconstruction))]
    assert len(set(map(id, parts))) == 6
    assert type(pairs[0].log_det.num_probes) is int


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def guide_of(log_det: object) -> nn.Module:
    guide = AutoSelfNormalizingFlow(model, num_layers=3, log_det=log_det)
    guide()
    return guide


def pairs_of(log_det: PairRefined) -> nn.Module:
    options = {"log_det": log_det, "reconstruction": Reconstruction(seed=log_det.seed)}
    return Compose([self_normalizing_pair(2, [3], **options) for _ in range(2)])


#: Modules of several layers, and methods that have probes.
STACKS: dict[str, tuple[Callable[[object], nn.Module], Callable[..., object]]] = {
    "Compose": (
        lambda log_det: Compose([KINDS[name].make(log_det=log_det) for name in list(KINDS)[1:]]),
        Refined,
    ),
    "iterated": (lambda log_det: iterated(3, self_normalizing_linear, 3, log_det=log_det), Refined),
    "pairs": (pairs_of, PairRefined),
    "convolutional": (lambda log_det: flows.convolutional((1, 12, 12), log_det=log_det), Refined),
    "glow": (
        lambda log_det: flows.glow((1, 4, 4), num_steps=2, hidden_channels=4, log_det=log_det),
        Refined,
    ),
    "guide": (guide_of, Refined),
}


@pytest.mark.parametrize("name", STACKS)
def test_layers_have_seeds_of_their_own_unless_told_otherwise_and_save_them(name: str) -> None:
    make, method = STACKS[name]
    found = []
    for global_seed in (0, 0, 1):
        torch.manual_seed(global_seed)
        found.append(seeds(make(method())))
    assert len(found[0]) > 1
    assert len(set(found[0])) == len(found[0])
    assert found[0] == found[1]  # they are of the global stream
    assert not set(found[0]) & set(found[2])
    layer, other = make(method(seed=5)), make(method())
    assert set(seeds(layer)) == {5}
    other.load_state_dict(layer.state_dict())
    assert set(seeds(other)) == {5}


def test_construction_without_a_seed_alone_draws_random_numbers(kind: Kind) -> None:
    state = torch.get_rng_state()
    for method in (Refined(seed=0), Learned(reconstruction_weight=GECO(0.1)), Exact(), "exact"):
        kind.make(log_det=method)
    assert torch.equal(torch.get_rng_state(), state)
    kind.make(log_det=Refined())
    assert not torch.equal(torch.get_rng_state(), state)


# --- Options ------------------------------------------------------------------------------------


def test_constructors_have_few_parameters() -> None:
    counts = {SelfNormalizingLinear: 7, SelfNormalizingConv2d: 10, SelfNormalizingPair: 9}
    counts |= {ConditionalSelfNormalizingLinear: 9, Refined: 4, Learned: 4, PairRefined: 6}
    for kind, most in counts.items():
        assert len(inspect.signature(kind).parameters) <= most, kind


@pytest.mark.parametrize("inverse", ["iterative", "one_pass"])
def test_inverse_that_the_method_does_not_have(kind: Kind, inverse: str) -> None:
    message = f"expected inverse, with log_det=Exact, to be one of ('exact',); got {inverse!r}"
    for method in ("exact", Exact()):
        with pytest.raises(ValueError, match=re.escape(message)):
            kind.make(log_det=method, inverse=inverse)
    for method in ("refined", "learned"):
        assert kind.make(log_det=method).inverse == "iterative"
        assert kind.make(log_det=method, inverse=inverse).inverse == inverse
    assert kind.make(log_det="exact").inverse == "exact"


def test_krylov_steps_are_of_convolutions() -> None:
    method = Refined(krylov_steps=5)
    assert SelfNormalizingConv2d(3, log_det=method).log_det.krylov_steps == 5
    for make in (KINDS["linear"].make, KINDS["conv 1×1"].make):
        with pytest.raises(ValueError, match="expected no krylov_steps for a dense or 1 × 1 layer"):
            make(log_det=method)


def test_numbers_of_numpy_are_stored_as_those_of_python() -> None:
    method = Refined(num_probes=np.int64(3), tolerance=np.float32(0.25), seed=np.int32(7))
    layer = SelfNormalizingLinear(np.int64(4), log_det=method, init_scale=np.float64(0.5))
    image_layer = SelfNormalizingConv2d(
        np.int32(2),
        (np.int64(3), 5),
        inverse_kernel_size=np.int64(3),
        log_det=Refined(krylov_steps=np.int64(4)),
    )
    stored = [layer.input_dim, layer.log_det.num_probes, layer.log_det.seed, image_layer.channels]
    stored += [*image_layer.kernel_size, image_layer.log_det.krylov_steps]
    assert {type(number) for number in stored} == {int}
    assert type(layer.log_det.tolerance) is float
    assert repr(layer).startswith("SelfNormalizingLinear(4, log_det=Refined(num_probes=3, ")
    assert type(Learned(mixture=np.float32(0.5)).mixture) is float
    assert type(pickle.loads(pickle.dumps(layer)).input_dim) is int
