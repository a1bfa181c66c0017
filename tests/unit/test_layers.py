"""The layers of docs/ARCHITECTURE.md, held by reading the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "memos_vllm"
BASE = {"types", "errors", "api_keys", "config", "activation", "data_dir", "durable", "status"}
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "__init__": {"activation", "integration"},  # lazily, inside register()
    "cli": {"backup", "distill", "doctor"},
    "doctor": BASE | {"adapters", "memory", "store"},
    "backup": BASE | {"adapters", "memory"},
    "core": BASE | {"core"},
    "memory": BASE | {"core", "memory"},
    "store": BASE | {"store", "kernels"},
    "adapters": BASE | {"adapters"},
    "distill": BASE | {"adapters", "memory"},
    "kernels": {"kernels"},
    "compat": BASE | {"compat"},
    "integration": BASE | {"core", "memory", "store", "adapters", "kernels", "compat", "integration"},
}
MAY_IMPORT_VLLM = {"integration", "compat"}
MAY_IMPORT_TORCH = {"store", "adapters", "kernels", "integration", "compat"}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "memos_vllm":
                yield from (f"memos_vllm.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_within_their_layer(path: Path) -> None:
    layer = layer_of(path)
    for name in imports(path):
        root = name.split(".")[0]
        if root == "memos_vllm":
            target = name.split(".")[1]
            assert target in ALLOWED[layer], f"{layer} must not import {name}"
        elif root == "vllm":
            assert layer in MAY_IMPORT_VLLM, f"{layer} must not import vllm"
        elif root == "torch":
            assert layer in MAY_IMPORT_TORCH, f"{layer} must not import torch"


def test_every_layer_is_known() -> None:
    assert {layer_of(path) for path in FILES} <= set(ALLOWED)
