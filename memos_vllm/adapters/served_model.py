"""What the server serves, in ``base.json``, for ``memos distill`` in another process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from memos_vllm.adapters.peft_config import BaseModel
from memos_vllm.errors import DataDirError

_FILE = "base.json"


def write(root: Path, base: BaseModel, fingerprint: str) -> None:
    values = {
        "fingerprint": fingerprint,
        "names": sorted(base.names),
        "modules": base.modules,
        "max_rank": base.max_rank,
        "target_modules": None if base.target_modules is None else sorted(base.target_modules),
        "path": base.path,
    }
    temporary = (root / _FILE).with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(root / _FILE)


def copy(root: Path, target: Path) -> None:
    """For a backup; nothing where no server ran with LoRA."""
    if (root / _FILE).exists():
        shutil.copy2(root / _FILE, target / _FILE)


def read(root: Path) -> tuple[BaseModel, str]:
    """The model, and its fingerprint.

    Raises:
        DataDirError: no server ran with LoRA here.
    """
    try:
        values = json.loads((root / _FILE).read_text())
    except (OSError, ValueError) as error:
        raise DataDirError(
            f"{root} does not say which model is served; start the server once with --enable-lora"
        ) from error
    modules, targets = values["modules"], values["target_modules"]
    base = BaseModel(
        names=frozenset(values["names"]),
        modules=None if modules is None else {name: (out, into) for name, (out, into) in modules.items()},
        max_rank=values["max_rank"],
        target_modules=None if targets is None else frozenset(targets),
        path=values["path"],
    )
    return base, values["fingerprint"]
