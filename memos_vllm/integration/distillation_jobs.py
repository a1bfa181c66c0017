"""What distillations leave on disk: whose each is, its log, and its report, which quotes memories.

Forgotten means gone here, too: a report says no more than how it ended once a memory that it used is not as it
was, all of a user's go with all of his memories, and the rest goes by age.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memos_vllm import data_dir
from memos_vllm.types import Principal

KEPT_S = 30 * 86400.0
"""After its last change."""

_OUTCOME = ("published", "refused")


class DistillationJobs:
    """Of all API processes of a data directory. Holds nothing itself."""

    def __init__(self, root: Path) -> None:
        self.folder = data_dir.adapters_dir(root) / "distillations"

    def begin(self, who: Principal) -> str:
        """A new job's id."""
        job = uuid.uuid4().hex
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._owner(job).write_text(json.dumps([who.tenant, who.user]))
        self._running(job).touch()
        return job

    def end(self, job: str) -> None:
        self._running(job).unlink(missing_ok=True)

    def report_path(self, job: str) -> Path:
        return self.folder / f"{job}.json"

    def log_path(self, job: str) -> Path:
        return self.folder / f"{job}.log"

    def owner(self, job: str) -> Principal | None:
        """None where there is no such job."""
        try:
            return Principal(*json.loads(self._owner(uuid.UUID(job).hex).read_text()))
        except (ValueError, TypeError, OSError):
            return None

    def report(self, job: str) -> dict[str, Any] | None:
        """None before the job's end, or where it had none."""
        try:
            report: dict[str, Any] = json.loads(self.report_path(job).read_text())
        except FileNotFoundError:
            return None
        return report

    def is_running(self, job: str) -> bool:
        return self._running(job).exists()

    def users(self) -> set[Principal]:
        return {who for who, _ in self._jobs()}

    def cut(self, who: Principal, is_as_distilled: Callable[[Mapping[str, Any]], bool]) -> None:
        """Leaves of a report how it ended, if a memory that it used is not as it was; its log has the same text."""
        for owner, job in self._jobs():
            report = self.report(job) if owner == who else None
            if report is None or all(is_as_distilled(source) for source in report.get("memories", ())):
                continue
            rest = {name: report.get(name) for name in _OUTCOME} | {"withdrawn": True}
            temporary = self.folder / f"{job}.{uuid.uuid4().hex}.tmp"  # several may be at it
            temporary.write_text(json.dumps(rest))
            os.replace(temporary, self.report_path(job))
            self.log_path(job).unlink(missing_ok=True)

    def remove_all(self, who: Principal) -> None:
        """A user's, all but one that is running: its report will be cut."""
        for owner, job in self._jobs():
            if owner == who and not self.is_running(job):
                self._remove(job)

    def remove_old(self, now_s: float | None = None) -> None:
        before_s = (time.time() if now_s is None else now_s) - KEPT_S
        for _, job in self._jobs():
            with contextlib.suppress(FileNotFoundError):  # another process was faster, or it has just ended
                if all(path.stat().st_mtime < before_s for path in self._files(job)):
                    self._remove(job)

    def _jobs(self) -> Iterator[tuple[Principal, str]]:
        for path in sorted(self.folder.glob("*.owner.json")):
            job = path.name.partition(".")[0]
            if (who := self.owner(job)) is not None:
                yield who, job

    def _files(self, job: str) -> list[Path]:
        """The owner's last: a crash in between leaves a job that is found again."""
        return [*(path for path in self.folder.glob(f"{job}.*") if path != self._owner(job)), self._owner(job)]

    def _remove(self, job: str) -> None:
        for path in self._files(job):
            path.unlink(missing_ok=True)

    def _owner(self, job: str) -> Path:
        return self.folder / f"{job}.owner.json"

    def _running(self, job: str) -> Path:
        return self.folder / f"{job}.running"
