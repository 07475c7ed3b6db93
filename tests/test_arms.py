"""Arms of a comparison that are a form of the detector: frozen routers, and layers that are causal by confidence."""

import pytest
import torch
from small_detector import assert_close, small_batch, small_detector, trained_step

from route_detr.model.decoder import attend_to_the_confident
from route_kernels.nn import RoutedSelfAttention

CAUSAL = {"route": False, "causal_from": 1}


def test_a_query_attends_to_itself_and_to_the_more_confident():
    torch.manual_seed(0)
    attention = RoutedSelfAttention(16, 2).double()
    x, position = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    confidence = torch.rand(3, 7, dtype=torch.float64)
    confidence[1] = 0.5  # of equal ones the first is above
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(1)
    above = rank[:, None, :] <= rank[:, :, None]  # [B, N, N]
    expected = attention(x, position, attn_mask=above[:, None])
    assert_close(attend_to_the_confident(attention, x, position, confidence), expected)
    assert torch.equal(above[1], torch.ones(7, 7).tril().bool())


def test_only_layers_from_there_on_are_causal():
    detector = small_detector(**CAUSAL)
    assert [layer.causal for layer in detector.decoder.layers] == [False, True, True]
    assert not any(layer.causal for layer in small_detector(route=False).decoder.layers)


@pytest.mark.parametrize("training", [True, False])
def test_the_mask_stays_at_inference(training):
    detector = small_detector(**CAUSAL).train(training)
    images, padding_mask, _ = small_batch()
    memory = detector.encoded(detector.backbone(images), padding_mask)
    entering = [queries for queries, _ in detector.decoder.steps(detector.proposals(memory)[1], memory)]
    layer, queries = detector.decoder.layers[1], entering[1]
    least = queries.confidence[0, 0].argmin()
    before = layer(queries, memory, None, True)[0, 0]
    content = queries.content.clone()
    content[0, 0, least] += 1
    after = layer(queries._replace(content=content), memory, None, True)[0, 0]
    changed = (after - before).abs().amax(-1) > 1e-9
    assert changed.tolist() == [query == least for query in range(7)]


def test_a_frozen_router_has_no_gradient_and_all_else_has():
    frozen = small_detector(router_frozen=True)
    still = {name for name, parameter in frozen.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in frozen.named_parameters() if ".routers." in name} != set()
    ours, free = (trained_step(each, small_batch(), 0.3, 0.6)[2] for each in (frozen, small_detector()))
    for name, gradient in free.items():
        assert_close(ours[name], 0 * gradient if name in still else gradient)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal_from": 1}, "causal_from: expected 0 with routing or denoising"),
        ({**CAUSAL, "causal_from": 3}, "causal_from: expected less than decoder_layers = 3, got 3"),
    ],
)
def test_forms_that_do_not_fit_are_a_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        small_detector(**changes)
