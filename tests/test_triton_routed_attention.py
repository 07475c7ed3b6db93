"""Routed attention in Triton, in the interpreter where there is no GPU, against the reference in float64.

Tiles are 16 x 16 there, of two heads at a time: the shapes are small and leave ragged tiles in every dimension.
"""

import math
from contextlib import ExitStack, contextmanager

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import (
    BAD_INPUTS,
    call,
    check_accuracy,
    converted,
    map_tensors,
    named_tensors,
    outcome,
    routed_attention_arguments,
    sample_arguments,
)

pytest.importorskip("triton")

runs, reason = rk.can_run("routed_attention", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHORT = {"bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {
    "one pair": dict(queries=1, keys=1, channels=1, rank=1, gate_rank=1, heads=1, batch=1),
    "one query": dict(queries=1, keys=33, channels=32, rank=16),
    "one key": dict(queries=17, keys=1, channels=5, rank=2, gate_rank=2, batch=1),
    "15 x 16": dict(queries=15, keys=16, channels=16, rank=16, gate_rank=4, heads=1),
    "16 x 17, odd heads": dict(queries=16, keys=17, channels=17, rank=17, gate_rank=5, heads=3, batch=1),
    "33 x 15": dict(queries=33, keys=15, channels=31, rank=3, gate_rank=1, heads=5, batch=1),
    "long rows": dict(queries=5, keys=18, channels=128, rank=64, gate_rank=32, batch=1),
    "uneven rows": dict(queries=18, keys=5, channels=65, rank=33, gate_rank=31, batch=3, heads=1),
}


def on_triton(**arguments):
    with rk.backend("triton"):
        return rk.routed_attention(**arguments)


def check(arguments):
    check_accuracy("routed_attention", arguments, on_triton)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_output_and_nine_gradients(sizes, dtype):
    check(routed_attention_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("label", ["plain", "unlimited, bool mask", "float mask, ranges, scale"])
def test_samples(label, dtype):
    check(sample_arguments("routed_attention", dtype, batch=1, queries=19)[label])


@pytest.mark.parametrize("limit", [0.0, 0.3, 1e30])
def test_limit(limit):
    check(routed_attention_arguments(batch=1, queries=17, keys=18, limit=limit, dtype=torch.float32))


def test_gradients_pass_a_clamp_that_is_just_reached():
    arguments = routed_attention_arguments(queries=3, keys=4, rank=1, limit=0.0)
    still = map_tensors({"routing": arguments["routing"]}, lambda x: torch.zeros_like(x).requires_grad_())["routing"]
    arguments["routing"] = still._replace(sup_k=torch.ones_like(still.sup_k).requires_grad_())
    grads = outcome(on_triton, arguments, torch.randn(arguments["query"].shape))
    assert (grads["grad routing.sup_q"] != 0).any()  # r = 0 = limit
    check(arguments)


@pytest.mark.parametrize("dtype", SHORT.values(), ids=SHORT)
def test_factors_in_float32_beside_a_short_query(dtype):
    arguments = routed_attention_arguments(
        batch=1, queries=17, keys=18, rank=16, dtype=dtype, factor_dtype=torch.float32
    )
    check(arguments)
    grads = outcome(on_triton, arguments, torch.ones_like(arguments["query"]))
    assert grads["grad query"].dtype == dtype and grads["grad routing.sup_q"].dtype == torch.float32


def test_suppressors_and_delegators_of_different_rank():
    arguments = routed_attention_arguments(batch=1, queries=17, keys=18, rank=3)
    other = routed_attention_arguments(batch=1, queries=17, keys=18, rank=18)["routing"]
    arguments["routing"] = arguments["routing"]._replace(del_q=other.del_q, del_k=other.del_k)
    check(arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scale(scale):
    check({**routed_attention_arguments(batch=1, queries=17, keys=18), "scale": scale})


@contextmanager
def every_launch(**settings):
    """The three kernels with these settings, whatever the table says."""
    from benchmarks.launches import forced

    with ExitStack() as stack:
        for name in ("forward", "backward_queries", "backward_keys"):
            stack.enter_context(forced(f"routed_attention_{name}", {**settings, "num_warps": 4}))
        yield


@pytest.mark.parametrize(
    "settings",
    [
        dict(BLOCK_N=16, BLOCK_M=32, HEADS_PER_PROGRAM=1),
        dict(BLOCK_N=32, BLOCK_M=16, HEADS_PER_PROGRAM=3),
        dict(BLOCK_N=64, BLOCK_M=64, HEADS_PER_PROGRAM=8),
    ],
    ids=str,
)
def test_launches_agree(settings):
    arguments = routed_attention_arguments(queries=33, keys=35, heads=5, batch=1)
    grad_output = torch.randn(arguments["query"].shape)
    expected = outcome(on_triton, arguments, grad_output)
    with every_launch(**settings):
        for name, result in outcome(on_triton, arguments, grad_output).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4, msg=name)


# ---- strides, empty dimensions, memory -----------------------------------------------------------------------------


def transposed(tensor):
    return tensor.mT.contiguous().mT


def sliced(tensor):
    return torch.nn.functional.pad(tensor, (3, 2, 1, 1))[..., 1:-1, 3:-2]


def as_projected(tensor):
    """[B, H, N, D] as a view of [B, N, H, D]; factors unchanged."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("view", [transposed, sliced, as_projected])
def test_views(view):
    arguments = routed_attention_arguments(queries=5, keys=18, dtype=torch.float16)
    viewed = map_tensors(arguments, lambda tensor: view(tensor.detach()).requires_grad_())
    assert any(not tensor.is_contiguous() for _, tensor in named_tensors(viewed))
    grad_output = torch.randn(2, 2, 5, 8)
    expected = outcome(on_triton, arguments, grad_output)
    for name, result in outcome(on_triton, viewed, grad_output).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    "grad_output",
    [torch.ones(()).expand(2, 2, 17, 8), torch.randn(2, 2, 8, 17).mT, torch.randn(2, 17, 2, 8).transpose(1, 2)],
    ids=["one number", "transposed", "as projected"],
)
def test_incoming_gradient_of_any_strides(grad_output):
    arguments = routed_attention_arguments(queries=17, keys=20)
    contiguous = outcome(on_triton, arguments, grad_output.contiguous())
    for name, result in outcome(on_triton, arguments, grad_output).items():
        assert torch.equal(result, contiguous[name]), name


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "rank", "gate_rank", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_empty_dimensions(empty, dtype):
    arguments = {**routed_attention_arguments(dtype=dtype, **{"queries": 5, "keys": 7, empty: 0}), "scale": 0.5}
    grad_output = torch.ones_like(arguments["query"])
    results = outcome(on_triton, arguments, grad_output)
    with rk.backend("reference"):
        expected = outcome(rk.routed_attention, converted(arguments, torch.float64), grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name].double(), tensor, rtol=0.02, atol=0.02)


GUARD = 64  # elements before and after a buffer


@contextmanager
def guarded_allocations(monkeypatch):
    """Every new tensor is the middle of a NaN-filled buffer; yields the buffers, whose ends must stay NaN."""
    from route_kernels.triton.routed_attention import host

    buffers = []

    def new_empty(self, shape, dtype=None, **options):
        if options:  # the interpreter's own
            return torch.empty(shape, dtype=dtype or self.dtype, **options)
        buffer = torch.full((math.prod(shape) + 2 * GUARD,), math.nan, dtype=dtype or self.dtype)
        buffers.append(buffer)
        return buffer[GUARD : buffer.numel() - GUARD].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(host, "contiguous_like", lambda x: new_empty(x, x.shape))
        yield buffers


@pytest.mark.parametrize("routed", [True, False], ids=["routed", "plain"])
@pytest.mark.parametrize("rows", [(17, 18), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_element_of_poisoned_outputs_is_written_and_nothing_beside(rows, routed, dtype, monkeypatch):
    from route_kernels.triton import routed_attention as kernels

    arguments = routed_attention_arguments(
        batch=1, heads=3, queries=rows[0], keys=rows[1], channels=7, rank=3, routed=routed, dtype=dtype
    )
    grad_output = torch.randn(arguments["query"].shape).to(dtype)
    expected = outcome(on_triton, arguments, grad_output)
    query, key, value, *factors = (tensor.detach() for _, tensor in named_tensors(arguments))
    settings = ([query, key, value], factors, None, None, (7**-0.5, 1.0, 5.0))
    with guarded_allocations(monkeypatch) as buffers:
        output, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        kernels.forward(*settings, [output, lse])
        grads = [x.new_empty(x.shape) for x in (query, key, value, *factors)]
        kernels.backward(grad_output, [output, lse], *settings, grads)
    assert len(buffers) >= 2 + len(grads) and not lse.isnan().any()
    for (name, wanted), written in zip(expected.items(), (output, *grads), strict=True):
        assert torch.equal(written, wanted), name  # NaN equals nothing
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


def test_nothing_of_queries_times_keys_is_allocated(monkeypatch):
    from route_kernels.triton import routed_attention as kernels

    queries = 128
    arguments = routed_attention_arguments(batch=1, heads=3, queries=queries, channels=2, rank=2, gate_rank=1)
    query, key, value, *factors = (tensor.detach() for _, tensor in named_tensors(arguments))
    settings = ([query, key, value], factors, None, None, (0.5, 1.0, 5.0))
    with every_launch(BLOCK_N=64, BLOCK_M=64, HEADS_PER_PROGRAM=2), guarded_allocations(monkeypatch) as buffers:
        output, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
        kernels.forward(*settings, [output, lse])
        kernels.backward(query, [output, lse], *settings, [x.new_empty(x.shape) for x in (query, key, value, *factors)])
    assert len(buffers) >= 2 + 9 + 1
    assert sum(buffer.numel() - 2 * GUARD for buffer in buffers) < queries * queries / 2


def test_backward_keeps_inputs_output_and_lse_and_nothing_else():
    arguments = routed_attention_arguments(queries=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = on_triton(**arguments)
    inputs = {tensor.data_ptr() for _, tensor in named_tensors(arguments)}
    beyond = [tensor for tensor in kept if tensor.data_ptr() not in inputs | {output.data_ptr()}]
    assert [tensor.shape for tensor in beyond] == [output.shape[:3]]  # lse


def test_repeats_bit_for_bit():
    arguments = routed_attention_arguments(batch=1, queries=17, keys=18, heads=3)
    grad_output = torch.randn(arguments["query"].shape)
    first = outcome(on_triton, arguments, grad_output)
    for name, result in outcome(on_triton, arguments, grad_output).items():
        assert torch.equal(result, first[name]), name


# ---- large numbers, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_of_ten_thousands_do_not_overflow(dtype, limit):
    arguments = routed_attention_arguments(batch=1, queries=9, keys=40, limit=limit, dtype=dtype)
    larger = map_tensors(arguments, lambda tensor: (tensor.detach() * 64).requires_grad_())
    larger["value"] = arguments["value"]
    results = outcome(on_triton, larger, torch.randn(1, 2, 9, 8))
    assert all(tensor.isfinite().all() for tensor in results.values())
    with torch.no_grad():
        check(map_tensors(larger, torch.Tensor.detach))  # the output alone


def test_the_running_maximum_moves_from_tile_to_tile():
    arguments = routed_attention_arguments(queries=17, keys=70, batch=1, heads=1, routed=False)
    for mask in (torch.linspace(-100.0, 100.0, 70), torch.linspace(100.0, -100.0, 70)):
        check({**arguments, "attn_mask": mask})


@pytest.mark.parametrize("bad", [bad for bad in BAD_INPUTS if bad.op == "routed_attention"], ids=lambda bad: bad.name)
def test_bad_inputs(bad):
    arguments = bad.arguments()
    judged = (tensor for name, tensor in named_tensors(arguments) if name not in ("attn_mask", "key_ranges"))
    runs, _ = rk.can_run("routed_attention", "triton", *judged)
    error, message = (bad.error, bad.message) if runs else (rk.BackendUnavailableError, "'triton' was requested but")
    with rk.backend("triton"), pytest.raises(error, match=message):
        call(bad.op, arguments)


def test_float64_is_refused_with_the_reason():
    arguments = routed_attention_arguments(queries=3, dtype=torch.float64)
    with pytest.raises(rk.BackendUnavailableError, match=r"takes float16, bfloat16, float32, got torch\.float64"):
        on_triton(**arguments)


@pytest.mark.parametrize("wide", [dict(channels=129), dict(rank=65), dict(gate_rank=65)], ids=str)
def test_wider_rows_are_refused_with_the_reason(wide):
    arguments = routed_attention_arguments(queries=3, **wide)
    (width,) = wide.values()
    with pytest.raises(rk.BackendUnavailableError, match=rf"takes (D up to 128|R and G up to 64), got {width}"):
        on_triton(**arguments)
    assert on_triton(**routed_attention_arguments(queries=1, channels=128, rank=64)).shape[-1] == 128


def test_second_derivatives_are_refused():
    arguments = routed_attention_arguments(queries=3)
    (grad,) = torch.autograd.grad(on_triton(**arguments).sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(grad.sum(), arguments["key"])
