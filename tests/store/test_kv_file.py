import json
import os
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from memos_vllm.errors import KVFileCorrupt, KVFileError, KVFileMismatch
from memos_vllm.store import kv_file
from memos_vllm.store.kv_file import ChunkReader, write_chunk_in_pieces
from tests.store.store_factories import (
    IDENTITY_FIELDS,
    make_identity,
    make_keys,
    other_identity,
    random_rows,
    read_blocks,
    write_chunk,
)

IDENTITY = make_identity()
KEYS = make_keys(*range(5))
ROW_BYTES = 1003


@pytest.fixture
def blocks():
    return random_rows(len(KEYS), ROW_BYTES)


@pytest.fixture
def path(tmp_path, blocks):
    path = tmp_path / "c.safetensors"
    write_chunk(path, blocks, KEYS, IDENTITY, rank=1)
    return path


def read(path, positions=range(5), keys=None, identity=IDENTITY, rank=1):
    out = torch.full((len(positions), ROW_BYTES), 0xA5, dtype=torch.uint8)
    read_blocks(path, list(positions), keys or [KEYS[p] for p in positions], out, identity, rank)
    return out


@pytest.mark.parametrize("positions", [[], [0], [4], range(5), [1, 2, 4], [4, 0, 1, 1]], ids=str)
def test_blocks_come_back_bit_for_bit(path, blocks, positions):
    assert torch.equal(read(path, positions), blocks[list(positions)])


def test_the_safetensors_library_reads_the_file(path, blocks):
    assert torch.equal(safetensors.torch.load_file(path)["blocks"], blocks)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert IDENTITY.differences(metadata) == [] and metadata["rank"] == "1"
    assert metadata["keys"].split() == [key.hex() for key in KEYS]


def test_rows_may_lie_apart_on_both_sides(tmp_path):
    memory = random_rows(9, ROW_BYTES + 5)[:, :ROW_BYTES]
    slots = [7, 0, 3, 4, 8]
    write_chunk(tmp_path / "c", [memory[slot] for slot in slots], KEYS, IDENTITY, 0)
    target = torch.zeros(9, ROW_BYTES, dtype=torch.uint8)
    read_blocks(tmp_path / "c", range(5), KEYS, [target[slot] for slot in slots], IDENTITY, 0)
    assert torch.equal(target[slots], memory[slots]) and not target[[1, 2, 5, 6]].any()


def test_more_blocks_than_one_system_call_takes(tmp_path):
    keys, blocks = make_keys(*range(2500)), random_rows(2500, 8)
    write_chunk(tmp_path / "c", blocks, keys, IDENTITY, 0)
    out = torch.zeros_like(blocks)
    read_blocks(tmp_path / "c", range(2500), keys, out, IDENTITY, 0)
    assert torch.equal(out, blocks)


def in_parts(row, sizes):
    """A row's memory in parts of these sizes, each elsewhere, and what is left of it as the last one."""
    sizes = [*sizes, ROW_BYTES - sum(sizes)]
    return [torch.full((size,), 0xA5, dtype=torch.uint8).numpy() for size in sizes]


@pytest.mark.parametrize("cached", [1, 64, 100, ROW_BYTES - 1, ROW_BYTES, 2 * ROW_BYTES + 1])
@pytest.mark.parametrize("sizes", [[], [500], [1, 0, 99, 100, 101, 300]], ids=str)
def test_blocks_of_many_parts_longer_or_shorter_than_the_cache(path, blocks, monkeypatch, cached, sizes):
    monkeypatch.setattr(kv_file, "CACHED_BYTES", cached)
    rows = [in_parts(row, sizes) for row in blocks]
    with ChunkReader(path, IDENTITY, 1) as reader:
        reader.read(range(5), KEYS, rows)
    assert [b"".join(part.tobytes() for part in row) for row in rows] == [row.numpy().tobytes() for row in blocks]


def test_a_long_block_of_more_parts_than_one_system_call_takes(path, blocks, monkeypatch):
    monkeypatch.setattr(kv_file, "CACHED_BYTES", ROW_BYTES - 1)
    monkeypatch.setattr(kv_file, "_MAX_BUFFERS", 7)
    preadv, buffers = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: (buffers.append(len(parts)), preadv(fd, parts, at))[1])
    rows = [in_parts(row, [10] * 20) for row in blocks]
    with ChunkReader(path, IDENTITY, 1) as reader:
        reader.read(range(5), KEYS, rows)
    assert max(buffers) == 7
    assert [b"".join(part.tobytes() for part in row) for row in rows] == [row.numpy().tobytes() for row in blocks]


@pytest.mark.parametrize("offset", [0, 99, 100, ROW_BYTES - 1])
def test_a_bit_flip_in_any_part_of_a_long_block_is_found(path, monkeypatch, offset):
    monkeypatch.setattr(kv_file, "CACHED_BYTES", 100)
    data = bytearray(path.read_bytes())
    data[len(data) - 2 * ROW_BYTES + offset] ^= 16
    path.write_bytes(data)
    with pytest.raises(KVFileCorrupt, match=f"block {KEYS[3].hex()} at position 3"):
        read(path)
    read(path, [0, 1, 2, 4])


def test_short_reads_and_writes_are_continued(tmp_path, blocks, monkeypatch):
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [buffers[0][:700]]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:300]], offset))
    write_chunk(tmp_path / "c", blocks, KEYS, IDENTITY, 1)
    assert torch.equal(read(tmp_path / "c"), blocks)


@pytest.mark.parametrize("field", IDENTITY_FIELDS)
def test_another_identity_is_a_mismatch_that_names_the_field(path, field):
    with pytest.raises(KVFileMismatch, match=rf"another {field}$"):
        read(path, identity=other_identity(field))


def test_another_rank_is_a_mismatch(path):
    with pytest.raises(KVFileMismatch, match="another rank"):
        read(path, rank=0)


@pytest.mark.parametrize("position", [0, 3, 5, -1])
def test_another_key_or_position_is_a_mismatch(path, position):
    with pytest.raises(KVFileMismatch, match="does not hold block"):
        read(path, [position], make_keys(4 if position == -1 else 2))


def test_another_block_size_is_a_mismatch(path):
    with pytest.raises(KVFileMismatch, match="bytes"):
        read_blocks(path, [0], KEYS[:1], torch.zeros(1, ROW_BYTES - 1, dtype=torch.uint8), IDENTITY, 1)


def test_truncation_anywhere_is_corrupt(path):
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    row_ends = [header_end + i * ROW_BYTES for i in range(5)]
    for size in [0, 1, 7, 8, 9, header_end // 2, header_end - 1, *row_ends, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(KVFileCorrupt):
            read(path)
    path.write_bytes(data + b"x")
    with pytest.raises(KVFileCorrupt):
        read(path)


def test_a_bit_flip_in_the_data_names_the_block(path):
    data = bytearray(path.read_bytes())
    start = len(data) - len(KEYS) * ROW_BYTES
    for position in range(5):
        for offset in (0, ROW_BYTES // 2, ROW_BYTES - 1):
            flipped = bytearray(data)
            flipped[start + position * ROW_BYTES + offset] ^= 1 << (offset % 8)
            path.write_bytes(flipped)
            with pytest.raises(KVFileCorrupt, match=f"block {KEYS[position].hex()} at position {position}"):
                read(path)
            others = [p for p in range(5) if p != position]
            read(path, others)


@settings(max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_flip_in_the_header_never_gives_wrong_bytes(place, bit, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "c"
    blocks = random_rows(len(KEYS), 16)
    write_chunk(path, blocks, KEYS, IDENTITY, 1)
    data = bytearray(path.read_bytes())
    end = data.index(b"}}") + 2 if place < 0.95 else len(data) - blocks.numel()
    data[int(place * end)] ^= 1 << bit
    path.write_bytes(data)
    out = torch.zeros_like(blocks)
    try:
        read_blocks(path, range(5), KEYS, out, IDENTITY, 1)
    except KVFileError:
        return
    assert torch.equal(out, blocks)


@pytest.mark.parametrize(
    "shape", [[5, ROW_BYTES, 1], [5], ["5", ROW_BYTES], [5.0, ROW_BYTES], [4, ROW_BYTES], None], ids=str
)
def test_a_header_that_contradicts_itself_is_corrupt(path, shape):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["blocks"]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(KVFileCorrupt):
        read(path)


def test_a_huge_header_length_is_refused_without_reading_it(path):
    with open(path, "r+b") as file:
        file.write((2**25).to_bytes(8, "little"))
        file.truncate(2**26)  # sparse
    with pytest.raises(KVFileCorrupt, match="header of"):
        read(path)


def test_a_kill_between_write_and_rename_leaves_nothing_visible(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from tests.store.store_factories import *
from memos_vllm.store import kv_file
os.rename = lambda *_: os._exit(9)
write_chunk({str(tmp_path / "c.safetensors")!r}, random_rows(2, 64), make_keys(1, 2), make_identity(), 0)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".") and left.endswith(kv_file.TEMPORARY_SUFFIX)


def test_data_is_synced_before_the_rename_and_the_directory_after(tmp_path, blocks, monkeypatch):
    calls = []
    for name in ("fdatasync", "fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    write_chunk(tmp_path / "c", blocks, KEYS, IDENTITY, 0)
    assert calls == ["fdatasync", "fsync", "rename", "fsync"]


def test_a_write_that_is_given_up_leaves_nothing(tmp_path, blocks, monkeypatch):
    monkeypatch.setattr(kv_file, "PIECE_BYTES", 2 * ROW_BYTES)
    writing = write_chunk_in_pieces(tmp_path / "c", blocks, KEYS, IDENTITY, 0)
    assert next(writing) == 2 and len(os.listdir(tmp_path)) == 1
    writing.close()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_raises_and_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE stops a write in the middle as a full disk does; needs no mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError):
            write_chunk(tmp_path / "c", random_rows(5, 4000), KEYS, IDENTITY, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
