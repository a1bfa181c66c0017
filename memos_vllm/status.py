"""``python -m memos_vllm.status [URL]``: the summary of ``/v1/memos/status`` of a running server, as text."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from typing import Any

MIB = 2**20


def lines(summary: dict[str, Any]) -> list[str]:
    """
    Args:
        summary: ``summary`` of ``/v1/memos/status``.
    """
    prediction = summary["prediction"]
    arrivals = ", ".join(f"{number} {outcome}" for outcome, number in prediction["arrivals"].items())
    moved = ", ".join(
        f"{prediction[name]['blocks']} {word} ({prediction[name]['bytes'] / MIB:.1f} MiB)"
        for name, word in (
            ("prefetched", "prefetched"),
            ("prefetch_used", "used"),
            ("prefetch_wasted", "wasted"),
            ("prefetch_failed", "failed"),
        )
    )
    out = [
        f"scenes   recall {_share(prediction['recall'])}: {arrivals}",
        f"blocks   precision {_share(prediction['precision'])}: {moved}",
    ]
    for tier, numbers in summary["tiers"].items():
        asked = numbers["hit_blocks"] + numbers["miss_blocks"]
        out.append(
            f"tier     {tier:14} {numbers['used_bytes'] / MIB:.1f} of {numbers['limit_bytes'] / MIB:.1f} MiB, "
            f"gave {numbers['hit_blocks']} of {asked} blocks"
        )
    for copies in summary["copies"]:
        if copies["bytes"] or copies["failures"]:
            speed = "-" if copies["bytes_per_s"] is None else f"{copies['bytes_per_s'] / MIB:.0f} MiB/s"
            out.append(
                f"copies   {copies['path']:14} for {copies['purpose']}: {copies['bytes'] / MIB:.1f} MiB at {speed}, "
                f"{copies['failures']} failed"
            )
    for source, numbers in summary["time_to_first_token"].items():
        if numbers["requests"]:
            p50, p95 = (f"{1000 * numbers[name]:.0f} ms" for name in ("p50_s", "p95_s"))
            out.append(f"ttft     {source:14} {numbers['requests']} requests, p50 {p50}, p95 {p95}")
    return out


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m memos_vllm.status", description=__doc__.split("``: ")[1])
    parser.add_argument("url", nargs="?", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY", ""), help="default: $VLLM_API_KEY")
    args = parser.parse_args()
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"{args.url} is no address of a server; write for example http://localhost:8000")
    request = urllib.request.Request(
        f"{args.url.rstrip('/')}/v1/memos/status", headers={"authorization": f"Bearer {args.api_key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            status = json.load(response)
    except (urllib.error.URLError, ValueError) as error:
        parser.exit(1, f"{args.url} gives no status of Memos ({error}); does it run with --plugin memos?\n")
    if "summary" not in status:
        parser.exit(1, "the status is for operators: give a key with 'operator: all' as --api-key\n")
    if status["summary"] is None:
        parser.exit(1, "activation memory is off; the server's log says why\n")
    print("\n".join(lines(status["summary"])))


if __name__ == "__main__":
    main()
