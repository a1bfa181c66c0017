"""Configuration: every shipped file loads; anything else stops the start with one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from memos_vllm.config import MemosConfig, load, parse_bytes
from memos_vllm.errors import ConfigError
from tests.conftest import CONFIGS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_loads(path: Path) -> None:
    assert isinstance(load(path), MemosConfig)


def test_default_yaml_states_the_defaults() -> None:
    assert load(CONFIGS / "default.yaml") == MemosConfig() == load(None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data_dri: /tmp/x", ["unknown key 'data_dri'"]),
        ("memory:\n  top_k: 0", ["'memory.top_k'", "greater than or equal to 1"]),
        ("memory:\n  default: maybe", ["'memory.default'", "'maybe'"]),
        ("kv:\n  host_bytes: many", ["'kv.host_bytes'", "write for example 4GiB"]),
        ("kv:\n  host_bytes: -1", ["'kv.host_bytes'", "negative"]),
        ("kv:\n  save: sometimes", ["'kv.save'"]),
        ("kv:\n  store_dtype: int4", ["'kv.store_dtype'", "'int4'"]),
        ("kv:\n  store_dtype: fp8\n  save: all", ["'kv'", "approximate", "save: memory"]),
        ("identity:\n  keys:\n    k: {user: alice}", ["'identity.keys.k.tenant'", "required"]),
        ("- a\n- b", ["must be a mapping", "list"]),
        ("a: [1, 2", ["not valid YAML", "line"]),
    ],
)
def test_bad_configuration_is_one_clear_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "memos.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.yaml"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load(tmp_path / "binary")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GiB", 4 * 2**30), ("500MB", 5 * 10**8), ("1.5 KiB", 1536), (7, 7), ("7", 7), ("1t", 10**12)],
)
def test_sizes(text: object, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
