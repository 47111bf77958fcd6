"""Odd values for every option, function and input: refused by a check of ours, or a right result.

Each option is given each of :data:`ODD`. Which of them it may accept is what a predicate says,
which is written down here apart from the library's own checks. ``python -m tests.test_fuzz``
prints how many inputs were accepted and refused.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import math
import numbers
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import Transform

import pyro_snf
from pyro_snf import (
    GECO,
    AutoSelfNormalizingFlow,
    Compose,
    CouplingNet,
    Exact,
    InverseTransformModule,
    Learned,
    LowRankAutoregressive,
    MultiScale,
    PairExact,
    PairLearned,
    PairRefined,
    Reconstruction,
    Refined,
    ResidualMLP,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    Squeeze2d,
    diagnostics,
    fit,
    flows,
    images,
)
from pyro_snf.optim import NaturalGradient
from pyro_snf.options import expect
from tests.registry import CASES, CONDITIONAL_CASES, batch, conv

PACKAGE = os.path.dirname(pyro_snf.__file__)

# Of an error's text, in which a value is cut short; a layer's own name may be of some lines.
MAX_LENGTH = 3000

# --- Odd values ---------------------------------------------------------------------------------


class Hostile:
    """An object of which nothing can be asked."""

    def _fail(self, *args: object) -> Any:
        raise TypeError("an odd object was asked for more than its type")

    __bool__ = __eq__ = __len__ = __iter__ = __repr__ = __index__ = __float__ = __int__ = _fail
    __getitem__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __neg__ = __contains__ = _fail
    __hash__ = object.__hash__


class Three(enum.IntEnum):
    THREE = 3


class Text(str):
    pass


class FakeInteger(numbers.Integral):
    """A number whose type says that it is an integer, and which is not."""

    def _fail(self, *args: object) -> Any:
        raise TypeError("not a number after all")

    __abs__ = __add__ = __and__ = __ceil__ = __eq__ = __floor__ = __floordiv__ = __int__ = _fail
    __invert__ = __le__ = __lshift__ = __lt__ = __mod__ = __mul__ = __neg__ = __or__ = _fail
    __pos__ = __pow__ = __radd__ = __rand__ = __rfloordiv__ = __rlshift__ = __rmod__ = _fail
    __rmul__ = __ror__ = __round__ = __rpow__ = __rrshift__ = __rshift__ = __rtruediv__ = _fail
    __rxor__ = __truediv__ = __trunc__ = __xor__ = __repr__ = _fail
    __hash__ = object.__hash__


#: Functions that make them, for some are used up. Integers that a count may be are small: there is
#: no check that memory suffices.
ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "np.True_": lambda: np.True_,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "4": lambda: 4,
    "IntEnum": lambda: Three.THREE,
    "0.0": lambda: 0.0,
    "-0.0": lambda: -0.0,
    "0.5": lambda: 0.5,
    "1.0": lambda: 1.0,
    "-2.5": lambda: -2.5,
    "1e308": lambda: 1e308,
    "5e-324": lambda: 5e-324,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "-10**400": lambda: -(10**400),
    "10**5000": lambda: 10**5000,
    "1j": lambda: 1j,
    "Fraction": lambda: Fraction(1, 3),
    "huge Fraction": lambda: Fraction(10**400, 3),
    "Decimal": lambda: Decimal("0.5"),
    "FakeInteger": FakeInteger,
    "np.int64": lambda: np.int64(3),
    "np.int8": lambda: np.int8(-1),
    "np.uint64": lambda: np.uint64(2**64 - 1),
    "np.float32": lambda: np.float32(0.5),
    "np.float16 nan": lambda: np.float16(math.nan),
    "np.longdouble": lambda: np.longdouble("1e4000"),
    "np.complex64": lambda: np.complex64(1),
    "np.datetime64": lambda: np.datetime64("2026-01-01"),
    "np.timedelta64": lambda: np.timedelta64(3, "s"),
    "np.str_": lambda: np.str_("refined"),
    "np.bytes_": lambda: np.bytes_(b"refined"),
    "0-d array": lambda: np.array(3),
    "array": lambda: np.array([1.0, 2.0]),
    "integer array": lambda: np.array([1, 2, 4]),
    "empty array": lambda: np.array([]),
    "array of strings": lambda: np.array(["refined", "exact"]),
    "array of objects": lambda: np.array([None, 3], dtype=object),
    "array of flags": lambda: np.array([True, False]),
    "structured array": lambda: np.zeros(2, dtype=[("a", int), ("b", float)]),
    "large array": lambda: np.zeros((100, 100)),
    "tensor of 3": lambda: torch.tensor(3),
    "tensor of 0.5": lambda: torch.tensor(0.5),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "empty tensor": lambda: torch.empty(0),
    "complex tensor": lambda: torch.tensor([1j]),
    "tensor of flags": lambda: torch.tensor([True, False]),
    "half tensor": lambda: torch.ones(2, dtype=torch.float16),
    "meta tensor": lambda: torch.empty(2, device="meta"),
    "sparse tensor": lambda: torch.eye(2).to_sparse(),
    "requires grad": lambda: torch.tensor(0.5, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "''": lambda: "",
    "'3'": lambda: "3",
    "'nan'": lambda: "nan",
    "'exact'": lambda: "exact",
    "Text": lambda: Text("exact"),
    "long string": lambda: "x" * 100_000,
    "surrogate string": lambda: "\ud800",
    "b'exact'": lambda: b"exact",
    "[]": lambda: [],
    "()": lambda: (),
    "[4]": lambda: [4],
    "(1, 4, 4)": lambda: (1, 4, 4),
    "(3, 3)": lambda: (3, 3),
    "torch.Size": lambda: torch.Size([1, 4, 4]),
    "[0]": lambda: [0],
    "[2, -1]": lambda: [2, -1],
    "[1.5]": lambda: [1.5],
    "[True]": lambda: [True],
    "['3']": lambda: ["3"],
    "[None]": lambda: [None],
    "[[2], [2]]": lambda: [[2], [2]],
    "[10**400]": lambda: [10**400],
    "[Hostile]": lambda: [Hostile()],
    "list in itself": lambda: _nested(),
    "long list": lambda: [0] * 100_000,
    "range(2, 4)": lambda: range(2, 4),
    "generator": lambda: (i for i in (2, 3)),
    "{}": lambda: {},
    "{'exact': 1}": lambda: {"exact": 1},
    "{3}": lambda: {3},
    "int": lambda: int,
    "float": lambda: float,
    "Refined": lambda: Refined,
    "Refined()": lambda: Refined(),
    "PairExact()": lambda: PairExact(),
    "GECO": lambda: GECO(0.1),
    "lambda": lambda: lambda *args: None,
    "module": lambda: nn.Linear(2, 2),
    "transform": lambda: SmoothLeakyReLU(),
    "distribution": lambda: dist.Normal(0.0, 1.0),
    "np": lambda: np,
    "slice": lambda: slice(3),
    "...": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "object": object,
    "Hostile": Hostile,
    "torch.float32": lambda: torch.float32,
    "torch.int64": lambda: torch.int64,
    "torch.complex64": lambda: torch.complex64,
    "torch.device": lambda: torch.device("cpu"),
    "'cpu'": lambda: "cpu",
    "exception": lambda: ValueError("expected x; got y"),
}


def _nested() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


# --- What an option may be ----------------------------------------------------------------------

#: None: not to be tried.
Predicate = Callable[[Any], bool | None]


def is_integer(value: Any) -> bool:
    kinds = (int, np.int64, np.int8, np.uint64)
    return type(value) in kinds or isinstance(value, enum.IntEnum)


def count(minimum: int = 1, maximum: int = 2**63 - 1) -> Predicate:
    return lambda value: is_integer(value) and minimum <= int(value) <= maximum


def number(fits: Callable[[float], bool]) -> Predicate:
    kinds = (float, Fraction, np.float32, np.float16, np.longdouble)

    def check(value: Any) -> bool:
        if not (is_integer(value) or type(value) in kinds):
            return False
        try:
            return fits(float(value))
        except OverflowError:
            return False

    return check


positive = number(lambda x: 0 < x < math.inf)
unit = number(lambda x: 0 < x < 1)
nonnegative = number(lambda x: 0 <= x < math.inf)


def choice(*names: str) -> Predicate:
    return lambda value: isinstance(value, str) and str(value) in names


def flag(value: Any) -> bool:
    return type(value) in (bool, np.bool_)


def dtype(value: Any) -> bool:
    return value is None or value is torch.float32


def device(value: Any) -> bool:
    return value is None or isinstance(value, torch.device) or choice("cpu")(value)


def optional(fits: Predicate) -> Predicate:
    return lambda value: value is None or fits(value)


def either(*all_fits: Predicate) -> Predicate:
    def check(value: Any) -> bool | None:
        found = [fits(value) for fits in all_fits]
        return None if None in found and True not in found else any(found)

    return check


def counts(value: Any) -> bool:
    if type(value) not in (list, tuple, range, torch.Size):
        return False
    return len(value) > 0 and all(map(count(), value))


def one_of(*kinds: type) -> Predicate:
    return lambda value: isinstance(value, kinds)


def nothing(value: Any) -> bool:
    return False


def image(value: Any) -> bool:
    return counts(value) and len(value) == 3


def kernel(value: Any) -> bool:
    sizes = value if counts(value) and len(value) == 2 else [value]
    return all(count()(size) and size % 2 for size in sizes)


def penalty(value: Any) -> bool:
    if callable(value) and not isinstance(value, type | nn.Module | Tensor):
        return True
    return nonnegative(value) or isinstance(value, GECO)


def dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def real(value: Any) -> bool:
    return dense(value) and not value.is_complex() and value.dtype != torch.bool


def pixels(value: Any) -> bool:
    return real(value) and bool(((value >= 0) & (value == value.floor())).all())


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def levels(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(type(one) is int and one == 0 for one in value)
    if isinstance(value, Tensor):
        return real(value) and value.numel() > 0 and bool(((value >= 0) & (value <= 1)).all())
    return number(lambda x: 0 <= x <= 1)(value) and not isinstance(value, Fraction)


def factory(value: Any) -> bool | None:
    """Of functions. What those here raise when they are called is not for us to say."""
    if isinstance(value, type) or not callable(value):
        return None if isinstance(value, type) else False
    return False if isinstance(value, nn.Module | Transform) else None


# --- Options ------------------------------------------------------------------------------------

METHODS = either(choice("refined", "learned", "exact"), one_of(Refined, Learned, Exact))
PAIR_METHODS = either(choice("refined", "learned", "exact"), one_of(PairExact))
FACTORY: dict[str, Predicate] = {"device": device, "dtype": dtype}
LAYER: dict[str, Predicate] = {
    "log_det": METHODS,
    "inverse": lambda value: value is None or choice("iterative", "exact", "one_pass")(value),
    "bias": flag,
    "init_scale": positive,
    **FACTORY,
}
PAIR: dict[str, Predicate] = {
    "log_det": PAIR_METHODS,
    "reconstruction": optional(one_of(Reconstruction)),
    "inverse": choice("iterative", "one_pass"),
    "inverse_tolerance": optional(unit),
}
PROBES: dict[str, Predicate] = {
    "num_probes": count(),
    "probe": choice("gaussian", "rademacher", "orthogonal"),
    "lanczos_steps": count(0),
    "seed": optional(count(0)),
}
MLP: dict[str, Predicate] = {
    "hidden_dims": counts,
    "num_blocks": count(),
    "activation": lambda value: value is Refined,  # which is a class of modules
    **FACTORY,
}


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@functools.cache
def guide() -> AutoSelfNormalizingFlow:
    made = AutoSelfNormalizingFlow(model, num_layers=1)
    made()
    return made


def one_step(**options: Any) -> Any:
    options = {"num_steps": 1, "num_particles": 1, "progress": False, **options}
    return fit(model, AutoSelfNormalizingFlow(model, num_layers=1), **options)


def one_epoch(**options: Any) -> Any:
    data = torch.linspace(-1.0, 1.0, 20).view(10, 2).square()
    flow = flows.tabular(2, num_layers=1, hidden_dim=4)
    defaults = {"flow": flow, "data": data, "num_epochs": 1, "progress": False}
    return pyro_snf.fit_density(**{**defaults, **options})


def pair_of(**options: Any) -> Any:
    networks = {"forward_net": ResidualMLP(2, [2]), "inverse_net": ResidualMLP(2, [2])}
    if "event_shape" not in options and "event_dim" not in options:
        options["event_shape"] = 2
    return pyro_snf.SelfNormalizingPair(**{**networks, **options})


def conditional_pair_of(**options: Any) -> Any:
    networks = [ResidualMLP(2, [2], context_dim=1) for _ in range(2)]
    defaults = {"forward_net": networks[0], "inverse_net": networks[1], "event_shape": 2}
    return pyro_snf.ConditionalSelfNormalizingPair(**{**defaults, **options})


def conditional_linear_of(**options: Any) -> Any:
    options = {"input_dim": 2, "nn": DenseNN(1, [2], [2, 2]), **options}
    return pyro_snf.ConditionalSelfNormalizingLinear(**options)


def call(function: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """The function, with keywords for what a test does not set; the first parameters by name."""
    return lambda **options: function(**{**defaults, **options})


#: A name, a function of keywords, and what each of them may be.
SPLINES: dict[str, Predicate] = {
    "input_dim": count(),
    "hidden_dim": count(),
    "num_bins": count(2, 1000),
    "bound": positive,
}

OPTIONS: list[tuple[str, Callable[..., Any], dict[str, Predicate]]] = [
    (
        "GECO",
        call(GECO, tolerance=0.1),
        {
            "tolerance": number(lambda x: 0 < x < 1e18),
            "weight": positive,
            "min_weight": number(lambda x: 0 <= x <= 1),
            "max_weight": number(lambda x: x >= 1),
            "rate": positive,
            "fall": positive,
            "decay": number(lambda x: 0 <= x < 1),
        },
    ),
    (
        "Refined",
        Refined,
        {
            "num_probes": count(),
            "tolerance": unit,
            "krylov_steps": optional(count()),
            "seed": optional(count(0)),
        },
    ),
    (
        "Learned",
        Learned,
        {
            "mixture": number(lambda x: 0 <= x < 1),
            "reconstruction_weight": penalty,
            "reconstruction": choice("both", "symmetric", "inverse"),
        },
    ),
    ("PairLearned", PairLearned, PROBES),
    ("PairRefined", PairRefined, {**PROBES, "tolerance": unit, "krylov_steps": count()}),
    (
        "Reconstruction",
        Reconstruction,
        {
            "weight": optional(penalty),
            "trains": choice("both", "inverse"),
            "seed": optional(count(0)),
        },
    ),
    (
        "SelfNormalizingLinear",
        call(SelfNormalizingLinear, input_dim=2),
        {"input_dim": count(), **LAYER},
    ),
    (
        "SelfNormalizingConv2d",
        call(pyro_snf.SelfNormalizingConv2d, channels=2),
        {
            "channels": count(),
            "kernel_size": kernel,
            "inverse_kernel_size": optional(kernel),
            "padding_mode": choice("zeros", "circular"),
            **LAYER,
        },
    ),
    (
        "self_normalizing_linear",
        call(pyro_snf.self_normalizing_linear, input_dim=2),
        {"input_dim": count()},
    ),
    (
        "self_normalizing_conv2d",
        call(pyro_snf.self_normalizing_conv2d, channels=2),
        {"channels": count(), "kernel_size": kernel},
    ),
    (
        "ConditionalSelfNormalizingLinear",
        conditional_linear_of,
        {
            "input_dim": count(2, 2),
            "nn": lambda value: callable(value),
            "rank": count(0, 0),
            **LAYER,
            "bias": nothing,
        },
    ),
    (
        "conditional_self_normalizing_linear",
        call(pyro_snf.conditional_self_normalizing_linear, input_dim=2, context_dim=1),
        {
            "input_dim": count(),
            "context_dim": count(),
            "hidden_dims": optional(counts),
            "rank": count(0, 2),
            **LAYER,
            "bias": nothing,
        },
    ),
    (
        "SelfNormalizingPair",
        pair_of,
        {
            "forward_net": one_of(nn.Module),
            "inverse_net": one_of(nn.Module),
            "event_shape": either(count(), counts),
            "event_dim": count(),
            **PAIR,
        },
    ),
    (
        "ConditionalSelfNormalizingPair",
        conditional_pair_of,
        {
            "forward_net": one_of(nn.Module),
            "inverse_net": one_of(nn.Module),
            "context_event_dim": count(0),
            **PAIR,
        },
    ),
    (
        "self_normalizing_pair",
        call(pyro_snf.self_normalizing_pair, input_dim=2, hidden_dims=[2]),
        {"input_dim": count(), **MLP, **PAIR},
    ),
    (
        "conditional_self_normalizing_pair",
        call(
            pyro_snf.conditional_self_normalizing_pair, input_dim=2, context_dim=1, hidden_dims=[2]
        ),
        {"input_dim": count(), "context_dim": count(), **MLP, **PAIR},
    ),
    (
        "ResidualMLP",
        call(ResidualMLP, input_dim=2, hidden_dims=[2]),
        {"input_dim": count(), "context_dim": count(0), **MLP},
    ),
    (
        "LowRankAutoregressive",
        call(LowRankAutoregressive, input_dim=2),
        {
            "input_dim": count(),
            "hidden_dim": count(),
            "max_log_scale": positive,
            **FACTORY,
        },
    ),
    (
        "low_rank_autoregressive",
        call(pyro_snf.low_rank_autoregressive, input_dim=2),
        {"input_dim": count(), "hidden_dim": count()},
    ),
    (
        "RationalQuadraticSpline",
        call(pyro_snf.RationalQuadraticSpline, event_shape=2),
        {
            "event_shape": either(count(), counts),
            "num_bins": count(2, 1000),
            "bound": positive,
            **FACTORY,
        },
    ),
    (
        "rational_quadratic_spline",
        call(pyro_snf.rational_quadratic_spline, event_shape=2),
        {"event_shape": either(count(), counts)},
    ),
    (
        "SplineAutoregressive",
        call(pyro_snf.SplineAutoregressive, input_dim=2),
        {**SPLINES, "context_dim": count(0), **FACTORY},
    ),
    (
        "spline_autoregressive",
        call(pyro_snf.spline_autoregressive, input_dim=2),
        {"input_dim": count(), "hidden_dim": count()},
    ),
    (
        "ConditionalSplineAutoregressive",
        call(pyro_snf.ConditionalSplineAutoregressive, input_dim=2, context_dim=1),
        {"context_dim": count(), **SPLINES, **FACTORY},
    ),
    (
        "conditional_spline_autoregressive",
        call(pyro_snf.conditional_spline_autoregressive, input_dim=2, context_dim=1),
        {"input_dim": count(), "context_dim": count(), "hidden_dim": count()},
    ),
    (
        "GaussianCopula",
        call(pyro_snf.GaussianCopula, input_dim=2),
        {
            "input_dim": count(),
            "num_bins": count(2, 1000),
            "min_gain": number(lambda x: x >= 0),
            **LAYER,
        },
    ),
    (
        "gaussian_copula",
        call(pyro_snf.gaussian_copula, input_dim=2),
        {"input_dim": count()},
    ),
    ("SmoothLeakyReLU", SmoothLeakyReLU, {"alpha": unit, "learnable": flag, **FACTORY}),
    ("smooth_leaky_relu", pyro_snf.smooth_leaky_relu, {"alpha": unit}),
    (
        "ActNorm",
        call(pyro_snf.ActNorm, num_channels=2),
        {"num_channels": count(), "event_dim": either(count(1, 1), count(3, 3)), **FACTORY},
    ),
    ("actnorm", call(pyro_snf.actnorm, num_channels=2), {"num_channels": count()}),
    (
        "CouplingNet",
        call(CouplingNet, in_channels=1, out_channels=2, hidden_channels=2),
        {
            "in_channels": count(),
            "out_channels": count(),
            "hidden_channels": count(),
            **FACTORY,
        },
    ),
    (
        "ImageCoupling",
        call(pyro_snf.ImageCoupling, num_channels=2, network=CouplingNet(1, 2, hidden_channels=2)),
        {
            "num_channels": count(2),
            "network": one_of(nn.Module),
            "max_scale": number(lambda x: 1 < x < math.inf),
        },
    ),
    (
        "image_coupling",
        call(pyro_snf.image_coupling, num_channels=2, hidden_channels=2),
        {
            "num_channels": count(2),
            "hidden_channels": count(),
            "max_scale": number(lambda x: 1 < x < math.inf),
            **FACTORY,
        },
    ),
    ("Squeeze2d", Squeeze2d, {"factor": count()}),
    ("squeeze2d", pyro_snf.squeeze2d, {"factor": count()}),
    (
        "Compose",
        call(Compose, parts=[Squeeze2d()]),
        {"parts": one_of(Transform), "cache_size": count(0, 1)},
    ),
    (
        "MultiScale",
        call(MultiScale, levels=[Squeeze2d()], event_shape=(1, 4, 4)),
        {"levels": nothing, "event_shape": lambda value: image(value) and value[1] % 2 == 0},
    ),
    ("InverseTransformModule", InverseTransformModule, {"transform": one_of(Transform)}),
    (
        "flows.fully_connected",
        call(flows.fully_connected, event_shape=2),
        {
            "event_shape": either(count(), counts),
            "num_layers": count(),
            **LAYER,
            "activation": either(choice("smooth_leaky_relu", "spline"), factory),
        },
    ),
    (
        "flows.convolutional",
        call(flows.convolutional, event_shape=(1, 4, 4), num_blocks=1, layers_per_block=2),
        {
            "event_shape": image,
            "num_blocks": count(1, 1),
            "layers_per_block": count(),
            "kernel_size": kernel,
            "padding_mode": choice("zeros", "circular"),
            **LAYER,
            "activation": either(choice("smooth_leaky_relu", "spline"), factory),
        },
    ),
    (
        "ConditionalCompose",
        call(pyro_snf.ConditionalCompose, parts=[Squeeze2d()]),
        {"parts": nothing},
    ),
    (
        "flows.tabular",
        call(flows.tabular, input_dim=2, hidden_dim=4),
        {
            "input_dim": count(),
            "num_layers": count(),
            "hidden_dim": count(),
            "num_bins": count(2, 1000),
            "context_dim": count(0),
            **LAYER,
        },
    ),
    (
        "fit_density",
        one_epoch,
        {
            "flow": nothing,
            "data": nothing,
            "context": optional(nothing),
            "validation": number(lambda x: 0 <= x < 1),
            "base": optional(nothing),
            "num_epochs": count(),
            "max_seconds": optional(positive),
            "batch_size": count(),
            "learning_rate": positive,
            "seed": optional(count(0, 2**32 - 1)),
            "progress": flag,
        },
    ),
    (
        "flows.glow",
        call(flows.glow, event_shape=(1, 16, 16), num_levels=1, num_steps=1, hidden_channels=2),
        {
            "event_shape": image,
            "num_levels": count(1, 4),
            "num_steps": count(),
            "kernel_size": kernel,
            "hidden_channels": count(),
            **LAYER,
        },
    ),
    (
        "AutoSelfNormalizingFlow",
        call(AutoSelfNormalizingFlow, model=model),
        {
            "num_layers": count(),
            "activation": factory,
            "init_loc_fn": callable,
            "init_scale": positive,
            "gradient": optional(choice("path", "total")),
            "clip": optional(number(lambda x: 1 < x < math.inf)),
            "log_det": METHODS,
            "inverse": LAYER["inverse"],
        },
    ),
    (
        "guide.sample_posterior",
        lambda **options: guide().sample_posterior(**options),
        {"num_samples": count()},
    ),
    ("guide.quantiles", lambda **options: guide().quantiles(**options), {"quantiles": levels}),
    (
        "NaturalGradient",
        lambda **options: NaturalGradient(**{"guide": guide(), **options}),
        {"guide": nothing, "num_steps": optional(count()), "lr": positive},
    ),
    (
        "fit",
        one_step,
        {
            "num_steps": count(),
            "num_particles": optional(count()),
            "optim": optional(nothing),
            "num_starts": optional(count(1, 1)),
            "tolerance": optional(positive),
            "seed": optional(count(0, 2**32 - 1)),
            "progress": flag,
        },
    ),
    (
        "images.LogitTransform",
        images.LogitTransform,
        {"num_levels": count(2), "event_dim": count(0), "alpha": number(lambda x: 0 < x < 0.5)},
    ),
    (
        "images.logit_transform",
        images.logit_transform,
        {
            "num_levels": count(2),
            "event_dim": count(0),
            "alpha": number(lambda x: 0 < x < 0.5),
        },
    ),
    (
        "images.dequantize",
        call(images.dequantize, pixels=torch.zeros(3)),
        {"pixels": pixels, "num_levels": count(2), "generator": optional(nothing)},
    ),
    (
        "images.quantize",
        call(images.quantize, x=torch.zeros(3)),
        {"x": lambda value: real(value) and floating(value), "num_levels": count(2)},
    ),
    (
        "images.bits_per_dim",
        call(images.bits_per_dim, log_prob=torch.zeros(3), event_shape=(2,)),
        {"log_prob": floating, "event_shape": counts},
    ),
    (
        "diagnostics.gradient_error",
        lambda **options: diagnostics.gradient_error(**{"transform": conv(2), **options}),
        {
            "transform": nothing,
            "image_size": lambda value: counts(value) and len(value) == 2 and min(value) > 2,
        },
    ),
    (
        "diagnostics.inverse_error",
        lambda **options: diagnostics.inverse_error(**{"transform": conv(2), **options}),
        {
            "transform": nothing,
            "image_size": lambda value: counts(value) and len(value) == 2,
        },
    ),
    (
        "diagnostics.pair_report",
        lambda **options: diagnostics.pair_report(
            **{"transform": pair_of(), "x": torch.zeros(3, 2), **options}
        ),
        {
            "transform": nothing,
            "x": lambda value: (
                floating(value)
                and dense(value)
                and value.dtype == torch.float64
                and value.shape == (2,)
            ),
        },
    ),
    ("diagnostics.report", diagnostics.report, {"flow": nothing}),
    (
        "diagnostics.psis",
        lambda **options: diagnostics.psis(model, guide(), **{"num_samples": 25, **options}),
        {"num_samples": count(25), "vectorize": optional(flag)},
    ),
]


# --- Outcomes -----------------------------------------------------------------------------------

REFUSED, ACCEPTED = "refused", "accepted"

#: How many inputs were refused and accepted, and how many were errors of another kind.
COUNTS: Counter[str] = Counter()


def outcome(use: Callable[..., object], *args: object) -> tuple[str, Any]:
    """What becomes of a call, and its result: refused by a check of ours, accepted, or an error."""
    got, result = _outcome(use, *args)
    COUNTS[got if got in (REFUSED, ACCEPTED) else "other"] += 1
    return got, result


def _outcome(use: Callable[..., object], *args: object) -> tuple[str, Any]:
    try:
        return ACCEPTED, use(*args)
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        is_ours = isinstance(error, ValueError | TypeError) and last.filename.startswith(PACKAGE)
        if is_ours and "expected" in str(error) and len(str(error)) < MAX_LENGTH:
            return REFUSED, None
        return f"{type(error).__name__}: {str(error)[:100]}", None


#: What has no options of its own: results, base classes, and the methods without an option.
WITHOUT_OPTIONS = {
    *("Fit", "DensityFit", "PSIS", "GradientError", "LayerReport", "PairReport", "Report"),
    *("Exact", "PairExact", "PairMethod", "LogDetMethod", "InvertibleTransformModule"),
}


def test_every_option_of_every_public_name_is_tried() -> None:
    tried = {name: options for name, _, options in OPTIONS}
    missing = []
    named = [("flows.", flows), ("images.", images), ("diagnostics.", diagnostics)]
    for prefix, module in [("", pyro_snf), ("", pyro_snf.optim), *named]:
        for name in module.__all__:
            value = getattr(module, name)
            if name in WITHOUT_OPTIONS or inspect.ismodule(value):
                continue
            for option, parameter in inspect.signature(value).parameters.items():
                is_open = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                is_users = option in ("model", "guide")  # any function will do
                if not (is_open or is_users or option in tried[prefix + name]):
                    missing.append(f"{prefix}{name}: {option}")
    assert not missing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "make", "options"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_options(name: str, make: Callable[..., Any], options: dict[str, Predicate]) -> None:
    wrong = []
    for option, fits in options.items():
        # Half of them for each option, and the other half for the next: they share their checks.
        for label, odd in list(ODD.items())[len(option) % 2 :: 2]:
            value = odd()
            if (fits_here := fits(value)) is None:
                continue
            expected = ACCEPTED if fits_here else REFUSED
            got, result = outcome(partial(make, **{option: value}))
            if got == ACCEPTED:
                repr(result)
            if got != expected:
                wrong.append(f"{option} = {label}: expected {expected}; got {got}")
    assert not wrong, "\n".join(wrong)


# --- Inputs -------------------------------------------------------------------------------------

#: Other forms of a batch that a transform takes: the result is that of the batch itself.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "part of a larger one": lambda x: torch.cat([x, x], 0)[: len(x)],
    "requires grad": lambda x: x.clone().requires_grad_(),
    "a result": lambda x: x.clone().requires_grad_() * 1,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "real part": lambda x: torch.complex(x, x).real,
    "negated lazily": lambda x: torch.complex(x, -x).conj().imag,
    "numpy's memory": lambda x: torch.from_numpy(x.numpy().copy()),
    "subclass": lambda x: x.clone().as_subclass(Subclass),
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "frozen": lambda x: x.detach(),
}


class Subclass(Tensor):
    pass


#: What no transform takes.
NEVER: dict[str, Callable[[Tensor], object]] = {
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "None": lambda x: None,
    "float": lambda x: 1.0,
    "string": lambda x: "x",
    "Hostile": lambda x: Hostile(),
    "module": lambda x: nn.Linear(2, 2),
    "distribution": lambda x: dist.Normal(0.0, 1.0),
    "tuple": lambda x: (x,),
    "dictionary": lambda x: {"x": x},
    "class": lambda x: Tensor,
    "integers": lambda x: x.long(),
    "flags": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "empty": lambda x: x[:0],
    "empty events": lambda x: x[..., :0],
}

#: What some transforms take, and others do not.
PERHAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "no batch": lambda x: x[0],
    "a number": lambda x: x.flatten()[0],
    "larger events": lambda x: torch.cat([x, x], -1),
    "one dimension more": lambda x: x[None, ..., None],
}

#: Values of floating-point numbers; the result need not be finite.
EXTREME = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e300, -1e300, 1e-300, 5e-324]

#: One of each kind of transform, and of each direction that has code of its own.
FUZZED = [
    *(
        "linear refined",
        "linear learned",
        "linear exact",
        "conv refined",
        "conv learned circular 5×3 of 3×3",
    ),
    *("conv exact circular 3×5", "smooth leaky relu learnable", "rational-quadratic bins"),
    *("autoregressive", "actnorm of images", "actnorm of features", "squeeze", "image coupling"),
    *("free form refined", "free form learned", "free form on images", "multi-scale"),
    *("Compose with autoregressive", "inverse of conv", "inverse of multi-scale"),
]


def uses_of(name: str) -> dict[str, tuple[Callable[[Any], Any], Tensor]]:
    """Ways to use a new transform, each with a valid argument."""
    case = CASES[name]
    transform = case.make()
    x, y = batch(case, (3,)), transform(batch(case, (3,))).detach()
    transform.clear_cache()
    return {
        "T": (transform, x),
        "T.inv": (transform.inv, y),
        "log-det at x": (lambda x: transform.log_abs_det_jacobian(x, y), x),
        "log-det at y": (lambda y: transform.log_abs_det_jacobian(x, y), y),
    }


def wrong_forms(use: Callable[[Any], Any], valid: Tensor, expected: Tensor) -> list[str]:
    """The other forms of a valid tensor whose result is not the expected one."""
    wrong = []
    for label, odd in SAME.items():
        got, result = outcome(use, odd(valid))
        if got != ACCEPTED or not torch.allclose(result.detach(), expected, rtol=1e-9):
            wrong.append(f"{label}: expected a right result; got {got}")
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUZZED)
def test_inputs(name: str) -> None:
    wrong = []
    for way, (use, valid) in uses_of(name).items():
        expected = use(valid).detach()
        wrong += [f"{way} of {one}" for one in wrong_forms(use, valid, expected)]
        for label, odd in NEVER.items():
            got, result = outcome(use, odd(valid))
            is_ignored = way.startswith("log-det") and got == ACCEPTED  # one of both may be
            if got != REFUSED and not (is_ignored and torch.allclose(result.detach(), expected)):
                wrong.append(f"{way} of {label}: expected {REFUSED}; got {got}")
        for label, odd in PERHAPS.items():
            got, result = outcome(use, odd(valid))
            if got not in (REFUSED, ACCEPTED) or (got == ACCEPTED and result.isnan().any()):
                wrong.append(f"{way} of {label}: got {got}")
        for value in EXTREME:
            got, result = outcome(use, torch.full_like(valid, value))
            is_shown = "log-det" in way or not math.isnan(value) or result.isnan().any()
            if got != ACCEPTED or not is_shown:
                wrong.append(f"{way} of {value}: got {got}")
    assert not wrong, "\n".join(wrong)


CONTEXTS = ["conditional linear refined rank=2", "conditional free form refined"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str) -> None:
    case, wrong = CONDITIONAL_CASES[name], []
    # In training, a row that is not finite would be an error.
    transform, x = case.make().eval(), torch.randn(3, case.input_dim)
    valid = torch.randn(3, case.context_dim)

    def use(context: Any) -> Tensor:
        return transform.condition(context)(x)

    expected = use(valid).detach()
    wrong += wrong_forms(use, valid, expected)
    for label, odd in NEVER.items():
        got, _ = outcome(use, odd(valid))
        if got != REFUSED:
            wrong.append(f"{label}: expected {REFUSED}; got {got}")
    for label, odd in ODD.items():
        value = odd()
        if floating(value) and value.shape == (case.context_dim,):
            continue  # a context; one on another device is for torch to refuse
        got, _ = outcome(use, value)
        if got != REFUSED:
            wrong.append(f"{label}: expected {REFUSED}; got {got}")
    for value in EXTREME:
        got, _ = outcome(use, torch.full_like(valid, value))
        if got != ACCEPTED:
            wrong.append(f"{value}: expected {ACCEPTED}; got {got}")
    assert not wrong, "\n".join(wrong)


# --- States -------------------------------------------------------------------------------------


@functools.cache
def state_of_guide() -> dict[str, Any]:
    return copy.deepcopy(guide().state_dict())


#: A name, a function that makes a module, and one that returns its state.
STATES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    name: (CASES[name].make, lambda name=name: CASES[name].make().state_dict())
    for name in ("linear refined", "conv refined", "actnorm of images", "free form refined D=1")
} | {"guide": (lambda: AutoSelfNormalizingFlow(model, num_layers=1), state_of_guide)}


def load(module: nn.Module, state: dict[str, Any], key: str) -> None:
    """Load a state, of which a key does not fit; torch lists the errors, with their keys."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        if key in str(error):
            expect(f"{key} to fit", False, error)
        raise


def takes_first_entry() -> bool:
    """Whether this torch loads the first entry of a vector into a scalar, as older ones do."""
    module = nn.Module()
    module.register_buffer("number", torch.zeros(()))
    try:
        module.load_state_dict({"number": torch.ones(2)})
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", STATES)
def test_states(name: str) -> None:
    is_lax = takes_first_entry()
    make, state_of = STATES[name]
    state, wrong = state_of(), []
    module = make()
    for key in state:
        for label, odd in ODD.items():
            value = odd()
            if isinstance(value, Tensor) and value.numel() == state[key].numel():
                continue  # a tensor that torch takes
            if is_lax and state[key].dim() == 0 and isinstance(value, Tensor) and value.dim() == 1:
                continue
            got, _ = outcome(load, module, {**state, key: value}, key)
            if got != REFUSED:
                wrong.append(f"{key} = {label}: expected {REFUSED}; got {got}")
    module.load_state_dict(state)
    assert not wrong, "\n".join(wrong)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    total: Counter[str] = Counter()
    for title, test, rows in [
        ("options", test_options, OPTIONS),
        ("inputs", test_inputs, [(name,) for name in FUZZED]),
        ("contexts", test_contexts, [(name,) for name in CONTEXTS]),
        ("states", test_states, [(name,) for name in STATES]),
    ]:
        COUNTS.clear()
        for row in rows:
            test(*row)
        print(f"{title:10}", *(f"{COUNTS[key]:6} {key}" for key in (REFUSED, ACCEPTED, "other")))
        total += COUNTS
    print(f"{'total':10}", *(f"{total[key]:6} {key}" for key in (REFUSED, ACCEPTED, "other")))


if __name__ == "__main__":
    main()
