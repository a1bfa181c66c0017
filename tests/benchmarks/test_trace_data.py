"""Reading a trace, and telling which conversation a request belongs to."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from benchmarks.trace_data import Request, TraceError, Turn, read, rekeyed, turns


def line(timestamp: int, *blocks: int) -> str:
    return json.dumps(
        {"timestamp": timestamp, "input_length": 512 * len(blocks), "output_length": 7, "hash_ids": blocks}
    )


def placed(*chains: list[int]) -> list[Turn]:
    return turns([Request(float(i), 512 * len(c) - 100, 50, tuple(c)) for i, c in enumerate(chains)])


@pytest.mark.parametrize("compressed", [False, True])
def test_both_forms_are_read_in_the_order_of_time(tmp_path: Path, compressed: bool) -> None:
    text = "\n".join([line(2000, 0, 1), "", line(1000, 0), ""])
    path = tmp_path / ("trace.jsonl.xz" if compressed else "trace.jsonl")
    path.write_bytes(lzma.compress(text.encode()) if compressed else text.encode())
    found = read(path)
    assert [(each.arrival_s, each.prompt_tokens, len(each.blocks)) for each in found] == [(1, 512, 1), (2, 1024, 2)]
    assert found[0].blocks[0] == found[1].blocks[0]


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"timestamp": 1}', '{"timestamp":1,"input_length":1}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError):
        read(path)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError):
        read(tmp_path / "none.jsonl")
    (tmp_path / "trace.jsonl.xz").write_bytes(b"not compressed")
    with pytest.raises(TraceError):
        read(tmp_path / "trace.jsonl.xz")


def test_equal_ids_behind_other_blocks_are_other_blocks() -> None:
    first, second = rekeyed([Request(0, 1, 1, (5, 7, 7)), Request(1, 1, 1, (6, 7))])
    assert len({*first.blocks, *second.blocks}) == 5


def test_a_longer_chain_continues_the_conversation_past_its_partial_block() -> None:
    first, second, third = placed([0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5, 6])
    assert [(t.conversation, t.number, t.num_reusable) for t in (first, second, third)] == [
        (0, 1, 0),
        (0, 2, 2),
        (0, 3, 3),
    ]
    assert second.hinted == 0 and second.branch is None
    assert second.new_tokens == 512 - 50


def test_the_same_again_is_the_same_conversation() -> None:
    assert [(t.conversation, t.number) for t in placed([0, 1, 2], [0, 1, 2])] == [(0, 1), (0, 2)]


def test_a_shared_head_does_not_make_one_conversation() -> None:
    found = placed([0, 1, 2, 3], [0, 4, 5, 6], [0, 4, 5, 7], [0, 1, 2, 8])
    assert [t.conversation for t in found] == [0, 1, 1, 0]
    assert [t.branch for t in found] == [None, 0, None, None]
    assert found[1].new_tokens == 4 * 512 - 100 - 512


def test_an_earlier_turn_that_is_asked_again_is_a_branch() -> None:
    found = placed([0, 1, 2, 3, 4, 5], [0, 1, 6, 7])
    assert [(t.conversation, t.branch, t.hinted) for t in found] == [(0, None, None), (1, 1, 0)]
