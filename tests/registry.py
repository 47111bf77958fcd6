"""The registry of named constructors that the contract tests run over, and what they share.

A new transform of ``pyro_snf.__all__`` gets a line in :data:`CASES`, one that is to be conditioned
a line in :data:`CONDITIONAL_CASES`; a test sees to it.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import ConditionalTransformModule
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_snf import (
    GECO,
    ActNorm,
    Compose,
    ConditionalCompose,
    ConditionalSelfNormalizingLinear,
    ConditionalSelfNormalizingPair,
    ConditionalSplineAutoregressive,
    CouplingNet,
    Exact,
    GaussianCopula,
    ImageCoupling,
    InverseTransformModule,
    Learned,
    LogDetMethod,
    LowRankAutoregressive,
    MultiScale,
    PairExact,
    PairLearned,
    PairMethod,
    PairRefined,
    RationalQuadraticSpline,
    Reconstruction,
    Refined,
    ResidualMLP,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    SmoothLeakyReLU,
    SplineAutoregressive,
    Squeeze2d,
    actnorm,
    conditional_self_normalizing_linear,
    conditional_self_normalizing_pair,
    conditional_spline_autoregressive,
    gaussian_copula,
    image_coupling,
    low_rank_autoregressive,
    rational_quadratic_spline,
    self_normalizing_conv2d,
    self_normalizing_linear,
    self_normalizing_pair,
    smooth_leaky_relu,
    spline_autoregressive,
    squeeze2d,
)
from pyro_snf.maps import kernels
from pyro_snf.maps.convolution_factors import ConvolutionFactors
from pyro_snf.maps.kernels import norm_bound

LOG_DETS = ["refined", "learned", "exact"]
INVERSES = ["iterative", "exact", "one_pass"]

METHODS: dict[str, type[LogDetMethod]] = {"refined": Refined, "learned": Learned, "exact": Exact}
PAIR_METHODS: dict[str, type[PairMethod]] = {
    "refined": PairRefined,
    "learned": PairLearned,
    "exact": PairExact,
}

# ‖Θ/√D‖₂ of random layers: the singular values of A lie in [0.5, 1.5], its condition is below 3.
SPREAD = 0.5


# ‖∂r‖₂ of the blocks of random residual networks, ``h + r(h)``: each is a contraction away from the
# identity, hence invertible, and its singular values lie in [0.6, 1.4].
BLOCK_SPREAD = 0.4


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, well conditioned, and every layer an exact R.

    For the exceptions with convolutions and with pairs of networks, see :func:`make_inverse_exact`
    and :func:`make_inverse_near`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        return noise.to(tensor.device)

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, SelfNormalizingLinear | SelfNormalizingConv2d):
                noise = normal(part.theta)
                if isinstance(part, SelfNormalizingLinear):
                    size = torch.linalg.matrix_norm(noise, 2) / math.sqrt(part.input_dim)
                else:
                    size = kernels.theta_scale(noise) * norm_bound(noise)
                part.theta.copy_(SPREAD / size * noise)
                part.log_scale.copy_(0.3 * normal(part.log_scale))
                if part.bias is not None:
                    part.bias.copy_(normal(part.bias))
                make_inverse_exact(part)
            elif isinstance(part, SmoothLeakyReLU):
                part.logit_alpha.add_(0.3 * normal(part.logit_alpha))
            elif isinstance(part, LowRankAutoregressive | RationalQuadraticSpline):
                for parameter in part.parameters():
                    parameter.copy_(0.5 * normal(parameter))
            elif isinstance(part, GaussianCopula):
                for name, parameter in part.named_parameters(recurse=False):
                    parameter.add_((1.0 if name == "first_y" else 0.3) * normal(parameter))
                part.mean.copy_(normal(part.mean))
                part.deviation.copy_((0.3 * normal(part.deviation)).exp())
                part.initialized.fill_(True)
            elif isinstance(part, SplineAutoregressive):
                for parameter in part.parameters():
                    parameter.copy_(0.5 * normal(parameter))
            elif isinstance(part, ActNorm):
                for parameter in part.parameters():
                    parameter.copy_(0.3 * normal(parameter))
                part.initialized.fill_(True)
            elif isinstance(part, CouplingNet):
                for parameter in part.parameters():
                    parameter.copy_(0.3 * normal(parameter))
            elif isinstance(part, dist.transforms.Spline):
                for parameter in part.parameters():
                    parameter.copy_(normal(parameter).sigmoid())
            elif isinstance(part, SelfNormalizingPair):
                _randomize_network(part.forward_net, normal)
                make_inverse_near(part)


def randomize_outputs(network: DenseNN) -> None:
    """Make a context matter to a network that starts as the same map for all contexts."""
    nn.init.normal_(network.layers[-1].weight, std=0.2)


@torch.no_grad()
def _randomize_network(network: nn.Module, normal: Callable[[Tensor], Tensor]) -> None:
    """Blocks whose layers' norms have the product :data:`BLOCK_SPREAD`, or a pair's matrices."""
    for block in getattr(network, "blocks", [network]):
        layers = [part for part in block.modules() if hasattr(part, "weight")]
        for layer in layers:
            noise = normal(layer.weight)
            if isinstance(network, Sinh):
                noise = SPREAD / torch.linalg.matrix_norm(noise, 2) * noise
                layer.weight.copy_(torch.eye(len(noise)) + noise)
            else:
                size = torch.linalg.matrix_norm(noise, 2) if noise.dim() == 2 else norm_bound(noise)
                layer.weight.copy_(BLOCK_SPREAD ** (1 / len(layers)) / size * noise)
            layer.bias.copy_(0.3 * normal(layer.bias))


@torch.no_grad()
def make_inverse_near(transform: SelfNormalizingPair) -> None:
    """Make g nearly the inverse of f, or the inverse itself for a pair of :class:`Sinh`.

    Of a block ``h + r(h)`` that is ``h − r(h)``; what it leaves is of second order in r.
    """
    f, g = transform.forward_net, transform.inverse_net
    if isinstance(f, Sinh):
        for layer, other in ((g.first, f.last), (g.last, f.first)):
            inverse = torch.linalg.inv(other.weight)
            layer.weight.copy_(inverse)
            layer.bias.copy_(-inverse @ other.bias)
        return
    for block, other in zip(g.blocks, reversed(f.blocks), strict=True):
        block.load_state_dict(other.state_dict())
        last = [part for part in block.modules() if hasattr(part, "weight")][-1]
        last.weight.neg_()
        last.bias.neg_()


@torch.no_grad()
def make_inverse_exact(layer: SelfNormalizingLinear | SelfNormalizingConv2d) -> None:
    """Set R to A⁻¹, where it is learned or tracked.

    A learned kernel has the inverse of a periodic image that it just covers: the exact one for
    circular images of that size, and for 1 × 1 kernels. A refined convolution is exact at its first
    use.
    """
    layer.refactorize()
    method = layer.log_det
    if isinstance(method, Learned) and isinstance(layer, SelfNormalizingConv2d):
        size = method.theta.shape[-2:]
        kernel = method.linear_map.weight(layer.theta)
        inverse = ConvolutionFactors(kernel, size, "circular").inverse_kernel(size)
        method.theta.copy_(method.linear_map.theta_of(inverse))


@torch.no_grad()
def nudge_inverses(module: nn.Module, size: float, seed: int = 1) -> None:
    """Add noise of norm ``size`` per row to every R that is learned or tracked, and to every g."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, SelfNormalizingPair):
            for parameter in layer.inverse_net.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise, alpha=size / math.sqrt(parameter[0].numel()))
        if not isinstance(layer, SelfNormalizingLinear | SelfNormalizingConv2d):
            continue
        scale = size
        if isinstance(layer.log_det, Learned):
            target = layer.log_det.theta
        elif (tracked := tracked_inverse(layer)) is not None:
            target, scale = tracked, size / math.sqrt(len(tracked))
        else:
            continue
        noise = torch.randn(target.shape, generator=generator, dtype=target.dtype)
        target.add_(noise, alpha=scale)


def tracked_inverse(layer: SelfNormalizingLinear | SelfNormalizingConv2d) -> Tensor | None:
    """The buffer Rᵀ of a layer that tracks an inverse, else None."""
    return getattr(getattr(layer.log_det, "estimator", None), "inverse_t", None)


class Sinh(nn.Module):
    """``A sinh(B x + b) + a``, or the like with asinh: the inverse of one is one of the other."""

    def __init__(self, dim: int, function: Callable[[Tensor], Tensor] = torch.sinh) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class ResidualConv(nn.Module):
    """``x + W tanh(V x + b) + a`` on images of any size, W and V being convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = nn.Conv2d(channels, 3, (1, 3), padding=(0, 1))
        last = nn.Conv2d(3, channels, (3, 1), padding=(1, 0), padding_mode="circular")
        self.blocks = nn.ModuleList([nn.Sequential(first, nn.Tanh(), last)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks[0](x)


def rising_weight(step: int) -> float:
    """A schedule of λ that can be pickled."""
    return 1.0 + 0.1 * step


def free_form(
    dim: int = 3, *, width: int = 4, num_blocks: int = 1, seed: int = 0, **options: object
) -> SelfNormalizingPair:
    """A pair of random residual networks in float64, g being near the inverse."""

    def build() -> SelfNormalizingPair:
        pair = _pair(dim, width=width, num_blocks=num_blocks)
        return SelfNormalizingPair(*pair, event_shape=dim, **pair_options(options))

    return _randomized(build)(seed)


def exact_pair(dim: int = 3, *, seed: int = 0, **options: object) -> SelfNormalizingPair:
    """A pair of random networks in float64, g being the inverse."""
    make = _randomized(
        lambda: SelfNormalizingPair(*_exact_pair(dim), event_shape=dim, **pair_options(options))
    )
    return make(seed)


def conditional_pair(
    dim: int = 3, context_dim: int = 2, *, seed: int = 0, **options: object
) -> ConditionalSelfNormalizingPair:
    """The same, with a context for both."""

    def build() -> ConditionalSelfNormalizingPair:
        pair = _pair(dim, context_dim=context_dim)
        return ConditionalSelfNormalizingPair(*pair, event_shape=dim, **pair_options(options))

    return _randomized(build)(seed)


def _pair(
    dim: int, *, width: int = 4, num_blocks: int = 1, context_dim: int = 0
) -> tuple[ResidualMLP, ...]:
    options = {"num_blocks": num_blocks, "context_dim": context_dim, "activation": nn.Tanh}
    return tuple(ResidualMLP(dim, [width], **options) for _ in range(2))


def _exact_pair(dim: int) -> tuple[Sinh, Sinh]:
    return Sinh(dim), Sinh(dim, torch.asinh)


def linear(dim: int = 5, *, seed: int = 0, **options: object) -> SelfNormalizingLinear:
    """A random linear layer in float64 with an exact R."""
    layer = SelfNormalizingLinear(dim, dtype=torch.float64, **layer_options(options))
    randomize(layer, seed)
    return layer


def conv(channels: int = 2, *, seed: int = 0, **options: object) -> SelfNormalizingConv2d:
    """A random convolution in float64; R is as :func:`make_inverse_exact` says."""
    layer = SelfNormalizingConv2d(channels, dtype=torch.float64, **layer_options(options))
    randomize(layer, seed)
    return layer


def _randomized(make: Callable[[], nn.Module]) -> Callable[[int], Transform]:
    def build(seed: int = 0) -> Transform:
        # Pyro's transforms draw their parameters from the global stream: not to disturb it.
        with torch.random.fork_rng(devices=[]):
            transform = make().double()
        randomize(transform, seed)
        return transform

    return build


class Case(NamedTuple):
    """One named constructor."""

    make: Callable[..., Transform]
    """``make(seed)`` returns a random transform in float64, R being exact."""
    shape: tuple[int, ...]
    """The trailing shape of inputs, and of outputs if ``output_shape`` does not say otherwise."""
    api: str
    """The name in ``pyro_snf.__all__`` that it is built by."""
    remembers_inverse: bool = True
    """Whether ``T.inv(y)`` is exact by construction, so that the pair is cached."""
    foreign: bool = False
    """Whether Pyro's Spline is in it. It has no ``with_cache``, and keeps a tensor with a graph
    once it was used, which ``deepcopy`` refuses."""
    output_shape: tuple[int, ...] | None = None
    """The trailing shape of outputs, where it is not that of inputs."""


#: The keywords of layers; all others are of their log-determinant methods.
_LAYER_OPTIONS = {
    *("inverse", "bias", "init_scale", "device", "dtype"),
    *("kernel_size", "inverse_kernel_size", "padding_mode"),
    *("event_shape", "event_dim", "inverse_tolerance"),
}


def layer_options(
    options: dict[str, object], methods: dict[str, type] = METHODS
) -> dict[str, object]:
    """Keywords of a layer from those of the layer and of its method, in one dictionary.

    :param options: among them ``log_det``, a name, and ``geco``, whether λ is controlled.
    """
    own = {name: value for name, value in options.items() if name in _LAYER_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in _LAYER_OPTIONS}
    name = rest.pop("log_det", "refined")
    if rest.pop("geco", False):
        rest["reconstruction_weight"] = GECO(0.02)
    return {**own, "log_det": methods[name](**rest)}


def pair_options(options: dict[str, object]) -> dict[str, object]:
    """The same for a pair, with the keywords of its penalty in ``reconstruction``."""
    penalty = dict(options.get("reconstruction", {}))
    rest = {name: value for name, value in options.items() if name != "reconstruction"}
    if rest.pop("geco", False):
        penalty["weight"] = GECO(0.02)
    return {**layer_options(rest, PAIR_METHODS), "reconstruction": Reconstruction(**penalty)}


def _linear_case(dim: int = 5, *, remembers_inverse: bool = True, **options: object) -> Case:
    make = _randomized(lambda: SelfNormalizingLinear(dim, **layer_options(options)))
    return Case(make, (dim,), "SelfNormalizingLinear", remembers_inverse)


def _conv_case(
    shape: tuple[int, ...] = (2, 4, 4), *, remembers_inverse: bool = True, **options: object
) -> Case:
    make = _randomized(lambda: SelfNormalizingConv2d(shape[0], **layer_options(options)))
    return Case(make, shape, "SelfNormalizingConv2d", remembers_inverse)


def _free_form_case(
    dim: int = 3,
    *,
    make_pair: Callable[[int], tuple[nn.Module, ...]] = _pair,
    remembers_inverse: bool = True,
    **options: object,
) -> Case:
    def build() -> SelfNormalizingPair:
        return SelfNormalizingPair(*make_pair(dim), event_shape=dim, **pair_options(options))

    return Case(_randomized(build), (dim,), "SelfNormalizingPair", remembers_inverse)


def _image_pair() -> SelfNormalizingPair:
    # Nothing but the number of dimensions is known: images of any size will do.
    return SelfNormalizingPair(ResidualConv(2), ResidualConv(2), event_dim=3, log_det="learned")


def _autoregressive_case(dim: int, hidden_dim: int = 64, **options: float) -> Case:
    # D=1 has hidden units that nothing can see, and parameters without a gradient: it is in
    # test_autoregressive.
    make = _randomized(lambda: LowRankAutoregressive(dim, hidden_dim, **options))
    return Case(make, (dim,), "LowRankAutoregressive")


def _stack() -> Compose:
    return Compose([SelfNormalizingLinear(3), SmoothLeakyReLU(), SelfNormalizingLinear(3)])


def _image_stack() -> Compose:
    return Compose(
        [
            SelfNormalizingConv2d(2, (3, 1)),
            SmoothLeakyReLU(),
            SelfNormalizingConv2d(2, 1, log_det="exact").inv,
        ]
    )


def _coupling(channels: int) -> ImageCoupling:
    return image_coupling(channels, hidden_channels=4)


def _glow() -> MultiScale:
    # An inverse, an elementwise transform and a level of one transform are among the parts.
    levels = [
        Compose([Squeeze2d(), ActNorm(4), _coupling(4)]),
        Compose([_coupling(2).inv, SmoothLeakyReLU()]),
    ]
    return MultiScale(levels, (1, 4, 6))


def _image_flow() -> Compose:
    return Compose([ActNorm(1), _glow(), SelfNormalizingLinear(24)])


CASES: dict[str, Case] = {
    "linear refined": _linear_case(),
    "linear refined D=1": _linear_case(1),
    "linear refined D=8 k=2": _linear_case(8, num_probes=2),
    "linear refined no bias": _linear_case(bias=False),
    "linear refined inverse=exact": _linear_case(inverse="exact"),
    "linear refined inverse=one_pass (approximate)": _linear_case(
        inverse="one_pass", remembers_inverse=False
    ),
    "linear learned": _linear_case(log_det="learned"),
    "linear learned D=1": _linear_case(1, log_det="learned"),
    "linear learned mixture=0": _linear_case(log_det="learned", mixture=0.0),
    "linear learned symmetric": _linear_case(log_det="learned", reconstruction="symmetric"),
    "linear learned R only": _linear_case(log_det="learned", reconstruction="inverse"),
    "linear learned GECO": _linear_case(log_det="learned", geco=True),
    "linear learned no bias": _linear_case(log_det="learned", bias=False),
    "linear learned inverse=exact": _linear_case(log_det="learned", inverse="exact"),
    "linear learned inverse=one_pass (approximate)": _linear_case(
        log_det="learned", inverse="one_pass", remembers_inverse=False
    ),
    "linear exact": _linear_case(log_det="exact"),
    "linear exact D=1": _linear_case(1, log_det="exact"),
    "linear by the factory": Case(
        _randomized(lambda: self_normalizing_linear(4, init_scale=0.5)),
        (4,),
        "self_normalizing_linear",
    ),
    "conv refined": _conv_case(),
    "conv refined circular": _conv_case((2, 3, 4), padding_mode="circular", num_probes=2),
    "conv refined 1×1": _conv_case((3, 2, 3), kernel_size=1),
    "conv refined 3×5 no bias": _conv_case((1, 5, 6), kernel_size=(3, 5), bias=False),
    "conv refined inverse=exact": _conv_case((1, 3, 4), inverse="exact"),
    "conv refined inverse=one_pass (approximate)": _conv_case(
        (2, 3, 5), padding_mode="circular", inverse="one_pass", remembers_inverse=False
    ),
    "conv learned": _conv_case(log_det="learned"),
    "conv learned circular 5×3 of 3×3": _conv_case(
        (1, 5, 4), log_det="learned", padding_mode="circular", inverse_kernel_size=(5, 3)
    ),
    "conv learned 1×1 GECO": _conv_case((3, 2, 3), kernel_size=1, log_det="learned", geco=True),
    "conv learned symmetric mixture=0": _conv_case(
        (1, 4, 5), log_det="learned", mixture=0.0, reconstruction="symmetric"
    ),
    "conv learned R only": _conv_case((1, 3, 4), log_det="learned", reconstruction="inverse"),
    "conv learned inverse=one_pass (approximate)": _conv_case(
        (2, 3, 3),
        padding_mode="circular",
        log_det="learned",
        inverse="one_pass",
        remembers_inverse=False,
    ),
    "conv exact": _conv_case((2, 4, 3), log_det="exact"),
    "conv exact circular 3×5": _conv_case(
        (1, 4, 5), kernel_size=(3, 5), log_det="exact", padding_mode="circular"
    ),
    "conv exact 1×1": _conv_case((2, 2, 2), kernel_size=1, log_det="exact", inverse="exact"),
    "conv by the factory": Case(
        _randomized(lambda: self_normalizing_conv2d(1, init_scale=0.5)),
        (1, 3, 4),
        "self_normalizing_conv2d",
    ),
    "smooth leaky relu": Case(_randomized(SmoothLeakyReLU), (), "SmoothLeakyReLU"),
    "smooth leaky relu on vectors": Case(_randomized(SmoothLeakyReLU), (3,), "SmoothLeakyReLU"),
    "smooth leaky relu alpha=0.02": Case(
        _randomized(lambda: SmoothLeakyReLU(0.02)), (), "SmoothLeakyReLU"
    ),
    "smooth leaky relu learnable": Case(
        _randomized(lambda: SmoothLeakyReLU(learnable=True)), (3,), "SmoothLeakyReLU"
    ),
    "smooth leaky relu by the factory": Case(
        _randomized(lambda: smooth_leaky_relu(0.5, learnable=True)), (3,), "smooth_leaky_relu"
    ),
    "rational-quadratic bins": Case(
        _randomized(lambda: RationalQuadraticSpline(3, bound=2.0)), (3,), "RationalQuadraticSpline"
    ),
    "rational-quadratic bins on images": Case(
        _randomized(lambda: rational_quadratic_spline((1, 2, 3), num_bins=3)),
        (1, 2, 3),
        "rational_quadratic_spline",
    ),
    "autoregressive": _autoregressive_case(5),
    "autoregressive D=2": _autoregressive_case(2),
    "autoregressive D=4 H=1": _autoregressive_case(4, 1),
    "autoregressive D=3 H=7": _autoregressive_case(3, 7),
    "autoregressive D=9 H=3": _autoregressive_case(9, 3),
    "autoregressive sigma=0.5": _autoregressive_case(5, 4, max_log_scale=0.5),
    "autoregressive by the factory": Case(
        _randomized(lambda: low_rank_autoregressive(4, 6)), (4,), "low_rank_autoregressive"
    ),
    "spline autoregressive": Case(
        _randomized(lambda: SplineAutoregressive(4, 8, num_bins=3, bound=2.0)),
        (4,),
        "SplineAutoregressive",
    ),
    "spline autoregressive by the factory D=2": Case(
        _randomized(lambda: spline_autoregressive(2, 4)), (2,), "spline_autoregressive"
    ),
    "gaussian copula": Case(
        _randomized(lambda: GaussianCopula(3, num_bins=4)), (3,), "GaussianCopula"
    ),
    "gaussian copula by the factory": Case(
        _randomized(lambda: gaussian_copula(2, num_bins=3, log_det="exact")),
        (2,),
        "gaussian_copula",
    ),
    "actnorm of images": Case(_randomized(lambda: ActNorm(3)), (3, 2, 4), "ActNorm"),
    "actnorm of features": Case(_randomized(lambda: ActNorm(5, event_dim=1)), (5,), "ActNorm"),
    "actnorm by the factory": Case(_randomized(lambda: actnorm(2)), (2, 3, 1), "actnorm"),
    "squeeze": Case(_randomized(Squeeze2d), (2, 4, 6), "Squeeze2d", output_shape=(8, 2, 3)),
    "squeeze by the factory": Case(
        _randomized(lambda: squeeze2d(3)), (1, 3, 6), "squeeze2d", output_shape=(9, 1, 2)
    ),
    "image coupling": Case(
        _randomized(lambda: ImageCoupling(3, CouplingNet(1, 4, hidden_channels=4))),
        (3, 2, 4),
        "ImageCoupling",
    ),
    "image coupling by the factory": Case(
        _randomized(lambda: _coupling(4)), (4, 3, 3), "image_coupling"
    ),
    # Enough iterations for the value in training to be exact, whatever the default is.
    "free form refined": _free_form_case(lanczos_steps=4),
    "free form refined D=1": _free_form_case(1, lanczos_steps=4),
    "free form refined k=2 rademacher, a schedule": _free_form_case(
        num_probes=2,
        probe="rademacher",
        lanczos_steps=3,
        reconstruction={"weight": rising_weight},
    ),
    "free form learned": _free_form_case(log_det="learned"),
    "free form learned k=2 orthogonal GECO": _free_form_case(
        log_det="learned", num_probes=2, probe="orthogonal", geco=True
    ),
    "free form learned k=2 gaussian": _free_form_case(
        2, log_det="learned", num_probes=2, probe="gaussian"
    ),
    "free form exact, g only": _free_form_case(
        2, log_det="exact", reconstruction={"trains": "inverse"}
    ),
    "free form inverse=one_pass (approximate)": _free_form_case(
        make_pair=_exact_pair, lanczos_steps=4, inverse="one_pass", remembers_inverse=False
    ),
    "free form on images": Case(_randomized(_image_pair), (2, 2, 3), "SelfNormalizingPair"),
    "free form by the factory": Case(
        _randomized(
            lambda: self_normalizing_pair(
                2, [4], num_blocks=2, log_det=PairRefined(lanczos_steps=4)
            )
        ),
        (2,),
        "self_normalizing_pair",
    ),
    "multi-scale": Case(_randomized(_glow), (1, 4, 6), "MultiScale", output_shape=(24,)),
    "inverse of multi-scale": Case(
        _randomized(lambda: _glow().inv), (24,), "InverseTransformModule", output_shape=(1, 4, 6)
    ),
    "Compose with multi-scale": Case(
        _randomized(_image_flow), (1, 4, 6), "Compose", output_shape=(24,)
    ),
    "Compose with autoregressive": Case(
        _randomized(lambda: Compose([LowRankAutoregressive(3, 4), SelfNormalizingLinear(3)])),
        (3,),
        "Compose",
    ),
    "inverse of autoregressive": Case(
        _randomized(lambda: LowRankAutoregressive(4, 3).inv), (4,), "InverseTransformModule"
    ),
    "Compose linear-activation-linear": Case(_randomized(_stack), (3,), "Compose"),
    "Compose with Pyro's Spline": Case(
        _randomized(lambda: Compose([SelfNormalizingLinear(3), dist.transforms.Spline(3)])),
        (3,),
        "Compose",
        foreign=True,
    ),
    "Compose that starts with Pyro's Spline": Case(
        _randomized(lambda: Compose([dist.transforms.Spline(3), SelfNormalizingLinear(3)])),
        (3,),
        "Compose",
        foreign=True,
    ),
    "Compose with an inverse": Case(
        _randomized(
            lambda: Compose(
                [SelfNormalizingLinear(3), SmoothLeakyReLU(), SelfNormalizingLinear(3).inv]
            )
        ),
        (3,),
        "Compose",
    ),
    "Compose conv-activation-inverse conv": Case(_randomized(_image_stack), (2, 3, 2), "Compose"),
    "inverse of conv": Case(
        _randomized(lambda: SelfNormalizingConv2d(1).inv), (1, 4, 3), "InverseTransformModule"
    ),
    "inverse of linear": Case(
        _randomized(lambda: SelfNormalizingLinear(4).inv), (4,), "InverseTransformModule"
    ),
    "inverse of Compose": Case(_randomized(lambda: _stack().inv), (3,), "InverseTransformModule"),
    "inverse of Pyro's Spline": Case(
        _randomized(lambda: InverseTransformModule(dist.transforms.Spline(3))),
        (3,),
        "InverseTransformModule",
        foreign=True,
    ),
}


class ConditionalCase(NamedTuple):
    """One named constructor of a transform that is to be conditioned."""

    make: Callable[..., ConditionalSelfNormalizingLinear | ConditionalSelfNormalizingPair]
    """``make(seed)`` returns a random one in float64, R being exact, the network smooth."""
    input_dim: int
    context_dim: int
    api: str
    """The name in ``pyro_snf.__all__`` that it is built by."""


def _conditional_case(
    dim: int = 4, *, by_factory: bool = False, rank: int = 0, **options: object
) -> ConditionalCase:
    def make(seed: int = 0) -> ConditionalSelfNormalizingLinear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if by_factory:
                transform = conditional_self_normalizing_linear(
                    dim, 2, [6], rank=rank, **layer_options(options)
                )
                randomize_outputs(transform.nn)
            else:
                sizes = [dim, dim, rank * dim, rank * dim][: 4 if rank else 2]
                network = DenseNN(2, [6], sizes, nonlinearity=nn.Tanh())
                transform = ConditionalSelfNormalizingLinear(
                    dim, network, rank=rank, **layer_options(options)
                )
        randomize(transform.double(), seed)
        return transform

    api = (
        "conditional_self_normalizing_linear" if by_factory else "ConditionalSelfNormalizingLinear"
    )
    return ConditionalCase(make, dim, 2, api)


def _conditional_pair_case(*, by_factory: bool = False, **options: object) -> ConditionalCase:
    def build() -> ConditionalSelfNormalizingPair:
        if by_factory:
            return conditional_self_normalizing_pair(
                3, 2, [4], num_blocks=2, **pair_options(options)
            )
        return ConditionalSelfNormalizingPair(
            *_pair(3, context_dim=2), event_shape=3, **pair_options(options)
        )

    api = "conditional_self_normalizing_pair" if by_factory else "ConditionalSelfNormalizingPair"
    return ConditionalCase(_randomized(build), 3, 2, api)


CONDITIONAL_CASES: dict[str, ConditionalCase] = {
    "conditional linear refined": _conditional_case(),
    "conditional linear refined rank=2": _conditional_case(rank=2),
    "conditional linear refined rank=D": _conditional_case(3, rank=3),
    "conditional linear refined D=1": _conditional_case(1),
    "conditional linear refined D=1 rank=1": _conditional_case(1, rank=1),
    "conditional linear refined inverse=exact": _conditional_case(rank=1, inverse="exact"),
    "conditional linear learned": _conditional_case(log_det="learned"),
    "conditional linear learned rank=2": _conditional_case(rank=2, log_det="learned"),
    "conditional linear exact": _conditional_case(log_det="exact"),
    "conditional linear exact rank=2": _conditional_case(rank=2, log_det="exact"),
    "conditional linear by the factory": _conditional_case(by_factory=True, init_scale=0.5),
    "conditional linear by the factory rank=1": _conditional_case(by_factory=True, rank=1),
    "conditional free form refined": _conditional_pair_case(lanczos_steps=4),
    "conditional free form learned": _conditional_pair_case(log_det="learned"),
    "conditional free form exact GECO": _conditional_pair_case(log_det="exact", geco=True),
    "conditional free form by the factory": _conditional_pair_case(
        by_factory=True, lanczos_steps=4, reconstruction={"weight": 0.5}
    ),
}


def _conditional_stack() -> ConditionalCompose:
    return ConditionalCompose(
        [SelfNormalizingLinear(3), ConditionalSplineAutoregressive(3, 2, 8, num_bins=3)]
    )


#: Those whose contexts are inputs of splines, on which tests/test_tables.py has tests of its own.
CONDITIONAL_SPLINES: dict[str, Callable[..., ConditionalTransformModule]] = {
    "ConditionalSplineAutoregressive": _randomized(
        lambda: ConditionalSplineAutoregressive(4, 2, 8, num_bins=3)
    ),
    "conditional_spline_autoregressive": _randomized(
        lambda: conditional_spline_autoregressive(1, 2, 4)
    ),
    "ConditionalCompose": _randomized(_conditional_stack),
}


def batch(case: Case, shape: tuple[int, ...] = (6,), seed: int = 0) -> Tensor:
    """Standard normal inputs of a case, float64, shape ``(*shape, *case.shape)``."""
    return _standard_normal((*shape, *case.shape), seed)


def output_batch(case: Case, shape: tuple[int, ...] = (6,), seed: int = 0) -> Tensor:
    """The same for outputs, from the same numbers."""
    output_shape = case.shape if case.output_shape is None else case.output_shape
    return _standard_normal((*shape, *output_shape), seed)


def _standard_normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def by_pickle(module: nn.Module) -> nn.Module:
    """A copy of the module."""
    return pickle.loads(pickle.dumps(module))


#: Ways to copy a module.
COPIES = [copy.deepcopy, by_pickle]


# --- Losses of every sample: all ways in which a log-determinant enters ---


def density_by_inverse(transform: Transform, x: Tensor) -> Tensor:
    """``log p(x)`` of ``[T.inv]``: data go through T; ∂loss/∂ladj < 0 for a likelihood."""
    return _flow(x, transform.inv).log_prob(x)


def density_by_transform(transform: Transform, x: Tensor) -> Tensor:
    """``log p(x)`` of ``[T]``: data go through T.inv; the sign is the other one."""
    return _flow(x, transform).log_prob(x)


def entropy_of_guide(transform: Transform, x: Tensor) -> Tensor:
    """``log q(z) − log p(z)`` at a reparametrized sample ``z = T(x)`` of the guide ``[T]``."""
    sample = transform(x)
    events = tuple(range(-transform.domain.event_dim, 0))
    return _flow(x, transform).log_prob(sample) + 0.5 * (sample - 1).square().sum(events)


def entropy_of_inverse_guide(transform: Transform, x: Tensor) -> Tensor:
    """The same for the guide ``[T.inv]``."""
    return entropy_of_guide(transform.inv, x)


LOSSES = [
    density_by_inverse,
    density_by_transform,
    entropy_of_guide,
    entropy_of_inverse_guide,
]


Reduction = Callable[[Tensor], Tensor]

#: What becomes of the samples' losses.
REDUCTIONS: dict[str, Reduction] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "times 0.1": lambda value: 0.1 * value.sum(),
    "negated": lambda value: -value.mean(),
    # What importance weights and score functions do: another factor, and sign, for each sample.
    "weighted": lambda value: (torch.linspace(-1, 2, value.numel()) * value.flatten()).sum(),
}


def _flow(x: Tensor, transform: Transform) -> dist.TransformedDistribution:
    event_shape = x.shape[x.dim() - transform.domain.event_dim :]
    return dist.TransformedDistribution(standard_normal(*event_shape), [transform])


def standard_normal(*event_shape: int) -> dist.Distribution:
    """The base of a flow, ``N(0, I)``."""
    return dist.Normal(torch.zeros(event_shape), 1.0).to_event(len(event_shape))


def log_det_of(transform: Transform, x: Tensor) -> Tensor:
    return transform.log_abs_det_jacobian(x, transform(x))


def exact_log_det(layer: SelfNormalizingLinear) -> float:
    """``log|det W|``, computed in float64."""
    return torch.linalg.slogdet(layer.weight.detach().double()).logabsdet.item()


def density_loss(transform: Transform, data: Tensor) -> Tensor:
    """``−mean log p(data)`` of the density model ``[T.inv]``, the data going through T."""
    base = dist.Normal(data.new_zeros(transform.forward_shape(data.shape[1:])), 1.0)
    return -dist.TransformedDistribution(base, [transform.inv]).log_prob(data).mean()


def guide_loss(transform: Transform, noise: Tensor) -> Tensor:
    """A reparametrized ``KL(q ‖ N(1, 1))`` of the guide ``[T]``, from given base samples."""
    base = dist.Normal(torch.zeros_like(noise[0]), 1.0)
    sample = transform(noise)
    entropy = -dist.TransformedDistribution(base, [transform]).log_prob(sample).mean()
    return 0.5 * (sample - 1).square().sum() / len(noise) - entropy


def is_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    """The tolerance is one for float64 and condition numbers below 10."""
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether the tensors of two lists are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def shared_gradients(layer: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters but those of R."""
    return {
        name: parameter.grad.clone()
        for name, parameter in layer.named_parameters()
        if not name.startswith("log_det.")
    }


def assert_gradients_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """The tolerance is that of :func:`is_close`."""
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < tolerance, name


def assert_refused(transform: Transform, x: object, message: str) -> None:
    """By the transform, its inverse and its log-determinant."""
    for use in (transform, transform.inv, lambda x: transform.log_abs_det_jacobian(x, x)):
        with pytest.raises(ValueError, match=message):
            use(x)


def train(transform: nn.Module, case: Case, steps: int = 4, seed: int = 0) -> list[float]:
    """A few steps of Adam on both losses; the losses."""
    parameters = [p for p in transform.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    losses = []
    for step in range(steps):
        data, noise = batch(case, seed=seed + 2 * step), batch(case, seed=seed + 2 * step + 1)
        loss = density_loss(transform, data) + guide_loss(transform, noise)
        losses.append(loss.item())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def one_of_a_kind(fits: Callable[[Case], bool]) -> dict[str, Case]:
    """The first case of every constructor and method, of those that fit."""
    found: dict[object, str] = {}
    for name, case in CASES.items():
        if "factory" not in name and fits(case):
            found.setdefault((case.api, *(set(name.split()) & set(LOG_DETS))), name)
    return {name: CASES[name] for name in found.values()}
