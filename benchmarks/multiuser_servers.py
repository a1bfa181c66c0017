"""The servers of the multi-user benchmark. They differ in the plugin, the pool and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.multiuser_options import Options
from benchmarks.serving import Server, has_gpu

APPLICATION_KEY = "multiuser-application"
"""Its users are named per request."""

ENVIRONMENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""In seconds. A server that was paused must not close a connection at the moment at which it goes on."""

MEMORY_FOLDER = "/dev/shm"

START_TIMEOUT_S = 1800.0 if has_gpu() else 300.0
_VARYING = ("--port", "--memos-config", "--served-model-name", "--kv-transfer-config")


def make_server(deployment: str, options: Options, data_dir: Path, *, gpu_share: float | None = None) -> Server:
    """One of the servers, not yet started.

    Args:
        deployment: ``small``, ``large`` or ``large_again``, stock vLLM by the size of its pool; ``example``, with
            the ExampleConnector; any other name is one with Memos, ``reactive`` without prediction.
        gpu_share: of the GPU's memory, where two servers live on it.
    """
    shape = options.shape
    num_blocks = shape.pool_blocks()
    extra: dict[str, Any] = {}
    config = None
    if deployment in ("large", "large_again"):
        num_blocks = shape.pool_blocks(options.users + 1)
    elif deployment == "example":
        shape = replace(shape, block_size=shape.whole_prompt_block_size)
        num_blocks = shape.pool_blocks()
        extra["--kv-transfer-config"] = example_connector(data_dir / deployment)
    elif deployment != "small":
        config = data_dir / f"{deployment}.yaml"
        values = memos_config(options, data_dir / deployment, prediction=deployment != "reactive")
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
    extra |= {
        "--num-gpu-blocks-override": num_blocks,
        "--block-size": shape.block_size,
        "--max-model-len": shape.max_model_len,
        "--max-num-batched-tokens": shape.max_model_len,  # ExampleConnector cannot save a prompt in chunks
        "--dtype": options.dtype,
    }
    if gpu_share is not None:
        extra["--gpu-memory-utilization"] = f"{gpu_share:.2f}"
        if (size_bytes := pool_bytes(options, num_blocks * shape.block_size)) is not None:
            extra["--kv-cache-memory-bytes"] = size_bytes
    flags = [*options.model.flags, *(str(part) for pair in extra.items() for part in pair)]
    return Server(options.model.directory(), plugin=config is not None, config=config, extra=flags, env=ENVIRONMENT)


def pool_bytes(options: Options, num_tokens: int) -> int | None:
    """What the pool takes, where that is known before the model runs. vLLM then does not measure how much of the GPU is
    free, so servers can start at the same time."""
    geometry = options.model.geometry
    if geometry is None:
        return None
    return num_tokens * geometry.kv_bytes_per_token * (2 if options.dtype == "float32" else 1)


def memory_directory(options: Options) -> str | None:
    """For the data of servers on a GPU: memory, if it has room for all users' KV several times. No arm is about the
    disk, and a slow one would be waited for. None: where temporary files go."""
    size_bytes = pool_bytes(options, options.users * options.shape.longest)
    if not has_gpu() or size_bytes is None or not os.access(MEMORY_FOLDER, os.W_OK):
        return None
    return MEMORY_FOLDER if shutil.disk_usage(MEMORY_FOLDER).free > 4 * size_bytes else None


def example_connector(folder: Path) -> str:
    folder.mkdir()
    value = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return json.dumps(value)


def memos_config(options: Options, data_dir: Path, *, prediction: bool) -> dict[str, Any]:
    """Room for a whole memory in the system message, and for all users' KV in host memory."""
    return {
        "data_dir": str(data_dir),
        "identity": {"keys": {APPLICATION_KEY: {"tenant": "bench"}}},
        "memory": {"long_lived_tokens": 2 * options.memory_tokens},
        "kv": {"host_bytes": "16GiB" if has_gpu() else "2GiB", "disk_bytes": "16GiB" if has_gpu() else "8GiB"},
        "prediction": {"enabled": prediction},
    }


def shown(server: Server) -> str:
    """A server's flags without those that differ by chance."""
    out, skip = [], False
    for flag in server.flags:
        if not skip and flag not in _VARYING:
            out.append(flag)
        skip = not skip and flag in _VARYING
    return " ".join(out)
