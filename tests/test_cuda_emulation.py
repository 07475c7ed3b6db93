"""The CUDA kernels of deformable attention, run on the CPU over emulated threads that check every access."""

import math
import shutil

import pytest
import torch
from cuda_emulation import ROOT, EmulationError, Kernels, library
from matrix import running

import route_kernels as rk
from route_kernels.testing import (
    check_accuracy,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    named_tensors,
    outcome,
)

ARGUMENTS = {"ms_deform_attn": ms_deform_attn_arguments, "ms_deform_attn_fused": ms_deform_attn_fused_arguments}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEVELS = ((3, 4), (1, 1))
SMALL = dict(levels=LEVELS, batch=1, queries=3)

each_op = pytest.mark.parametrize("op", ARGUMENTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_order = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])


@pytest.fixture(scope="module", autouse=True)
def emulation():
    return library()


def emulated(op, **options):
    return getattr(Kernels(**options), op)


@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64, 128, 256, 7, 300])
@each_dtype
def test_as_accurate_as_eager_for_every_width(dtype, channels):
    plain = ms_deform_attn_arguments(heads=3, points=1, channels=channels, dtype=dtype, **SMALL)
    check_accuracy("ms_deform_attn", plain, emulated("ms_deform_attn"))
    boxes = dict(coordinates=4, reference_levels=2, masked=True)
    fused = ms_deform_attn_fused_arguments(heads=1, points=1, channels=channels, dtype=dtype, **SMALL, **boxes)
    check_accuracy("ms_deform_attn_fused", fused, emulated("ms_deform_attn_fused", deterministic=True))


@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 16, 1), (5, 3, 6), (2, 9, 33)], ids=str)
@each_order
def test_levels_with_any_number_of_points(counts, deterministic):
    arguments = ms_deform_attn_arguments(counts=counts, channels=16, queries=2, batch=1)
    check_accuracy("ms_deform_attn", arguments, emulated("ms_deform_attn", deterministic=deterministic))
    fused = ms_deform_attn_fused_arguments(points=sum(counts), channels=16, queries=2, batch=1)
    fused |= {name: fused[name][:, :, :, : sum(counts)].detach() for name in ("sampling_offsets", "attention_logits")}
    check_accuracy("ms_deform_attn_fused", {**fused, "points": counts}, emulated("ms_deform_attn_fused"))


@pytest.mark.parametrize("points", [100, 800], ids=["smaller blocks", "a warp for each query"])
def test_more_points_than_the_shared_memory_of_a_full_block_holds(points):
    arguments = ms_deform_attn_fused_arguments(
        levels=((3, 4),), points=points, queries=1, batch=1, heads=1, dtype=torch.float64
    )
    check_accuracy("ms_deform_attn_fused", arguments, emulated("ms_deform_attn_fused"))


@each_op
def test_an_encoder_whose_queries_are_the_positions(op):
    levels = ((9, 17), (5, 9), (1, 1))
    positions = sum(height * width for height, width in levels)
    arguments = ARGUMENTS[op](levels=levels, queries=positions, batch=2, heads=1, points=1)
    check_accuracy(op, arguments, emulated(op))


@pytest.mark.parametrize("queries", [65, 129])
def test_more_queries_than_a_block_has(queries):
    arguments = ms_deform_attn_arguments(queries=queries, heads=1, batch=2, levels=((2, 2),), points=1, channels=32)
    check_accuracy("ms_deform_attn", arguments, emulated("ms_deform_attn"))


@pytest.mark.parametrize("channels, together", [(8, 4), (16, 4), (32, 4), (64, 2), (128, 1)])
def test_what_queries_of_a_warp_add_to_one_pixel_is_added_once(channels, together):
    """With a float32 value a warp has 32 / LANES neighbouring queries, in up to 4 sets of up to 4."""
    arguments = ms_deform_attn_arguments(levels=((4, 4),), queries=32, batch=1, heads=1, points=1, channels=channels)
    apart_from_each_other = Kernels()
    locations = torch.rand(1, 32, 1, 1, 1, 2).mul(0.1).add(torch.tensor([0.2, 0.2]))
    locations[:, ::2] += 0.5
    check_accuracy(
        "ms_deform_attn", {**arguments, "sampling_locations": locations}, apart_from_each_other.ms_deform_attn
    )
    same = Kernels()
    locations = torch.rand(1, 32, 1, 1, 1, 2).mul(0.1).add(torch.tensor([0.2, 0.2]))
    check_accuracy("ms_deform_attn", {**arguments, "sampling_locations": locations}, same.ms_deform_attn)
    assert apart_from_each_other.reductions == 32 * 4 * channels // 4
    assert same.reductions * together == apart_from_each_other.reductions


def test_before_sm_90_sums_are_added_one_by_one():
    scalar = library("-DRK_ADDED=1", "-DSIMT_FLOAT32_ONLY")
    for channels in (24, 32):
        arguments = ms_deform_attn_arguments(channels=channels, **SMALL)
        check_accuracy("ms_deform_attn", arguments, emulated("ms_deform_attn", emulation=scalar))


def test_cells_of_64_bits():
    kernels = Kernels(deterministic=True)
    kernels.cell_dtype = torch.int64
    check_accuracy("ms_deform_attn", ms_deform_attn_arguments(**SMALL), kernels.ms_deform_attn)


# ---- strides -----------------------------------------------------------------------------------------------------


def heads_first(value):
    return value.transpose(1, 2).contiguous().transpose(1, 2)


def apart(value, before, after):
    """The same values as rows of channels within longer ones."""
    rows = torch.full((*value.shape[:-1], before + value.shape[-1] + after), math.nan, dtype=value.dtype)
    rows = rows[..., before : before + value.shape[-1]]
    return rows.copy_(value)


@pytest.mark.parametrize(
    "layout",
    [heads_first, lambda x: apart(x, 8, 8), lambda x: apart(x, 1, 2)],
    ids=["heads first", "gaps", "unaligned"],
)
@each_op
def test_strides_of_value_points_and_gradient(op, layout):
    arguments = ARGUMENTS[op](channels=16, **SMALL)
    value = arguments["value"].detach()
    expected = outcome(emulated(op), arguments, torch.ones(()).expand(1, 3, 32))
    strided = {**arguments, "value": layout(value).requires_grad_()}
    for name in ("attention_weights", "attention_logits", "reference_points"):
        if name in arguments:
            strided[name] = apart(arguments[name].detach(), 1, 2).requires_grad_()
    found = outcome(emulated(op), strided, apart(torch.ones(1, 3, 32), 3, 2))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


# ---- edges -------------------------------------------------------------------------------------------------------


def test_infinite_boxes_and_offsets_give_no_nan():
    arguments = ms_deform_attn_fused_arguments(coordinates=4, **SMALL)
    references, offsets = arguments["reference_points"].detach().clone(), arguments["sampling_offsets"].detach().clone()
    references[:, 0, :, 2] = math.inf
    offsets[:, 1, :, 0] = math.nan
    arguments |= {"reference_points": references.requires_grad_(), "sampling_offsets": offsets.requires_grad_()}
    found = outcome(emulated("ms_deform_attn_fused"), arguments, torch.ones(1, 3, 16))
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("limit, what", [
    (dict(levels=((1, 1),) * 33), "32 levels, got 33"),
    (dict(levels=((1, 1),), points=4097), "4096 points of a query and head, got 4097"),
])  # fmt: skip
def test_more_levels_or_points_than_the_kernels_take_are_refused_before_a_launch(limit, what):
    arguments = ms_deform_attn_arguments(**{**SMALL, "points": 1, **limit})
    with pytest.raises(EmulationError, match="refused"):
        emulated("ms_deform_attn")(**arguments)
    with running("emulated"), pytest.raises(RuntimeError, match=f"the CUDA kernel takes at most {what}"):
        rk.ms_deform_attn(**arguments)


@each_op
@pytest.mark.parametrize(
    "empty", [dict(batch=0), dict(queries=0), dict(channels=0), dict(levels=((0, 0), (0, 3)))], ids=str
)
@each_order
def test_empty_inputs(op, empty, deterministic):
    arguments = ARGUMENTS[op](**{**SMALL, **empty})
    kernels = Kernels(deterministic=deterministic)
    output = getattr(kernels, op)(**arguments)
    assert output.eq(0).all()
    assert kernels.launches == (1 if output.numel() else 0)
    output.sum().backward()
    for _, tensor in named_tensors(arguments):
        assert tensor.grad.eq(0).all()


@each_op
def test_deterministic_results_do_not_depend_on_the_order_of_threads(op):
    arguments = ARGUMENTS[op](queries=40, batch=1, heads=1, levels=((2, 2),), points=4, channels=8)
    grad_output = torch.randn(1, 40, 8)
    in_order = outcome(emulated(op, deterministic=True), arguments, grad_output)
    backwards = outcome(emulated(op, deterministic=True, backwards=True), arguments, grad_output)
    for name, tensor in in_order.items():
        assert torch.equal(tensor, backwards[name]), name


# ---- the emulation notices ---------------------------------------------------------------------------------------

MISTAKES = {
    "a corner beyond the level": ("points.cuh", "cell.bottom && cell.right ?", "(cell.bottom && cell.right) || MADE ?"),
    "a wrong stride": ("forward.cuh", "position * rows.stride;", "position * (rows.stride + 16 * MADE);"),
    "a misaligned address": ("points.cuh", "args.value.data) + at * BYTES", "args.value.data) + at * BYTES + 4 * MADE"),
    "another query's row": ("forward.cuh", "work.b * args.N + work.n)", "work.b * args.N + (MADE ? 0 : work.n))"),
    "an output left out": ("forward.cuh", "if (readable[v]) write", "if (readable[v] && !(MADE && lane)) write"),
    "sums beyond the end": ("value_gradient.cuh", "(steps, of_corner), chan", "(steps, MADE ? 3 : of_corner), chan"),
    "no barrier after writing": ("backward.cuh", "__syncwarp();\n      Pro", "if (!MADE) __syncwarp();\n      Pro"),
    "no barrier before writing": ("backward.cuh", "__syncwarp();  // the p", "if (!MADE) __syncwarp();  // the p"),
    "no barrier at the end": ("backward.cuh", "__syncwarp();\n  if", "if (!MADE) __syncwarp();\n  if"),
    "another's shared memory": ("backward.cuh", "grad_weights_at + k * int", "grad_weights_at + (k + MADE) * int"),
    "a shuffle that some skip": ("points.cuh", "if (!args.fused) return", "if (MADE && !work.exists) return"),
}
NOTICED = {
    "a corner beyond the level": "out of bounds",
    "a wrong stride": "of value .*: (out of bounds|between the rows)",
    "a misaligned address": "misaligned",
    "another query's row": "another thread wrote",
    "an output left out": "never written",
    "sums beyond the end": "adds to .* of grad_value_sums .*: out of bounds",
    "no barrier after writing": "reads shared memory .* (never written|wrote with no barrier since)",
    "no barrier before writing": "writes shared memory that thread .* read with no barrier since",
    "no barrier at the end": "reads shared memory that thread .* wrote with no barrier since",
    "another's shared memory": "shared memory at byte",
    "a shuffle that some skip": "wait for others that do not come",
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """The kernels with every mistake, each made where the number `mistake` says so."""
    root = tmp_path_factory.mktemp("mistaken")
    for folder in ("csrc/common", "csrc/ms_deform_attn", "tests/simt"):
        shutil.copytree(ROOT / folder, root / folder)
    for number, (name, right, wrong) in enumerate(MISTAKES.values(), start=1):
        source = root / "csrc/ms_deform_attn" / name
        text = source.read_text()
        assert text.count(right) == 1, f"{right} in {name}"
        source.write_text(text.replace(right, wrong.replace("MADE", f"(mistake == {number})")))
    entry = root / "tests/simt/ms_deform_attn.cpp"
    make = 'm.def("make", [](int number) { mistake = number; });'
    entry.write_text(f"int mistake = 0;\n{entry.read_text()}".replace('m.def("launch"', f'{make}\n  m.def("launch"'))
    return library("-DSIMT_FLOAT32_ONLY", root=root)


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_emulation_notices(mistake, mistaken):
    arguments = ms_deform_attn_fused_arguments(levels=LEVELS, batch=1, queries=7, points=3)
    mistaken.make(0 if mistake is None else 1 + list(MISTAKES).index(mistake))
    run = emulated("ms_deform_attn_fused", emulation=mistaken)
    if mistake is None:
        check_accuracy("ms_deform_attn_fused", arguments, run)
        return
    with pytest.raises(EmulationError, match=NOTICED[mistake]):
        outcome(run, arguments, torch.ones(1, 7, 16))
