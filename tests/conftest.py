"""What all tests share: the recall model, and one environment in which nothing reaches a hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile("memos", deadline=None)
settings.load_profile("memos")
"""An example takes as long as the machine's other work lets it, and no test is about that."""

ROOT = Path(__file__).parents[1]
RECALL_MODEL = ROOT / "tests" / "assets" / "recall-model"
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="session")
def recall_model() -> Path:
    return Path(os.environ.get("RM", RECALL_MODEL))
