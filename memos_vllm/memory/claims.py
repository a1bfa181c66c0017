"""What a memory says, reduced to what tells two memories apart: a repetition, or a contradiction.

A *claim* is a sentence that gives the value of something a person has one of: "My favourite drink
is oolong tea.", "I live in Berlin." Two claims about the same thing with another value contradict each
other. The rule is narrow on purpose. "My cat is black" and "My cat is ill" are both true, so only what
has one value counts; ``claim_forms`` has the sentences, and ``instructions`` those on how to answer.

An *assertion* (``assertions``) is what one does, is or has, which a later sentence may deny in the same words.
"""

from __future__ import annotations

import hashlib

import regex

from memos_vllm.memory import claim_forms, instructions
from memos_vllm.memory.assertions import assertion_of, reading_of
from memos_vllm.memory.claim_forms import Claim, fold

__all__ = [
    "Claim",
    "assertion_key",
    "assertion_of",
    "claim_of",
    "fold",
    "keys_of",
    "near_key",
    "reading_of",
    "subject_key",
    "subject_keys",
    "text_key",
    "tool_key",
    "tool_of",
]

MAX_NEAR_CHARS = 500
"""A longer text is a document; whether two of them say the same is not for a list of words to tell."""

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:'[\p{L}]+)?|[^\s\p{P}\p{L}\p{M}\p{N}]")
_SPELT = {
    "i'm": "i am", "i've": "i have", "i'd": "i would", "i'll": "i will", "it's": "it is", "that's": "that is",
    "he's": "he is", "she's": "she is", "we're": "we are", "we've": "we have", "they're": "they are",
    "don't": "do not", "doesn't": "does not", "didn't": "did not", "can't": "can not", "cannot": "can not",
    "won't": "will not", "isn't": "is not", "aren't": "are not", "wasn't": "was not", "favorite": "favourite",
}  # fmt: skip
_TOOL = regex.compile(r"Tool (?P<name>[^\s:]{1,128}): [^\n]*(?:\n.*)?\nParameters: \{", regex.S)
_EMPTY = frozenset("a an the really very just also so".split())


def claim_of(text: str) -> Claim | None:
    """The claim that the whole text makes, or None."""
    if (claim := claim_forms.claim_of(text)) or (order := instructions.of(text)) is None:
        return claim
    return order.claim


def text_key(text: str) -> bytes:
    """17 bytes; equal for texts that say the same in the same words."""
    return b"t" + _digest(fold(text))


def near_key(text: str) -> bytes:
    """17 bytes; equal for texts that say the same but for punctuation, contractions, articles and intensifiers.

    The words keep their order: "Ann is older than Bob" is not the reverse.
    """
    words = _WORD.findall(fold(text).replace("’", "'"))
    spelt = (_SPELT.get(word, word) for word in words)
    return b"n" + _digest(" ".join(part for word in spelt for part in word.split() if part not in _EMPTY) or fold(text))


def subject_key(claim: Claim) -> bytes:
    """17 bytes; equal for claims about the same thing."""
    return b"s" + _digest(claim.subject)


def subject_keys(claim: Claim) -> set[bytes]:
    """Of all spellings of the subject: "my favourite color" is the same thing as "my favourite colour"."""
    american = claim.subject.replace("colour", "color")
    return {subject_key(Claim(subject, claim.value)) for subject in (american, american.replace("color", "colour"))}


def assertion_key(predicate: str) -> bytes:
    """17 bytes; equal for sentences that assert or deny the same."""
    return b"p" + _digest(predicate)


def tool_of(text: str) -> str | None:
    """The name of the tool whose schema this is, as ``tool_use`` writes it."""
    match = _TOOL.match(text)
    return match["name"] if match else None


def tool_key(name: str) -> bytes:
    """17 bytes; equal for schemas of tools of one name."""
    return b"o" + _digest(name)


def keys_of(text: str) -> tuple[bytes, ...]:
    """Under which keys a current memory with this text is found again."""
    keys = [text_key(text), near_key(text)] if len(text) <= MAX_NEAR_CHARS else [text_key(text)]
    claim, assertion = reading_of(text)
    if claim:
        keys.append(subject_key(claim))
    if assertion:
        keys.append(assertion_key(assertion.predicate))
    if tool := tool_of(text):
        keys.append(tool_key(tool))
    return tuple(keys)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
