"""How exact gradients of deformable attention are, by level, of ours and of peers: errors against float64.

    python -m benchmarks gradient-errors --run runs/demo

Sampling locations, weights and gradients of the last encoder layer of a trained detector, on digits; and samples near
their own position in the levels of an 800 x 1333 image, where 1,300 additions fall on a row of the coarsest one. Every
contender gets the same rounded inputs, value, weights and grad_output in a short dtype and locations in float32; the
exact result is that of these. Triton's kernels run in its interpreter, whose bfloat16 is mended here: it takes bits for
integers in products, cuts digits off instead of rounding, and cannot add. CUDA's run over emulated threads.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import route_kernels as rk
from route_detr.data.batches import batch_loader
from route_detr.data.coco import coco_layout, open_splits
from route_detr.model.criterion import Criterion
from route_detr.predict import load_trained
from route_kernels.nn import attention

from . import counted
from .device import ROOT
from .ops.ms_deform_attn import R50_LEVELS
from .report import aligned

NAME = "gradient_errors"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("output", "value", "sampling_locations", "attention_weights")
CHANNELS, POINTS = 32, 4
MOST_INTERPRETED = 4096  # queries of our Triton kernels, a program for some 16 of them: minutes in the interpreter
BLOCK_N = (
    8192  # of deformops' kernels, whose programs take 32: the interpreter's time is that of programs, not of lanes
)


class Samples(NamedTuple):
    """One call, in float32."""

    shapes: tuple[tuple[int, int], ...]
    value: Tensor  # [B, S, H, D]
    locations: Tensor  # [B, N, H, L, P, 2]
    weights: Tensor  # [B, N, H, L, P]
    grad_output: Tensor  # [B, N, H D]

    def rounded(self, dtype: torch.dtype) -> Samples:
        """The tensors of a step in `dtype`: locations stay float32."""
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("value", "weights", "grad_output")})

    def additions(self) -> list[float]:
        """By level: corners of samples that fall on a row of its gradient, in the mean."""
        corners = 4 * self.locations.shape[1] * self.locations.shape[4]
        return [corners / (height * width) for height, width in self.shapes]


Results = tuple[Tensor, Tensor, Tensor, Tensor]  # as PARTS
Contender = Callable[[Samples], Results]


# ---- samples --------------------------------------------------------------------------------------------------------


def trained_samples(run: Path, images: int = 1, heads: int = 1) -> Samples:
    """Heads of the last encoder layer of a trained detector, on the first images of its validation set."""
    trained = load_trained(run / "best.pt", torch.device("cpu"))
    splits = open_splits(coco_layout(**trained.data), trained.config.transforms, trained.config.train.seed)
    batch = next(iter(batch_loader(splits[1], [list(range(images))], 0)))
    calls: list[tuple[Any, ...]] = []
    fused = attention.ms_deform_attn_fused

    def kept(value: Tensor, shapes: Any, reference: Tensor, offsets: Tensor, logits: Tensor, **named: Any) -> Tensor:
        output = fused(value, shapes, reference, offsets, logits, **named)
        output.retain_grad()
        calls.append((value, shapes, reference, offsets, logits, output))
        return output

    detector = trained.detector.train()
    with mock.patch.object(attention, fused.__name__, kept):
        output = detector(batch.images, batch.padding_mask, batch.targets)
    Criterion(trained.config.train)(output, batch.targets)["loss"].backward()
    value, shapes, reference, offsets, logits, output = calls[len(detector.encoder.layers) - 1]
    samples = (len(shapes), -1)
    sizes = reference.new_tensor([(width, height) for height, width in shapes])[:, None]
    locations = reference[:, :, None, :, None] + offsets.unflatten(3, samples) / sizes
    weights = logits.softmax(-1).unflatten(3, samples)
    grad_output = output.grad.unflatten(-1, (value.shape[2], -1))
    of_heads = [x.detach()[:, :, :heads].contiguous() for x in (value, locations, weights, grad_output)]
    return Samples(tuple(map(tuple, shapes)), *of_heads[:3], of_heads[3].flatten(2))


def near_samples(levels: Sequence[tuple[int, int]] = R50_LEVELS, heads: int = 1) -> Samples:
    """Every position of the levels samples within some 3 pixels of itself; the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in levels]
    reference = torch.cat(grids).flip(-1)
    count, sizes = len(reference), torch.tensor([(w, h) for h, w in levels])[:, None]
    locations = reference[None, :, None, None, None] + 3 * randn(1, count, heads, len(levels), POINTS, 2) / sizes
    weights = randn(1, count, heads, len(levels) * POINTS).softmax(-1).unflatten(-1, (len(levels), POINTS))
    value, grad_output = randn(1, count, heads, CHANNELS), randn(1, count, heads * CHANNELS)
    return Samples(tuple(levels), value, locations, weights, grad_output)


# ---- contenders -----------------------------------------------------------------------------------------------------


def of_op(op: Callable[..., Tensor], samples: Samples) -> Results:
    """Output and gradients by autograd."""
    leaves = [x.clone().requires_grad_() for x in (samples.value, samples.locations, samples.weights)]
    output = op(leaves[0], samples.shapes, None, *leaves[1:])
    return (output.detach(), *torch.autograd.grad(output, leaves, samples.grad_output))


def on_backend(name: str, samples: Samples) -> Results:
    if name == "triton" and samples.locations.shape[1] > MOST_INTERPRETED:
        raise NotImplementedError(f"more than {MOST_INTERPRETED} queries in Triton's interpreter")
    with rk.backend(name):
        return of_op(rk.ms_deform_attn, samples)


def emulated(samples: Samples) -> Results:
    """The CUDA kernels, sums by atomics, over the tests' emulated threads."""
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_emulation

    return of_op(cuda_emulation.Kernels(cuda_emulation.library("-O2")).ms_deform_attn, samples)


def deformops(float32_sums: bool, samples: Samples) -> Results:
    """deformops' Triton kernels, forward and backward, as its backends triton_query_tiled(_fp32acc) launch them."""
    from deformops.backends.triton._kernels import msda_query_tiled as kernels

    value, locations, weights = samples.value, samples.locations, samples.weights
    batch, queries, heads, levels, points, _ = locations.shape
    shapes = torch.tensor(samples.shapes, dtype=torch.int32)
    sizes = shapes.prod(1)
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    output = value.new_zeros(batch, queries, heads, value.shape[-1])
    grad_output = samples.grad_output.view_as(output)
    grads = [torch.zeros_like(x) for x in (value, locations, weights)]
    if float32_sums:
        grads[0] = grads[0].float()
    inputs, numbers = (
        (value, shapes, starts, locations, weights),
        (batch, queries, heads, levels, points, value.shape[-1]),
    )
    grid, blocks = (-(-queries // BLOCK_N), heads, batch), {"BLOCK_SIZE_Q": BLOCK_N, "BLOCK_SIZE_D": value.shape[-1]}
    strides = [stride for x in (value, locations, weights, output) for stride in x.stride()]
    kernels.msda_forward_kernel[grid](*inputs, output, *numbers, *strides, **blocks, aggregate=0)
    strides += [stride for grad in grads for stride in grad.stride()]
    kernels._msda_backward_kernel[grid](*inputs, grad_output, *grads, *numbers, *strides, **blocks)
    return output.flatten(2), grads[0].to(value.dtype), *grads[1:]


CONTENDERS: Mapping[str, Contender] = {
    "ours, cpu": partial(on_backend, "cpu"),
    "ours, triton": partial(on_backend, "triton"),
    "ours, cuda": emulated,
    "deformops, its choice from sm_90 on": partial(deformops, False),
    "deformops, its choice before sm_90": partial(deformops, True),
    "PyTorch's grid_sample": partial(on_backend, "eager"),
}


@contextmanager
def true_bfloat16() -> Iterator[None]:
    """Triton's interpreter with the bfloat16 of a GPU: products and sums rounded to nearest, atomic additions."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, bits = interpreter.InterpreterBuilder, tl.bfloat16
    binary_op, cast, atomic = builder.binary_op, builder.cast_impl, builder.create_atomic_rmw

    def widened(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrowed(data: np.ndarray) -> interpreter.TensorHandle:
        short = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(short.view(torch.uint16).numpy(), bits)

    def of_two(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if left.dtype.scalar != bits or op not in (np.add, np.subtract, np.multiply, np.divide):
            return binary_op(self, left, right, op)
        return narrowed(op(widened(left.data), widened(right.data)))

    def cast_to(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) == (tl.float32, bits):
            return narrowed(source.data)
        return cast(self, source, dtype)

    def added(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *order: Any) -> Any:
        if value.dtype.scalar != bits:
            return atomic(self, op, pointer, value, mask, *order)
        there = np.broadcast_to(mask.data, pointer.data.shape)
        addresses, terms = pointer.data[there].astype(np.int64), np.ascontiguousarray(value.data[there])
        if len(addresses):
            first = int(addresses.min())
            count = (int(addresses.max()) - first) // 2 + 1
            sums = torch.frombuffer((ctypes.c_uint16 * count).from_address(first), dtype=torch.bfloat16)
            places = torch.from_numpy((addresses - first) // 2)
            sums.index_put_((places,), torch.from_numpy(terms).view(torch.bfloat16), accumulate=True)  # one by one
        return value

    with ExitStack() as stack:
        for name, mended in (("binary_op", of_two), ("cast_impl", cast_to), ("create_atomic_rmw", added)):
            stack.enter_context(mock.patch.object(builder, name, mended))
        yield


# ---- errors ---------------------------------------------------------------------------------------------------------


def exact(samples: Samples) -> Results:
    """In float64, from the same rounded inputs."""
    precise = samples._replace(**{name: getattr(samples, name).double() for name in samples._fields[1:]})
    return on_backend("cpu", precise)


def errors(found: Results, expected: Results, shapes: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """Relative, in the root mean square: of the output; of each gradient by level."""
    ends = np.cumsum([height * width for height, width in shapes])
    of_rows = [
        (slice(None), slice(end - height * width, end)) for end, (height, width) in zip(ends, shapes, strict=True)
    ]
    of_samples = [(slice(None),) * 3 + (level,) for level in range(len(shapes))]
    result = {PARTS[0]: [_relative(found[0], expected[0])]}
    for part, ours, exactly in zip(PARTS[1:], found[1:], expected[1:], strict=True):
        levels = of_rows if part == "value" else of_samples
        result[part] = [_relative(ours[level], exactly[level]) for level in levels]
    return result


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def measured(
    cases: Mapping[str, Samples], contenders: Mapping[str, Contender] = CONTENDERS
) -> Iterator[dict[str, Any]]:
    """A row for each case, dtype and contender; one that cannot run says why."""
    for case, samples in cases.items():
        for name, dtype in DTYPES.items():
            rounded = samples.rounded(dtype)
            expected = exact(rounded)
            for contender, run in contenders.items():
                row = {"case": case, "dtype": name, "contender": contender, "additions": samples.additions()}
                try:
                    with true_bfloat16():
                        row["errors"] = errors(run(rounded), expected, samples.shapes)
                except (ImportError, NotImplementedError) as missing:
                    row["unavailable"] = str(missing)
                yield row


HEAD = ("samples", "dtype", "contender", "output", "value, finest to coarsest level", "locations", "weights")


def _cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["case"], row["dtype"], row["contender"]]
    if "unavailable" in row:
        return [*start, f"not run: {row['unavailable']}", "", "", ""]
    found = row["errors"]
    worst = [f"{max(found[part]):.1e}" for part in PARTS[2:]]
    return [*start, f"{found['output'][0]:.1e}", " ".join(f"{each:.1e}" for each in found["value"]), *worst]


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Case, dtype, additions to a row of the coarsest level, and there the error of deformops on sm_90 over ours."""
    by_key = {(row["case"], row["dtype"], row["contender"]): row for row in rows if "errors" in row}
    found = []
    for (case, dtype, contender), row in by_key.items():
        ours = by_key.get((case, dtype, "ours, cuda"))
        if contender.endswith("from sm_90 on") and ours:
            over = row["errors"]["value"][-1] / ours["errors"]["value"][-1]
            found.append((case, dtype, row["additions"][-1], over))
    return found


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/counted.md."""
    rows = results["rows"]
    over = "; ".join(
        f"{case}, {dtype}, {count:.0f} additions: {ratio:.0f}" for case, dtype, count, ratio in ratios(rows)
    )
    words = (
        "Errors relative to the exact gradient, root mean square; of locations and weights the worst level. On the "
        f"coarsest level the error of deformops with sums in the dtype of value over ours: {over}. Ours is that of one "
        "rounding, the least that a result in this dtype can have; the other one grows with the additions. Locations "
        "on the border of two pixels have two slopes: which one float32 takes is the same chance for all."
    )
    return counted.section(NAME, results, [words, (HEAD, [_cells(row) for row in rows])])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes gradient_errors.json."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, below
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradient-errors", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained detector, as of make demo")
    parser.add_argument("--out", type=Path, help=f"folder (default: {counted.COUNTED.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    cases = {"trained, digits": trained_samples(args.run), "near, 800 x 1333": near_samples()}
    rows = []
    for row in measured(cases):
        rows.append(row)
        print(aligned(HEAD, [_cells(row)]).splitlines()[1], flush=True)
        counted.write(NAME, {"rows": rows}, args.out)
    print(aligned(HEAD, [_cells(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
