"""Generated conversational text: sentences of a first person, words by Zipf's law, from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy

COMMON = (
    "i the my to a and of in is we that you for it was on with at me have this be so but not are do his her they all "
    "will had she he from what about there which one would if can our when who them some like time just know take "
    "people year your good could see other than then now look only come its over think also back after use two how "
    "work first well way even new want because any these give day most"
).split()
_ONSETS = "b br c ch d dr f fl g gr h j k l m n p pl pr r s sh st t tr v w z".split()
_NUCLEI = "a e i o u ai ea oo".split()
_CODAS = ["", "", "n", "r", "l", "s", "t", "m", "nd", "ck"]
_ZIPF = 1.07
"""The exponent of English text; rank-frequency, Piantadosi (2014)."""


class Texts:
    """
    Args:
        words: size of the vocabulary; the most frequent ones are English function words.
    """

    def __init__(self, seed: int, words: int = 50_000):
        self._rng = numpy.random.default_rng(seed)
        self.vocabulary = numpy.array([*COMMON, *_names(self._rng, words - len(COMMON))])
        weights = 1.0 / numpy.arange(1, words + 1) ** _ZIPF
        self._cumulated = numpy.cumsum(weights / weights.sum())

    def sentences(self, count: int) -> Iterator[str]:
        """Of 8 to 24 words."""
        lengths = self._rng.integers(8, 25, count)
        ranks = self._ranks(int(lengths.sum()))
        begin = 0
        for length in lengths:
            sentence = " ".join(self.vocabulary[ranks[begin : begin + length]])
            yield sentence[:1].upper() + sentence[1:] + "."
            begin += length

    def questions(self, count: int) -> list[str]:
        """What a user may ask: function words, and two to four of the words that sentences have."""
        return [
            "What did i say about " + " ".join(self.vocabulary[self._content(int(length))]) + "?"
            for length in self._rng.integers(2, 5, count)
        ]

    def vectors(self, count: int, dimensions: int) -> numpy.ndarray:
        """Unit vectors, [count, dimensions]; for the cost of exact dense search their directions do not matter."""
        rows = self._rng.standard_normal((count, dimensions), dtype=numpy.float32)
        return rows / numpy.linalg.norm(rows, axis=1, keepdims=True)

    def _content(self, count: int) -> numpy.ndarray:
        ranks = self._ranks(50 * count)
        return ranks[ranks >= len(COMMON)][:count]

    def _ranks(self, count: int) -> numpy.ndarray:
        return numpy.searchsorted(self._cumulated, self._rng.random(count))


def _names(rng: numpy.random.Generator, count: int) -> list[str]:
    """Words that can be spoken and are no English ones, each once."""
    found: dict[str, None] = {}
    while len(found) < count:
        parts = rng.integers(1, 4)
        word = "".join(
            _ONSETS[rng.integers(len(_ONSETS))]
            + _NUCLEI[rng.integers(len(_NUCLEI))]
            + _CODAS[rng.integers(len(_CODAS))]
            for _ in range(parts)
        )
        if len(word) > 2 and word not in COMMON:
            found[word] = None
    return list(found)
