"""``memos distill``: turns a user's memories into a LoRA adapter, and publishes it if it is good.

    memos distill --config memos.yaml --tenant shop --user alice --name alice-knows

It reads the memories from the data directory that may stand in any prompt, distils them (``adapters.distill``),
and registers the result as the newest version of the name, with its provenance. It is not registered if it
misses the bar, harms the control set, or if a memory was changed or deleted meanwhile; the exit status is then
1. It may run beside the server, which uses the adapter from then on. Undo: ``DELETE
/v1/adapters/NAME@VERSION``, or choose the version before with ``PATCH``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from memos_vllm import data_dir
from memos_vllm.adapters.distill_settings import Settings
from memos_vllm.adapters.questions import Control, questions_of
from memos_vllm.adapters.registry import AdapterRegistry
from memos_vllm.config import MemosConfig, load
from memos_vllm.errors import Conflict, MemosError, NotFound, RequestError
from memos_vllm.memory import claims
from memos_vllm.memory.assembly import assemble
from memos_vllm.memory.opening import open_store
from memos_vllm.memory.records import MemoryRecord, utc_now
from memos_vllm.memory.service import MemoryService
from memos_vllm.types import Principal

PAGE = 500


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m memos_vllm.distill")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    try:
        report = distil(load(options.config), options)
    except MemosError as error:
        print(f"memos: {error}", file=sys.stderr)
        report = {"published": None, "refused": str(error)}
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if options.report:
        temporary = options.report.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, options.report)
    print(text)
    return 0 if report["published"] else 1


def distil(config: MemosConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Selects, distils, evaluates, publishes; the report says what came of it."""
    try:
        from memos_vllm.adapters.distill import Distillation, use_threads
    except ImportError as error:
        raise RequestError(f"distillation needs PEFT ({error}); pip install 'memos-vllm[distill]'") from error

    began = time.monotonic()
    use_threads(options.threads)
    who = Principal(options.tenant, options.user)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    registry = AdapterRegistry.beside_server(data_dir.adapters_dir(config.data_dir), config.adapters)
    store = open_store(config)
    try:
        service = MemoryService(store, config.memory)
        memories = _select(service, who, options.memory, options.tag)
        facts, silent = _facts(memories, options.questions)
        if not facts:
            raise RequestError(
                "no question follows from these memories by rules; give some with --questions, a file of lines "
                '{"question": "...", "answer": "...", "memory": "ID"}'
            )
        model = options.model or registry.base_path
        distillation = Distillation(Path(model), _with_memory, device=options.device, quiet=options.quiet)
        with tempfile.TemporaryDirectory(prefix="memos-distill-") as folder:
            target = Path(folder) / "adapter"
            evaluation = distillation.run(facts, settings, target, _controls(options.control))
            used = {fact.memory_id for fact in facts}
            origin = {
                "tenant": who.tenant,
                "user": who.user,
                "memories": [
                    {"id": each.id, "version": each.version, "fingerprint": claims.text_key(each.text).hex()}
                    for each in memories
                    if each.id in used
                ],
                "questions": [{"question": fact.question, "memory": fact.memory_id} for fact in facts],
                "model": str(model),
                "settings": asdict(settings),
                "evaluation": evaluation.as_json(),
                "took_s": round(time.monotonic() - began, 1),
            }
            refused = evaluation.refusal(settings) or _changed(service, who, memories)
            published = None
            if refused is None:
                adapter = registry.register(
                    who, options.name, target, origin={"source": "distilled", "distilled": origin}
                )
                published = f"{adapter.name}@{adapter.versions[-1].version}"
    finally:
        store.close()
        registry.close()
    return {"published": published, "refused": refused, "without_question": silent, **origin}


def _with_memory(messages: Sequence[dict[str, Any]], memory: Sequence[str]) -> list[dict[str, Any]]:
    return assemble(messages, long_lived=memory)


def _select(service: MemoryService, who: Principal, ids: Sequence[str], tag: str | None) -> list[MemoryRecord]:
    """
    Raises:
        NotFound, Conflict: a memory that is named is not there, or may not go into weights.
    """
    if ids:
        return [service.distillable(who, memory_id) for memory_id in ids]
    now = utc_now()
    found: list[MemoryRecord] = []
    after = None
    while True:
        page = service.list(who, limit=PAGE, after=after, tag=tag)
        found += [record for record in page.records if record.is_distillable(now)]
        if (after := page.next) is None:
            return found


def _facts(memories: Sequence[MemoryRecord], questions: Path | None) -> tuple[list[Any], list[str]]:
    """What is asked, and the memories that nothing is asked about."""
    from memos_vllm.adapters.distill import Fact

    known = {memory.id: memory for memory in memories}
    facts = []
    if questions is not None:
        for line in _lines(questions):
            memory = known.get(line.get("memory", ""))
            if memory is None:
                raise RequestError(f"{questions}: 'memory' must be the id of a memory that is distilled: {line}")
            facts.append(Fact(memory.id, memory.text, line["question"], line.get("answer")))
    else:
        for memory in memories:
            facts += [Fact(memory.id, each.statement, each.text, each.value) for each in questions_of(memory.text)]
    asked = {fact.memory_id for fact in facts}
    return facts, [memory.id for memory in memories if memory.id not in asked]


def _controls(path: Path | None) -> list[Control]:
    if path is None:
        return []
    return [Control(line["question"], tuple(line.get("memory", ())), line.get("answer")) for line in _lines(path)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """
    Raises:
        RequestError: a line is no JSON object with a question.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    for line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("question"), str):
            raise RequestError(f"{path}: each line is a JSON object with a 'question'")
    return lines


def _changed(service: MemoryService, who: Principal, memories: Sequence[MemoryRecord]) -> str | None:
    """Whether a memory was deleted or changed while the adapter learned it."""
    for memory in memories:
        try:
            now = service.distillable(who, memory.id)
        except NotFound:
            return f"memory {memory.id} was deleted meanwhile; run it again"
        except Conflict as error:
            return f"{error}; run it again"
        if now.text != memory.text:
            return f"memory {memory.id} was changed meanwhile; run it again"
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", help="the server's --memos-config file")
    parser.add_argument("--tenant", required=True)
    parser.add_argument("--user", required=True)
    parser.add_argument("--name", required=True, help="of the adapter; a name that exists gets a new version")
    parser.add_argument("--memory", action="append", default=[], metavar="ID", help="only these memories")
    parser.add_argument("--tag", help="only memories with this tag")
    parser.add_argument("--model", help="folder of the model; default: the one that the server last served")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--questions", type=Path, help="JSON lines of questions, instead of those made by rules")
    parser.add_argument("--control", type=Path, help="JSON lines of further controls")
    parser.add_argument("--report", type=Path, help="file for the report, beside standard output")
    parser.add_argument("--threads", type=int, help="of torch; fewer leave cores to a server beside it")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    for field in fields(Settings):
        kind = float if isinstance(field.default, float) else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)


if __name__ == "__main__":
    sys.exit(main())
