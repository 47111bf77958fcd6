"""Properties of every transform, for inputs, layouts, modes and histories that hypothesis chooses.

The oracle is a fresh copy of the transform in float64, without caches, in ``eval()`` mode, at
contiguous inputs, and for its log-determinant ``slogdet`` of the Jacobian by automatic
differentiation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from tests.registry import CASES, Case, by_pickle, train
from tests.test_contract import total_log_det

# Float64 with condition numbers below 3, a few layers deep: rounding, and three digits to spare.
EXACT = 1e-9
# Roundings of a few layers, in units of the last place.
ROUNDINGS = 64

#: Without shrinking, which would take longer than the tests; each failure names its example.
PHASES = [Phase.explicit, Phase.generate]
SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": PHASES,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def fewer(max_examples: int) -> settings:
    return settings(max_examples=max_examples, **SETTINGS)


NAMES = st.sampled_from(sorted(CASES))
OWN_NAMES = st.sampled_from(sorted(name for name, case in CASES.items() if not case.foreign))
EXACT_NAMES = st.sampled_from(
    sorted(name for name, case in CASES.items() if not case.foreign and case.remembers_inverse)
)
BATCH_SHAPES = st.lists(st.integers(1, 3), max_size=4).map(tuple)
SEEDS = st.integers(0, 2**16)

#: Layouts of the same numbers.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "permuted": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "sliced": lambda x: torch.stack([x, -x], -1)[..., 0],
    "flipped": lambda x: x.flip(0).contiguous().flip(0) if x.dim() else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() else x,
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "requires grad": lambda x: x.clone().requires_grad_(),
}

MODES: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def by_state(module: nn.Module) -> nn.Module:
    """Its state, through bytes of safetensors, in a module that has had another history."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(module.state_dict())))
    return other


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda transform: transform,
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "safetensors": by_state,
    "no cache": lambda transform: transform.with_cache(0),
    "inverse of the inverse": lambda transform: copy.deepcopy(transform.inv).inv,
}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs_of(case: Case, direction: str, seed: int, batch: tuple[int, ...]) -> Tensor:
    shape = case.shape
    if direction == "T.inv" and case.output_shape is not None:
        shape = case.output_shape
    return normal(seed, *batch, *shape)


def directed(transform: Any, direction: str) -> Any:
    return transform if direction == "T" else transform.inv


def reference_of(transform: Any, direction: str) -> Any:
    """Of a transform as it is now."""
    return directed(copy.deepcopy(transform).eval(), direction)


def rows_of(x: Tensor, case_dim: int) -> Tensor:
    return x.detach().contiguous().reshape(-1, *x.shape[x.dim() - case_dim :])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance
    )


DIRECTIONS = st.sampled_from(["T", "T.inv"])


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@fewer(250)
@given(
    NAMES,
    DIRECTIONS,
    SEEDS,
    BATCH_SHAPES,
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(MODES)),
    st.booleans(),
    st.sampled_from(sorted(COPIES)),
)
def test_value_does_not_depend_on_layout_mode_or_copy(
    name: str,
    direction: str,
    seed: int,
    batch: tuple[int, ...],
    layout: str,
    mode: str,
    training: bool,
    way: str,
) -> None:
    case = CASES[name]
    if case.foreign and way == "no cache":
        way = "itself"
    transform = case.make()
    part = directed(COPIES[way](transform).train(training), direction)
    x = LAYOUTS[layout](inputs_of(case, direction, seed, batch))
    num_event = len(
        case.shape if direction == "T" or case.output_shape is None else case.output_shape
    )
    with torch.no_grad():
        expected = reference_of(transform, direction)(rows_of(x, num_event))
    with MODES[mode]():
        y = part(x)
        log_det = part.log_abs_det_jacobian(x, y)
    assert y.shape == part.forward_shape(x.shape)
    assert log_det.shape == x.shape[: x.dim() - part.domain.event_dim]
    assert y.dtype == x.dtype
    assert_close(y.reshape(expected.shape), expected)
    assert_close(directed(transform, direction).inv(y.clone().detach()), x)


@fewer(120)
@given(OWN_NAMES, DIRECTIONS, SEEDS, st.sampled_from(["eval", "no_grad", "inference_mode"]))
def test_log_det_is_slogdet_of_the_jacobian(
    name: str, direction: str, seed: int, mode: str
) -> None:
    case = CASES[name]
    transform = case.make()
    x = inputs_of(case, direction, seed, ())
    jacobian = torch.autograd.functional.jacobian(reference_of(transform, direction), x)
    size = x.numel()
    expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
    part = directed(transform.train(mode != "eval"), direction)
    with MODES.get(mode, nullcontext)():
        y = part(x)
        log_det = total_log_det(part, x, y, case)
    assert_close(log_det, expected)


# --- Histories ----------------------------------------------------------------------------------

#: What may happen to a transform between two uses.
EVENTS = st.sampled_from(
    [
        *("use", "use", "use the inverse", "use both", "use without gradients", "inference_mode"),
        *("step", "step", "write", "write to the data", "freeze", "eval", "train", "clear"),
        *("deepcopy", "pickle", "safetensors", "no cache", "new input", "write to the input"),
    ]
)


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@fewer(150)
@given(EXACT_NAMES, SEEDS, st.lists(EVENTS, min_size=2, max_size=8))
def test_no_history_changes_a_value(name: str, seed: int, events: list[str]) -> None:
    case = CASES[name]
    transform: Any = case.make()
    x = normal(seed, 3, *case.shape)
    for count, event in enumerate(events):
        happen(event, transform, case, x, seed + count)
        if event in COPIES:
            transform = COPIES[event](transform)
        elif event == "new input":
            x = normal(seed + count + 1, 3, *case.shape)
        is_training = transform.training and torch.is_grad_enabled()
        reference = copy.deepcopy(transform).eval()
        with torch.no_grad():
            expected = reference(x.clone())
            expected_log_det = reference.log_abs_det_jacobian(x, expected)
        y = transform(x)
        assert_close(y, expected)
        with nullcontext() if not is_training else torch.no_grad():
            assert_close(transform.log_abs_det_jacobian(x, y), expected_log_det)
        assert_close(transform.inv(y), x)  # the pair stays in the cache for what happens next
    assert_close(transform.inv(y.detach().clone()), x)


def happen(event: str, transform: Any, case: Case, x: Tensor, seed: int) -> None:
    if event == "use":
        transform.log_abs_det_jacobian(x, transform(x))
    elif event == "use the inverse":
        y = transform(x).detach().clone()
        transform.inv.log_abs_det_jacobian(y, transform.inv(y))
    elif event == "use both":
        happen("use", transform, case, x, seed)
        happen("use the inverse", transform, case, x, seed)
    elif event in ("use without gradients", "inference_mode"):
        with torch.no_grad() if event != "inference_mode" else torch.inference_mode():
            happen("use both", transform, case, x, seed)
    elif event == "step":
        mode = transform.training
        train(transform.train(), case, steps=1, seed=seed)
        transform.train(mode)
    elif event in ("write", "write to the data"):
        with torch.no_grad():
            for parameter in transform.parameters():
                (parameter.data if event != "write" else parameter).mul_(0.97)
    elif event == "write to the input":
        x.mul_(1.1)
    elif event == "freeze":
        for parameter in transform.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    elif event in ("eval", "train"):
        transform.train(event == "train")
    elif event == "clear":
        transform.clear_cache()


# --- Types --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@fewer(120)
@given(
    OWN_NAMES,
    DIRECTIONS,
    SEEDS,
    BATCH_SHAPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(MODES)),
)
def test_lower_precision_is_float64_to_rounding(
    name: str,
    direction: str,
    seed: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    mode: str,
) -> None:
    case, tolerance = CASES[name], ROUNDINGS * torch.finfo(dtype).eps
    transform = case.make().to(dtype).eval()
    x = LAYOUTS[layout](inputs_of(case, direction, seed, batch).clamp(-3, 3).to(dtype))
    part = directed(transform, direction)
    reference = directed(copy.deepcopy(transform).double(), direction)
    with torch.no_grad():
        wide = x.detach().double().contiguous()
        expected = reference(wide)
        expected_log_det = reference.log_abs_det_jacobian(wide, expected)
    with MODES[mode]():
        y = part(x)
        log_det = part.log_abs_det_jacobian(x, y)
    assert y.dtype == dtype
    assert log_det.dtype in (dtype, torch.float32)
    scale = 1 + expected.abs().amax().item()
    assert_close(y / scale, expected / scale, 2 * tolerance)
    assert_close(log_det, expected_log_det, 2 * tolerance)


# --- torch.func ---------------------------------------------------------------------------------


@fewer(60)
@given(EXACT_NAMES, DIRECTIONS, SEEDS)
def test_functional_transforms_agree_with_autograd(name: str, direction: str, seed: int) -> None:
    case = CASES[name]
    if case.api.endswith("pair") or case.api.endswith("Pair"):
        direction = "T"  # the implicit gradient of the inverse uses autograd inside
    part = directed(case.make().eval(), direction)
    x = inputs_of(case, direction, seed, (2,))

    def loss(x: Tensor) -> Tensor:
        y = part(x)
        return y.square().sum() + part.log_abs_det_jacobian(x, y).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(grad(loss)(x), expected)
    expected_jacobian = torch.autograd.functional.jacobian(part, x)
    # Row by row: torch's vmap over all rows does not know the rules of implicit solves.
    assert_close(jacrev(part, chunk_size=1)(x), expected_jacobian)


@fewer(60)
@given(EXACT_NAMES, SEEDS)
def test_functional_call_is_that_of_other_parameters(name: str, seed: int) -> None:
    case = CASES[name]
    transform, other = case.make().eval(), case.make(seed=1).eval()
    x = normal(seed, 2, *case.shape)
    expected = other(x)
    before = transform(x).detach()

    class Flow(nn.Module):
        def __init__(self, transform: nn.Module) -> None:
            super().__init__()
            self.transform = transform

        def forward(self, x: Tensor) -> Tensor:
            return self.transform(x)

    state = {f"transform.{key}": value for key, value in other.named_parameters()}
    state |= {f"transform.{key}": value for key, value in other.named_buffers()}
    assert_close(functional_call(Flow(transform), state, (x,)), expected)
    assert_close(transform(x), before)
