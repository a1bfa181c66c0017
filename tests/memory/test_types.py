"""What is different about each type of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memos_vllm.errors import RequestError
from memos_vllm.memory import maintenance
from memos_vllm.memory.extraction import kind_of
from memos_vllm.memory.service import MemoryService
from tests.memory.memory_factories import ALICE, Clock, make_service, says, texts

TTL_S = 1000.0
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": {"city": "string"}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}


@pytest.fixture
def service(tmp_path: Path, clock: Clock) -> MemoryService:
    return make_service(tmp_path / "memory", clock=clock, session_ttl_s=TTL_S)


def late(service: MemoryService, query: str, session: str | None = None) -> list[str]:
    return texts(service.recall(ALICE, says(query), session=session).late)


class TestWorking:
    def test_stands_in_every_prompt_of_its_session_and_in_no_other(self, service: MemoryService) -> None:
        service.add(ALICE, "The order number is 7.", type="working", session="s")
        service.add(ALICE, "The parcel was sent.", type="working", session="s")
        assert late(service, "xyzzy", "s") == ["The order number is 7.", "The parcel was sent."]
        assert late(service, "order number", "other") == [] == late(service, "order number")
        assert texts(service.search(ALICE, "order number"))[0] == "The order number is 7."

    def test_ends_with_its_session(self, service: MemoryService, clock: Clock) -> None:
        memory = service.add(ALICE, "The order number is 7.", type="working", session="s").id
        for _ in range(5):
            clock.forward(0.9 * TTL_S)
            assert late(service, "order", "s") == ["The order number is 7."], "the session is used"
        clock.forward(1.2 * TTL_S)
        assert late(service, "order", "s") == []
        service.life.tend()
        assert service.get(ALICE, memory).state == "expired"

    def test_of_too_much_the_latest_stays(self, tmp_path: Path) -> None:
        service = make_service(tmp_path / "memory", late_tokens=4)
        for number in range(4):
            service.add(ALICE, f"step {number}", type="working", session="s")
        assert late(service, "xyzzy", "s") == ["step 2", "step 3"]

    @pytest.mark.parametrize("more", [{}, {"session": "s", "ttl_s": 5}])
    def test_needs_a_session_and_has_no_time_of_its_own(self, service: MemoryService, more: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match="ends with its session"):
            service.add(ALICE, "The order number is 7.", type="working", **more)

    def test_nothing_becomes_working_later(self, service: MemoryService) -> None:
        memory = service.add(ALICE, "The order number is 7.").id
        with pytest.raises(RequestError, match="from its beginning"):
            service.update(ALICE, memory, type="working")


@pytest.mark.parametrize(
    ("type", "state"), [("fact", "archived"), ("profile", "generated"), ("preference", "generated")]
)
def test_who_somebody_is_does_not_fade(service: MemoryService, clock: Clock, type: str, state: str) -> None:
    memory = service.add(ALICE, "Likes tea.", type=type).id
    clock.forward(1000 * 86400.0)
    service.life.tend()
    assert service.get(ALICE, memory).state == state


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("My favourite drink is oolong tea.", "preference"),
        ("I really don't like coriander.", "preference"),
        ("I can’t stand loud music.", "preference"),
        ("我喜欢喝茶。", "preference"),
        ("私は猫が好きです。", "preference"),
        ("My job is baker.", "profile"),
        ("I live in Turin, near the river.", "profile"),
        ("I'm from Peru.", "profile"),
        ("I am 30 years old.", "profile"),
        ("Alice's job is baker.", "fact"),
        ("I would like a refund.", "fact"),
        ("The ferry leaves at seven.", "fact"),
        ("It looks like rain.", "fact"),
    ],
)
def test_rules_tell_what_a_statement_is(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def call(number: int, name: str = "weather", arguments: Any = '{"city": "Turin"}') -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}]}


def result(number: int, text: str = "18 degrees") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


TASK = {"role": "user", "content": "What is the weather in Turin?"}


def of_type(service: MemoryService, type: str) -> list[str]:
    return texts(service.list(ALICE, type=type).records)


class TestToolUse:
    def test_a_call_with_its_result_is_kept_with_the_schema_of_its_tool(self, service: MemoryService) -> None:
        messages = [TASK, call(1), result(1)]
        kept = service.remember(ALICE, messages, session="s", request="r", tools=[WEATHER, CLOCK])
        assert [(record.type, record.origin["message"]) for record in kept] == [("tool_schema", 0), ("trajectory", 0)]
        assert of_type(service, "trajectory") == [
            'Task: What is the weather in Turin?\n1. weather({"city": "Turin"}) -> 18 degrees'
        ]
        assert of_type(service, "tool_schema") == ['Tool weather: Tells the weather.\nParameters: {"city": "string"}']

    @pytest.mark.parametrize("arguments", ['{"city": "Turin"}', {"city": "Turin"}], ids=["sent", "read"])
    def test_arguments_are_json(self, service: MemoryService, arguments: Any) -> None:
        service.remember(ALICE, [TASK, call(1, arguments=arguments), result(1)])
        assert 'weather({"city": "Turin"}) -> 18' in of_type(service, "trajectory")[0]

    def test_a_trajectory_grows_while_the_agent_works(self, service: MemoryService, tmp_path: Path) -> None:
        messages = [TASK]
        for number in (1, 2, 3):
            messages += [call(number, arguments=f'{{"day": {number}}}'), result(number)]
            for _ in range(2):
                service.remember(ALICE, messages, tools=[WEATHER])
        (grown,) = service.list(ALICE, type="trajectory").records
        assert (grown.version, len(grown.text.splitlines())) == (3, 4)
        assert len(of_type(service, "tool_schema")) == 1
        service._store.close()
        assert maintenance.examine(tmp_path / "memory").problems == []

    def test_another_schema_of_the_same_name_is_a_new_version(self, service: MemoryService) -> None:
        for description in ("Tells the weather.", "Tells the weather of a day."):
            tool = {"type": "function", "function": {**WEATHER["function"], "description": description}}
            service.remember(ALICE, [TASK, call(1), result(1)], tools=[tool])
        (schema,) = service.list(ALICE, type="tool_schema").records
        assert schema.version == 2 and "of a day" in schema.text

    def test_a_users_words_are_no_schema(self, service: MemoryService) -> None:
        text = "Tool weather: is what I use.\nParameters: {}"
        service.add(ALICE, text)
        service.remember(ALICE, [TASK, call(1), result(1)], tools=[WEATHER])
        assert of_type(service, "fact") == [text] and len(of_type(service, "tool_schema")) == 1

    def test_it_is_found_by_search_and_stands_in_no_prompt(self, service: MemoryService) -> None:
        service.remember(ALICE, [TASK, call(1), result(1)], tools=[WEATHER])
        recalled = service.recall(ALICE, says("What is the weather in Turin?"))
        assert recalled.late == () == recalled.long_lived
        assert len(service.search(ALICE, "weather in Turin", type="trajectory")) == 1

    @pytest.mark.parametrize(
        "messages",
        [
            [TASK],
            [TASK, call(1)],
            [call(1), result(1), TASK],
            [call(1), result(1)],
            [TASK, {"role": "assistant", "tool_calls": [{"id": "c1"}, 5, None]}, result(1)],
            [TASK, {"role": "assistant", "tool_calls": None}, result(1)],
            [TASK, call(1), result(2)],
        ],
    )
    def test_without_a_result_there_is_no_trajectory(self, service: MemoryService, messages: list[Any]) -> None:
        service.remember(ALICE, messages, tools=[WEATHER])
        assert of_type(service, "trajectory") == []

    def test_long_results_are_cut(self, service: MemoryService) -> None:
        service.remember(ALICE, [TASK, call(1), result(1, "very\nlong " * 10_000)], tools=[])
        (text,) = of_type(service, "trajectory")
        assert len(text) < 400 and text.endswith("…") and len(text.splitlines()) == 2
