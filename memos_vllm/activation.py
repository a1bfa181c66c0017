"""Whether this process belongs to a server that was started with ``--plugin memos``.

The answer crosses process boundaries in the environment: EngineCore, workers and further API
servers inherit it. This module imports nothing but the standard library, because it runs in every
vLLM process on the machine, with and without the flag.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ACTIVE_ENV = "MEMOS_ACTIVE"
CONFIG_ENV = "MEMOS_CONFIG"


def is_active() -> bool:
    return os.environ.get(ACTIVE_ENV) == "1"


def activate(config_path: str | None) -> None:
    os.environ[ACTIVE_ENV] = "1"
    if config_path is not None:
        os.environ[CONFIG_ENV] = str(Path(config_path).expanduser().absolute())


def config_path() -> str | None:
    return os.environ.get(CONFIG_ENV)


def is_mentioned() -> bool:
    """Whether the command line could ask for the plugin, or asks for help on options.

    Only then is the parser extended, so that a command line without the flag meets an untouched
    vLLM.
    """
    options = {argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:]}
    helps = any(option == "-h" or option.startswith("--help") for option in options)
    return helps or "--memos-config" in options or asks_for_plugin()


def asks_for_plugin() -> bool:
    """Whether ``--plugin`` is on the command line, or ``plugin:`` in vLLM's own ``--config`` file."""
    arguments = sys.argv[1:]
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--plugin":
            return True
        if name == "--config":
            path = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # vLLM reads the file itself and reports it
            if any(line.lstrip().startswith("plugin") for line in text.splitlines()):
                return True
    return False
