"""LoCoMo: how many of the turns that answer a question are among the first k recalled.

    python -m benchmarks.locomo [--data FILE] [--embedder KIND:PATH ...] [--ablations] [--json FILE]

    bm25s            BM25S, one turn a document
    bm25s_previous   the same, each turn with the one before it
    fts5             SQLite FTS5
    lexical_alone    Memos by words and times, each turn by itself
    lexical          the same with what was said around it: what Memos does without an embedder
    lexical_context  the same, each hit followed by the turn before and the turn after it

and for each --embedder (``rows:DIR`` input embeddings of a language model, ``sentence-transformers:DIR``,
``model2vec:DIR``)

    dense            cosine alone
    rrf              lexical and dense by reciprocal rank fusion
    hybrid           what Memos does

and with --ablations, what ``lexical`` would find with other constants than the ones it has.

Each conversation is a user with an index of his own; a turn is a memory with its speaker, conversation and
date. Recall is the share of a question's evidence that is found, averaged over questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.table import Table

from benchmarks import locomo_arms, report
from benchmarks.arguments import output_file
from benchmarks.locomo_arms import Ranker
from benchmarks.locomo_data import CATEGORIES, Conversation, DataError, read
from memos_vllm.errors import MemosError
from memos_vllm.memory.embedders import Embedder, ModelRows
from memos_vllm.memory.encoders import SentenceEncoder, StaticEncoder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "locomo" / "locomo_first5.json"
CUTS = (5, 10, 20, 50)
POOLED = "1-4"
_EMBEDDERS: dict[str, Callable[[str], Embedder]] = {
    "rows": lambda path: ModelRows(Path(path)),
    "sentence-transformers": SentenceEncoder,
    "model2vec": StaticEncoder,
}
Recalls = dict[tuple[str, str, int], list[float]]
"""Arm, category and k to a recall per question."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    console = report.console()
    data = Path(arguments.data or DATA)
    if arguments.data is None and not data.exists():
        console.print(f"skipped: there is no {data}; name the data with --data", highlight=False)
        return 0
    try:
        conversations, repairs = read(data, arguments.captions)
        embedders = {name: _embedder_of(name) for name in arguments.embedder}
    except (DataError, MemosError) as error:
        print(f"locomo: {error}", file=sys.stderr)
        return 2
    recalls: Recalls = {}
    num_arms = len(_BASE_ARMS) + len(embedders) * len(_DENSE_ARMS) + len(_ABLATIONS) * arguments.ablations
    with report.progress("locomo", num_arms * len(conversations)) as advance:
        for conversation in conversations:
            with ExitStack() as resources:
                for arm, ranker in arms(conversation, embedders, resources):
                    if ranker is not None:
                        measure(conversation, arm, ranker, recalls)
                    advance(f"{arm} on {conversation.name}")
                for arm, constants in _ABLATIONS.items() if arguments.ablations else ():
                    with locomo_arms.other_constants(constants):
                        ranker = locomo_arms.searching(locomo_arms.memos(conversation, resources))
                        measure(conversation, arm, ranker, recalls)
                    advance(f"{arm} on {conversation.name}")
    rows = summarise(recalls)
    num_questions = sum(len(conversation.questions) for conversation in conversations)
    title = (
        f"{data.name}: {len(conversations)} conversations, {num_questions} questions; evidence: {repairs.repaired} "
        f"repaired, {repairs.dropped} dropped, {repairs.questions_without} questions without any"
    )
    show(console, rows, title)
    if arguments.json:
        flags = {
            "data": data.name,
            "captions": arguments.captions,
            "embedder": [f"{name.partition(':')[0]}:{Path(name).name}" for name in arguments.embedder],
        }
        report.write_json(arguments.json, "locomo", flags, rows)
    return 0


_BASE_ARMS = ("bm25s", "bm25s_previous", "fts5", "lexical_alone", "lexical", "lexical_context")
_DENSE_ARMS = ("dense", "rrf", "hybrid")
_ABLATIONS: dict[str, Mapping[str, float]] = {
    "1 step": {"neighbours.STEPS": 1},
    "3 steps": {"neighbours.STEPS": 3},
    "weight 1/4": {"neighbours.WEIGHT_PER_STEP": 0.25},
    "weight 1/3": {"neighbours.WEIGHT_PER_STEP": 1 / 3},
    "weight 2/3": {"neighbours.WEIGHT_PER_STEP": 2 / 3},
    "weight 1": {"neighbours.WEIGHT_PER_STEP": 1.0},
    "k1 0.9, b 0.4": {"lexical.K1": 0.9, "lexical.B": 0.4},
    "k1 1.5, b 0.75": {"lexical.K1": 1.5},
}


def arms(
    conversation: Conversation, embedders: dict[str, Embedder], resources: ExitStack
) -> Iterator[tuple[str, Ranker | None]]:
    """Each arm and its ranker; None where a baseline's library is not installed."""
    documents = locomo_arms.texts(conversation)
    for arm, texts in (("bm25s", documents), ("bm25s_previous", locomo_arms.texts(conversation, before=1))):
        try:
            yield arm, locomo_arms.bm25s(texts)
        except ImportError:
            yield arm, None
    yield "fts5", locomo_arms.fts5(documents, resources)
    yield "lexical_alone", locomo_arms.searching(locomo_arms.memos(conversation, resources, neighbours=False))
    service = locomo_arms.memos(conversation, resources)
    lexical = locomo_arms.searching(service)
    yield "lexical", lexical
    yield "lexical_context", locomo_arms.searching(service, context=1)
    for name, embedder in embedders.items():
        label = f"{name.partition(':')[0]}:{Path(name).name}"
        embedder.embed([question.text for question in conversation.questions])  # in one batch
        dense = locomo_arms.exact_dense(documents, embedder)
        yield f"dense {label}", dense
        fused = locomo_arms.reciprocal_rank_fusion([lexical, dense], len(conversation.turns))
        yield f"rrf {label}", fused
        yield f"hybrid {label}", locomo_arms.searching(locomo_arms.memos(conversation, resources, embedder))


def _embedder_of(name: str) -> Embedder:
    kind, _, path = name.partition(":")
    return locomo_arms.Remembering(_EMBEDDERS[kind](path))


def measure(conversation: Conversation, arm: str, ranker: Ranker, recalls: Recalls) -> None:
    for question in conversation.questions:
        ranking = ranker(question.text, max(CUTS))
        for k in CUTS:
            found = set(ranking[:k])
            recall = sum(place in found for place in question.evidence) / len(question.evidence)
            pools = [str(question.category)] + [POOLED] * (question.category in (1, 2, 3, 4))
            for pool in pools:
                recalls.setdefault((arm, pool, k), []).append(recall)


def summarise(recalls: Recalls) -> list[dict[str, object]]:
    return [
        {"arm": arm, "category": category, "k": k, "recall": sum(each) / len(each), "n": len(each)}
        for (arm, category, k), each in recalls.items()
    ]


def show(console: object, rows: Sequence[dict[str, object]], title: str) -> None:
    table = Table(title=title, title_justify="left", caption="percent; R@k over categories 1-4, R@10 by category")
    table.add_column("arm")
    for heading in (*(f"R@{k}" for k in CUTS), *(f"{number} {name}" for number, name in CATEGORIES.items())):
        table.add_column(heading, justify="right")
    by_cell = {(row["arm"], row["category"], row["k"]): row["recall"] for row in rows}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [(arm, POOLED, k) for k in CUTS] + [(arm, str(category), 10) for category in CATEGORIES]
        table.add_row(str(arm), *(f"{100 * by_cell[cell]:.1f}" if cell in by_cell else "-" for cell in cells))  # type: ignore[operator]
    console.print(table)  # type: ignore[attr-defined]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.locomo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", metavar="FILE", help=f"LoCoMo's JSON; default: {DATA.name} in shared/data, if it is there"
    )
    parser.add_argument("--embedder", nargs="+", type=_embedder, default=[], metavar="KIND:PATH")
    parser.add_argument("--ablations", action="store_true", help="also with other constants")
    parser.add_argument("--captions", action="store_true", help="a turn's text has the caption of its picture")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(argv)


def _embedder(text: str) -> str:
    kind, colon, path = text.partition(":")
    if kind not in _EMBEDDERS or not colon or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(f'{kind}:PATH' for kind in _EMBEDDERS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
