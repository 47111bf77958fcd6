"""Self Normalizing Flows for Pyro: unconstrained layers without the O(D³) log-determinant."""

from pyro_snf import diagnostics, flows, images
from pyro_snf.geco import GECO
from pyro_snf.guides import AutoSelfNormalizingFlow
from pyro_snf.transforms import (
    ActNorm,
    Compose,
    ConditionalSelfNormalizingLinear,
    CouplingNet,
    ImageCoupling,
    InverseTransformModule,
    InvertibleTransformModule,
    LowRankAutoregressive,
    MultiScale,
    RationalQuadraticSpline,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    Squeeze2d,
    actnorm,
    conditional_self_normalizing_linear,
    image_coupling,
    low_rank_autoregressive,
    rational_quadratic_spline,
    self_normalizing_conv2d,
    self_normalizing_linear,
    smooth_leaky_relu,
    squeeze2d,
)

__all__ = [
    "GECO",
    "ActNorm",
    "AutoSelfNormalizingFlow",
    "Compose",
    "ConditionalSelfNormalizingLinear",
    "CouplingNet",
    "ImageCoupling",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "LowRankAutoregressive",
    "MultiScale",
    "RationalQuadraticSpline",
    "SelfNormalizingConv2d",
    "SelfNormalizingLinear",
    "SmoothLeakyReLU",
    "Squeeze2d",
    "actnorm",
    "conditional_self_normalizing_linear",
    "diagnostics",
    "flows",
    "image_coupling",
    "images",
    "low_rank_autoregressive",
    "rational_quadratic_spline",
    "self_normalizing_conv2d",
    "self_normalizing_linear",
    "smooth_leaky_relu",
    "squeeze2d",
]

__version__ = "0.1.0"
