"""The command line: ``--plugin memos`` and ``--memos-config FILE``.

vLLM has no hook for plugins' options, but asks the platform to update its parser after all other
options are there; that one method is wrapped, on the instance. Parsing the flag activates the
plugin: see ``plugin.activate``.
"""

from __future__ import annotations

import argparse
from typing import Any

from memos_vllm import activation
from memos_vllm.config import load
from memos_vllm.errors import ConfigError

PLUGIN_NAME = "memos"


def offer() -> None:
    """Lets the coming parser know the two options. May be called twice."""
    from vllm.platforms import current_platform

    # In __dict__: the platform logs a warning for every attribute it does not know.
    if "_memos_offered" in vars(current_platform):
        return
    original = current_platform.pre_register_and_update

    def pre_register_and_update(parser: argparse.ArgumentParser | None = None) -> None:
        original(parser)
        if parser is not None and "--plugin" not in parser._option_string_actions:
            add_arguments(parser)

    current_platform.pre_register_and_update = pre_register_and_update  # type: ignore[method-assign]
    current_platform._memos_offered = True  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Memos", "Long-term memory for the served model.")
    group.add_argument(
        "--plugin",
        action=_PluginAction,
        default=None,
        metavar="NAME",
        help="Plugin to switch on; the only name is 'memos'.",
    )
    group.add_argument(
        "--memos-config",
        action=_ConfigAction,
        default=None,
        metavar="FILE",
        help="YAML configuration of the memos plugin; the defaults apply without it.",
    )


class _PluginAction(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values != PLUGIN_NAME:
            raise argparse.ArgumentError(self, f"unknown plugin {values!r}; the only plugin is '{PLUGIN_NAME}'")
        setattr(namespace, self.dest, values)
        # cached_tokens in the usage is how a client sees that memory was cheap; an explicit
        # --no-enable-prompt-tokens-details later on the command line still wins.
        namespace.enable_prompt_tokens_details = True
        activation.activate(getattr(namespace, "memos_config", None))
        from memos_vllm.integration import plugin

        plugin.activate()


class _ConfigAction(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            load(values)
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if not activation.is_active() and not activation.asks_for_plugin():
            raise argparse.ArgumentError(self, "has no effect without --plugin memos")
        setattr(namespace, self.dest, values)
        if activation.is_active():
            activation.activate(values)
