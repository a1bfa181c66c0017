"""Configuration: every shipped file loads; anything else stops the start with one clear sentence."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

import pytest

from memos_vllm.api_keys import digest_of
from memos_vllm.config import MAX_SECONDS, MemosConfig, load, parse_bytes
from memos_vllm.errors import ConfigError
from tests.conftest import CONFIGS
from tests.memory.memory_factories import ALICE, make_service, says, texts

SHIPPED = pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
PLACEHOLDER = re.compile("DIGEST-OF-[A-Z-]+")


@SHIPPED
def test_shipped_configuration_loads(path: Path, tmp_path: Path) -> None:
    """Once the operator has filled in what is his."""
    text, filled = PLACEHOLDER.subn(lambda _: secrets.token_hex(32), path.read_text())
    (tmp_path / path.name).write_text(text)
    assert len(load(tmp_path / path.name).identity.keys) == filled


@pytest.mark.parametrize("name", ["application.yaml", "gateway.yaml"])
def test_an_example_that_is_not_filled_in_does_not_start(name: str) -> None:
    with pytest.raises(ConfigError, match=r"DIGEST-OF-THE-.*64 hex digits.*sha256sum") as caught:
        load(CONFIGS / name)
    assert str(caught.value).count("64 hex digits") == len(PLACEHOLDER.findall((CONFIGS / name).read_text()))


def keys_of(tmp_path: Path, *listed: str) -> list[str]:
    path = tmp_path / "memos.yaml"
    path.write_text("identity:\n  keys:\n" + "".join(f"    {key}: {{tenant: shop}}\n" for key in listed))
    return list(load(path).identity.keys)


def test_a_digest_may_be_written_in_capitals(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"a key").hexdigest()
    for listed in (f"sha256:{digest}", f"sha256:{digest.upper()}", f"SHA256:{digest.upper()}"):
        assert keys_of(tmp_path, listed) == [f"sha256:{digest}"] == [digest_of("a key")]


@pytest.mark.parametrize("digest", ["", "ab" * 31, "ab" * 33, "zz" * 32, "-"])
def test_a_digest_that_no_key_has_is_refused(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ConfigError, match="64 hex digits"):
        keys_of(tmp_path, f'"sha256:{digest}"')


@pytest.mark.parametrize(("key", "words"), [("foo", "'foo', which anybody guesses"), ("EMPTY", "guesses"),
                                            ("password\n", "guesses"), ("", "no text at all")])  # fmt: skip
def test_the_digest_of_a_key_that_anybody_guesses_is_refused(tmp_path: Path, key: str, words: str) -> None:
    for listed in (digest_of(key), digest_of(key).upper()):
        with pytest.raises(ConfigError, match=f"{words}.*sha256sum"):
            keys_of(tmp_path, listed)


def test_one_key_is_listed_once_and_keys_are_not_told(tmp_path: Path) -> None:
    for again in (digest_of("hush-hush"), digest_of("hush-hush").upper()):
        with pytest.raises(ConfigError, match="lists one key twice") as caught:
            keys_of(tmp_path, "hush-hush", again)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(("value", "expected"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("true", "on"),
                                                 ("no", "off")])  # fmt: skip
def test_on_and_off_need_no_quotes(tmp_path: Path, value: str, expected: str) -> None:
    path = tmp_path / "memos.yaml"
    path.write_text(f"memory:\n  default: {value}\nadapters:\n  distill: {value}\n")
    assert (load(path).memory.default, load(path).adapters.distill) == (expected, expected)


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
        ("kv:\n  layer_groups: 0", ["'kv.layer_groups'", "1"]),
        ("kv:\n  store_dtype: fp8\n  layer_groups: 2", ["'kv'", "loaded whole", "leave out 'layer_groups'"]),
        ("identity:\n  keys:\n    sk-lhush: {user: alice}", ["'identity.keys.sk-l….tenant'", "required"]),
        ("identity:\n  keys:\n    hush: {user: alice}", ["'identity.keys.hu….tenant'", "required"]),
        ("identity:\n  keys:\n    sk-lhush: alice", ["'identity.keys.sk-l…' is a section"]),
        ("identity:\n  keys:\n    sk-lhush: {tenant: a, usr: b}", ["unknown key 'identity.keys.sk-l….usr'"]),
        ("identity:\n  keys: sk-lhush", ["'identity.keys'", "dictionary"]),
        ("identity:\n  keys: [sk-lhush]", ["'identity.keys'", "dictionary"]),
        ("identity:\n  sk-lhush: {tenant: shop}", ["unknown key 'identity.sk-l…'"]),
        ("identity:\n  unlisted_key: refuse", ["unknown key 'identity.unlisted_key'"]),
        ("identity:\n  keys:\n    sha256:sk-lhush: {tenant: a}", ["'identity.keys.sha256:sk-l…'", "no digest"]),
        (f"identity:\n  keys:\n    sha256:{'ab' * 32}: {{}}", ["'identity.keys.sha256:abababab….tenant'", "required"]),
        ("kv:\n  host_byte: 1GiB", ["unknown key 'kv.host_byte'", "host_bytes"]),
        ("memory:\n  embedder: {knd: auto}", ["unknown key 'memory.embedder.knd'", "there are kind, model"]),
        ("kv:\n#  save: all", ["'kv' is a section", "leave it out"]),
        ("prediction: off", ["'prediction' is a section with keys of its own, not False"]),
        ("memory:\n  top_k: 5\nkv:\n  save: none\nmemory:\n  default: on", ["at line 5", "twice"]),
        ("identity:\n  keys:\n    hush: {tenant: a}\n    hush: {tenant: b}", ["at line 4", "twice"]),
        ("data_dir: ''", ["'data_dir'", "must be a path"]),
        ("data_dir:", ["'data_dir'", "must be a path"]),
        ("memory:\n  session_ttl_s: .inf", ["'memory.session_ttl_s'", "finite"]),
        ("memory:\n  archive_after_s: 1.0e+30", ["'memory.archive_after_s'", "less than or equal to"]),
        ("identity:\n  trusted_user_header: ''", ["'identity.trusted_user_header'", "X-Authenticated-User"]),
        ("identity:\n  trusted_user_header: X User", ["'identity.trusted_user_header'", "X-Authenticated-User"]),
        ("identity:\n  trusted_user_header: AUTHORIZATION", ["'identity.trusted_user_header'", "API key"]),
        ("identity:\n  keys:\n    '': {tenant: shop}", ["'identity.keys.'", "is no key"]),
        ("identity:\n  keys:\n    123: {tenant: shop}", ["'identity.keys.1…'", "write it in quotes"]),
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
    assert "hush" not in message


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


def test_the_longest_times_of_a_configuration_are_none_too_long(tmp_path: Path) -> None:
    longest = {"session_ttl_s": MAX_SECONDS, "archive_after_s": MAX_SECONDS, "remove_expired_after_s": MAX_SECONDS}
    service = make_service(tmp_path, **longest)
    service.add(ALICE, "a note", type="working", session="s", priority=3)
    service.remember(ALICE, says("I like tea."), session="s")
    assert texts(service.recall(ALICE, says("tea"), session="s").long_lived) == ["I like tea."]


def test_what_is_printed_of_a_configuration_has_no_api_key(tmp_path: Path) -> None:
    path = tmp_path / "memos.yaml"
    path.write_text("identity:\n  keys:\n    sk-live-0123: {tenant: shop}")
    config = load(path)
    assert list(config.identity.keys) == ["sk-live-0123"]
    assert "sk-live" not in repr(config) + str(config.identity)
