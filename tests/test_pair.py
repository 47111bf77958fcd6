"""Pairs of networks as layers: the objective, the penalty, the networks that fit, and bad input."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyro_snf import (
    GECO,
    Compose,
    PairExact,
    PairLearned,
    PairRefined,
    Reconstruction,
    ResidualMLP,
    SelfNormalizingPair,
    SmoothLeakyReLU,
    conditional_self_normalizing_pair,
    self_normalizing_pair,
)
from pyro_snf.free_form import reconstruction
from pyro_snf.free_form.reconstruction import _MIN_NEW as MIN_NEW
from pyro_snf.free_form.reconstruction import _NUM_OLD as NUM_OLD
from pyro_snf.free_form.reconstruction import _steps, variance_of
from tests.pairs import (
    EXACT,
    Dense,
    Fixed,
    Perturbed,
    Recorder,
    events,
    pair_of,
    parameters_of_f,
)
from tests.registry import (
    LOG_DETS,
    assert_gradients_equal,
    assert_refused,
    density_by_inverse,
    density_loss,
    exact_pair,
    free_form,
    is_close,
    linear,
    log_det_of,
    nudge_inverses,
    relative_error,
    standard_normal,
)
from tests.test_gradients import ELBOS, PROGRAMS, elbo_gradients

# The same operations on the same numbers, at other addresses.
SAME = 1e-12
# Of a density's integral by 200 × 200 points on a square that holds almost all of it.
INTEGRAL = 1e-4

SURROGATES = ["refined", "learned"]
EVERY_LOG_DET = pytest.mark.parametrize("log_det", LOG_DETS)


def bad_pair(dim: int = 3, **options: object) -> SelfNormalizingPair:
    """A random pair whose g has a relative error of some 30 %."""
    layer = free_form(dim, **options)
    nudge_inverses(layer, 0.5)
    return layer


def seeded(log_det: str) -> dict[str, object]:
    return {"log_det": log_det} if log_det == "exact" else {"log_det": log_det, "seed": 0}


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Those of all parameters, 0 where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in layer.named_parameters()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Of differences of gradients of order 10.
        assert is_close(actual[name], gradient, EXACT), name


def step(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.99)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_gradient_of_linear_maps(mixture: float, scaled: bool) -> None:
    # W = diag(e^s) A and R diag(e^−s), R ≠ A⁻¹; the mean is that of all orthogonal probes.
    layer = linear(4, log_det="learned", bias=False, mixture=mixture, reconstruction_weight=0.0)
    nudge_inverses(layer, 0.5)
    log_scale = torch.linspace(-0.5, 0.7, 4) if scaled else torch.zeros(4)
    f, g = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.log_scale.copy_(log_scale)
        f.weight.copy_(layer.weight)
        g.weight.copy_(layer.inverse_weight)
    pair = pair_of(f, g, 4, log_det="learned", num_probes=4, reconstruction={"weight": 0.0})
    x, cotangent = events(6, 4), torch.linspace(-1, 2, 6)
    for transform in (layer, pair):
        loss = cotangent * density_by_inverse(transform, x) + transform(x).square().sum(1)
        loss.sum().backward()
    scale = log_scale.exp()  # A = I + Θ/√D, and likewise R
    assert relative_error(layer.theta.grad, scale.unsqueeze(1) * f.weight.grad / 2) < EXACT
    assert g.weight.grad is None


# --- The penalty --------------------------------------------------------------------------------


def value_and_gradients(
    pair: SelfNormalizingPair, x: Tensor, cotangent: Tensor, **penalty: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """``log|det J|`` by a layer of the pair's networks, and the gradients of ``Σ c log|det J|``."""
    options = seeded(penalty.pop("log_det", "refined"))
    penalty = {"seed": 0, **penalty}
    layer = pair_of(pair.forward_net, pair.inverse_net, **options, reconstruction=penalty)
    layer.zero_grad()
    value = log_det_of(layer, x)
    (cotangent * value).sum().backward()
    return value, gradients(layer)


def penalty_gradients(
    pair: SelfNormalizingPair, x: Tensor, cotangent: Tensor, weight: object = 0.7, **options: object
) -> dict[str, Tensor]:
    """The penalty's share of them: the probes are the same, whatever λ is."""
    (value, without), (other_value, total) = (
        value_and_gradients(pair, x, cotangent, weight=each, **options) for each in (0.0, weight)
    )
    assert torch.equal(value, other_value)  # the penalty never changes it
    assert not any(one.any() for name, one in without.items() if name.startswith("inverse_net"))
    return {name: total[name] - without[name] for name in total}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of which events of the batch the surroundings were looked at, at every evaluation."""
    found = []

    def recorded(x: Tensor, rows: Tensor, *rest: object) -> Tensor:
        found.append(rows)
        return _steps(x, rows, *rest)

    monkeypatch.setattr(reconstruction, "_steps", recorded)
    return found


def error_of(pair: SelfNormalizingPair, x: Tensor) -> Tensor:
    return pair.inverse_net(pair.forward_net(x)) - x


def contraction_by_hand(
    pair: SelfNormalizingPair, x: Tensor, starts: Tensor, ends: Tensor
) -> Tensor:
    """``‖e(x̃) − e(x)‖²/‖x̃ − x‖²`` of steps from starts to ends, near a batch x."""
    change = error_of(pair, ends) - error_of(pair, starts)
    return change.square().sum(1) / square_by_hand(x, starts, ends)


def lost_by_hand(pair: SelfNormalizingPair, x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """``1 − ⟨g(f(x̃)) − g(f(x)), x̃ − x⟩/‖x̃ − x‖²`` of the same."""
    step = ends - starts
    back = pair.inverse_net(pair.forward_net(ends)) - pair.inverse_net(pair.forward_net(starts))
    return (step * (step - back)).sum(1) / square_by_hand(x, starts, ends)


def square_by_hand(x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """``‖x̃ − x‖²``, and what keeps it from 0."""
    least = x.shape[1] * x.var(0, unbiased=False).mean() * 1e-6
    return (ends - starts).square().sum(1) + least


@pytest.mark.filterwarnings("ignore:the pair is trained on numbers")
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("trains", ["both", "inverse"])
@EVERY_LOG_DET
def test_penalty_is_the_formula(
    log_det: str, trains: str, needs_gradient: bool, rows: list[Tensor]
) -> None:
    pair, x, cotangent = bad_pair(), 30 * events(41, 3) + 100, torch.linspace(-1, 2, 41)
    given = x.clone().requires_grad_(needs_gradient)
    actual = penalty_gradients(pair, given, cotangent, log_det=log_det, trains=trains)
    f = Recorder(pair.forward_net)
    log_det_of(pair_of(f, pair.inverse_net, **seeded("exact"), reconstruction={"seed": 0}), x)
    ends = f.inputs[-1][:MIN_NEW].detach()
    assert len(rows[-1].unique()) == MIN_NEW
    error = error_of(pair, x).square().sum(1)
    pair.zero_grad()
    # The steps to be remembered are 0 yet.
    terms = 3 * contraction_by_hand(pair, x, x[rows[-1]], ends).log1p().sum()
    terms = terms / (2 * MIN_NEW + NUM_OLD)
    terms = terms + 3 * torch.log(1 + error / (3 * x.var(0, unbiased=False).mean()))
    # Scaled with the log-determinant, and minimized whatever the sign of its cotangent.
    (0.7 * cotangent.abs() * terms).sum().backward()
    expected = gradients(pair)
    for name, gradient in expected.items():
        if trains == "inverse" and name.startswith("forward_net"):
            gradient.zero_()
    assert_same(actual, expected)


def steps_of(x: Tensor, seed: int = 0) -> Tensor:
    """Those from all events."""
    generator = torch.Generator().manual_seed(seed)
    return _steps(x, torch.arange(len(x)), variance_of(x), generator)


@pytest.mark.parametrize("dim", [1, 2, 8, 50, 784])
def test_surroundings_are_as_far_out_as_normal_latents(dim: int) -> None:
    torch.manual_seed(0)
    for unit in (1e-3, 1.0, 1e3):
        x = unit * (5 + torch.randn(2000, dim))
        step = steps_of(x)
        assert (step / unit).square().mean(1).sqrt().quantile(0.01) < 0.015
        size = ((x + step) / unit - 5).square().mean(1).sqrt()
        assert 0.9 < size.quantile(0.99) / min(3, 1 + 3 / dim**0.5) < 1.6


def test_surroundings_are_near_and_far_in_units_of_the_data() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 0.01])
    for unit in (1e-3, 1.0, 1e3):
        x = unit * (5 + scale * torch.randn(2000, 2))
        other, ratio = x, []
        for step in (steps_of(x, seed) for seed in range(2)):
            other = other + step
            ratio.append(step.norm(dim=1) / unit)
        assert ratio[0].min() < 0.01
        assert 2 < ratio[0].max() < 20
        # Half of them are to other events, along the data; the other half goes everywhere.
        slope = (step[:, 1] / step[:, 0]).abs()
        assert 0.4 < (slope < 0.1).double().mean() < 0.6
    for x in (torch.zeros(1, 2), torch.ones(5, 2)):  # without differences
        step = steps_of(x)
        assert step.all()
        assert step.isfinite().all()


@pytest.mark.parametrize("dim", [3, 9, 100])
def test_next_steps_are_along_the_change_of_the_error(dim: int, rows: list[Tensor]) -> None:
    pair, x = bad_pair(dim), events(40, dim)
    f = Recorder(pair.forward_net)
    layer = pair_of(f, pair.inverse_net, dim, log_det="exact", reconstruction={"seed": 0})
    log_det_of(layer, x)
    penalty, ends = layer.reconstruction, f.inputs[-1][:MIN_NEW].detach()
    new = slice(NUM_OLD, NUM_OLD + MIN_NEW)
    assert torch.equal(penalty.remembered_starts[new], ends)
    step = penalty.remembered_steps[new]
    turned = F.cosine_similarity(step, error_of(pair, ends) - error_of(pair, x[rows[-1]]), dim=1)
    assert is_close(turned, torch.ones(MIN_NEW), EXACT)
    # Each is as long as another one from x; no longer than the data are wide, or than normal events
    # differ from their mean in one direction.
    deviation = x.var(0, unbiased=False).mean().sqrt()
    largest = deviation * min(dim**0.5, 3)
    before, length = (ends - x[rows[-1]]).norm(dim=1), step.norm(dim=1)
    assert is_close(length, before.roll(1).clamp(max=largest), EXACT)
    assert is_close(length.max(), largest, EXACT)
    shorter = length[length < largest * (1 - EXACT)]
    assert len(shorter.unique()) == len(shorter) > 10


@EVERY_LOG_DET
def test_noise_is_a_function_of_the_seed_and_the_step(log_det: str) -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    options = {"log_det": log_det, "weight": 1.0}
    state = torch.get_rng_state()
    first, again, elsewhere = (
        value_and_gradients(pair, x, cotangent, seed=seed, **options)[1] for seed in (1, 1, 2)
    )
    for name, one in first.items():
        assert is_close(again[name], one, SAME), name
        assert name.startswith("forward_net") or not torch.equal(elsewhere[name], one), name
    f = Recorder(pair.forward_net)
    layer = pair_of(f, pair.inverse_net, **seeded(log_det), reconstruction={"seed": 0})
    for _ in range(2):
        log_det_of(layer, x.clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert len({one[:6].sum().item() for one in f.inputs if len(one) >= 6}) == 3  # and x


@pytest.mark.parametrize("dim", [3, 4])
@pytest.mark.parametrize("count", [1, 10, 40, 200, 1000])
def test_steps_that_are_new_or_lose_most_are_remembered_and_turned(
    count: int, dim: int, rows: list[Tensor]
) -> None:
    one_in, most = {3: (2, 128), 4: (4, 64)}[dim]
    pair, num_new = bad_pair(dim), min(count, max(MIN_NEW, count // one_in), most)
    f = Recorder(pair.forward_net)
    options = {"log_det": "exact", "reconstruction": {"weight": 1.0, "seed": 0}}
    layer = pair_of(f, pair.inverse_net, dim, **options)
    penalty = layer.reconstruction
    known_starts, known_steps = torch.zeros(2, num_new + NUM_OLD, dim)
    for number in range(4):
        x = events(count, dim, seed=number)
        log_det_of(layer, x)
        sizes = [num_new, len(known_starts), len(known_starts)]
        ends, starts, next_ends = f.inputs[-1].detach().split(sizes)
        is_none = (known_steps == 0).all(1)
        assert torch.equal(starts, torch.where(is_none.unsqueeze(1), x[:1], known_starts))
        assert torch.equal(next_ends, starts + known_steps)
        lost = lost_by_hand(pair, x, starts, next_ends).where(~is_none, 0.0)
        lost, kept = lost.topk(NUM_OLD)
        known_starts = penalty.remembered_starts[: num_new + NUM_OLD].clone()
        known_steps = penalty.remembered_steps[: num_new + NUM_OLD].clone()
        assert torch.equal(known_starts, torch.cat([starts[kept], ends]))
        change = error_of(pair, ends) - error_of(pair, x[rows[-1]])
        old_change = (error_of(pair, next_ends) - error_of(pair, starts))[kept]
        is_none = (known_steps == 0).all(1)
        # No step, by which nothing is lost, has a place before those that become longer.
        assert torch.equal(is_none[:NUM_OLD], lost == 0)
        assert is_none.sum() >= max(0, NUM_OLD - number * num_new)
        turned = F.cosine_similarity(known_steps, torch.cat([old_change, change]))[~is_none]
        assert is_close(turned, torch.ones_like(turned), EXACT)
        lengths = (next_ends - starts)[kept].norm(dim=1)  # those of the old ones stay
        assert is_close(known_steps[:NUM_OLD].norm(dim=1), lengths, EXACT)
    # Events that are not finite are not remembered.
    log_det_of(layer, torch.full((4, dim), math.nan))
    assert penalty.remembered_starts.isfinite().all()
    assert penalty.remembered_steps.isfinite().all()
    log_det_of(layer, events(4, dim))
    assert f.inputs[-1].isfinite().all()


def test_steps_are_looked_at_where_much_was_lost_before() -> None:
    # f folds in a small place, which few steps come to.
    f = Perturbed(Fixed(lambda x: x - 0.2 * torch.exp(-((x - 1) ** 2) / 0.005)), 1, 0.0)
    f.scale = nn.Parameter(torch.ones(()))
    controller = GECO(0.9, decay=0.0)
    layer = pair_of(
        f, nn.Identity(), 1, log_det="learned", reconstruction={"weight": controller, "seed": 0}
    )
    largest = []
    for seed in range(60):
        step(f)
        log_det_of(layer, events(16, 1, seed=seed))
        largest.append(layer.reconstruction.weight.mean_square_error.item())
    assert min(largest[30:]) > 1


def test_steps_are_remembered_with_their_context(rows: list[Tensor]) -> None:
    layer = conditional_self_normalizing_pair(3, 2, [4], log_det="exact")
    layer.transform.forward_net = f = Recorder(layer.transform.forward_net)
    penalty, size = layer.transform.reconstruction, NUM_OLD + MIN_NEW
    for number in range(3):
        known = [penalty.remembered_steps, penalty.remembered_context]
        x, context = events(40, 3, seed=number), events(40, 2, seed=10 + number)
        steps, known = (one[:size].clone() for one in known)
        is_none = (steps == 0).all(1, keepdim=True)
        known = context[:1].where(is_none, known if number else 0.0)
        log_det_of(layer.condition(context), x)
        points, (contexts,) = f.inputs[-1], f.contexts[-1]
        assert torch.equal(contexts, torch.cat([context[rows[-1]], known, known]))
        starts = penalty.remembered_starts[:size]
        place = (points.unsqueeze(0) == starts.unsqueeze(1)).all(2).double().argmax(1)
        assert torch.equal(penalty.remembered_context[:size], contexts[place])


def test_steps_of_events_of_another_shape_are_forgotten() -> None:
    f, g = (Recorder(nn.PReLU()) for _ in "fg")
    layer = SelfNormalizingPair(f, g, event_dim=1, log_det="learned")
    for dim, num_known in [(3, 0), (3, 6), (4, 0), (4, 6), (4, 12), (3, 0)]:
        log_det_of(layer, events(6, dim))
        _, starts, ends = f.inputs[-1].split([6, 6 + NUM_OLD, 6 + NUM_OLD])
        assert (starts != ends).any(1).sum() == num_known, dim


@pytest.mark.parametrize("log_det", ["exact", "refined"])
def test_what_is_remembered_is_saved_and_loaded(log_det: str) -> None:
    options = {**seeded(log_det), "reconstruction": {"weight": 1.0, "seed": 0}}
    layer, other = (bad_pair(**options) for _ in range(2))
    for seed in range(3):
        log_det_of(layer, events(40, 3, seed=seed))
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    for one in (layer, other):
        one.zero_grad()
        log_det_of(one, events(40, 3, seed=3)).sum().backward()
    assert_same(gradients(other), gradients(layer))
    layer.reconstruction.reset_parameters()
    assert not any(one.any() for one in layer.reconstruction.buffers(recurse=False))


# --- The weight λ: controlled, or on a schedule -------------------------------------------------


@EVERY_LOG_DET
def test_weight_moves_once_a_step_and_a_controlled_one_both_ways(log_det: str) -> None:
    calls: list[int] = []
    weights = {1: GECO(1e-6), -1: GECO(10.0), 0: lambda step: calls.append(step) or 1.0}
    for sign, weight in weights.items():
        layer = bad_pair(log_det=log_det, reconstruction={"weight": weight})
        found = []
        for _ in range(3):
            for seed in range(3):  # more log-determinants of the same parameters
                density_loss(layer, events(6, 3, seed=seed))
                found.append(layer.reconstruction.weight.weight.item() if sign else calls[-1])
            step(layer)
        assert found[0::3] == found[1::3] == found[2::3]
        assert found == sorted(found, reverse=sign < 0)
        assert len(set(found)) == 3
    assert calls == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dim", [1, 9, 784, None])
def test_default_controller_has_bounds_for_the_size_of_events(dim: int | None) -> None:
    shape = {"event_dim": 1} if dim is None else {"event_shape": dim}
    layer = SelfNormalizingPair(nn.PReLU(), nn.PReLU(), **shape)
    controller, root = layer.reconstruction.weight, (dim or 1000) ** 0.5
    assert controller.tolerance == pytest.approx(0.6)
    assert controller.weight.item() == pytest.approx(10 / root)
    for error, bound in [(0.0, 0.3 / root), (100.0, 10 / root)]:
        for _ in range(300):
            controller.update(torch.tensor(error))
        assert controller.weight.item() == pytest.approx(bound)


def test_controller_sees_the_largest_share_of_a_step_that_is_lost(rows: list[Tensor]) -> None:
    controller, pair, x = GECO(0.01, decay=0.0), bad_pair(), events(40, 3)
    f = Recorder(pair.forward_net)
    options = {"log_det": "exact", "reconstruction": {"weight": controller, "seed": 0}}
    layer = pair_of(f, pair.inverse_net, **options)
    num_known = NUM_OLD + MIN_NEW
    for size in (0.99, 1.01, 0.98):
        with torch.no_grad():
            next(pair.forward_net.parameters()).mul_(size)
        log_det_of(layer, x)
        sizes = [MIN_NEW, num_known, num_known]
        ends, starts, next_ends = f.inputs[-1].detach().split(sizes)
        starts, ends = torch.cat([x[rows[-1]], starts]), torch.cat([ends, next_ends])
        expected = lost_by_hand(pair, x, starts, ends).max().item() ** 2
        actual = layer.reconstruction.weight.mean_square_error.item()
        assert actual == pytest.approx(expected, rel=EXACT)
    assert controller.mean_square_error.item() == pytest.approx(0.01**2)  # the layer has a copy


@pytest.mark.parametrize(
    ("slope", "lost"), [(3.0, 0.0), (1.0, 0.0), (0.7, 0.3), (0.5, 0.5), (-1.0, 2.0)]
)
def test_steps_that_become_longer_do_not_raise_the_weight(slope: float, lost: float) -> None:
    # Of a step, g∘f loses 1 − slope. c is the same for the slopes 3 and −1, and is reduced.
    f, g = (nn.Linear(3, 3, bias=False) for _ in "fg")
    with torch.no_grad():
        f.weight.copy_(torch.eye(3))
        g.weight.copy_(slope * torch.eye(3))
    options = {"weight": GECO(0.4, decay=0.0), "seed": 0}
    layer = pair_of(f, g, log_det="learned", reconstruction=options)
    log_det_of(layer, events(40, 3)).sum().backward()
    controller = layer.reconstruction.weight
    assert controller.mean_square_error.sqrt().item() == pytest.approx(lost, rel=1e-2)
    assert (controller.weight.item() > 1) == (lost > 0.4)
    assert ((g.weight.grad.diagonal() * (slope - 1)) > 0).all() == (slope != 1)


@pytest.mark.filterwarnings("ignore:the pair is trained on numbers")
def test_contraction_has_no_units() -> None:
    pair, x, found = bad_pair(), events(40, 3), []
    for unit in (1.0, 1e-3, 1e3):
        f = Fixed(lambda x, unit=unit: pair.forward_net(x / unit - 5))
        g = Fixed(lambda y, unit=unit: unit * (pair.inverse_net(y) + 5))
        f.net, g.net = pair.forward_net, pair.inverse_net
        options = {"log_det": "exact", "reconstruction": {"seed": 0}}
        layer = pair_of(f, g, **options)
        layer.zero_grad()
        log_det_of(layer, unit * (x + 5)).sum().backward()
        found.append((layer.reconstruction.weight.mean_square_error.item(), gradients(pair)))
    for largest, gradient in found[1:]:
        assert largest == pytest.approx(found[0][0], rel=1e-6)  # rounding of small differences
        for name, one in gradient.items():
            assert is_close(one, found[0][1][name], 1e-6), name


@pytest.mark.parametrize(
    ("scale", "offset"), [(30.0, 0.0), (0.05, 0.0), (1.0, 30.0), (1.0, 9.0), (0.13, 3.0)]
)
@pytest.mark.parametrize("log_det", ["refined", "exact"])
def test_other_scales_than_one_are_warned_of_once(
    scale: float, offset: float, log_det: str
) -> None:
    x, layers = torch.randn(64, 2), [self_normalizing_pair(2, [8], log_det=log_det) for _ in "12"]
    density_loss(self_normalizing_pair(2, [8], log_det=log_det), x + 4)
    density_loss(layers[0], x)
    with pytest.warns(RuntimeWarning, match=r"a mean of .* put ActNorm\(…, event_dim=1\) before"):
        density_loss(layers[1], scale * x + offset)
    for layer in layers:  # a warning would be an error
        density_loss(layer, scale * x + offset)


def test_known_folds_raise_the_weight_and_are_warned_of_once() -> None:
    # Of x², which is 2:1, and of |det| alone: g is the inverse at each event on its own.
    f = Perturbed(Fixed(lambda x: x.square()), 1, 0.0)
    f.scale = nn.Parameter(torch.ones(()))
    layer = pair_of(f, nn.Linear(1, 1), 1, log_det="exact", reconstruction={})
    layer.reconstruction.weight.log_weight.fill_(0.0)  # at first, it is at its bound
    both, one = torch.tensor([[1.0], [-2.0]]), torch.tensor([[1.0], [2.0]])
    before = layer.reconstruction.weight.weight.item()
    with pytest.warns(RuntimeWarning, match="positive at 1 events and negative at 1, .* rises"):
        log_det_of(layer, both)
    assert layer.reconstruction.weight.weight.item() == pytest.approx(before * math.exp(0.1))
    step(layer)
    log_det_of(layer, both)  # pytest would make an error of another warning
    assert layer.reconstruction.weight.weight.item() == pytest.approx(before * math.exp(0.2))
    with pytest.warns(RuntimeWarning, match=r"positive at 1 .* train longer"):
        log_det_of(layer.eval(), both)
    log_det_of(layer, one)


def test_weight_is_that_of_the_penalty() -> None:
    pair, x, cotangent = bad_pair(), events(6, 3), torch.ones(6)
    expected = {number: penalty_gradients(pair, x, cotangent, number) for number in (0.7, 0.0, 1.0)}
    for weight, number in [
        (GECO(0.01, weight=0.7, rate=1e-15), 0.7),
        (lambda step: 0.7 - step, 0.7),
        (lambda step: torch.tensor(0.7), 0.7),
        (np.float64(0.7), 0.7),
        (lambda step: 0, 0.0),
    ]:
        assert_same(penalty_gradients(pair, x, cotangent, weight), expected[number])
    for value in (math.nan, math.inf, -1.0):
        layer = bad_pair(reconstruction={"weight": lambda step: value if step == 1 else 1.0})  # noqa: B023
        density_loss(layer, x)
        step(layer)
        message = rf"expected weight\(1\) to be a number >= 0; got {value}"
        with pytest.raises(ValueError, match=message):
            density_loss(layer, x)


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen"])
def test_nothing_moves_outside_training(how: str) -> None:
    calls: list[int] = []
    for weight in (GECO(0.01), lambda step: calls.append(step) or 1.0):
        layer = bad_pair(reconstruction={"weight": weight}).train(how != "eval")
        layer.requires_grad_(how != "frozen")
        before = copy.deepcopy(layer.state_dict())
        with torch.set_grad_enabled(how != "no_grad"):
            density_loss(layer, events(6, 3))
        # The error estimate is a NaN before the first step.
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert not calls


@pytest.mark.parametrize("log_det", SURROGATES)
def test_values_change_with_parameters_and_gradients_with_every_pass(log_det: str) -> None:
    layer, x = free_form(32, width=32, log_det=log_det, lanczos_steps=2), events(6, 32)
    values, found = [], []
    for _ in range(2):
        layer.zero_grad()
        values.append(log_det_of(layer, x.clone()))
        values[-1].sum().backward()
        found.append(gradients(layer)["forward_net.blocks.0.0.weight"])
    assert torch.equal(*values)
    assert not torch.equal(*found)
    # Of other parameters the probes are others: so is the error.
    errors = [values[0] - log_det_of(layer.eval(), x)]
    step(layer)
    errors.append(log_det_of(layer.train(), x) - log_det_of(layer.eval(), x))
    assert (errors[1] - errors[0]).norm() > 0.1 * errors[0].norm()


# --- What is cached, and how long ---------------------------------------------------------------


def test_one_pass_of_each_network_a_step_and_checks_of_few_events_once_in_each_mode() -> None:
    pair, x = bad_pair(), events(100, 3)
    f, g = Recorder(pair.forward_net), Recorder(pair.inverse_net)
    layer = pair_of(f, g)
    layer(x)
    assert all(len(one) <= 16 for one in f.inputs[:-1])
    for use in (lambda x: density_loss(layer, x), lambda x: log_det_of(layer, x).sum()):
        use(events(6, 3))
        f.inputs.clear()
        g.inputs.clear()
        use(events(6, 3)).backward()
        # x; and around it, and what is remembered.
        around = 6 + 2 * (NUM_OLD + 6)
        assert [len(one) for one in f.inputs] == [6, around]
        assert [len(one) for one in g.inputs] == [6, around]
    for mode in (True, False):
        layer.train(mode)
        layer(x.clone())
        f.inputs.clear()
        layer(x.clone())
        assert len(f.inputs) == 1


@EVERY_LOG_DET
def test_log_dets_can_be_differentiated_again_and_again(log_det: str) -> None:
    # Where no gradient passes y, the pair whose graph has been freed must be dropped all the same.
    layer, x = bad_pair(log_det=log_det), events(6, 3)
    for _ in range(3):
        log_det_of(layer, x).sum().backward()
    y = layer(x)
    layer.log_abs_det_jacobian(x, y).sum().backward()
    layer.log_abs_det_jacobian(x, layer(x)).sum().backward()
    y = layer(x)  # and several losses of one pass
    total = layer.log_abs_det_jacobian(x, y).sum() - y.square().sum()
    (total + layer.log_abs_det_jacobian(x, y).mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.forward_net.parameters())


@pytest.mark.parametrize("how", ["in place", "data", "replaced", "another parameter"])
@EVERY_LOG_DET
def test_log_det_after_a_change_of_the_parameters(log_det: str, how: str) -> None:
    # y is cached with the graph that it was computed by, which is not that of the new parameters.
    options = {} if log_det == "exact" else {"lanczos_steps": 3}
    layer = free_form(log_det=log_det, reconstruction={"trains": "inverse"}, **options)
    x, parameter = events(6, 3), layer.forward_net.blocks[0][2].weight
    y = layer(x)
    with torch.no_grad():
        if how == "replaced":
            parameter.data = -parameter.data
        elif how == "another parameter":  # as from Pyro's parameter store
            layer.forward_net.blocks[0][2].weight = nn.Parameter(-parameter)
        else:  # the data's changes do not move autograd's version counter
            (parameter if how == "in place" else parameter.data).mul_(-1)
    expected = log_det_of(Dense(layer.forward_net), x)
    if how == "in place":  # the others are seen at the next call of T alone
        value = layer.log_abs_det_jacobian(x, y)
        value.sum().backward()
        assert is_close(value, expected, EXACT)
    fresh = layer(x)
    assert is_close(fresh, layer.forward_net(x), EXACT)
    value = layer.log_abs_det_jacobian(x, fresh)
    assert is_close(value, expected, EXACT)
    (value + fresh.sum(1)).sum().backward()


@EVERY_LOG_DET
def test_graphs_do_not_accumulate(log_det: str) -> None:
    # Without the garbage collector: after the next step nothing is left of a step's tensors.
    layer, references = bad_pair(log_det=log_det), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    gc.collect()
    gc.disable()
    try:
        for index in range(3):
            x = events(6, 3, seed=index)
            y = layer(x)
            loss = y.square().sum() - layer.log_abs_det_jacobian(x, y).sum()
            loss = loss + layer.inv(events(6, 3)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            references.append([weakref.ref(one) for one in (x, y, loss)])
    finally:
        gc.enable()
    assert [one() for one in references[0] + references[1]] == [None] * 6
    layer = free_form(8, width=64, log_det=log_det)  # nor does a copy hold any
    small, x = len(pickle.dumps(layer)), events(5000, 8)
    log_det_of(layer, x)
    layer.inv(x)
    assert len(pickle.dumps(layer)) < 1.1 * small


# --- Networks of all kinds ----------------------------------------------------------------------


class _Smooth(torch.autograd.Function):
    """``x + 0.3 tanh x``, with a backward pass of its own, and nothing for forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + 0.3 * x.tanh()

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * (1 + 0.3 * (1 - x.tanh().square()))


class _SmoothOnce(_Smooth):
    """The same, with a backward pass that cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return _Smooth.backward(ctx, cotangent)


class Activated(nn.Module):
    """A dense layer near the identity, before a function; or a block of it beside the input."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], *, dim: int = 3, residual: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(dim) + 0.1 * events(dim, dim))
        self.function = function
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        result = self.function(self.linear(x))
        return x + 0.3 * result if self.residual else result


class Skip(nn.Module):
    """``x + 0.2 h(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.network(x)


def transformer() -> nn.Module:
    """A block with torch's fused attention."""
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)


def shrunk(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.3)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a function without forward mode": (lambda: Activated(_Smooth.apply), (3,)),
    "such a function in a residual block": (lambda: Activated(_Smooth.apply, residual=True), (3,)),
    "a transformer's block": (lambda: shrunk(transformer()), (3, 4)),
    "layer normalization, dropout of nothing": (
        lambda: Skip(nn.Linear(3, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3), nn.Dropout(0.0)),
        (3,),
    ),
    "a U-Net": (
        lambda: Skip(
            *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.GELU()),
            nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
        ),
        (2, 4, 4),
    ),
}


@EVERY_LOG_DET
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_all_kinds(kind: str, log_det: str) -> None:
    make, shape = NETWORKS[kind]
    dim, x = math.prod(shape), events(5, *shape)
    options = {} if log_det == "exact" else {"num_probes": dim, "lanczos_steps": dim}
    if log_det == "refined":
        options |= {"krylov_steps": dim, "tolerance": 1e-12}
    options |= {"log_det": log_det, "reconstruction": {"trains": "inverse"}}
    layer = pair_of(make(), make(), shape, **options)
    # In training: value and gradient are exact, but for the gradient of "learned".
    y = layer(x)
    value = layer.log_abs_det_jacobian(x, y)
    (y.square().sum() - value.sum()).backward()
    actual = {name: p.grad for name, p in parameters_of_f(layer).items()}
    layer.zero_grad()
    layer.eval()
    assert is_close(y, layer(x), EXACT)
    expected = log_det_of(layer, x)
    assert is_close(value, expected, EXACT)
    (layer(x).square().sum() - expected.sum()).backward()
    if log_det != "learned":
        for name, p in parameters_of_f(layer).items():
            assert is_close(actual[name], p.grad, 1e-7), name
    # Outside training.
    for one, logarithm in zip(x, expected, strict=True):
        jacobian = torch.autograd.functional.jacobian(layer, one).reshape(dim, dim)
        assert is_close(logarithm, torch.linalg.slogdet(jacobian).logabsdet, EXACT)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert is_close(log_det_of(layer, x.clone()), expected, EXACT)
            assert is_close(layer.inv(layer(x).clone()), x, 1e-7)


@EVERY_LOG_DET
def test_inverse_net_need_not_be_differentiable_twice(log_det: str) -> None:
    # Nor need it be a good inverse: Newton's method takes dense Jacobians then.
    layer = pair_of(Activated(_Smooth.apply), Activated(_SmoothOnce.apply), log_det=log_det)
    x = events(5, 3)
    density_loss(layer, x).backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert is_close(layer.inv(layer(x).detach().clone()), x, EXACT)


def test_parameters_are_not_needed() -> None:
    # Pairs of fixed maps: nothing is trained, and everything is exact.
    layer, x = pair_of(nn.Softsign(), nn.Identity(), 2), events(5, 2)
    expected = -2 * (1 + x.abs()).log().sum(1)
    assert is_close(log_det_of(layer, x), expected, EXACT)
    assert is_close(layer.inv(layer(x).clone()), x, EXACT)
    assert layer(x.float()).dtype == torch.float32


def test_g_alone_can_be_trained_and_parameters_may_be_shared() -> None:
    layer = bad_pair()
    layer.forward_net.requires_grad_(False)
    density_loss(layer, events(6, 3)).backward()
    assert all(p.grad is None for p in layer.forward_net.parameters())
    assert all((p.grad != 0).any() for p in layer.inverse_net.parameters())
    network, other = ResidualMLP(3, [4]), ResidualMLP(3, [4])
    other.blocks = network.blocks
    layer = pair_of(network, other)
    density_loss(layer, events(6, 3)).backward()
    assert len(list(layer.parameters())) == len(list(network.parameters()))
    assert torch.isfinite(network.blocks[0][2].weight.grad).all()


# --- Networks that do not fit -------------------------------------------------------------------


RANDOM = "to be deterministic; got "
MIXED = "to map each event independently; got "
SHAPE = r"to map a batch .* of the same shape \(\d+, 3\); got "

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)),
        RANDOM + r"NAME\.1, Dropout\(p=0\.1, inplace=False\), in training mode",
    ),
    "dropout of channels": (lambda: nn.Dropout1d(0.1), RANDOM + r"NAME, Dropout1d\(p=0\.1"),
    "alpha dropout": (lambda: nn.AlphaDropout(0.1), RANDOM + r"NAME, AlphaDropout\(p=0\.1"),
    "random slopes": (lambda: nn.RReLU(), RANDOM + "NAME, RReLU"),
    "dropout in a start as the identity": (
        lambda: ResidualMLP(3, [4], activation=lambda: nn.Dropout(0.5)),
        RANDOM + r"NAME\.blocks\.0\.1, Dropout",
    ),
    "batch normalization": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        MIXED + r"NAME\.1, BatchNorm1d\(3, .* put it into eval\(\) mode",
    ),
    "batch normalization without statistics": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
        MIXED + "NAME, BatchNorm1d",
    ),
    "hidden dropout": (
        lambda: Activated(partial(F.dropout, p=0.5, training=True)),
        RANDOM + "another output for the same event: does it contain dropout",
    ),
    "noise": (lambda: Activated(lambda x: x + torch.randn_like(x)), RANDOM + "another output"),
    "hidden statistics": (
        lambda: Activated(lambda x: x - x.mean(0)),
        MIXED + "another output beside other events: does it normalize",
    ),
    "more outputs": (lambda: nn.Linear(3, 4), SHAPE + r"\(\d+, 4\)"),
    "fewer outputs": (lambda: nn.Linear(3, 1), SHAPE + r"\(\d+, 1\)"),
    "flat outputs": (lambda: nn.Flatten(0), SHAPE + r"\(\d+,\)"),
    "two outputs": (lambda: Activated(lambda x: (x, x)), SHAPE + "tuple"),
    "no output": (lambda: Activated(lambda x: None), SHAPE + "NoneType"),
    "other inputs": (lambda: nn.Linear(4, 3), r"to take batches of events of shape \(3,\); got: "),
    "a context": (
        lambda: nn.Bilinear(3, 2, 3),
        r"to take batches of events of shape \(3,\); got: ",
    ),
}


@pytest.mark.parametrize("which", ["forward_net", "inverse_net"])
@pytest.mark.parametrize("kind", REFUSED)
def test_networks_that_do_not_fit_are_refused(kind: str, which: str) -> None:
    make, message = REFUSED[kind]
    message = f"expected {which} " + message.replace("NAME", which)
    networks = {"forward_net": nn.Linear(3, 3), "inverse_net": nn.Linear(3, 3), which: make()}
    layer = SelfNormalizingPair(**networks, event_shape=3, log_det="refined")
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    # Whatever the batch, and not only the first time.
    for x in (events(6, 3), *(torch.zeros(count, 3) for count in (1, 2, 20))):
        assert_refused(layer, x, message)
    assert torch.equal(torch.get_rng_state(), state)
    # Nor have statistics of batches been updated.
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_attention_with_dropout_is_refused() -> None:
    class Attending(nn.MultiheadAttention):  # whose dropout is no module
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x, x, x)[0]

    layer = pair_of(Attending(4, 2, dropout=0.5, batch_first=True), transformer(), (3, 4))
    with pytest.raises(ValueError, match="expected forward_net " + RANDOM):
        layer(events(5, 3, 4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [nn.BatchNorm1d(3), nn.Dropout(0.5), nn.RReLU()], ids=str)
def test_layers_that_fit_in_eval_mode(last: nn.Module, training: bool) -> None:
    f, g = (nn.Sequential(nn.Linear(3, 3), copy.deepcopy(last).double()) for _ in range(2))
    layer, x = pair_of(f, g).eval(), events(6, 3)
    if training:  # the layer is trained, and these parts of its networks are not
        layer.train()
        f[1].eval()
        g[1].eval()
    y = layer(x)
    value = layer.log_abs_det_jacobian(x, y)
    (y.sum() - value.sum()).backward()
    if not training:
        jacobian = torch.autograd.functional.jacobian(lambda x: f(x).sum(0), x).movedim(1, 0)
        assert is_close(value, torch.linalg.slogdet(jacobian).logabsdet, EXACT)
    layer.train()
    with pytest.raises(ValueError, match="expected forward_net to "):
        layer(x)


def test_check_ignores_what_is_not_finite() -> None:
    layer, x = free_form(), events(6, 3)
    x[0] = math.nan
    x[1, 0] = math.inf
    assert is_close(layer(x)[2:], layer.forward_net(x[2:]), EXACT)


TWICE = "expected forward_net to be twice differentiable"


@pytest.mark.parametrize("residual", [False, True])
@EVERY_LOG_DET
def test_function_that_is_differentiable_once_is_refused(log_det: str, residual: bool) -> None:
    # Torch may lose such a derivative without an error: the gradient would be wrong.
    f = Activated(_SmoothOnce.apply, residual=residual)
    same = Activated(lambda x: x + 0.3 * x.tanh(), residual=residual)
    same.load_state_dict(f.state_dict())
    layer, x = pair_of(f, Activated(_Smooth.apply), log_det=log_det), events(5, 3)
    with pytest.raises(ValueError, match=TWICE):
        layer(x)
    # The value and the inverse need the first derivative alone.
    layer.eval()
    with torch.no_grad():
        assert is_close(log_det_of(layer, x), log_det_of(Dense(same), x), EXACT)
        assert is_close(layer.inv(layer(x).clone()), x, EXACT)
    with pytest.raises(ValueError, match=TWICE):
        log_det_of(layer, x)


def test_function_whose_backward_pass_fails_is_refused_in_training() -> None:
    class NoSecond(_Smooth):
        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError("no second derivative of this")
            return _Smooth.backward(ctx, cotangent)

    layer = pair_of(Activated(NoSecond.apply), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=TWICE + ".*got: no second derivative of this"):
        layer(events(5, 3))


# --- Options and inputs -------------------------------------------------------------------------


def make_pair(**options: object) -> SelfNormalizingPair:
    networks = {name: nn.Linear(3, 3) for name in ("forward_net", "inverse_net")}
    return SelfNormalizingPair(**{**networks, "event_shape": 3, **options})


#: What test_bad_input.py leaves out: options, what they may be, and values that are not.
OPTIONS: list[tuple[Callable[..., object], str, str, list[object]]] = [
    (PairRefined, "krylov_steps", ", an integer >= 1", [0, 1.5]),
    *[(one, "lanczos_steps", ", an integer >= 0", [-1, 2.0]) for one in (PairLearned, PairRefined)],
    *[
        (one, "seed", ", an integer in [0, 2**63)", [-1, 1.5])
        for one in (PairRefined, Reconstruction)
    ],
    (PairLearned, "num_probes", ", an integer >= 1", [0, 2.5, True]),
    (PairRefined, "probe", " to be one of ('gaussian', ", ["uniform", None]),
    (make_pair, "log_det", " to be ", [False, PairExact]),
    (make_pair, "event_shape", ", integers >= 1", [0, (3, -1), (), 2.0, "3"]),
    (partial(make_pair, event_shape=None), "event_dim", ", an integer >= 1", [0, -1, 1.0, True]),
    (make_pair, "forward_net", ", a torch.nn.Module", [torch.tanh, None, nn.Linear]),
    (make_pair, "inverse_net", ", a torch.nn.Module", [torch.tanh, None, nn.Linear]),
]


@pytest.mark.parametrize(
    ("make", "option", "expected", "value"),
    [(make, name, expected, value) for make, name, expected, values in OPTIONS for value in values],
)
def test_option_is_checked(make: Callable, option: str, expected: str, value: object) -> None:
    message = f"{re.escape(f'expected {option}{expected}')}.*; got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        make(**{option: value})


def test_options_that_do_not_fit_each_other() -> None:
    by_dim = {"event_shape": None, "event_dim": 1}
    for event, got in [({"event_shape": None}, "None, None"), ({"event_dim": 1}, "3, 1")]:
        message = rf"expected exactly one of event_shape and event_dim; got \({got}\)"
        with pytest.raises(ValueError, match=message):
            make_pair(**event)
    with pytest.raises(ValueError, match="expected two networks; got the same; got Identity"):
        SelfNormalizingPair(*[nn.Identity()] * 2, event_shape=3)
    for event, method in itertools.product([{}, by_dim], [PairRefined, PairLearned]):
        layer = make_pair(log_det=method(num_probes=4), **event)
        with pytest.raises(ValueError, match=r"expected num_probes <= D = 3 .*; got 4"):
            log_det_of(layer, events(5, 3))
        log_det_of(layer.eval(), events(5, 3))  # where no probes are drawn


INPUTS = [
    *[
        (torch.zeros(shape), rf"shape \(\.\.\., 3\); got {re.escape(str(shape))}")
        for shape in [(4,), (2, 4), (3, 1), (3, 5, 2), (), (0, 3), (2, 0, 3)]
    ],
    *[
        (torch.ones(2, 3, dtype=dtype), rf"{expected}; got {dtype}")
        for expected, dtypes in [
            ("a floating-point tensor", [torch.int64, torch.complex64]),
            (r"dtype torch\.float64", [torch.float32, torch.bfloat16]),
        ]
        for dtype in dtypes
    ],
    *[([1.0, 2.0, 3.0], "a floating-point tensor; got list"), (None, "tensor; got NoneType")],
]


@pytest.mark.parametrize(("value", "message"), INPUTS)
def test_input_is_checked(value: object, message: str) -> None:
    expected = rf"SelfNormalizingPair\({{}}, .*expected .*{message}"
    assert_refused(free_form(), value, expected.format(r"\(3,\)"))
    if "shape" not in message:
        by_dim = make_pair(event_shape=None, event_dim=1)
        assert_refused(by_dim, value, expected.format("event_dim=1"))


def test_input_of_too_few_dimensions_is_refused() -> None:
    message = r"SelfNormalizingPair\(event_dim=3, .*expected at least 3 dimensions; got \(2, 4\)"
    assert_refused(make_pair(event_shape=None, event_dim=3), torch.zeros(2, 4), message)


def test_repr_names_the_shape_the_method_and_the_value_in_training() -> None:
    for options, expected in [
        ({}, r"\(3,\), log_det=PairExact\(\), inverse='iterative', training_value='exact'"),
        ({"event_shape": 4}, r"\(4,\), log_det=PairRefined\(num_probes=1, .*\), inverse="),
        ({"event_shape": (1, 1, 3)}, r"\(1, 1, 3\), log_det=PairExact"),
        ({"event_shape": (2, 2)}, r"\(2, 2\), log_det=PairRefined"),
        ({"event_shape": None, "event_dim": 1}, "event_dim=1, log_det=PairRefined"),
        ({"log_det": "refined"}, r"\(3,\), log_det=PairRefined\(num_probes=1, .*\), inverse="),
        ({"event_shape": None, "event_dim": 2}, "event_dim=2, log_det="),
        ({"log_det": "learned"}, "training_value='0'"),
        ({"log_det": PairLearned(lanczos_steps=2)}, "training_value='estimate'"),
        ({"log_det": PairRefined(lanczos_steps=0)}, "training_value='0'"),
        ({"log_det": "exact"}, "training_value='exact'"),
        ({"reconstruction": Reconstruction(3.0)}, r"reconstruction=Reconstruction\(3\.0, trains="),
    ]:
        assert re.search(expected, repr(make_pair(**options)))


# --- Inside Pyro --------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("log_det", SURROGATES)
def test_elbo_gradient_is_the_exact_one(log_det: str, program: Callable, elbo: str) -> None:
    # Subsampled plates, scales, particles; the layer as guide, prior and density.
    results = []
    for mode in (log_det, "exact"):
        probes = {} if mode == "exact" else {"num_probes": 3, "lanczos_steps": 3}
        layer = exact_pair(3, log_det=mode, **probes)
        loss, found = elbo_gradients(*program(layer), layer, ELBOS[elbo]())
        named = {name: one for name, one in found.items() if name.startswith("forward_net")}
        results.append((loss, named))
    (loss, actual), (exact_loss, expected) = results
    assert_gradients_equal(actual, expected)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=EXACT)


def banana(count: int, seed: int = 0) -> Tensor:
    """``x₁ ~ N(0, 1)``, ``x₂ = (x₁² − 1)/2 + 0.3 ε``."""
    first, noise = events(2, count, seed=seed)
    return torch.stack([first, (first.square() - 1) / 2 + 0.3 * noise], dim=1)


@EVERY_LOG_DET
def test_density_model_learns_what_is_not_gaussian(log_det: str) -> None:
    torch.manual_seed(3)
    layer = self_normalizing_pair(2, [32], log_det=log_det)
    density = dist.TransformedDistribution(standard_normal(2), [layer.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / 250))
    for index in range(250):
        loss = -density.log_prob(banana(128, seed=index)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    unseen = banana(2000, seed=-1)
    with torch.no_grad():
        score = density.log_prob(unseen).mean().item()
        best = -math.log(2 * math.pi) - 1 - math.log(0.3)  # the entropy's negative
        gaussian = dist.MultivariateNormal(unseen.mean(0), unseen.mT.cov())
        # Most of what a Gaussian leaves; 0.82 to 0.90 were seen with four seeds.
        baseline = gaussian.log_prob(unseen).mean().item()
        assert score - baseline > 0.7 * (best - baseline)
        assert score < best + 0.05

        # It is a density: it integrates to 1.
        axes = torch.linspace(-5, 5, 200), torch.linspace(-3, 10, 200)
        grid = torch.cartesian_prod(*axes)
        cell = (10 / 199) * (13 / 199)
        assert density.log_prob(grid).exp().sum().item() * cell == pytest.approx(1, abs=INTEGRAL)

        # And samples, which the inverse computes, are of that density.
        samples = density.sample((2000,))
        assert layer.convergence.num_converged == 2000
        moment = (samples[:, 0].square() * samples[:, 1]).mean()
        assert moment.item() == pytest.approx(1.0, abs=0.4)  # E[x₁² (x₁² − 1)/2] = 1


def trained_on(data: Tensor, num_steps: int, rate: float, **options: object) -> SelfNormalizingPair:
    """A pair at its defaults, after some steps of plain Adam."""
    torch.manual_seed(0)
    layer = self_normalizing_pair(data.shape[1], **options)
    density = dist.TransformedDistribution(standard_normal(data.shape[1]), [layer.inv])
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-density.log_prob(data[torch.randint(len(data), (64,))]).mean()).backward()
        optimizer.step()
    return layer


def test_gap_between_modes_does_not_fold() -> None:
    noise = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    data = 0.1 * (torch.tensor([[-2.0], [2.0]]).repeat(500, 1) + 0.2 * noise)
    layer = trained_on(data, 120, 5e-3, log_det="exact")
    grid = torch.linspace(-1.2, 1.2, 20_001).unsqueeze(1)
    density = dist.TransformedDistribution(standard_normal(1), [layer.inv])
    with torch.no_grad():
        mass = density.log_prob(grid).exp().sum().item() * 2.4 / 20_000
    assert mass == pytest.approx(1, abs=0.005)


def test_densities_of_images_do_not_fold() -> None:
    images = torch.from_numpy(load_digits().data).to(torch.get_default_dtype())
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    images = (images + noise - images.mean(0)) / 5
    layer = trained_on(images[:1500], 60, 5e-3)
    test = images[1500:1540]
    x = torch.cat([test, (test + test.roll(1, 0)) / 2])
    with torch.no_grad():
        log_det_of(layer, x)  # pytest would make an error of the warning of a fold
        assert is_close(layer.inv(layer(x).clone()), x, 1e-6)


def test_stack_of_pairs_and_other_layers() -> None:
    last = exact_pair(3, seed=1, log_det="learned", num_probes=3).inv
    middle = [SmoothLeakyReLU(0.3, learnable=True), linear(3, log_det="exact")]
    stack, results = Compose([exact_pair(3, num_probes=3), *middle, last]), []
    for training in (True, False):  # outside training the gradient is exact
        stack.train(training)
        stack.zero_grad()
        x = events(6, 3).requires_grad_()
        density_by_inverse(stack, x).mean().backward()
        found = {name: one for name, one in gradients(stack).items() if "inverse_net" not in name}
        results.append({"x": x.grad, **found})
    assert_gradients_equal(*results)
    y = stack(events(6, 3)).detach().clone()
    assert is_close(stack(stack.inv(y).detach()), y, EXACT)


@pytest.mark.usefixtures("_jit_may_warn")
@pytest.mark.parametrize("part", ["log-det", "inverse"])
def test_trace_is_refused(part: str) -> None:
    # Its derivatives would be constants: those of the first step, at every step.
    layer, data = free_form(), events(6, 3)
    transform = layer.inv if part == "log-det" else layer

    def model() -> None:
        pyro.module("flow", layer)
        with pyro.plate("data", 6):
            pyro.sample(
                "x", dist.TransformedDistribution(standard_normal(3), [transform]), obs=data
            )

    with pytest.raises(
        RuntimeError, match=r"torch\.jit, .* cannot record the derivatives of a network"
    ):
        JitTrace_ELBO(ignore_jit_warnings=True).loss_and_grads(model, lambda: None)
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda x: layer(x), data, check_trace=False)
    assert is_close(traced(data), layer(data), EXACT)  # T(x) takes no derivatives
