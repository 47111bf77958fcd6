"""Transforms: one family a module."""

from pyro_snf.transforms.activations import (
    RationalQuadraticSpline,
    SmoothLeakyReLU,
    rational_quadratic_spline,
    smooth_leaky_relu,
)
from pyro_snf.transforms.actnorm import ActNorm, actnorm
from pyro_snf.transforms.autoregressive import LowRankAutoregressive, low_rank_autoregressive
from pyro_snf.transforms.base import InverseTransformModule, InvertibleTransformModule
from pyro_snf.transforms.compose import Compose, ConditionalCompose
from pyro_snf.transforms.conditional_linear import (
    ConditionalSelfNormalizingLinear,
    conditional_self_normalizing_linear,
)
from pyro_snf.transforms.convolution import SelfNormalizingConv2d, self_normalizing_conv2d
from pyro_snf.transforms.gaussian_copula import GaussianCopula, gaussian_copula
from pyro_snf.transforms.image_coupling import CouplingNet, ImageCoupling, image_coupling
from pyro_snf.transforms.linear import SelfNormalizingLinear, self_normalizing_linear
from pyro_snf.transforms.multiscale import MultiScale
from pyro_snf.transforms.pair import (
    ConditionalSelfNormalizingPair,
    SelfNormalizingPair,
    conditional_self_normalizing_pair,
    self_normalizing_pair,
)
from pyro_snf.transforms.spline_autoregressive import (
    ConditionalSplineAutoregressive,
    SplineAutoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from pyro_snf.transforms.squeeze import Squeeze2d, squeeze2d

__all__ = [
    "ActNorm",
    "Compose",
    "ConditionalCompose",
    "ConditionalSelfNormalizingLinear",
    "ConditionalSelfNormalizingPair",
    "ConditionalSplineAutoregressive",
    "CouplingNet",
    "GaussianCopula",
    "ImageCoupling",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "LowRankAutoregressive",
    "MultiScale",
    "RationalQuadraticSpline",
    "SelfNormalizingConv2d",
    "SelfNormalizingLinear",
    "SelfNormalizingPair",
    "SmoothLeakyReLU",
    "SplineAutoregressive",
    "Squeeze2d",
    "actnorm",
    "conditional_self_normalizing_linear",
    "conditional_self_normalizing_pair",
    "conditional_spline_autoregressive",
    "gaussian_copula",
    "image_coupling",
    "low_rank_autoregressive",
    "rational_quadratic_spline",
    "self_normalizing_conv2d",
    "self_normalizing_linear",
    "self_normalizing_pair",
    "smooth_leaky_relu",
    "spline_autoregressive",
    "squeeze2d",
]
