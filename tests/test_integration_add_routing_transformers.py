"""Routing added to the decoders of transformers, against their own attention with the bias in its mask."""

import inspect
from functools import partial

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers
from foreign_decoder import bias_of, normal
from integration_checks import assert_agree
from torch import nn
from torch.nn import functional as F
from transformers_models import model_and_inputs

import route_kernels as rk
from route_kernels.integrations import add_routing
from route_kernels.testing import counted_calls, perturb_sampling, relative_errors, training_step

PATTERN = "decoder.layers.*.self_attn"
MASKED = (
    "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3",
    "pp_doclayout_v4", "grounding_dino", "mm_grounding_dino", "omdet_turbo",
)  # fmt: skip


def randomise(routers):
    torch.manual_seed(2)
    for router in routers.values():
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.7)


def with_bias_in_the_mask(module, args, kwargs, *, sign, settings):
    """A pre-hook of a transformers self-attention: the bias of its router is added to its attention mask."""
    call = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    call = {**call.pop("kwargs", {}), **call}
    call.pop("self")
    if "queries" in call:
        content, positioned = call["values"], call["queries"]
    else:
        content = call["hidden_states"]
        position = call.get("position_embeddings", call.get("query_position_embeddings"))
        positioned = content if position is None else content + position
    bias = sign * bias_of(module.router, content, positioned, settings)[:, None]
    mask = call.get("attention_mask")
    return (), {**call, "attention_mask": bias if mask is None else bias + mask}


def biased_step(function, model, inputs, names, settings, sign=1.0):
    """A training step of the original modules; the routers are called by hooks."""
    hook = partial(with_bias_in_the_mask, sign=sign, settings=settings)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name in names]
    try:
        return training_step(function, inputs, module=model)
    finally:
        for handle in handles:
            handle.remove()


def routed(model, settings, *args, **kwargs):
    with rk.routing(**settings):
        return model(*args, **kwargs)


@pytest.mark.parametrize("family", MASKED)
def test_a_model_has_its_bias(family):
    model, inputs = model_and_inputs(family)
    perturb_sampling(model)
    plain = training_step(model, inputs)
    settings = {"strength": 0.7}
    with add_routing(model, PATTERN, verbose=False, rank=4) as added:
        randomise(added.routers)
        assert len(added.routers) == 2 and not added.left
        with counted_calls() as counts:
            found = training_step(partial(routed, model, settings), inputs, module=model)
        assert counts == {"routed_attention": 2, "query_similarity": 2}
        expected = biased_step(model, model, inputs, added.routers, settings)
        assert_agree(found, expected, 1e-7)
        mistaken = biased_step(model, model, inputs, added.routers, settings, sign=-1.0)
        assert max(relative_errors(mistaken, expected).values()) > 1e-3
        with counted_calls() as counts:
            outside = training_step(model, inputs)
        assert not counts
        assert_agree(outside, plain, tolerance=0)
    assert_agree(training_step(model, inputs), plain, tolerance=0)


# ---- modules of which no model is built above ----------------------------------------------------------------------


def attention_module(name, config_name, *arguments, **settings):
    """transformers' class of that name, wherever it lives, in float64 with weights that matter."""
    config = getattr(transformers, config_name)(**settings)
    modeling = inspect.getmodule(getattr(transformers, config_name.replace("Config", "Model")))
    module = getattr(modeling, name)(config, *arguments).double()
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return nn.ModuleDict({"self_attn": module})


DETR_LIKE = {
    "detr": ("DetrSelfAttention", "DetrConfig", 16, 2),
    "conditional_detr": ("ConditionalDetrDecoderSelfAttention", "ConditionalDetrConfig", 16, 2),
    "conditional_detr encoder": ("ConditionalDetrSelfAttention", "ConditionalDetrConfig", 16, 2),
    "maskformer": ("MaskFormerDetrSelfAttention", "MaskFormerConfig", 16, 2),
    "deformable_detr without bias": ("DeformableDetrSelfAttention", "DeformableDetrConfig", 16, 2, 0.0, False),
}
MASKS = {
    "none": None,
    "additive": normal(2, 1, 7, 7, seed=4),
    "minus infinity": torch.where(normal(7, 7, seed=4).fill_diagonal_(0) > 0.7, -torch.inf, 0.0).double(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("case", DETR_LIKE.values(), ids=DETR_LIKE)
def test_a_module_has_its_bias(case, mask):
    built = attention_module(*case)
    attention = built["self_attn"]
    attention.scaling *= 1.5
    position_name = next(name for name in inspect.signature(attention.forward).parameters if "position" in name)
    inputs = {
        "hidden_states": normal(2, 7, 16).requires_grad_(),
        position_name: normal(2, 7, 16, seed=1).requires_grad_(),
        "attention_mask": mask,
    }
    settings = {"strength": 0.7, "confidence": normal(2, 7, seed=2).sigmoid(), "geometry": normal(2, 7, seed=3)}
    added = add_routing(built, "self_attn", verbose=False, rank=4)
    randomise(added.routers)
    found = training_step(lambda **call: routed(attention, settings, **call)[0], inputs, module=built)
    expected = biased_step(lambda **call: attention(**call)[0], built, inputs, added.routers, settings)
    assert_agree(found, expected)


def test_a_bool_mask_says_where_a_query_may_attend():
    built = attention_module(*DETR_LIKE["detr"], attn_implementation="sdpa")
    attention = built["self_attn"]
    allowed = normal(7, 7, seed=4).fill_diagonal_(0) < 0.7
    randomise(add_routing(built, "self_attn", verbose=False).routers)
    additive = torch.where(allowed, 0.0, -torch.inf).double()
    x = normal(2, 7, 16)
    assert torch.equal(attention(x, allowed)[0], attention(x, additive)[0])
    torch.testing.assert_close(routed(attention, {}, x, allowed)[0], routed(attention, {}, x, additive)[0])


def test_rotary_positions_are_not_added():
    built = attention_module(*DETR_LIKE["detr"])
    add_routing(built, "self_attn", verbose=False)
    x = normal(2, 7, 16)
    with rk.routing(), pytest.raises(TypeError, match=r"position_embeddings: expected a tensor .* got tuple"):
        built["self_attn"](x, position_embeddings=(x.sin(), x.cos()))


@pytest.mark.parametrize("family", ["lw_detr", "rf_detr"])
@pytest.mark.parametrize("training", [True, False], ids=["groups", "one group"])
def test_groups_of_queries_are_routed_apart(family, training):
    model, _ = model_and_inputs(family)
    name = "model.decoder.layers.0.self_attn"
    attention = model.train(training).get_submodule(name)
    groups, queries, channels = (2 if training else 1), 7, 16
    settings = {
        "strength": 0.7,
        "confidence": normal(2, groups * queries, seed=2).sigmoid(),
        "geometry": normal(2, groups * queries, seed=3),
    }
    router = add_routing(model, name, verbose=False, rank=4).routers[name]
    randomise({name: router})
    inputs = (normal(2, groups * queries, channels).requires_grad_(), normal(2, groups * queries, channels, seed=1))

    def group_by_group(content, position):
        outputs = []
        for group in range(groups):
            part = slice(group * queries, (group + 1) * queries)
            features = {**settings, **{key: settings[key][:, part] for key in ("confidence", "geometry")}}
            values, positioned = content[:, part], (content + position)[:, part]
            bias = bias_of(router, values, positioned, features)[:, None]
            projected = (attention.q_proj(positioned), attention.k_proj(positioned), attention.v_proj(values))
            heads = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in projected)
            attended = F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=attention.scaling)
            outputs.append(attention.o_proj(attended.transpose(1, 2).flatten(2)))
        return torch.cat(outputs, 1)

    found = training_step(lambda *call: routed(attention, settings, *call)[0], inputs, module=attention)
    assert_agree(found, training_step(group_by_group, inputs, module=attention))


@pytest.mark.parametrize("family", ["lw_detr", "rf_detr"])
def test_a_model_with_groups_trains_its_routers(family):
    model, inputs = model_and_inputs(family)
    plain = training_step(model, inputs)
    added = add_routing(model, PATTERN, verbose=False)
    found = training_step(partial(routed, model, {}), inputs, module=model)
    gradients = [gradient for name, gradient in found.items() if ".router." in name]
    assert len(gradients) == 24 and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    added.revert()
    assert_agree(training_step(model, inputs), plain, tolerance=0)


# ---- the models around them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_does_not_matter_inside(attention):
    model, inputs = model_and_inputs("deformable_detr")
    added = add_routing(model, PATTERN, verbose=False)
    for name in added.routers:
        model.get_submodule(name).config._attn_implementation = attention
    randomise(added.routers)
    with counted_calls() as counts:
        found = training_step(partial(routed, model, {}), inputs, module=model)
    assert counts["routed_attention"] == 2
    assert_agree(found, biased_step(model, model, inputs, added.routers, {}), 1e-7)


def test_attention_weights_are_an_error_inside():
    model, inputs = model_and_inputs("rt_detr")
    model.set_attn_implementation("eager")
    add_routing(model, PATTERN, verbose=False)
    assert len(model(**inputs, output_attentions=True).decoder_attentions) == 2
    with rk.routing(), pytest.raises(ValueError, match="output_attentions=True: routed attention has no attention"):
        model(**inputs, output_attentions=True)


def test_masks_that_grounding_dino_would_add_up_are_refused():
    model, _ = model_and_inputs("grounding_dino")
    added = add_routing(model, PATTERN, verbose=False)
    attention = model.get_submodule(next(iter(added.routers)))
    x = normal(2, 7, 32)
    with rk.routing(), pytest.raises(TypeError, match=r"attention_mask: expected a floating mask, .* got torch\.bool"):
        attention(x, x, x, attention_mask=torch.ones(7, 7, dtype=torch.bool))


def test_what_is_no_self_attention_is_left():
    model, _ = model_and_inputs("deformable_detr")
    added = add_routing(model, "layers.*.self_attn", verbose=False)
    assert [entry.name for entry in added.replaced] == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    assert {entry.reason for entry in added.left} == {
        "DeformableDetrMultiscaleDeformableAttention is no self-attention that is known here"
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers():
    model, inputs = model_and_inputs("deformable_detr")
    randomise(add_routing(model, PATTERN, verbose=False).routers)
    step = partial(routed, model, {})
    expected = training_step(step, inputs, module=model)
    context = {"use_reentrant": False, "context_fn": rk.routing.checkpoint_contexts}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=context)
    with counted_calls() as counts:
        found = training_step(step, inputs, module=model)
    assert counts["routed_attention"] == 4
    assert_agree(found, expected, tolerance=1e-12)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="context_fn"):
        training_step(step, inputs, module=model)


def test_together_with_our_deformable_attention():
    model, inputs = model_and_inputs("deformable_detr")
    perturb_sampling(model)
    randomise(add_routing(model, PATTERN, verbose=False).routers)
    step = partial(routed, model, {})
    expected = training_step(step, inputs, module=model)
    with rk.integrations.transformers.apply(model, verbose=False), counted_calls() as counts:
        found = training_step(step, inputs, module=model)
    assert counts == {"routed_attention": 2, "query_similarity": 2, "ms_deform_attn_fused": 4}
    assert_agree(found, expected, 1e-7)


def test_saved_models_load_once_the_routers_are_out(tmp_path):
    model, inputs = model_and_inputs("rt_detr")
    with add_routing(model, PATTERN, verbose=False):
        routed(model, {}, **inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    loaded.eval()
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
