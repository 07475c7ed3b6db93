"""Routed attention against its equations, with tolerances measured on PyTorch's own operators."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import route_kernels as rk
from route_kernels import RoutingFactors
from route_kernels.testing import (
    EAGER,
    check_accuracy,
    converted,
    map_tensors,
    named_tensors,
    outcome,
    routed_attention_arguments,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {  # around tiles of 32 to 256 queries and keys, and around vectors of 2 to 16 lanes
    "one pair": dict(queries=1, keys=1, channels=1, rank=1, gate_rank=1, heads=1, batch=1),
    "one query": dict(queries=1, keys=300, channels=32, rank=16, gate_rank=3),
    "one key": dict(queries=33, keys=1, channels=5, rank=2, gate_rank=2),
    "31 x 32": dict(queries=31, keys=32, channels=2, rank=3, gate_rank=1, heads=3),
    "32 x 31": dict(queries=32, keys=31, channels=3, rank=5, gate_rank=4, heads=1),
    "33 x 255": dict(queries=33, keys=255, channels=7, rank=8, gate_rank=5),
    "32 x 256": dict(queries=32, keys=256, channels=16, rank=16, gate_rank=3),
    "63 x 129": dict(queries=63, keys=129, channels=10, rank=6, gate_rank=3),
    "64 x 128": dict(queries=64, keys=128, channels=11, rank=2, gate_rank=3, heads=3),
    "65 x 127": dict(queries=65, keys=127, channels=31, rank=17, gate_rank=3),
    "129 x 65": dict(queries=129, keys=65, channels=4, rank=4, gate_rank=3),
    "255 x 257": dict(queries=255, keys=257, channels=9, rank=7, gate_rank=3, batch=1),
    "256 x 33": dict(queries=256, keys=33, channels=15, rank=1, gate_rank=32, batch=1),
    "257 x 256": dict(queries=257, keys=256, channels=17, rank=9, gate_rank=2, batch=1, heads=1),
    "300 x 300": dict(queries=300, channels=32, rank=16, gate_rank=3, batch=1, heads=8),
    "long rows": dict(queries=40, keys=70, channels=128, rank=64, gate_rank=32),
    "uneven rows": dict(queries=5, keys=9, channels=127, rank=63, gate_rank=31, batch=3),
    "many keys": dict(queries=3, keys=800, channels=33, rank=4, gate_rank=1, batch=1),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_output_and_nine_gradients(sizes, dtype):
    check_accuracy("routed_attention", routed_attention_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "options",
    [dict(routed=False), dict(limit=None), dict(limit=0.3), dict(limit=1e30)],
    ids=["plain", "no limit", "limit bites", "limit beyond reach"],
)
def test_bias_options(options, dtype):
    check_accuracy("routed_attention", routed_attention_arguments(queries=45, keys=270, dtype=dtype, **options))


@pytest.mark.parametrize(("heads", "queries"), [(2, 64), (8, 300)])
def test_float32_factors_beside_a_bfloat16_query_have_gradients_as_exact_as_flash_attention(heads, queries):
    arguments = routed_attention_arguments(batch=1, heads=heads, queries=queries, channels=32, rank=16, gate_rank=3)
    rounded = map_tensors(arguments, lambda x: x.detach().bfloat16().float().requires_grad_())
    grad_output = torch.randn(1, heads, queries, 32).bfloat16()
    mixed = {name: rounded[name].detach().bfloat16().requires_grad_() for name in ("query", "key", "value")}

    def errors(function, some):
        exact = outcome(function, converted(some, torch.float64), grad_output.double())
        found = outcome(function, some, grad_output)
        return {n: ((found[n].double() - x).norm() / x.norm()).item() for n, x in exact.items() if n != "output"}

    def ours(**arguments):
        with rk.backend("reference" if arguments["query"].dtype == torch.float64 else None):
            return rk.routed_attention(**arguments)

    of_factors = [error for name, error in errors(ours, rounded | mixed).items() if "routing" in name]
    of_flash = errors(scaled_dot_product_attention, mixed)
    assert len(of_factors) == 6 and max(of_factors) < min(2e-3, *of_flash.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_factors_in_float32_beside_a_short_query(dtype):
    arguments = routed_attention_arguments(dtype=dtype, factor_dtype=torch.float32)
    check_accuracy("routed_attention", arguments)
    grads = outcome(rk.routed_attention, arguments, torch.ones_like(arguments["query"]))
    assert grads["grad query"].dtype == dtype and grads["grad routing.sup_q"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_of_the_lowest_number_is_the_mean(mask_dtype, dtype, backend):
    """Models write "hidden" so: all of a row finite gives the mean of what is highest in it, and its gradients."""
    able, reason = rk.can_run("routed_attention", backend, torch.empty(0, dtype=dtype))
    if not able:
        pytest.skip(reason)
    queries, keys, heads, lowest = 6, 70, 2, torch.finfo(mask_dtype).min
    mask = torch.zeros(heads, queries, keys, dtype=mask_dtype)
    mask[:, :4] = lowest
    mask[:, 1, 66:] = 0.0
    mask[:, 2, :33] = -math.inf
    mask[1, 3, 40:] = -1e38  # above the lowest number, and as far from 0
    mask[:, 4] = -math.inf
    mask[:, 5] = -1e9
    ranges = torch.tensor([[0, 69], [0, 0]], dtype=torch.int32).expand(queries, 2, 2)
    arguments = routed_attention_arguments(batch=1, heads=heads, queries=queries, keys=keys, dtype=dtype)
    arguments |= {"attn_mask": mask, "key_ranges": ranges}
    grad_output = torch.randn(arguments["query"].shape)
    with rk.backend(backend):
        results = outcome(rk.routed_attention, arguments, grad_output)
    value = arguments["value"].double()
    attended = [slice(0, 69), slice(66, 69), slice(33, 69), slice(40, 69)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for row in (0, 2):
        mean = value[:, :, attended[row]].mean(dim=2)
        torch.testing.assert_close(results["output"][:, :, row].double(), mean, rtol=tolerance, atol=tolerance)
    of_head = value[:, 1, attended[3]].mean(dim=1)
    if mask_dtype != torch.float64:
        torch.testing.assert_close(results["output"][:, 1, 3].double(), of_head, rtol=tolerance, atol=tolerance)
    assert (results["output"][:, :, 4] == 0).all()
    with rk.backend("reference"):
        expected = outcome(rk.routed_attention, arguments, grad_output)
    for name, result in results.items():
        largest = expected[name].abs().max().double()
        difference = (result.double() - expected[name].double()).abs().max()
        assert difference <= (1e-5 if dtype == torch.float64 else 2 * tolerance) * largest, name


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0])
def test_scale(scale):
    check_accuracy("routed_attention", {**routed_attention_arguments(keys=40), "scale": scale})


def test_reference_equals_the_equations_pair_by_pair():
    limit, scale = 0.5, 0.7
    arguments = routed_attention_arguments(
        batch=1, heads=2, queries=3, keys=4, channels=2, rank=2, gate_rank=2, limit=limit, dtype=torch.float64
    )
    q, k, v, *factors = (tensor.detach()[0].tolist() for _, tensor in named_tensors(arguments))
    sup_q, sup_k, del_q, del_k, gate_q, gate_k = factors

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def bias(i, j):
        p = 1 / (1 + math.exp(-dot(gate_q[i], gate_k[j])))
        r = p * dot(sup_q[i], sup_k[j]) + (1 - p) * dot(del_q[i], del_k[j])
        return min(max(r, -limit), limit)

    def attended(h, i, d):
        weights = [math.exp(scale * dot(q[h][i], k[h][j]) + bias(i, j)) for j in range(4)]
        return sum(w * v[h][j][d] for j, w in enumerate(weights)) / sum(weights)

    expected = [[[attended(h, i, d) for d in range(2)] for i in range(3)] for h in range(2)]
    with rk.backend("reference"):
        output = rk.routed_attention(**arguments, scale=scale)
    torch.testing.assert_close(output[0].detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    written_out = rk.routing_bias(arguments["routing"])[0].detach()
    expected_bias = torch.tensor([[bias(i, j) for j in range(4)] for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(written_out, expected_bias, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(limit, masked):
    arguments = routed_attention_arguments(
        queries=4, keys=3, channels=3, rank=2, gate_rank=2, limit=limit, dtype=torch.float64
    )
    masks = {}
    if masked:
        masks["key_ranges"] = torch.tensor(
            [[[0, 1], [2, 3]], [[0, 3], [0, 0]], [[1, 3], [0, 2]], [[0, 0], [0, 0]]]
        ).int()
        masks["attn_mask"] = torch.tensor([[0.5, -1.0, -math.inf]], dtype=torch.float64)

    def attend(q, k, v, *factors):
        return rk.routed_attention(q, k, v, RoutingFactors(*factors, limit), **masks)

    assert torch.autograd.gradcheck(attend, [tensor for _, tensor in named_tensors(arguments)])


# ---- masks ---------------------------------------------------------------------------------------------------------

B, H, N, M = 2, 3, 70, 270
MASK_SHAPES = [
    (), (M,), (1, M), (N, 1), (N, M), (H, 1, M), (H, N, M), (1, N, M), (B, 1, 1, M), (B, 1, N, 1), (B, 1, N, M),
    (1, H, N, M), (B, H, 1, M), (B, H, N, M), (1, 1, 1, 1),
]  # fmt: skip


def masked_arguments(dtype=torch.float32, **masks):
    return {**routed_attention_arguments(batch=B, heads=H, queries=N, keys=M, dtype=dtype), **masks}


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_mask_broadcasts(shape):
    mask = torch.rand(shape) > 0.4 if shape else torch.tensor(True)
    check_accuracy("routed_attention", masked_arguments(attn_mask=mask))


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_float_mask_broadcasts(shape):
    mask = torch.randn(shape)
    mask = mask.masked_fill(mask > 1.0, -math.inf) if M in shape else mask
    check_accuracy("routed_attention", masked_arguments(attn_mask=mask))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask_dtype", DTYPES.values(), ids=DTYPES)
def test_mask_of_any_floating_dtype(dtype, mask_dtype):
    check_accuracy("routed_attention", masked_arguments(dtype, attn_mask=torch.randn(N, M).to(mask_dtype)))


@pytest.mark.parametrize("bool_mask", [True, False])
def test_mask_of_any_strides(bool_mask):
    mask = torch.randn(H, M, N).transpose(1, 2)
    mask = mask > 0 if bool_mask else mask
    assert not mask.is_contiguous()
    check_accuracy("routed_attention", masked_arguments(attn_mask=mask))
    check_accuracy("routed_attention", masked_arguments(attn_mask=torch.randn(B, H, N + 3, 2 * M)[:, :, 3:, ::2]))


def random_ranges(*shape):
    return torch.randint(-20, M + 20, (*shape, 2, 2)).int()  # also reversed, overlapping and beyond both ends


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(N,), (B, N)], ids=["shared", "per image"])
def test_key_ranges(shape, dtype):
    check_accuracy("routed_attention", masked_arguments(dtype, key_ranges=random_ranges(*shape)))


def test_key_ranges_of_any_strides():
    ranges = random_ranges(2 * N, B).transpose(0, 1)[:, ::2]
    check_accuracy("routed_attention", masked_arguments(key_ranges=ranges))


@pytest.mark.parametrize("mask", [torch.rand(B, H, N, M) > 0.5, torch.randn(B, 1, 1, M)], ids=["bool", "float"])
def test_both_masks_must_be_passed(mask):
    check_accuracy("routed_attention", masked_arguments(attn_mask=mask, key_ranges=random_ranges(B, N)))


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("key", [0, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, M - 1])
def test_one_visible_key_at_the_edge_of_a_tile(key, interval):
    ranges = torch.zeros(N, 2, 2, dtype=torch.int32)
    ranges[:, interval] = torch.tensor([key, key + 1])
    arguments = masked_arguments(key_ranges=ranges)
    grad_output = torch.randn(B, H, N, 8)
    results = outcome(rk.routed_attention, arguments, grad_output)
    torch.testing.assert_close(results["output"], arguments["value"][:, :, key : key + 1].expand(-1, -1, N, -1))
    expected = torch.zeros(B, H, M, 8)
    expected[:, :, key] = grad_output.sum(dim=2)
    torch.testing.assert_close(results["grad value"], expected, rtol=1e-5, atol=1e-5)


def test_denoising_groups_skip_whole_tiles():
    groups, size, matching = 6, 60, 300  # a group sees itself and nothing else; matching queries see matching queries
    starts = torch.arange(groups).repeat_interleave(size) * size
    total = groups * size + matching
    ranges = torch.zeros(total, 2, 2, dtype=torch.int32)
    ranges[: groups * size, 0] = torch.stack([starts, starts + size], dim=-1).int()
    ranges[:, 1] = torch.tensor([groups * size, total])
    arguments = routed_attention_arguments(batch=1, queries=total)
    check_accuracy("routed_attention", {**arguments, "key_ranges": ranges})


def hide(how: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["bool", "float", "ranges", "both"])
@pytest.mark.parametrize("rows", [torch.arange(N) % 5 == 0, torch.ones(N, dtype=torch.bool)], ids=["some", "all"])
def test_rows_with_no_key_give_zero_and_zero_gradients(rows, how, dtype):
    arguments = masked_arguments(dtype, **hide(how, rows))
    results = outcome(rk.routed_attention, arguments, torch.randn(B, H, N, 8))
    for name in ("output", "grad query"):
        assert (results[name][:, :, rows] == 0).all(), name
    for name in ("grad routing.sup_q", "grad routing.del_q", "grad routing.gate_q"):
        assert (results[name][:, rows] == 0).all(), name
    assert all(tensor.isfinite().all() for tensor in results.values())
    if rows.all():
        assert all((tensor == 0).all() for tensor in results.values())
    else:
        check_accuracy("routed_attention", arguments)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["bool", "ranges"])
def test_poison_in_hidden_keys_does_not_reach_the_output(how, poison):
    seen = M - 15
    ranges = torch.tensor([[0, 5], [5, seen]], dtype=torch.int32).repeat(N, 1, 1)
    masks = {"attn_mask": torch.arange(M) < seen} if how == "bool" else {"key_ranges": ranges}
    clean = masked_arguments(torch.float32, **masks)
    poisoned = converted(clean, torch.float32)
    routing = poisoned["routing"]
    with torch.no_grad():
        for tensor in (poisoned["key"], routing.sup_k, routing.del_k, routing.gate_k):
            tensor[..., seen:, :] = poison
        torch.testing.assert_close(rk.routed_attention(**poisoned), rk.routed_attention(**clean), rtol=0, atol=0)


# ---- strides and empty dimensions ----------------------------------------------------------------------------------


def transposed(tensor):
    return tensor.mT.contiguous().mT


def sliced(tensor):
    return torch.nn.functional.pad(tensor, (3, 2, 1, 1))[..., 1:-1, 3:-2]


def as_projected(tensor):
    """[B, H, N, D] as a view of [B, N, H, D]; factors unchanged."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("view", [transposed, sliced, as_projected])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_views(view, dtype):
    arguments = routed_attention_arguments(queries=37, keys=45, dtype=dtype)
    viewed = map_tensors(arguments, lambda tensor: view(tensor.detach()).requires_grad_())
    assert any(not tensor.is_contiguous() for _, tensor in named_tensors(viewed))
    check_accuracy("routed_attention", viewed)
    grad_output = torch.randn(2, 2, 37, 8)
    for name, result in outcome(rk.routed_attention, arguments, grad_output).items():
        assert torch.equal(outcome(rk.routed_attention, viewed, grad_output)[name], result), name


def test_one_tensor_for_every_head_and_image():
    arguments = routed_attention_arguments(batch=1, heads=1, dtype=torch.float64)
    leaf = arguments["key"]
    for function in (rk.routed_attention, EAGER["routed_attention"]):
        output = function(arguments["query"].expand(3, 4, -1, -1), *(leaf.expand(3, 4, -1, -1),) * 2)
        arguments[function] = torch.autograd.grad(output.square().sum(), leaf)[0]
    torch.testing.assert_close(arguments[rk.routed_attention], arguments[EAGER["routed_attention"]])


@pytest.mark.parametrize(
    "grad_output",
    [
        torch.ones(()).expand(B, H, N, 8),
        torch.randn(B, H, 1, 1).expand(B, H, N, 8),
        torch.randn(B, H, 8, N).mT,
        torch.randn(B, N, H, 8).transpose(1, 2),
        torch.randn(B, H, N, 16)[..., ::2],
    ],
    ids=["one number", "per head", "transposed", "as projected", "every second"],
)
def test_incoming_gradient_of_any_strides(grad_output):
    arguments = masked_arguments()
    contiguous = outcome(rk.routed_attention, arguments, grad_output.contiguous())
    for name, result in outcome(rk.routed_attention, arguments, grad_output).items():
        assert torch.equal(result, contiguous[name]), name


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "rank", "gate_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_empty_dimensions(empty, dtype):
    sizes = {"queries": 5, "keys": 7, **{empty: 0}}
    arguments = routed_attention_arguments(dtype=dtype, **sizes)
    results = outcome(rk.routed_attention, arguments, torch.ones_like(arguments["query"]))
    with rk.backend("reference"):
        expected = outcome(
            rk.routed_attention, converted(arguments, torch.float64), torch.ones_like(arguments["query"])
        )
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name].double(), tensor, rtol=0.02, atol=0.02)
    if empty == "keys":
        assert (results["output"] == 0).all()


def test_no_channels_with_a_given_scale():
    arguments = routed_attention_arguments(channels=0)
    assert rk.routed_attention(**arguments, scale=1.0).shape == (2, 2, 33, 0)
    with pytest.raises(ValueError, match="query: expected D >= 1 for the default scale"):
        rk.routed_attention(**arguments)


# ---- large numbers -------------------------------------------------------------------------------------------------


def scaled(arguments, factor):
    """Everything but value `factor` times as large."""
    larger = map_tensors(arguments, lambda tensor: (tensor.detach() * factor).requires_grad_())
    return {**larger, "value": arguments["value"]}


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_peaked_attention(dtype, limit):
    arguments = routed_attention_arguments(queries=40, keys=300, limit=limit, dtype=dtype)
    check_accuracy("routed_attention", scaled(arguments, 2))


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_of_ten_thousands_do_not_overflow(dtype, limit):
    arguments = scaled(routed_attention_arguments(queries=40, keys=300, limit=limit, dtype=dtype), 64)
    results = outcome(rk.routed_attention, arguments, torch.randn(2, 2, 40, 8))
    assert all(tensor.isfinite().all() for tensor in results.values())
    with torch.no_grad():
        check_accuracy("routed_attention", map_tensors(arguments, torch.Tensor.detach))  # the output alone


def test_a_bias_far_below_the_logits_of_other_tiles():
    """The running maximum moves from tile to tile, upwards and by more than exp can hold."""
    arguments = routed_attention_arguments(queries=33, keys=1000, batch=1, routed=False)
    arguments["attn_mask"] = torch.linspace(-300.0, 300.0, 1000)
    check_accuracy("routed_attention", arguments)
    arguments["attn_mask"] = arguments["attn_mask"].flip(0)
    check_accuracy("routed_attention", arguments)
