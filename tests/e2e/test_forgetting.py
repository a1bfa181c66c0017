"""Facts told in three conversations, one corrected, one deleted: what is answered, and what is left of it anywhere."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memos_vllm import data_dir
from memos_vllm.integration import salts
from memos_vllm.integration.metrics import TIERS
from memos_vllm.memory.assembly import assemble
from memos_vllm.types import Principal
from tests.e2e.conftest import Memos

pytestmark = pytest.mark.e2e

LEAD = {"role": "system", "content": "You are a helpful assistant."}
DRINK, CITY, NEW_CITY, JOB = (
    "My favourite drink is oolong tea.",
    "My home city is Turin.",
    "My home city is Lisbon.",
    "My job is baker.",
)
UNKNOWN = "not known to me"


@dataclass
class Life:
    """A user who talks to the assistant, and an operator who knows the server's secret and looks for his KV."""

    memos: Memos
    key: str
    secret: bytes

    def conversation(self, *said: str, session: str | None = None, **options: Any) -> list[str]:
        """One session, turn by turn with its history; the answers."""
        session, messages, answers = session or uuid.uuid4().hex, [LEAD], []
        for text in said:
            messages.append({"role": "user", "content": text})
            answers.append(self.memos.answer(self.key, messages, {"session": session, **options}))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    def ask(self, question: str) -> str:
        """In a new session, as the last word of the day: nothing is remembered of it."""
        return self.conversation(question, remember=False)[0]

    def memory(self, text: str) -> dict[str, Any]:
        (record,) = [each for each in self.memos.call("GET", "/v1/memories", self.key).json()["data"] if
                     each["text"] == text]  # fmt: skip
        return record

    def prompt(self, question: str) -> list[int]:
        """Tokens of what a new session's first request asks the model."""
        messages = [LEAD, {"role": "user", "content": question}]
        options = {"session": uuid.uuid4().hex, "remember": False, "explain": True}
        told = self.memos.chat(self.key, messages, options).model_extra["memos"]["recalled"]
        texts = {where: [each["text"] for each in told if each["where"] == where] for where in ("long_lived", "late")}
        body = {"model": self.memos.server.model, "messages": assemble(messages, **texts)}
        return self.memos.call("POST", "/tokenize", self.key, json=body).json()["tokens"]

    def probe(self, tokens: list[int], salt: str) -> dict[str, Any]:
        """Asks the engine for a prompt under a salt: what it had of it; what each tier was asked for and gave."""
        before = self._tiers()
        body = {"model": self.memos.server.model, "prompt": tokens, "max_tokens": 1, "cache_salt": salt}
        usage = self.memos.call("POST", "/v1/completions", self.key, json=body).json()["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        self.memos.settle()
        after = self._tiers()
        found = {tier: {name: after[tier][name] - before[tier][name] for name in after[tier]} for tier in TIERS}
        return {"cached": usage["prompt_tokens_details"]["cached_tokens"] or 0, **found}

    def _tiers(self) -> dict[str, Any]:
        tiers = self.memos.call("GET", "/v1/memos/status").json()["summary"]["tiers"]
        return {tier: {name: tiers[tier][name] for name in ("hit_blocks", "miss_blocks")} for tier in TIERS}

    def salt(self, record: dict[str, Any], kv_epoch: int) -> str:
        return salts.salt_of(self.secret, Principal(record["tenant"], record["user"]), kv_epoch)

    def scene(self, session: str) -> str:
        return self.memos.call("GET", f"/v1/scenes?session={session}", self.key).json()["state"]


@pytest.fixture
def life(memos: Memos, config_path: Path) -> Life:
    secret = data_dir.secret(config_path.parent / "data")
    return Life(memos, f"key-{uuid.uuid4().hex}", secret)


def test_current_facts_are_answered_and_a_deleted_one_is_gone_everywhere(life: Life) -> None:
    memos = life.memos
    assert life.conversation(DRINK, "What is my favourite drink?")[1] == "Your favourite drink is oolong tea."
    life.conversation(CITY, session="second")
    life.conversation("Hello!", JOB)
    life.conversation(NEW_CITY)  # the correction, in a conversation of its own

    assert life.ask("What is my favourite drink?") == "Your favourite drink is oolong tea."
    assert life.ask("What is my home city?") == "Your home city is Lisbon."
    assert life.ask("What is my job?") == "Your job is baker."
    drink, city, job = (life.memory(text) for text in (DRINK, NEW_CITY, JOB))
    history = memos.call("GET", f"/v1/memories/{city['id']}/history", life.key).json()["data"]
    assert [each["text"] for each in history] == [CITY, NEW_CITY], "what was corrected stays in the history"

    # Every tier has the KV of a prompt with the job in it, and gives it to whoever knows the salt.
    prompt, salt = life.prompt("What is my job?"), life.salt(job, 0)
    block_size = memos.settle()["block_size"]
    num_blocks = (len(prompt) - 1) // block_size
    assert num_blocks >= 2
    for dropped, tier in [((), "gpu"), (("gpu",), "host"), (("gpu", "host"), "disk")]:
        before = memos.settle()["totals"]
        memos.drop(*dropped)
        found = life.probe(prompt, salt)
        assert found["cached"] == num_blocks * block_size, tier
        if tier == "gpu":
            assert found[tier]["hit_blocks"] == num_blocks
        else:  # by the probe or, where it is expected, by a prefetch before it
            loaded = f"loaded_{tier}_blocks"
            assert memos.settle()["totals"][loaded] - before[loaded] >= num_blocks
    assert life.scene("second") != "unknown"

    receipt = memos.call("DELETE", f"/v1/memories/{job['id']}", life.key).json()

    assert (receipt["deleted"], receipt["records"], receipt["kv_epoch"]) == (True, [job["id"]], 1)
    assert all(receipt["kv"][name] >= num_blocks for name in ("gpu_blocks", "host_blocks", "disk_blocks"))
    assert receipt["kv"]["scenes"] >= 1 and receipt["postings"] > 0 and receipt["sessions"] > 0
    assert life.scene("second") == "unknown"
    missed = {"hit_blocks": 0, "miss_blocks": num_blocks}
    assert life.probe(prompt, salt) == {"cached": 0, **dict.fromkeys(TIERS, missed)}
    assert life.probe(prompt, salt)["cached"] == 0, "what is computed under the old salt is not kept either"

    assert life.ask("What is my favourite drink?") == "Your favourite drink is oolong tea."
    assert life.ask("What is my home city?") == "Your home city is Lisbon."
    assert UNKNOWN in life.ask("What is my job?")
    assert UNKNOWN in life.conversation("What is my job?", session="second", remember=False)[0], "an older session"
    texts = [each["text"] for each in memos.call("GET", "/v1/memories", life.key).json()["data"]]
    assert sorted(texts) == sorted([drink["text"], city["text"]])
    hits = memos.call("POST", "/v1/memories/search", life.key, json={"query": "job baker"}).json()["data"]
    assert job["id"] not in [hit["id"] for hit in hits]
