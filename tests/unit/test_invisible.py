"""Invariant 3: without the flag, a vLLM with the plugin installed is a vLLM without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def look(*arguments: str, **environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MEMOS_") and k != "VLLM_PLUGINS"}
    result = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments], env=clean | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_plugin() -> dict:
    seen = look(VLLM_PLUGINS="")  # vLLM is told to load no plugin at all
    assert seen.pop("environment") == ["VLLM_PLUGINS"] and seen.pop("modules") == []
    return seen


def test_without_the_flag_nothing_is_different(without_plugin: dict) -> None:
    seen = look()
    assert seen.pop("environment") == []
    assert set(seen.pop("modules")) <= {"memos_vllm", "memos_vllm.activation"}
    assert seen == without_plugin


def test_with_the_flag_it_is(without_plugin: dict) -> None:
    seen = look("--plugin", "memos")
    assert "--plugin" in seen["options"]
    assert "/v1/memories" in seen["openapi"]["paths"] and "/v1/memories" not in without_plugin["openapi"]["paths"]
    assert seen["wrapped"] and not without_plugin["wrapped"]
    assert set(seen["middleware"]) - set(without_plugin["middleware"]) == {"LiveRequests", "RefusesMemory"}
