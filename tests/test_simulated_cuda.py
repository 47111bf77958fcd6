"""CUDA without a GPU: the tests that need one, on a simulated device, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import simulated_cuda

is_simulated = simulated_cuda.VARIABLE in os.environ

needs_simulation = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_simulated, reason="only on a simulated device"),
]

#: What is run there, besides this file.
FILES = ["test_cuda.py", "test_residual_monitor.py", "test_transfer.py"]


@pytest.mark.skipif(is_simulated, reason="it would start itself")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real CUDA device")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is not built for the CPU")
@pytest.mark.skipif(sys.platform != "linux", reason="the simulated device needs Linux")
@pytest.mark.skipif(simulated_cuda.compiler() is None, reason="no C++ compiler (CXX, c++ or g++)")
def test_gpu_tests_pass_on_a_simulated_device() -> None:
    here = Path(__file__)
    paths = [str(here), *(str(here.with_name(name)) for name in FILES)]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    # Without plugins, which take seconds to import; pytest-xdist would make it a worker.
    environment = {**simulated_cuda.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(
        command, env=environment, cwd=here.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert " skipped" not in result.stdout.splitlines()[-1]


class TestDevice:
    """What the simulated device does as a GPU does it."""

    pytestmark = needs_simulation

    def test_devices_do_not_mix(self) -> None:
        here, there = torch.ones(2), torch.ones(2, device="cuda")
        assert there.is_cuda
        for operation in (lambda: here + there, lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="one device"):
                operation()
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0]  # a number is an argument

    @pytest.mark.parametrize(("of_generator", "of_tensor"), [("cpu", "cuda"), ("cuda", "cpu")])
    def test_generators_are_of_one_device(self, of_generator: str, of_tensor: str) -> None:
        generator = torch.Generator(of_generator)
        assert generator.device.type == of_generator
        torch.randn(2, generator=generator, device=of_generator)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=generator, device=of_tensor)

    def test_numbers_are_those_of_the_cpu(self) -> None:
        x = torch.randn(3, 4, requires_grad=True)
        y = x.detach().cuda().requires_grad_()
        for one in (x, y):
            torch.fft.fft(one.tanh() @ one.mT).conj().abs()[:, 1].log().sum().backward()
        assert y.grad.is_cuda
        assert torch.equal(x.grad, y.grad.cpu())

    def test_copies_arrive_when_they_have_been_waited_for(self) -> None:
        source = torch.ones(2, device="cuda")
        copy = torch.empty(2, pin_memory=True)
        copy.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        source.zero_()  # after the copy
        assert not event.query()
        assert copy.isnan().all()
        event.synchronize()
        assert event.query()
        assert copy.tolist() == [1.0, 1.0]
        other = source.to("cpu", non_blocking=True)
        assert other.isnan().all()
        _ = source.sum().item()  # waits for everything
        assert other.tolist() == [0.0, 0.0]
