"""Numbers between the host and a GPU."""

from __future__ import annotations

import pytest
import torch

from pyro_snf.transfer import read, send


def test_read_copies(device: torch.device) -> None:
    tensors = [
        torch.arange(6.0, device=device).view(2, 3).float(),
        torch.tensor([True, False], device=device),
        torch.empty(0, device=device),
        torch.tensor(2**40, device=device),
    ]
    numbers = read(*tensors)
    for number, tensor in zip(numbers, tensors, strict=True):
        assert (number.device.type, number.dtype) == ("cpu", torch.float64)
        assert torch.equal(number, tensor.cpu().double())
    tensors[0].zero_()
    assert numbers[0].sum() == 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_send(dtype: torch.dtype, device: torch.device) -> None:
    like = torch.empty(0, dtype=dtype, device=device)
    numbers = torch.tensor([0.1, 2.0])
    for tensor in (numbers, numbers.to(device)):
        sent = send(tensor, like)
        assert (sent.device, sent.dtype) == (like.device, dtype)
        assert torch.equal(sent.cpu(), numbers.to(dtype))
