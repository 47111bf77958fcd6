"""A user's mistakes are errors that say what was expected; NaNs surface, and stay outside of R."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_snf import (
    GECO,
    ActNorm,
    AutoSelfNormalizingFlow,
    Compose,
    Exact,
    Learned,
    PairExact,
    PairLearned,
    PairRefined,
    RationalQuadraticSpline,
    Reconstruction,
    Refined,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing_conv2d,
    self_normalizing_linear,
    self_normalizing_pair,
    smooth_leaky_relu,
)
from pyro_snf.maps.kernels import PADDING_MODES
from tests.registry import (
    CASES,
    LOG_DETS,
    Case,
    assert_refused,
    batch,
    conv,
    linear,
    output_batch,
    tracked_inverse,
)

# --- Options ------------------------------------------------------------------------------------

LINEAR = partial(self_normalizing_linear, 3)
CONV = partial(self_normalizing_conv2d, 3)
PAIR = partial(self_normalizing_pair, 3, [4])

#: Constructors of both kinds of layers, an option, what it may be, and values that are not.
OPTIONS_OF_LAYERS: list[tuple[str, str, list[object]]] = [
    ("log_det", " to be 'refined', 'learned', 'exact', or an object, Refined(…), ", ["x", None]),
    ("log_det", " to be 'refined', 'learned', ", [1, Refined, PairRefined(), GECO(0.1)]),
    ("inverse", ", with log_det=Refined, to be one of ('iterative', ", ["none", "refined", 3]),
    ("init_scale", " > 0; got ", [0.0, -1.0, math.inf, math.nan, "1", True, None]),
    ("bias", " to be True or False; got ", ["learned", 1, None]),
    ("dtype", ", a floating-point torch.dtype or None; got ", [torch.int32, torch.complex64, 1e30]),
]
COUNTS = [0, -3, 2.5, "3", True]
PENALTIES = [-1.0, math.nan, math.inf, "1", True, float, torch.nn.ReLU()]
OPTIONS: list[tuple[Callable[..., Any], str, str, list[object]]] = [
    *[(make, *row) for make in (LINEAR, CONV) for row in OPTIONS_OF_LAYERS],
    (self_normalizing_linear, "input_dim", ", an integer >= 1; got ", [*COUNTS, None, (3,)]),
    (self_normalizing_conv2d, "channels", ", an integer >= 1; got ", [*COUNTS, None]),
    (CONV, "kernel_size", ", one or two odd integers >= 1; got ", [2, (3, 4), 0, -3, (3,) * 3]),
    (CONV, "kernel_size", ", one or two odd integers >= 1; got ", [3.0, "33", True, None]),
    (CONV, "inverse_kernel_size", ", one or two odd integers >= 1; got ", [4, (7, 6), "x"]),
    (CONV, "padding_mode", " to be one of ('zeros', 'circular'); got ", ["reflect", None]),
    (Refined, "num_probes", ", an integer >= 1; got ", COUNTS),
    (Refined, "tolerance", " in (0, 1); got ", [0.0, 1.0, math.nan, "x", None, True]),
    (Refined, "krylov_steps", ", an integer >= 1; got ", COUNTS),
    (Refined, "seed", ", an integer in [0, 2**63), or None; got ", [1.5, -1, "x", True, 2**63]),
    (Learned, "mixture", " in [0, 1); got ", [1.0, -0.1, math.nan, "x"]),
    (Learned, "reconstruction_weight", " >= 0, a function of the number of steps, ", PENALTIES),
    (Learned, "reconstruction", " to be one of ('both', ", ["all", None, 1]),
    (PAIR, "log_det", " to be 'refined', 'learned', 'exact', or an ", ["x", Refined()]),
    (PAIR, "inverse", " to be one of ('iterative', 'one_pass'); got ", ["exact", None]),
    (PAIR, "reconstruction", ", a Reconstruction or None; got ", [1.0, "both"]),
    (PAIR, "inverse_tolerance", " in (0, 1), or None; got ", [0.0, 1.0, math.nan, "x"]),
    (PairRefined, "num_probes", ", an integer >= 1; got ", COUNTS),
    (PairRefined, "tolerance", " in (0, 1)", [0.0, 1.0, math.nan, "x"]),
    (PairLearned, "probe", " to be one of ", ["uniform", None]),
    (PairLearned, "seed", ", an integer in [0, 2**63), or None; got ", [1.5, -1]),
    (Reconstruction, "weight", " >= 0, a function of the number of steps, ", PENALTIES),
    (Reconstruction, "trains", " to be one of ('both', ", ["forward", None]),
    (partial(GECO, 0.1), "weight", " > 0; got ", [0.0, -1.0, math.inf, "x"]),
    (partial(GECO, 0.1), "rate", " > 0; got ", [0.0, -0.1, math.nan]),
    (partial(GECO, 0.1), "fall", " > 0; got ", [0.0, -0.1, math.nan]),
    (partial(GECO, 0.1), "decay", " in [0, 1); got ", [1.0, -0.5, math.nan]),
    (GECO, "tolerance", " > 0; got ", [0.0, math.inf, math.nan, "x"]),
    (SmoothLeakyReLU, "alpha", " in (0, 1); got ", [0.0, 1.0, -0.2, 1.5, math.nan, math.inf]),
]


@pytest.mark.parametrize(
    ("make", "option", "expected", "value"),
    [(make, name, expected, value) for make, name, expected, values in OPTIONS for value in values],
)
def test_option_is_checked_at_construction(
    make: Callable[..., Any], option: str, expected: str, value: object
) -> None:
    expected = f"expected {option}{expected}".removesuffix("; got ")
    with pytest.raises(ValueError, match=f"{re.escape(expected)}.*; got {re.escape(repr(value))}"):
        make(**{option: value})


def test_option_of_another_object_is_refused() -> None:
    for make, option in [
        (LINEAR, "tolerance"),
        (LINEAR, "seed"),
        (CONV, "krylov_steps"),
        (Exact, "tolerance"),
        (PairExact, "num_probes"),
        (Refined, "mixture"),
        (Learned, "num_probes"),
        (partial(smooth_leaky_relu, 0.3), "beta"),
        (partial(AutoSelfNormalizingFlow, lambda: None), "tolerance"),
    ]:
        with pytest.raises(TypeError, match=option):
            make(**{option: 1})
    for make in (LINEAR, CONV, PAIR, Refined, Learned, partial(GECO, 0.1)):  # keywords only
        with pytest.raises(TypeError):
            make("refined", "exact")


def test_inverse_kernel_of_a_1x1_convolution_is_1x1() -> None:
    with pytest.raises(ValueError, match="expected inverse_kernel_size 1 or None for a 1 × 1"):
        SelfNormalizingConv2d(2, 1, inverse_kernel_size=3)


def test_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one transform; got none"):
        Compose([])


# --- Inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1), (3, 5, 2), (), (0, 3), (2, 0, 3)])
def test_wrong_vectors_name_layer_expected_and_got(shape: tuple[int, ...]) -> None:
    message = r"SelfNormalizingLinear\(3, .*expected a non-empty .*shape \(\.\.\., 3\); got "
    assert_refused(linear(3), torch.zeros(shape), message + re.escape(str(shape)))


@pytest.mark.parametrize(
    "shape",
    [
        *[(3, 4, 4), (2, 1, 4, 4), (4, 4), (2,), (), (2, 4, 4, 3)],
        *[(0, 2, 4, 4), (2, 0, 4), (3, 2, 4, 0)],
    ],
)
def test_wrong_images_name_layer_expected_and_got(shape: tuple[int, ...]) -> None:
    message = r"SelfNormalizingConv2d\(2, .*expected a non-empty .*shape \(\.\.\., 2, .*\); got "
    assert_refused(conv(2), torch.zeros(shape), message + re.escape(str(shape)))


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 3, 4), (5, 2, 5, 4), (2, 1, 1)])
def test_image_that_is_smaller_than_the_kernel_is_refused(
    shape: tuple[int, ...], log_det: str
) -> None:
    message = r"SelfNormalizingConv2d.*images no smaller than the kernel; got "
    for padding_mode in PADDING_MODES:
        layer = conv(2, kernel_size=(3, 5), log_det=log_det, padding_mode=padding_mode)
        assert_refused(layer, torch.zeros(shape), message + re.escape(str(shape)))


def test_periodic_image_that_is_smaller_than_the_learned_inverse_is_refused() -> None:
    # Its kernel would overlap itself, and be another one.
    options, x = {"log_det": "learned", "inverse_kernel_size": 5}, torch.zeros(3, 2, 4, 5)
    layer = conv(2, padding_mode="circular", **options)
    with pytest.raises(ValueError, match="images no smaller than a circular kernel"):
        layer.log_abs_det_jacobian(x, x)
    layer = conv(2, padding_mode="zeros", **options)
    layer.log_abs_det_jacobian(x, layer(x))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        *[(torch.ones(2, 3, 3, dtype=dtype), str(dtype)) for dtype in (torch.int64, torch.bool)],
        (torch.ones(2, 3, 3, dtype=torch.complex64), "torch.complex64"),
        *[([1.0, 2.0, 3.0], "list"), (1.0, "float"), (None, "NoneType")],
    ],
)
def test_input_that_is_no_floating_point_tensor_is_refused(value: object, got: str) -> None:
    for transform in (linear(3), SmoothLeakyReLU(), conv(2)):
        assert_refused(transform, value, f"expected a floating-point tensor; got {got}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    for layer in (linear(3), conv(2)):
        message = f"{type(layer).__name__}.*expected dtype torch.float64; got {dtype}"
        assert_refused(layer, torch.ones(2, 3, 3, dtype=dtype), message)
        message = f"{type(layer).__name__}.*expected dtype {dtype}; got torch.float64"
        assert_refused(layer.to(dtype), torch.ones(2, 3, 3), message)


def test_bad_input_leaves_the_layer_as_it_was() -> None:
    layer, x = linear(3), torch.randn(2, 3)
    expected = layer(x)
    assert_refused(layer, torch.zeros(2, 4), "expected")
    assert_refused(SmoothLeakyReLU(), torch.zeros(0, 4), "non-empty tensor")
    assert layer(x) is expected


# --- NaN and infinity ---------------------------------------------------------------------------


def loss_of(transform: Transform, x: Tensor) -> Tensor:
    """A density model's loss; Pyro's own, with its validation on, refuses what is not finite."""
    y = transform(x)
    return 0.5 * y.square().mean() - transform.log_abs_det_jacobian(x, y).mean()


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in CASES if "Spline" not in name])
def test_bad_data_surface_and_spoil_no_other_row(name: str, value: float) -> None:
    case: Case = CASES[name]
    transform = case.make()
    assert_bad_row_is_bad_alone(transform, batch(case, (3,)), value)
    assert_bad_row_is_bad_alone(transform.inv, output_batch(case, (3,)), value)
    x = batch(case)
    x.view(-1)[0] = value
    loss = loss_of(transform, x)
    assert not torch.isfinite(loss)
    if loss.requires_grad:
        with pytest.raises(torch.linalg.LinAlgError, match="lower the learning rate"):
            loss.backward()


def assert_bad_row_is_bad_alone(transform: Transform, x: Tensor, value: float) -> None:
    expected, bad = transform(x), x.clone()
    bad[1].view(-1)[0] = value
    result = transform(bad)
    assert not torch.isfinite(result[1]).all()
    assert torch.allclose(result[[0, 2]], expected[[0, 2]], rtol=1e-9)


#: What is not finite, and what the error says of it.
BAD_GRADIENTS: dict[str, tuple[Callable[[Compose, Tensor], Tensor], str]] = {
    "data": (lambda flow, x: loss_of(flow, x / 0), r"ActNorm\(3, .*: its input is NaN"),
    # As of an encoder that is trained with the flow.
    "features": (
        lambda flow, x: loss_of(flow, (x * math.inf).requires_grad_()),
        r"ActNorm\(3, .*: its input is NaN",
    ),
    "loss": (
        lambda flow, x: loss_of(flow, x) * math.inf,
        r"Linear\(3, .*: its gradient is NaN.*; all outputs are finite",
    ),
    "square": (lambda flow, x: loss_of(flow, 1e200 * x), "its output is NaN, .*large|its input is"),
    **{
        f"layer {index}": (
            lambda flow, x, index=index: loss_of(with_nan(flow, index), x),
            rf"{name}\(.*: its output is NaN.*; its input is finite",
        )
        for index, name in enumerate(
            ["ActNorm", "SelfNormalizingLinear", "RationalQuadraticSpline"]
        )
    },
}


def with_nan(flow: Compose, index: int) -> Compose:
    with torch.no_grad():
        list(flow.parts[index].parameters())[-1].view(-1)[0] = math.nan
    return flow


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_gradient_that_is_not_finite_is_an_error_that_names_the_layer(kind: str) -> None:
    make_loss, message = BAD_GRADIENTS[kind]
    torch.manual_seed(0)
    flow = Compose([ActNorm(3, event_dim=1), linear(3), RationalQuadraticSpline(3), linear(3)])
    x = torch.randn(5, 3)
    loss_of(flow, x).backward()
    with pytest.raises(torch.linalg.LinAlgError, match=f"{message}.*lower the learning rate"):
        make_loss(flow, x).backward()
    loss_of(flow.eval(), x / 0).backward()  # only in training


def test_gradients_that_overflow_in_half_precision_are_left_to_a_scaler() -> None:
    layer, x = linear(3).half(), torch.randn(5, 3).half()
    (layer(x).square().sum() * 1e6).backward()
    assert not torch.isfinite(layer.theta.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(3)(torch.randn(5, 3)).sum() * math.inf
    loss.backward()


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("kind", [linear, conv], ids=["linear", "conv"])
def test_bad_data_have_no_effect_on_the_log_det(kind: Callable[..., Any], log_det: str) -> None:
    layer, x = kind(4, log_det=log_det), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        layer.theta.mul_(0.9)  # R is due for an update
    other = kind(4, log_det=log_det)
    other.load_state_dict(layer.state_dict())
    bad = torch.full_like(x, math.nan)
    value = layer.log_abs_det_jacobian(bad, layer(bad))
    assert torch.equal(value, other.log_abs_det_jacobian(x, other(x)))
    if (tracked := tracked_inverse(layer)) is not None:
        assert torch.isfinite(tracked).all()
        assert layer.error_estimate < 1


@pytest.mark.parametrize("kind", [linear, conv], ids=["linear", "conv"])
@pytest.mark.parametrize("parameter", ["theta", "log_scale", "bias"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_bad_parameters_surface(log_det: str, parameter: str, kind: Callable[..., Any]) -> None:
    # As a number in what depends on them, or as an error; not as a finite density.
    layer, x = kind(4, log_det=log_det), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        getattr(layer, parameter).view(-1)[0] = math.nan
    assert torch.isnan(layer(x)).any()
    for mode in (True, False):
        layer.train(mode)
        try:
            assert not torch.isfinite(loss_of(layer, x))
        except torch.linalg.LinAlgError as error:
            assert f"{type(layer).__name__}(4, " in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", [linear, conv], ids=["linear", "conv"])
@pytest.mark.parametrize("entry", [0.0, math.nan])
def test_error_of_a_singular_layer_says_what_helps(entry: float, kind: Callable[..., Any]) -> None:
    layer, x = kind(4).eval(), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        layer.theta.copy_(layer.log_det.linear_map.theta_of(torch.full_like(layer.theta, entry)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"ActNorm.*learning rate.*float64"):
        layer.log_abs_det_jacobian(x, layer(x))


# --- Lower precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains(dtype: torch.dtype, log_det: str) -> None:
    layer = SelfNormalizingLinear(6, log_det=log_det, dtype=dtype)
    x = (3 * torch.randn(64, 6)).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        y = layer(x)
        loss = 0.5 * y.float().square().sum(-1).mean()
        loss = loss - layer.log_abs_det_jacobian(x, y).float().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((y.detach().double().std() - 1).abs().item())
    # Data of standard deviation 3 are whitened.
    assert errors[0] > 1.5
    assert errors[-1] < 0.2
