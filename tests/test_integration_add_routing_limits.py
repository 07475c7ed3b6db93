"""Routing added to other people's decoders works with the rest of PyTorch, and what cannot work says why."""

from functools import partial

import pytest
import torch
from foreign_decoder import (
    BATCH,
    CHANNELS,
    HEADS,
    QUERIES,
    ROUTED,
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
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import route_kernels as rk
from route_kernels.integrations import add_routing
from route_kernels.testing import counted_calls, training_step

# ---- with the rest of PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_models_dtype_is_the_routers(dtype):
    built = model(dtype)
    added = with_random_routers(built)
    assert {p.dtype for router in added.routers.values() for p in router.parameters()} == {dtype}
    found = training_step(partial(routed, built), inputs(dtype), module=built)
    assert found["output 0"].dtype == dtype
    expected = biased_forward(built.double(), {}, **inputs())
    torch.testing.assert_close(found["output 0"].double(), expected, rtol=0, atol=300 * torch.finfo(dtype).eps)


def test_autocast_computes_attention_in_bfloat16():
    built = model(torch.float32)
    with_random_routers(built)
    call = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = training_step(partial(routed, built), call, module=built)
        x = call["content"].transpose(0, 1)
        with rk.routing():
            assert built.decoder.layers[0].self_attn(x, x, x)[0].dtype == torch.bfloat16
    assert all(found[f"grad {name}"].dtype == torch.float32 for name, _ in built.named_parameters())
    expected = routed(built, **call)
    torch.testing.assert_close(found["output 0"].float(), expected, rtol=0, atol=300 * torch.finfo(torch.bfloat16).eps)


class InFloat32(nn.MultiheadAttention):
    forward = torch.autocast("cpu", enabled=False)(nn.MultiheadAttention.forward)


def test_a_forwards_decorators_stay():
    built = model(torch.float32)
    for layer in built.decoder.layers:
        layer.self_attn.__class__ = InFloat32
    with_random_routers(built)
    call = inputs(torch.float32)
    expected = routed(built, **call)
    with torch.autocast("cpu", torch.bfloat16):
        x = call["content"].transpose(0, 1)
        with rk.routing(), counted_calls() as counts:
            assert built.decoder.layers[0].self_attn(x, x, x)[0].dtype == torch.float32
        assert counts == {name: 1 for name in ROUTED}
        torch.testing.assert_close(routed(built, **call), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["entered outside", "entered inside"])
def test_compiles_without_graph_breaks(inside):
    built = model()
    with_random_routers(built)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def step(strength, **call):
        with rk.routing(strength):
            return built(**call)

    torch.compiler.reset()
    compiled = torch.compile(step if inside else built, backend=backend, fullgraph=True)
    for strength in (0, 0.5, 1.0, 0):
        expected = training_step(partial(step, strength), inputs(), module=built)
        with rk.routing(0 if inside else strength):
            function = partial(compiled, strength) if inside else compiled
            found = training_step(function, inputs(), module=built)
        assert_agree(found, expected)
    assert len(graphs) == 3, "one for plain attention, one for each strength"


def test_without_a_limit_a_new_strength_compiles_nothing_more():
    built = model()
    with_random_routers(built, limit=None)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(built, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5):
        settings = {"strength": strength}
        torch.testing.assert_close(routed(compiled, settings, **inputs()), routed(built, settings, **inputs()))
    assert len(graphs) == 2, "the first for a number, the second for any"


def test_a_strength_that_is_a_tensor_compiles_once_and_has_a_gradient():
    built = model()
    with_random_routers(built)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(built, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for number in (0.0, 0.5, 1.0):
        strength = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        output = routed(compiled, {"strength": strength}, **inputs())
        torch.testing.assert_close(output, routed(built, {"strength": number}, **inputs()))
        assert torch.autograd.grad(output.square().sum(), strength)[0] != 0
    assert len(graphs) == 1


@pytest.mark.parametrize("strength", [0, 0.5])
def test_export_falls_through_to_plain_pytorch(strength):
    built = model().eval()
    with_random_routers(built)
    call = {name: x.detach() for name, x in inputs().items()}
    with rk.routing(strength):
        exported = torch.export.export(built, (), call)
    functions = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert functions and not any("route_kernels" in name for name in functions)
    torch.testing.assert_close(exported.module()(**call), routed(built, {"strength": strength}, **call))


@pytest.mark.parametrize("around_backward", [0, 0.7, 0.1])
def test_checkpoints_recompute_what_was_computed(around_backward):
    built = model()
    with_random_routers(built)

    def branches(**call):
        return routed(built, {"strength": 0}, **call), routed(built, {"strength": 0.7, **features()}, **call)

    expected = training_step(branches, inputs(), module=built)
    built.run = partial(checkpoint, use_reentrant=False, context_fn=rk.routing.checkpoint_contexts)
    with rk.routing(around_backward), counted_calls() as counts:
        found = training_step(branches, inputs(), module=built)
    assert counts["routed_attention"] == 2 * ROUTED["routed_attention"]
    assert_agree(found, expected, tolerance=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_that_cannot_know_are_an_error(use_reentrant):
    built = model()
    with_random_routers(built)
    built.run = partial(checkpoint, use_reentrant=use_reentrant)
    plain = built(**inputs()).sum()
    plain.backward()  # nothing has ever been routed: plain attention it was
    loss = routed(built, **inputs()).sum()
    with pytest.raises(RuntimeError, match=r"context_fn=rk\.routing\.checkpoint_contexts"):
        loss.backward()


def reduced_over_one_process(_, bucket):
    reduced = torch.futures.Future()
    reduced.set_result(bucket.buffer())
    return reduced


@pytest.mark.parametrize("strength, find_unused", [(0.5, False), (0, True)])
def test_distributed_training_reduces_both_branches(strength, find_unused):
    """Over a process group without threads: one of gloo may wait for Python's lock while Python waits for its end."""
    built = model(torch.float32)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = built

        def forward(self, strength, **call):
            return built(**call), routed(built, {"strength": strength}, **call)

    branches = Branches()
    with_random_routers(built)
    expected = training_step(branches, {"strength": strength, **inputs(torch.float32)})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(branches, find_unused_parameters=find_unused)
        replica.register_comm_hook(None, reduced_over_one_process)
        for _ in range(2):  # the second forward raises where a parameter went unused
            branches.zero_grad()
            torch.manual_seed(0)
            outputs = replica(strength, **inputs(torch.float32))
            generator = torch.Generator().manual_seed(0)
            weightings = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
            torch.autograd.backward(outputs, weightings)
    finally:
        torch.distributed.destroy_process_group()
    found = {f"grad {name}": parameter.grad for name, parameter in branches.named_parameters()}
    assert_agree(found, {name: expected[name] for name in found}, tolerance=1e-5)


def test_a_query_without_keys_gets_nothing():
    built = model()
    with_random_routers(built)
    mask = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    mask[3] = True
    x = normal(QUERIES, BATCH, CHANNELS)
    attention = built.decoder.layers[0].self_attn
    with rk.routing():
        attended = attention(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(attended[3], attention.out_proj.bias.expand(BATCH, -1))


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"strength": -0.1}, ValueError, "strength: expected a finite number >= 0, got -0.1"),
        ({"strength": float("nan")}, ValueError, "strength: expected a finite number >= 0, got nan"),
        ({"strength": True}, ValueError, "strength: expected a finite number >= 0, got True"),
        ({"strength": torch.ones(1)}, TypeError, r"strength: expected a number, got a tensor of shape \[1\]"),
        ({"confidence": normal(2, 7, 1)}, ValueError, r"confidence: expected shape \[B, N\], got \[2, 7, 1\]"),
        ({"geometry": torch.ones(2, 7, dtype=torch.long)}, TypeError, "geometry: expected a floating-point tensor"),
        ({"geometry": 1.0}, TypeError, "geometry: .* got float"),
    ],
)
def test_settings_that_mean_nothing(settings, error, message):
    with pytest.raises(error, match=f"routing: {message}"):
        rk.routing(**settings)


def test_features_of_another_size():
    built = model()
    with_random_routers(built)
    with pytest.raises(ValueError, match=r"confidence: expected shape \[B, N\] = \[2, 7\], got \[2, 6\]"):
        routed(built, {"confidence": normal(2, 6)}, **inputs())


def test_a_pattern_that_matches_nothing_lists_what_it_could():
    with pytest.raises(ValueError, match=r"'\*\.attn' matches no module(.|\n)*decoder\.layers\.1\.self_attn \(Multih"):
        add_routing(model(), "*.attn")
    with pytest.raises(ValueError, match=r"has no attention module that can be; known are: torch\.nn\.Multihead"):
        add_routing(nn.Linear(2, 2), "*")


def refused(self_attn, change=None):
    built = nn.ModuleDict({"self_attn": self_attn})
    if change is not None:
        change(self_attn)
    names = list(built.state_dict())
    with pytest.raises(ValueError) as error:
        add_routing(built, "self_attn")
    assert list(built.state_dict()) == names and not hasattr(self_attn, "_kind")
    return str(error.value)


def test_modules_that_cannot_be_routed_say_why():
    attention = partial(nn.MultiheadAttention, CHANNELS, HEADS)
    assert "Linear is no self-attention that is known here" in refused(nn.Linear(2, 2))
    for option in ("add_bias_kv", "add_zero_attn"):
        assert "add keys that are no queries" in refused(attention(**{option: True}))
    assert "forward has been replaced" in refused(attention(), lambda m: setattr(m, "forward", partial(m.forward)))
    assert "an attribute called router" in refused(attention(), lambda m: setattr(m, "router", None))
    encoder_layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, dropout=0.0)
    with pytest.raises(ValueError, match="skips it on its fast path"):
        add_routing(encoder_layer, "self_attn")


def test_dropout_of_attention_weights_is_refused():
    assert "self_attn: dropout: expected 0" in refused(nn.MultiheadAttention(CHANNELS, HEADS, dropout=0.1))
    built = model()
    with_random_routers(built)
    attention = built.decoder.layers[1].self_attn
    attention.dropout = 0.1
    built(**inputs())
    with pytest.raises(ValueError, match=r"dropout: expected 0, .* got 0\.1; set it to 0"):
        routed(built, **inputs())
    built.eval()
    routed(built, **inputs())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("decoder",), r"add_routing: model: expected a torch\.nn\.Module, got str"),
        ((model(), ["self_attn"]), "add_routing: self_attn: expected a pattern of module names, got list"),
    ],
)
def test_what_is_no_model_and_no_pattern(arguments, message):
    with pytest.raises(TypeError, match=message):
        add_routing(*arguments)


def test_unknown_options_change_nothing():
    built = model()
    names = list(built.state_dict())
    with pytest.raises(TypeError, match="temperature"):
        add_routing(built, temperature=2.0)
    assert list(built.state_dict()) == names


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ({"attn_mask": normal(3, 7)}, ValueError, r"attn_mask: expected shape \[7, 7\] or \[8, 7, 7\], got \[3, 7\]"),
        ({"attn_mask": torch.ones(7, 7, dtype=torch.uint8)}, TypeError, "attn_mask: expected dtype bool or floating"),
        ({"key_padding_mask": normal(2, 6)}, ValueError, r"key_padding_mask: expected shape \[2, 7\], got \[2, 6\]"),
        ({"is_causal": True}, ValueError, "attn_mask: expected a mask"),
    ],
)
def test_bad_masks(masks, error, message):
    built = model()
    with_random_routers(built)
    with pytest.raises(error, match=message):
        routed(built, **inputs(**masks))


def test_cross_attention_is_an_error_inside_only():
    built = nn.ModuleDict({"self_attn": nn.MultiheadAttention(CHANNELS, HEADS, dtype=torch.float64)})
    add_routing(built, "self_attn", verbose=False)
    query, memory = normal(QUERIES, BATCH, CHANNELS), normal(9, BATCH, CHANNELS)
    built["self_attn"](query, memory, memory)
    with rk.routing(), pytest.raises(ValueError, match="key: routing is for self-attention"):
        built["self_attn"](query, memory, memory)
    with rk.routing(), pytest.raises(ValueError, match="query: expected a batch of three dimensions"):
        built["self_attn"](query[:, 0], query[:, 0], query[:, 0])


def test_a_class_changed_by_other_code_is_not_overwritten():
    built = model()
    added = with_random_routers(built)
    attention = built.decoder.layers[1].self_attn
    ours = type(attention)
    attention.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(RuntimeError, match="the class of a Sharded has been changed by other code"):
        added.revert()
    assert hasattr(built.decoder.layers[0].self_attn, "router")
    attention.__class__ = ours
    added.revert()
