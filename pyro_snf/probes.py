"""Random probe vectors of trace estimates, from generators of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_snf.caching import version
from pyro_snf.extra_state import SavesAttributes, saved_count
from pyro_snf.processes import process_rank
from pyro_snf.tracing import is_recomputing

__all__ = ["PROBES", "ProbeStream", "draw_probes", "probe_generator"]

#: The kinds of probes that :func:`draw_probes` draws.
PROBES = ("gaussian", "rademacher", "orthogonal")


def probe_generator(
    seed: int, count: int, device: torch.device, *, stream: int = 0, rank: int = 0
) -> torch.Generator:
    """A generator that depends on these numbers only.

    So torch's global random stream stays as it is, and a resumed run draws the probes that the
    uninterrupted run would have drawn.

    :param int stream: distinguishes several generators of the same seed and count.
    :param int rank: of the process, where processes are to draw different probes.
    """
    generator = torch.Generator(device)
    # Hashed: torch's generator takes 32 bits on the CPU, and a small seed could be one that the
    # user has chosen for another generator.
    entropy = [seed, count, stream] if stream else [seed, count]
    if rank:
        entropy = [seed, count, stream, rank]
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

    ``"gaussian"``: standard normal. ``"rademacher"``: random signs; the diagonal of a matrix adds
    no noise to the trace estimate. ``"orthogonal"``: vectors of length √D that are orthogonal to
    the other probes of the event; with k = D probes the trace estimate is exact.

    :param int num_probes: k, for each event; at most D for orthogonal probes.
    :param shape: of the batch, ``(B, *event)``.
    """
    shape = (num_probes, *shape)
    device = generator.device
    if kind == "rademacher":
        signs = torch.randint(0, 2, shape, generator=generator, device=device)
        return (2 * signs - 1).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probes = torch.randn(shape, generator=generator, device=device, dtype=wide)
    if kind == "orthogonal":
        columns = probes.flatten(2).permute(1, 2, 0)  # (B, D, k)
        if num_probes == 1:
            basis = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        else:
            basis = torch.linalg.qr(columns).Q
        probes = columns.shape[1] ** 0.5 * basis.permute(2, 0, 1).reshape(shape)
    return probes.to(dtype)


class ProbeStream(SavesAttributes):
    """Random generators of one layer: functions of its seed and of a running count.

    Both are in the ``state_dict``. The seed is a buffer, so that a distributed wrapper that
    broadcasts buffers gives all processes the same one.

    :param seed: an integer from 0, or None to draw one from torch's global random stream.
    :param device: of the buffer.
    :param bool differs_by_process: whether each process draws other probes. Those that average over
        events have to differ, or their noise would not average over the processes' events. Those
        whose result is a state of the layer have to be the same.
    """

    saved_attributes: ClassVar = {"count": saved_count}

    seed: Tensor

    def __init__(
        self,
        seed: int | None,
        *,
        device: torch.device | str | None = None,
        differs_by_process: bool = False,
    ) -> None:
        super().__init__()
        self.differs_by_process = differs_by_process
        self._given_seed = seed
        self.register_buffer("seed", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: from the seed that was given, or else from a new one."""
        seed = self._given_seed
        self.seed.fill_(int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)
        #: Generators made so far.
        self.count = 0
        self._known_seed: tuple[int, int] | None = None  # the buffer's version, and its value

    def next_generator(self, device: torch.device, *, stream: int = 0) -> torch.Generator:
        """The generator of the running count, which is raised by 1."""
        if not is_recomputing():  # with activation checkpointing: a step is to count once
            self.count += 1
        return self.generator(self.count - 1, device, stream=stream)

    def generator(self, count: int, device: torch.device, *, stream: int = 0) -> torch.Generator:
        """See :func:`probe_generator`."""
        current = version(self.seed)
        if self._known_seed is None or self._known_seed[0] != current:
            self._known_seed = current, int(self.seed)  # waits for a GPU, but only once
        rank = process_rank() if self.differs_by_process else 0
        return probe_generator(self._known_seed[1], count, device, stream=stream, rank=rank)

    def set_extra_state(self, state: Any) -> None:
        self._known_seed = None
        super().set_extra_state(state)
