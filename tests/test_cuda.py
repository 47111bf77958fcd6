"""On a CUDA device: every layer computes what it does on the CPU, and hardly waits for the device.

Without a GPU, ``tests/test_simulated_cuda.py`` runs this file on a simulated one.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn

from pyro_snf import (
    GECO,
    AutoSelfNormalizingFlow,
    Exact,
    Learned,
    PairExact,
    PairRefined,
    Reconstruction,
    SelfNormalizingLinear,
    self_normalizing_pair,
)
from pyro_snf.importance import psis
from pyro_snf.krylov import gcr, krylov
from pyro_snf.log_dets.control_variate_log_det import ControlVariateLogDet
from pyro_snf.log_dets.tracked_inverse import TrackedInverse
from pyro_snf.optim import NaturalGradient
from pyro_snf.probes import ProbeStream
from tests import simulated_cuda
from tests.registry import (
    CASES,
    CONDITIONAL_CASES,
    batch,
    density_loss,
    free_form,
    guide_loss,
    one_of_a_kind,
    output_batch,
)
from tests.test_simulated_cuda import is_simulated

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generators give the numbers of the CPU's of the same seed, as the simulated ones do:
    estimates by random probes can then be compared."""
    if is_simulated:
        return
    on_cpu: dict[torch.Generator, torch.Generator] = {}

    def of_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(
            *args: object, generator: torch.Generator | None = None, **options: Any
        ) -> Tensor:
            if generator is None or generator.device.type != "cuda":
                return draw(*args, generator=generator, **options)
            if generator not in on_cpu:
                on_cpu[generator] = torch.Generator().manual_seed(generator.initial_seed())
            values = draw(*args, generator=on_cpu[generator], **{**options, "device": "cpu"})
            return values.pin_memory().to("cuda", non_blocking=True)

        return drawn

    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, of_the_cpu(getattr(torch, name)))


# What is left, after some steps of training, of sums and products in another order than the CPU's.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}

# Corrections of a tracked inverse lag by a step on a GPU: the estimates differ by less than this.
LAG = 0.1

# What a training step waits for besides its own layer's reading: layers that are used backwards
# factorize their matrices at every step, and the inverse of an activation is iterated.
WAITS_OF_INVERSES = {
    "Compose with an inverse": 1,
    "inverse of multi-scale": 1,
    "inverse of linear": 1,
    "inverse of conv": 1,
    "inverse of Compose": 3,
    "Compose conv-activation-inverse conv": 2,
}

# A learning rate at which a tracked inverse needs no refactorization.
STEADY = 1e-4

DTYPE_CASES = [
    "linear refined",
    "linear learned GECO",
    "conv refined",
    "conv learned",
    "conv exact",
    "free form refined",
    "autoregressive",
    "rational-quadratic bins",
    "smooth leaky relu learnable",
    "image coupling",
]


class Trained(NamedTuple):
    """What became of a transform in some steps of training."""

    transform: nn.Module
    losses: list[Tensor]
    outputs: list[Tensor]
    """``T(x)``, its log-det, and ``T.inv(y)``, in eval() mode."""
    waits: Counter[str]
    """The lines of the library that waited for the device in the last step."""


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    """Counts what torch reports as synchronizing, by the line of the library that called it."""
    waits: Counter[str] = Counter()
    try:
        with warnings.catch_warnings(record=True) as caught, without_validation():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # with a warning that this is a prototype
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        path, _, name = one.filename.rpartition("pyro_snf" + os.sep)
        if path and "synchronizing CUDA operation" in str(one.message):
            waits[f"{name}:{one.lineno}"] += 1


@contextmanager
def without_validation() -> Iterator[None]:
    """Without Pyro's checks of values, each of which waits for the device."""
    pyro.enable_validation(False)
    try:
        yield
    finally:
        pyro.enable_validation(True)


def descend(
    module: nn.Module, loss_of: Callable[..., Tensor], *args: Tensor, rate: float = 0.01
) -> Tensor:
    """A step of gradient descent on ``loss_of(module, *args)``; the loss before it."""
    parameters = [one for one in module.parameters() if one.requires_grad]
    loss = loss_of(module, *args)
    if parameters:
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    return loss.detach()


def log_density(transform: nn.Module, x: Tensor) -> Tensor:
    y = transform(x)
    return (0.5 * y.square().sum() - transform.log_abs_det_jacobian(x, y).sum()) / x.numel()


def conditional_log_density(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    return log_density(module.condition(context), x)


@functools.cache
def trained(name: str, device: str, dtype: torch.dtype = torch.float64) -> Trained:
    case = CASES[name]
    transform = case.make().to(device, dtype)
    data = [batch(case, seed=seed).to(device, dtype) for seed in range(3)]
    losses = [
        descend(transform, density_loss, data[0]),
        descend(transform, guide_loss, data[1]),
    ]
    for part in transform.modules():
        if isinstance(part, ProbeStream):
            part.generator(0, torch.device(device))  # it reads its seed once
    # The first checks of a tracked inverse are waited for.
    tracks = any(isinstance(part, TrackedInverse) for part in transform.modules())
    for _ in range(4 if tracks else 1):
        descend(transform, log_density, data[2].clone(), rate=STEADY)
    with counting_waits() if device == "cuda" else without_validation() as waits:
        losses.append(descend(transform, log_density, data[2].clone(), rate=STEADY))
    transform.eval()
    with torch.no_grad():
        y = transform(data[0])
        outputs = [y, transform.log_abs_det_jacobian(data[0], y)]
        outputs.append(transform.inv(output_batch(case).to(device, dtype)))
    return Trained(transform, losses, outputs, waits or Counter())


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, but for tracked inverses, whose corrections lag."""
    return [
        one
        for name, one in module.state_dict().items()
        if not name.endswith(("inverse_t", "log_abs_det_inverse", "_extra_state"))
    ]


def tolerance_of(module: nn.Module, dtype: torch.dtype = torch.float64) -> float:
    lags = any(isinstance(part, TrackedInverse) for part in module.modules())
    return LAG if lags else ROUNDING[dtype]


@pytest.mark.parametrize("name", CASES)
def test_training_gives_what_it_does_on_the_cpu(name: str) -> None:
    actual, expected = trained(name, "cuda"), trained(name, "cpu")
    tolerance = tolerance_of(actual.transform)
    assert_equal(actual.losses, expected.losses, tolerance)
    assert_equal(actual.outputs, expected.outputs, tolerance)
    assert_equal(tensors_of(actual.transform), tensors_of(expected.transform), tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.foreign])
def test_steady_step_waits_once_for_a_layer_at_most(name: str) -> None:
    # Of those that read a Krylov space, their factors or signs of determinants. No other waits.
    found = trained(name, "cuda")
    kinds = ControlVariateLogDet | PairRefined | PairExact | Exact
    limit = sum(isinstance(part, kinds) for part in found.transform.modules())
    assert sum(found.waits.values()) <= limit + WAITS_OF_INVERSES.get(name, 0), found.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DTYPE_CASES)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    actual, expected = (trained(name, device, dtype) for device in ("cuda", "cpu"))
    tolerance = tolerance_of(actual.transform, dtype)
    assert_equal(actual.losses, expected.losses, tolerance)
    assert_equal(actual.outputs, expected.outputs, tolerance)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cuda")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", one_of_a_kind(lambda case: True))
def test_made_and_trained_where_the_device_is_the_default(name: str) -> None:
    with default_device():
        transform, data = CASES[name].make(), batch(CASES[name]).cuda()
        loss = descend(transform, density_loss, data)
        for _ in range(5):  # from the fifth step on, a tracked inverse is not waited for
            descend(transform, density_loss, data, rate=STEADY)
    assert all(one.is_cuda for one in tensors_of(transform))
    assert_equal([loss], trained(name, "cpu").losses[:1], tolerance_of(transform))


def test_guide_and_its_check_where_the_device_is_the_default() -> None:
    with default_device():
        model = Normal(3, "cuda")
        guide = AutoSelfNormalizingFlow(model)
        svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, 100), pyro.infer.Trace_ELBO(8))
        for _ in range(3):
            svi.step()
        guide.quantiles([0.1, 0.9])
        found = psis(model, guide, num_samples=50)
    assert found.log_weights.is_cuda


@pytest.mark.parametrize("name", CONDITIONAL_CASES)
def test_conditional_transforms(name: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        case = CONDITIONAL_CASES[name]
        module = case.make().to(device)
        generator = torch.Generator().manual_seed(0)
        x, context = (
            torch.randn(6, dim, generator=generator).to(device)
            for dim in (case.input_dim, case.context_dim)
        )
        losses[device] = [descend(module, conditional_log_density, x, context) for _ in range(3)]
    assert_equal(losses["cuda"], losses["cpu"], tolerance_of(module))


def test_value_and_gradient_of_a_pair_are_read_at_once() -> None:
    # Here the value is not exact, but a quadrature.
    losses = {}
    for device in ("cpu", "cuda"):
        pair = free_form(20, lanczos_steps=3).to(device)
        x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(device)
        losses[device] = [descend(pair, log_density, x) for _ in range(2)]
        if device == "cuda":
            with counting_waits() as waits:
                log_density(pair, x)
            assert sum(waits.values()) == 1, waits
    assert_equal(losses["cuda"], losses["cpu"], ROUNDING[torch.float64])


def failing_after(num_calls: int, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with a matrix, and after some of them infinities."""
    calls = []

    def multiply(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v @ matrix.mT if len(calls) <= num_calls else v / 0

    return multiply


@pytest.mark.parametrize("expected_steps", [1, 2, 4, 9])
@pytest.mark.parametrize("solver", [krylov, gcr])
def test_solution_does_not_depend_on_the_steps_until_it_is_looked_at(
    solver: Callable[..., Any], expected_steps: int
) -> None:
    matrix = torch.eye(9) + 0.1 * torch.randn(9, 9)
    vectors = torch.randn(3, 9)
    vectors[0] = 0  # whose space is exhausted at once
    # The products of steps that are not needed may be anything.
    results = {}
    for device in ("cpu", "cuda"):
        rows = vectors.to(device)
        results[device] = solver(
            failing_after(5, matrix.to(device)),
            lambda v: v,
            rows,
            tolerance=1e-2,
            max_steps=9,
            expected_steps=expected_steps,
            beside=rows[:, 0],
        )
    actual, expected = results["cuda"], results["cpu"]
    assert 1 < expected.num_steps <= 5
    assert actual.num_steps == expected.num_steps
    assert_equal([actual.solution], [expected.solution], ROUNDING[torch.float64])
    torch.testing.assert_close(actual.beside, expected.beside)
    for name in ("residual", "hessenberg", "size") if solver is krylov else ():
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name))


def test_value_of_weights_that_are_not_finite_is_not_waited_for() -> None:
    layer, x = SelfNormalizingLinear(3, log_det="learned", device="cuda"), torch.ones(2, 3).cuda()
    with torch.no_grad():
        layer.theta[0, 0] = torch.nan
    assert layer.log_abs_det_jacobian(x, layer(x)).isnan().all()


def test_controller_moves_to_the_layer() -> None:
    controller = GECO(0.1)
    layer = SelfNormalizingLinear(
        3, log_det=Learned(reconstruction_weight=controller), device="cuda"
    )
    pair = self_normalizing_pair(3, [4], reconstruction=Reconstruction(controller), device="cuda")
    for module in (layer, pair):
        assert all(one.is_cuda for one in tensors_of(module))
    assert not controller.weight.is_cuda


@pytest.mark.skipif(simulated_cuda.VARIABLE not in os.environ, reason="no simulated device")
@pytest.mark.parametrize(
    "name", ["linear refined D=8 k=2", "conv refined", "free form refined", "inverse of Compose"]
)
def test_results_do_not_depend_on_when_copies_arrive(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for are_late in (False, True):
        monkeypatch.setattr(simulated_cuda, "copies_are_late", are_late)
        transform, data = CASES[name].make().cuda(), batch(CASES[name]).cuda()
        found.append([descend(transform, log_density, data) for _ in range(8)])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


class Normal:
    """A model on a device, of badly scaled independent numbers."""

    def __init__(self, dim: int, device: str) -> None:
        self.locs = torch.linspace(-3, 3, dim).to(device)
        self.scales = torch.linspace(0.1, 2, dim).to(device)

    def __call__(self) -> None:
        pyro.sample("x", dist.Normal(self.locs, self.scales).to_event(1))


def natural_gradient(guide: AutoSelfNormalizingFlow) -> pyro.optim.PyroOptim:
    return NaturalGradient(guide, 100)


def adam(guide: AutoSelfNormalizingFlow) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.01})


@pytest.mark.parametrize(
    ("make_optimizer", "dim", "num_layers", "num_waits"),
    [
        (natural_gradient, 3, 1, 1),
        (natural_gradient, 40, 2, 1),  # with secants
        (adam, 3, 2, 0),
    ],
)
def test_steps_of_a_guide(
    make_optimizer: Callable[..., pyro.optim.PyroOptim], dim: int, num_layers: int, num_waits: int
) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Normal(dim, device)
        guide = AutoSelfNormalizingFlow(model, num_layers)
        elbo = pyro.infer.Trace_ELBO(8, max_plate_nesting=0, vectorize_particles=True)
        svi = pyro.infer.SVI(model, guide, make_optimizer(guide), elbo)
        losses[device] = [torch.tensor(svi.step()) for _ in range(5)]
        if device == "cuda":
            for _ in range(8):  # one of them looks at the rows' lengths
                with counting_waits() as waits:
                    svi.step()
                assert sum(waits.values()) == num_waits, waits
    if simulated_cuda.VARIABLE in os.environ:  # a GPU draws other random numbers than a CPU
        difference = torch.stack(losses["cuda"]) - torch.stack(losses["cpu"])
        assert difference.abs().max() < LAG


def test_unequal_weights_after_the_first_step_are_not_waited_for() -> None:
    options = {"num_particles": 4, "max_plate_nesting": 0, "vectorize_particles": True}
    equal, unequal = pyro.infer.Trace_ELBO(**options), pyro.infer.RenyiELBO(0.0, **options)
    model = Normal(3, "cuda")
    guide = AutoSelfNormalizingFlow(model)
    with pytest.raises(RuntimeError, match="weights them unequally"):
        unequal.loss_and_grads(model, guide)
    guide = AutoSelfNormalizingFlow(model)
    for elbo, is_right in ((equal, True), (unequal, False)):
        elbo.loss_and_grads(model, guide)
        assert guide.last_layer.bias.grad.isfinite().all() == is_right


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize("make_optimizer", [torch.optim.Adam, ClippedAdam])
def test_dense_log_det_is_right_and_rarely_waited_for(
    make_optimizer: Callable[..., torch.optim.Optimizer], rate: float
) -> None:
    dim = 64
    torch.manual_seed(0)
    layer = SelfNormalizingLinear(dim, dtype=torch.float32).to("cuda")
    mixing = (torch.randn(dim, dim) / dim**0.5).to(layer.theta)
    optimizer = make_optimizer(layer.parameters(), lr=rate)
    layer.refactorize()  # which reads the seed of the probes
    differences, num_waits = [], []
    for step in range(40):
        if step == 30:  # beside the optimizer's step: noticed at once
            with torch.no_grad():
                layer.theta.copy_(torch.randn(dim, dim).to(layer.theta))
        x = torch.randn(16, dim).to(layer.theta) @ mixing
        with counting_waits() as waits:
            y = layer(x)
            value = layer.log_abs_det_jacobian(x, y)
            optimizer.zero_grad()
            (0.5 * y.square().sum(-1) - value).mean().backward()
        exact = torch.linalg.slogdet(layer.weight.detach().double()).logabsdet
        differences.append((value[0] - exact).abs().item())
        num_waits.append(sum(waits.values()))
        optimizer.step()
    assert max(differences) < 0.3
    assert max(differences[30:32]) < 0.01
    if rate == 1e-3:
        assert sum(num_waits[4:30]) == 0
