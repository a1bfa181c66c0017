"""Documents and queries of an exact token length, in plain English sentences.

Texts of different seeds share their first word by chance at most, so what two requests share is the
memory in front, never the query.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Karen Liam Mia Noah Olivia Peter Quinn Rosa Samuel Tina"
).split()
_ATTRIBUTES = (
    "favourite drink|favourite colour|favourite food|favourite song|favourite animal|favourite book|favourite city"
    "|home town|birthplace|job|hobby|employer|car|bike|team|nickname|pet"
).split("|")
_WORDS = (
    "oolong tea coffee green black silver golden purple lemon mint ginger apple cherry plum peach mango melon "
    "honey sugar vanilla cocoa butter cheese bread noodle soup salad pizza curry pancake waffle chocolate almond "
    "walnut pumpkin tomato spinach olive salmon turkey eagle falcon raven tiger bear wolf rabbit otter badger "
    "pony camel zebra panda koala dolphin turtle cricket dragon paris berlin madrid vienna oslo lisbon prague "
    "tokyo kyoto cairo nairobi sydney boston chicago quito teacher doctor pilot farmer painter writer singer "
    "tennis rugby hockey chess sailing climbing running guitar piano violin trumpet jazz opera summer winter "
    "river mountain valley forest desert island ocean meadow garden castle bridge tower harbour market old young "
    "big small fast slow"
).split()

FILLER = ("a", "so", "well", "now", "then", "tea", "the", "and", "green", "old")
"""Short words that bring a text to its exact length."""


class CannotFit(ValueError):
    """No text of this length can be made, for example because the template alone is longer."""


def sentences(seed: str, count: int) -> list[str]:
    """``count`` facts about people; the same for the same seed."""
    rng = random.Random(seed)
    return [
        f"{rng.choice(_NAMES)}'s {rng.choice(_ATTRIBUTES)} is {rng.choice(_WORDS)} {rng.choice(_WORDS)}."
        for _ in range(count)
    ]


def document(seed: str, num_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """A paragraph of facts for which ``count_tokens`` gives exactly ``num_tokens``."""
    return _fit(
        seed, num_tokens, count_tokens, [word for line in sentences(seed, num_tokens) for word in line.split()], ""
    )


def query(seed: str, num_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Small talk that ends with a question, for which ``count_tokens`` gives exactly ``num_tokens``."""
    rng = random.Random(seed)
    question = f"What is {rng.choice(_NAMES)}'s {rng.choice(_ATTRIBUTES)}?"
    return _fit(seed, num_tokens, count_tokens, [rng.choice(_WORDS) for _ in range(num_tokens)], question)


def _fit(seed: str, num_tokens: int, count_tokens: Callable[[str], int], words: Sequence[str], end: str) -> str:
    """As many words as fit, by bisection, then filler words for the last few tokens."""

    def text(number: int, filler: Sequence[str] = ()) -> str:
        return " ".join([*words[:number], *filler, end]).strip()

    low, high = 0, len(words)
    if count_tokens(text(1)) > num_tokens:
        raise CannotFit(f"a text of {num_tokens} tokens cannot be made: the shortest has {count_tokens(text(1))}")
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens(text(middle)) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    rng = random.Random(seed)
    # Where a word costs several tokens (one for the space, say) a few words make room for fillers of other lengths.
    for number in range(low, max(low - 12, 0), -1):
        for _ in range(8):
            filler: list[str] = []
            while (length := count_tokens(text(number, filler))) < num_tokens:
                filler.append(rng.choice(FILLER))
            if length == num_tokens:
                return text(number, filler)
    raise CannotFit(f"no text of exactly {num_tokens} tokens was found; choose a length one token shorter or longer")
