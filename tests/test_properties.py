"""Properties that hold for any input: symmetries, equalities between forms, linearity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import route_kernels as rk
from route_kernels import RoutingFactors
from route_kernels.reference.routed_attention import visible_keys
from route_kernels.testing import (
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    outcome,
    query_similarity_arguments,
    routed_attention_arguments,
)

few = settings(max_examples=30, deadline=None, derandomize=True)
F64 = torch.float64
CLOSE = dict(rtol=1e-9, atol=1e-9)

sizes = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 3),
        heads=st.integers(1, 4),
        queries=st.integers(1, 140),
        channels=st.integers(1, 20),
        rank=st.integers(0, 9),
        gate_rank=st.integers(0, 5),
        limit=st.sampled_from([None, 0.5, 5.0]),
        seed=st.integers(0, 1000),
    )
)
key_counts = st.integers(1, 300)


def routed(sizes, **options):
    return routed_attention_arguments(dtype=F64, **{**sizes, **options})


def results_of(arguments, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return outcome(
        rk.routed_attention, arguments, torch.randn(arguments["query"].shape, dtype=F64, generator=generator)
    )


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def random_key_ranges(queries, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-5, keys + 5, (queries, 2, 2), generator=generator).int()


# ---- routed attention ----------------------------------------------------------------------------------------------


@few
@given(sizes, key_counts)
def test_reference_and_native_agree_in_float64(sizes, keys):
    arguments = routed(sizes, keys=keys)
    with rk.backend("reference"):
        expected = results_of(arguments)
    assert_same(results_of(arguments), expected)


@few
@given(sizes, key_counts)
def test_the_order_of_keys_does_not_matter(sizes, keys):
    arguments = routed(sizes, keys=keys)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(sizes["seed"]))
    routing = arguments["routing"]
    permuted = {
        **arguments,
        "key": arguments["key"][:, :, order],
        "value": arguments["value"][:, :, order],
        "routing": routing._replace(**{k: getattr(routing, k)[:, order] for k in ("sup_k", "del_k", "gate_k")}),
    }
    torch.testing.assert_close(rk.routed_attention(**permuted), rk.routed_attention(**arguments), **CLOSE)


@few
@given(sizes)
def test_self_attention_is_permutation_equivariant(sizes):
    arguments = routed(sizes)
    order = torch.randperm(sizes["queries"], generator=torch.Generator().manual_seed(sizes["seed"]))
    permuted = {name: tensor[:, :, order] for name, tensor in arguments.items() if name != "routing"}
    permuted["routing"] = RoutingFactors(
        *(factor[:, order] for factor in arguments["routing"][:6]), arguments["routing"].limit
    )
    torch.testing.assert_close(rk.routed_attention(**permuted), rk.routed_attention(**arguments)[:, :, order], **CLOSE)


@few
@given(sizes, key_counts, st.sampled_from([torch.float64, torch.float32]))
def test_without_strength_it_is_plain_attention(sizes, keys, dtype):
    arguments = routed_attention_arguments(keys=keys, dtype=dtype, **sizes)
    routing = arguments.pop("routing")
    zero = RoutingFactors(*(torch.zeros_like(factor) for factor in routing[:4]), *routing[4:6], 0.0)
    expected = F.scaled_dot_product_attention(arguments["query"], arguments["key"], arguments["value"])
    for factors in (None, zero, zero._replace(limit=None)):
        torch.testing.assert_close(rk.routed_attention(**arguments, routing=factors), expected, rtol=1e-4, atol=1e-5)


@few
@given(sizes, key_counts)
def test_equals_attention_with_the_bias_written_out(sizes, keys):
    arguments = routed(sizes, keys=keys)
    bias = rk.routing_bias(arguments["routing"]).unsqueeze(1)
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    torch.testing.assert_close(
        rk.routed_attention(**arguments), F.scaled_dot_product_attention(q, k, v, attn_mask=bias), **CLOSE
    )


@few
@given(sizes, key_counts)
def test_every_head_has_the_same_bias(sizes, keys):
    arguments = routed(sizes, keys=keys)
    together = rk.routed_attention(**arguments)
    for head in range(sizes["heads"]):
        alone = {name: tensor[:, head : head + 1] for name, tensor in arguments.items() if name != "routing"}
        alone = rk.routed_attention(**alone, routing=arguments["routing"])
        torch.testing.assert_close(alone[:, 0], together[:, head], **CLOSE)


@few
@given(sizes, key_counts)
def test_key_ranges_equal_a_bool_mask(sizes, keys):
    arguments = routed(sizes, keys=keys)
    ranges = random_key_ranges(sizes["queries"], keys, sizes["seed"])
    with_mask = results_of({**arguments, "attn_mask": visible_keys(ranges, keys)})
    assert_same(results_of({**arguments, "key_ranges": ranges}), with_mask)


@few
@given(sizes, key_counts, st.booleans())
def test_both_masks_equal_their_intersection(sizes, keys, as_float):
    arguments = routed(sizes, keys=keys)
    ranges = random_key_ranges(sizes["queries"], keys, sizes["seed"])
    mask = torch.rand(sizes["queries"], keys, generator=torch.Generator().manual_seed(sizes["seed"])) > 0.3
    expected = results_of({**arguments, "attn_mask": mask & visible_keys(ranges, keys)})
    if as_float:
        mask = torch.zeros(mask.shape, dtype=F64).masked_fill(~mask, -torch.inf)
    assert_same(results_of({**arguments, "attn_mask": mask, "key_ranges": ranges}), expected)


@few
@given(sizes, key_counts)
def test_hidden_keys_may_as_well_not_be_there(sizes, keys):
    arguments = routed(sizes, keys=keys)
    seen = (keys + 1) // 2
    routing = arguments["routing"]
    shorter = {
        "query": arguments["query"],
        "key": arguments["key"][:, :, :seen],
        "value": arguments["value"][:, :, :seen],
        "routing": routing._replace(**{k: getattr(routing, k)[:, :seen] for k in ("sup_k", "del_k", "gate_k")}),
    }
    ranges = torch.tensor([[0, seen], [0, 0]], dtype=torch.int32).repeat(sizes["queries"], 1, 1)
    torch.testing.assert_close(
        rk.routed_attention(**arguments, key_ranges=ranges), rk.routed_attention(**shorter), **CLOSE
    )


@few
@given(sizes, key_counts, st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(sizes, keys, constant):
    arguments = routed(sizes, keys=keys)
    mask = torch.full((sizes["queries"], 1), constant, dtype=F64)
    assert_same(results_of({**arguments, "attn_mask": mask}), results_of(arguments))


@few
@given(sizes, key_counts)
def test_output_is_linear_in_value(sizes, keys):
    arguments = routed(sizes, keys=keys)
    other = routed(sizes, keys=keys, seed=sizes["seed"] + 1)["value"]
    both = rk.routed_attention(**{**arguments, "value": 2 * arguments["value"] - 3 * other})
    expected = 2 * rk.routed_attention(**arguments) - 3 * rk.routed_attention(**{**arguments, "value": other})
    torch.testing.assert_close(both, expected, **CLOSE)
    ones = rk.routed_attention(**{**arguments, "value": torch.ones_like(other)})
    torch.testing.assert_close(ones, torch.ones_like(ones), **CLOSE)


# ---- query similarity ----------------------------------------------------------------------------------------------


@few
@given(
    st.integers(1, 3), st.integers(1, 300), st.integers(1, 40), st.sampled_from(["relu", "mean"]), st.integers(0, 99)
)
def test_similarity_is_bounded_equivariant_and_blind_to_length(batch, queries, channels, mode, seed):
    x = query_similarity_arguments(batch=batch, queries=queries, channels=channels, dtype=F64, seed=seed)["x"].detach()
    generator = torch.Generator().manual_seed(seed)
    similarity = rk.query_similarity(x, mode)
    assert (similarity <= 1 + 1e-12).all() and (similarity >= (0 if mode == "relu" else -1 - 1e-12)).all()
    order = torch.randperm(queries, generator=generator)
    torch.testing.assert_close(rk.query_similarity(x[:, order], mode), similarity[:, order], **CLOSE)
    lengths = torch.rand(batch, queries, 1, dtype=F64, generator=generator) + 0.1
    torch.testing.assert_close(rk.query_similarity(x * lengths, mode), similarity, **CLOSE)


# ---- deformable attention ------------------------------------------------------------------------------------------

deformable_sizes = st.fixed_dictionaries(
    dict(
        levels=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3).map(tuple),
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        channels=st.integers(1, 20),
        queries=st.integers(1, 20),
        points=st.integers(1, 4),
        seed=st.integers(0, 1000),
    )
)


@few
@given(deformable_sizes)
def test_deformable_attention_is_linear_in_value_and_in_weights(sizes):
    arguments = ms_deform_attn_arguments(dtype=F64, **sizes)
    other = ms_deform_attn_arguments(dtype=F64, **{**sizes, "seed": sizes["seed"] + 1})
    expected = rk.ms_deform_attn(**arguments)
    for name in ("value", "attention_weights"):
        alone = rk.ms_deform_attn(**{**arguments, name: other[name]})
        mixed = rk.ms_deform_attn(**{**arguments, name: 2 * arguments[name] - 3 * other[name]})
        torch.testing.assert_close(mixed, 2 * expected - 3 * alone, **CLOSE)


@few
@given(deformable_sizes)
def test_deformable_attention_moves_with_its_content(sizes):
    """Content and locations moved by one pixel: the same output, where zeros surround the content."""
    arguments = ms_deform_attn_arguments(dtype=F64, **sizes)
    moved_value, moved_locations, start = [], arguments["sampling_locations"].clone(), 0
    value = arguments["value"].detach().clone()
    for level, (height, width) in enumerate(sizes["levels"]):
        pixels = value[:, start : start + height * width].view(sizes["batch"], height, width, *value.shape[2:])
        pixels[:, -1] = 0
        pixels[:, :, -1] = 0
        moved_value.append(F.pad(pixels, (0, 0, 0, 0, 1, 0, 1, 0))[:, :height, :width].flatten(1, 2))
        moved_locations[:, :, :, level] += torch.tensor([1 / width, 1 / height], dtype=F64)
        start += height * width
    expected = rk.ms_deform_attn(**{**arguments, "value": value})
    moved = {"value": torch.cat(moved_value, dim=1), "sampling_locations": moved_locations}
    torch.testing.assert_close(rk.ms_deform_attn(**{**arguments, **moved}), expected, **CLOSE)


@few
@given(deformable_sizes)
def test_deformable_attention_sums_over_points(sizes):
    arguments = ms_deform_attn_arguments(dtype=F64, **sizes)
    order = torch.randperm(sizes["points"], generator=torch.Generator().manual_seed(sizes["seed"]))
    permuted = {
        "sampling_locations": arguments["sampling_locations"][:, :, :, :, order],
        "attention_weights": arguments["attention_weights"][..., order],
    }
    expected = rk.ms_deform_attn(**arguments)
    torch.testing.assert_close(rk.ms_deform_attn(**{**arguments, **permuted}), expected, **CLOSE)
    one_by_one = sum(
        rk.ms_deform_attn(
            arguments["value"],
            sizes["levels"],
            None,
            arguments["sampling_locations"][:, :, :, :, p : p + 1],
            arguments["attention_weights"][..., p : p + 1],
        )
        for p in range(sizes["points"])
    )
    torch.testing.assert_close(one_by_one, expected, **CLOSE)


@few
@given(deformable_sizes, st.sampled_from([2, 4]), st.booleans())
def test_fused_equals_softmax_locations_and_plain(sizes, coordinates, masked):
    fused = ms_deform_attn_fused_arguments(dtype=F64, coordinates=coordinates, masked=masked, **sizes)
    levels, points = sizes["levels"], sizes["points"]
    offsets = fused["sampling_offsets"].unflatten(3, (len(levels), points))
    reference = fused["reference_points"][:, :, None, :, None]
    if coordinates == 2:
        extent = torch.tensor([(width, height) for height, width in levels], dtype=F64)
        locations = reference + offsets / extent[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    weights = fused["attention_logits"].softmax(dim=-1).unflatten(3, (len(levels), points))
    value = fused["value"]
    if masked:
        value = value.masked_fill(fused["value_mask"][:, :, None, None], 0)
    torch.testing.assert_close(
        rk.ms_deform_attn_fused(**fused), rk.ms_deform_attn(value, levels, None, locations, weights), **CLOSE
    )


@few
@given(deformable_sizes)
def test_branches_side_by_side_equal_branches_apart(sizes):
    """Queries of two branches over one value: outputs apart, the value's gradient summed once."""
    arguments = ms_deform_attn_fused_arguments(dtype=F64, **sizes)
    half = sizes["queries"]
    other = ms_deform_attn_fused_arguments(dtype=F64, **{**sizes, "seed": sizes["seed"] + 1})
    per_query = ("reference_points", "sampling_offsets", "attention_logits")
    packed = rk.ms_deform_attn_fused(
        **{**arguments, **{name: torch.cat([arguments[name], other[name]], dim=1) for name in per_query}}
    )
    apart = [
        rk.ms_deform_attn_fused(**arguments),
        rk.ms_deform_attn_fused(**{**arguments, **{name: other[name] for name in per_query}}),
    ]
    torch.testing.assert_close(packed[:, :half], apart[0], **CLOSE)
    torch.testing.assert_close(packed[:, half:], apart[1], **CLOSE)
    (grad_packed,) = torch.autograd.grad(packed.square().sum(), arguments["value"])
    (grad_apart,) = torch.autograd.grad(sum(x.square().sum() for x in apart), arguments["value"])
    torch.testing.assert_close(grad_packed, grad_apart, **CLOSE)


@pytest.mark.parametrize("level", [(1, 1), (3, 5)], ids=str)
def test_a_constant_image_gives_the_constant_inside(level):
    height, width = level
    value = torch.full((1, height * width, 1, 1), 3.0)
    x, y = torch.rand(2, 50) * torch.tensor([[width - 1.0], [height - 1.0]])
    locations = torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1).view(1, 50, 1, 1, 1, 2)
    output = rk.ms_deform_attn(value, (level,), None, locations, torch.ones(1, 50, 1, 1, 1))
    torch.testing.assert_close(output, torch.full((1, 50, 1), 3.0))
