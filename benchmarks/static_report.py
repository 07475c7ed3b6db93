"""The code of every Triton and CUDA kernel, for chips that need not be here: `python -m benchmarks static-report`.

Counts from the machine code and the code that Triton makes it from; nothing is run and nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import head_groups
from .machine_code import Row, row
from .processors import PROCESSORS

if TYPE_CHECKING:
    from .variants import Variant

CHIPS = ("sm80", "sm90", "sm100", "sm120", "gfx942")


def rows(ops: Iterable[str], chips: Iterable[str], matching: str = "", few: bool = False) -> Iterator[Row]:
    """Rows of every variant of these ops on these chips whose name has `matching` in it, or of a `few`."""
    from . import variants

    found = [variant for chip in chips for op in ops for variant in variants.of_op(op, chip)]
    found = [variant for variant in found if matching in variant.name]
    if few:
        found = list(covering(found))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(row, found)
        yield from tqdm(compiled, "kernels compiled", len(found), unit="kernel", leave=False, disable=None)


def covering(variants: Sequence[Variant]) -> Iterator[Variant]:
    """The fewest that reach every kernel on every chip, and every dtype of a kernel and table entry on some chip."""
    kernels = [variant.kernel.fn.__name__ for variant in variants]
    reached = [
        {(kernel, variant.architecture), (kernel, _dtype(variant)), *variant.entries}
        for kernel, variant in zip(kernels, variants, strict=True)
    ]
    left = set().union(*reached)
    while left:
        best = max(range(len(variants)), key=lambda place: len(reached[place] & left))
        left -= reached[best]
        yield variants[best]


def _dtype(variant: Variant) -> str:
    """Dtype of the first tensor: "bf16"."""
    return next(kind[1:] for kind in variant.signature.values() if str(kind).startswith("*"))


HEADINGS = (
    "chip", "variant", "blocks", "warps x stages", "regs", "spill", "shared", "at once", "occup.", "instr.",
    "tensor", "special", "load once + turn", "store once + turn", "atomics",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    tile = row.tile_bytes
    return (
        row.chip,
        row.variant,
        " ".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in row.blocks.items()),
        f"{row.num_warps} x {row.num_stages}",
        str(row.registers),
        str(row.spilled_bytes),
        str(row.shared_bytes),
        str(row.programs_at_once),
        f"{row.occupancy:.0%}",
        str(row.instructions),
        f"{row.tensor_core} ({row.tensor_core_in_loops})",
        f"{row.special_function} ({row.special_function_in_loops})",
        f"{tile['loaded_once']} + {tile['loaded_in_loops']}",
        f"{tile['stored_once']} + {tile['stored_in_loops']}",
        " ".join(f"{name} x{count}" for name, count in row.atomics.items()) or "-",
    )


def table(found: Sequence[Row]) -> Iterator[str]:
    """Lines of aligned columns; in brackets, the instructions within loops; faults under the row that has them."""
    cells = [HEADINGS, *map(_cells, found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    for line, row_of_line in zip(cells, [None, *found], strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        if row_of_line is not None:
            yield from (f"  ! {fault}" for fault in row_of_line.faults())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code is 1 where a kernel spills or does not fit on its chip."""
    # Interpreted kernels have no machine code: read before triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from . import cuda_machine_code
    from .ops import NAMES

    parser = argparse.ArgumentParser(prog="python -m benchmarks static-report", description=__doc__)
    parser.add_argument("--op", action="append", choices=sorted(NAMES), help="may be repeated [all]")
    parser.add_argument("--chip", action="append", choices=sorted(PROCESSORS), help="may be repeated [%(default)s]")
    parser.add_argument("--backend", choices=("triton", "cuda"), help="only its kernels [both]")
    parser.add_argument("--match", default="", metavar="TEXT", help="only variants with TEXT in their name")
    parser.add_argument(
        "--few",
        action="store_true",
        help="only as many as reach every kernel on each chip, and every dtype and entry of the table on one of them",
    )
    parser.add_argument(
        "--heads", action="store_true",
        help="instead: routed attention's instructions a pair and head, by the heads that share a bias",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count there as well")
    args = parser.parse_args(argv)
    if args.heads:
        groups = list(head_groups.groups(args.chip or CHIPS, args.match))
        print("\n".join(head_groups.table(groups)))
        if args.json:
            _write(args.json, list(map(asdict, groups)))
        return 0
    found = []
    if args.backend != "cuda":
        found += rows(args.op or NAMES, args.chip or CHIPS, args.match, args.few)
    if args.backend != "triton" and cuda_machine_code.OP in (args.op or NAMES):
        found += cuda_machine_code.rows(args.chip or CHIPS, args.match, args.few)
    print("\n".join(table(found)))
    faults = sum(bool(row.faults()) for row in found)
    print(f"{len(found)} variants, {faults or 'none'} with faults")
    if args.json:
        _write(args.json, [{**asdict(row), "faults": row.faults()} for row in found])
    return 1 if faults else 0


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    import triton

    file.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
