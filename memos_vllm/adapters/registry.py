"""The registry: which adapters there are, who may use them, and under which number vLLM knows them.

    root/index/     LMDB: names and versions, numbers ever given, profiles, what was distilled from whom
    root/base.json  the served model, for ``python -m memos_vllm.distill``
    root/...        see ``adapters.files``

A registration is visible once its LMDB transaction is synced, after its files are; what a crash leaves of
an unfinished one is removed at the next start. Whoever serves an adapter holds its files (``use``), so they
go only when nobody does.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lmdb

from memos_vllm.adapters import peft_folder, records
from memos_vllm.adapters.files import AdapterFiles
from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.adapters.provenance import Provenance
from memos_vllm.adapters.records import Adapter, Scope, Version
from memos_vllm.config import AdaptersConfig
from memos_vllm.errors import AdapterError, AdapterUnavailable, DataDirError, Forbidden, NotFound, StoreError
from memos_vllm.types import Principal

_MAP_BYTES = 2**30
_TABLES = ("adapters", "ids", "profiles")
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
            self._env = lmdb.open(str(root / "index"), map_size=_MAP_BYTES, max_dbs=len(_TABLES) + 1, mode=0o600)
            self._dbs = {name: self._env.open_db(name.encode()) for name in _TABLES}
            self._provenance = Provenance(self._env)
        except (lmdb.Error, OSError) as error:
            raise DataDirError(f"cannot use the adapters in {root}: {error}; check data_dir") from error
        with self.files.locked():
            with self._env.begin() as txn:
                self.files.sweep({version.digest for version in self._versions(txn)})
            self._write(lambda txn: self._provenance.restore(txn, self._adapters(txn)))
            if base is not None:
                _write_base(root / "base.json", base, fingerprint)

    @classmethod
    def beside_server(cls, root: Path, config: AdaptersConfig) -> AdapterRegistry:
        """The registry of a server that runs, or ran, with LoRA, from another process.

        Raises:
            DataDirError: none did.
        """
        try:
            values = json.loads((root / "base.json").read_text())
        except (OSError, ValueError) as error:
            raise DataDirError(
                f"{root} does not say which model is served; start the server once with --enable-lora"
            ) from error
        modules, targets = values["modules"], values["target_modules"]
        base = BaseModel(
            names=frozenset(values["names"]),
            modules=None if modules is None else {name: (out, into) for name, (out, into) in modules.items()},
            max_rank=values["max_rank"],
            target_modules=None if targets is None else frozenset(targets),
            path=values["path"],
        )
        return cls(root, config, base, values["fingerprint"])

    @property
    def base_path(self) -> str:
        """Where the served model's weights are."""
        assert self._base is not None
        return self._base.path

    def close(self) -> None:
        self._env.close()

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
        with self._env.begin() as txn:
            self._check_owner(self._read(txn, scope, who, name), who)
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
            adapter = self._read(txn, scope, who, name)
            self._check_owner(adapter, who)
            version = Version(
                version=adapter.versions[-1].version + 1 if adapter else 1,
                digest=digest.hex(),
                lora_int_id=self._id_of(txn, digest),
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
            self._put(txn, adapter)
            self._provenance.add(txn, adapter, version)
            return adapter

        return self._write(work)

    def _id_of(self, txn: lmdb.Transaction, digest: bytes) -> int:
        """The content's number for vLLM. A number is never given to a second content, so that a process
        that still has the first one loaded cannot serve it as the second."""
        number = records.first_id(digest)
        while (holder := txn.get(number.to_bytes(4, "big"), db=self._dbs["ids"])) not in (None, digest):
            number = records.next_id(number)
        if holder is None:
            txn.put(number.to_bytes(4, "big"), digest, db=self._dbs["ids"])
        return number

    # -- looking --------------------------------------------------------------------------------

    def list(self, who: Principal) -> list[Adapter]:
        """What the user may use: his own, then the tenant's, then everybody's."""
        found = []
        with self._env.begin() as txn:
            for scope in Scope:
                space = records.space_key(scope, who)
                cursor = txn.cursor(self._dbs["adapters"])
                if cursor.set_range(space):
                    for key, raw in cursor:
                        if not key.startswith(space):
                            break
                        found.append(records.decode(raw))
        return found

    def find(self, who: Principal, reference: str) -> tuple[Adapter, Version]:
        """What a reference means for a user; his own names go before shared ones.

        Raises:
            NotFound: the user may use no such adapter; whether somebody else has one does not show.
        """
        with self._env.begin() as txn:
            return self._find(txn, who, reference)

    def _find(self, txn: lmdb.Transaction, who: Principal, reference: str) -> tuple[Adapter, Version]:
        name, number = records.parse_reference(reference)
        for scope in Scope:
            if (adapter := self._read(txn, scope, who, name)) is not None:
                return adapter, adapter.version(number)
        raise NotFound(f"no adapter {name!r}")

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
        with self._env.begin() as txn:
            version = next((each for each in self._versions(txn) if each.lora_name == lora_name), None)
        if version is None:
            raise NotFound("the adapter was deleted meanwhile")
        with self.files.holding(version.digest):
            with self._env.begin() as txn:  # again: a deletion may have been faster than the lock
                if all(each.lora_name != lora_name for each in self._versions(txn)):
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
        return int(self._env.info()["last_txnid"])

    # -- changing -------------------------------------------------------------------------------

    def select(self, who: Principal, name: str, number: int) -> Adapter:
        """Makes a version current again.

        Raises:
            NotFound: the user owns no such name, or there is no such version.
        """

        def work(txn: lmdb.Transaction) -> Adapter:
            adapter = self._own(txn, who, name)
            adapter = replace(adapter, current=adapter.version(number).version)
            self._put(txn, adapter)
            return adapter

        return self._write(work)

    def delete(self, who: Principal, reference: str) -> Removed:
        """Removes a name with all versions, or one version. Nothing of it is found any more on return;
        ``remove_files`` follows, once the engine has let go of the content.

        Raises:
            NotFound: the user owns no such name or version.
        """
        name, number = records.parse_reference(reference)

        def work(txn: lmdb.Transaction) -> Removed:
            adapter = self._own(txn, who, name)
            numbers = {adapter.version(number).version} if number else {each.version for each in adapter.versions}
            return self._remove(txn, [(adapter, numbers)])

        return self._write(work)

    def sources(self, who: Principal) -> list[Mapping[str, Any]]:
        """What the adapters that were distilled from a user's memories were made from: id, version, fingerprint."""
        with self._env.begin() as txn:
            return [source for each in self._provenance.of(txn, who) for source in each.memories]

    def distilled_users(self) -> set[Principal]:
        """Those of whose memories an adapter was distilled."""
        with self._env.begin() as txn:
            return self._provenance.users(txn)

    def distilled_from(self, who: Principal, memory_id: str) -> list[str]:
        """The versions, by reference, that know a memory of the user."""
        with self._env.begin() as txn:
            found = self._provenance.of(txn, who)
            return [each.reference for each in found if any(source["id"] == memory_id for source in each.memories)]

    def distillation_s(self) -> float | None:
        """How long the newest distillation took; None: there is none."""
        with self._env.begin() as txn:
            return self._provenance.newest_took_s(txn)

    def withdraw(self, who: Principal, memory_ids: Collection[str]) -> Removed:
        """Removes the versions that were distilled from these memories of a user."""

        def work(txn: lmdb.Transaction) -> Removed:
            doomed: defaultdict[bytes, set[int]] = defaultdict(set)
            for each in self._provenance.of(txn, who):
                if any(source["id"] in memory_ids for source in each.memories):
                    doomed[each.adapter_key].add(each.version)
            table = self._dbs["adapters"]
            return self._remove(txn, [(records.decode(txn.get(key, db=table)), doomed[key]) for key in doomed])

        return self._write(work)

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
            with self._env.begin() as txn:
                known = any(each.digest == version.digest for each in self._versions(txn))
            if known or not self.files.is_free(version.digest):
                return False
            self.files.remove(version.digest)
        return True

    # -- profiles -------------------------------------------------------------------------------

    def profile(self, who: Principal) -> str | None:
        """The user's default adapter, by reference."""
        with self._env.begin() as txn:
            raw = txn.get(records.space_key(Scope.USER, who), db=self._dbs["profiles"])
        return None if raw is None else json.loads(raw)["adapter"]

    def set_profile(self, who: Principal, reference: str | None) -> None:
        """
        Raises:
            NotFound: the user may use no such adapter.
        """
        if reference is not None:
            self.find(who, reference)
        key = records.space_key(Scope.USER, who)

        def work(txn: lmdb.Transaction) -> None:
            if reference is None:
                txn.delete(key, db=self._dbs["profiles"])
            else:
                value = {"tenant": who.tenant, "user": who.user, "adapter": reference}
                txn.put(key, json.dumps(value).encode(), db=self._dbs["profiles"])

        self._write(work)

    def stats(self) -> dict[str, int]:
        with self._env.begin() as txn:
            contents = {each.digest: each.size_bytes for each in self._versions(txn)}
            names = txn.stat(self._dbs["adapters"])["entries"]
        return {
            "names": names,
            "contents": len(contents),
            "disk_bytes": sum(contents.values()),
            "max_disk_bytes": self._config.disk_bytes,
        }

    # -- LMDB -----------------------------------------------------------------------------------

    def _write(self, work: Callable[[lmdb.Transaction], Any]) -> Any:
        try:
            with self._env.begin(write=True) as txn:
                return work(txn)
        except lmdb.Error as error:
            raise StoreError(f"the index of adapters {self.root} was not written: {error}") from error

    def _read(self, txn: lmdb.Transaction, scope: Scope, who: Principal, name: str) -> Adapter | None:
        raw = txn.get(records.adapter_key(scope, who, name), db=self._dbs["adapters"])
        return None if raw is None else records.decode(raw)

    def _put(self, txn: lmdb.Transaction, adapter: Adapter) -> None:
        txn.put(records.key_of(adapter), records.encode(adapter), db=self._dbs["adapters"])

    def _own(self, txn: lmdb.Transaction, who: Principal, name: str) -> Adapter:
        for scope in Scope:
            adapter = self._read(txn, scope, who, name)
            if adapter is not None and adapter.owner == who:
                return adapter
        raise NotFound(f"you own no adapter {name!r}")

    def _adapters(self, txn: lmdb.Transaction) -> list[Adapter]:
        return [records.decode(raw) for _, raw in txn.cursor(self._dbs["adapters"])]

    def _versions(self, txn: lmdb.Transaction) -> Iterator[Version]:
        return (version for adapter in self._adapters(txn) for version in adapter.versions)

    def _remove(self, txn: lmdb.Transaction, doomed: list[tuple[Adapter, set[int]]]) -> Removed:
        if not doomed:
            return Removed((), (), (), 0)
        references: list[str] = []
        versions: list[Version] = []
        for adapter, numbers in doomed:
            left = adapter.without(numbers)
            if left is not None:
                self._put(txn, left)
            else:
                txn.delete(records.key_of(adapter), db=self._dbs["adapters"])
            gone = [each for each in adapter.versions if each.version in numbers]
            self._provenance.remove(txn, adapter, gone)
            references += [f"{adapter.name}@{number}" for number in sorted(numbers)]
            versions += gone
        kept = {each.digest for each in self._versions(txn)}
        unique = {version.digest: version for version in versions if version.digest not in kept}
        return Removed(tuple(references), tuple(versions), tuple(unique.values()), self._drop_profiles(txn))

    def _drop_profiles(self, txn: lmdb.Transaction) -> int:
        """Defaults that mean nothing any more."""
        table = self._dbs["profiles"]
        dangling = []
        for key, raw in txn.cursor(table):
            profile = json.loads(raw)
            try:
                self._find(txn, Principal(profile["tenant"], profile["user"]), profile["adapter"])
            except NotFound:
                dangling.append(key)
        for key in dangling:
            txn.delete(key, db=table)
        return len(dangling)

    def _check_owner(self, adapter: Adapter | None, who: Principal) -> None:
        if adapter is not None and adapter.owner != who:
            raise Forbidden(f"the shared name {adapter.name!r} belongs to somebody else; choose another one")


def _write_base(path: Path, base: BaseModel, fingerprint: str) -> None:
    values = {
        "fingerprint": fingerprint,
        "names": sorted(base.names),
        "modules": base.modules,
        "max_rank": base.max_rank,
        "target_modules": None if base.target_modules is None else sorted(base.target_modules),
        "path": base.path,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)
