"""transformers on our ops: every family's outputs, gradients and calls, and what apply() reports and reverts."""

import copy
import pickle
from importlib import import_module
from importlib.util import find_spec

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from integration_checks import assert_agree, check_integration
from transformers_models import EXAMPLES, attention_call, every_family, model_and_inputs

from route_kernels.integrations import transformers as integration
from route_kernels.integrations.codebases.transformers import FAMILIES, apply
from route_kernels.testing import counted_calls, perturb_sampling, training_step

one_of_each_core = pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "mask2former"])


def quietly(model_or_family=None):
    return apply(model_or_family, verbose=False)


def modeling(family):
    return import_module(FAMILIES[family].module)


def attention_class(family):
    return getattr(modeling(family), FAMILIES[family].attention)


def attention_modules(model, family):
    return [module for module in model.modules() if isinstance(module, attention_class(family))]


def with_a_forward_of_their_own(model, family):
    """The model, its attention modules of a subclass that someone wrote."""
    attention = attention_class(family)
    original = attention.forward

    class Own(attention):
        def forward(self, *args, **kwargs):
            return original(self, *args, **kwargs)

    for module in attention_modules(model, family):
        module.__class__ = Own
    return model


@every_family
def test_a_model_computes_the_same(family):
    model, inputs = model_and_inputs(family)
    calls = EXAMPLES[family].calls
    report = check_integration(model, inputs, lambda: quietly(model), {"ms_deform_attn_fused": calls})
    assert len(report.replaced) == calls and not report.left


@every_family
def test_the_plain_form_serves_code_with_a_forward_of_its_own(family):
    model, inputs = model_and_inputs(family)
    with_a_forward_of_their_own(model, family)
    held = FAMILIES[family].core.held_as
    reachable = held is not None and hasattr(attention_modules(model, family)[0], held)
    target = model if reachable else family
    check_integration(model, inputs, lambda: quietly(target), {"ms_deform_attn": EXAMPLES[family].calls})


@one_of_each_core
def test_a_family_is_switched_for_models_made_before_and_after(family):
    before, inputs = model_and_inputs(family)
    report = check_integration(
        before, inputs, lambda: quietly(family), {"ms_deform_attn_fused": EXAMPLES[family].calls}
    )
    assert [entry.name for entry in report.replaced] == [
        f"{family}: {FAMILIES[family].attention}",
        f"{family}: {FAMILIES[family].core.name}",
    ]
    expected = training_step(before, inputs)
    with quietly(family), counted_calls() as counts:
        after, _ = model_and_inputs(family)
        perturb_sampling(after)
        assert_agree(training_step(after, inputs), expected)
    assert dict(counts) == {"ms_deform_attn_fused": EXAMPLES[family].calls}


@pytest.mark.parametrize(
    "family, config",
    [
        ("deformable_detr", {"two_stage": False, "with_box_refine": False}),
        ("rt_detr_v2", {"decoder_offset_scale": 0.3}),
        ("d_fine", {"decoder_offset_scale": 0.3}),
        ("deimv2", {"decoder_n_points": 2}),
    ],
)
def test_settings_that_change_the_locations(family, config):
    """References without a size, another scale of the offsets, as many points on each level."""
    model, inputs = model_and_inputs(family, **config)
    check_integration(model, inputs, lambda: quietly(model), {"ms_deform_attn_fused": EXAMPLES[family].calls})


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "deformable_detr"])
def test_a_loss_with_denoising_queries(family):
    model, inputs = model_and_inputs(family)
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.5], [0.2, 0.6, 0.2, 0.3]], dtype=torch.float64)
    inputs["labels"] = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes.clone()} for _ in range(2)]
    check_integration(model, inputs, lambda: quietly(model), {"ms_deform_attn_fused": EXAMPLES[family].calls})


@pytest.mark.parametrize("family", ["rt_detr_v2", "d_fine", "deimv2"])
def test_the_discrete_method_stays_with_the_original(family):
    model, inputs = model_and_inputs(family, decoder_method="discrete")
    perturb_sampling(model)
    expected = training_step(model, inputs)
    with counted_calls() as counts:
        for target in (model, family):
            with quietly(target) as report:
                assert_agree(training_step(model, inputs), expected, tolerance=0)
                assert "method='default'" in report.left[0].reason
    assert not counts


@every_family
def test_attention_weights_come_where_they_are_asked_for(family):
    model, inputs = model_and_inputs(family)
    perturb_sampling(model)
    inputs["output_attentions"] = True
    expected = training_step(model, inputs)
    assert any("attentions" in name for name in expected)
    with quietly(model):
        assert_agree(training_step(model, inputs), expected)


@every_family
def test_attention_weights_are_not_made_unasked(family):
    module, arguments = attention_call(family)
    with quietly(module):
        weights = module(**arguments)[1]
    assert (weights is not None) == FAMILIES[family].weights_read


@one_of_each_core
def test_a_hook_sees_the_attention_weights(family):
    module, arguments = attention_call(family)
    expected = module(**arguments)[1]
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(output[1]))
    with quietly(module):
        module(**arguments)
    torch.testing.assert_close(seen[0], expected)


@one_of_each_core
def test_positional_arguments_keep_their_places(family):
    module, arguments = attention_call(family)
    expected = module(**arguments)[0]
    hidden_states, attention_mask = arguments.pop("hidden_states"), arguments.pop("attention_mask", None)
    with quietly(module):
        torch.testing.assert_close(module(hidden_states, attention_mask, **arguments)[0], expected)


@one_of_each_core
def test_backward_keeps_less(family):
    module, arguments = attention_call(family)

    def kept():
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = module(**arguments)[0]  # noqa: F841  the graph is alive while storages are counted
        return sum(storages.values())

    original = kept()
    with quietly(module):
        assert kept() < original


@pytest.mark.parametrize("family", ["mask2former", "oneformer"])
def test_an_op_that_fails_is_not_papered_over(family, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("the op failed")

    model, inputs = model_and_inputs(family)
    monkeypatch.setattr(integration, "ms_deform_attn_fused", fail)
    with quietly(model), pytest.raises(RuntimeError, match="the op failed"):
        model(**inputs)


@one_of_each_core
def test_a_copy_of_a_replaced_model_is_its_own(family):
    model, inputs = model_and_inputs(family)
    with quietly(model):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        with counted_calls() as counts:
            found = training_step(copied, inputs)
        assert {entry.reason for entry in quietly(copied).left} == {"already replaced by an earlier apply()"}
    assert dict(counts) == {"ms_deform_attn_fused": EXAMPLES[family].calls}
    original, _ = model_and_inputs(family)
    assert_agree(found, training_step(original, inputs))


@one_of_each_core
def test_an_unpickled_module_has_its_own_forward_and_is_replaced_anew(family):
    module, arguments = attention_call(family)
    expected = module(**arguments)[0]
    with quietly(module):
        unpickled = pickle.loads(pickle.dumps(module))
    with counted_calls() as counts:
        assert torch.equal(unpickled(**arguments)[0], expected)
        assert not counts
        with quietly(unpickled):
            torch.testing.assert_close(unpickled(**arguments)[0], expected)
    assert dict(counts) == {"ms_deform_attn_fused": 1}


def test_every_family_at_once_and_back():
    def names_of(families):
        for family in families:
            core = getattr(modeling(family.name), family.core.name)
            yield attention_class(family.name).forward
            yield core.forward if isinstance(core, type) else core

    families = [family for family in FAMILIES.values() if find_spec(f"transformers.models.{family.name}")]
    originals = list(names_of(families))
    report = quietly()
    assert len(report.replaced) == 2 * len(families)
    assert not set(originals) & set(names_of(families))
    again = quietly("rt_detr")
    assert not again.replaced and {entry.reason for entry in again.left} == {"already replaced by an earlier apply()"}
    integration.revert()
    assert list(names_of(families)) == originals


def test_a_model_of_a_replaced_family_is_left_as_it_is():
    model, _ = model_and_inputs("rt_detr")
    with quietly("rt_detr"), quietly(model) as report:
        assert not report.replaced and len(report.left) == 2
    with quietly(model), quietly(model) as report:
        assert {entry.reason for entry in report.left} == {"already replaced by an earlier apply()"}
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_cannot_be_reached_is_said():
    model, _ = model_and_inputs("mask2former")
    with quietly(with_a_forward_of_their_own(model, "mask2former")) as report:
        assert not report.replaced
        assert {entry.reason for entry in report.left} == {
            "Own has a forward of its own; apply('mask2former') may reach what it calls"
        }
    model, _ = model_and_inputs("rt_detr")
    modules = attention_modules(model, "rt_detr")
    modules[0].forward = lambda *args, own=modules[0].forward, **kwargs: own(*args, **kwargs)
    with quietly(model) as report:
        assert [entry.reason for entry in report.left] == [
            "other code has replaced its forward: apply() first, that code afterwards"
        ]
        assert len(report.replaced) == 1


@pytest.mark.parametrize("family", ["rt_detr", "d_fine", "mask2former"])
def test_casts_of_a_decorator_stay(family, monkeypatch):
    """The attention class's own, or those of the core where a subclass keeps its forward."""
    attention, cast = attention_class(family), torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    monkeypatch.setattr(attention, "forward", cast(attention.forward))
    model, inputs = model_and_inputs(family)
    first, results = attention_modules(model, family)[0], []
    first.register_forward_hook(lambda _, __, output: results.append(output[0].detach()))
    model = model.float().eval()
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**inputs)
        with quietly(model), counted_calls() as counts:
            model(**inputs)
    assert counts["ms_deform_attn_fused"] > 0
    expected, found = results
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deformable_detr", "d_fine", "mask2former"])
def test_under_autocast_the_core_returns_what_theirs_does(family):
    """In PyTorch `grid_sample` makes it float32, whatever value is in."""
    held = FAMILIES[family]
    core = getattr(modeling(family), held.core.name)
    shapes, value = [(3, 4), (2, 2)], torch.randn(2, 16, 2, 4, dtype=torch.bfloat16)
    samples = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    if held.core.name.endswith("v2"):
        arguments = (value, shapes, *(x.flatten(3, 4) for x in samples), [3, 3])
    elif isinstance(core, type):
        arguments = (value, torch.tensor(shapes), shapes, torch.tensor([0, 12]), *samples, 64)
    else:
        arguments = (value, shapes, *samples)

    def run():
        found = getattr(modeling(family), held.core.name)
        with torch.autocast("cpu", torch.bfloat16):
            return (found() if isinstance(found, type) else found)(*arguments)

    expected = run()
    with quietly(family), counted_calls() as counts:
        found = run()
    assert counts == {"ms_deform_attn": 1} and found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_how_positions_are_added_is_the_modules():
    model, inputs = model_and_inputs("mask2former")
    modules = attention_modules(model, "mask2former")
    for module in modules:
        module.with_pos_embed = lambda tensor, positions: tensor - positions
    expected = training_step(model, inputs)
    with quietly(model) as report:
        assert len(report.replaced) == len(modules)
        assert_agree(training_step(model, inputs), expected)


def test_the_report_is_printed(capsys):
    model, _ = model_and_inputs("rt_detr")
    with apply(model):
        assert capsys.readouterr().out.splitlines() == [
            "route-kernels: transformers: 2 replaced, 0 left",
            "  model.decoder.layers.0.encoder_attn  -> ms_deform_attn_fused",
            "  model.decoder.layers.1.encoder_attn  -> ms_deform_attn_fused",
        ]


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ("detr", ValueError, "expected one of deformable_detr, .*, oneformer; got 'detr'"),
        (7, TypeError, "expected a model, None or one of deformable_detr, .*, oneformer; got int"),
        (torch.nn.Linear(1, 1), ValueError, "one of deformable_detr, .*, oneformer; got Linear, which has none"),
    ],
)
def test_what_is_neither_model_nor_family(wrong, error, message):
    with pytest.raises(error, match=rf"transformers\.apply: model_or_family: .*{message}"):
        apply(wrong)


def test_an_unknown_version_is_left(monkeypatch):
    monkeypatch.delattr(attention_class("rt_detr"), "forward")
    with quietly("rt_detr") as report:
        assert "RTDetrMultiscaleDeformableAttention.forward of this version" in report.left[0].reason
    monkeypatch.delattr(modeling("lw_detr"), "MultiScaleDeformableAttention")
    with quietly("lw_detr") as report:
        assert report.left[0].reason.endswith("has no MultiScaleDeformableAttention")
