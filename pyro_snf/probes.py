"""Random probes that disturb nobody: drawn from a generator of their own."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["probe_generator"]


def probe_generator(seed: int, count: int, device: torch.device) -> torch.Generator:
    """A generator that is a function of the seed and of a running count alone.

    The global random stream is untouched, all ranks of a distributed run draw the same, and a run
    that is resumed goes on with what it would have drawn.
    """
    generator = torch.Generator(device)
    # Hashed, for torch's generator takes 32 bits on the CPU, and must not repeat the user's.
    words = np.random.SeedSequence([seed, count]).generate_state(1)
    generator.manual_seed(int(words[0]))
    return generator
