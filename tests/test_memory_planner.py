"""The planner: repeatable bytes, the table of memory levels and its targets, workspaces, and the command."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils import _pytree as pytree

import route_kernels as rk
from route_detr import cli
from route_detr.config import preset
from route_detr.memory import command, planner, plot
from route_detr.memory.ledger import Ledger
from route_detr.memory.planner import LEVELS, PARTS, Request, largest_batch, plan
from route_detr.memory.precision import mixed_precision
from route_kernels import backends
from route_kernels.cli import main as route_kernels_main
from route_kernels.ops.workspace import workspace_bytes

GIB = 2**30
SMALLER = {"detector.encoder_layers": 1, "detector.decoder_layers": 2, "detector.num_levels": 3}
TINY = Request(preset("tiny-dino").updated(SMALLER), batch=2, image=(96, 128))


@pytest.fixture(scope="module")
def tiny_plans():
    return {level: plan(TINY.at(level)) for level in ("none", "fused", "lean")}


def test_the_parts_sum_to_the_peak(tiny_plans):
    for level, planned in tiny_plans.items():
        assert tuple(planned.parts) == PARTS
        assert sum(planned.parts.values()) == planned.peak, level
        assert planned.parts["parameters"] > 0 and planned.parts["optimiser"] > 0


def test_levels_cost_products_and_save_memory(tiny_plans):
    none, fused, lean = tiny_plans.values()
    assert none.peak > max(fused.peak, lean.peak)
    assert planner.products(TINY.at("fused")) < planner.products(TINY.at("lean"))


def test_the_peak_is_the_same_in_every_process(tiny_plans):
    command = [sys.executable, "-m", "route_detr", "memory", "--preset", "tiny-dino", "--batch", "2"]
    command += ["--image", "96x128", "--memory", "lean", "--json"]
    command += [f"{key}={value}" for key, value in SMALLER.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"]["lean"] == dataclasses.asdict(tiny_plans["lean"])


def test_backbone_and_optimizer_belong_to_the_whole_step_alone(tiny_plans):
    transformer = plan(dataclasses.replace(TINY.at("fused"), scope="transformer"))
    assert transformer.parts["backbone"] == transformer.parts["optimiser"] == 0
    assert transformer.peak < tiny_plans["fused"].peak


def test_the_auxiliary_branch_has_its_part():
    routed = dataclasses.replace(TINY.at("fused"), scope="transformer")
    plain = dataclasses.replace(routed, config=routed.config.updated({"detector.route": False}))
    assert plan(routed).parts["decoder aux"] > 0 == plan(plain).parts["decoder aux"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return (x + self.last(self.first(self.norm(x)).relu())).square().mean()


def test_the_ledger_counts_what_the_tracker_of_pytorch_counts():
    def step(counter):
        with FakeTensorMode():
            block, x = Block(), torch.empty(8, 100, 64)
            tracked = [*block.parameters(), x]
            counter.count("inputs", *tracked) if isinstance(counter, Ledger) else counter.track_external(*tracked)
            with counter:
                block(x).backward()

    ledger, tracker = Ledger(), MemTracker()
    step(ledger)
    step(tracker)
    assert ledger.peak == tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(ledger.at_peak.values()) == ledger.peak


def test_freed_storages_leave_the_ledger():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        with ledger.labelled("kept"):
            kept = torch.empty(10)
        with ledger.labelled("freed"):
            torch.empty(100).view(10, 10).clone()
    assert ledger.live["kept"] == ledger.total == kept.nbytes
    assert ledger.peak == kept.nbytes + 2 * 400


def test_float32_operators_of_cuda_are_so_in_the_plan_and_nowhere_else():
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    operators = (lambda: nn.functional.layer_norm(x, (4,)), lambda: x.softmax(-1), lambda: x.sum(-1), lambda: x**2)
    with mixed_precision(torch.bfloat16) as autocast, autocast:
        assert {call().dtype for call in operators} == {torch.float32}
        assert (x @ x.T).dtype == torch.bfloat16 and x.softmax(-1, dtype=torch.float64).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.layer_norm(x, (4,)).dtype == torch.bfloat16


def recorded_bytes(entry_point, *arguments):
    """The most that a Triton kernel's host code has allocated at once beside its arguments."""
    pytest.importorskip("triton")
    from benchmarks.launches import recording

    ledger = Ledger()
    ledger.count("inputs", *(x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)))
    with recording("sm90"), ledger:
        entry_point(*arguments)
    return ledger.peak - ledger.live["inputs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspaces_are_what_the_launches_allocate(dtype):
    from route_kernels.triton import ms_deform_attn_fused, query_similarity

    batch, heads, channels, queries, sizes = 2, 4, 16, 10, (6, 5, 3, 2)
    value, grad = (torch.empty(batch, n, heads, channels, dtype=dtype, device="meta") for n in (36, queries))
    offsets, logits = (torch.empty(batch, queries, heads, 8, *x, dtype=dtype, device="meta") for x in ((2,), ()))
    references = torch.empty(batch, queries, 2, 4, device="meta")
    native = (value, (*sizes, 0, 30, 4, 4), references, offsets, logits, None)
    grads = [torch.empty_like(x) for x in (value, offsets, logits)]
    found = recorded_bytes(ms_deform_attn_fused.backward, grad.flatten(2), *native, False, grads)
    op = torch.ops.route_kernels.ms_deform_attn_fused_backward
    for overload, levels in ((op.default, sizes), (op.tensor, torch.tensor(sizes).view(2, 2))):
        arguments = (grad.flatten(2), value, levels, references, offsets, logits, None, None, False, "triton")
        assert found == workspace_bytes(overload, arguments)

    x = torch.empty(batch, queries, 32, dtype=dtype, device="meta")
    found = recorded_bytes(query_similarity.forward, x, x.new_empty(batch, queries))
    assert found == workspace_bytes(torch.ops.route_kernels.query_similarity.default, (x, "relu", None))


def test_the_parts_of_groups_of_heads_are_counted():
    from route_kernels.triton import routed_attention

    batch, heads, queries = 2, 8, 1100
    query, grad = (torch.empty(batch, heads, queries, 32, dtype=torch.bfloat16, device="meta") for _ in range(2))
    factors = tuple(torch.empty(batch, queries, r, dtype=torch.bfloat16, device="meta") for r in (16, 16, 16, 16, 3, 3))
    lse = torch.empty(batch, heads, queries, device="meta")
    grads = [torch.empty_like(x) for x in (query, query, query, *factors)]
    inputs = ([query, query, query], factors, None, None, (1.0, 1.0, math.inf))
    found = recorded_bytes(routed_attention.backward, grad, [grad, lse], *inputs, grads)
    op = torch.ops.route_kernels.routed_attention_backward.default
    at_most = workspace_bytes(op, (grad, grad, lse, query, query, query, factors, 1.0, None, None, None, 1.0))
    assert lse.nbytes < found <= at_most < 2 * heads * found


@pytest.mark.parametrize("scope", [pytest.param("step", marks=pytest.mark.slow), "transformer"])
def test_masks_have_their_share(scope):
    masks = Request(preset("tiny-masks").updated(SMALLER), batch=2, image=(96, 128))
    plain = dataclasses.replace(masks, config=masks.config.updated({"detector.masks": False}))
    with_masks, without = (plan(dataclasses.replace(each, scope=scope)) for each in (masks, plain))
    assert with_masks.peak > without.peak
    assert with_masks.parts["losses"] > without.parts["losses"]
    true = masks.batch * masks.boxes * 96 * 128
    assert with_masks.parts["inputs"] >= without.parts["inputs"] + true


def test_an_assumed_backend_is_asked_of_nobody():
    with FakeTensorMode(), backends.assumed("cuda"):
        x = torch.empty(1, 2, 3, 4)
        assert rk.routed_attention(x, x, x).shape == x.shape
    with pytest.raises(ValueError, match="backend"), backends.assumed("tpu"):
        pass


def test_cards_leave_room():
    assert all(0 < command.usable(card) < size * command.MIB for card, size in command.CARDS.items())


def test_an_unknown_card_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["memory", "--fit", "h1000"])
    assert "h100-80g" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("fixed, each", [(10, 3), (0, 7), (95, 1), (101, 5)])
def test_the_largest_batch_is_found(fixed, each):
    asked = []

    def peak(request):
        asked.append(request.batch)
        return fixed + each * request.batch + request.batch // 5

    found = largest_batch(TINY, 100, peak)
    assert found == max((n for n in range(101) if fixed + each * n + n // 5 <= 100 and n), default=0)
    assert len(asked) < 8


@pytest.mark.parametrize(
    "options, said",
    [
        (["--preset", "dino"], "preset"),
        (["--memory", "small"], "memory"),
        (["--batch", "0"], "batch"),
        (["detector.num_querys=3"], "num_queries"),
        (["--preset", "tiny", "detector.backbone.settings.depth=[1]"], "detector.backbone.settings.depths"),
        (["--preset", "tiny-masks", "--public"], "masks"),
        (["--preset", "tiny", "--batch", "1", "--image", "64x64", "--measure"], "GPU"),
    ],
)
def test_errors_of_the_command(options, said, capsys):
    if options[-1] == "--measure" and torch.cuda.is_available():
        pytest.skip("there is a GPU to measure with")
    assert cli.main(["memory", *options]) == (cli.FAILED if options[-1] == "--measure" else cli.BAD_INPUT)
    assert said in capsys.readouterr().err


def test_the_command_of_the_kernels_says_where_it_is_now(capsys):
    assert route_kernels_main(["memory", "--preset", "dino-r50", "detector.num_queries=300"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "route-detr memory" in line and "route-kernels[detr]" in line


def test_the_command_prints_a_table_and_what_fits(capsys):
    options = ["--preset", "tiny", "--batch", "1", "--image", "64x64", "--memory", "lean", "--scope", "transformer"]
    assert cli.main(["memory", *options]) == 0
    printed = capsys.readouterr().out
    assert "encoder" in printed and "lean" in printed


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", ["public", *LEVELS]),
        ("--preset tiny-masks", list(LEVELS)),  # the public formulation has no masks
        ("--memory lean", ["lean"]),
        ("--memory all", list(LEVELS)),
        ("--public", ["public"]),
    ],
)
def test_the_picture_has_the_rows_of_the_table(tmp_path, capsys, monkeypatch, options, rows):
    drawn = []
    planned = planner.Plan(GIB, {**dict.fromkeys(PARTS, 0), "heads": GIB})
    monkeypatch.setattr(planner, "plan", lambda request: planned)
    monkeypatch.setattr(plot, "_stack", lambda axes, plans: drawn.extend(plans))
    assert cli.main(["memory", "--preset", "tiny", "--plot", str(tmp_path / "memory.png"), *options.split()]) == 0
    assert drawn == rows
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[3 : 3 + len(rows)]] == rows
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_nothing_of_the_picture_lies_over_the_title_of_its_bars():
    axes = Figure(layout="constrained").subplots()
    plot._stack(axes, {"none": planner.Plan(GIB, {**dict.fromkeys(PARTS, 0), "heads": GIB})})
    axes.figure.draw_without_rendering()
    assert max(text.get_window_extent().y1 for text in axes.texts) < axes._left_title.get_window_extent().y0


def test_a_small_step_is_told_in_mebibytes():
    parts = {**dict.fromkeys(PARTS, 0), "heads": 3 * 2**19}
    small, large = planner.Plan(3 * 2**19, parts), planner.Plan(GIB, {**parts, "heads": GIB})
    assert command.table({"lean": small}) == ["MiB   peak  heads", "lean  1.50   1.50"]
    assert command.table({"lean": small, "none": large})[0].split() == ["GiB", "peak", "heads"]


BF16 = Request(preset("dino-r50"), batch=16, scope="transformer")  # 900 + 200 denoising queries
FP32 = Request(preset("deformable-detr-pp-r50"), batch=2, dtype=torch.float32, scope="transformer")  # 300 queries
TARGETS = {  # GiB, of the rows A, D, E and E6 of the anatomy
    "fused": (26.9, 5.16),
    "lean": (12.2, 2.04),
    "tight": (8.8, 1.40),
    "min": (5.8, 0.93),
}


@pytest.mark.parametrize(
    "level", [pytest.param(name, marks=() if name == "lean" else pytest.mark.slow) for name in TARGETS]
)
def test_peaks_meet_their_targets(level):
    for request, target in zip((BF16, FP32), TARGETS[level], strict=True):
        assert plan(request.at(level)).peak <= target * GIB


@pytest.mark.slow
def test_routing_every_layer_costs_little():
    everywhere = dataclasses.replace(BF16, config=BF16.config.updated({"detector.routed_layers": "all"}))
    assert plan(everywhere.at("lean")).peak <= 12.9 * GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_, public_code",
    [
        (
            dataclasses.replace(
                FP32, batch=16, dtype=torch.bfloat16, config=FP32.config.updated({"detector.num_queries": 1100})
            ),
            37.22,
        ),
        (FP32, 5.80),
    ],
    ids=["bf16", "fp32"],
)
def test_the_public_row_is_that_of_the_public_code(request_, public_code):
    peak = plan(dataclasses.replace(request_, public=True)).peak
    assert abs(peak / (public_code * GIB) - 1) <= 0.03
