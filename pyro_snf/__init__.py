"""Self Normalizing Flows for Pyro: unconstrained layers without the O(D³) log-determinant."""

from pyro_snf import diagnostics
from pyro_snf.geco import GECO
from pyro_snf.transforms import (
    Compose,
    InverseTransformModule,
    InvertibleTransformModule,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    self_normalizing_linear,
    smooth_leaky_relu,
)

__all__ = [
    "GECO",
    "Compose",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "SelfNormalizingLinear",
    "SmoothLeakyReLU",
    "diagnostics",
    "self_normalizing_linear",
    "smooth_leaky_relu",
]

__version__ = "0.1.0"
