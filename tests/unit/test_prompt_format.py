"""What the served model's tokenizer and chat template say about prompts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memos_vllm.integration.prompt_format import prompt_format_of
from memos_vllm.memory.assembly import assemble

MODEL = Path(__file__).parents[1] / "assets" / "recall-model"
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
)
IGNORES = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}{% endfor %}"
BROKEN = "{{ raise_exception('no') }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_what_is_quoted_has_no_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    form = prompt_format_of(tokenizer, Namespace(chat_template=None))
    assert form.takes_system
    control = tokenizer.get_added_vocab()
    evil = "".join(control)

    def num_control(text: str) -> int:
        messages = assemble([{"role": "user", "content": "hi"}], [text], [text], [text], form)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        return sum(each in control.values() for each in ids)

    assert control
    assert num_control(evil) == num_control("tea")


@pytest.mark.parametrize(
    ("template", "takes"), [(REFUSES, False), (IGNORES, False), (BROKEN, True)], ids=["refuses", "ignores", "broken"]
)
def test_templates_without_a_system_message(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, takes: bool
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    assert prompt_format_of(tokenizer, Namespace(chat_template=str(path))).takes_system is takes
    tokenizer.chat_template = template
    assert prompt_format_of(tokenizer, Namespace()).takes_system is takes
