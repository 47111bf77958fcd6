"""A user's mistakes are errors that say what was expected; NaNs surface, and stay outside of R."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_snf import (
    GECO,
    Compose,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing_conv2d,
    self_normalizing_linear,
    smooth_leaky_relu,
)
from pyro_snf.conv.kernels import PADDING_MODES
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform
from tests.registry import CASES, LOG_DETS, Case, batch, conv, linear, output_batch

# --- Options ------------------------------------------------------------------------------------

OPTIONS = [
    ("log_det", "approximate", r"expected log_det to be one of .*'refined'.*; got 'approximate'"),
    ("log_det", None, "expected log_det to be one of .*; got None"),
    ("inverse", "none", "expected inverse to be one of .*; got 'none'"),
    ("reconstruction", "all", "expected reconstruction to be one of .*'both'.*; got 'all'"),
    ("init_scale", 0.0, r"expected init_scale > 0; got 0\.0"),
    ("init_scale", -1.0, r"expected init_scale > 0; got -1\.0"),
    ("init_scale", math.inf, "expected init_scale > 0; got inf"),
    ("init_scale", math.nan, "expected init_scale > 0; got nan"),
    ("num_probes", 0, "expected num_probes.* >= 1; got 0"),
    ("num_probes", -3, "expected num_probes.* >= 1; got -3"),
    ("num_probes", 2.5, r"expected num_probes.* >= 1; got 2\.5"),
    ("tolerance", 0.0, r"expected tolerance in \(0, 1\); got 0\.0"),
    ("tolerance", 1.0, r"expected tolerance in \(0, 1\); got 1\.0"),
    ("tolerance", math.nan, r"expected tolerance in \(0, 1\); got nan"),
    ("mixture", 1.0, r"expected mixture in \[0, 1\); got 1\.0"),
    ("mixture", -0.1, r"expected mixture in \[0, 1\); got -0\.1"),
    ("mixture", math.nan, r"expected mixture in \[0, 1\); got nan"),
    ("reconstruction_weight", -1.0, r"expected reconstruction_weight >= 0.*; got -1\.0"),
    ("reconstruction_weight", math.nan, "expected reconstruction_weight >= 0.*; got nan"),
    ("seed", 1.5, r"expected seed, an integer >= 0; got 1\.5"),
    ("dtype", torch.int64, r"expected a floating-point dtype; got torch\.int64"),
    ("dtype", torch.complex64, r"expected a floating-point dtype; got torch\.complex64"),
]


@pytest.mark.parametrize("layer", [SelfNormalizingLinear, SelfNormalizingConv2d])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize(("option", "value", "message"), OPTIONS)
def test_option_is_checked_at_construction(
    option: str, value: object, message: str, log_det: str, layer: type[SelfNormalizingTransform]
) -> None:
    # Also where the method chosen has no use for it: a slip is a slip.
    with pytest.raises(ValueError, match=message):
        layer(3, **{"log_det": log_det, option: value})


CONV_OPTIONS = [
    ("channels", 0, "expected channels, an integer >= 1; got 0"),
    ("channels", 2.0, r"expected channels, an integer >= 1; got 2\.0"),
    ("channels", True, "expected channels, an integer >= 1; got True"),
    ("kernel_size", 2, "expected kernel_size, one or two odd integers >= 1; got 2"),
    ("kernel_size", (3, 4), r"expected kernel_size, .* odd .*; got \(3, 4\)"),
    ("kernel_size", 0, "expected kernel_size, .*; got 0"),
    ("kernel_size", -3, "expected kernel_size, .*; got -3"),
    ("kernel_size", (3, 3, 3), r"expected kernel_size, .*; got \(3, 3, 3\)"),
    ("kernel_size", 3.0, r"expected kernel_size, .*; got 3\.0"),
    ("kernel_size", "33", "expected kernel_size, .*; got '33'"),
    ("inverse_kernel_size", 4, "expected inverse_kernel_size, .* odd .*; got 4"),
    ("inverse_kernel_size", (7, 6), r"expected inverse_kernel_size, .* odd .*; got \(7, 6\)"),
    ("padding_mode", "reflect", r"expected padding_mode to be one of .*'zeros'.*; got 'reflect'"),
    ("padding_mode", None, "expected padding_mode to be one of .*; got None"),
    ("max_iterations", 0, "expected max_iterations, an integer >= 1; got 0"),
    ("max_iterations", 1.5, r"expected max_iterations, an integer >= 1; got 1\.5"),
]


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize(("option", "value", "message"), CONV_OPTIONS)
def test_option_of_a_convolution_is_checked_at_construction(
    option: str, value: object, message: str, log_det: str
) -> None:
    with pytest.raises(ValueError, match=message):
        self_normalizing_conv2d(**{"channels": 3, "log_det": log_det, option: value})


@pytest.mark.parametrize("input_dim", [0, -1, 2.0, "3", None, (3,)])
def test_input_dim_is_checked(input_dim: object) -> None:
    message = f"expected input_dim, an integer >= 1; got {input_dim!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        self_normalizing_linear(input_dim)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        SelfNormalizingLinear(3, "refined")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        self_normalizing_linear(3, momentum=0.9)
    with pytest.raises(TypeError, match="beta"):
        smooth_leaky_relu(0.3, beta=1.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, 1.5, math.nan, math.inf])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"expected alpha in \(0, 1\); got {alpha}"):
        SmoothLeakyReLU(alpha)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, r"expected tolerance > 0; got 0\.0"),
        ({"tolerance": math.inf}, "expected tolerance > 0; got inf"),
        ({"tolerance": math.nan}, "expected tolerance > 0; got nan"),
        ({"weight": 0.0}, r"expected weight > 0; got 0\.0"),
        ({"rate": -0.1}, r"expected rate > 0; got -0\.1"),
        ({"decay": 1.0}, r"expected decay in \[0, 1\); got 1\.0"),
        ({"decay": -0.5}, r"expected decay in \[0, 1\); got -0\.5"),
    ],
)
def test_options_of_the_controller_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GECO(**{"tolerance": 0.1, **options})


def test_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one transform; got none"):
        Compose([])


# --- Inputs -------------------------------------------------------------------------------------


def uses(
    transform: SelfNormalizingTransform | SmoothLeakyReLU,
) -> list[Callable[[Tensor], Tensor]]:
    return [transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1), (3, 5, 2), ()])
def test_wrong_shape_names_layer_expected_and_got(shape: tuple[int, ...]) -> None:
    message = r"SelfNormalizingLinear\(3, .*expected .*shape \(\.\.\., 3\); got "
    for use in uses(linear(3)):
        with pytest.raises(ValueError, match=message + re.escape(str(shape))):
            use(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 1, 4, 4), (4, 4), (2,), (), (2, 4, 4, 3)])
def test_wrong_channels_name_layer_expected_and_got(shape: tuple[int, ...]) -> None:
    message = r"SelfNormalizingConv2d\(2, .*expected .*shape \(\.\.\., 2, H, W\); got "
    for use in uses(conv(2)):
        with pytest.raises(ValueError, match=message + re.escape(str(shape))):
            use(torch.zeros(shape))


@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 3, 4), (5, 2, 5, 4), (2, 1, 1)])
def test_image_that_is_smaller_than_the_kernel_is_refused(
    shape: tuple[int, ...], log_det: str
) -> None:
    message = r"SelfNormalizingConv2d.*images no smaller than the kernel; got "
    for padding_mode in PADDING_MODES:
        for use in uses(conv(2, kernel_size=(3, 5), log_det=log_det, padding_mode=padding_mode)):
            with pytest.raises(ValueError, match=message + re.escape(str(shape))):
                use(torch.zeros(shape))


def test_torus_that_is_smaller_than_the_learned_inverse_is_refused() -> None:
    # Its kernel would meet itself, and be another one.
    options = {"log_det": "learned", "inverse_kernel_size": 5}
    for use in uses(conv(2, padding_mode="circular", **options)):
        with pytest.raises(ValueError, match="images no smaller than the kernel"):
            use(torch.zeros(3, 2, 4, 5))
    for use in uses(conv(2, padding_mode="zeros", **options)):
        use(torch.zeros(3, 2, 4, 5))


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4), (3, 2, 4, 0)])
def test_empty_image_is_refused(shape: tuple[int, ...]) -> None:
    for use in uses(conv(2)):
        with pytest.raises(ValueError, match=r"expected .*; got " + re.escape(str(shape))):
            use(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_input_is_refused(shape: tuple[int, ...]) -> None:
    for use in [*uses(linear(3)), *uses(SmoothLeakyReLU())]:
        with pytest.raises(ValueError, match="non-empty tensor.*got " + re.escape(str(shape))):
            use(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_input_that_is_not_floating_is_refused(dtype: torch.dtype) -> None:
    for use in [*uses(linear(3)), *uses(SmoothLeakyReLU()), *uses(conv(2))]:
        with pytest.raises(ValueError, match=f"expected a floating-point tensor; got {dtype}"):
            use(torch.ones(2, 3, 3, dtype=dtype))


@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 1.0, None])
def test_input_that_is_no_tensor_is_refused(value: object) -> None:
    name = type(value).__name__
    for use in [*uses(linear(3)), *uses(SmoothLeakyReLU()), *uses(conv(2))]:
        with pytest.raises(ValueError, match=f"expected a floating-point tensor; got {name}"):
            use(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    for layer in (linear(3), conv(2)):
        message = f"{type(layer).__name__}.*expected dtype torch.float64; got {dtype}"
        for use in uses(layer):
            with pytest.raises(ValueError, match=message):
                use(torch.ones(2, 3, 3, dtype=dtype))


def test_half_precision_layer_refuses_double_input() -> None:
    layer = SelfNormalizingLinear(3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"expected dtype torch\.float16; got torch\.float64"):
        layer(torch.ones(2, 3))


def test_bad_input_leaves_the_layer_as_it_was() -> None:
    layer, x = linear(3), torch.randn(2, 3)
    expected = layer(x)
    for use in uses(layer):
        with pytest.raises(ValueError, match="expected"):
            use(torch.zeros(2, 4))
    assert layer(x) is expected


# --- NaN and infinity ---------------------------------------------------------------------------


def loss_of(transform: Transform, x: Tensor) -> Tensor:
    """A density model's loss; Pyro's own, with its validation on, refuses what is not finite."""
    y = transform(x)
    return 0.5 * y.square().mean() - transform.log_abs_det_jacobian(x, y).mean()


@pytest.mark.filterwarnings("ignore:T.inv did not converge:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in CASES if "Spline" not in name])
def test_bad_data_surface_in_the_loss(name: str, value: float) -> None:
    case: Case = CASES[name]
    transform, x = case.make(), batch(case)
    x.view(-1)[0] = value
    assert not torch.isfinite(loss_of(transform, x))
    y = transform(x)
    assert not torch.isfinite(y).all()
    transform.clear_cache()
    y = output_batch(case)
    y.view(-1)[0] = value
    assert not torch.isfinite(transform.inv(y)).all()


@pytest.mark.parametrize("inverse", ["refined", "learned", "exact"])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_row_spoils_no_other(value: float, log_det: str, inverse: str) -> None:
    layer, x = linear(4, log_det=log_det, inverse=inverse), torch.randn(3, 4)
    expected, expected_inverse = layer(x), layer.inv(x.clone())
    bad = x.clone()
    bad[1, 2] = value
    for part, good in [(layer, expected), (layer.inv, expected_inverse)]:
        result = part(bad)
        assert not torch.isfinite(result[1]).all()
        assert torch.allclose(result[[0, 2]], good[[0, 2]], rtol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data_never_enter_a_tracked_inverse(value: float) -> None:
    layer, bad = linear(4), torch.full((3, 4), value)
    with torch.no_grad():
        layer.theta.mul_(0.9)  # R is due for an update
    loss_of(layer, bad).backward()
    assert torch.isfinite(layer.estimator.inverse_t).all()
    assert torch.isfinite(layer.estimator.log_abs_det_inverse)
    assert layer.certificate < 1
    x = torch.randn(2, 4)
    expected = torch.linalg.slogdet(layer.weight.detach()).logabsdet
    assert torch.allclose(layer.log_abs_det_jacobian(x, layer(x)), expected.expand(2), atol=1e-6)


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_log_det_is_no_function_of_the_data(log_det: str) -> None:
    layer, x = linear(4, log_det=log_det), torch.randn(3, 4)
    good = layer.log_abs_det_jacobian(x, layer(x))
    bad = torch.full((3, 4), math.nan)
    assert torch.equal(layer.log_abs_det_jacobian(bad, layer(bad)), good)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("parameter", ["theta", "log_scale", "bias"])
@pytest.mark.parametrize("log_det", LOG_DETS)
def test_bad_parameters_surface(log_det: str, parameter: str, kind: str) -> None:
    # As a number in what depends on them, or as an error; not as a finite density.
    layer = linear(4, log_det=log_det) if kind == "linear" else conv(4, log_det=log_det)
    x = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        getattr(layer, parameter).view(-1)[0] = math.nan
    assert torch.isnan(layer(x)).any()
    for mode in (True, False):
        layer.train(mode)
        try:
            assert not torch.isfinite(loss_of(layer, x))
        except torch.linalg.LinAlgError as error:
            assert f"{type(layer).__name__}(4, " in str(error)  # noqa: PT017


# --- Lower precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["refined", "learned", "exact"])
@pytest.mark.parametrize("log_det", LOG_DETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_works(dtype: torch.dtype, log_det: str, inverse: str) -> None:
    reference = linear(8, log_det=log_det, inverse=inverse)
    layer = linear(8, log_det=log_det, inverse=inverse).to(dtype)
    x = torch.randn(5, 8)
    expected = reference(x)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 32 * torch.finfo(dtype).eps  # a dozen roundings of numbers of size 1 to 3
    assert torch.allclose(y.double(), expected, atol=tolerance)
    again = layer.inv(y.detach().clone())
    assert again.dtype == dtype
    assert torch.allclose(again.double(), x, atol=2 * tolerance)
    with torch.no_grad():
        log_det_value = layer.log_abs_det_jacobian(x.to(dtype), y).double()
        assert torch.allclose(
            log_det_value, reference.log_abs_det_jacobian(x, expected), atol=tolerance
        )


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
        assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
        errors.append((y.detach().double().std() - 1).abs().item())
    # Data of standard deviation 3 are whitened.
    assert errors[0] > 1.5
    assert errors[-1] < 0.2


@pytest.mark.parametrize("log_det", LOG_DETS)
def test_autocast(log_det: str) -> None:
    layer = linear(8, log_det=log_det).float()
    x = torch.randn(5, 8, dtype=torch.float32)
    expected = layer.with_cache(0)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        log_det_value = layer.log_abs_det_jacobian(x, y)
        again = layer.inv(y.detach().clone().float())
        low = layer(x.bfloat16())
    assert torch.allclose(y.float(), expected, atol=0.1)
    assert torch.allclose(low.float(), expected, atol=0.1)
    assert torch.allclose(again.float(), x, atol=0.1)
    assert log_det_value.dtype == torch.float32
    (y.float().square().sum() - log_det_value.sum() + again.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
