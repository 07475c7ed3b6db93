"""The least work of each op and pass, and the least time that a chip needs for it.

    python -m benchmarks.roofline --op routed_attention --chip H100 --dtype bfloat16 --shape B=16 N=1100

Five resources work side by side, so the floor is the largest of five times, and names what bounds it:

    memory    every input read once, every output written once, over the memory's bandwidth
    L1        what sampling gathers and scatters, over the bandwidth of the L1 caches
    matrix    FLOP of sums of products, at the matrix units' rate (float32 without TF32: at the lanes' rate)
    lanes     other float32 operations (a multiply-add is one); in float32 they come on top of the matrix products
    special   exponentials, tanh, reciprocals, logarithms: the special-function units

e bytes of an element, f of a factor, location, weight, offset or logit; names as in the ops' docstrings; no masks;
references as (x, y). R = G = 0 is attention without a bias.

routed_attention, with B N M pairs of a query and a key and H heads

    forward   memory   e (2 B H N D + 2 B H M D) + 4 B H N + f B (N + M)(2 R + G)   q, O; k, v; lse; six factors
              matrix   2 B N M (2 H D + 2 R + G)      q k and P v of every head; sup, del and gate once for all heads
              special  B N M (H + 1) + 2 B H N        exp(S - max) of every head, p = 0.5 + 0.5 tanh(g / 2) once;
                                                      log and reciprocal of the row sums
              lanes    B N M (5 + 4 H)                p; sup - del; r; two of the clamp | scale q k + b, max,
                                                      S - max, row sum of every head
    backward  memory   e (4 B H N D + 4 B H M D) + 4 B H N + 2 f B (N + M)(2 R + G)
                       q, O, dO, dQ; k, v, dK, dV; lse; factors and their gradients
              matrix   2 B N M (5 H D + 6 R + 3 G)    S, dP, dV, dK, dQ; each product again and its two gradients
              special  B N M (H + 1)                  P and p again, nothing else
              lanes    B N M (10 + 5 H) + B H N D     p, sup - del, r; |r| <= limit, select; dr p, dr - dr p,
                                                      (1 - p) p dr, times sup - del; -lse + b
                                                      | S, S - lse, dP - T, P times it, sum over heads; T = dO . O
    Two passes over the tiles, one by queries and one by keys, take 7 H D instead of 5 H D and both exponentials twice.

query_similarity, "relu": each unordered pair once; "mean": sums only

    relu      memory   e (B N C + B N)
              matrix   B N (N - 1) C                  x_i . x_j, i < j
              special  B N                            1 / |x|
              lanes    3 B N (N - 1) / 2 + 2 B N C    relu, its share of s_i and of s_j; |x|^2 and x / |x|
    mean      forward  memory e (B N C + B N), special B N, lanes 3 B N C: |x|^2, sum_j x^_j, x^_i . sum
              backward memory e (2 B N C + B N), special B N, lanes 7 B N C: these again, sum_j g_j x^_j, g_i sum + it,
                       - 2 g_i x^_i, projection off x^_i (2)

ms_deform_attn, with T = B N H K samples; in brackets what the fused form adds

    forward   memory   e (V + B N H D) + 3 f T [+ f B N L_ref 2]     V = B H min(S, 4 N K) D: what is sampled of value
              L1       4 e D T                        four corners of a sample
              special  0 [T + B N H]                  exponentials of the softmax, reciprocals of its sums
              lanes    T (4 D + 14 [+ 6])             four corners; pixels, floors, fractions, weights of the corners
                                                      [max, subtract, sum, normalise; location of the offset: 2]
    backward  memory   e (V + B N H D + B S H D) + 6 f T [+ f B N L_ref 2]      value, dO, dvalue; the others twice
              L1       4 e D T + 4 . 4 D T            corners again, their gradients added in float32
              special  0 [T + B N H]
              lanes    T (8 D + 26 [+ 9])             four products dO . v_c, four weighted dO; 14 again, 12 of the
                                                      sample's adjoint [6 again, 3 of the softmax's adjoint]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .chips import CHIPS, Chip
from .report import aligned

Sizes = Mapping[str, int]
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4}
DIRECTIONS = ("forward", "backward")
R50_POSITIONS = 22223  # of an 800 x 1333 image, four levels


@dataclass(frozen=True)
class Work:
    """What one pass must do at least."""

    memory_bytes: int
    l1_bytes: int
    matrix_flop: int
    lane_operations: int
    special_functions: int


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


def _routed_attention(s: Sizes, backward: bool, e: int, f: int) -> Work:
    pairs = s["B"] * s["N"] * s["M"]
    query, key = s["B"] * s["H"] * s["N"] * s["D"], s["B"] * s["H"] * s["M"] * s["D"]
    rows = s["B"] * s["H"] * s["N"]
    factors = s["B"] * (s["N"] + s["M"]) * (2 * s["R"] + s["G"])
    head, rank, gate = s["H"] * s["D"], s["R"], s["G"]
    routed = rank > 0 or gate > 0
    if backward:
        return Work(
            memory_bytes=e * 4 * (query + key) + 4 * rows + 2 * f * factors,
            l1_bytes=0,
            matrix_flop=2 * pairs * (5 * head + 6 * rank + 3 * gate),
            lane_operations=pairs * (10 * routed + 5 * s["H"]) + query,
            special_functions=pairs * (s["H"] + routed),
        )
    return Work(
        memory_bytes=e * 2 * (query + key) + 4 * rows + f * factors,
        l1_bytes=0,
        matrix_flop=2 * pairs * (2 * head + 2 * rank + gate),
        lane_operations=pairs * (5 * routed + 4 * s["H"]),
        special_functions=pairs * (s["H"] + routed) + 2 * rows,
    )


def _similarity_relu(s: Sizes, backward: bool, e: int, f: int) -> Work:
    if backward:
        raise ValueError("query_similarity: mode relu has no backward")
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    return Work(
        memory_bytes=e * (elements + rows),
        l1_bytes=0,
        matrix_flop=elements * (s["N"] - 1),
        lane_operations=3 * rows * (s["N"] - 1) // 2 + 2 * elements,
        special_functions=rows,
    )


def _similarity_mean(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    return Work(
        memory_bytes=e * ((2 if backward else 1) * elements + rows),
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(7 if backward else 3) * elements,
        special_functions=rows,
    )


def _deformable(s: Sizes, backward: bool, e: int, f: int, fused: bool) -> Work:
    samples = s["B"] * s["N"] * s["H"] * s["K"]
    value = s["B"] * s["S"] * s["H"] * s["D"]
    sampled = s["B"] * s["H"] * min(s["S"], 4 * s["N"] * s["K"]) * s["D"]
    output = s["B"] * s["N"] * s["H"] * s["D"]
    references = s["B"] * s["N"] * s.get("L_ref", 1) * 2 * fused
    softmax = (samples + s["B"] * s["N"] * s["H"]) * fused
    corners = 4 * s["D"] * samples
    if backward:
        return Work(
            memory_bytes=e * (sampled + output + value) + f * (6 * samples + references),
            l1_bytes=(e + 4) * corners,
            matrix_flop=0,
            lane_operations=2 * corners + (26 + 9 * fused) * samples,
            special_functions=softmax,
        )
    return Work(
        memory_bytes=e * (sampled + output) + f * (3 * samples + references),
        l1_bytes=e * corners,
        matrix_flop=0,
        lane_operations=corners + (14 + 6 * fused) * samples,
        special_functions=softmax,
    )


def _add_layer_norm(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    kept = rows * min(s["C"], 4)  # x^ of the spare channels
    return Work(
        memory_bytes=e * (3 * elements + kept) + 4 * rows + (2 + 2 * backward) * f * s["C"],
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(13 if backward else 8) * elements,
        special_functions=0 if backward else rows,
    )


def _focal_loss(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["K"]
    return Work(
        memory_bytes=e * 2 * elements + (4 if backward else 12) * rows,
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(1 if backward else 14) * elements,
        special_functions=0 if backward else 3 * elements,
    )


@dataclass(frozen=True)
class Counted:
    """An op with its work by sizes, element bytes and bytes of a factor or location; `headline` is what is reported."""

    work: Callable[[Sizes, bool, int, int], Work]
    headline: Sizes
    directions: Sequence[str] = DIRECTIONS


_SAMPLED = {"B": 2, "H": 8, "N": R50_POSITIONS, "S": R50_POSITIONS, "K": 16, "D": 32}
OPS = {
    "routed_attention": Counted(
        _routed_attention, {"B": 16, "H": 8, "N": 1100, "M": 1100, "D": 32, "R": 16, "G": 3}
    ),
    "query_similarity": Counted(_similarity_relu, {"B": 16, "N": 1100, "C": 256}, ("forward",)),
    "query_similarity mean": Counted(_similarity_mean, {"B": 16, "N": 1100, "C": 256}),
    "ms_deform_attn": Counted(lambda *counted: _deformable(*counted, fused=False), _SAMPLED),
    "ms_deform_attn_fused": Counted(
        lambda *counted: _deformable(*counted, fused=True), {**_SAMPLED, "L_ref": 4}
    ),
    "add_layer_norm": Counted(_add_layer_norm, {"B": 2, "N": R50_POSITIONS, "C": 256}),
    "sigmoid_focal_loss": Counted(_focal_loss, {"B": 2, "N": R50_POSITIONS, "K": 91}),
}  # fmt: skip


def least_work(op: str, direction: str, sizes: Sizes, dtype: str, factor_dtype: str | None = None) -> Work:
    """The work of one pass of an op.

    Args:
        op: a key of `OPS`.
        direction: "forward" or "backward".
        sizes: by the names of the module's docstring; what is missing is the headline's.
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
    """The sizes of a call of a public op, by the names of the module's docstring."""
    if op == "routed_attention":
        (batch, heads, queries, channels), keys = arguments["query"].shape, arguments["key"].shape[2]
        routing = arguments.get("routing")
        rank, gate = (0, 0) if routing is None else (routing.sup_q.shape[2], routing.gate_q.shape[2])
        return {"B": batch, "H": heads, "N": queries, "M": keys, "D": channels, "R": rank, "G": gate}
    if op in ("query_similarity", "add_layer_norm"):
        return dict(zip("BNC", arguments["x"].shape, strict=True))
    if op == "sigmoid_focal_loss":
        return dict(zip("BNK", arguments["logits"].shape, strict=True))
    batch, positions, heads, channels = arguments["value"].shape
    places = arguments["sampling_locations" if op == "ms_deform_attn" else "sampling_offsets"]  # [B, N, H, ..., 2]
    queries, samples = places.shape[1], places.shape[3:-1].numel()
    sizes = {"B": batch, "H": heads, "N": queries, "S": positions, "K": samples, "D": channels}
    return sizes if op == "ms_deform_attn" else {**sizes, "L_ref": arguments["reference_points"].shape[2]}


def call_floor(op: str, arguments: Mapping[str, Any], directions: Sequence[str], chip: Chip) -> dict[str, Any]:
    """{"microseconds": ..., "bound_by": [...]} of the passes of a call, one after the other."""
    main, factor = _dtypes(op, arguments)
    rows = [row(op, direction, sizes_of(op, arguments), chip, main, factor) for direction in directions]
    return {
        "chip": chip.name,
        "microseconds": sum(found["floor_us"] for found in rows),
        "bound_by": [found["bound_by"] for found in rows],
    }


def least_bytes(op: str, arguments: Mapping[str, Any], directions: Sequence[str]) -> int:
    """Bytes of device memory that the passes of a call must read and write at least."""
    main, factor = _dtypes(op, arguments)
    sizes = sizes_of(op, arguments)
    return sum(least_work(op, direction, sizes, main, factor).memory_bytes for direction in directions)


def _dtypes(op: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Of the main inputs, and of factors, locations or offsets."""
    routing = arguments.get("routing")
    tensors = {
        "routed_attention": lambda: (arguments["query"], arguments["query"] if routing is None else routing.sup_q),
        "query_similarity": lambda: (arguments["x"], arguments["x"]),
        "ms_deform_attn": lambda: (arguments["value"], arguments["sampling_locations"]),
        "ms_deform_attn_fused": lambda: (arguments["value"], arguments["sampling_offsets"]),
        "add_layer_norm": lambda: (arguments["x"], arguments["weight"]),
        "sigmoid_focal_loss": lambda: (arguments["logits"], arguments["logits"]),
    }[op]()
    main, factor = (str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return main, factor


def _size(text: str) -> tuple[str, int]:
    name, separator, number = text.partition("=")
    if not (name and separator and number.isdigit()):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}")
    return name, int(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; without options every op at its headline shape on every chip."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, action="append", help="may be given several times [all]")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="may be given several times [all]")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bfloat16", help="of the inputs [%(default)s]")
    parser.add_argument("--factor-dtype", choices=ELEMENT_BYTES, help="of factors, locations, offsets [as --dtype]")
    parser.add_argument("--shape", type=_size, nargs="+", default=[], metavar="NAME=NUMBER", help="others as headline")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    ops, chips = args.op or list(OPS), [CHIPS[name] for name in args.chip or CHIPS]
    try:
        rows = [
            row(op, direction, dict(args.shape), chip, args.dtype, args.factor_dtype)
            for op in ops
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


if __name__ == "__main__":
    sys.exit(main())
