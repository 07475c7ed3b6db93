"""Routed attention: its equations, masks, large numbers and memory; the matrix has the rest."""

import math
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from matrix import DTYPES, check, each_dtype, each_way, results, running, runs
from saved_tensors import kept_tensors
from torch.nn.functional import scaled_dot_product_attention

import route_kernels as rk
from route_kernels import RoutingFactors
from route_kernels.testing import (
    EAGER,
    call,
    converted,
    map_tensors,
    named_tensors,
    outcome,
    routed_attention_arguments,
)  # fmt: skip

OP = "routed_attention"
each_backend = each_way(OP)
on_triton = pytest.mark.skipif(not runs(OP, "triton"), reason="Triton does not run here")


class Sizes(NamedTuple):
    B: int
    H: int
    N: int
    M: int

    def shape(self, letters):
        """ "B1NM" -> (B, 1, N, M)."""
        return tuple(1 if letter == "1" else getattr(self, letter) for letter in letters)

    def arguments(self, dtype=torch.float32, **masks):
        batch, heads, queries, keys = self
        made = routed_attention_arguments(batch=batch, heads=heads, queries=queries, keys=keys, dtype=dtype)
        return {**made, **masks}

    def random_ranges(self, *shape):
        """Also reversed, overlapping and beyond both ends."""
        return torch.randint(-20, self.M + 20, (*shape, 2, 2)).int()

    def hide(self, how, rows):
        """Masks that leave no key to the queries where `rows` [N] is True."""
        _, _, queries, keys = self
        ranges = torch.tensor([[0, keys], [0, 0]], dtype=torch.int32).repeat(queries, 1, 1)
        may_attend = (~rows).unsqueeze(1).expand(queries, keys)
        if how == "bool":
            return {"attn_mask": may_attend}
        if how == "float":
            return {"attn_mask": torch.zeros(queries, keys).masked_fill(~may_attend, -math.inf)}
        if how == "ranges":
            return {"key_ranges": ranges.masked_fill(rows[:, None, None], 7)}
        first_half = torch.arange(keys) < keys // 2
        ranges[rows] = torch.tensor([[keys // 2, keys], [keys, keys]], dtype=torch.int32)
        return {"attn_mask": first_half.expand(queries, keys) | may_attend, "key_ranges": ranges}


LARGE, SMALL = Sizes(2, 3, 70, 270), Sizes(2, 2, 17, 20)
MASKS = ("", "M", "1M", "N1", "NM", "H1M", "HNM", "1NM", "B11M", "B1N1", "B1NM", "1HNM", "BH1M", "BHNM", "1111")


def sizes_of(way):
    return LARGE if way == "cpu" else SMALL


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
def test_gradcheck_of_a_masked_call(limit):
    arguments = routed_attention_arguments(
        queries=4, keys=3, channels=3, rank=2, gate_rank=2, limit=limit, dtype=torch.float64
    )
    ranges = torch.tensor([[[0, 1], [2, 3]], [[0, 3], [0, 0]], [[1, 3], [0, 2]], [[0, 0], [0, 0]]]).int()
    masks = {"key_ranges": ranges, "attn_mask": torch.tensor([[0.5, -1.0, -math.inf]], dtype=torch.float64)}

    def attend(q, k, v, *factors):
        return rk.routed_attention(q, k, v, RoutingFactors(*factors, limit), **masks)

    assert torch.autograd.gradcheck(attend, [tensor for _, tensor in named_tensors(arguments)])


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


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0])
@each_backend
def test_scale(scale, way):
    check(OP, {**routed_attention_arguments(batch=1, queries=17, keys=40, dtype=torch.float32), "scale": scale}, way)


@each_backend
def test_suppressors_and_delegators_of_different_rank(way):
    arguments = routed_attention_arguments(batch=1, queries=17, keys=18, rank=3)
    other = routed_attention_arguments(batch=1, queries=17, keys=18, rank=18)["routing"]
    arguments["routing"] = arguments["routing"]._replace(del_q=other.del_q, del_k=other.del_k)
    check(OP, arguments, way)


@each_backend
def test_gradients_pass_a_clamp_that_is_just_reached(way):
    arguments = routed_attention_arguments(queries=3, keys=4, rank=1, limit=0.0)
    still = map_tensors({"routing": arguments["routing"]}, lambda x: torch.zeros_like(x).requires_grad_())["routing"]
    arguments["routing"] = still._replace(sup_k=torch.ones_like(still.sup_k).requires_grad_())
    assert (results(OP, arguments, way)["grad routing.sup_q"] != 0).any()  # r = 0 = limit
    check(OP, arguments, way)


def test_no_channels_with_a_given_scale():
    with pytest.raises(ValueError, match="query: expected D >= 1 for the default scale"):
        rk.routed_attention(**routed_attention_arguments(channels=0))


def test_one_tensor_for_every_head_and_image():
    arguments = routed_attention_arguments(batch=1, heads=1, dtype=torch.float64)
    leaf, grads = arguments["key"], []
    for function in (rk.routed_attention, EAGER[OP]):
        output = function(arguments["query"].expand(3, 4, -1, -1), *(leaf.expand(3, 4, -1, -1),) * 2)
        grads += torch.autograd.grad(output.square().sum(), leaf)
    torch.testing.assert_close(*grads)


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("letters", MASKS)
@each_backend
def test_masks_broadcast(letters, kind, way):
    sizes = sizes_of(way)
    mask = torch.randn(sizes.shape(letters))
    if kind == "bool":
        mask = mask < 0.4 if letters else torch.tensor(True)
    elif "M" in letters:
        mask = mask.masked_fill(mask > 1.0, -math.inf)
    check(OP, sizes.arguments(attn_mask=mask), way)


@pytest.mark.parametrize("kind", ["bool", "float"])
@each_backend
def test_mask_of_every_head_of_an_odd_number(kind, way):
    mask = torch.randn(3, 17, 18)
    arguments = routed_attention_arguments(batch=1, heads=3, queries=17, keys=18)
    check(OP, {**arguments, "attn_mask": mask > 0 if kind == "bool" else mask}, way)


@each_dtype
@pytest.mark.parametrize("mask_dtype", DTYPES.values(), ids=DTYPES)
@each_backend
def test_mask_of_any_floating_dtype(dtype, mask_dtype, way):
    if runs(OP, way, dtype) and (way == "cpu" or torch.float32 in (dtype, mask_dtype)):
        sizes = sizes_of(way)
        check(OP, sizes.arguments(dtype, attn_mask=torch.randn(sizes.shape("NM")).to(mask_dtype)), way)


@pytest.mark.parametrize("kind", ["bool", "float"])
@each_backend
def test_masks_of_any_strides(kind, way):
    sizes = sizes_of(way)
    batch, heads, queries, keys = sizes
    for mask in (torch.randn(heads, keys, queries).mT, torch.randn(batch, 1, queries + 3, 2 * keys)[:, :, 3:, ::2]):
        assert not mask.is_contiguous()
        check(OP, sizes.arguments(attn_mask=mask > 0 if kind == "bool" else mask), way)
    ranges = sizes.random_ranges(2 * queries, batch).transpose(0, 1)[:, ::2]
    check(OP, sizes.arguments(key_ranges=ranges), way)


@each_dtype
@pytest.mark.parametrize("letters", ["N", "BN"], ids=["shared", "per image"])
@each_backend
def test_key_ranges(letters, dtype, way):
    if runs(OP, way, dtype):
        sizes = sizes_of(way)
        check(OP, sizes.arguments(dtype, key_ranges=sizes.random_ranges(*sizes.shape(letters))), way)


@pytest.mark.parametrize("kind", ["bool", "float"])
@each_backend
def test_both_masks_must_be_passed(kind, way):
    sizes = sizes_of(way)
    mask = torch.rand(sizes) > 0.5 if kind == "bool" else torch.randn(sizes.shape("B11M"))
    check(OP, sizes.arguments(attn_mask=mask, key_ranges=sizes.random_ranges(*sizes.shape("BN"))), way)


EDGES = {"cpu": [0, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 269], "triton": [0, 15, 16, 19]}


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("way, key", [(way, key) for way in EDGES if runs(OP, way) for key in EDGES[way]])
def test_one_visible_key_at_the_edge_of_a_tile(way, key, interval):
    batch, heads, queries, keys = sizes = sizes_of(way)
    ranges = torch.zeros(queries, 2, 2, dtype=torch.int32)
    ranges[:, interval] = torch.tensor([key, key + 1])
    arguments = sizes.arguments(key_ranges=ranges)
    grad_output = torch.randn(batch, heads, queries, 8)
    found = results(OP, arguments, way, grad_output)
    torch.testing.assert_close(found["output"], arguments["value"][:, :, key : key + 1].expand(-1, -1, queries, -1))
    expected = torch.zeros(batch, heads, keys, 8)
    expected[:, :, key] = grad_output.sum(dim=2)
    torch.testing.assert_close(found["grad value"], expected, rtol=1e-5, atol=1e-5)


def groups_of_denoising(groups, size, matching):
    """Key ranges: a group sees itself and the last part, matching queries see matching queries alone."""
    starts = torch.arange(groups).repeat_interleave(size) * size
    total = groups * size + matching
    ranges = torch.zeros(total, 2, 2, dtype=torch.int32)
    ranges[: groups * size, 0] = torch.stack([starts, starts + size], dim=-1).int()
    ranges[:, 1] = torch.tensor([groups * size, total])
    return ranges


def test_denoising_groups_skip_whole_tiles():
    arguments = routed_attention_arguments(batch=1, queries=660)
    check(OP, {**arguments, "key_ranges": groups_of_denoising(6, 60, 300)}, "cpu")


@on_triton
@pytest.mark.parametrize("swapped", [False, True], ids=["", "intervals swapped"])
def test_tiles_that_no_query_sees_are_not_read(swapped):
    """NaN in a tile that is computed would reach everything."""
    size, groups = 16, 3
    ranges = groups_of_denoising(groups, size, size)
    ranges = ranges.flip(1) if swapped else ranges
    arguments = {**routed_attention_arguments(batch=1, heads=1, queries=4 * size, routed=False), "key_ranges": ranges}
    grad_output = torch.randn(arguments["query"].shape)
    expected = results(OP, arguments, "triton", grad_output)
    check(OP, arguments, "triton")
    hidden = slice(size, 2 * size)  # the second group, as keys of all others
    poisoned = converted(arguments, torch.float32)
    with torch.no_grad():
        poisoned["value"][:, :, hidden] = math.nan
        grad_output[:, :, hidden] = math.nan
    found = results(OP, poisoned, "triton", grad_output)
    others = [i for i in range(4 * size) if not size <= i < 2 * size]
    own = [i for i in others if i < groups * size]  # keys of the last part meet the poisoned queries
    for name, rows in {"output": others, "grad query": others, "grad key": own, "grad value": own}.items():
        assert torch.equal(found[name][:, :, rows], expected[name][:, :, rows]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["bool", "float", "ranges", "both"])
@pytest.mark.parametrize("every", [5, 1], ids=["some", "all"])
@each_backend
def test_rows_with_no_key_give_zero_and_zero_gradients(every, how, dtype, way):
    sizes = sizes_of(way)
    rows = torch.arange(sizes.N) % every == 0
    arguments = sizes.arguments(dtype, **sizes.hide(how, rows))
    found = results(OP, arguments, way)
    for name in ("output", "grad query"):
        assert (found[name][:, :, rows] == 0).all(), name
    for name in ("grad routing.sup_q", "grad routing.del_q", "grad routing.gate_q"):
        assert (found[name][:, rows] == 0).all(), name
    assert all(tensor.isfinite().all() for tensor in found.values())
    if rows.all():
        assert all((tensor == 0).all() for tensor in found.values())
    else:
        check(OP, arguments, way)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["bool", "ranges"])
@each_backend
def test_poison_in_hidden_keys_does_not_reach_the_output(how, poison, way):
    sizes = sizes_of(way)
    seen = sizes.M - (15 if way == "cpu" else 3)
    ranges = torch.tensor([[0, 5], [5, seen]], dtype=torch.int32).repeat(sizes.N, 1, 1)
    clean = sizes.arguments(**{"attn_mask": torch.arange(sizes.M) < seen} if how == "bool" else {"key_ranges": ranges})
    poisoned = converted(clean, torch.float32)
    routing = poisoned["routing"]
    with torch.no_grad(), running(way):
        for tensor in (poisoned["key"], routing.sup_k, routing.del_k, routing.gate_k):
            tensor[..., seen:, :] = poison
        assert torch.equal(call(OP, poisoned), call(OP, clean))


@each_dtype
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64], ids=str)
@each_backend
def test_a_row_of_the_lowest_number_is_the_mean(mask_dtype, dtype, way):
    """Models write "hidden" so: all of a row finite gives the mean of what is highest in it, and its gradients."""
    if not runs(OP, way, dtype):
        pytest.skip(f"{way} takes no {dtype}")
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
    found = results(OP, arguments, way, grad_output)
    value = arguments["value"].double()
    attended = [slice(0, 69), slice(66, 69), slice(33, 69), slice(40, 69)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for row in (0, 2):
        mean = value[:, :, attended[row]].mean(dim=2)
        torch.testing.assert_close(found["output"][:, :, row].double(), mean, rtol=tolerance, atol=tolerance)
    of_head = value[:, 1, attended[3]].mean(dim=1)
    if mask_dtype != torch.float64:
        torch.testing.assert_close(found["output"][:, 1, 3].double(), of_head, rtol=tolerance, atol=tolerance)
    assert (found["output"][:, :, 4] == 0).all()
    expected = results(OP, arguments, "reference", grad_output)
    for name, result in found.items():
        largest = expected[name].abs().max().double()
        difference = (result.double() - expected[name].double()).abs().max()
        assert difference <= (1e-5 if dtype == torch.float64 else 2 * tolerance) * largest, name


# ---- large numbers -------------------------------------------------------------------------------------------------


def scaled(arguments, factor):
    """Everything but value `factor` times as large."""
    larger = map_tensors(arguments, lambda tensor: (tensor.detach() * factor).requires_grad_())
    return {**larger, "value": arguments["value"]}


@pytest.mark.parametrize("limit", [None, 5.0])
@each_dtype
@each_backend
def test_logits_of_ten_thousands_do_not_overflow(dtype, limit, way):
    if runs(OP, way, dtype):
        batch, queries, keys = (2, 40, 300) if way == "cpu" else (1, 9, 40)
        given = routed_attention_arguments(batch=batch, queries=queries, keys=keys, limit=limit, dtype=dtype)
        peaked = scaled(given, 64)
        assert all(tensor.isfinite().all() for tensor in results(OP, peaked, way).values())
        with torch.no_grad():
            check(OP, map_tensors(peaked, torch.Tensor.detach), way)  # the output alone
        if way == "cpu":
            check(OP, scaled(given, 2), way)


@each_backend
def test_the_running_maximum_moves_from_tile_to_tile(way):
    """Upwards and downwards, and by more than exp can hold."""
    keys, most = (1000, 300.0) if way == "cpu" else (70, 100.0)
    arguments = routed_attention_arguments(queries=17, keys=keys, batch=1, heads=1, routed=False)
    for mask in (torch.linspace(-most, most, keys), torch.linspace(most, -most, keys)):
        check(OP, {**arguments, "attn_mask": mask}, way)


# ---- memory, launches, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [True, False], ids=["routed", "plain"])
@each_backend
def test_backward_keeps_inputs_output_and_lse_and_nothing_else(routed, way):
    """And lse is a natural logarithm."""
    arguments = routed_attention_arguments(routed=routed)
    with running(way):
        output, kept = kept_tensors(lambda: rk.routed_attention(**arguments))
    inputs = {tensor.data_ptr() for _, tensor in named_tensors(arguments)}
    (lse,) = (tensor for tensor in kept if tensor.data_ptr() not in inputs | {output.data_ptr()})
    assert lse.shape == output.shape[:3] and len(kept) == len(inputs) + 2
    logits = arguments["query"].detach() @ arguments["key"].detach().mT / math.sqrt(output.shape[-1])
    if routed:
        logits += rk.routing_bias(arguments["routing"]).detach()[:, None]
    torch.testing.assert_close(lse, torch.logsumexp(logits, dim=-1))


def every_launch(**settings):
    """The three kernels with these settings, whatever the table says."""
    from benchmarks.launches import forced

    stack = ExitStack()
    for name in ("forward", "backward_queries", "backward_keys"):
        stack.enter_context(forced(f"routed_attention_{name}", {**settings, "num_warps": 4}))
    return stack


@on_triton
@pytest.mark.parametrize("block_n, block_m, heads", [(16, 32, 1), (32, 16, 3), (64, 64, 8)])
def test_launches_agree(block_n, block_m, heads):
    arguments = routed_attention_arguments(queries=33, keys=35, heads=5, batch=1)
    expected = results(OP, arguments, "triton")
    with every_launch(BLOCK_N=block_n, BLOCK_M=block_m, HEADS_PER_PROGRAM=heads):
        for name, result in results(OP, arguments, "triton").items():
            torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@each_backend
def test_nothing_of_queries_times_keys_is_allocated(way):
    queries = 4096 if way == "cpu" else 128
    arguments = routed_attention_arguments(batch=1, heads=1, queries=queries, channels=2, rank=2, gate_rank=1)
    arguments["key_ranges"] = torch.tensor([[0, queries], [0, 0]], dtype=torch.int32).repeat(queries, 1, 1)
    settings = {} if way == "cpu" else dict(BLOCK_N=64, BLOCK_M=64, HEADS_PER_PROGRAM=2)
    with (
        every_launch(**settings) if settings else ExitStack(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        results(OP, arguments, way, torch.ones_like(arguments["query"]))
    allocations = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    assert max(allocations) >= arguments["query"].nbytes, "the profiler saw no allocation of the kernel"
    assert max(allocations) < queries * queries / 2  # bytes: half a bool [N, M]


@on_triton
@pytest.mark.parametrize("wide", [dict(channels=129), dict(rank=65), dict(gate_rank=65), dict(dtype=torch.float64)])
def test_what_triton_does_not_take_is_refused_with_the_reason(wide):
    (width,) = wide.values()
    reason = rf"takes (D up to 128|R and G up to 64|float16, bfloat16, float32), got {width}"
    with rk.backend("triton"), pytest.raises(rk.BackendUnavailableError, match=reason):
        rk.routed_attention(**routed_attention_arguments(queries=3, **wide))
