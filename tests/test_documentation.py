"""The README's programs run as they are printed. (Doctests are collected by pytest itself.)"""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import torch

README = Path(__file__).parents[1] / "README.md"


def test_readme_programs() -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) >= 2
    names: dict[str, object] = {}
    for program in programs:  # a later one may use what an earlier one imported
        exec(compile(program, str(README), "exec"), names)
    assert names["samples"].shape == (1000, 8)
    assert torch.isfinite(names["loss"])
