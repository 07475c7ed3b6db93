"""Routing added to other people's decoders: the bias is right inside rk.routing, and nothing changes outside it."""

import copy
import io
import threading
from functools import partial

import pytest
import torch
from foreign_decoder import (
    BATCH,
    CHANNELS,
    HEADS,
    QUERIES,
    ROUTED,
    bias_of,
    biased_forward,
    features,
    inputs,
    model,
    normal,
    routed,
    with_random_routers,
)
from integration_checks import assert_agree
from torch import nn

import route_kernels as rk
from route_kernels.integrations import add_routing, remove_routing
from route_kernels.testing import counted_calls, relative_errors, training_step

MASKS = {
    "none": {},
    "bool": {
        "attn_mask": torch.tensor([[i != j and (i + j) % 3 == 0 for j in range(QUERIES)] for i in range(QUERIES)])
    },
    "float": {"attn_mask": normal(QUERIES, QUERIES, seed=5)},
    "bool of each head": {"attn_mask": normal(BATCH * HEADS, QUERIES, QUERIES, seed=6) > 1.0},
    "float of each head": {"attn_mask": normal(BATCH * HEADS, QUERIES, QUERIES, seed=6)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "float padding": {"key_padding_mask": normal(BATCH, QUERIES, seed=7)},
    "both bool": {
        "attn_mask": normal(QUERIES, QUERIES, seed=8) > 1.0,
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 5 + [True] * 2]),
    },
    "float and padding": {
        "attn_mask": normal(QUERIES, QUERIES, seed=8),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 5 + [True] * 2]),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_equals_the_bias_written_into_the_mask_of_the_original(options, masks):
    built = model(**options)
    settings = {"strength": 0.7, **features()}
    with_random_routers(built)
    with counted_calls() as counts:
        found = training_step(partial(routed, built, settings), inputs(**masks), module=built)
    assert counts == ROUTED
    expected = training_step(partial(biased_forward, built, settings), inputs(**masks), module=built)
    assert_agree(found, expected)
    assert all(found[f"grad {name}"].abs().max() > 0 for name, _ in built.named_parameters() if "router" in name)
    mistaken = training_step(partial(biased_forward, built, settings, sign=-1.0), inputs(**masks), module=built)
    assert relative_errors(mistaken, expected)["output 0"] > 1e-2


def test_projections_of_their_own_sizes():
    attention = nn.MultiheadAttention(CHANNELS, HEADS, kdim=CHANNELS, vdim=8, batch_first=True, dtype=torch.float64)
    built = nn.ModuleDict({"self_attn": attention})
    added = add_routing(built, "self_attn", verbose=False)
    positioned, content = normal(BATCH, QUERIES, CHANNELS), normal(BATCH, QUERIES, 8, seed=1)
    with rk.routing():
        found, weights = attention(positioned, positioned, content)
    bias = bias_of(added.routers["self_attn"], content, positioned, {})
    expected, _ = attention(positioned, positioned, content, attn_mask=bias.repeat_interleave(HEADS, 0))
    torch.testing.assert_close(found, expected)
    assert weights is None


@pytest.mark.parametrize("options", [{"limit": None}, {"limit": 0.2}, {"nonnegative": True}], ids=str)
def test_router_options_reach_the_router(options):
    built = model()
    added = with_random_routers(built, **options)
    router = added.routers["decoder.layers.0.self_attn"]
    assert (router.rank, router.selector_a.weight.shape) == (4, (5, 3))
    assert all(getattr(router, name) == value for name, value in options.items())
    found = training_step(partial(routed, built), inputs(), module=built)
    assert_agree(found, training_step(partial(biased_forward, built, {}), inputs(), module=built))


def test_attention_weights_are_not_returned_and_asking_for_them_is_an_error():
    built = model()
    with_random_routers(built)
    x = normal(QUERIES, BATCH, CHANNELS)
    attention = built.decoder.layers[0].self_attn
    assert attention(x, x, x, need_weights=True)[1].shape == (BATCH, QUERIES, QUERIES)
    with rk.routing():
        assert attention(x, x, x)[1] is None and attention(x, x, x, need_weights=False)[1] is None
        with pytest.raises(ValueError, match="need_weights=True: routed attention has no attention weights"):
            attention(x, x, x, need_weights=True)


# ---- outside the context -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("masks", ["none", "both bool"])
def test_outside_it_is_the_original_bit_for_bit(options, masks):
    built = model(**options)
    before = training_step(built, inputs(**MASKS[masks]))
    with_random_routers(built)
    with counted_calls() as counts:
        after = training_step(built, inputs(**MASKS[masks]))
        zero = training_step(partial(routed, built, {"strength": 0}), inputs(**MASKS[masks]), module=built)
    assert not counts
    for found in (after, zero):
        assert all(gradient is None for name, gradient in found.items() if "router" in name)
        assert_agree(found, before, tolerance=0)


def test_blocks_nest_and_end_with_an_error():
    built = model()
    with_random_routers(built)
    plain, call = built(**inputs()), inputs()
    half, full = routed(built, {"strength": 0.5}, **call), routed(built, **call)
    assert (plain - half).abs().max() > 1e-3 and (half - full).abs().max() > 1e-3
    outer = rk.routing(1.0)
    with outer:
        with rk.routing(0.5):
            assert torch.equal(built(**call), half)
            with rk.routing(0), pytest.raises(ZeroDivisionError), outer:
                assert torch.equal(built(**call), full)
                raise ZeroDivisionError
            assert torch.equal(built(**call), half)
        with outer:
            assert torch.equal(built(**call), full)
        assert torch.equal(built(**call), full)
    assert torch.equal(built(**call), plain)


def test_a_block_holds_for_its_thread():
    built = model()
    with_random_routers(built)
    results = []
    with rk.routing():
        thread = threading.Thread(target=lambda: results.append(built(**inputs())))
        thread.start()
        thread.join()
    assert torch.equal(results[0], built(**inputs()))


# ---- a part of the model -------------------------------------------------------------------------------------------


def test_routers_are_parameters_and_revert_takes_them_out():
    built = model()
    before = training_step(built, inputs())
    names, classes = list(built.state_dict()), [type(module) for module in built.modules()]
    with with_random_routers(built) as added:
        assert [entry.name for entry in added.replaced] == list(added.routers)
        assert all(isinstance(layer.self_attn, nn.MultiheadAttention) for layer in built.decoder.layers)
        new = set(built.state_dict()) - set(names)
        assert new == {f"{name}.router.{key}" for name, router in added.routers.items() for key in router.state_dict()}
        assert {id(p) for router in added.routers.values() for p in router.parameters()} <= {
            id(p) for p in built.parameters()
        }
        routed(built, **inputs())
    added.revert()
    assert list(built.state_dict()) == names and [type(module) for module in built.modules()] == classes
    assert all("_has_routed" not in vars(layer.self_attn) for layer in built.decoder.layers)
    assert not added.routers
    assert_agree(training_step(built, inputs()), before, tolerance=0)
    assert_agree(training_step(partial(routed, built), inputs(), module=built), before, tolerance=0)


@pytest.mark.parametrize("training", [True, False])
def test_routers_are_in_the_mode_of_their_attention(training):
    added = add_routing(model().train(training), verbose=False)
    assert all(router.training == training for router in added.routers.values())


def test_the_report_is_printed(capsys):
    add_routing(model(), "layers.1.self_attn")
    assert (
        "add_routing: 1 replaced, 0 left\n  decoder.layers.1.self_attn  -> routed_attention" in capsys.readouterr().out
    )


def test_only_what_the_pattern_matches_is_routed():
    built = model(layers=4)
    added = add_routing(built, "decoder.layers.[23].self_attn", verbose=False)
    assert list(added.routers) == ["decoder.layers.2.self_attn", "decoder.layers.3.self_attn"]
    with counted_calls() as counts:
        routed(built, **inputs())
    assert counts == ROUTED


def test_a_second_call_leaves_what_has_a_router():
    built = model(layers=3)
    first = add_routing(built, "layers.0.self_attn", verbose=False)
    second = add_routing(built, verbose=False)
    assert list(second.routers) == ["decoder.layers.1.self_attn", "decoder.layers.2.self_attn"]
    assert [(entry.name, entry.reason) for entry in second.left] == [
        ("decoder.layers.0.self_attn", "already has a router")
    ]
    assert not add_routing(built, verbose=False).routers
    second.revert()
    assert hasattr(built.decoder.layers[0].self_attn, "router")
    first.revert()
    assert remove_routing(built) == []


def clone_of(built):
    buffer = io.BytesIO()
    torch.save(built, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, clone_of], ids=["deepcopy", "torch.save"])
def test_copies_are_routed_by_their_own_routers(copied):
    built = model()
    with_random_routers(built)
    twin, expected = copied(built), routed(built, **inputs())
    assert torch.equal(routed(twin, **inputs()), expected)
    with torch.no_grad():
        twin.decoder.layers[0].self_attn.router.router_gamma_sup += 1
    assert not torch.equal(routed(twin, **inputs()), expected)
    assert remove_routing(twin) == ["decoder.layers.0.self_attn", "decoder.layers.1.self_attn"]
    assert torch.equal(routed(twin, **inputs()), built(**inputs()))
    assert not any("router" in name for name in twin.state_dict())
    assert torch.equal(routed(built, **inputs()), expected)


def test_a_state_dict_goes_round():
    built, other = model(), model()
    with_random_routers(built)
    add_routing(other, verbose=False, rank=4, hidden_dim=8, gate_rank=5, limit=1.0)
    assert not torch.equal(routed(built, **inputs()), routed(other, **inputs()))
    other.load_state_dict(built.state_dict())
    assert torch.equal(routed(built, **inputs()), routed(other, **inputs()))
