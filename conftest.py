"""Names that every docstring's example may use."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported. The tensors of the tests are small: threads would wait for each other
# longer than they compute, and on a busy machine much longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_snf
from pyro_snf import diagnostics


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    pyro.clear_param_store()  # of the example before
    doctest_namespace.update({name: getattr(pyro_snf, name) for name in pyro_snf.__all__})
    doctest_namespace.update({name: getattr(diagnostics, name) for name in diagnostics.__all__})
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist)
