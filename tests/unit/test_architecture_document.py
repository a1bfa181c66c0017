"""docs/ARCHITECTURE.md names every file, and what the documents name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_layers import ALLOWED

ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
FOLDERS = ("memos_vllm", "kernels", "benchmarks", "tests", "docs", "configs")


def spelled_out(name: str) -> list[str]:
    """``store/{a,b}.py`` is two names."""
    start, brace, rest = name.partition("{")
    inside, _, end = rest.partition("}")
    return [f"{start}{each}{end}" for each in inside.split(",")] if brace else [name]


def named_files(text: str) -> Iterator[str]:
    for quoted in re.findall(r"`([^`\n]+)`", text):
        yield from (name for name in spelled_out(quoted) if re.fullmatch(r"[\w./-]+\.(?:py|md|yaml|json)", name))


def section(title: str) -> str:
    return ARCHITECTURE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("document", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_what_is_named_is_there(document: Path) -> None:
    files = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    missing = {
        name
        for name in named_files(document.read_text())
        if not any(file.endswith(f"/{name}") for file in files) and not (ROOT / name).exists()
    }
    assert not missing


@pytest.mark.parametrize("folder", ["integration", "store"])
def test_every_file_runs_in_a_process_of_the_table(folder: str) -> None:
    named = set(named_files(section("Processes")))
    there = {f"{folder}/{path.name}" for path in (ROOT / "memos_vllm" / folder).glob("*.py")} - {
        f"{folder}/__init__.py"
    }
    assert there <= named
    assert {name for name in named if name.startswith(f"{folder}/")} <= there


def test_every_layer_is_named() -> None:
    named = set(re.findall(r"\w+", section("Layers").partition("`tests/")[0]))
    assert set(ALLOWED) - {"__init__"} <= named
