from collections import Counter

import pytest
import torch
from small_detector import assert_close, small_batch, small_detector, trained_step
from torch._dynamo.testing import CompileCounter

import route_kernels as rk
from route_detr.config import TrainConfig
from route_detr.model.criterion import Criterion
from route_detr.predict import routing_factors
from route_kernels.nn import MSDeformAttn, QueryRouter, RoutedSelfAttention


def layer_losses(losses):
    """{(layer, kind): loss over both branches}."""
    merged = Counter()
    for name, part in losses.items():
        if name != "loss":
            row, kind = name.split("/")
            merged[row.partition(".")[0], kind] += part.item()
    return merged


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("routed", ["last:1", "last:2", "all", (1,), (0, 2)])
def test_packed_branches_equal_two_passes(routed, strength):
    detectors = [small_detector(routed_layers=routed, branches=form) for form in ("packed", "two_pass")]
    (packed, losses, gradients), (naive, expected_losses, expected) = (
        trained_step(detector, small_batch(), strength, 0.6) for detector in detectors
    )
    fork = detectors[0].config.routed_layer_indices[0] if strength else 3
    assert [layer.boxes.shape[1] for layer in packed.layers] == [1] * fork + [2] * (3 - fork)
    assert [layer.boxes.shape[1] for layer in naive.layers] == [2, 2, 2]
    for ours, theirs in zip(packed.layers, naive.layers, strict=True):
        assert_close(ours.boxes.expand_as(theirs.boxes), theirs.boxes)
        assert_close(ours.logits.expand_as(theirs.logits), theirs.logits)
    assert_close(losses["loss"], expected_losses["loss"])
    assert layer_losses(losses) == pytest.approx(layer_losses(expected_losses), rel=1e-9, abs=1e-12)
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert_close(gradients[name], expected[name])


@pytest.mark.parametrize(("strengths", "fork"), [((0.2, 0.9), 1), ((0.0, 0.4), 2), ((0.4, 0.0), 1)])
def test_each_routed_layer_has_its_own_strength(strengths, fork):
    detectors = [small_detector(branches=form) for form in ("packed", "two_pass")]
    (packed, losses, gradients), (_, expected_losses, expected) = (
        trained_step(detector, small_batch(), strengths, 0.6) for detector in detectors
    )
    assert [layer.boxes.shape[1] for layer in packed.layers] == [1] * fork + [2] * (3 - fork)
    assert_close(losses["loss"], expected_losses["loss"])
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient)
    routers = [sum(g.abs().sum() for n, g in gradients.items() if f".routers.{layer}." in n) for layer in (1, 2)]
    assert [bool(total > 0) for total in routers] == [strength > 0 for strength in strengths]


@pytest.mark.parametrize(("route_type", "other"), [("suppressor", "del"), ("delegator", "sup")])
def test_a_fixed_route_type_is_that_product_alone(route_type, other):
    detector = small_detector(routed_layers=(1,))
    images, padding_mask, _ = batch = small_batch()
    factors = routing_factors(detector, images, padding_mask)[1].factors
    memory = detector.eval().encoded(detector.backbone(images), padding_mask)
    queries, _ = list(detector.decoder.steps(detector.proposals(memory)[1], memory))[1]
    fixed = detector.decoder.routing(1, queries, 1.0, route_type)
    q, k = (factors.sup_q, factors.sup_k) if route_type == "suppressor" else (factors.del_q, factors.del_k)
    assert_close(rk.routing_bias(fixed), (q @ k.mT).clamp(-5, 5))
    detector.train().set_routing(0.3, 0.6, route_type)
    images, padding_mask, targets = batch
    Criterion(TrainConfig())(detector(images, padding_mask), targets)["loss"].backward()
    router = dict(detector.decoder.routers["1"].named_parameters())
    unused = {name for name, parameter in router.items() if parameter.grad is None or not parameter.grad.abs().sum()}
    assert unused == {
        *("selector_a.weight", "selector_b.weight", f"router_gamma_{other}"),
        *(f"router_{side}_{other}.weight" for side in "UV"),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (((0.1, 0.1, 0.1), 0.5), "strength: expected one number or 2, one a routed layer, got 3"),
        ((0.1, 0.5, "both"), "route_type: expected one of gated, suppressor, delegator, got 'both'"),
    ],
)
def test_bad_routing_is_a_clear_error(values, message):
    with pytest.raises(ValueError, match=message):
        small_detector().set_routing(*values)


def test_every_trained_parameter_gets_a_gradient():
    _, _, gradients = trained_step(small_detector(routed_layers="all"), small_batch(), 0.3, 0.6)
    without = {name for name, gradient in gradients.items() if gradient.abs().sum() == 0}
    assert without == set()


def test_branches_differ_after_the_fork_only():
    output, _, _ = trained_step(small_detector(routed_layers=(1,)), small_batch(), 1.0, 0.6)
    main, aux = output.layers[1].boxes.unbind(1)
    assert (main - aux).abs().max() > 1e-6


@pytest.mark.parametrize("branches", ["packed", "two_pass"])
def test_warm_up_is_the_plain_detector_counted_one_plus_alpha_times(branches):
    batch = small_batch()
    routed = small_detector(branches=branches)
    plain = small_detector(route=False)
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".routers." not in k})
    _, losses, gradients = trained_step(routed, batch, 0.0, 0.4)
    _, plain_losses, _ = trained_step(plain, batch, 0.0, 0.0)
    for (layer, kind), value in layer_losses(plain_losses).items():
        factor = 1 if layer == "proposals" else 1.4
        assert layer_losses(losses)[layer, kind] == pytest.approx(factor * value, rel=1e-6)
    assert all(gradients[name].abs().sum() == 0 for name in gradients if ".routers." in name)


def test_warm_up_runs_each_decoder_layer_once():
    detector = small_detector()
    calls = []
    for layer in detector.decoder.layers:
        layer.self_attention.register_forward_hook(lambda *_: calls.append(1))
    trained_step(detector, small_batch(), 0.0, 0.4)
    assert len(calls) == 3


def test_two_routed_layers_of_three_fork_late():
    """One pass of layer 0; for layers 1 and 2 one cross-attention over one value, one more self-attention."""
    detector = small_detector(routed_layers="last:2")
    calls = Counter()
    for name, module in detector.decoder.named_modules():
        if isinstance(module, RoutedSelfAttention | MSDeformAttn):
            module.register_forward_hook(lambda module, *_, name=name: calls.update([name]))
    trained_step(detector, small_batch(), 0.3, 0.4)
    assert [calls[f"layers.{i}.self_attention"] for i in range(3)] == [1, 2, 2]
    assert [calls[f"layers.{i}.cross_attention"] for i in range(3)] == [1, 1, 1]


def test_eval_costs_nothing(monkeypatch):
    routed = small_detector(routed_layers="all").eval()
    routed.set_routing(0.3, 0.7)
    plain = small_detector(route=False, seed=1).eval()
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".routers." not in k})
    routings = []

    def forbidden(*_, **__):
        raise AssertionError("a router ran in eval mode")

    original = RoutedSelfAttention.forward
    monkeypatch.setattr(QueryRouter, "forward", forbidden)
    monkeypatch.setattr(
        RoutedSelfAttention,
        "forward",
        lambda self, q, p, r=None, **more: routings.append(r) or original(self, q, p, r, **more),
    )
    monkeypatch.setattr(rk, "query_similarity", forbidden)
    images, padding_mask, _ = small_batch()
    with torch.no_grad():
        ours, theirs = routed(images, padding_mask), plain(images, padding_mask)
    assert routings == [None] * 6
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.logits, theirs.logits)
    assert ours.aux_weight == 0 and all(layer.boxes.shape[1] == 1 for layer in ours.layers)


def test_plain_detector_has_no_router():
    detector = small_detector(route=False)
    assert not any(isinstance(module, QueryRouter) for module in detector.modules())
    output, losses, _ = trained_step(detector, small_batch(), 0.0, 0.0)
    assert output.aux_weight == 0
    assert "layer2/class" in losses


def test_strength_and_alpha_survive_reload(tmp_path):
    first = small_detector()
    first.set_routing(0.25, 0.625)
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second = small_detector(seed=1)
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert second.routing.strength.tolist() == [0, 0.25, 0.25] and second.routing.aux_weight == 0.625
    batch = small_batch()
    (_, losses, _), (_, expected, _) = (
        trained_step(detector, batch, detector.routing.strength[-1].item(), detector.routing.aux_weight.item())
        for detector in (second, first)
    )
    assert losses["loss"] == expected["loss"]
    assert second.train()(*batch[:2]).layers[-1].boxes.shape[1] == 2


def test_a_schedule_that_changes_each_step_is_one_compiled_graph():
    detector = small_detector(decoder_layers=2, routed_layers="last:1", dtype=torch.float32)
    images, padding_mask, _ = small_batch(dtype=torch.float32)
    features = [feature.detach() for feature in detector.backbone(images)]
    counter = CompileCounter()
    compiled = torch.compile(detector.transformer, backend=counter, fullgraph=True)
    for strength, aux_weight in ((0.1, 0.3), (0.2, 0.4), (0.3, 0.5)):
        detector.set_routing(strength, aux_weight)
        ours, expected = compiled(features, padding_mask), detector.transformer(features, padding_mask)
        assert_close(ours.layers[-1].boxes, expected.layers[-1].boxes, 1e-4)
        assert ours.aux_weight == expected.aux_weight
    assert counter.frame_count == 1
