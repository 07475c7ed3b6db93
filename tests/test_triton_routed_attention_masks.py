"""Masks and key ranges of routed attention in Triton, in the interpreter where there is no GPU: tiles are 16 x 16."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import check_accuracy, converted, outcome, routed_attention_arguments

pytest.importorskip("triton")

runs, reason = rk.can_run("routed_attention", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def on_triton(**arguments):
    with rk.backend("triton"):
        return rk.routed_attention(**arguments)


def check(arguments):
    check_accuracy("routed_attention", arguments, on_triton)


B, H, N, M = 2, 2, 17, 20
MASK_SHAPES = [(), (M,), (N, 1), (N, M), (H, 1, M), (B, 1, 1, M), (B, 1, N, 1), (1, H, N, M), (B, H, N, M)]


def masked_arguments(dtype=torch.float32, **masks):
    return {**routed_attention_arguments(batch=B, heads=H, queries=N, keys=M, dtype=dtype), **masks}


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("bool_mask", [True, False], ids=["bool", "float"])
def test_mask_broadcasts(shape, bool_mask):
    mask = torch.randn(shape)
    mask = mask < 0.4 if bool_mask else mask.masked_fill(mask > 1.0, -math.inf) if M in shape else mask
    check(masked_arguments(attn_mask=mask))


@pytest.mark.parametrize("bool_mask", [True, False], ids=["bool", "float"])
def test_mask_of_every_head_of_an_odd_number(bool_mask):
    mask = torch.randn(3, 17, 18)
    arguments = routed_attention_arguments(batch=1, heads=3, queries=17, keys=18)
    check({**arguments, "attn_mask": mask > 0 if bool_mask else mask})


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mask_of_any_floating_dtype(mask_dtype):
    check(masked_arguments(attn_mask=torch.randn(N, M).to(mask_dtype)))


@pytest.mark.parametrize("bool_mask", [True, False], ids=["bool", "float"])
def test_mask_of_any_strides(bool_mask):
    for mask in (torch.randn(H, M, N).transpose(1, 2), torch.randn(B, 1, N + 3, 2 * M)[:, :, 3:, ::2]):
        assert not mask.is_contiguous()
        check(masked_arguments(attn_mask=mask > 0 if bool_mask else mask))


def random_ranges(*shape):
    return torch.randint(-20, M + 20, (*shape, 2, 2)).int()  # also reversed, overlapping and beyond both ends


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(N,), (B, N)], ids=["shared", "per image"])
def test_key_ranges(shape, dtype):
    check(masked_arguments(dtype, key_ranges=random_ranges(*shape)))


def test_key_ranges_of_any_strides():
    check(masked_arguments(key_ranges=random_ranges(2 * N, B).transpose(0, 1)[:, ::2]))


@pytest.mark.parametrize("mask", [torch.rand(B, H, N, M) > 0.5, torch.randn(B, 1, 1, M)], ids=["bool", "float"])
def test_both_masks_must_be_passed(mask):
    check(masked_arguments(attn_mask=mask, key_ranges=random_ranges(B, N)))


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("key", [0, 15, 16, M - 1])
def test_one_visible_key_at_the_edge_of_a_tile(key, interval):
    ranges = torch.zeros(N, 2, 2, dtype=torch.int32)
    ranges[:, interval] = torch.tensor([key, key + 1])
    arguments = masked_arguments(key_ranges=ranges)
    grad_output = torch.randn(B, H, N, 8)
    results = outcome(on_triton, arguments, grad_output)
    torch.testing.assert_close(results["output"], arguments["value"][:, :, key : key + 1].expand(-1, -1, N, -1))
    expected = torch.zeros(B, H, M, 8)
    expected[:, :, key] = grad_output.sum(dim=2)
    torch.testing.assert_close(results["grad value"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "intervals swapped"])
def test_tiles_that_no_query_sees_are_not_read(swapped):
    """Three groups that see themselves and the last part; NaN in a tile that is computed would reach everything."""
    size, groups = 16, 3
    total = (groups + 1) * size
    ranges = torch.zeros(total, 2, 2, dtype=torch.int32)
    starts = torch.arange(groups).repeat_interleave(size) * size
    ranges[: groups * size, 0] = torch.stack([starts, starts + size], dim=-1).int()
    ranges[:, 1] = torch.tensor([groups * size, total])
    ranges = ranges.flip(1) if swapped else ranges
    arguments = routed_attention_arguments(batch=1, heads=1, queries=total, routed=False)
    grad_output = torch.randn(arguments["query"].shape)
    expected = outcome(on_triton, {**arguments, "key_ranges": ranges}, grad_output)
    check({**arguments, "key_ranges": ranges})

    hidden = slice(size, 2 * size)  # the second group, as keys of all others
    poisoned = converted(arguments, torch.float32)
    with torch.no_grad():
        poisoned["value"][:, :, hidden] = math.nan
        grad_output = grad_output.clone()
        grad_output[:, :, hidden] = math.nan
    results = outcome(on_triton, {**poisoned, "key_ranges": ranges}, grad_output)
    others = [i for i in range(total) if not size <= i < 2 * size]
    own = [i for i in others if i < groups * size]  # keys of the last part meet the poisoned queries
    assert torch.equal(results["output"][:, :, others], expected["output"][:, :, others])
    assert torch.equal(results["grad query"][:, :, others], expected["grad query"][:, :, others])
    for name in ("grad key", "grad value"):
        assert torch.equal(results[name][:, :, own], expected[name][:, :, own]), name


def hide(how, rows):
    """Masks that leave no key to the queries where `rows` [N] is True."""
    ranges = torch.tensor([[0, M], [0, 0]], dtype=torch.int32).repeat(N, 1, 1)
    may_attend = (~rows).unsqueeze(1).expand(N, M)
    if how == "bool":
        return {"attn_mask": may_attend}
    if how == "float":
        return {"attn_mask": torch.zeros(N, M).masked_fill(~may_attend, -math.inf)}
    if how == "ranges":
        return {"key_ranges": ranges.masked_fill(rows[:, None, None], 7)}
    first_half = torch.arange(M) < M // 2
    ranges[rows] = torch.tensor([[M // 2, M], [M, M]], dtype=torch.int32)
    return {"attn_mask": first_half.expand(N, M) | may_attend, "key_ranges": ranges}


@pytest.mark.parametrize("how", ["bool", "float", "ranges", "both"])
@pytest.mark.parametrize("rows", [torch.arange(N) % 5 == 0, torch.ones(N, dtype=torch.bool)], ids=["some", "all"])
def test_rows_with_no_key_give_zero_and_zero_gradients(rows, how):
    arguments = masked_arguments(**hide(how, rows))
    results = outcome(on_triton, arguments, torch.randn(B, H, N, 8))
    for name in ("output", "grad query"):
        assert (results[name][:, :, rows] == 0).all(), name
    for name in ("grad routing.sup_q", "grad routing.del_q", "grad routing.gate_q"):
        assert (results[name][:, rows] == 0).all(), name
    assert all(tensor.isfinite().all() for tensor in results.values())
    if rows.all():
        assert all((tensor == 0).all() for tensor in results.values())
    else:
        check(arguments)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["bool", "ranges"])
def test_poison_in_hidden_keys_does_not_reach_the_output(how, poison):
    seen = M - 3
    ranges = torch.tensor([[0, 5], [5, seen]], dtype=torch.int32).repeat(N, 1, 1)
    masks = {"attn_mask": torch.arange(M) < seen} if how == "bool" else {"key_ranges": ranges}
    clean = masked_arguments(**masks)
    poisoned = converted(clean, torch.float32)
    routing = poisoned["routing"]
    with torch.no_grad():
        for tensor in (poisoned["key"], routing.sup_k, routing.del_k, routing.gate_k):
            tensor[..., seen:, :] = poison
        torch.testing.assert_close(on_triton(**poisoned), on_triton(**clean), rtol=0, atol=0)
