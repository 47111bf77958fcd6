"""Self Normalizing Flows for Pyro: unconstrained layers without the O(D³) log-determinant."""

from pyro_snf import diagnostics, flows, images, optim
from pyro_snf.fitting import Fit, fit
from pyro_snf.free_form.methods import PairExact, PairLearned, PairMethod, PairRefined
from pyro_snf.free_form.reconstruction import Reconstruction
from pyro_snf.guides import AutoSelfNormalizingFlow
from pyro_snf.log_dets import Exact, Learned, LogDetMethod, Refined
from pyro_snf.networks import ResidualMLP
from pyro_snf.penalty import GECO
from pyro_snf.transforms import (
    ActNorm,
    Compose,
    ConditionalSelfNormalizingLinear,
    ConditionalSelfNormalizingPair,
    CouplingNet,
    ImageCoupling,
    InverseTransformModule,
    InvertibleTransformModule,
    LowRankAutoregressive,
    MultiScale,
    RationalQuadraticSpline,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    SelfNormalizingPair,
    SmoothLeakyReLU,
    Squeeze2d,
    actnorm,
    conditional_self_normalizing_linear,
    conditional_self_normalizing_pair,
    image_coupling,
    low_rank_autoregressive,
    rational_quadratic_spline,
    self_normalizing_conv2d,
    self_normalizing_linear,
    self_normalizing_pair,
    smooth_leaky_relu,
    squeeze2d,
)

__all__ = [
    "GECO",
    "ActNorm",
    "AutoSelfNormalizingFlow",
    "Compose",
    "ConditionalSelfNormalizingLinear",
    "ConditionalSelfNormalizingPair",
    "CouplingNet",
    "Exact",
    "Fit",
    "ImageCoupling",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "Learned",
    "LogDetMethod",
    "LowRankAutoregressive",
    "MultiScale",
    "PairExact",
    "PairLearned",
    "PairMethod",
    "PairRefined",
    "RationalQuadraticSpline",
    "Reconstruction",
    "Refined",
    "ResidualMLP",
    "SelfNormalizingConv2d",
    "SelfNormalizingLinear",
    "SelfNormalizingPair",
    "SmoothLeakyReLU",
    "Squeeze2d",
    "actnorm",
    "conditional_self_normalizing_linear",
    "conditional_self_normalizing_pair",
    "diagnostics",
    "fit",
    "flows",
    "image_coupling",
    "images",
    "low_rank_autoregressive",
    "optim",
    "rational_quadratic_spline",
    "self_normalizing_conv2d",
    "self_normalizing_linear",
    "self_normalizing_pair",
    "smooth_leaky_relu",
    "squeeze2d",
]

__version__ = "0.1.0"
