"""benchmarks.locomo on a small file of the same format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import locomo
from benchmarks.locomo_data import DataError, read
from memos_vllm.memory import lexical, neighbours


def turn(session: int, number: int, speaker: str, text: str, **more: str) -> dict[str, str]:
    return {"dia_id": f"D{session}:{number}", "speaker": speaker, "text": text, **more}


def question(text: str, category: int, *evidence: str) -> dict[str, Any]:
    return {"question": text, "answer": "x", "category": category, "evidence": list(evidence)}


SAMPLE = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ann",
        "speaker_b": "Bob",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            turn(1, 1, "Ann", "Where did you spend your holidays?"),
            turn(1, 2, "Bob", "By the sea.", blip_caption="a photo of a lighthouse"),
            *(turn(1, number, "Ann", f"Unrelated remark number {number}.") for number in range(3, 60)),
        ],
        "session_10_date_time": "9:00 am on 1 July, 2023",
        "session_10": [turn(10, 1, "Bob", "I bought a green bicycle.")],
        "session_11_date_time": "9:00 am on 2 July, 2023",
    },
    "qa": [
        question("Where were the holidays spent?", 1, "D1:1; D1:2"),
        question("What did Bob buy?", 4, "D:10:01"),
        question("What is in the picture with the lighthouse?", 5, "D1:2"),
        question("Who?", 2, "D"),
        question("Which?", 3, "D77:1", "D10:1"),
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps([SAMPLE]))
    return path


def test_turns_in_order_and_evidence_repaired_or_dropped(data: Path) -> None:
    (conversation,), repairs = read(data)
    assert [turn.id for turn in conversation.turns][:3] == ["D1:1", "D1:2", "D1:3"]
    assert conversation.turns[-1].id == "D10:1"
    assert conversation.turns[0].said_at.isoformat() == "2023-05-08T13:56:00+00:00"
    assert [question.evidence for question in conversation.questions] == [(0, 1), (59,), (1,), (59,)]
    assert (repairs.repaired, repairs.dropped, repairs.questions_without) == (2, 2, 1)


def test_captions_where_they_are_asked_for(data: Path) -> None:
    assert "lighthouse" not in read(data)[0][0].turns[1].text
    assert "lighthouse" in read(data, captions=True)[0][0].turns[1].text


def test_writes_recall_per_arm_category_and_cut(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert locomo.main(["--data", str(data), "--json", str(tmp_path / "out.json")]) == 0
    run = json.loads((tmp_path / "out.json").read_text())
    cells = {(row["arm"], row["category"], row["k"]): row for row in run["rows"]}
    assert set(run["rows"][0]) == {"arm", "category", "k", "recall", "n"}
    assert cells["lexical", "1", 5]["recall"] == 1.0  # the answer, by the words of the turn before it
    assert cells["lexical_alone", "1", 5]["recall"] == 0.5
    assert cells["lexical", "4", 5]["recall"] == cells["fts5", "4", 5]["recall"] == 1.0
    assert cells["lexical", "1-4", 10]["n"] == 3
    shown = capsys.readouterr().out
    assert "2 repaired, 2 dropped, 1 questions without any" in shown and "lexical" in shown


def test_other_constants_are_tried_and_put_back(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert locomo.main(["--data", str(data), "--ablations"]) == 0
    assert "weight 1/4" in capsys.readouterr().out
    assert (neighbours.STEPS, neighbours.WEIGHT_PER_STEP, lexical.K1, lexical.B) == (2, 0.5, 1.2, 0.75)


@pytest.mark.parametrize("content", ["{", "[]", '[{"qa": []}]', '{"a": 1}'])
def test_other_files_are_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"other\.json"):
        read(path)
    assert locomo.main(["--data", str(path)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_no_data_is_said_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(locomo, "DATA", tmp_path / "absent.json")
    assert locomo.main([]) == 0
    assert "skipped" in capsys.readouterr().out


def test_an_embedder_that_cannot_be_read_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locomo.main(["--data", str(data), "--embedder", f"rows:{tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        locomo.main(["--embedder", "magic:x"])
