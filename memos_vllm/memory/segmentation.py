"""Words of texts that are written without spaces.

Japanese (a text with kana) is segmented by SudachiPy into its shortest units, in their normal form and
without particles; other Han characters by rjieba, jieba's algorithm, with the words inside long words.
Either is wrong now and then, and a query of two characters gives it nothing to go by. So every run of Han
characters also has its overlapping pairs, which is what Lucene's CJK analyser makes: words and pairs
together find more than either alone (Nie et al., "On the use of words and n-grams for Chinese information
retrieval", IRAL 2000), and a query meets a text in the pairs whatever the segmenters make of the two.
Korean, Thai, Lao, Khmer and Burmese have pairs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import regex

from memos_vllm.errors import MissingPackage

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々"
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_HAN = regex.compile(r"[\p{Han}々]+")
_PARTICLES = frozenset({"助詞", "助動詞", "補助記号", "空白"})
_MAX_SUDACHI_CHARS = 10_000  # it refuses more than about 16,000 at once (49,149 bytes)

_STOP_WORDS = frozenset(
    """的 了 是 我 你 您 他 她 它 我们 你们 他们 她们 在 有 和 与 也 都 就 不 很 吗 呢 吧 啊 这 那 这个 那个 什么 哪里
    哪儿 怎么 一个 为 对 把 被 让 给 到 从 我們 你們 他們 這 那 個 什麼 哪裡 嗎 こと もの それ これ あれ する ある いる
    為る 有る 居る 成る 私 僕 何 何処""".split()
)
_local = threading.local()  # a tokenizer of Sudachi serves one thread


def is_japanese(text: str) -> bool:
    return _KANA.search(text) is not None


def words(run: str, japanese: bool) -> Iterator[str]:
    """Words of one unspaced run, then its pairs; a pair that is a word in the same place counts once.

    Args:
        run: characters of ``UNSPACED`` and their marks, folded.
        japanese: whether the text around it is.
    """
    if not (japanese or _HAN.search(run)):
        yield from pairs(run) if len(run) > 1 else run
        return
    found = list(_japanese(run) if japanese else _chinese(run))
    kept = [word for word in found if word not in _STOP_WORDS]
    yield from kept or found
    known = set(found)
    for han in _HAN.findall(run):
        yield from (pair for pair in pairs(han) if pair not in known)


def characters(run: str) -> Iterator[str]:
    """Single Han characters, for queries of one."""
    return (char for han in _HAN.findall(run) for char in han)


def pairs(run: str) -> Iterator[str]:
    return (run[i : i + 2] for i in range(len(run) - 1))


# Both are imported when there is something for them: each brings a dictionary that many servers never need.


def _chinese(run: str) -> Iterator[str]:
    try:
        import rjieba
    except ModuleNotFoundError as error:
        raise MissingPackage("Chinese text", "rjieba") from error
    yield from rjieba.cut_for_search(run)


def _japanese(run: str) -> Iterator[str]:
    if not hasattr(_local, "tokenizer"):
        try:
            import sudachipy
        except ModuleNotFoundError as error:
            raise MissingPackage("Japanese text", "sudachipy sudachidict-small") from error
        _local.tokenizer = sudachipy.Dictionary(dict="small").tokenizer(sudachipy.SplitMode.A)
    for start in range(0, len(run), _MAX_SUDACHI_CHARS):
        for morpheme in _local.tokenizer.tokenize(run[start : start + _MAX_SUDACHI_CHARS]):
            if morpheme.part_of_speech()[0] not in _PARTICLES:
                yield morpheme.normalized_form().casefold()
