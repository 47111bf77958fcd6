"""Recorded gradients of single samples, against autograd; and R, which follows changes of W."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from torch import Tensor, nn

from pyro_snf import AutoSelfNormalizingFlow, SelfNormalizingLinear
from pyro_snf.diagnostics import gradient_error, inverse_error
from pyro_snf.recording import Recording, Samples
from tests.registry import COPIES, exact_log_det, is_close, linear, standard_normal
from tests.test_guides import Recorder, Switch, created
from tests.test_guides import random as random_guide
from tests.test_pyro import Conjugate

# Float64, the same operations in another order; condition numbers below 10.
EXACT = 1e-9
# Float32, after some hundred changes that are each right to rounding, 1e-7: errors add up.
SINGLE = 1e-3

# A check sees the error along one direction: it is up to this many times the tolerance, 0.02.
SLACK = 3.0

# More changes than R follows before it is checked for rounding, 64.
NUM_CHANGES = 150

LOG_DETS = ["refined", "exact"]
GRADIENTS = ["path", "total"]

Gradients = dict[str, Tensor | None]


def plates() -> None:
    """Latent variables and data in plates, of a density that is not Gaussian."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        data = torch.arange(6.0).reshape(2, 3)
        pyro.sample("y", dist.StudentT(3.0, z, scale), obs=data)


MODELS: dict[str, Callable[[], Any]] = {"conjugate": Recorder, "plates": lambda: plates}

OBJECTIVES: dict[str, Any] = {
    "one particle": infer.Trace_ELBO(),
    "loop": infer.Trace_ELBO(num_particles=5),
    "vectorized": infer.Trace_ELBO(5, max_plate_nesting=2, vectorize_particles=True),
    "mean field": infer.TraceMeanField_ELBO(5, max_plate_nesting=2, vectorize_particles=True),
    "graph": infer.TraceGraph_ELBO(num_particles=5),
}


def backward(
    guide: Any, model: Any, loss: Any = OBJECTIVES["vectorized"], program: Any = None
) -> tuple[float, Gradients]:
    """The loss, and the gradients of a backward pass, from the samples of a given seed."""
    guide.zero_grad()
    pyro.set_rng_seed(4)
    value = loss.loss_and_grads(model, guide if program is None else program)
    return value, {name: parameter.grad for name, parameter in guide.named_parameters()}


def recorded(guide: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[float, Gradients, Samples]:
    """The same with a recording that bounds nothing, and what is in it."""
    recording = Recording(math.inf)
    guide.record(recording)
    value, gradients = backward(guide, model, *args, **kwargs)
    samples = recording.take()
    guide.record(None)
    return value, gradients, samples


def path_derivative(guide: Any, *args: Any) -> Gradients:
    """Those of a guide's path derivative, whichever gradient the guide has."""
    kept, guide.gradient = guide.gradient, "path"
    _, gradients = backward(guide, *args)
    guide.gradient = kept
    return gradients


def relative_gradients(guide: Any, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """``Wᵀ ∂L/∂W`` and ``Wᵀ ∂L/∂b``, from those of Θ and b."""
    layer, name = guide.last_layer, last_name(guide)
    weight = layer.weight.detach()
    by_theta, by_bias = gradients[f"{name}.theta"], gradients[f"{name}.bias"]
    assert by_theta is not None
    assert by_bias is not None
    by_weight = math.sqrt(len(weight)) * torch.exp(-layer.log_scale.detach())[:, None] * by_theta
    return weight.mT @ by_weight, weight.mT @ by_bias


def last_name(guide: Any) -> str:
    return f"transform.{guide.num_layers - 1}"


def split(guide: Any, gradients: Gradients) -> tuple[Gradients, Gradients]:
    """Those of the last layer, and those of the layers before it."""
    name = f"{last_name(guide)}."
    last = {key: value for key, value in gradients.items() if key.startswith(name)}
    return last, {key: value for key, value in gradients.items() if key not in last}


def assert_equal(actual: Gradients, expected: Gradients, tolerance: float = EXACT) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert is_close(actual[name], gradient, tolerance), name


def make(model: Any, num_layers: int = 2, **options: Any) -> Any:
    """A random guide whose gradients are not clipped."""
    return random_guide(model, num_layers, clip=None, **options)


# --- The rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_sum_to_the_gradient_of_the_weight(
    objective: str, model_name: str, gradient: str, num_layers: int
) -> None:
    model, loss = MODELS[model_name](), OBJECTIVES[objective]
    guide = make(model, num_layers, gradient=gradient)
    backward(guide, model, loss)  # the first one looks for plates, and draws numbers
    matrix, vector = relative_gradients(guide, path_derivative(guide, model, loss))
    _, _, samples = recorded(guide, model, loss)
    count = len(samples.inputs)
    assert count == loss.num_particles
    assert is_close(samples.gradients.mT @ samples.inputs / count, matrix)
    assert is_close(samples.gradients.mean(0), vector)


def test_scores_are_those_of_the_input() -> None:
    guide = make(Recorder(), 1)
    _, _, samples = recorded(guide, Recorder())
    assert is_close(samples.scores, -samples.inputs)  # standard normal
    guide = make(Recorder(), 2)
    _, _, samples = recorded(guide, Recorder())
    before = dist.TransformedDistribution(
        standard_normal(guide.latent_dim), [guide.transform.parts[0]]
    )
    h = samples.inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(before.log_prob(h).sum(), h)
    assert is_close(samples.scores, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_row_is_the_gradient_of_its_sample(gradient: str) -> None:
    model = Recorder()
    guide = make(model, 2, gradient=gradient)
    _, _, samples = recorded(guide, model)
    layer = guide.transform.eval().parts[-1]
    x = layer(samples.inputs).detach().requires_grad_()
    assert is_close(model.values[-1].reshape(x.shape), x)  # samples that the model has seen
    loss = guide.get_posterior().log_prob(x) - model.log_joint(x)
    (by_x,) = torch.autograd.grad(loss.sum(), x)
    assert is_close(samples.gradients, by_x @ layer.weight)


def in_order(samples: Samples) -> Tensor:
    """The gradients, in an order that does not depend on that of the backward pass."""
    return samples.gradients[samples.gradients[:, 0].argsort()]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("objective", ["loop", "vectorized"])
def test_rows_are_in_units_of_the_weights(objective: str, gradient: str) -> None:
    model, loss = Recorder(), OBJECTIVES[objective]
    guide = make(model, gradient=gradient)
    _, _, expected = recorded(guide, model, loss)
    scaled, program = (poutine.scale(each, 1e-3) for each in (model, guide))
    _, _, found = recorded(guide, scaled, loss, program)
    assert is_close(in_order(found), in_order(expected))

    class Scaled:
        def loss_and_grads(self, model: Any, guide: Any) -> float:
            value = 1e3 * loss.differentiable_loss(model, guide)
            value.backward()
            return value.item()

    _, _, found = recorded(guide, model, Scaled())
    assert is_close(in_order(found), in_order(expected))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_model_alone_scaled_is_another_posterior(gradient: str) -> None:
    # As data are, in a subsampled plate.
    model = Recorder()
    guide = make(model, 1, gradient=gradient)
    scaled = poutine.scale(model, 3.0)
    matrix, vector = relative_gradients(guide, path_derivative(guide, scaled))
    _, _, samples = recorded(guide, scaled)
    assert is_close(samples.gradients.mT @ samples.inputs / 5, matrix)
    assert is_close(samples.gradients.mean(0), vector)


def test_enumerated_site() -> None:
    model = Switch()
    guide = make(poutine.block(model, hide=["k"]), 2)
    loss = infer.TraceEnum_ELBO(5, max_plate_nesting=0, vectorize_particles=True)
    matrix, vector = relative_gradients(guide, backward(guide, model, loss)[1])
    _, _, samples = recorded(guide, model, loss)
    assert is_close(samples.gradients.mT @ samples.inputs / 5, matrix)
    assert is_close(samples.gradients.mean(0), vector)


def test_rows_vanish_at_the_posterior() -> None:
    model = Recorder()
    guide = created(model, 1)
    guide.last_layer.load_state_dict(model.optimal().state_dict())
    _, _, samples = recorded(guide, model)
    assert samples.gradients.abs().max() < EXACT
    assert samples.inputs.abs().min() > 0


def test_calls_add_up_until_they_are_taken() -> None:
    model = Recorder()
    guide, recording = make(model), Recording(math.inf)
    guide.record(recording)
    for _ in range(3):
        backward(guide, model)
    assert len(recording) == 15
    inputs = recording.take().inputs
    assert is_close(inputs[:5], inputs[5:10])  # from the same seed
    assert len(recording) == 0


def test_recording_that_nobody_reads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_snf.recording._MAX_CALLS", 3)
    model = Recorder()
    guide, recording = make(model), Recording(math.inf)
    guide.record(recording)
    for _ in range(3):
        backward(guide, model)
    with pytest.raises(RuntimeError, match="a NaturalGradient that makes no steps"):
        backward(guide, model)


# --- What the recording leaves alone ------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("objective", ["loop", "vectorized"])
def test_gradients_before_the_layer_and_the_loss_are_the_same(
    objective: str, model_name: str, gradient: str, num_layers: int
) -> None:
    model, loss = MODELS[model_name](), OBJECTIVES[objective]
    guide = make(model, num_layers, gradient=gradient)
    backward(guide, model, loss)
    value, expected = backward(guide, model, loss)
    found_value, found, _ = recorded(guide, model, loss)
    assert found_value == pytest.approx(value, rel=EXACT)
    last, before = split(guide, found)
    assert len(last) == 3
    assert all(gradient is None for gradient in last.values())
    assert_equal(before, split(guide, expected)[1])
    assert len(before) == {1: 0, 2: 4, 3: 7}[num_layers]


def test_long_gradients_are_shortened_before_the_layer_only() -> None:
    model, longest = Recorder(), 20.0
    guide = make(model)
    _, _, samples = recorded(guide, model)
    lengths = samples.gradients.norm(dim=-1, keepdim=True) / 2  # √D = 2
    assert lengths.min() < longest < lengths.max()
    recording = Recording(longest)
    guide.record(recording)
    _, found = backward(guide, model)
    assert is_close(recording.take().gradients, samples.gradients)
    # The oracle: the layers before, with these gradients of the samples at their output.
    cut = samples.gradients * (longest / lengths).clamp(max=1.0) / 5
    before = guide.transform.parts[0]
    with torch.no_grad():
        z = before.inv(samples.inputs)
    score = torch.autograd.grad(before(z), list(before.parameters()), cut)
    names = [f"transform.0.{name}" for name, _ in before.named_parameters()]
    expected = dict(zip(names, score, strict=True))
    assert_equal(split(guide, found)[1], expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_as_before_without_the_recording(gradient: str) -> None:
    model = Conjugate()
    guide = make(model, gradient=gradient)
    _, expected = backward(guide, model)
    recording = Recording(math.inf)
    guide.record(recording)
    assert split(guide, backward(guide, model)[1])[0].popitem()[1] is None
    del recording
    gc.collect()
    assert_equal(backward(guide, model)[1], expected)


@pytest.mark.parametrize("make_copy", COPIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["fresh", "called"])
def test_copies_carry_no_recording(make_copy: Callable[[Any], Any], when: str) -> None:
    model = Recorder()
    guide = make(model)
    _, expected = backward(guide, model)
    recording = Recording(math.inf)
    guide.record(recording)
    if when == "called":  # there is a recorded call in the layer's cache
        guide()
        backward(guide, model)
        recording.clear()
    other = make_copy(guide)
    pyro.clear_param_store()
    assert_equal(backward(other, model)[1], expected)
    assert len(recording) == 0
    backward(guide, model)
    assert len(recording) == 5


def test_copy_of_the_layer_carries_no_recording() -> None:
    layer, recording = linear(3), Recording(math.inf)
    layer.recording.set(recording)
    assert copy.deepcopy(layer).recording.get() is None
    assert layer.recording.get() is recording


@pytest.mark.parametrize("how", ["eval", "frozen", "no_grad"])
def test_only_training_is_recorded(how: str) -> None:
    model = Recorder()
    guide = make(model)
    recording = Recording(math.inf)
    guide.train(how != "eval")
    if how == "frozen":
        guide.last_layer.requires_grad_(False)
    _, expected = backward(guide, model)
    guide.record(recording)
    if how == "no_grad":
        with torch.no_grad():
            assert not guide()["z"].requires_grad
            OBJECTIVES["vectorized"].loss(model, guide)
    else:
        _, found = backward(guide, model)
        last, before = split(guide, found)
        assert_equal(before, split(guide, expected)[1])
        if how == "eval":
            assert_equal(last, split(guide, expected)[0])
    assert len(recording) == 0


def test_recording_may_precede_the_first_call() -> None:
    model = Recorder()
    guide, recording = AutoSelfNormalizingFlow(model), Recording(math.inf)
    guide.record(recording)
    backward(guide, model)
    assert len(recording) == 5
    fresh = AutoSelfNormalizingFlow(model)
    fresh.record(recording)
    fresh.load_state_dict(guide.state_dict())  # creates the flow
    recording.clear()
    pyro.clear_param_store()
    backward(fresh, model)
    assert len(recording) == 5


@pytest.mark.parametrize("is_recorded", [False, True])
def test_unequal_weights_are_an_error(is_recorded: bool) -> None:
    model = Recorder()
    guide, recording = make(model, gradient="path"), Recording(math.inf)
    guide.record(recording if is_recorded else None)
    renyi = infer.RenyiELBO(0.5, 5, max_plate_nesting=0, vectorize_particles=True)
    with pytest.raises(RuntimeError, match="use gradient='total' instead"):
        backward(guide, model, renyi)


# --- Changes of W that R follows ----------------------------------------------------------------


def log_det(layer: SelfNormalizingLinear) -> float:
    """In training."""
    x = torch.zeros(layer.input_dim, dtype=layer.theta.dtype)
    return layer.log_abs_det_jacobian(x, x).item()


def factors(dim: int, rank: int, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Pᵀ and Qᵀ with ``‖PQᵀ‖₂ ≤ size``."""
    left, right = torch.randn(rank, dim), torch.randn(rank, dim)
    norm = torch.linalg.matrix_norm(left.mT @ right, 2)
    return left * (size / norm), right


def change(layer: SelfNormalizingLinear, index: int) -> None:
    """A random change and a shift; then a part of it back, so that W's condition stays."""
    dim, dtype = layer.input_dim, layer.theta.dtype
    left, right = factors(dim, 1 + index % 4)
    layer.multiply_input(left.to(dtype), right.to(dtype))
    layer.shift_input(torch.randn(dim, dtype=dtype))
    if index % 2:
        small = torch.eye(len(left)) + right @ left.mT
        undo = -torch.linalg.solve(small.mT, left)  # (I + PQᵀ)⁻¹ = I − P (I + QᵀP)⁻¹ Qᵀ
        layer.multiply_input(undo.to(dtype), right.to(dtype))
        layer.balance(1.05)


@pytest.mark.parametrize("log_det_name", LOG_DETS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_multiply_input_is_its_formula(rank: int, log_det_name: str) -> None:
    layer = linear(5, log_det=log_det_name)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    left, right = factors(5, rank)
    layer.multiply_input(left, right)
    assert is_close(layer.weight, weight @ (torch.eye(5) + left.mT @ right))
    assert torch.equal(layer.bias, bias)


def test_shift_input_is_its_formula() -> None:
    layer, shift = linear(5), torch.randn(5)
    x = torch.randn(3, 5)
    expected = layer(x + shift)
    layer.shift_input(shift)
    assert is_close(layer(x), expected)


@pytest.mark.parametrize("log_det_name", LOG_DETS)
def test_balance_keeps_the_weight_and_gives_rows_of_length_1(log_det_name: str) -> None:
    layer = linear(5, log_det=log_det_name)
    with torch.no_grad():
        layer.multiply_input(10 * torch.eye(5), torch.eye(5))
    weight, log_scale = layer.weight.detach().clone(), layer.log_scale.detach().clone()
    layer.balance(1e6)  # nothing is out of these bounds
    assert torch.equal(layer.log_scale, log_scale)
    layer.balance(2.0)
    assert is_close(layer.weight, weight)
    assert is_close(layer.log_scale.exp(), weight.norm(dim=-1))


@pytest.mark.parametrize("log_det_name", LOG_DETS)
@pytest.mark.parametrize("dim", [1, 6, 40])
def test_rotate_input_is_its_formula(dim: int, log_det_name: str) -> None:
    layer = linear(dim, log_det=log_det_name)
    start = layer.weight.detach().clone()
    for index in range(10):
        change(layer, index)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    log_scale, value = layer.log_scale.detach().clone(), log_det(layer)
    before = layer.num_refactorizations
    layer.rotate_input(start)
    rotated = layer.weight.detach()
    # W Q, for an orthogonal Q: the Gaussian of x is the same.
    assert is_close(rotated @ rotated.mT, weight @ weight.mT)
    triangle = torch.linalg.solve(start, rotated)
    assert is_close(triangle.tril(), triangle)
    assert (triangle.diagonal() > 0).all()
    assert torch.equal(layer.bias, bias)
    assert torch.equal(layer.log_scale, log_scale)
    assert log_det(layer) == pytest.approx(value, abs=EXACT)
    assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=EXACT)
    assert is_close(layer.inverse_weight @ rotated, torch.eye(dim))
    if log_det_name == "refined":
        assert layer.num_refactorizations == before + 1
    layer.rotate_input(start)  # it is triangular already
    assert is_close(layer.weight, rotated)
    change(layer, 0)
    assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=EXACT)


def test_rotate_input_by_a_matrix_of_its_own_is_the_identity_there() -> None:
    layer = linear(6)
    weight = layer.weight.detach().clone()
    layer.rotate_input(weight)
    assert is_close(layer.weight, weight)


def test_rotate_input_in_single_precision() -> None:
    layer = linear(24).float()
    start = layer.weight.detach().clone()
    for index in range(10):
        change(layer, index)
    weight = layer.weight.detach().clone()
    layer.rotate_input(start)
    rotated = layer.weight.detach()
    assert rotated.dtype == torch.float32
    assert is_close(rotated @ rotated.mT, weight @ weight.mT, 1e-5)
    assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=1e-5)
    assert inverse_error(layer) < 1e-5


@pytest.mark.parametrize("log_det_name", LOG_DETS)
@pytest.mark.parametrize("dim", [1, 6, 40])
def test_log_det_follows_many_changes(dim: int, log_det_name: str) -> None:
    layer = linear(dim, log_det=log_det_name)
    before = layer.num_refactorizations
    for index in range(NUM_CHANGES):
        change(layer, index)
        if index % 5 == 0:
            assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=EXACT)
    assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=EXACT)
    assert layer.num_refactorizations == before


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("dim", [1, 6, 40])
def test_tracked_inverse_follows_many_changes(dim: int, used: bool) -> None:
    # Whether or not it is looked at in between.
    layer = linear(dim)
    estimator = layer.log_det.estimator
    for index in range(NUM_CHANGES):
        change(layer, index)
        if used:
            log_det(layer)
    weight = torch.eye(dim) + layer.theta.detach() / math.sqrt(dim)
    assert is_close(estimator.inverse_t.mT @ weight, torch.eye(dim))
    expected = -torch.linalg.slogdet(weight).logabsdet
    assert estimator.log_abs_det_inverse.item() == pytest.approx(expected.item(), abs=EXACT)
    assert estimator.num_refactorizations == 1  # that of the registry


def test_single_precision_follows_many_changes() -> None:
    layer = linear(24).float()
    log_det(layer)
    before = layer.num_refactorizations
    for index in range(NUM_CHANGES):
        change(layer, index)
        log_det(layer)
    assert log_det(layer) == pytest.approx(exact_log_det(layer), abs=SINGLE)
    assert inverse_error(layer) < SINGLE
    assert layer.num_refactorizations == before


def test_nan_in_a_change_is_an_error_at_the_next_use() -> None:
    layer = linear(4)
    left, right = factors(4, 2)
    left[0, 0] = math.nan
    layer.multiply_input(left, right)
    with pytest.raises(torch.linalg.LinAlgError):
        log_det(layer)


def test_state_dict_between_changes() -> None:
    layers = linear(6), linear(6, seed=9)
    for index in range(40):
        change(layers[0], index)
    layers[1].load_state_dict(copy.deepcopy(layers[0].state_dict()))
    before = layers[0].num_refactorizations
    values = []
    for layer in layers:
        torch.manual_seed(7)
        for index in range(60):
            change(layer, index)
            values.append(log_det(layer))
    assert values[:60] == values[60:]
    assert values[-1] == pytest.approx(exact_log_det(layers[1]), abs=EXACT)
    assert layers[1].num_refactorizations == before


EDITS: dict[str, Callable[[SelfNormalizingLinear], object]] = {
    "in place": lambda layer: layer.theta.copy_(linear(6, seed=5).theta),
    "through data": lambda layer: layer.theta.data.copy_(linear(6, seed=5).theta),
    "another parameter": lambda layer: setattr(
        layer, "theta", nn.Parameter(linear(6, seed=5).theta.detach())
    ),
}


def assert_noticed(layer: SelfNormalizingLinear) -> None:
    """R is as accurate as in training, and the value is right to second order in its error."""
    value = log_det(layer)
    assert gradient_error(layer).relative < SLACK * 0.02
    assert value == pytest.approx(exact_log_det(layer), abs=0.02)


@pytest.mark.parametrize("num_changes", [0, 1, 20, 63, 64, 100])
def test_small_edit_between_changes_is_noticed(num_changes: int) -> None:
    for seed in range(5):
        layer = linear(6, seed=seed)
        log_det(layer)
        for index in range(num_changes):
            if index % 2 == 0:
                left, right = factors(6, 2)
            else:  # and back
                left = -torch.linalg.solve((torch.eye(2) + right @ left.mT).mT, left)
            layer.multiply_input(left, right)
            log_det(layer)
        with torch.no_grad():
            layer.theta.add_(0.1 * torch.randn_like(layer.theta))
        assert_noticed(layer)


@pytest.mark.parametrize("num_changes", [0, 1, 20, 64, 65, 100])
@pytest.mark.parametrize("edit", EDITS)
def test_large_edit_between_changes_is_noticed(edit: str, num_changes: int) -> None:
    layer = linear(6)
    for index in range(num_changes):
        change(layer, index)
        log_det(layer)
    with torch.no_grad():
        EDITS[edit](layer)
    assert_noticed(layer)
    change(layer, 0)
    assert_noticed(layer)


@pytest.mark.parametrize("edit", EDITS)
def test_edit_just_before_a_change_is_noticed(edit: str) -> None:
    layer = linear(6)
    log_det(layer)
    with torch.no_grad():
        EDITS[edit](layer)
    change(layer, 0)
    assert_noticed(layer)


@pytest.mark.parametrize("step", [0, 1])
def test_interrupt_during_a_change(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ctrl-C, after R was changed or after Θ was.
    layer, original, calls = linear(6), Tensor.addmm_, []
    log_det(layer)

    def interrupted(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(original(tensor, *args, **kwargs))
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "addmm_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.multiply_input(*factors(6, 2))
    assert_noticed(layer)
