"""Linear maps of events: products, gradients and factorizations. They keep no state."""

from pyro_snf.maps.base import Factors, LinearMap
from pyro_snf.maps.convolution import Convolution
from pyro_snf.maps.dense import Dense

__all__ = ["Convolution", "Dense", "Factors", "LinearMap"]
