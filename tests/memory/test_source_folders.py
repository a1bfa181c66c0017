"""Folders as sources: what stands in them is found, what does not is not, and nothing is read twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from memos_vllm.config import DocumentsConfig, FolderConfig, MemoryConfig
from memos_vllm.errors import StoreFull
from memos_vllm.memory.service import MemoryService
from memos_vllm.memory.sources import file_states, scan
from memos_vllm.memory.sources.folder import FolderSource
from memos_vllm.memory.sources.opening import NEVER
from memos_vllm.memory.sources.refreshing import Refresher
from memos_vllm.memory.store import MemoryStore
from memos_vllm.types import Principal
from tests.memory.document_factories import make_pdf, markdown
from tests.memory.memory_factories import ALICE, BOB, GIB, count_words


class Folder:
    """A source over ``root``; ``read`` has the names of the files that were opened."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        self.root = path / "root"
        self.root.mkdir()
        self._store_path = path / "store"
        self.read: list[str] = []
        self.is_later = True
        """Whether files were written long ago."""

        self.config: dict[str, Any] = {"users": "all"}
        self.documents = DocumentsConfig(max_bytes=100_000)
        read = scan.read

        def noted(root: Path, found: scan.Found, max_bytes: int) -> bytes:
            self.read.append(found.name)
            return read(root, found, max_bytes)

        monkeypatch.setattr(scan, "read", noted)
        self.open()

    def open(self) -> None:
        """As after a restart."""
        self.store = MemoryStore(self._store_path, GIB, NEVER)
        self.service = MemoryService(
            self.store, MemoryConfig(documents=self.documents), count_words, keeps_editions=False
        )
        folder = FolderConfig(name="books", path=self.root, **self.config)
        states = self._store_path / "books.json"
        self.source = FolderSource(folder, 1.0, self.service, states, self.documents, lambda: self.is_later << 62)

    def reopen(self) -> None:
        self.store.close()
        self.read.clear()
        self.open()

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def refresh(self) -> list[str]:
        """What was opened for it."""
        self.read.clear()
        self.source.refresh()
        return sorted(self.read)

    def found(self, query: str) -> list[str]:
        return [passage.cited for passage in self.source.search(query, 10)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    made = Folder(tmp_path, monkeypatch)
    yield made
    made.store.close()


def test_every_format_is_found_and_cited(folder: Folder) -> None:
    folder.write("a/guide.md", markdown("train"))
    folder.write("notes.txt", "Some notes on herons.")
    folder.write("page.html", "<h1>Birds</h1><p>An owl sleeps.</p>")
    folder.write("prices.pdf", make_pdf([["x."], ["Rooms cost 120 euros."]], [("Prices", 1)]))
    folder.write("picture.png", b"train heron owl euros")
    folder.refresh()
    assert [folder.found(query)[0] for query in ("train", "herons", "owl", "euros")] == [
        "a/guide.md", "notes.txt", "page.html", "prices.pdf",
    ]  # fmt: skip
    (passage, *_) = folder.source.search("euros", 1)
    assert (passage.source, passage.section, passage.page) == ("books", ("Prices",), 2)
    assert passage.quoted == "[books: prices.pdf, page 2] Prices\nRooms cost 120 euros."
    assert folder.source.status()["files"] == 4


def test_only_what_has_changed_is_read(folder: Folder) -> None:
    guide, notes = folder.write("guide.md", markdown("train", "ferry")), folder.write("notes.txt", "heron")
    assert folder.refresh() == ["guide.md", "notes.txt"]
    assert folder.refresh() == []
    guide.write_bytes(markdown("train", "plane"))
    assert folder.refresh() == ["guide.md"]
    assert folder.found("plane") and not folder.found("ferry")
    os.utime(notes)
    before = folder.service.memory_version(Principal("folder", "books"))
    assert folder.refresh() == ["notes.txt"]
    assert folder.service.memory_version(Principal("folder", "books")) == before, "the same bytes are not cut again"
    notes.unlink()
    assert folder.refresh() == [] and folder.found("heron") == []


def test_what_a_file_said_before_is_not_kept(folder: Folder) -> None:
    folder.write("guide.md", markdown("train", "ferry"))
    folder.refresh()
    folder.write("guide.md", markdown("boat"))
    folder.refresh()
    everything = folder.service.list(Principal("folder", "books"), include_superseded=True).records
    assert [record.text.split()[2] for record in everything] == ["boat"]
    assert folder.service.users_with_past_kv() == []


def test_a_file_that_may_still_change_is_read_again(folder: Folder) -> None:
    folder.is_later = False
    folder.write("notes.txt", "heron")
    folder.refresh()
    assert folder.refresh() == ["notes.txt"]


def test_a_restart_reads_nothing(folder: Folder) -> None:
    folder.write("guide.md", markdown("train"))
    folder.write("torn.pdf", b"torn")
    folder.refresh()
    folder.reopen()
    assert folder.found("train") == ["guide.md"], "before the first look"
    assert folder.refresh() == [] and "torn.pdf" in folder.source.status()["problems"]
    assert folder.source.status()["left_out"] == 1


def test_after_a_lost_or_foreign_state_all_is_read(folder: Folder) -> None:
    folder.write("guide.md", markdown("train"))
    gone = folder.write("gone.txt", "heron")
    folder.refresh()
    folder.source._state_path.write_text("{")
    gone.unlink()
    folder.reopen()
    assert folder.refresh() == ["guide.md"] and not folder.found("heron")
    folder.documents = DocumentsConfig(max_bytes=100_000, piece_words=30)
    folder.reopen()
    assert folder.refresh() == ["guide.md"]


def test_a_bad_file_takes_nothing_from_the_others(folder: Folder) -> None:
    folder.write("torn.pdf", b"torn")
    folder.write("large.txt", "x" * 100_001)
    folder.write("a" * 200 + "/" + "b" * 100 + ".txt", "long")
    guide = folder.write("guide.md", markdown("train"))
    folder.refresh()
    problems = folder.source.status()["problems"]
    assert "damaged" in problems["torn.pdf"] and "max_bytes" in problems["large.txt"] and len(problems) == 3
    assert folder.found("train") == ["guide.md"] and folder.refresh() == []
    guide.write_bytes(b"\xff\xff")
    folder.refresh()
    assert folder.found("train") == [], "what can no longer be read is no longer said"


def test_links_do_not_lead_outside(folder: Folder, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder.root / "file.txt").symlink_to(outside / "secret.txt")
    (folder.root / "deep").symlink_to(outside)
    (folder.root / "circle.txt").symlink_to(folder.root / "circle.txt")
    folder.write(".hidden/heron.txt", "heron")
    (folder.root / "heron.txt").symlink_to(folder.root / ".hidden" / "heron.txt")
    folder.refresh()
    assert folder.read == ["heron.txt"]
    assert folder.found("secret") == [] and folder.found("heron") == ["heron.txt"]


def test_a_folder_that_becomes_a_link_is_not_followed(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "notes.txt").write_text("secret")
    folder.write("inner/notes.txt", "heron")
    (found,) = scan.files(folder.root)
    (folder.root / "inner").rename(tmp_path / "moved")
    (folder.root / "inner").symlink_to(tmp_path / "outside")
    with pytest.raises(PermissionError, match="outside"):
        scan.read(folder.root, found, 1000)


def test_a_folder_that_is_away_keeps_what_is_known(folder: Folder) -> None:
    folder.write("notes.txt", "heron")
    folder.refresh()
    folder.root.rename(folder.root.with_name("away"))
    folder.refresh()
    assert folder.found("heron") == ["notes.txt"] and "cannot be read" in folder.source.status()["problem"]


def test_files_beyond_the_limit_are_told(folder: Folder) -> None:
    folder.config["max_files"] = 2
    folder.reopen()
    for name in ("a.txt", "b.txt", "c.txt"):
        folder.write(name, name)
    assert folder.refresh() == ["a.txt", "b.txt"]
    assert "max_files" in folder.source.status()["problem"]


def test_a_full_store_is_tried_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("notes.txt", "heron")
    with monkeypatch.context() as patch:
        patch.setattr(folder.service.documents, "put", Mock(side_effect=StoreFull("full")))
        folder.refresh()
    assert folder.refresh() == ["notes.txt"] and folder.found("heron")


@pytest.mark.parametrize(
    ("users", "alice", "bob"),
    [
        ("all", True, True),
        ([{"tenant": "acme", "user": "alice"}], True, False),
        ([{"tenant": "acme"}], True, True),
        ([{"tenant": "other"}], False, False),
    ],
)
def test_whom_it_serves(folder: Folder, users: Any, alice: bool, bob: bool) -> None:
    folder.config["users"] = users
    folder.reopen()
    assert (folder.source.serves(ALICE), folder.source.serves(BOB)) == (alice, bob)


def test_one_process_refreshes_and_the_other_follows(folder: Folder, tmp_path: Path) -> None:
    folder.write("notes.txt", "heron")
    seconds = [0.0]
    first, second = (Refresher([folder.source], tmp_path / "lock", lambda: seconds[0]) for _ in range(2))
    assert first.round() == folder.source.refresh_s and folder.read == ["notes.txt"]
    folder.write("notes.txt", "otter")
    second.round()
    assert folder.read == ["notes.txt"] and folder.found("heron")
    first.round()
    assert folder.read == ["notes.txt"], "not due yet"
    seconds[0] += folder.source.refresh_s
    first.round()
    assert folder.read == ["notes.txt"] * 2 and folder.found("otter")


def test_states_survive_only_with_their_documents(tmp_path: Path) -> None:
    kept = file_states.FileState(1, 2, "d", True)
    file_states.save(tmp_path / "s.json", {"a": kept, "b": kept}, "1")
    assert file_states.load(tmp_path / "s.json", {"a"}, "1") == {"a": kept}
