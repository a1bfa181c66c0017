"""The process that is killed: says how it finds the store, then writes in several threads and tells of each write.

Messages to the parent: ``("found", texts by id, problems)`` once; then, for each write,
``("tries", thread, write)`` before it and ``("wrote", thread, result)`` after it.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path
from typing import Any

from memos_vllm.memory import records
from memos_vllm.memory.maintenance import examine_open
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, make_service, says

THREADS = 3
BATCH = 8


def run(where: Path | str, seed: int, connection: Any) -> None:
    service = make_service(where, clock=records.utc_now)
    sending = threading.Lock()

    def send(*message: Any) -> None:
        with sending:
            connection.send_bytes(json.dumps(message).encode())

    send("found", *found(service))
    for thread in range(THREADS):
        threading.Thread(target=load, args=(service, f"{seed}-{thread}", thread, send)).start()


def found(service: MemoryService) -> tuple[dict[str, str], list[str]]:
    store = service._store
    problems = examine_open(store).problems
    with store.read(ALICE) as user:
        texts = {record.id: record.text for record in user.scan()}
    return texts, [f"{problem.table} {problem.where}: {problem.text}" for problem in problems]


def load(service: MemoryService, name: str, thread: int, send: Any) -> None:
    """Writes for ever. Each thread changes what it made itself, so that the order of its changes is known."""
    rng = random.Random(name)
    mine: list[str] = []
    for number in itertools.count():
        token = f"{name}-{number} "
        kind = rng.choice(["add", "batch", "update", "update", "delete", "correct", "merge", "use", "snapshot"])
        if kind == "add":
            send("tries", thread, {"makes": token, "count": 1})
            record = service.add(ALICE, token + "tea " * rng.randrange(1, 200), tags=[name])
            mine.append(record.id)
            send("wrote", thread, {record.id: record.text})
        elif kind == "batch":
            send("tries", thread, {"makes": token, "count": BATCH})
            made = service.add_many(ALICE, [{"text": f"{token}milk {place}"} for place in range(BATCH)])
            mine += [record.id for record in made]
            send("wrote", thread, {record.id: record.text for record in made})
        elif kind == "correct":
            send("tries", thread, {"makes": f"My favourite plant-{thread} is {token}".strip(), "count": 1})
            (record,) = service.remember(ALICE, says(f"My favourite plant-{thread} is {token}".strip() + "."))
            send("wrote", thread, {record.id: record.text})
        elif len(mine) < 3:
            continue
        elif kind == "update":
            memory = rng.choice(mine)
            send("tries", thread, {"changes": memory, "to": token + "water"})
            service.update(ALICE, memory, text=token + "water")
            send("wrote", thread, {memory: token + "water"})
        elif kind == "delete":
            memory = mine.pop(rng.randrange(len(mine)))
            send("tries", thread, {"changes": memory, "to": None})
            service.delete(ALICE, memory)
            send("wrote", thread, {memory: None})
        elif kind == "merge":
            kept, copy = (mine.pop() for _ in range(2))  # neither is deleted later
            send("tries", thread, {})
            service.life.link(ALICE, kept, copy, "related_to")
            service.life.merge(ALICE, kept, [copy])
            send("wrote", thread, {})
        elif kind == "use":
            send("tries", thread, {})
            service.life.used(ALICE, {"late": rng.sample(mine, 2)}, session=name)
            send("wrote", thread, {})
        elif number % 50 == 0:
            send("tries", thread, {})
            snapshot = service.life.take_snapshot(ALICE, token)
            service.life.remove_snapshot(ALICE, snapshot.id)
            send("wrote", thread, {})
