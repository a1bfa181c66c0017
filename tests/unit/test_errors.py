"""The tree of errors in the module's docstring is the tree of classes."""

from __future__ import annotations

import re

import pytest

from memos_vllm import errors

CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.MemosError)]


def drawn_parents() -> dict[str, str]:
    """Each name of the drawing, and the one that it hangs from."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r" {4}[ |]*(?:[+`]-- )?([A-Z]\w+)", line)
        if match is None:
            continue
        name = match[1]
        while above and above[-1][0] >= match.start(1):
            above.pop()
        parents[name] = above[-1][1] if above else "Exception"
        above.append((match.start(1), name))
    return parents


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_is_drawn_below_its_parent(cls: type[errors.MemosError]) -> None:
    assert drawn_parents().get(cls.__name__) == cls.__base__.__name__


def test_nothing_else_is_drawn() -> None:
    assert drawn_parents().keys() == {cls.__name__ for cls in CLASSES}
