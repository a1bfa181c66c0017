"""Times in texts become days, months and years."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.memory.times import asks_for_recent, mentioned_terms, moment_terms

FRIDAY = datetime(2023, 8, 25, 12, tzinfo=UTC)


def finest(text: str) -> str | None:
    """The finest of a single day, month or year."""
    return max(
        mentioned_terms(text, FRIDAY), key=lambda term: (term.count("-"), not term.startswith("@m")), default=None
    )


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("I went yesterday", "@2023-08-24"),
        ("the day before yesterday", "@2023-08-23"),
        ("See you tomorrow", "@2023-08-26"),
        ("three days ago", "@2023-08-22"),
        ("a few days ago", "@2023-08-22"),
        ("last friday", "@2023-08-18"),
        ("next friday", "@2023-09-01"),
        ("on 8 May, 2023", "@2023-05-08"),
        ("May 8th, 2023", "@2023-05-08"),
        ("2023-05-08", "@2023-05-08"),
        ("2023年5月8日", "@2023-05-08"),
        ("昨天", "@2023-08-24"),
        ("last May", "@2023-05"),
        ("last September", "@2022-09"),
        ("in May 2023", "@2023-05"),
        ("last month", "@2023-07"),
        ("two years ago", "@2021"),
        ("in 2019", "@2019"),
        ("去年", "@2022"),
        ("in May", "@m05"),
        ("I may go", None),
        ("31 June 2023", None),
        ("room 2019", None),
        ("9999 years ago", None),
    ],
)
def test_mentioned(text: str, term: str | None) -> None:
    assert finest(text) == term


def test_a_day_stands_for_its_month_and_year_too() -> None:
    assert set(mentioned_terms("yesterday", FRIDAY)) == {"@2023", "@2023-08", "@m08", "@2023-08-24"}
    assert moment_terms(FRIDAY) == {"@2023", "@2023-08", "@m08", "@2023-08-25"}


def test_a_week_is_its_days() -> None:
    days = [term for term in mentioned_terms("last week", FRIDAY) if term.count("-") == 2]
    assert days == [f"@2023-08-{day}" for day in range(14, 21)]


def test_a_calendar_that_was_pasted_has_a_limit() -> None:
    text = " ".join(f"2023-{month:02}-{day:02}" for month in range(1, 13) for day in range(1, 29))
    assert len(mentioned_terms(text, FRIDAY)) <= 64


@given(st.text("0123456789-年月日 agoyeslstdmnhwk,", max_size=60))
def test_no_text_is_an_error(text: str) -> None:
    assert all(term.startswith("@") for term in mentioned_terms(text, FRIDAY))


@pytest.mark.parametrize("query", ["What is her latest book?", "Where does he currently live?", "最近怎么样"])
def test_asks_for_recent(query: str) -> None:
    assert asks_for_recent(query)
    assert not asks_for_recent("When did she write her first book?")
