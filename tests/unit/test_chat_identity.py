"""Whether a chat request has memory, and whose, without a model."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from memos_vllm.config import MemosConfig
from memos_vllm.errors import RequestError
from memos_vllm.integration import chat, memory_default
from memos_vllm.types import Principal

KEYS = {
    "app": {"tenant": "shop", "memory": True},
    "tool": {"tenant": "shop"},
    "carol": {"tenant": "shop", "user": "carol", "memory": True},
}
NO_MEMOS = object()


@pytest.fixture
def state() -> Any:
    config = MemosConfig.model_validate({"identity": {"keys": KEYS}, "memory": {"default": "off"}})
    return SimpleNamespace(config=config, nameless_keys=set())


def whose(state: Any, key: str, memos: Any = NO_MEMOS, **more: Any) -> Principal | None:
    more |= {} if memos is NO_MEMOS else {"memos": memos}
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], **more)
    raw: Any = SimpleNamespace(headers={"authorization": f"Bearer {key}"})
    turn = chat.read_turn(request, raw, state)
    return None if turn is None else turn.who


def test_an_applications_request_for_memory_names_its_user(state: Any) -> None:
    assert whose(state, "app", {"user": "alice"}) == Principal("shop", "alice")
    for memos in (True, {}, {"session": "s"}):
        with pytest.raises(RequestError, match=r"name the user: 'memos.user'"):
            whose(state, "app", memos)


def test_memory_by_default_of_nobody_is_no_memory_and_is_said_once(
    state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, memory_default.logger.name):
        assert [whose(state, "app") for _ in range(3)] == [None] * 3
        assert whose(state, "tool") is None, "no memory by default: nothing to warn of"
    (warning,) = caplog.messages
    assert "shop" in warning and "identity.keys" in warning and "key app" not in warning
    assert whose(state, "app", False) is None
    assert whose(state, "carol") == Principal("shop", "carol")


def test_the_servers_default_goes_for_each_key(state: Any, caplog: pytest.LogCaptureFixture) -> None:
    memory = state.config.memory.model_copy(update={"default": "on"})
    state.config = state.config.model_copy(update={"memory": memory})
    alone = whose(state, "EMPTY")
    assert alone is not None and alone.user == "default"
    assert whose(state, "app") is None and whose(state, "tool") is None
    assert len(caplog.messages) == 2, "once for each key"


@pytest.mark.parametrize("memos", [1, "yes", [], ["user"]])
def test_memos_of_another_shape_is_refused_in_the_apis_words(state: Any, memos: Any) -> None:
    with pytest.raises(RequestError, match="'memos' is true, false or an object with user, session") as caught:
        whose(state, "carol", memos)
    assert repr(memos) in str(caught.value) and "MemosField" not in str(caught.value)


def test_openais_own_user_names_nobody_and_that_is_said_once(state: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert whose(state, "dummy", {"user": "alice"}, user="alice") == whose(state, "dummy", {"user": "alice"})
    assert whose(state, "carol", True, user="bob") == Principal("shop", "carol")
    assert whose(state, "dummy", False, user="alice") is None
    assert not caplog.messages
    for name in ("alice", "bob"):
        who = whose(state, "dummy", True, user=name)
        assert who is not None and who.user == "default"
    whose(state, "another dummy", True, user="eve")
    (warning,) = caplog.messages
    assert "'memos': {'user': ...}" in warning and "dummy" not in warning
