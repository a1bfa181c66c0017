"""The console command ``memos``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from memos_vllm import backup, distill, doctor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memos", description="Work on the data directory of Memos for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("doctor", help="examine, mend or compact what is stored")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run)
    command = commands.add_parser("backup", help="copy what cannot be computed again")
    backup.add_arguments(command)
    command.set_defaults(run=backup.run)
    command = commands.add_parser("distill", help="make a LoRA adapter from a user's memories")
    distill.add_arguments(command)
    command.set_defaults(run=distill.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
