"""The modules: names of the public ones, their numbers, and nothing beyond plain operators and the ops."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.nn import AddLayerNorm, MSDeformAttn, QueryRouter, RoutedSelfAttention
from route_kernels.testing import EAGER, routed_attention_arguments

# ---- QueryRouter ---------------------------------------------------------------------------------------------------

PUBLIC_ROUTER_SHAPES = {  # of the public implementation at its defaults: d 256, hidden 64, rank 16, gate rank 32
    "router_phi.0.weight": (64, 256),
    "router_phi.0.bias": (64,),
    "router_phi.2.weight": (16, 64),
    "router_phi.2.bias": (16,),
    "router_U_sup.weight": (16, 16),
    "router_V_sup.weight": (16, 16),
    "router_U_del.weight": (16, 16),
    "router_V_del.weight": (16, 16),
    "selector_a.weight": (32, 3),
    "selector_b.weight": (32, 3),
    "router_gamma_sup": (),
    "router_gamma_del": (),
}


def public_bias(state, query, similarity, confidence, geometry, strength=1.0, limit=5.0):
    """lambda B of spec equations, every [B, N, N] tensor written out, from a public state dict."""
    z = F.linear(query, state["router_phi.0.weight"], state["router_phi.0.bias"])
    z = F.linear(F.gelu(z), state["router_phi.2.weight"], state["router_phi.2.bias"])
    rank = z.shape[-1]
    d_sup = F.linear(z, state["router_U_sup.weight"]) @ F.linear(z, state["router_V_sup.weight"]).mT / math.sqrt(rank)
    d_del = F.linear(z, state["router_U_del.weight"]) @ F.linear(z, state["router_V_del.weight"]).mT / math.sqrt(rank)
    x = torch.stack([similarity, confidence, geometry], dim=-1)
    a, b = F.linear(x, state["selector_a.weight"]), F.linear(x, state["selector_b.weight"])  # [B, N, gate rank]
    p_sup = torch.sigmoid(torch.einsum("bir,bjr->bij", a, b))
    gamma_sup, gamma_del = -F.softplus(state["router_gamma_sup"]), F.softplus(state["router_gamma_del"])
    bias = p_sup * gamma_sup * d_sup + (1 - p_sup) * gamma_del * d_del
    return strength * bias.clamp(-limit, limit)


def router_inputs(queries=40, channels=256, dtype=torch.float32, batch=2):
    query = torch.randn(batch, queries, channels, dtype=dtype)
    similarity = rk.query_similarity(query)
    confidence = torch.rand(batch, queries, dtype=dtype)
    geometry = torch.rand(batch, queries, dtype=dtype).clamp(min=1e-6).log()
    return query, similarity, confidence, geometry


def random_router(**options):
    """A router whose every parameter is random and whose bias reaches the limit."""
    router = QueryRouter(**options)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    return router


def test_router_has_the_public_names_and_shapes():
    assert {name: tuple(tensor.shape) for name, tensor in QueryRouter().state_dict().items()} == PUBLIC_ROUTER_SHAPES


def test_router_starts_as_published():
    state = QueryRouter().state_dict()
    assert state["router_gamma_sup"] == 1.0 and state["router_gamma_del"] == 1.0


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("limit", [5.0, 0.5])
def test_router_gives_the_public_bias(strength, limit):
    router = random_router(limit=limit)
    public_checkpoint = {name: torch.randn(shape) * 0.3 for name, shape in PUBLIC_ROUTER_SHAPES.items()}
    router.load_state_dict(public_checkpoint)
    inputs = router_inputs()
    expected = public_bias(public_checkpoint, *inputs, strength, limit)
    bias = rk.routing_bias(router(*inputs, strength=strength))
    assert (expected.abs() == strength * limit).any() or limit == 5.0
    torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-5)


def test_router_has_the_public_gradients():
    router = random_router(embed_dim=16).double()
    query, *features = router_inputs(channels=16, dtype=torch.float64)
    state = {name: tensor.detach().requires_grad_() for name, tensor in router.named_parameters()}
    weight = torch.randn(2, 40, 40, dtype=torch.float64)
    grads = {}
    for form, bias in (
        ("ours", lambda q: rk.routing_bias(router(q, *features))),
        ("public", lambda q: public_bias(state, q, *features)),
    ):
        leaf = query.clone().requires_grad_()
        wanted = dict(router.named_parameters()) if form == "ours" else state
        found = torch.autograd.grad((bias(leaf) * weight).sum(), [leaf, *wanted.values()])
        grads[form] = dict(zip(["query", *wanted], found, strict=True))
    for name, grad in grads["public"].items():
        torch.testing.assert_close(grads["ours"][name], grad, rtol=1e-9, atol=1e-9, msg=name)


def test_router_in_attention_equals_the_public_bias_as_a_mask():
    router, attention = random_router(embed_dim=32), RoutedSelfAttention(32, 4)
    inputs = router_inputs(channels=32)
    q, k, v = F.linear(inputs[0], attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v))
    bias = public_bias(router.state_dict(), *inputs, 0.3).unsqueeze(1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    output = attention(inputs[0], routing=router(*inputs, strength=0.3))
    torch.testing.assert_close(output, attention.out_proj(expected), rtol=1e-5, atol=1e-5)


def test_strength_folds_into_factors_and_limit():
    router = random_router(embed_dim=16, limit=0.7).double()
    inputs = router_inputs(channels=16, dtype=torch.float64)
    whole = rk.routing_bias(router(*inputs))
    assert (whole.abs() == 0.7).any()
    for strength in (0.0, 0.25, 0.3, 1.0, 2.0):
        factors = router(*inputs, strength=strength)
        assert factors.limit == 0.7 * strength
        torch.testing.assert_close(rk.routing_bias(factors), strength * whole, rtol=1e-12, atol=1e-14)


def test_strength_zero_is_plain_attention():
    router, attention = random_router(embed_dim=16), RoutedSelfAttention(16, 2)
    query = torch.randn(2, 9, 16)
    assert (rk.routing_bias(router(query, strength=0.0)) == 0).all()
    torch.testing.assert_close(attention(query, routing=router(query, strength=0.0)), attention(query))


def test_no_limit():
    router = random_router(embed_dim=16, limit=None)
    inputs = router_inputs(channels=16)
    factors = router(*inputs, strength=0.5)
    assert factors.limit is None
    expected = public_bias(router.state_dict(), *inputs, 0.5, math.inf)
    assert expected.abs().max() > 0.5 * 5
    torch.testing.assert_close(rk.routing_bias(factors), expected, rtol=1e-4, atol=1e-4)


def test_nonnegative_fixes_both_signs():
    inputs = router_inputs(channels=16)
    router = random_router(embed_dim=16, nonnegative=True)
    factors = router(*inputs)
    assert (factors.sup_q @ factors.sup_k.mT <= 0).all() and (factors.del_q @ factors.del_k.mT >= 0).all()
    router.nonnegative = False
    factors = router(*inputs)
    assert (factors.sup_q @ factors.sup_k.mT > 0).any() and (factors.del_q @ factors.del_k.mT < 0).any()


@pytest.mark.parametrize("gate_rank", [1, 3, 32, 100])
def test_the_gate_is_folded_to_rank_three(gate_rank):
    router = random_router(embed_dim=16, gate_rank=gate_rank)
    query, *features = router_inputs(channels=16)
    factors = router(query, *features)
    assert factors.gate_q.shape[-1] == factors.gate_k.shape[-1] == 3
    x = torch.stack(features, dim=-1)
    logits = router.selector_a(x) @ router.selector_b(x).mT
    torch.testing.assert_close(factors.gate_q @ factors.gate_k.mT, logits, rtol=1e-4, atol=1e-4)


def test_missing_features():
    router = random_router(embed_dim=16)
    query, similarity, *_ = router_inputs(channels=16)
    zero = torch.zeros_like(similarity)
    for wanted, given in zip(router(query, similarity, zero, zero), router(query), strict=True):
        assert wanted == given if isinstance(wanted, float) else torch.equal(wanted, given)


def test_the_gate_input_carries_no_gradient():
    router = random_router(embed_dim=16)
    query, *features = router_inputs(channels=16)
    features = [feature.requires_grad_() for feature in features]
    rk.routing_bias(router(query, *features)).sum().backward()
    assert all(feature.grad is None for feature in features)
    factors = router(query.requires_grad_())
    assert torch.autograd.grad(factors.gate_q.sum(), query, allow_unused=True, retain_graph=True) == (None,)


def test_router_under_autocast():
    router, attention = random_router(embed_dim=32), RoutedSelfAttention(32, 4)
    inputs = router_inputs(channels=32)
    expected = attention(inputs[0], routing=router(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(inputs[0], routing=router(*inputs))
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(query=torch.zeros(4, 16)), r"query: expected shape \[B, N, C\], got \[4, 16\]"),
        (
            dict(query=torch.zeros(1, 4, 16), confidence=torch.zeros(1, 5)),
            r"confidence: expected .*\[1, 4\], got \[1, 5\]",
        ),
        (dict(query=torch.zeros(1, 4, 16), strength=-0.1), r"strength: expected a number >= 0, got -0.1"),
        (dict(query=torch.zeros(1, 4, 16), strength=math.nan), r"strength: expected a number >= 0, got nan"),
    ],
)
def test_router_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        QueryRouter(16)(**arguments)


# ---- RoutedSelfAttention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [True, False])
def test_self_attention_loads_and_equals_multihead_attention(positions):
    stock = nn.MultiheadAttention(24, 3, batch_first=True).double()
    nn.init.normal_(stock.in_proj_bias), nn.init.normal_(stock.out_proj.bias)
    ours = RoutedSelfAttention(24, 3).double()
    ours.load_state_dict(stock.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}

    grad_output = torch.randn(2, 37, 24, dtype=torch.float64)
    start = torch.randn(2, 2, 37, 24, dtype=torch.float64)
    results = []
    for module in (stock, ours):
        query, position = (x.clone().requires_grad_() for x in start)
        both = query + position if positions else query
        output = (
            module(both, both, query, need_weights=False)[0]
            if module is stock
            else module(query, position if positions else None)
        )
        inputs = [query, position] if positions else [query]
        results.append([output, *torch.autograd.grad(output, [*inputs, *module.parameters()], grad_output)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_self_attention_masks_are_the_opposite_of_multihead_attention():
    stock = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = RoutedSelfAttention(24, 3)
    ours.load_state_dict(stock.state_dict())
    query, may_attend = torch.randn(2, 9, 24), torch.rand(9, 9) > 0.5
    may_attend.fill_diagonal_(True)
    expected = stock(query, query, query, attn_mask=~may_attend, need_weights=False)[0]
    torch.testing.assert_close(ours(query, attn_mask=may_attend), expected)
    ranges = torch.tensor([[0, 4], [6, 7]], dtype=torch.int32).repeat(9, 1, 1)
    visible = (torch.arange(9) < 4) | (torch.arange(9) == 6)
    expected = stock(query, query, query, attn_mask=~visible.expand(9, 9), need_weights=False)[0]
    torch.testing.assert_close(ours(query, key_ranges=ranges), expected)


def test_self_attention_starts_like_multihead_attention():
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(24, 3)
    torch.manual_seed(3)
    ours = RoutedSelfAttention(24, 3)
    for name, tensor in ours.state_dict().items():
        assert tensor.std() == 0 or 0.9 < tensor.std() / stock.state_dict()[name].std() < 1.1, name


def test_self_attention_equals_plain_operators():
    module = RoutedSelfAttention(24, 3)
    routing = routed_attention_arguments(queries=11)["routing"]
    query, position = torch.randn(2, 11, 24), torch.randn(2, 11, 24)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (3, 8)).transpose(1, 2)
        for x, w, b in zip((query + position, query + position, query), weights, biases, strict=True)
    )
    expected = module.out_proj(EAGER["routed_attention"](q, k, v, routing).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(query, position, routing), expected)
    with pytest.raises(ValueError, match=r"query: expected shape \[B, N, C=24\], got \[2, 11, 25\]"):
        module(torch.zeros(2, 11, 25))


@pytest.mark.parametrize("strength", [None, 0.3])
def test_router_and_attention_compile_whole(strength):
    router, attention = random_router(embed_dim=16), RoutedSelfAttention(16, 2)

    def layer(query):
        return attention(query, routing=None if strength is None else router(query, strength=strength))

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = [*attention.parameters(), *([] if strength is None else router.parameters())]
    for queries in (9, 14):
        query, grad_output = torch.randn(2, 2, queries, 16)
        expected, output = layer(query), compiled(query)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(form, parameters, grad_output) for form in (output, expected))
        for grad, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


# ---- MSDeformAttn --------------------------------------------------------------------------------------------------


def test_deformable_attention_has_the_public_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in MSDeformAttn().state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_deformable_attention_starts_as_published():
    """Each head looks along its own direction, at 1, 2, ... pixels, with equal weights."""
    module = MSDeformAttn(num_heads=8, num_points=4)
    offsets = module.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    directions = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    for head, direction in enumerate(directions):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            torch.testing.assert_close(offsets[head, :, point], expected.expand(4, 2), rtol=1e-5, atol=1e-5)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert (zero == 0).all()


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("reference_levels", [1, 2])
@pytest.mark.parametrize("padded", [True, False])
def test_deformable_attention_equals_plain_operators(coordinates, reference_levels, padded):
    shapes, channels, heads, points = ((4, 5), (2, 3)), 12, 3, 2
    module = MSDeformAttn(channels, 2, heads, points).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, memory = torch.randn(2, 7, channels).double(), torch.randn(2, 26, channels).double()
    references = torch.rand(2, 7, reference_levels, coordinates).double()
    mask = torch.rand(2, 26) > 0.7 if padded else None

    def plain():
        value = module.value_proj(memory).unflatten(-1, (heads, -1))
        offsets = module.sampling_offsets(query).view(2, 7, heads, 2 * points, 2)
        logits = module.attention_weights(query).view(2, 7, heads, 2 * points)
        return module.output_proj(
            EAGER["ms_deform_attn_fused"](value, shapes, references, offsets, logits, value_mask=mask)
        )

    leaves = [query.requires_grad_(), memory.requires_grad_(), references.requires_grad_(), *module.parameters()]
    grad_output = torch.randn(2, 7, channels).double()
    results = []
    for form in (plain, lambda: module(query, references, memory, shapes, padding_mask=mask)):
        output = form()
        results.append([output, *torch.autograd.grad(output, leaves, grad_output)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    spatial_shapes = torch.tensor(shapes)
    torch.testing.assert_close(module(query, references, memory, spatial_shapes, padding_mask=mask), results[0][0])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: QueryRouter(rank=0), "QueryRouter: rank: expected a positive number, got 0"),
        (lambda: QueryRouter(gate_rank=-1), "QueryRouter: gate_rank: expected a positive number, got -1"),
        (
            lambda: RoutedSelfAttention(30, 4),
            "RoutedSelfAttention: embed_dim: expected a multiple of num_heads=4, got 30",
        ),
        (lambda: MSDeformAttn(32, 0), "MSDeformAttn: num_levels: expected a positive number, got 0"),
        (lambda: MSDeformAttn(30, num_heads=4), "MSDeformAttn: embed_dim: expected a multiple of num_heads=4, got 30"),
    ],
)
def test_sizes_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_of_another_type():
    with pytest.raises(TypeError, match=r"^QueryRouter: rank: expected ints, got 2.5"):
        QueryRouter(rank=2.5)
    with pytest.raises(TypeError, match=r"^MSDeformAttn: num_heads: expected ints, got 2.0"):
        MSDeformAttn(16, 2, 2.0)
    with pytest.raises(ValueError, match=r"^AddLayerNorm: keep: expected one of output, normalized, got 'input'"):
        AddLayerNorm(16, keep="input")
