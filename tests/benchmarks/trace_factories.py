"""Synthetic traces of different character. Blocks are named by counting up; a conversation's last block is partial."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

from benchmarks.trace_data import BLOCK_TOKENS, Request, Turn, turns


class Blocks:
    """Names for blocks that nobody has used."""

    def __init__(self) -> None:
        self._next = itertools.count(1)

    def fresh(self, count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(self._next, count))


def trace(requests: list[Request]) -> list[Turn]:
    return turns(sorted(requests, key=lambda request: request.arrival_s))


def request(arrival_s: float, blocks: tuple[int, ...], output_tokens: int = 100) -> Request:
    return Request(arrival_s, BLOCK_TOKENS * len(blocks) - 100, output_tokens, blocks)


def chats(
    seed: int,
    count: int,
    every_s: float,
    goes_on: Callable[[int], float],
    gap_s: Callable[[random.Random], float],
) -> list[Turn]:
    """Conversations behind one system prompt; ``goes_on`` is the probability of another turn, by turns so far."""
    rng, blocks = random.Random(seed), Blocks()
    system = blocks.fresh(1)
    requests = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(1 / every_s)
        at, chain, turn = now, system + blocks.fresh(rng.randint(2, 12)), 1
        while True:
            requests.append(request(at, chain + blocks.fresh(1)))
            if rng.random() > goes_on(turn):
                break
            at, chain, turn = at + gap_s(rng), chain + blocks.fresh(rng.randint(1, 3)), turn + 1
    return trace(requests)


def slow_chats(seed: int = 0) -> list[Turn]:
    """Nobody is back before a minute; longer conversations go on more often."""
    return chats(seed, 350, 3.0, lambda turn: min(0.9, 0.25 + 0.15 * turn), lambda rng: 60 + rng.expovariate(1 / 60))


def quick_chats(seed: int = 0) -> list[Turn]:
    """The next turn comes at once or not at all: LRU's home."""
    return chats(seed, 350, 3.0, lambda turn: 0.5, lambda rng: rng.expovariate(1 / 15))


def heavy_tailed_chats(seed: int = 0) -> list[Turn]:
    return chats(seed, 350, 3.0, lambda turn: 0.6, lambda rng: math.exp(rng.gauss(4.5, 1.2)))


def loop(length: int = 60, rounds: int = 15) -> list[Turn]:
    """The same prompts in turn, over and over."""
    blocks = Blocks()
    prompts = [blocks.fresh(4) for _ in range(length)]
    return trace([request(2.0 * i, prompts[i % length]) for i in range(length * rounds)])


def scan(count: int = 600) -> list[Turn]:
    """Nothing comes twice, but the system prompt."""
    blocks = Blocks()
    system = blocks.fresh(1)
    return trace([request(2.0 * i, system + blocks.fresh(5)) for i in range(count)])


def zipf(seed: int = 0, prompts: int = 300, count: int = 1500, exponent: float = 1.0) -> list[Turn]:
    """Independent draws from prompts of one block each: no conversations, only popularity."""
    rng, blocks = random.Random(seed), Blocks()
    names = [blocks.fresh(1) for _ in range(prompts)]
    weights = [1 / (i + 1) ** exponent for i in range(prompts)]
    drawn = rng.choices(names, weights, k=count)
    return trace([request(1.0 * i, chain) for i, chain in enumerate(drawn)])


def documents(seed: int = 0, count: int = 800) -> list[Turn]:
    """Questions over shared documents of very different popularity; each question is new."""
    rng, blocks = random.Random(seed), Blocks()
    files = [blocks.fresh(rng.randint(4, 20)) for _ in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    drawn = rng.choices(files, weights, k=count)
    return trace([request(1.5 * i, chain + blocks.fresh(1)) for i, chain in enumerate(drawn)])


def scan_among_chats(seed: int = 0) -> list[Turn]:
    """Conversations, and a batch job that reads much once."""
    chat = [turn.request for turn in slow_chats(seed)]
    end_s = chat[-1].arrival_s
    names = itertools.count(10**9)
    job = [request(end_s * i / 400, tuple(itertools.islice(names, 12))) for i in range(400)]
    return trace(chat + job)


def changing(seed: int = 0) -> list[Turn]:
    """Quick conversations, then slow ones."""
    first = [turn.request for turn in quick_chats(seed)]
    shift_s = first[-1].arrival_s + 10
    second = [
        Request(one.arrival_s + shift_s, one.prompt_tokens, one.output_tokens, tuple(b + 10**9 for b in one.blocks))
        for one in (turn.request for turn in slow_chats(seed + 1))
    ]
    return trace(first + second)


def all_characters() -> Iterator[tuple[str, Callable[[], list[Turn]]]]:
    for make in (
        slow_chats,
        quick_chats,
        heavy_tailed_chats,
        loop,
        scan,
        zipf,
        documents,
        scan_among_chats,
        changing,
    ):
        yield make.__name__, make
