"""What the compiler makes of every kernel, for GPUs that need not be there: registers, spills, width of accesses.

    python -m benchmarks.kernel_report [--target sm_90 ...] [--kernel gather ...] [--json FILE]

Each variant is compiled to machine code by Triton's own ptxas for sm_80 (A100), sm_90 (H100) and sm_100 (B200).
Registers, stack and shared memory stand in the machine code's tables (cuobjdump); the accesses are
counted in its disassembly (nvdisasm). ``spills`` counts instructions that read or write local memory.

    load_bits, store_bits    the widest global access that moves KV
    loads, stores            all global accesses of one turn of the loop, by width; the narrow ones read tables

Aligned bfloat16 has 128 bits both ways. Where rows hold fp8, that side has half as many bytes to move. The
exit code is 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.arguments import output_file
from memos_vllm.kernels.rotary import RotaryShift

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled for one kind of cache."""

    name: str
    function: Any  # of triton.jit
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if os.environ.get("TRITON_INTERPRET"):
        print("kernel_report: unset TRITON_INTERPRET, under which nothing is compiled", file=sys.stderr)
        return 2
    chosen = [variant for variant in variants() if any(text in variant.name for text in arguments.kernel or [""])]
    targets = arguments.target or list(TARGETS)
    rows = []
    with report.progress("compiling", len(chosen) * len(targets)) as advance:
        for variant in chosen:
            for target in targets:
                advance(f"{variant.name} for {target}")
                rows.append(examine(variant, target))
    _print(rows)
    if arguments.json:
        report.write_json(arguments.json, "kernel_report", {"target": targets, "kernel": arguments.kernel}, rows)
    return 1 if any(map(_spills, rows)) else 0


def variants() -> list[Variant]:
    """Every kernel and option, for the caches that models have: heads of 64, 80, 128 and 256, MLA, odd ones."""
    return [*_copies(), *_encoders(), *_scatters()]


def examine(variant: Variant, target: str) -> dict[str, Any]:
    """One row of the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: variant.signature.get(name, "constexpr") for name in variant.function.arg_names}
    source = ASTSource(variant.function, signature, variant.constants)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={**variant.options, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        instructions = _tool("nvdisasm", "--print-code", file.name)
    loads, stores = _widths(instructions, "LDG"), _widths(instructions, "STG")
    return {
        "kernel": variant.name,
        "target": target,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "load_bits": max(loads),
        "store_bits": max(stores),
        "loads": _counts(loads),
        "stores": _counts(stores),
    }


def _copies() -> Iterator[Variant]:
    from memos_vllm.kernels import gpu_copy

    for to_rows in (True, False):
        for dims, vec in [(0, 16), (2, 16), (4, 16), (0, 8), (0, 4), (2, 2), (2, 1)]:
            shape = "whole blocks" if dims == 0 else f"runs in {dims} dimensions"
            yield Variant(
                f"{'gather' if to_rows else 'scatter'}, {shape}, {vec} bytes",
                gpu_copy.copy_blocks,
                gpu_copy.SIGNATURE,
                gpu_copy.Variant(vec, dims, to_rows).constants,
                gpu_copy.LAUNCH,
            )


def _encoders() -> Iterator[Variant]:
    from memos_vllm.kernels import gpu_copy, gpu_heads, head_kernels

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_size, tokens in [(64, 16), (80, 16), (128, 16), (128, 64), (256, 16), (576, 64)]:
            if dtype == torch.bfloat16 or (head_size, tokens) == (128, 16):
                yield Variant(
                    f"gather with fp8, {_name(dtype)} [{tokens}, {head_size}]",
                    head_kernels.encode_slabs,
                    head_kernels.ENCODE_SIGNATURE,
                    gpu_heads.SlabShape(dtype, 1, tokens, head_size).encode_constants(16, 16),
                    gpu_copy.LAUNCH,
                )


def _scatters() -> Iterator[Variant]:
    from memos_vllm.kernels import gpu_copy, gpu_heads, head_kernels

    shifts = {  # name -> head size, pairs, style, first element
        "": (128, 0, "neox", 0),
        "neox": (128, 64, "neox", 0),
        "gptj": (128, 64, "gptj", 0),
        "neox, half of it": (128, 32, "neox", 0),
        "neox, heads of 80": (80, 40, "neox", 0),
        "gptj, MLA": (576, 32, "gptj", 512),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, (head_size, half, style, first) in shifts.items():
            for fp8 in (False, True):
                if (not fp8 and not half) or (dtype != torch.bfloat16 and name not in ("", "neox")):
                    continue
                shift = RotaryShift(torch.ones(half), torch.zeros(half), style, first) if half else None
                options = " and ".join([*(["fp8"] if fp8 else []), *([f"shift ({name})"] if half else [])])
                yield Variant(
                    f"scatter with {options}, {_name(dtype)}",
                    head_kernels.scatter_slabs,
                    head_kernels.SCATTER_SIGNATURE,
                    gpu_heads.SlabShape(dtype, 1, 16, head_size).scatter_constants(16, 16, fp8, shift),
                    gpu_copy.LAUNCH,
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widths(instructions: str, operation: str) -> Counter[int]:
    """Bits of each global access: ``LDG.E.128``, ``LDG.E.64.CONSTANT``, ``LDG.E.U8``, or ``LDG.E`` for 32."""
    widths: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{operation}((?:\.\w+)*)", instructions):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        widths[int(bits[1]) if bits else 32] += 1
    return widths


def _counts(widths: Counter[int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True))


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the binary utilities that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in ("kernel", "target", "loads", "stores") else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = report.console()
    console.print(table)
    console.print(f"{len(rows)} compilations, {sum(map(_spills, rows))} with spills", highlight=False)


def _spills(row: dict[str, Any]) -> bool:
    return row["spills"] > 0 or row["stack_bytes"] > 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), help="default: all")
    parser.add_argument(
        "--kernel", nargs="+", metavar="TEXT", help="only kernels with one of these texts in their name"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
