"""Self Normalizing Flows for Pyro: unconstrained layers without the O(D³) log-determinant."""

from pyro_snf import diagnostics
from pyro_snf.geco import GECO
from pyro_snf.guides import AutoSelfNormalizingFlow
from pyro_snf.transforms import (
    Compose,
    ConditionalSelfNormalizingLinear,
    InverseTransformModule,
    InvertibleTransformModule,
    LowRankAutoregressive,
    SelfNormalizingLinear,
    SmoothLeakyReLU,
    conditional_self_normalizing_linear,
    low_rank_autoregressive,
    self_normalizing_linear,
    smooth_leaky_relu,
)

__all__ = [
    "GECO",
    "AutoSelfNormalizingFlow",
    "Compose",
    "ConditionalSelfNormalizingLinear",
    "InverseTransformModule",
    "InvertibleTransformModule",
    "LowRankAutoregressive",
    "SelfNormalizingLinear",
    "SmoothLeakyReLU",
    "conditional_self_normalizing_linear",
    "diagnostics",
    "low_rank_autoregressive",
    "self_normalizing_linear",
    "smooth_leaky_relu",
]

__version__ = "0.1.0"
