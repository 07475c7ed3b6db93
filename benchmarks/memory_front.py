"""Memory against arithmetic: PyTorch's ways to keep less for backward, beside our levels. No GPU, nothing is timed.

    python -m benchmarks memory-front [--preset dino-r50 --batch 16 --image 800x1333 --dtype bf16]

One training step of the transformer on the neck's outputs, without the criterion, on fake tensors. The public
formulation is run as it is, with activation checkpointing and selective checkpointing of each layer, and as
`torch.compile` would with an activation-memory budget: AOTAutograd's joint graph, parted by its partitioner, every
operator run by itself. A peak counts what is alive, as in `route-detr memory`; what a compiler fuses away would come
off on both sides.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import GradAOTOutput
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import route_kernels as rk
from route_detr.config import PRESETS, preset
from route_detr.files import save_figure
from route_detr.memory.command import DTYPES, image_size
from route_detr.memory.ledger import Ledger
from route_detr.memory.planner import GPU_BACKEND, LEVELS, Request, _built
from route_detr.memory.precision import mixed_precision
from route_detr.model.decoder import DecoderLayer
from route_detr.model.encoder import EncoderLayer, grid_of
from route_kernels.backends import assumed
from route_kernels.nn import BoxTargets

from . import counted
from .device import ROOT
from .report import aligned

NAME = "memory_front"
PICTURE = f"{NAME}.png"
BUDGETS = tuple(step / 20 for step in range(21))
GIB, TERA = 2**30, 1e12
PUBLIC, COMPILED, OURS, OURS_COMPILED = "public formulation", "budget", "detector.memory", "fused, budget"
GATHERS = ("route_kernels::ms_deform_attn", "aten::_scaled_dot_product")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Point:
    """One way to run the step."""

    way: str  # of `PUBLIC`, `COMPILED` ..., or a kind of checkpointing
    setting: str  # budget or level
    saved: int  # bytes between forward and backward; inputs, parameters and outputs not
    peak: int  # bytes alive at once, inputs, parameters and gradients included
    flop: int  # of forward and backward together


class Step(nn.Module):
    """The transformer as a function of its feature levels alone; on the meta device, until `to_empty`."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        detector, _ = _built(request, "meta", GPU_BACKEND)
        maps = detector.feature_levels(detector.backbone(torch.empty(1, 3, *request.image, device="meta")))
        self.sizes = [(request.batch, *level.shape[1:]) for level in maps]
        detector.backbone, detector.feature_levels = nn.Identity(), _Given()
        self.detector, self.counts = detector, [request.boxes] * request.batch
        with torch.device("meta"):
            self.register_buffer("padding", torch.empty(request.batch, *request.image, dtype=torch.bool))
            self.register_buffer("labels", torch.empty(sum(self.counts), dtype=torch.int64))
            self.register_buffer("boxes", torch.empty(sum(self.counts), 4))

    def levels(self) -> list[Tensor]:
        return [torch.empty(size, requires_grad=True) for size in self.sizes]

    def forward(self, *levels: Tensor) -> list[Tensor]:
        """Everything that a criterion would take."""
        self.detector.feature_levels.levels = list(levels)
        targets = BoxTargets(self.boxes, self.labels, self.counts) if self.detector.denoising else None
        with self.detector.blocks.backend():
            output = self.detector.transformer([], self.padding, targets)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]


class _Given(nn.Module):
    """Stands for what has run already."""

    levels: Sequence[Tensor] = ()

    def forward(self, _: Any) -> Sequence[Tensor]:
        return self.levels


# ---- operator by operator, as autograd runs them --------------------------------------------------------------------

Change = Callable[[Step], None]


def as_it_runs(way: str, setting: str, request: Request, change: Change = lambda step: None) -> Point:
    """A step without a compiler."""
    counter = FlopCounterMode(display=False)
    _run(request, change, Ledger(), counter)  # its hooks keep tensors alive: bytes are counted in a run without it
    ledger = Ledger()
    return Point(way, setting, _run(request, change, ledger), ledger.peak, counter.get_total_flops())


def _run(request: Request, change: Change, ledger: Ledger, counter: FlopCounterMode | None = None) -> int:
    """Bytes between forward and backward that are neither inputs nor outputs."""
    kernels = rk.backend("reference") if _keeps_all(request) else assumed(GPU_BACKEND)
    step = Step(request)
    change(step)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels, mixed_precision(request.dtype) as autocast:
        step.to_empty(device="cpu")
        levels = step.levels()
        ledger.count("inputs", *levels, *step.parameters(), *step.buffers())
        gc.collect()
        with counter or nullcontext(), ledger:
            before = ledger.total
            with autocast:
                outputs = step(*levels)
            saved = ledger.total - before - _size(outputs)
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
    return saved


def _keeps_all(request: Request) -> bool:
    return request.public or request.config.detector.memory == "none"


def _size(tensors: Iterable[Any]) -> int:
    """Bytes of their storages, each once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors if isinstance(each, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def checkpointed(*kinds: type[nn.Module], policy: Callable[[str, int], bool] | None = None) -> Change:
    """Runs each such layer again in backward, but for operators that a policy keeps: by name and number of the call."""

    def change(step: Step) -> None:
        for module in step.modules():
            if isinstance(module, kinds):
                module.forward = partial(_checkpoint, policy, module.forward)

    return change


def _checkpoint(policy: Callable[[str, int], bool] | None, forward: Callable[..., Any], *args: Any) -> Any:
    if policy is None:
        return checkpoint(forward, *args, use_reentrant=False)
    seen: Counter[str] = Counter()

    def decide(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = op._schema.name
        seen[name] += 1
        return CheckpointPolicy.MUST_SAVE if policy(name, seen[name]) else CheckpointPolicy.PREFER_RECOMPUTE

    def run(*args: Any) -> Any:
        # A weight that another call has cast already would be cast once more in backward: other operators.
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False):
            return forward(*args)

    contexts = partial(create_selective_checkpoint_contexts, decide, allow_cache_entry_mutation=True)
    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def keeps_gathers(name: str, _: int) -> bool:
    """The outputs of sampling and attention."""
    return name.startswith(GATHERS)


def keeps_products(name: str, _: int) -> bool:
    """Matrix products too."""
    return name.startswith(GATHERS) or name in PRODUCTS


def keeps_every_second_product(name: str, number: int) -> bool:
    """The rule of torchtitan's selective checkpointing."""
    return name.startswith(GATHERS) or (name in PRODUCTS and number % 2 == 1)


def public_points(request: Request) -> Iterator[Point]:
    """The public formulation without a compiler."""
    both = (EncoderLayer, DecoderLayer)
    yield as_it_runs(PUBLIC, "as it is", request)
    yield as_it_runs("checkpointing", "encoder layers", request, checkpointed(EncoderLayer))
    yield as_it_runs("checkpointing", "all layers", request, checkpointed(*both))
    for policy in (keeps_gathers, keeps_every_second_product, keeps_products):
        setting = policy.__name__.replace("_", " ")
        yield as_it_runs("selective checkpointing", setting, request, checkpointed(*both, policy=policy))


# ---- as torch.compile runs them -------------------------------------------------------------------------------------


def compiled_points(way: str, request: Request, budgets: Sequence[float]) -> Iterator[Point]:
    """The joint graph of forward and backward, parted at each budget."""
    step = Step(request).to_empty(device="cpu")  # real, and never touched: the graph's tensors are fake
    step.detector.encoder._grid = grid_of  # as where torch compiles: none is kept from an earlier trace
    with ExitStack() as stack:
        stack.enter_context(rk.backend("reference") if _keeps_all(request) else assumed(GPU_BACKEND))
        stack.enter_context(stack.enter_context(mixed_precision(request.dtype)))
        joint = aot_export_joint_with_descriptors(stack, step, tuple(step.levels())).graph_module
    made = joint.graph.find_nodes(op="output")[0].meta["desc"]
    outputs = next(place for place, each in enumerate(made) if each is None or isinstance(each, GradAOTOutput))
    for budget in budgets:
        graph = copy.deepcopy(joint)
        with functorch_config.patch(activation_memory_budget=budget):
            parts = min_cut_rematerialization_partition(
                graph, None, num_fwd_outputs=outputs, static_lifetime_input_indices=[]
            )
        yield _point_of_graphs(way, f"{budget:g}", *parts, outputs)


def _point_of_graphs(way: str, setting: str, forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> Point:
    """Runs both graphs operator by operator; a tensor is freed after its last use."""
    with FakeTensorMode(), assumed(GPU_BACKEND):
        counter = FlopCounterMode(display=False)
        _run_graphs(forward, backward, outputs, Ledger(), counter)
        ledger = Ledger()
        return Point(
            way, setting, _run_graphs(forward, backward, outputs, ledger), ledger.peak, counter.get_total_flops()
        )


def _run_graphs(
    forward: fx.GraphModule, backward: fx.GraphModule, outputs: int, ledger: Ledger, counter: Any = None
) -> int:
    """The same as `_run`, of two graphs."""
    inputs = [_like(node) for node in forward.graph.find_nodes(op="placeholder")]
    ledger.count("inputs", *inputs)
    gc.collect()
    with counter or nullcontext(), ledger:
        results = fx.Interpreter(forward).boxed_run(list(inputs))
        names = [getattr(node, "name", None) for node in forward.graph.find_nodes(op="output")[0].args[0]]
        kept, results = dict(zip(names[outputs:], results[outputs:], strict=True)), results[:outputs]
        saved = _size([*kept.values(), *inputs, *results]) - _size([*inputs, *results])
        given = [
            kept.pop(node.name) if node.name in kept else _like(node)
            for node in backward.graph.find_nodes(op="placeholder")
        ]
        fx.Interpreter(backward).boxed_run(given)
    return saved


def _like(node: fx.Node) -> Any:
    """A fresh tensor as the one that a placeholder was traced with."""
    value = node.meta["val"]
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)


# ---- the front ------------------------------------------------------------------------------------------------------


def dominating(point: Point, others: Iterable[Point], size: str) -> list[Point]:
    """Those that need no more bytes (`saved` or `peak`) and no more arithmetic, and less of one."""
    here = (getattr(point, size), point.flop)
    at_most = [each for each in others if getattr(each, size) <= here[0] and each.flop <= here[1]]
    return [each for each in at_most if (getattr(each, size), each.flop) != here]


def measured(request: Request, budgets: Sequence[float] = BUDGETS) -> Iterator[Point]:
    """Every point: ours first."""
    for level in LEVELS:
        yield as_it_runs(OURS, level, request.at(level))
    yield from compiled_points(OURS_COMPILED, request.at("fused"), budgets)
    public = replace(request, public=True)
    yield from public_points(public)
    yield from compiled_points(COMPILED, public, budgets)


HEAD = ("way", "setting", "saved for backward, GiB", "peak, GiB", "TFLOP", "dominated by")
SHOWN_BUDGETS = ("1", "0.75", "0.5", "0.25", "0.1", "0")


def _cells(point: Point, points: Sequence[Point]) -> list[str]:
    rivals = [each for each in points if each.way not in (OURS, OURS_COMPILED)]
    found = dominating(point, rivals, "peak") if point.way == OURS else []
    by = ", ".join(f"{each.way} {each.setting}" for each in found) or ("nothing" if point.way == OURS else "")
    sizes = [f"{size / GIB:.2f}" for size in (point.saved, point.peak)]
    return [point.way, point.setting, *sizes, f"{point.flop / TERA:.2f}", by]


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/counted.md."""
    points = [Point(**point) for point in results["points"]]
    rivals = [each for each in points if each.way not in (OURS, OURS_COMPILED)]
    ours = [each for each in points if each.way == OURS and each.setting != "none"]
    shown = [each for each in points if each.way not in (COMPILED, OURS_COMPILED) or each.setting in SHOWN_BUDGETS]
    by_saved = {each.setting: dominating(each, rivals, "saved") for each in ours}
    worse = ", ".join(
        f"`{level}` by {', '.join(f'{r.way} {r.setting}' for r in by)}" for level, by in by_saved.items() if by
    )
    compiled = [each for each in points if each.way == OURS_COMPILED]
    own = ", ".join(f"`{each.setting}`" for each in ours if dominating(each, compiled, "peak"))
    curve = [each for each in points if each.way == COMPILED]
    least = min(curve, key=lambda each: each.peak)
    end = min(curve, key=lambda each: float(each.setting))
    words = (
        f"{results['preset']}, batch {results['batch']}, {results['image'][0]} x {results['image'][1]}, "
        f"{results['dtype']}: one step of the transformer on the neck's outputs, without the criterion. A level is "
        "dominated where a way of the public formulation has no higher peak and no more arithmetic. "
        f"By bytes saved for backward alone: {worse or 'nothing is dominated'}. "
        f"Level `fused` under the budget, compiled, is ahead of {own or 'no level'} in both. "
        f"The budget's peak is lowest at {least.setting} ({least.peak / GIB:.2f} GiB); at {end.setting} it saves "
        f"{end.saved / GIB:.2f} GiB and its peak is {end.peak / GIB:.2f} GiB, as backward begins with all of forward."
    )
    return counted.section(NAME, results, [words, (HEAD, [_cells(each, points) for each in shown])])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Peak and saved bytes over arithmetic, a line for each way."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    points = [Point(**point) for point in results["points"]]
    for axes, size in zip(figure.subplots(1, 2), ("peak", "saved"), strict=True):
        for way in dict.fromkeys(each.way for each in points):
            of_way = [each for each in points if each.way == way and each.setting != "none"]
            style = {"marker": "o" if way == OURS else "x", "lw": 2 if way == OURS else 1}
            axes.plot(
                [each.flop / TERA for each in of_way],
                [getattr(each, size) / GIB for each in of_way],
                label=way,
                **style,
            )
            for each in of_way if way == OURS else ():
                axes.annotate(each.setting, (each.flop / TERA, getattr(each, size) / GIB), fontsize=8)
        axes.set(xlabel="TFLOP of forward and backward", ylabel=f"{size}, GiB", ylim=(0, None))
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes memory_front.json and its picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory-front", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="dino-r50", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--image", type=image_size, default=(800, 1333), metavar="HxW", help="(default: 800x1333)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of autocast (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder (default: {counted.COUNTED.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    dtype = getattr(torch, DTYPES[args.dtype])
    request = Request(preset(args.preset), args.batch, args.image, dtype, "transformer")
    points = []
    for point in tqdm(measured(request), desc="ways to run a step", unit="way", leave=False, disable=None):
        points.append(point)
    found = {"preset": args.preset, "batch": args.batch, "image": args.image, "dtype": args.dtype}
    results = counted.write(NAME, {**found, "points": [asdict(point) for point in points]}, args.out)
    draw(results, (args.out or counted.COUNTED) / PICTURE)
    print(aligned(HEAD, [_cells(point, points) for point in points]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
