"""The charsets that documents may be in: those of the web (the WHATWG's Encoding Standard), UTF-32 and ASCII.

Python has further codecs that are none of text, or that take a time which grows with the square of the length
(punycode, idna).
"""

from __future__ import annotations

import codecs

from memos_vllm.errors import DocumentError

NAMES = frozenset({
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "ascii"),
    *(f"iso8859-{part}" for part in range(1, 17) if part != 12),
    *(f"cp{page}" for page in range(1250, 1259)),
    *("shift_jis", "cp932", "shift_jis_2004", "euc_jp", "euc_jis_2004", "iso2022_jp", "euc_kr", "cp949"),
    *("gb2312", "gbk", "gb18030", "big5", "big5hkscs", "tis-620", "cp874"),
    *("koi8-r", "koi8-u", "cp866", "mac-roman", "mac-cyrillic"),
})  # fmt: skip
"""As Python calls them; a document may say any other name that Python knows for one."""


def decode(data: bytes, charset: str | None) -> str:
    """
    Args:
        charset: None for UTF-8, or what a byte order mark says.

    Raises:
        DocumentError: it is none of ``NAMES``, or the data is in another one.
    """
    if charset is None:
        charset = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):  # ValueError: no name that anything could have
        name = ""
    if name not in NAMES:
        raise DocumentError(f"unknown charset {charset[:64]!r}; use utf-8")
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"the text is not {charset.removesuffix('-sig')}: byte {error.start} cannot be read; "
            "name its charset in the content type"
        ) from error
