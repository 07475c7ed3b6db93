"""Levels given as tensors in a graph: one graph for all sizes, one node of ours in it, the numbers of eager mode."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import route_kernels as rk
from route_kernels import backends
from route_kernels.integrations.extension import ms_deform_attn_backward, ms_deform_attn_forward
from route_kernels.nn import MSDeformAttn
from route_kernels.testing import call, map_tensors, ms_deform_attn_arguments, ms_deform_attn_fused_arguments, outcome

SAMPLES = {
    "ms_deform_attn": ms_deform_attn_arguments,
    "ms_deform_attn_fused": ms_deform_attn_fused_arguments,
}
SIZES = (((5, 7), (3, 4)), ((4, 6), (2, 9)), ((8, 3), (1, 5)))
each_op = pytest.mark.parametrize("op", SAMPLES)
each_backend = pytest.mark.parametrize("backend", [None, "reference", "triton"])


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


def skip_unless_it_runs(op, backend):
    runs, reason = rk.can_run(op, backend or "cpu", torch.empty(0))
    if not runs:
        pytest.skip(reason)


def arguments(op, levels, queries=6, counts=None):
    """A small call whose levels, and starts or counts of points, are tensors."""
    packed = {"counts": counts} if op == "ms_deform_attn" else {}
    made = SAMPLES[op](batch=1, queries=queries, levels=levels, **packed)
    if counts is not None:
        made["points"] = torch.tensor(counts)
    elif op == "ms_deform_attn":
        made["level_start_index"] = torch.tensor([0, levels[0][0] * levels[0][1]])
    return {**made, "spatial_shapes": torch.tensor(levels)}


def nodes(graph_modules):
    """The calls of our ops in these graphs."""
    targets = [str(node.target) for module in graph_modules for node in module.graph.nodes]
    return [target for target in targets if target.startswith("route_kernels")]


def assert_same(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


# ---- torch.compile -------------------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize(
    "backend, counts", [(None, None), (None, (3, 1)), ("reference", (3, 1)), ("triton", None)], ids=str
)
def test_one_graph_for_all_sizes(op, backend, counts):
    skip_unless_it_runs(op, backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **given: call(op, given), fullgraph=True, dynamic=True, backend=counter)
    with rk.backend(backend):
        for queries, levels in enumerate(SIZES, start=10):
            given = arguments(op, levels, queries, counts)
            grad_output = torch.randn(call(op, given).shape)
            expected = outcome(lambda **given: call(op, given), given, grad_output)
            assert_same(outcome(compiled, given, grad_output), expected)
    assert counter.frame_count == 1
    assert nodes(counter.graphs) == [f"route_kernels.{op}.tensor"]


@each_op
def test_sizes_made_in_the_graph(op):
    """`torch.tensor` of sizes follows them; PyTorch compiles `torch.as_tensor` of sizes for each of them."""

    def pyramid(maps, **given):
        sizes = torch.tensor([(level.shape[-2], level.shape[-1]) for level in maps], device=maps[0].device)
        starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
        extra = {"level_start_index": starts} if op == "ms_deform_attn" else {}
        return call(op, {**given, "spatial_shapes": sizes, **extra})

    def as_tensor(maps, **given):
        sizes = torch.as_tensor([level.shape[-2:] for level in maps], dtype=torch.long)
        return call(op, {**given, "spatial_shapes": sizes})

    for function in (pyramid, as_tensor):
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for queries, levels in zip((20, 31), (((15, 7), (13, 5)), ((11, 9), (19, 6))), strict=True):
            given = arguments(op, levels, queries)
            torch.testing.assert_close(
                compiled([torch.empty(1, 1, h, w) for h, w in levels], **given), call(op, given), rtol=1e-5, atol=1e-5
            )
        assert set(nodes(counter.graphs)) == {f"route_kernels.{op}.tensor"}
        assert function is as_tensor or counter.frame_count == 1


@pytest.mark.parametrize("tensor", ["spatial_shapes", "level_start_index", "points"])
def test_numbers_and_tensors_together(tensor):
    """One tensor among numbers."""
    op, levels = "ms_deform_attn", SIZES[0]
    given = arguments(op, levels, counts=(3, 1)) | {"level_start_index": torch.tensor((0, 35))}
    given |= {"spatial_shapes": levels, "level_start_index": (0, 35), "points": (3, 1), tensor: given[tensor]}
    compiled = torch.compile(lambda **given: call(op, given), fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), call(op, given), rtol=1e-5, atol=1e-5)


@each_op
def test_autocast(op):
    compiled = torch.compile(lambda **given: call(op, given), fullgraph=True, backend="aot_eager")
    given = arguments(op, SIZES[0])
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = compiled(**given), call(op, given)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


BAD = {
    "sum": ({"spatial_shapes": [[5, 7], [3, 5]]}, "value: expected S = 50 positions, .* got 47"),
    "negative": ({"spatial_shapes": [[5, 7], [-3, -4]]}, r"spatial_shapes: expected sizes >= 0, got \(-3, -4\)"),
    "counts": ({"points": [3, 2]}, r"points: expected counts >= 0 that sum to K=4, got \[3, 2\]"),
}


@each_op
@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_numbers_are_checked_where_the_kernel_runs(op, change, message):
    compiled = torch.compile(lambda **given: call(op, given), fullgraph=True, backend="aot_eager")
    given = arguments(op, SIZES[0], counts=(3, 1))
    compiled(**given)
    bad = given | {name: torch.tensor(numbers) for name, numbers in change.items()}
    for function in (compiled, lambda **given: call(op, given)):
        with pytest.raises(ValueError, match=f"{op}: {message}"):
            function(**bad)
    torch.testing.assert_close(compiled(**given), call(op, given), rtol=1e-5, atol=1e-5)


@each_op
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"spatial_shapes": torch.rand(2, 2)}, TypeError, "spatial_shapes: expected integers, got dtype torch.float32"),
        ({"spatial_shapes": torch.ones(4).long()}, ValueError, r"spatial_shapes: expected shape \[L, 2\], got \[4\]"),
        ({"spatial_shapes": torch.ones(3, 2).long()}, ValueError, "points: expected L=3 counts"),
        ({"points": torch.ones(3).long()}, ValueError, "points: expected L=2 counts like spatial_shapes"),
    ],
)
def test_shapes_and_dtypes_are_checked_while_the_graph_is_made(op, change, error, message):
    mode, given = FakeTensorMode(), arguments(op, SIZES[0], counts=(3, 1)) | change
    with pytest.raises(error, match=f"{op}: {message}"):
        call(op, map_tensors(given, mode.from_tensor))


@each_op
def test_fake_tensors(op):
    given = arguments(op, SIZES[0])
    mode = FakeTensorMode()
    output, shape = call(op, map_tensors(given, mode.from_tensor)), call(op, given).shape
    assert output.shape == shape


@each_op
def test_a_gpu_is_read_once_for_all_calls_of_a_graph(op):
    """And not by each layer: PyTorch makes equal nodes of a graph one. Fake tensors need no GPU."""
    mode, given = FakeTensorMode(allow_non_fake_inputs=True), arguments(op, SIZES[0], counts=(3, 1))

    def layers(*tensors):
        with backends.assumed("cuda"):
            calls = dict(zip(given, tensors, strict=True))
            return sum(call(op, calls | {"value": tensors[0] + layer}) for layer in range(3))

    with mode:
        fakes = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in given.values()]
        graph = fx_graph_cse(make_fx(layers)(*fakes).graph)
    targets = [str(node.target) for node in graph.nodes]
    assert targets.count(f"route_kernels.{op}.tensor") == 3
    assert targets.count("aten._to_copy.default") == 2  # spatial_shapes and points


@each_op
def test_cuda_graphs_leave_it_out(op):
    """A CUDA graph would replay the sizes of its first run."""
    overloads = getattr(torch.ops.route_kernels, op), getattr(torch.ops.route_kernels, f"{op}_backward")
    for overload in overloads:
        assert torch.Tag.cudagraph_unsafe in overload.tensor.tags
        assert torch.Tag.cudagraph_unsafe not in overload.default.tags


# ---- torch.export --------------------------------------------------------------------------------------------------


class Calling(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, given):
        return call(self.op, given)


@each_op
@pytest.mark.parametrize("strict", [False, True])
def test_exported_as_one_node(op, strict):
    given = arguments(op, SIZES[0])
    program = torch.export.export(Calling(op), (given,), strict=strict)
    assert nodes([program.graph_module]) == [f"route_kernels.{op}.tensor"]
    exported = program.module()
    grad_output = torch.randn(call(op, given).shape)
    for backend in (None, "reference"):
        with rk.backend(backend):
            expected = outcome(lambda **given: call(op, given), given, grad_output)
        assert_same(outcome(lambda **given: exported(given), given, grad_output), expected)


def test_exported_for_any_sizes():
    op = "ms_deform_attn"
    given, dynamic = arguments(op, SIZES[0]), torch.export.Dim.DYNAMIC
    dims = {
        name: {1: dynamic} if name in ("value", "sampling_locations", "attention_weights") else None for name in given
    }
    exported = torch.export.export(Calling(op), (given,), dynamic_shapes=(dims,)).module()
    for queries, levels in enumerate(SIZES, start=8):
        given = arguments(op, levels, queries)
        torch.testing.assert_close(exported(given), call(op, given), rtol=1e-5, atol=1e-5)


# ---- modules of ours and of others ---------------------------------------------------------------------------------


class Extension(torch.autograd.Function):
    """How research code calls the compiled extension."""

    @staticmethod
    def forward(ctx, value, sizes, starts, locations, weights):
        ctx.save_for_backward(value, sizes, starts, locations, weights)
        return ms_deform_attn_forward(value, sizes, starts, locations, weights, 64)

    @staticmethod
    def backward(ctx, grad_output):
        value, sizes, starts, locations, weights = ctx.saved_tensors
        grads = ms_deform_attn_backward(value, sizes, starts, locations, weights, grad_output, 64)
        return grads[0], None, None, *grads[1:]


@each_backend
def test_the_extension_of_research_code(backend):
    skip_unless_it_runs("ms_deform_attn", backend)
    given = arguments("ms_deform_attn", SIZES[0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **given: Extension.apply(*given.values()), fullgraph=True, backend=counter)
    with rk.backend(backend):
        grad_output = torch.randn(call("ms_deform_attn", given).shape)
        expected = outcome(lambda **given: call("ms_deform_attn", given), given, grad_output)
        assert_same(outcome(compiled, given, grad_output), expected)
    assert counter.frame_count == 1


def test_our_module():
    module = MSDeformAttn(16, num_levels=2, num_heads=2, num_points=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for queries, levels in enumerate(SIZES, start=8):
        positions = sum(height * width for height, width in levels)
        inputs = torch.randn(2, queries, 16), torch.rand(2, queries, 2, 2), torch.randn(2, positions, 16)
        torch.testing.assert_close(
            compiled(*inputs, torch.tensor(levels)), module(*inputs, levels), rtol=1e-5, atol=1e-5
        )
    assert counter.frame_count == 1


@each_backend
@each_op
def test_levels_on_meta_have_no_numbers_for_a_value_that_has(op, backend):
    skip_unless_it_runs(op, backend)
    made = arguments(op, SIZES[0])
    with rk.backend(backend), pytest.raises(ValueError, match=f"^{op}: spatial_shapes: expected numbers .* on meta"):
        call(op, {**made, "spatial_shapes": made["spatial_shapes"].to("meta")})
