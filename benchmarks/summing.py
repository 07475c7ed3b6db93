"""Whether it matters in training how the gradient of `value` is summed: a switch of this benchmark, not of the product.

    python -m benchmarks summing [--steps 1000 --seeds 2]

`tiny` is trained on the bundled digits in float32. Either the gradient of every deformable attention's value is the
kernel's, summed in float32; or its terms are rounded to bfloat16 and so is the sum after each of them, as atomics in
the dtype of a bfloat16 value do it. All else is the same, the order of the images too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from route_detr import cli
from route_detr.run import Run
from route_kernels.nn import attention
from route_kernels.ops.ms_deform_attn_fused import ms_deform_attn_fused
from route_kernels.reference.ms_deform_attn_fused import _locations

from . import counted
from .device import ROOT
from .report import aligned

NAME = "summing"
WAYS: dict[str, torch.dtype | None] = {"float32 sums": None, "bfloat16 sums": torch.bfloat16}
MEASURES = ("loss", "AP", "AP50")


def value_gradient(
    grad_output: Tensor,  # [B, N, H D]
    value: Tensor,  # [B, S, H, D]
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,  # [B, N, H, L, P, 2]
    weights: Tensor,  # [B, N, H, L, P]
    dtype: torch.dtype,
) -> Tensor:
    """sum over samples and corners of weight times bilinear weight times grad_output, rounded to `dtype` each time."""
    batch, queries, heads = weights.shape[:3]
    grad = torch.zeros(value.shape, dtype=dtype)
    images, lanes = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None]
    terms = grad_output.view(batch, queries, heads, 1, -1)
    start = 0
    for index, (height, width) in enumerate(shapes):
        pixels = locations[:, :, :, index] * locations.new_tensor([width, height]) - 0.5  # [B, N, H, P, 2]
        corner, fraction = pixels.floor(), pixels - pixels.floor()
        for right in (0, 1):
            for down in (0, 1):
                column, row = (corner + corner.new_tensor([right, down])).long().unbind(-1)
                beside = torch.where(torch.tensor([right, down], dtype=torch.bool), fraction, 1 - fraction).prod(-1)
                there = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                place = start + row * width + column
                where = (images.expand_as(place)[there], place[there], lanes.expand_as(place)[there])
                added = (weights[:, :, :, index] * beside)[..., None] * terms
                grad.index_put_(where, added[there].to(dtype), accumulate=True)
        start += height * width
    return grad.to(value.dtype)


class _Summed(torch.autograd.Function):
    """`ms_deform_attn_fused` with another sum for the gradient of value."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, shapes: Any, mask: Tensor | None, *inputs: Tensor) -> Tensor:
        ctx.given = dtype, shapes, mask
        ctx.save_for_backward(*inputs)
        return ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], value_mask=mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dtype, shapes, mask = ctx.given
        needed = ctx.needs_input_grad[3:]
        inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], value_mask=mask)
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, grad_output))
        grads = [next(grads) if x.requires_grad else None for x in inputs]
        value, reference, offsets, logits = ctx.saved_tensors
        points = (logits.shape[3] // len(shapes),) * len(shapes)
        samples = (len(shapes), points[0])
        locations = _locations(reference, offsets, tuple(shapes), points).unflatten(3, samples)
        weights = logits.softmax(-1).unflatten(3, samples)
        grads[0] = value_gradient(grad_output, value, shapes, locations, weights, dtype)
        if mask is not None:
            grads[0] = grads[0].masked_fill(mask[:, :, None, None], 0)
        return None, None, None, *grads


@contextmanager
def summed_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the `with` block the modules sum the gradient of value in `dtype`; None: as the product does."""

    def op(value: Tensor, shapes: Any, *inputs: Tensor, value_mask: Tensor | None = None) -> Tensor:
        return _Summed.apply(dtype, shapes, value_mask, value, *inputs)

    with mock.patch.object(attention, ms_deform_attn_fused.__name__, ms_deform_attn_fused if dtype is None else op):
        yield


def trained(dtype: torch.dtype | None, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """Trains `tiny` in a folder of its own; the last step's loss and the last evaluation."""
    with tempfile.TemporaryDirectory() as folder, summed_in(dtype):
        run = str(Path(folder) / "run")
        if code := cli.main(["train", "--preset", "tiny", "--out", run, f"train.seed={seed}", *options]):
            raise RuntimeError(f"training ended with {code}")
        records = Run(Path(run), writes=False).records()
    steps = [record for record in records if record.get("kind") == "step"]
    evaluated = [record for record in records if record.get("AP") is not None][-1]
    last = [record["loss"] for record in steps[-5:]]
    return {"steps": evaluated["step"], "loss": fmean(last), **{name: evaluated[name] for name in MEASURES[1:]}}


HEAD = ("gradient of value", "seed", "steps", "loss of the last 100 steps", "AP", "AP50")


def _rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [run["way"], str(run["seed"]), str(run["steps"]), *(f"{run[measure]:.3f}" for measure in MEASURES)]
        for run in runs
    ]


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/counted.md."""
    runs = results["runs"]
    mean = {way: fmean(run["AP"] for run in runs if run["way"] == way) for way in WAYS}
    of_one_way = [[run["AP"] for run in runs if run["way"] == way] for way in WAYS]
    spread = max(max(each) - min(each) for each in of_one_way)
    gap = mean["float32 sums"] - mean["bfloat16 sums"]
    verdict = "more than" if abs(gap) > spread else "no more than"
    words = (
        f"`tiny` on the bundled digits, float32 but for these sums. float32 sums come out {gap:+.3f} AP ahead in the "
        f"mean, which is {verdict} two seeds of one way differ ({spread:.3f}); in images of this size a row of the "
        "coarsest level takes some 300 additions."
    )
    if min(len(each) for each in of_one_way) < 3:
        words += " So few runs are a hint and no proof: the losses do not tell the ways apart."
    return counted.section(NAME, results, [words, (HEAD, _rows(runs))])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes summing.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks summing", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of 8 images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of each way (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder (default: {counted.COUNTED.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    runs = []
    for seed in range(args.seeds):
        for way, dtype in WAYS.items():
            runs.append({"way": way, "seed": seed, **trained(dtype, seed, [f"train.steps={args.steps}"])})
            counted.write(NAME, {"runs": runs}, args.out)
    print(aligned(HEAD, _rows(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
