"""``python -m memos_vllm.status`` where there is no status."""

from __future__ import annotations

import sys

import pytest

from memos_vllm import status


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("localhost:8000", 2, "write for example http://localhost:8000"),
        ("nonsense", 2, "no address of a server"),
        ("http://127.0.0.1:9", 1, "does it run with --plugin memos?"),
    ],
)
def test_an_address_without_a_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, code: int, words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["memos_vllm.status", url])
    with pytest.raises(SystemExit) as ended:
        status.main()
    assert ended.value.code == code and words in capsys.readouterr().err
