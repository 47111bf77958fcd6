"""Transforms: one family a module."""

from pyro_snf.transforms.activations import SmoothLeakyReLU, smooth_leaky_relu
from pyro_snf.transforms.autoregressive import LowRankAutoregressive, low_rank_autoregressive
from pyro_snf.transforms.base import InverseTransformModule, InvertibleTransformModule
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.conditional_linear import (
    ConditionalSelfNormalizingLinear,
    conditional_self_normalizing_linear,
)
from pyro_snf.transforms.linear import SelfNormalizingLinear, self_normalizing_linear

__all__ = [
    "Compose",
    "ConditionalSelfNormalizingLinear",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "LowRankAutoregressive",
    "SelfNormalizingLinear",
    "SmoothLeakyReLU",
    "conditional_self_normalizing_linear",
    "low_rank_autoregressive",
    "self_normalizing_linear",
    "smooth_leaky_relu",
]
