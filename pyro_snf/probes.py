"""Random probes that disturb nobody: drawn from a generator of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["PROBES", "draw_probes", "probe_generator"]

#: The kinds of probes: what :func:`draw_probes` makes of each.
PROBES = ("gaussian", "rademacher", "orthogonal")


def probe_generator(
    seed: int, count: int, device: torch.device, *, stream: int = 0
) -> torch.Generator:
    """A generator that is a function of the seed and of a running count alone.

    The global random stream is untouched, all ranks of a distributed run draw the same, and a run
    that is resumed goes on with what it would have drawn.

    :param int stream: which of several generators of the same count.
    """
    generator = torch.Generator(device)
    # Hashed, for torch's generator takes 32 bits on the CPU, and must not repeat the user's.
    entropy = [seed, count, stream] if stream else [seed, count]
    generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    return generator


def draw_probes(
    kind: str,
    num_probes: int,
    shape: Sequence[int],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Probes v with ``E[v vᵀ] = I`` for a batch of events, shape ``(k, *shape)``.

    ``"gaussian"``: standard normal. ``"rademacher"``: random signs, whose trace estimate has no
    noise from the diagonal. ``"orthogonal"``: of length √D, and at right angles to the other probes
    of the event; k = D of them give the trace itself.

    :param int num_probes: k, for each event; at most D if they are to be orthogonal.
    :param shape: of the batch, ``(B, *event)``.
    """
    shape = (num_probes, *shape)
    device = generator.device
    if kind == "rademacher":
        signs = torch.randint(0, 2, shape, generator=generator, device=device)
        return (2 * signs - 1).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normal = torch.randn(shape, generator=generator, device=device, dtype=wide)
    if kind == "orthogonal":
        columns = normal.flatten(2).permute(1, 2, 0)  # (B, D, k)
        dim = columns.shape[1]
        if num_probes == 1:
            basis = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        else:
            basis = torch.linalg.qr(columns).Q
        normal = dim**0.5 * basis.permute(2, 0, 1).reshape(shape)
    return normal.to(dtype)
