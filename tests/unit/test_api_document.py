"""docs/API.md has every route of ours and no other, each with an example; and bodies are in the schema."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest
from fastapi import FastAPI

from memos_vllm.integration.endpoints import routers
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "API.md").read_text()
SECTIONS = re.findall(r"^### `([A-Z]+) (\S+)`\n(.*?)(?=^#{2,3} |\Z)", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    app = FastAPI()
    for router in routers(development=True):
        app.include_router(router)
    return app.openapi()


def test_the_document_has_exactly_the_routes(schema: dict[str, Any]) -> None:
    routes = [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]
    assert sorted((method, path) for method, path, _ in SECTIONS) == sorted(routes)
    assert all(path.startswith("/v1/") for _, path in routes)


@pytest.mark.parametrize(("method", "path", "text"), SECTIONS, ids=[" ".join(each[:2]) for each in SECTIONS])
def test_each_route_has_an_example_that_calls_it_with_fields_that_it_has(
    schema: dict[str, Any], method: str, path: str, text: str
) -> None:
    (example,) = re.findall(r"^    (curl .*)$", text, re.MULTILINE)
    words = shlex.split(example)
    url = next(word for word in words if word.startswith("localhost:8000/"))
    target, _, query = url.removeprefix("localhost:8000").partition("?")
    has_body = any(word in ("-d", "--data-binary", "-F") for word in words)
    assert (words[words.index("-X") + 1] if "-X" in words else "POST" if has_body else "GET") == method
    assert re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), target)
    route = schema["paths"][path][method.lower()]
    assert set(re.findall(r"(\w+)=", query)) <= {each["name"] for each in route["parameters"]} if query else True
    if "-d" in words and "chat" not in path:
        body = route["requestBody"]["content"]["application/json"]["schema"]
        assert set(json.loads(words[words.index("-d") + 1])) <= set(body["properties"])
        for name in set(body["properties"]) - {"user"}:
            assert f"`{name}`" in text, f"{name} is not described"


def test_no_reference_leads_out_of_a_bodys_schema(schema: dict[str, Any]) -> None:
    ours = {path: methods for path, methods in schema["paths"].items() if "chat" not in path}
    assert "#/$defs/" not in json.dumps(ours)
    add = ours["/v1/memories"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "text" in str(add["properties"]["memories"]), "what a list holds is spelt out"
