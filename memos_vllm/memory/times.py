"""Time in texts: "yesterday", "last May", "8 May 2023", "去年", resolved to days of the calendar.

Resolved dates become terms of their own, one per size of unit: a day stands for itself, its month and its
year. So a query for May 2023 finds what was said in that month and what was said later about it, and among
several matches the finer one weighs more, since fewer memories have it. The rules cover ISO dates, English,
and the commonest words of Chinese and Japanese; what they do not know stays an ordinary word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import regex

TIME_MARK = "@"
"""First character of a time's term; no word has it."""

_MONTHS = "january february march april may june july august september october november december".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_NUMBERS = {word: n for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "a": 1,
    "an": 1,
    "a couple of": 2,
    "a few": 3,
}
_MAX_TERMS = 64
"""Of one text: a calendar that was pasted in is no memory of all its days."""

_MAX_CHARS = 10_000


@dataclass(frozen=True, slots=True)
class Period:
    """From a day to a day, both of them in it."""

    first: date
    last: date

    def terms(self) -> Iterator[str]:
        """One for each day of a week at most; of a longer period its month, else its year."""
        if self.first.year == self.last.year:
            yield f"{TIME_MARK}{self.first.year}"
            if self.first.month == self.last.month:
                yield f"{TIME_MARK}{self.first:%Y-%m}"
                yield month_term(self.first.month)
        if (self.last - self.first).days < 7:
            for day in range((self.last - self.first).days + 1):
                yield f"{TIME_MARK}{self.first + timedelta(day):%Y-%m-%d}"


def month_term(month: int) -> str:
    """That month of any year."""
    return f"{TIME_MARK}m{month:02}"


def moment_terms(moment: datetime) -> set[str]:
    """Of the time at which something was said."""
    return set(_of_day(moment.date()).terms())


def mentioned_terms(text: str, said: datetime) -> list[str]:
    """Of every time that the text names, as of the day on which it was said; without repeats.

    Of a month without a year only the month is known, in a question as in a statement.
    """
    found: dict[str, None] = {}
    for what in _mentions(text[:_MAX_CHARS].lower(), said.date()):
        found.update(dict.fromkeys([month_term(what)] if isinstance(what, int) else what.terms()))
        if len(found) > _MAX_TERMS:
            break
    return list(found)[:_MAX_TERMS]


_RECENT = regex.compile(
    r"\b(?:latest|newest|most recent(?:ly)?|recently|lately|currently|nowadays|these days|right now|at the moment|"
    r"last time|up to date)\b|最近|最新|目前|现在|現在|近頃",
    regex.I,
)


def asks_for_recent(query: str) -> bool:
    """Whether the newest of what fits is wanted."""
    return _RECENT.search(query[:_MAX_CHARS]) is not None


_MONTH = "(?P<month>" + "|".join(f"{name}|{name[:3]}" for name in _MONTHS if name != "may") + r"|sept|may(?=[ ,]+\d))"
_NUMBER = (
    r"(?P<number>\d{1,3}|"
    + "|".join(word.replace(" ", r"\ ") for word in sorted(_NUMBERS, key=len, reverse=True))
    + ")"
)
_EXPRESSION = regex.compile(
    rf"""
      \b(?P<iso>\d{{4}}-\d{{2}}-\d{{2}})\b
    | (?P<cjk>(?P<cy>\d{{4}})年(?:(?P<cm>\d{{1,2}})月(?:(?P<cd>\d{{1,2}})[日号])?)?)
    | \b(?P<dmy>(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\ (?:of\ )?{_MONTH}\.?,?\ (?P<year>\d{{4}}))\b
    | \b(?P<mdy>{_MONTH}\.?\ (?P<day>\d{{1,2}})(?:st|nd|rd|th)?,?\ (?P<year>\d{{4}}))\b
    | \b(?P<my>{_MONTH}\.?,?\ (?:of\ )?(?P<year>\d{{4}}))\b
    | \b(?:in|since|during|by|of)\ (?P<y>(?:19|20)\d{{2}})\b
    | \b(?P<ago>{_NUMBER}\ (?P<unit>day|week|month|year)s?\ ago)\b
    | \b(?P<relative>last|past|this|next)\ (?P<what>night|week(?:end)?|month|year|{"|".join(_MONTHS + _DAYS)})\b
    | \b(?P<word>day\ before\ yesterday|day\ after\ tomorrow|yesterday|today|tonight|tomorrow)\b
    | (?P<cjkword>前天|昨天|昨日|今天|今日|明天|明日|上个?周|上星期|先週|上个?月|先月|去年|今年|明年|来年)
    | \b(?P<bare>(?:in|during|of|this\ past|early|late|mid)\ (?P<baremonth>{"|".join(_MONTHS)}))\b(?!,?\ \d{{4}})
    """,
    regex.X,
)
_TRIGGERS = (
    *(
        "19",
        "20",
        "ago",
        "last ",
        "past ",
        "this ",
        "next ",
        "day",
        "tonight",
        "tomorrow",
        "年",
        "月",
        "天",
        "日",
        "周",
        "週",
    ),
    *("星期", *_MONTHS),
)
"""Every time that the expression finds has one of them, but for years before 1900."""

_CJK_WORDS = {
    **dict.fromkeys(("前天",), ("day", -2)),
    **dict.fromkeys(("昨天", "昨日"), ("day", -1)),
    **dict.fromkeys(("今天", "今日"), ("day", 0)),
    **dict.fromkeys(("明天", "明日"), ("day", 1)),
    **dict.fromkeys(("上周", "上个周", "上星期", "先週"), ("week", -1)),
    **dict.fromkeys(("上月", "上个月", "先月"), ("month", -1)),
    "去年": ("year", -1),
    "今年": ("year", 0),
    **dict.fromkeys(("明年", "来年"), ("year", 1)),
}
_WORDS = {
    "day before yesterday": -2,
    "yesterday": -1,
    "today": 0,
    "tonight": 0,
    "tomorrow": 1,
    "day after tomorrow": 2,
}


def _mentions(text: str, said: date) -> Iterator[Period | int]:
    """Periods, and months without a year."""
    if not any(trigger in text for trigger in _TRIGGERS):  # most texts; the expression would take 30 times as long
        return
    for match in _EXPRESSION.finditer(text):
        try:
            yield _resolve(match, said)
        except (ValueError, OverflowError):  # the 31st of June, the year 0: words, no date
            continue


def _resolve(match: regex.Match[str], said: date) -> Period | int:
    if match["iso"]:
        return _of_day(date.fromisoformat(match["iso"]))
    if match["cjk"]:
        year, month, day = int(match["cy"]), match["cm"], match["cd"]
        if day:
            return _of_day(date(year, int(month), int(day)))
        return _of_month(year, int(month)) if month else _of_year(year)
    if match["dmy"] or match["mdy"]:
        return _of_day(date(int(match["year"]), _month(match["month"]), int(match["day"])))
    if match["my"]:
        return _of_month(int(match["year"]), _month(match["month"]))
    if match["y"]:
        return _of_year(int(match["y"]))
    if match["ago"]:
        number = match["number"]
        return _shifted(match["unit"], -(_NUMBERS[number] if number in _NUMBERS else int(number)), said)
    if match["word"]:
        return _of_day(said + timedelta(_WORDS[match["word"]]))
    if match["cjkword"]:
        unit, steps = _CJK_WORDS[match["cjkword"]]
        return _shifted(unit, steps, said)
    if match["bare"]:
        return _month(match["baremonth"])
    return _relative(match["relative"], match["what"], said)


def _relative(which: str, what: str, said: date) -> Period:
    """``last``, ``this`` or ``next`` with a unit, a month or a weekday."""
    steps = {"last": -1, "past": -1, "this": 0, "next": 1}[which]
    if what == "night":
        return _of_day(said + timedelta(steps))
    if what == "weekend":
        saturday = said - timedelta(said.weekday()) + timedelta(5 + 7 * steps)
        return Period(saturday, saturday + timedelta(1))
    if what in _DAYS:
        ahead = (_DAYS.index(what) - said.weekday()) % 7
        if steps < 0:
            ahead -= 7
        return _of_day(said + timedelta(ahead or 7 * steps))
    if what in _MONTHS:
        month = _MONTHS.index(what) + 1
        year = said.year - (steps < 0 and month >= said.month) + (steps > 0 and month <= said.month)
        return _of_month(year, month)
    return _shifted(what, steps, said)


def _shifted(unit: str, steps: int, said: date) -> Period:
    """The day, calendar week, month or year so many steps from the one in which it was said."""
    if unit == "day":
        return _of_day(said + timedelta(steps))
    if unit == "week":
        monday = said - timedelta(said.weekday()) + timedelta(7 * steps)
        return Period(monday, monday + timedelta(6))
    if unit == "month":
        months = said.year * 12 + said.month - 1 + steps
        return _of_month(months // 12, months % 12 + 1)
    return _of_year(said.year + steps)


def _month(name: str) -> int:
    return next(number for number, full in enumerate(_MONTHS, 1) if full.startswith(name[:3]))


def _of_day(day: date) -> Period:
    return Period(day, day)


def _of_month(year: int, month: int) -> Period:
    following = date(year + month // 12, month % 12 + 1, 1)
    return Period(date(year, month, 1), following - timedelta(1))


def _of_year(year: int) -> Period:
    return Period(date(year, 1, 1), date(year, 12, 31))
