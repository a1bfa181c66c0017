"""The data directory: one server, a clear word when it cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memos_vllm import data_dir
from memos_vllm.errors import DataDirError

TRY = """
import sys
from pathlib import Path
from memos_vllm import data_dir
data_dir.acquire(Path(sys.argv[1]))
print("held", flush=True)
"""
HOLD = TRY + "sys.stdin.read()"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != data_dir.HOLDER_ENV}


def attempt(path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", TRY, str(path)], env=environment, capture_output=True, text=True)


def test_a_second_server_is_refused_and_descendants_are_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = attempt(tmp_path, clean_environment())
        assert refused.returncode != 0 and f"in use by another server (process {holder.pid})" in refused.stderr
        child = attempt(tmp_path, clean_environment() | {data_dir.HOLDER_ENV: str(holder.pid)})
        assert child.stdout == "held\n"
        holder.kill()
    assert attempt(tmp_path, clean_environment()).stdout == "held\n", "a dead server's lock is gone with it"


def test_a_process_holds_the_directory_that_it_took_and_no_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from memos_vllm import data_dir; one, other = map(Path, sys.argv[1:]); "
        "data_dir.acquire(one); data_dir.acquire(other); "
        "print(data_dir.is_holder(one), data_dir.is_holder(one / '..' / one.name), data_dir.is_holder(other))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")],
        env=clean_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True", "False"]


def test_the_secret_is_made_once_and_private(tmp_path: Path) -> None:
    first = data_dir.secret(tmp_path)
    assert len(first) == 32 and data_dir.secret(tmp_path) == first
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_a_damaged_secret_is_not_replaced_in_silence(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(DataDirError, match="restore it"):
        data_dir.secret(tmp_path)


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = attempt(tmp_path / "file", clean_environment())
    assert "cannot use the data directory" in refused.stderr and "check data_dir" in refused.stderr


def test_a_full_disk_is_found_at_start(tmp_path: Path) -> None:
    (tmp_path / "probe.tmp").symlink_to("/dev/full")
    refused = attempt(tmp_path, clean_environment())
    assert "no space left" in refused.stderr and "set data_dir elsewhere" in refused.stderr
