"""What ``memos doctor`` finds in a KV directory, and that a repair leaves what is whole."""

import os

import pytest

from memos_vllm.store.disk_index import DiskIndex
from memos_vllm.store.examination import examine_kv
from memos_vllm.store.ops import path_for_rank
from tests.store.store_factories import make_identity, make_key, make_keys, random_rows, write_chunk

IDENTITY = make_identity()
ROW_BYTES = 64
RANKS = 2


@pytest.fixture
def chunks(tmp_path):
    """Paths of the files of two chunks, three blocks, in ``kv/dp0``."""
    index = open_index(tmp_path)
    paths = []
    for numbers in ((1, 2), (3,)):
        chunk = index.plan_write(make_keys(*numbers), len(numbers) * ROW_BYTES * RANKS, b"")
        paths.append([path_for_rank(chunk.path, rank) for rank in range(RANKS)])
        for rank, path in enumerate(paths[-1]):
            write_chunk(path, random_rows(len(numbers), ROW_BYTES), make_keys(*numbers), IDENTITY, rank)
        assert index.commit(chunk.chunk)
    index.close()
    return paths


def open_index(tmp_path):
    return DiskIndex(tmp_path / "kv" / "dp0", IDENTITY, 10**6, RANKS)


def other_blocks(path):
    write_chunk(path, random_rows(2, ROW_BYTES), make_keys(8, 9), IDENTITY, 0)


def test_a_sound_directory(tmp_path, chunks):
    report = examine_kv(tmp_path / "kv")
    assert (report.chunks, report.blocks, report.problems, report.notes) == (2, 3, [], [])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (os.unlink, "rank 0 is not there"),
        (lambda path: os.truncate(path, os.path.getsize(path) - 1), "truncated"),
        (other_blocks, "other blocks"),
    ],
)
def test_a_chunk_that_is_not_whole_is_taken_out(tmp_path, chunks, harm, words):
    harm(chunks[0][0])
    assert words in " ".join(examine_kv(tmp_path / "kv").problems)
    assert words in " ".join(examine_kv(tmp_path / "kv", repair=True).mended)
    assert examine_kv(tmp_path / "kv").problems == []
    assert [os.path.exists(path) for paths in chunks for path in paths] == [False, False, True, True]
    index = open_index(tmp_path)
    assert [index.lookup(make_key(number)) is not None for number in (1, 2, 3)] == [False, False, True]
    index.close()


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_damaged_index_is_built_again(tmp_path, chunks, keep):
    data = tmp_path / "kv" / "dp0" / "index" / "data.mdb"
    os.truncate(data, int(data.stat().st_size * keep))
    assert "the index is damaged" in examine_kv(tmp_path / "kv").problems[0]
    examine_kv(tmp_path / "kv", repair=True)
    assert examine_kv(tmp_path / "kv").problems == []
    index = open_index(tmp_path)
    assert len(index) == 3
    index.close()


def test_what_a_server_uses_is_left_alone(tmp_path, chunks):
    os.unlink(chunks[0][0])
    index = open_index(tmp_path)
    report = examine_kv(tmp_path / "kv", repair=True)
    assert report.chunks == 0 and "in use" in report.notes[0]
    index.close()


def test_temporary_files_stay_in_an_examination(tmp_path, chunks):
    temporary = os.path.join(os.path.dirname(chunks[0][0]), ".x.tmp")
    open(temporary, "w").close()
    examine_kv(tmp_path / "kv")
    assert os.path.exists(temporary)
