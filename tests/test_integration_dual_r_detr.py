"""Dual-R-DETR: its router and self-attention as one routed attention, compared with the bias written out."""

import copy
import pickle
import sys

import pytest
import torch
from integration_checks import assert_agree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.research_modules import Decoder, DecoderLayer, QueryRouter, bricks_module
from route_kernels.integrations import bricks, dual_r_detr
from route_kernels.integrations.codebases.dual_r_detr import RoutedMask
from route_kernels.testing import counted_calls, training_step

SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])
POSITIONS = 30
BATCH, QUERIES, CHANNELS, HEADS = 2, 7, 16, 4
ROUTED = {"routed_attention": 2, "query_similarity": 2}


@pytest.fixture(autouse=True)
def their_bindings(monkeypatch):
    for name, module in bricks_module().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    dual_r_detr.revert()
    bricks.revert()


def decoder(strength=0.3, router_scale=1.0, **layer):
    """Three layers, the last two routed; random everywhere, a bias of `router_scale`."""
    sizes = {"embed_dim": CHANNELS, "d_ffn": 24, "n_heads": HEADS, "n_levels": 2, "n_points": 3}
    model = Decoder(**sizes | layer).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "router_U" in name:
                parameter.mul_(router_scale)
    model.gating_lambda = strength
    return model


def inputs(**others):
    random = {
        "query": torch.randn(BATCH, QUERIES, CHANNELS),
        "query_pos": torch.randn(BATCH, QUERIES, CHANNELS),
        "boxes": torch.rand(BATCH, QUERIES, 4) * 0.8 + 0.1,
        "value": torch.randn(BATCH, POSITIONS, CHANNELS),
    }
    leaves = {name: tensor.double().requires_grad_() for name, tensor in random.items()}
    return leaves | {"spatial_shapes": SHAPES, "level_start_index": STARTS} | others


def clamped_share(model, arguments):
    """Share of the clamped among all entries of the bias that their routers write out."""
    biases = []
    hooks = [layer.query_router.register_forward_hook(lambda *call: biases.append(call[2])) for layer in model.layers]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    return (torch.stack(biases).abs() == QueryRouter.clamp).double().mean().item()


FLOAT_MASK = torch.randn(QUERIES, QUERIES).double()
MASKS = {
    "no mask": None,
    "[N, N]": FLOAT_MASK,
    "[B H, N, N]": torch.randn(BATCH * HEADS, QUERIES, QUERIES).double(),
    "-inf": torch.zeros(QUERIES, QUERIES).double().masked_fill(FLOAT_MASK.triu(1) > 0, -torch.inf),
}


@pytest.mark.parametrize("attn_mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("strength, router_scale", [(0.3, 0.25), (1.7, 4.0)], ids=["", "clamped"])
def test_outputs_and_every_gradient(attn_mask, strength, router_scale):
    model, arguments = decoder(strength, router_scale), inputs(attn_mask=attn_mask)
    share = clamped_share(model, arguments)
    assert 0.1 < share < 0.9 if router_scale > 1 else share == 0
    expected = training_step(model, arguments)
    report = dual_r_detr.apply(model, verbose=False)
    with counted_calls() as counts:
        found = training_step(model, arguments)
    assert counts == ROUTED
    assert_agree(found, expected)
    routers = [name for name in expected if "query_router" in name and not name.startswith("grad layers.0.")]
    assert len(routers) == 2 * 12 and all(found[name].abs().max() > 0 for name in routers)
    report.revert()
    assert_agree(training_step(model, arguments), expected, tolerance=0)


@pytest.mark.parametrize("mistake", ["limit", "strength", "gate", "no mask"])
def test_the_comparison_notices_a_wrong_bias(mistake, monkeypatch):
    model, arguments = decoder(1.7, 4.0), inputs(attn_mask=MASKS["[N, N]"])
    expected = training_step(model, arguments)
    factors = dual_r_detr.factors

    def mistaken(router, query, features, strength):
        right = factors(router, query, features, 1.0 if mistake == "strength" else strength)
        if mistake == "limit":
            return right._replace(limit=dual_r_detr.LIMIT)
        return right._replace(gate_q=right.gate_k, gate_k=right.gate_q) if mistake == "gate" else right

    dual_r_detr.apply(model, verbose=False)
    monkeypatch.setattr(dual_r_detr, "factors", mistaken)
    if mistake == "no mask":
        without = {"__new__": lambda cls, routing, mask: RoutedMask.__new__(cls, routing, None)}
        monkeypatch.setattr(dual_r_detr, "RoutedMask", type("WithoutMask", (RoutedMask,), without))
    with pytest.raises(AssertionError, match="results differ"):
        assert_agree(training_step(model, arguments), expected)


def test_together_with_the_fused_cross_attention():
    model, arguments = decoder(), inputs(key_padding_mask=torch.rand(BATCH, POSITIONS) < 0.2)
    expected = training_step(model, arguments)
    with bricks.apply(model, verbose=False), dual_r_detr.apply(model, verbose=False), counted_calls() as counts:
        found = training_step(model, arguments)
    assert counts == ROUTED | {"ms_deform_attn_fused": 3}
    assert_agree(found, expected)


def test_without_gating_their_code_runs():
    model, arguments = decoder(strength=0.0), inputs(attn_mask=torch.rand(QUERIES, QUERIES) < 0.3)
    expected = training_step(model, arguments)
    dual_r_detr.apply(model, verbose=False)
    with counted_calls() as counts:
        assert_agree(training_step(model, arguments), expected, tolerance=0)
    assert not counts


@pytest.mark.parametrize("shape", [(QUERIES, QUERIES), (BATCH * HEADS, QUERIES, QUERIES)], ids=["2d", "3d"])
def test_a_bool_mask_is_a_mask(shape):
    """True may not attend: the float mask of -inf. Theirs adds it to the bias, as 1."""
    layer = decoder().layers[0]
    arguments = inputs(gating_lambda=0.3, key_padding_mask=None)
    arguments["reference_points"] = arguments.pop("boxes")[:, :, None].expand(-1, -1, 2, -1)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    infinite = torch.zeros(shape).double().masked_fill(hidden, -torch.inf)
    masked, theirs, shifted = (
        training_step(layer, arguments | {"self_attn_mask": mask}) for mask in (infinite, hidden, hidden.double())
    )
    assert_agree(theirs, shifted, tolerance=0)
    dual_r_detr.apply(layer, verbose=False)
    ours = training_step(layer, arguments | {"self_attn_mask": hidden})
    assert_agree(ours, masked)
    with pytest.raises(AssertionError, match="results differ"):
        assert_agree(ours, theirs)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operator gives back inside the block."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_of_n_times_n_elements():
    queries = 400
    layer = DecoderLayer(CHANNELS, 24, HEADS, n_levels=2, n_points=3)
    call = {
        "query": torch.randn(1, queries, CHANNELS, requires_grad=True),
        "query_pos": torch.randn(1, queries, CHANNELS),
        "reference_points": torch.rand(1, queries, 2, 4),
        "value": torch.randn(1, POSITIONS, CHANNELS),
        "spatial_shapes": SHAPES,
        "level_start_index": STARTS,
        "gating_lambda": 0.3,
        "reference_boxes": torch.rand(1, queries, 4),
    }
    elements = {}
    for name in ("theirs", "ours"):
        if name == "ours":
            dual_r_detr.apply(layer, verbose=False)
        with LargestTensor() as largest:
            layer(**call).sum().backward()
        elements[name] = largest.elements
    assert elements["theirs"] >= HEADS * queries * queries
    assert elements["ours"] < queries * queries


def test_their_checkpoints_load_and_ours_are_theirs():
    model, other = decoder(), decoder(strength=0.7)
    names = list(model.state_dict())
    checkpoint = copy.deepcopy(other.state_dict())
    dual_r_detr.apply(model, verbose=False)
    assert list(model.state_dict()) == names == list(checkpoint)
    model.load_state_dict(checkpoint)
    model.gating_lambda, arguments = 0.7, inputs()
    assert_agree({"output": model(**arguments)}, {"output": other(**arguments)})
    other.load_state_dict(model.state_dict())


def test_copies_and_pickles():
    model, arguments = decoder(), inputs()
    expected = {"output": model(**arguments)}
    dual_r_detr.apply(model, verbose=False)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with counted_calls() as counts:
        assert_agree({"output": average(**arguments)}, expected)
    assert counts == ROUTED
    assert_agree({"output": pickle.loads(pickle.dumps(average))(**arguments)}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_bfloat16(dtype):
    model, arguments = decoder(), inputs()
    exact = model(**arguments)
    model = model.float()
    arguments = {name: x.detach().float() if x.is_floating_point() else x for name, x in arguments.items()}
    dual_r_detr.apply(model, verbose=False)
    with counted_calls() as counts, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(**arguments)
    assert counts == ROUTED
    assert_agree({"output": output}, {"output": exact}, tolerance=20 * torch.finfo(dtype).eps)


class SteeperClamp(QueryRouter):
    clamp = 8.0


class WithoutDelegators(QueryRouter):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        del self.router_U_del


def test_what_is_left_and_why():
    model = decoder()
    for layer, router in zip(model.layers[:2], (SteeperClamp, WithoutDelegators), strict=True):
        layer.query_router = router(CHANNELS, num_heads=HEADS)
    model.layers[2].self_attn.dropout = 0.1
    reasons = {entry.name: entry.reason for entry in dual_r_detr.apply(model, verbose=False).left}
    assert reasons == {
        "layers.0": "query_router computes another bias than the published one",
        "layers.1": "query_router is not the published one: it has no router_U_del",
        "layers.2": "self_attn has dropout 0.1, the fused attention none: set it to 0 (their config does)",
    }
    assert all("forward" not in vars(layer) for layer in model.layers)


class InFloat32(QueryRouter):
    def forward(self, *arguments):
        with torch.autocast("cpu", enabled=False):
            return super().forward(*arguments)


class Decorated(QueryRouter):
    forward = torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)(QueryRouter.forward)


def test_a_router_whose_casts_would_be_lost_is_left():
    model = decoder()
    for layer, router in zip(model.layers, (InFloat32, Decorated, QueryRouter), strict=True):
        layer.query_router = router(CHANNELS, num_heads=HEADS)
    report = dual_r_detr.apply(model, verbose=False)
    assert [entry.name for entry in report.replaced] == ["layers.2.query_router", "layers.2.self_attn"]
    in_float32, decorated = (entry.reason for entry in report.left)
    assert in_float32.startswith("query_router: under autocast it is off by ")
    assert decorated == "query_router.forward is decorated, and the factors are made without it"


def test_the_layers_decorators_stay(monkeypatch):
    decorated = torch.autocast("cpu", enabled=False)(DecoderLayer.forward)
    monkeypatch.setattr(DecoderLayer, "forward", decorated)
    model = decoder().float()
    arguments = {name: x.detach().float() if x.is_floating_point() else x for name, x in inputs().items()}
    results = []
    model.layers[-1].register_forward_hook(lambda *call: results.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**arguments)
        with dual_r_detr.apply(model, verbose=False), counted_calls() as counts:
            model(**arguments)
    expected, found = results
    assert counts == ROUTED and found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_applied_twice(capsys):
    model = decoder()
    first = dual_r_detr.apply(model)
    assert capsys.readouterr().out == f"{first}\n"
    assert len(first.replaced) == 6
    second = dual_r_detr.apply(model, verbose=False)
    assert second.replaced == []
    assert {entry.reason for entry in second.left} == {"already replaced by an earlier apply()"}
    dual_r_detr.revert()
    assert all("forward" not in vars(layer) | vars(layer.self_attn) for layer in model.layers)


def test_models_without_a_router_and_no_models():
    report = dual_r_detr.apply(torch.nn.Linear(2, 2), verbose=False)
    assert [(entry.name, entry.reason) for entry in report.left] == [("Linear", "no module in it has a `query_router`")]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        dual_r_detr.apply(None, verbose=False)
