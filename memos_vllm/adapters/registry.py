"""The registry: adapters are registered, used and deleted here, their files and their index together.

    root/index/     see ``adapters.index``
    root/base.json  see ``adapters.served_model``
    root/...        see ``adapters.files``

A registration is visible once its LMDB transaction is synced, after its files are; what a crash leaves of
an unfinished one is removed at the next start. Whoever serves an adapter holds its files (``use``), so they
go only when nobody does.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lmdb

from memos_vllm.adapters import peft_folder, records, served_model
from memos_vllm.adapters.files import AdapterFiles
from memos_vllm.adapters.index import Index
from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.adapters.records import Adapter, Scope, Version
from memos_vllm.config import AdaptersConfig
from memos_vllm.errors import AdapterError, AdapterUnavailable, DataDirError, Forbidden, NotFound
from memos_vllm.types import Principal

RELEASE_TIMEOUT_S = 30.0
"""How long a deletion waits for requests that still use the adapter."""


@dataclass(frozen=True, slots=True)
class InUse:
    """An adapter while a request uses it."""

    adapter: Adapter
    version: Version
    folder: Path

    @property
    def reference(self) -> str:
        return f"{self.adapter.name}@{self.version.version}"


@dataclass(frozen=True, slots=True)
class Removed:
    """What a deletion took away."""

    references: tuple[str, ...]
    """``name@version`` of each."""

    versions: tuple[Version, ...]
    """The same: KV that was computed with them is to go."""

    contents: tuple[Version, ...]
    """Those whose content nobody has any more: files, and what vLLM has loaded, are to go."""

    profiles: int
    """Users who had it as their default."""

    def as_json(self) -> dict[str, Any]:
        """For a receipt."""
        return {"adapters": list(self.references), "profiles": self.profiles}


class AdapterRegistry:
    """
    Args:
        root: created if it is missing.
        base: what adapters must fit; None where the server runs without LoRA, and none can be added.
        fingerprint: of the served model; an adapter for another one is never served.

    Raises:
        DataDirError: the root cannot be used.
    """

    def __init__(self, root: Path, config: AdaptersConfig, base: BaseModel | None, fingerprint: str) -> None:
        self.root = root
        self._config = config
        self._base = base
        self._fingerprint = fingerprint
        try:
            self.files = AdapterFiles(root)
            self._index = Index(root / "index")
        except (lmdb.Error, OSError) as error:
            raise DataDirError(f"cannot use the adapters in {root}: {error}; check data_dir") from error
        with self.files.locked():
            with self._index.read() as txn:
                self.files.sweep({version.digest for version in self._index.names.versions(txn)})
            self._index.write(lambda txn: self._index.provenance.restore(txn, self._index.names.all(txn)))
            if base is not None:
                served_model.write(root, base, fingerprint)

    @classmethod
    def beside_server(cls, root: Path, config: AdaptersConfig) -> AdapterRegistry:
        """The registry of a server that runs, or ran, with LoRA, from another process.

        Raises:
            DataDirError: none did.
        """
        base, fingerprint = served_model.read(root)
        return cls(root, config, base, fingerprint)

    @property
    def base_path(self) -> str:
        """Where the served model's weights are."""
        assert self._base is not None
        return self._base.path

    def close(self) -> None:
        self._index.close()

    # -- adding ---------------------------------------------------------------------------------

    def register(
        self,
        who: Principal,
        name: str,
        folder: Path,
        scope: Scope = Scope.USER,
        origin: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """Checks a PEFT folder and keeps its content as the newest version of a name.

        Raises:
            AdapterError: see ``peft_folder.check``; or there is no room.
            Forbidden: the name in this scope is somebody else's, or the scope is not allowed.
        """
        records.check_name(name)
        if self._base is None:
            raise AdapterError("this server runs without LoRA; the operator starts it with --enable-lora", status=409)
        if scope is Scope.ALL and who.tenant not in self._config.may_share_with_all:
            raise Forbidden(
                "only tenants that the operator lists under adapters.may_share_with_all share with everybody"
            )
        with self._index.read() as txn:
            self._index.names.to_extend(txn, scope, who, name)
        checked = peft_folder.check(folder, self._base, self._config.max_bytes)
        with self.files.locked():
            if self.files.size_bytes() + checked.size_bytes > self._config.disk_bytes:
                raise AdapterError(
                    "there is no room for another adapter; delete some, or raise adapters.disk_bytes", status=507
                )
            digest, is_new = self.files.add(checked)
            try:
                return self._record(who, name, scope, bytes.fromhex(digest), checked, origin or {})
            except BaseException:
                if is_new:
                    self.files.remove(digest)
                raise

    def _record(
        self, who: Principal, name: str, scope: Scope, digest: bytes, checked: Any, origin: Mapping[str, Any]
    ) -> Adapter:
        def work(txn: lmdb.Transaction) -> Adapter:
            adapter = self._index.names.to_extend(txn, scope, who, name)
            version = Version(
                version=adapter.versions[-1].version + 1 if adapter else 1,
                digest=digest.hex(),
                lora_int_id=self._index.numbers.give(txn, digest),
                incarnation=secrets.token_hex(4),
                size_bytes=checked.size_bytes,
                rank=checked.rank,
                dtype=checked.dtype,
                base=self._fingerprint,
                created_at=datetime.now(UTC).isoformat(),
                origin=origin,
            )
            if adapter and adapter.version().digest == version.digest:
                return adapter  # sent twice
            adapter = adapter.with_version(version) if adapter else Adapter(name, scope, who, 1, (version,))
            self._index.names.put(txn, adapter)
            self._index.provenance.add(txn, adapter, version)
            return adapter

        return self._index.write(work)

    # -- looking --------------------------------------------------------------------------------

    def list(self, who: Principal) -> list[Adapter]:
        """What the user may use: his own, then the tenant's, then everybody's."""
        with self._index.read() as txn:
            return self._index.names.usable_by(txn, who)

    def find(self, who: Principal, reference: str) -> tuple[Adapter, Version]:
        """What a reference means for a user, see ``Names.find``.

        Raises:
            NotFound: the user may use no such adapter.
        """
        with self._index.read() as txn:
            return self._index.names.find(txn, who, reference)

    @contextmanager
    def use(self, who: Principal, reference: str) -> Iterator[InUse]:
        """Finds an adapter and keeps its files until the end of the block. Blocks while it is verified.

        Raises:
            NotFound: see ``find``.
            AdapterUnavailable: it is for another model, or its files are not what was registered.
        """
        adapter, version = self.find(who, reference)
        if version.base != self._fingerprint:
            raise AdapterUnavailable(f"adapter {reference!r} was made for another model than the one that is served")
        with self.files.holding(version.digest):
            # Again: a deletion may have been faster than the lock.
            adapter, version = self.find(who, f"{adapter.name}@{version.version}")
            self.files.verify(version.digest)
            yield InUse(adapter, version, self.files.folder(version.digest))

    @contextmanager
    def use_named(self, lora_name: str) -> Iterator[None]:
        """Keeps the files of a version that vLLM is about to load, by vLLM's name for it, until the end of the block.

        Raises:
            NotFound: there is no such version any more.
            AdapterUnavailable: its files are not what was registered.
        """
        with self._index.read() as txn:
            version = next((each for each in self._index.names.versions(txn) if each.lora_name == lora_name), None)
        if version is None:
            raise NotFound("the adapter was deleted meanwhile")
        with self.files.holding(version.digest):
            with self._index.read() as txn:  # again: a deletion may have been faster than the lock
                if all(each.lora_name != lora_name for each in self._index.names.versions(txn)):
                    raise NotFound("the adapter was deleted meanwhile")
            self.files.verify(version.digest)
            yield

    def standing_for(self, who: Principal, memories: Collection[tuple[str, int]]) -> str | None:
        """The user's distilled adapter that knows most of these memories, by reference; None: none knows any.

        Args:
            memories: id and version of each.
        """
        best, most = None, 0
        for adapter in self.list(who):
            known = adapter.version().memories_of(who) & set(memories) if adapter.owner == who else ()
            if len(known) > most:
                best, most = adapter.name, len(known)
        return best

    def stamp(self) -> int:
        """Changes whenever any process has written the index."""
        return self._index.stamp()

    # -- changing -------------------------------------------------------------------------------

    def select(self, who: Principal, name: str, number: int) -> Adapter:
        """Makes a version current again.

        Raises:
            NotFound: the user owns no such name, or there is no such version.
        """

        def work(txn: lmdb.Transaction) -> Adapter:
            adapter = self._index.names.owned(txn, who, name)
            adapter = replace(adapter, current=adapter.version(number).version)
            self._index.names.put(txn, adapter)
            return adapter

        return self._index.write(work)

    def delete(self, who: Principal, reference: str) -> Removed:
        """Removes a name with all versions, or one version. Nothing of it is found any more on return;
        ``remove_files`` follows, once the engine has let go of the content.

        Raises:
            NotFound: the user owns no such name or version.
        """
        name, number = records.parse_reference(reference)

        def work(txn: lmdb.Transaction) -> Removed:
            adapter = self._index.names.owned(txn, who, name)
            numbers = {adapter.version(number).version} if number else {each.version for each in adapter.versions}
            return self._remove(txn, [(adapter, numbers)])

        return self._index.write(work)

    def delete_all(self, who: Principal) -> Removed:
        """Removes every adapter that the user owns, shared ones too, and his default; see ``delete``."""

        def work(txn: lmdb.Transaction) -> Removed:
            had_default = self._index.profiles.get(txn, who) is not None
            self._index.profiles.set(txn, who, None)
            owned = [each for each in self._index.names.usable_by(txn, who) if each.owner == who]
            removed = self._remove(txn, [(each, {version.version for version in each.versions}) for each in owned])
            return replace(removed, profiles=removed.profiles + had_default)

        return self._index.write(work)

    def sources(self, who: Principal) -> list[Mapping[str, Any]]:
        """What the adapters that were distilled from a user's memories were made from: id, version, fingerprint."""
        with self._index.read() as txn:
            return [source for each in self._index.provenance.of(txn, who) for source in each.memories]

    def distilled_users(self) -> set[Principal]:
        """Those of whose memories an adapter was distilled."""
        with self._index.read() as txn:
            return self._index.provenance.users(txn)

    def distilled_from(self, who: Principal, memory_id: str) -> list[str]:
        """The versions, by reference, that know a memory of the user."""
        with self._index.read() as txn:
            found = self._index.provenance.of(txn, who)
            return [each.reference for each in found if any(source["id"] == memory_id for source in each.memories)]

    def distillation_s(self) -> float | None:
        """How long the newest distillation took; None: there is none."""
        with self._index.read() as txn:
            return self._index.provenance.newest_took_s(txn)

    def withdraw(self, who: Principal, memory_ids: Collection[str]) -> Removed:
        """Removes the versions that were distilled from these memories of a user."""

        def work(txn: lmdb.Transaction) -> Removed:
            doomed: defaultdict[bytes, set[int]] = defaultdict(set)
            for each in self._index.provenance.of(txn, who):
                if any(source["id"] in memory_ids for source in each.memories):
                    doomed[each.adapter_key].add(each.version)
            adapters = ((self._index.names.at(txn, key), numbers) for key, numbers in doomed.items())
            return self._remove(txn, [(adapter, numbers) for adapter, numbers in adapters if adapter is not None])

        return self._index.write(work)

    def _remove(self, txn: lmdb.Transaction, doomed: list[tuple[Adapter, set[int]]]) -> Removed:
        if not doomed:
            return Removed((), (), (), 0)
        references: list[str] = []
        versions: list[Version] = []
        for adapter, numbers in doomed:
            left = adapter.without(numbers)
            if left is not None:
                self._index.names.put(txn, left)
            else:
                self._index.names.remove(txn, adapter)
            gone = [each for each in adapter.versions if each.version in numbers]
            self._index.provenance.remove(txn, adapter, gone)
            references += [f"{adapter.name}@{number}" for number in sorted(numbers)]
            versions += gone
        kept = {each.digest for each in self._index.names.versions(txn)}
        unique = {version.digest: version for version in versions if version.digest not in kept}
        profiles = self._index.profiles.drop_dangling(txn, self._index.names)
        return Removed(tuple(references), tuple(versions), tuple(unique.values()), profiles)

    def wait_until_free(self, version: Version, timeout_s: float = RELEASE_TIMEOUT_S) -> bool:
        """Blocks until no request of any process uses a content that no name has. False: one still does."""
        deadline = time.monotonic() + timeout_s
        while not self.files.is_free(version.digest):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def remove_files(self, version: Version) -> bool:
        """Removes a content that no name has and no request uses. False: that has changed; the next start
        removes what then still belongs to nobody."""
        with self.files.locked():
            with self._index.read() as txn:
                known = any(each.digest == version.digest for each in self._index.names.versions(txn))
            if known or not self.files.is_free(version.digest):
                return False
            self.files.remove(version.digest)
        return True

    # -- profiles -------------------------------------------------------------------------------

    def profile(self, who: Principal) -> str | None:
        """The user's default adapter, by reference."""
        with self._index.read() as txn:
            return self._index.profiles.get(txn, who)

    def set_profile(self, who: Principal, reference: str | None) -> None:
        """
        Raises:
            NotFound: the user may use no such adapter.
        """
        if reference is not None:
            self.find(who, reference)
        self._index.write(lambda txn: self._index.profiles.set(txn, who, reference))

    def stats(self) -> dict[str, int]:
        with self._index.read() as txn:
            contents = {each.digest: each.size_bytes for each in self._index.names.versions(txn)}
            names = self._index.names.count(txn)
        return {
            "names": names,
            "contents": len(contents),
            "disk_bytes": sum(contents.values()),
            "max_disk_bytes": self._config.disk_bytes,
        }
