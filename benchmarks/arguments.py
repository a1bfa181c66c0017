"""Command-line values that every benchmark checks before its run, not after it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def directory(text: str) -> str:
    """A directory that can be written to."""
    if not os.path.isdir(text) or not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a directory that can be written to")
    return text


def output_file(text: str) -> str:
    """A file whose directory exists and can be written to."""
    directory(str(Path(text).absolute().parent))
    return text
