"""What the memory routes take."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from memos_vllm.integration.memories import NewMemory, SearchBody, _values


def test_speaker_and_cube_are_part_of_the_origin() -> None:
    values = _values(NewMemory(text="I like tea", speaker="Ann", cube="diary"))
    assert values["origin"] == {"source": "api", "speaker": "Ann", "cube": "diary"}
    assert not {"speaker", "cube"} & values.keys()
    assert _values(NewMemory(text="I like tea"))["origin"] == {"source": "api"}


def test_times_of_a_search_are_text_with_a_zone() -> None:
    body = SearchBody.model_validate({"query": "tea", "said_from": "2026-01-02T03:04:05Z"})
    assert body.said_from == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with pytest.raises(ValidationError, match="timezone"):
        SearchBody.model_validate({"query": "tea", "said_from": "2026-01-02T03:04:05"})
