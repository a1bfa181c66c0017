"""Unicode normal forms in linear time, whatever the text.

Normalising sorts each run of combining marks, and CPython does that by insertion: 80,000 of them on one letter
take most of a minute. The Stream-Safe Text Format (UAX 15, section 13) bounds the runs: after 30 marks, more
than any language or transcription uses, comes a combining grapheme joiner, which ends the run.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

import regex

MAX_MARKS = 30
_LONG_RUN = regex.compile(rf"\P{{ccc=0}}{{{MAX_MARKS}}}(?=\P{{ccc=0}})")
_JOINER = "\u034f"


def normalised(form: Literal["NFC", "NFD", "NFKC"], text: str) -> str:
    return text if text.isascii() else unicodedata.normalize(form, _LONG_RUN.sub(rf"\g<0>{_JOINER}", text))
