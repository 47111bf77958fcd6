"""What every test starts from: float64, fixed seeds, an empty parameter store."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

from pyro_snf.maps import dense as dense_module
from tests import simulated_cuda
from tests.registry import CASES, Case

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

torch.set_num_threads(1)  # as conftest.py above does it for other processes

if simulated_cuda.VARIABLE in os.environ:
    simulated_cuda.install()

#: For tests that run on every device: ``@pytest.mark.parametrize("device", DEVICES)``, or the
#: fixture ``device``.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the GPU's tests where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    # Float64, so that a wrong formula is not hidden behind rounding; tests of other types say so.
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    pyro.settings.set(module_local_params=False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the benchmarks can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    for folder in (BENCHMARKS, BENCHMARKS / "paper"):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn."""
    return torch.device(request.param)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each named constructor of the registry in turn."""
    return CASES[request.param]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """``inverse="iterative"`` refines in training, as it does where D is large."""
    monkeypatch.setattr(dense_module, "_ROWS_WORTH_FACTORS", 0)


@pytest.fixture
def _jit_may_warn() -> Iterator[None]:
    # torch deprecates its tracer; Pyro's JitTrace_ELBO stands on it.
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield
