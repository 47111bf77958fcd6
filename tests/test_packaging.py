"""What is said about versions is the same everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_oldest_versions_are_those_that_are_allowed(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["examples"], *extras["test"]]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", one) for one in requirements]
    bounds = {match[1]: match[2] for match in found if match}
    assert len(bounds) == len(requirements) - 1  # pyro-snf[examples]
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), name


def test_every_python_is_tested(project: dict[str, Any]) -> None:
    classified = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("a source distribution has no workflow")
    (matrix,) = re.findall(r"python-version: \[(.*)\]", workflow.read_text(encoding="utf-8"))
    assert re.findall(r"[\d.]+", matrix) == classified
    assert project["requires-python"] == f">={classified[0]}"
    assert f"Python {classified[0]} to {classified[-1]}" in (ROOT / "README.md").read_text("utf-8")
