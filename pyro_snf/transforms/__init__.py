"""Transforms: one family a module."""

from pyro_snf.transforms.activations import SmoothLeakyReLU, smooth_leaky_relu
from pyro_snf.transforms.base import InverseTransformModule, InvertibleTransformModule
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.linear import SelfNormalizingLinear, self_normalizing_linear

__all__ = [
    "Compose",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "SelfNormalizingLinear",
    "SmoothLeakyReLU",
    "self_normalizing_linear",
    "smooth_leaky_relu",
]
