"""A ``vllm serve`` process, stock or with the plugin, as a context manager.

    with serve(model, plugin=True, config=path, extra=["--max-model-len", "2048"]) as server:
        server.client(api_key="alice").chat.completions.create(model=server.model, ...)
        server.restart()

Two servers start side by side with ``wait=False`` and ``server.wait_until_ready()``. The log stays
on disk after the server has gone; ``ServerError`` quotes its end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai

DEFAULT_KEY = "benchmark"

CPU_BLOCK_SIZE = 32
CPU_FLAGS = {
    "--enforce-eager": None,
    "--block-size": str(CPU_BLOCK_SIZE),
    "--kv-cache-memory-bytes": str(512 * 2**20),
    "--max-model-len": "8192",
}
GPU_BLOCK_SIZE = 16
GPU_FLAGS = {
    "--block-size": str(GPU_BLOCK_SIZE),
    "--max-model-len": "8192",
    # Decoding in whole CUDA graphs as by default, but for batches as small as they occur here, and nothing goes
    # through torch.compile: both would take most of a server's start, and of prefill they save some per cent.
    "--compilation-config": json.dumps(
        {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    ),
}
COMMON_FLAGS = {"--enable-prompt-tokens-details": None}

LOG_DIRECTORY = "MEMOS_BENCH_SERVER_LOGS"
"""Environment variable: where logs go that are given no path, instead of the directory for temporary files."""

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0")

_STOP_TIMEOUT_S = 20.0
_LOG_TAIL_LINES = 30


class ServerError(RuntimeError):
    """The server did not start, died, or did not answer; the message ends with its log."""


class Server:
    """One ``vllm serve`` process. ``serve`` makes, starts and stops it.

    Attributes:
        model: name under which the model is served.
        base_url: ``http://127.0.0.1:PORT``, the same after ``restart``.
        log_path: standard output and error of every start, appended.
        flags: command-line flags, in vLLM's spelling.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        plugin: bool = False,
        config: str | os.PathLike[str] | None = None,
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        port: int | None = None,
    ):
        self.model_path = str(model)
        self.model = Path(self.model_path).name if os.path.isdir(self.model_path) else self.model_path
        self.plugin = plugin
        self.config = config
        self.extra = list(extra)
        self.env = dict(env or {})
        self.port = port or free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        if log_path is None:
            if folder := os.environ.get(LOG_DIRECTORY):
                os.makedirs(folder, exist_ok=True)
            handle, log_path = tempfile.mkstemp(prefix="memos-server-", suffix=".log", dir=folder)
            os.close(handle)
        self.log_path = Path(log_path)
        self.flags: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the process and returns at once."""
        assert self.process is None or self.process.poll() is not None, "the server is running"
        self.flags = self._flags()
        command = [vllm_executable(), "serve", self.model_path, *self.flags]
        with self.log_path.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            # A session of its own: one signal reaches EngineCore and the workers too.
            self.process = subprocess.Popen(
                command,
                env=self._environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Returns when ``/health`` answers.

        Raises:
            ServerError: the process ended or the time is over.
        """
        while True:
            self.check_alive()
            try:
                if httpx.get(f"{self.base_url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() - self._started > timeout_s:
                self.stop()
                raise ServerError(f"the server was not ready after {timeout_s:.0f} s.\n{self.log_tail()}")
            time.sleep(0.1)

    def check_alive(self) -> None:
        """Raises ``ServerError`` if the process has ended."""
        assert self.process is not None, "start() comes first"
        code = self.process.poll()
        if code is not None:
            raise ServerError(
                f"the server ended with code {code}{self._cause()}; its log is {self.log_path}:\n{self.log_tail()}"
            )

    def stop(self) -> int | None:
        """Ends the server as an operator would (SIGTERM), the whole group by force if that takes too long.

        Returns:
            The exit code, ``None`` if the server was never started.
        """
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.resume()
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT_S)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """``kill -9`` for the server and everything that it started."""
        if self.process is None:
            return
        self._signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """Freezes every process of the server. vLLM's workers spin for a second after each step, which
        would take a core from another server that is being timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes ``pause``; does nothing to a server that runs."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def restart(self, *, wait: bool = True, timeout_s: float = 300.0) -> None:
        """Stops and starts again with the same flags, port and log."""
        self.stop()
        self.start()
        if wait:
            self.wait_until_ready(timeout_s)

    # -- use ----------------------------------------------------------------------------------

    def client(self, api_key: str = DEFAULT_KEY, **options: Any) -> openai.OpenAI:
        """The stock ``openai`` client, without retries, so that a failure is seen."""
        return openai.OpenAI(
            base_url=f"{self.base_url}/v1", api_key=api_key, max_retries=0, **{"timeout": 300.0, **options}
        )

    def http(self, api_key: str = DEFAULT_KEY, **options: Any) -> httpx.Client:
        """An HTTP client with the key as a bearer token and paths relative to ``base_url``."""
        headers = {"Authorization": f"Bearer {api_key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, **{"timeout": 300.0, **options})

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _cause(self) -> str:
        """The error of the process that failed first, which stands far above the log's end."""
        this_start = self.log().rpartition("\n$ ")[2]
        causes = re.findall(r"\bERROR .*?\] *(\w+(?:\.\w+)*(?:Error|Exception|InUse|Full)\b: .*)", this_start)
        return f" ({causes[0].strip()})" if causes else ""

    # -- how it is started ----------------------------------------------------------------------

    def _flags(self) -> list[str]:
        flags = dict(COMMON_FLAGS) | (GPU_FLAGS if has_gpu() else CPU_FLAGS)
        flags |= {"--served-model-name": self.model, "--host": "127.0.0.1", "--port": str(self.port)}
        given = {argument.partition("=")[0] for argument in self.extra}
        out: list[str] = []
        for name, value in flags.items():
            if name not in given:
                out += [name] if value is None else [name, value]
        if self.plugin:
            out += ["--plugin", "memos"]
        if self.config is not None:
            out += ["--memos-config", os.fspath(self.config)]
        return out + self.extra

    def _environment(self) -> dict[str, str]:
        # The benchmark's own environment may belong to a vLLM process with the plugin, or to tests with an engine in
        # theirs; the server's must not.
        ours = ("MEMOS_", "VLLM_ENABLE_V1_MULTIPROCESSING")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        if os.path.isdir(self.model_path):
            environment |= {"HF_HUB_OFFLINE": "1"}
        if not has_gpu():
            # All cores for every server: the default keeps one free, which on two cores is half of them.
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_list())
        return environment | self.env


@contextmanager
def serve(
    model: str | os.PathLike[str],
    *,
    plugin: bool = False,
    config: str | os.PathLike[str] | None = None,
    extra: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log_path: str | os.PathLike[str] | None = None,
    port: int | None = None,
    wait: bool = True,
    timeout_s: float = 300.0,
) -> Iterator[Server]:
    """Starts ``vllm serve`` and stops it at the end of the block, whatever happens in it.

    Args:
        model: directory or hub name.
        plugin: adds ``--plugin memos``.
        config: adds ``--memos-config``.
        extra: further flags; a default of ours that stands here too gives way.
        env: environment variables on top of the caller's.
        log_path: where the log goes; a temporary file by default.
        port: a free one by default.
        wait: returns when the server is ready rather than at once.
        timeout_s: how long to wait for it, in seconds.

    Raises:
        ServerError: the server does not start.
    """
    server = Server(model, plugin=plugin, config=config, extra=extra, env=env, log_path=log_path, port=port)
    try:
        server.start()
        if wait:
            server.wait_until_ready(timeout_s)
        yield server
    finally:
        server.stop()


def vllm_executable() -> str:
    """The ``vllm`` command of this Python's environment."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if not found:
        raise ServerError(f"there is no vllm command beside {sys.executable}; install vLLM into this environment")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_gpu() -> bool:
    """Whether vLLM will run on a GPU. Asks the driver, not torch, which would take seconds and GPU memory."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not has_driver():
        return False
    try:
        return not importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


@cache
def has_driver() -> bool:
    """A container may show the device and hide the driver's file, or give it another name."""
    if any(os.path.exists(path) for path in DRIVER_FILES):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


def cpu_list() -> str:
    """The cores that this process may use, as vLLM reads them: ``0,1``."""
    if hasattr(os, "sched_getaffinity"):
        return ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return ",".join(map(str, range(os.cpu_count() or 1)))
