"""The README's and the pages' code runs as a reader would paste it, in a fresh namespace.

Each block of the README runs alone. On a page of the documentation, each section runs alone, after
what stands before the first section; a page in `ONE_PROGRAM` says that it is one program.
"""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from pyro_snf.processes import set_data_group

ROOT = Path(__file__).parents[1]
ONE_PROGRAM = {"tutorial", "distributed"}
#: Fits are whole when the page is built; here they are cut short.
SHORTENED = {"tables", "convolutions", "free_form"}

_SECTION = re.compile(r"\n(?=[^\n]+\n---+\n)")
_CODE = re.compile(r"^\.\. code-block:: python\n((?:\n|[ ]+.*\n)+)", re.MULTILINE)


def program_of(text: str) -> str:
    """The doctests of a piece of a page, or all of its `code-block:: python`."""
    if re.search(r"^ *>>> ", text, re.MULTILINE):
        return text
    return "\n".join(textwrap.dedent(code) for code in _CODE.findall(text))


def programs() -> list[Any]:
    """Lists of blocks, each of which has a namespace of its own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    found = [pytest.param([block], id=f"README-{i}") for i, block in enumerate(blocks)]
    for page in sorted((ROOT / "docs").glob("*.rst")):
        text = page.read_text(encoding="utf-8")
        if page.stem in SHORTENED:
            text = re.sub(r"num_epochs=\d+", "num_epochs=2", text)
        sections = [text] if page.stem in ONE_PROGRAM else _SECTION.split(text)
        first, *rest = [program_of(section) for section in sections]
        if first.strip() == blocks[0].strip():  # the landing page begins as the README does
            first = ""
        parts = [part for part in rest if part] or [""]
        for i, part in enumerate(parts):
            if first or part:
                found.append(pytest.param([first, part], id=f"{page.stem}-{i}"))
    return found


def run(block: str, names: dict[str, object]) -> None:
    if ">>> " not in block:
        exec(compile(block, "<documentation>", "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block, names, "documentation", None, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    # The globals of the test are a copy, unless they are to be kept for the next block.
    failed = runner.run(test, out=report.append, clear_globs=False).failed
    assert failed == 0, "".join(report)
    names.update(test.globs)


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As `torchrun --nproc-per-node 1` starts a program, in float32."""
    torch.set_default_dtype(torch.float32)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        set_data_group(None)
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("program", programs())
def test_documentation(program: list[str], fresh_process: None) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in program:
        run(block, names)


def test_the_messages_that_are_explained_are_the_librarys() -> None:
    """What stands between the "…", which stand for details, is in one string of the source."""
    page = (ROOT / "docs" / "troubleshooting.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: text\n\n((?:   .*\n)+)", page, re.MULTILINE)
    messages = re.split(r"\n   (?! )", "\n".join("\n" + block.rstrip() for block in blocks))
    parts = {
        part.strip()
        for message in messages
        for part in re.split(
            "…|verdict unreliable:|(?<=finite). (?=Where)", " ".join(message.split())
        )
        if " " in part.strip(" :;,.")
    }
    source = strings_of_the_library()
    assert len(parts) > 30
    assert [part for part in sorted(parts) if bare(part) not in source] == []


def bare(text: str) -> str:
    """Without the class of an error before it, and the punctuation around it."""
    return re.sub(r"^\w+(Error|Warning): ", "", text).strip(" :;,.")


def strings_of_the_library() -> str:
    """All of them, with "…" in the place of what is formatted into them."""
    found = []
    for path in (ROOT / "pyro_snf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


_HEADLINE = re.compile(
    r"\| (?P<claim>.*?) \| (?P<measured>.*) \| \[.*?\]\((?P<page>\w+)\.md#?(?P<anchor>[^)]*)\) \|"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def section_of(page: str, anchor: str) -> str:
    """The section of a page of results that an anchor names; the whole page for none."""
    paths = {
        "results": [ROOT / "benchmarks" / "RESULTS.md"],
        "reproduction": [
            ROOT / "docs" / "reproduction.md",
            ROOT / "benchmarks" / "paper" / "results" / "results.md",
        ],
    }
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths[page])
    if not anchor:
        return text
    for title in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE):
        if anchor == re.sub("[^a-z0-9]+", "-", title[2].lower()).strip("-"):
            rest = text[title.end() :]
            end = re.search(rf"^#{{1,{len(title[1])}}} ", rest, re.MULTILINE)
            return rest[: end.start()] if end else rest
    raise AssertionError(f"no section #{anchor} of {page}")


def test_no_text_has_control_characters() -> None:
    """As "\\theta" becomes "heta" after a tab, where a string is not raw."""
    files = [*(ROOT / "pyro_snf").rglob("*.py"), *(ROOT / "docs").glob("*.rst")]
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert all(character.isprintable() or character == "\n" for character in text), path


def test_headlines_are_what_was_measured() -> None:
    """Each number is, rounded, one of the section that the line links to."""
    lines = (ROOT / "docs" / "headlines.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]  # without the header
    assert len(rows) > 10
    for row in rows:
        found = _HEADLINE.fullmatch(row)
        assert found, row
        section = section_of(found["page"], found["anchor"]).replace(",", "")
        known = [float(number) for number in _NUMBER.findall(section)]
        for number in _NUMBER.findall(found["measured"].replace(",", "")):
            digits = len(number.partition(".")[2])
            unit = 10.0**-digits
            is_known = any(abs(float(number) - one) < 0.51 * unit for one in known)
            assert is_known, (found["claim"], number)
