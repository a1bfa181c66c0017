"""Several data-parallel engines of a machine share the budgets of KV; scheduler and workers agree on the share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from memos_vllm import activation
from memos_vllm.config import MemosConfig
from memos_vllm.integration.engine_share import config_of, num_engines_of, remove_gone_engines
from tests.conftest import ROOT

GIB = 2**30

# Makes vLLM's configuration as `vllm serve` does, sends it to an engine, and builds both sides of the connector there.
BUILD = """
import json, pickle, sys
from types import SimpleNamespace
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from memos_vllm.integration.engine_share import note_engines

def budgets(beside=False, **options):
    if beside:
        theirs = {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"shared_storage_path": "/nowhere"}}
        options["kv_transfer_config"] = KVTransferConfig(**theirs, kv_role="kv_both")
    config = EngineArgs(model=sys.argv[1], **options).create_engine_config()
    noted = str(config.kv_transfer_config.kv_connector_extra_config)
    note_engines(config)
    assert str(config.kv_transfer_config.kv_connector_extra_config) == noted, "a second time changes nothing"
    config = pickle.loads(pickle.dumps(config))  # as vLLM itself sends it to an engine's process
    parallel = config.parallel_config
    if hasattr(parallel, "reconfigure_for_independent_dp_rank"):
        parallel.reconfigure_for_independent_dp_rank()
    else:  # vLLM 0.26
        parallel.data_parallel_size = parallel.data_parallel_size_local = 1
    assert parallel.data_parallel_size_local == 1, "what an engine of a dense model is told"
    connectors = config.kv_transfer_config.kv_connector_extra_config.get("connectors", ())
    for ours in (each for each in connectors if each["kv_connector"] == "MemosConnector"):
        config.kv_transfer_config = KVTransferConfig(**ours)
    blocks = SimpleNamespace(num_blocks=1, kv_cache_groups=[])
    sides = [KVConnectorFactory.create_connector(config, role, blocks) for role in KVConnectorRole]
    kvs = [(side.scheduler_side or side.worker_side)._config.kv for side in sides]
    return [[kv.host_bytes, kv.disk_bytes] for kv in kvs]

print(json.dumps([budgets(**options) for options in json.loads(sys.argv[2])]))
"""
CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"data_parallel_size": 4}, 4),
    ({"data_parallel_size": 8, "data_parallel_size_local": 2, "data_parallel_address": "127.0.0.1"}, 2),
    ({"data_parallel_size": 4, "beside": True}, 4),
]


def test_both_sides_of_an_engine_have_its_share(tmp_path: Path) -> None:
    file = tmp_path / "memos.yaml"
    file.write_text(f"data_dir: {tmp_path / 'data'}\nkv: {{host_bytes: 8GiB, disk_bytes: 16GiB}}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEMOS_")}
    environment |= {activation.ACTIVE_ENV: "1", activation.CONFIG_ENV: str(file)}
    model = str(ROOT / "tests" / "assets" / "recall-model")
    command = [sys.executable, "-c", BUILD, model, json.dumps([options for options, _ in CASES])]
    for number in range(10):
        make_directory(tmp_path / "data" / "kv" / f"dp{number}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [[8 * GIB // number, 16 * GIB // number] for _, number in CASES]
    assert json.loads(done.stdout.splitlines()[-1]) == [[share, share] for share in shares]
    assert len(list((tmp_path / "data" / "kv").iterdir())) == 1, "the first of the cases has one engine"


@pytest.mark.parametrize(
    ("options", "num_left"),
    [
        ({"data_parallel_size": 4}, 4),
        ({"data_parallel_size": 8, "data_parallel_size_local": 2, "data_parallel_address": "127.0.0.1"}, 10),
    ],
)
def test_directories_of_engines_that_are_gone_are_removed_where_all_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], num_left: int
) -> None:
    for number in range(10):
        make_directory(tmp_path / "kv" / f"dp{number}")
    parallel = EngineArgs(model=str(ROOT / "tests" / "assets" / "recall-model"), **options)
    config = SimpleNamespace(parallel_config=parallel.create_engine_config().parallel_config)
    remove_gone_engines(config, tmp_path)  # type: ignore[arg-type]
    assert len(list((tmp_path / "kv").iterdir())) == num_left


def make_directory(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "lock").touch()


def test_only_the_budgets_are_shared() -> None:
    whole = MemosConfig.model_validate({"kv": {"host_bytes": 10, "disk_bytes": 0, "disk_reserve_bytes": 7}})
    extra = {"memos": whole.model_dump(mode="json")}
    assert config_of(extra) == whole and num_engines_of(extra) == 1, "an engine that was started without a server"
    share = config_of({**extra, "memos_engines": 3})
    kv = whole.kv.model_copy(update={"host_bytes": 3})
    assert share == whole.model_copy(update={"kv": kv}), "no disk stays none, and the reserve is the file system's"
