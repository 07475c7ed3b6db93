"""The least work of each op and pass, and the least time that a chip needs for it.

    python -m benchmarks roofline --op routed_attention --chip H100 --dtype bfloat16 --shape B=16 N=1100

Five resources work side by side, so the floor is the largest of five times, and names what bounds it:

    memory    every input read once, every output written once, over the memory's bandwidth
    L1        what sampling gathers and scatters, over the bandwidth of the L1 caches
    matrix    FLOP of sums of products, at the matrix units' rate (float32 without TF32: at the lanes' rate)
    lanes     other float32 operations (a multiply-add is one); in float32 they come on top of the matrix products
    special   exponentials, tanh, reciprocals, logarithms: the special-function units

Each `ops/<op>.py` says beside its formulas what they count (`COUNTED`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import ops
from .chips import CHIPS, Chip
from .report import aligned
from .work import Sizes, Work

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}


@dataclass(frozen=True)
class Floor:
    """The least seconds of each resource; the greatest of them is the floor of the pass."""

    memory: float
    l1: float
    matrix: float
    lanes: float
    special: float

    @property
    def seconds(self) -> float:
        return max(asdict(self).values())

    @property
    def bound_by(self) -> str:
        times = asdict(self)
        return max(times, key=times.__getitem__)


def floor(work: Work, chip: Chip, dtype: str) -> Floor:
    """The least time of `work` on `chip`, its matrix products in `dtype` ("tf32": float32 through TF32)."""
    matrix = work.matrix_flop / chip.matrix_flop_per_s(dtype)
    lanes = work.lane_operations / chip.operations_per_s
    return Floor(
        memory=work.memory_bytes / chip.memory_bytes_per_s,
        l1=work.l1_bytes / chip.l1_bytes_per_s,
        matrix=matrix,
        lanes=lanes + (matrix if dtype == "float32" else 0.0),
        special=work.special_functions / chip.special_functions_per_s,
    )


OPS = {name: counted for op in ops.NAMES for name, counted in ops.declaration(op).COUNTED.items()}


def least_work(op: str, direction: str, sizes: Sizes, dtype: str, factor_dtype: str | None = None) -> Work:
    """The work of one pass of an op.

    Args:
        op: a key of `OPS`.
        direction: "forward" or "backward".
        sizes: by the names of its docstring; what is missing is the headline's.
        dtype: of the main inputs and outputs: a key of `ELEMENT_BYTES`.
        factor_dtype: of factors, locations, weights, offsets and logits; None is `dtype`.

    Raises:
        ValueError: unknown sizes, a size below 0, or a pass that the op does not have.
    """
    counted = OPS[op]
    sizes = _completed(op, sizes)
    if direction not in counted.directions:
        raise ValueError(f"{op}: expected a pass out of {', '.join(counted.directions)}, got {direction}")
    e, f = ELEMENT_BYTES[dtype], ELEMENT_BYTES[factor_dtype or dtype]
    return counted.work(sizes, direction == "backward", e, f)


def _completed(op: str, sizes: Sizes) -> Sizes:
    headline = OPS[op].headline
    unknown = sorted(set(sizes) - set(headline))
    if unknown or any(size < 0 for size in sizes.values()):
        raise ValueError(f"{op}: expected sizes of {', '.join(headline)}, at least 0, got {dict(sizes)}")
    completed = {**headline, **sizes}
    if "M" in headline and "N" in sizes and "M" not in sizes:
        completed["M"] = completed["N"]
    return completed


def row(
    op: str, direction: str, sizes: Sizes, chip: Chip, dtype: str, factor_dtype: str | None = None
) -> dict[str, Any]:
    """Work and floors of one pass on one chip, as JSON takes it."""
    work = least_work(op, direction, sizes, dtype, factor_dtype)
    found = floor(work, chip, dtype)
    microseconds = {name: seconds * 1e6 for name, seconds in asdict(found).items()}
    return {
        "op": op, "pass": direction, "sizes": dict(_completed(op, sizes)), "dtype": dtype, "chip": chip.name,
        "work": asdict(work), "microseconds": microseconds, "floor_us": found.seconds * 1e6,
        "bound_by": found.bound_by,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal: work in millions, floors in microseconds."""
    head = ["op", "pass", "dtype", "chip", "MB", "MB L1", "MFLOP matrix", "M lanes", "M special"]
    head += ["memory", "L1", "matrix", "lanes", "special", "floor us", "bound by"]
    cells = [
        [
            *(row[name] for name in ("op", "pass", "dtype", "chip")),
            *(f"{amount / 1e6:.1f}" for amount in row["work"].values()),
            *(f"{time:.1f}" for time in row["microseconds"].values()),
            f"{row['floor_us']:.1f}",
            row["bound_by"],
        ]
        for row in rows
    ]
    return aligned(head, cells)


def sizes_of(op: str, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a call of a public op, by the names of its docstring."""
    return ops.declaration(op).sizes_of(arguments)


def dtypes_of(op: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Dtypes of the main inputs, and of factors, locations or offsets."""
    main, factor = (str(x.dtype).removeprefix("torch.") for x in ops.declaration(op).main_and_factor(arguments))
    return main, factor


def call_floor(op: str, arguments: Mapping[str, Any], directions: Sequence[str], chip: Chip) -> dict[str, Any]:
    """{"microseconds": ..., "bound_by": [...]} of the passes of a call, one after the other."""
    main, factor = dtypes_of(op, arguments)
    rows = [row(op, direction, sizes_of(op, arguments), chip, main, factor) for direction in directions]
    return {
        "chip": chip.name,
        "microseconds": sum(found["floor_us"] for found in rows),
        "bound_by": [found["bound_by"] for found in rows],
    }


def least_bytes(op: str, arguments: Mapping[str, Any], directions: Sequence[str]) -> int:
    """Bytes of device memory that the passes of a call must read and write at least."""
    main, factor = dtypes_of(op, arguments)
    sizes = sizes_of(op, arguments)
    return sum(least_work(op, direction, sizes, main, factor).memory_bytes for direction in directions)


def _size(text: str) -> tuple[str, int]:
    name, separator, number = text.partition("=")
    if not (name and separator and number.isdigit()):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}")
    return name, int(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; without options every op at its headline shape on every chip."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, action="append", help="may be given several times [all]")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="may be given several times [all]")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bfloat16", help="of the inputs [%(default)s]")
    parser.add_argument("--factor-dtype", choices=ELEMENT_BYTES, help="of factors, locations, offsets [as --dtype]")
    parser.add_argument("--shape", type=_size, nargs="+", default=[], metavar="NAME=NUMBER", help="others as headline")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    chosen, chips = args.op or list(OPS), [CHIPS[name] for name in args.chip or CHIPS]
    try:
        rows = [
            row(op, direction, dict(args.shape), chip, args.dtype, args.factor_dtype)
            for op in chosen
            for direction in OPS[op].directions
            for chip in chips
        ]
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"chips": [asdict(chip) for chip in chips], "rows": rows}, indent=1))
    else:
        print(table(rows))
        print("\n".join(f"{chip.name}: {chip.source}" for chip in chips))
    return 0
