"""What stops the start does so with one clear sentence, on the literal command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import vllm_executable
from tests.e2e.conftest import Memos

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def outputs(
    memos: Memos, config_path: Path, recall_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[int, str]]]:
    """Exit code and output of every command; all at once, since each mostly imports."""
    directory = tmp_path_factory.mktemp("errors")
    for name, text in {
        "unknown_key": "data_dri: /srv/memos",
        "no_yaml": "memory: [",
        "no_directory": f"data_dir: {directory / 'no_directory.yaml'}",
    }.items():
        (directory / f"{name}.yaml").write_text(text)
    (directory / "good.yaml").write_text(f"data_dir: {directory / 'data'}")
    flags = {
        "unknown_plugin": ["--plugin", "memo"],
        "without_plugin": ["--memos-config", config_path],
        "unknown_key": ["--plugin", "memos", "--memos-config", directory / "unknown_key.yaml"],
        "no_yaml": ["--memos-config", directory / "no_yaml.yaml", "--plugin=memos"],
        "no_directory": ["--plugin", "memos", "--memos-config", directory / "no_directory.yaml"],
        "offloading": ["--plugin", "memos", "--memos-config", directory / "good.yaml", "--kv-offloading-size", "1"],
        "in_use": ["--plugin", "memos", "--memos-config", config_path],
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEMOS_")}
    running = {
        name: subprocess.Popen(
            [vllm_executable(), "serve", recall_model, "--max-model-len", "512", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in flags.items()
    }
    ended = {}
    for name, process in running.items():
        text, _ = process.communicate(timeout=300)
        ended[name] = (process.returncode, text)
    yield ended


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unknown_plugin", "unknown plugin 'memo'; the only plugin is 'memos'"),
        ("without_plugin", "--memos-config: has no effect without --plugin memos"),
        ("unknown_key", "unknown key 'data_dri'"),
        ("no_yaml", "is not valid YAML"),
        ("no_directory", "cannot use the data directory"),
        ("offloading", "--kv-offloading-size puts another KV connector in the place of ours"),
        ("in_use", "is in use by another server"),
    ],
)
def test_the_start_stops_with_a_clear_sentence(outputs: dict[str, tuple[int, str]], name: str, sentence: str) -> None:
    code, text = outputs[name]
    assert code != 0
    assert sentence in text.strip().splitlines()[-1], text[-2000:]


def test_the_running_server_is_unharmed(memos: Memos, outputs: dict[str, tuple[int, str]]) -> None:
    assert memos.answer("some-key", "Hello!")
