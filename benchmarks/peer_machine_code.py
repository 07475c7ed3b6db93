"""Peers' Triton kernels as they compile for a chip that need not be here, beside ours: counted, not timed.

    python -m benchmarks peer-machine-code [--chip sm90]

Forward and backward of deformable attention in bfloat16, H 8, D 32, L 4, P 4: deformops' query-tiled kernels with the
settings of their launches, our Triton kernels, and our CUDA kernels where there is nvcc.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import counted, cuda_machine_code, variants
from .device import ROOT
from .machine_code import Row, machine_code, row
from .machine_code import counts as counts_of
from .report import aligned

NAME = "peer_machine_code"
OP = "ms_deform_attn"
BLOCK_N, CHANNELS, WARPS = 32, 32, 4  # deformops' launches: DEFAULT_TILES, Triton's own number of warps
KEPT = ("registers", "spilled_bytes", "occupancy", "instructions", "loads", "stores", "atomics")
HEAD = ("kernel", "pass", "sums", "registers", "spilled", "occupancy", "instructions", "loads", "reductions a corner")


def peers(chip: str) -> Iterator[dict[str, Any]]:
    """deformops' kernels; sums in the dtype of value, and in float32.

    Raises:
        ImportError: deformops is not installed, or does not know this Python.
    """
    from deformops.backends.triton._kernels import msda_query_tiled as kernels
    from triton.compiler import ASTSource, compile

    pointers = {"value": "*bf16", "shapes": "*i32", "level_start_index": "*i32", "loc": "*fp32", "attn": "*bf16"}
    for kernel, direction, sums in (
        (kernels.msda_forward_kernel, "forward", "bf16"),
        (kernels._msda_backward_kernel, "backward", "bf16"),
        (kernels._msda_backward_kernel, "backward", "fp32"),
    ):
        types = {**pointers, "output": "*bf16", "grad_output": "*bf16", "grad_value": f"*{sums}"}
        types |= {"grad_loc": "*fp32", "grad_attn": "*bf16"}
        constants = {"BLOCK_SIZE_Q": BLOCK_N, "BLOCK_SIZE_D": CHANNELS}
        if direction == "forward":
            constants["aggregate"] = 0
        ones = {name for name in kernel.arg_names if re.fullmatch(r"stride_g?(vd|od|lc|ap)", name)}
        constants |= dict.fromkeys(ones, 1)  # contiguous: Triton makes them constants
        signature, attributes = {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = types.get(name.removesuffix("_ptr"), "i32")
            divisible = name.endswith("_ptr") or name == "dim_per_head" or name.startswith("stride_")
            if divisible and not re.fullmatch(r"stride_g?(lp|al)", name):
                attributes[(place,)] = [["tt.divisibility", 16]]
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = compile(
            ASTSource(kernel, signature, places, attributes),
            target=variants.TARGETS[chip],
            options={"num_warps": WARPS},
        )
        found = counts_of(machine_code(compiled), chip, compiled.metadata.shared, WARPS)
        parts = {"direction": direction, "sums": sums if direction == "backward" else "", "warps": WARPS}
        yield {"kernel": "deformops, triton", **parts, **{name: found[name] for name in KEPT}}


def ours(chip: str) -> Iterator[dict[str, Any]]:
    """Our Triton kernels, and the CUDA kernels for rows of D 32 where there is nvcc."""
    for variant in variants.of_op(OP, chip):
        if (
            variant.name.endswith((f" bfloat16 D={CHANNELS}", "deterministic"))
            and f"bfloat16 D={CHANNELS}" in variant.name
        ):
            yield _of_row("ours, triton", row(variant))
    if cuda_machine_code.build().nvcc() is not None:
        for found in cuda_machine_code.rows([chip], "bfloat16"):
            if found.blocks["VEC"] > 1 and math.prod(found.blocks.values()) == CHANNELS:
                yield _of_row("ours, cuda", found)


def _of_row(maker: str, found: Row) -> dict[str, Any]:
    fixed = ", deterministic" if "deterministic" in found.variant or "gather" in found.variant else ""
    sums = "fp32" if found.direction == "backward" else ""
    return {"kernel": maker + fixed, "direction": found.direction, "sums": sums, "warps": found.num_warps} | {
        name: getattr(found, name) for name in KEPT
    }


def reductions_of_a_corner(atomics: Mapping[str, int]) -> str:
    """Lanes that add, once each, the D channels of a sample's corner, by the width of the instruction."""
    widths = {name: re.search(r"(?:BF16|F32)(?:x(\d+))?", name) for name in atomics}
    return ", ".join(f"{CHANNELS // int(width[1] or 1)} {name}" for name, width in widths.items() if width)


def _cells(found: Mapping[str, Any]) -> list[str]:
    loads = ", ".join(f"{count} {name}" for name, count in found["loads"].items())
    start = [found["kernel"], found["direction"], found["sums"], str(found["registers"]), str(found["spilled_bytes"])]
    numbers = [f"{found['occupancy']:.0%}", str(found["instructions"])]
    return [*start, *numbers, loads, reductions_of_a_corner(found["atomics"])]


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/counted.md."""
    words = (
        f"{results['chip']}, bfloat16, D {CHANNELS}. Instructions count once, however often they run; a reduction is "
        "one lane's. deformops' choice on this chip, sums in bfloat16, adds 8 channels at a time, sums in float32 4: "
        "right sums cost twice the reductions, before neighbours are merged."
    )
    missing = "" if results["cuda"] else " There was no nvcc: the CUDA kernels are in the [page of theirs](cuda.md)."
    return counted.section(NAME, results, [words + missing, (HEAD, [_cells(each) for each in results["kernels"]])])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes peer_machine_code.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peer-machine-code", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=("sm80", "sm90", "sm100", "sm120"), default="sm90", help="(default: sm90)")
    parser.add_argument("--out", type=Path, help=f"folder (default: {counted.COUNTED.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    kernels = [*peers(args.chip), *ours(args.chip)]
    cuda = any(each["kernel"].startswith("ours, cuda") for each in kernels)
    counted.write(NAME, {"chip": args.chip, "cuda": cuda, "kernels": kernels}, args.out)
    print(aligned(HEAD, [_cells(each) for each in kernels]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
