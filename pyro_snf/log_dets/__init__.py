"""Methods to get ``log|det A|`` of a linear map, and its gradient, in training: one a module."""

from pyro_snf.log_dets.base import LogDetMethod
from pyro_snf.log_dets.exact import Exact
from pyro_snf.log_dets.learned import Learned
from pyro_snf.log_dets.refined import Refined

__all__ = ["Exact", "Learned", "LogDetMethod", "Refined"]
