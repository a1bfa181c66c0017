"""Invariant 3: without the flag, a vLLM with the plugin installed is a vLLM without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

# Builds vLLM's parser and application as `vllm serve` does, and tells what there is to see.
LOOK = """
import json, sys, threading
sys.argv = ["vllm", "serve", *sys.argv[1:]]
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.26
    from vllm.entrypoints.openai.api_server import build_app
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
args = parser.parse_args(sys.argv[2:])
app = build_app(args, ("generate",))
print(json.dumps({
    "options": sorted(parser._option_string_actions),
    "openapi": app.openapi(),
    "routes": [[getattr(route, "path", ""), route.name] for route in app.routes],
    "middleware": [each.cls.__name__ for each in app.user_middleware],
    "wrapped": hasattr(EngineArgs.create_engine_config, "__wrapped__"),
    "platform": sorted(vars(current_platform)),
    "threads": sorted(thread.name for thread in threading.enumerate()),
    "modules": sorted(name for name in sys.modules if name.startswith("memos_vllm")),
    "metrics": sorted(__import__("prometheus_client").REGISTRY._names_to_collectors),
    "environment": sorted(name for name in __import__("os").environ if "MEMOS" in name or name == "VLLM_PLUGINS"),
}))
"""


RUNS = {  # name -> arguments, environment
    "no plugin": ((), {"VLLM_PLUGINS": ""}),  # vLLM is told to load none at all
    "no flag": ((), {}),
    "flag": (("--plugin", "memos"), {}),
}


@pytest.fixture(scope="module")
def seen() -> Callable[[str], dict[str, Any]]:
    """What each of the runs tells; they import vLLM side by side."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MEMOS_") and k != "VLLM_PLUGINS"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", LOOK, *arguments],
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (arguments, environment) in RUNS.items()
    }
    told = {name: (*process.communicate(), process.returncode) for name, process in processes.items()}

    def seen(name: str) -> dict[str, Any]:
        output, errors, code = told[name]
        assert code == 0, errors[-3000:]
        return json.loads(output.splitlines()[-1])

    return seen


@pytest.fixture
def without_plugin(seen: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    found = seen("no plugin")
    assert found.pop("environment") == ["VLLM_PLUGINS"] and found.pop("modules") == []
    return found


def test_without_the_flag_nothing_is_different(
    seen: Callable[[str], dict[str, Any]], without_plugin: dict[str, Any]
) -> None:
    found = seen("no flag")
    assert found.pop("environment") == []
    assert set(found.pop("modules")) <= {"memos_vllm", "memos_vllm.activation"}
    assert found == without_plugin


def test_with_the_flag_it_is(seen: Callable[[str], dict[str, Any]], without_plugin: dict[str, Any]) -> None:
    found = seen("flag")
    assert "--plugin" in found["options"]
    assert "/v1/memories" in found["openapi"]["paths"] and "/v1/memories" not in without_plugin["openapi"]["paths"]
    assert found["wrapped"] and not without_plugin["wrapped"]
    assert set(found["middleware"]) - set(without_plugin["middleware"]) == {"LiveRequests", "RefusesMemory"}
