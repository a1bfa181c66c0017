"""Which embedder a server gets."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from memos_vllm.config import EmbedderConfig, load
from memos_vllm.errors import ConfigError
from memos_vllm.integration import embedding, endpoints
from memos_vllm.memory.embedders import ModelRows
from tests.conftest import RECALL_MODEL
from tests.memory.embedder_factories import write_model
from tests.memory.memory_factories import ALICE


def model(folder: Path | str) -> Any:
    return SimpleNamespace(model=str(folder), revision=None, served_model_name="tea")


def test_by_default_the_served_models_rows(tmp_path: Path) -> None:
    write_model(tmp_path, {"tea": [1.0, 2.0]})
    assert isinstance(embedding.build(EmbedderConfig(), model(tmp_path)), ModelRows)


@pytest.mark.parametrize(
    ("folder", "load_format", "words"),
    [
        (RECALL_MODEL, "auto", "tokens, too few"),
        ("no/such-model", "auto", "not on this machine"),
        (None, "dummy", "random"),
    ],
)
def test_without_usable_rows_words_alone_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: Path | None, load_format: str, words: str
) -> None:
    folder = folder or write_model(tmp_path, {"tea": [1.0, 2.0]})
    with caplog.at_level(logging.INFO):
        assert embedding.build(EmbedderConfig(), model(folder), load_format) is None
    assert words in caplog.text
    with pytest.raises(ConfigError, match=words):
        embedding.build(EmbedderConfig(kind="model_rows"), model(folder), load_format)


def test_none_is_none(tmp_path: Path) -> None:
    write_model(tmp_path, {"tea": [1.0, 2.0]})
    assert embedding.build(EmbedderConfig(kind="none"), model(tmp_path)) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{kind: word2vec}", "'memory.embedder.kind'"),
        ("{kind: endpoint, model: m}", "endpoint needs 'url'"),
        ("{kind: endpoint, url: 'http://x/v1'}", "endpoint needs 'model'"),
        ("{kind: sentence_transformers}", "sentence_transformers needs 'model'"),
        ("{kind: endpoint, model: m, url: 'x/v1'}", "'memory.embedder.url'"),
    ],
)
def test_a_section_that_cannot_be_is_refused(tmp_path: Path, values: str, words: str) -> None:
    path = tmp_path / "memos.yaml"
    path.write_text(f"memory:\n  embedder: {values}\n")
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_server_searches_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the configuration to the service, with an engine that is not there."""
    write_model(tmp_path, {"tea": [1.0, 0.0], "oolong": [0.9, 0.1], "cat": [-1.0, 0.5], "car": [-1.0, -0.5]})
    config = tmp_path / "memos.yaml"
    config.write_text(f"data_dir: {tmp_path / 'data'}\nmemory:\n  embedder: {{kind: model_rows}}\n")
    monkeypatch.setattr(endpoints.activation, "is_active", lambda: True)
    monkeypatch.setattr(endpoints.activation, "config_path", lambda: str(config))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    served = model(tmp_path)
    served.max_model_len = 8192
    engine = SimpleNamespace(
        model_config=served,
        vllm_config=SimpleNamespace(
            load_config=SimpleNamespace(load_format="auto"),
            lora_config=None,
            model_config=model(tmp_path),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            scheduler_config=SimpleNamespace(policy="fcfs"),
        ),
        renderer=SimpleNamespace(get_tokenizer=lambda: tokenizer),
    )
    state = SimpleNamespace()
    asyncio.run(endpoints.MemosEndpoints().init_state(engine, state, None))  # type: ignore[arg-type]
    service = state.memos.service
    for text in ("oolong", "cat", "car", "car car"):
        service.add(ALICE, text)
    (hit,) = service.search(ALICE, "tea")
    assert (hit.record.text, list(hit.why["retrievers"])) == ("oolong", ["dense"])
    service._store.close()
