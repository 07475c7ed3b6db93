"""Routed attention's bias computed once for a group of heads: `python -m benchmarks static-report --heads`.

The tiles are those of the table of block sizes, the heads of a program 1, 2, 4 and 8; counts are instructions of the
loop over tiles, for one pair of query and key and one head. More heads share a bias, and keep more rows in registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .machine_code import Row, row
from .processors import PROCESSORS

KERNELS = ("forward", "backward_queries", "backward_keys")
CHANNELS = (16, 32, 64, 128)
HEADS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Group:
    """One kernel with one number of heads a program."""

    name: str  # "forward D=32"
    chip: str
    heads: int
    instructions: float  # of the loops, a pair and head
    special_functions: float  # likewise
    registers: int
    spilled_bytes: int
    programs_at_once: int
    chosen: bool  # by the table of block sizes


def groups(chips: Iterable[str], matching: str = "") -> Iterator[Group]:
    """Groups of each kernel whose name has `matching` in it, in bfloat16 with R 16 and G 3."""
    from .launches import forced

    for chip in chips:
        for channels in CHANNELS:
            for kernel in KERNELS:
                name = f"{kernel} D={channels}"
                if matching not in name:
                    continue
                chosen = _row(chip, kernel, channels)
                tile = {"BLOCK_N": chosen.blocks["BLOCK_N"], "BLOCK_M": chosen.blocks["BLOCK_M"]}
                for heads in HEADS:
                    settings = {
                        **tile, "HEADS_PER_PROGRAM": heads, "num_warps": chosen.num_warps,
                        "num_stages": chosen.num_stages,
                    }  # fmt: skip
                    with forced(f"routed_attention_{kernel}", settings):
                        yield _group(name, _row(chip, kernel, channels), chosen.blocks["HEADS_PER_PROGRAM"])


def _row(chip: str, kernel: str, channels: int) -> Row:
    from . import variants

    name = f"attention_{kernel} bfloat16 D={channels}"
    return row(next(variant for variant in variants.of_op("routed_attention", chip) if variant.name == name))


def _group(name: str, row: Row, chosen: int) -> Group:
    heads = row.blocks["HEADS_PER_PROGRAM"]
    pairs = row.blocks["BLOCK_N"] * row.blocks["BLOCK_M"] * heads / (PROCESSORS[row.chip].warp_size * row.num_warps)
    return Group(
        name, row.chip, heads, round(row.instructions_in_loops / pairs, 1),
        round(row.special_function_in_loops / pairs, 2), row.registers, row.spilled_bytes, row.programs_at_once,
        heads == chosen,
    )  # fmt: skip


def table(found: Sequence[Group]) -> Iterator[str]:
    """Lines: a kernel each, for every number of heads its instructions a pair and head; * marks the table's choice."""
    yield f"{'chip':8}{'kernel':26}" + "".join(f"{f'{heads} heads':>22}" for heads in HEADS)
    lines: dict[tuple[str, str], str] = {}
    for group in found:
        registers = f"{group.spilled_bytes} B spilled" if group.spilled_bytes else f"{group.registers} r"
        cell = f"{group.instructions:.1f}{'*' if group.chosen else ''} {registers}"
        lines[group.chip, group.name] = lines.get((group.chip, group.name), "") + f"{cell:>22}"
    yield from (f"{chip:8}{name:26}{cells}" for (chip, name), cells in lines.items())
