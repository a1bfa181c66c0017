import os

import pytest

from memos_vllm.store import identity as module
from memos_vllm.store.identity import chunk_id, fingerprint_adapter, fingerprint_dir
from tests.store.store_factories import IDENTITY_FIELDS, make_identity, make_keys, other_identity


@pytest.mark.parametrize("field", IDENTITY_FIELDS)
def test_every_field_counts(field):
    mine, other = make_identity(), other_identity(field)
    assert mine.digest() != other.digest()
    assert mine.block_key(b"h") != other.block_key(b"h")
    assert mine.differences(other.as_metadata()) == [field]
    assert mine.differences({k: v for k, v in mine.as_metadata().items() if k != field}) == [field]


def test_equal_identities_agree():
    assert make_identity().digest() == make_identity().digest() and len(make_identity().digest()) == 32
    assert make_identity().differences(make_identity().as_metadata()) == []


def test_keys_depend_on_block_and_adapter_and_their_border():
    identity = make_identity()
    keys = {identity.block_key(*parts) for parts in [(b"ab",), (b"abc",), (b"ab", b"c"), (b"a", b"bc"), (b"", b"abc")]}
    assert len(keys) == 5 and all(len(key) == 32 for key in keys)


def test_chunk_id_depends_on_content_and_order():
    assert chunk_id(make_keys(1, 2)) == chunk_id(make_keys(1, 2)) != chunk_id(make_keys(2, 1))


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(os.urandom(6 * 2**20))
    return tmp_path


def overwrite(file, offset, data):
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_fingerprint_sees_names_sizes_configuration_and_weights(model_dir):
    seen = {fingerprint_dir(model_dir)}
    weights = model_dir / "model.safetensors"
    for change in (
        lambda: (model_dir / "README.md").write_text("no change"),
        lambda: (model_dir / "config.json").write_text("[]"),
        lambda: (model_dir / "tokenizer.json").rename(model_dir / "vocab.json"),
        lambda: overwrite(weights, 0, b"header"),
        lambda: overwrite(weights, weights.stat().st_size - 6, b"ending"),
        lambda: overwrite(weights, 3 * 2**20, os.urandom(2**17)),
        lambda: os.truncate(weights, 5 * 2**20),
    ):
        change()
        seen.add(fingerprint_dir(model_dir))
    assert len(seen) == 7  # all but the README


def test_fingerprint_reads_a_bounded_part_of_large_files(model_dir, monkeypatch):
    os.truncate(model_dir / "model.safetensors", 2**36)  # sparse: 64 GiB
    fingerprint_dir(model_dir)


@pytest.mark.parametrize("function", [fingerprint_dir, fingerprint_adapter])
def test_nothing_to_fingerprint_is_an_error(function, tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError):
            function(path)


def test_adapter_digest_covers_all_content_and_is_cached(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(2**20))
    first = fingerprint_adapter(tmp_path)
    overwrite(weights, 12345, b"x")
    os.utime(weights, ns=(1, 1))
    second = fingerprint_adapter(tmp_path)
    assert first != second and len(first) == 32
    monkeypatch.setattr(module, "sha256", None)  # a second reading would fail
    assert fingerprint_adapter(tmp_path) == second
