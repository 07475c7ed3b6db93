import pytest
import torch
from small_detector import VARIANTS, assert_close, small_batch, small_detector, trained_step

import route_kernels as rk
from route_detr.config import DetectorConfig
from route_detr.model.denoising import Denoising, group_similarity
from route_kernels.boxes import corners
from route_kernels.nn import RoutedSelfAttention, pack_targets

DINO = VARIANTS["tiny-dino"]
COUNTS = (3, 1, 0)


def noisy_queries(counts=COUNTS, pairs=6, **changes):
    """A detector, its memory, its queries with denoising, all in float64; two groups for three targets."""
    detector = small_detector(**{**DINO, "denoising_pairs": pairs, **changes}).train()
    images, padding_mask, targets = small_batch(counts=counts, padded=False)
    memory = detector.encoded(detector.backbone(images), padding_mask)
    _, queries = detector.proposals(memory)
    torch.manual_seed(0)
    return (
        detector,
        memory,
        queries,
        detector.denoising(queries, pack_targets(targets, images.device, images.dtype, 91)),
    )


def test_each_target_has_a_positive_and_a_negative_in_each_group():
    _, _, queries, noisy = noisy_queries()
    known = noisy.denoising
    assert (known.groups, known.group_size, known.group_counts.tolist()) == (2, 6, [6, 2, 0])
    assert noisy.content.shape[2] == queries.content.shape[2] + 12
    assert known.target[0].tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert known.positive[0].tolist() == [True, False] * 6
    assert known.present[1].tolist() == ([True] * 2 + [False] * 4) * 2
    assert not known.present[2].any() and not (known.positive & ~known.present).any()


def visible(key_ranges, keys):
    """bool [B, N, M] of key_ranges [B, N, 2, 2]."""
    key = torch.arange(keys)
    return ((key_ranges[..., :1] <= key) & (key < key_ranges[..., 1:])).any(2)


def test_who_sees_whom():
    _, _, queries, noisy = noisy_queries()
    matching, total = queries.content.shape[2], noisy.content.shape[2]
    sees = visible(noisy.key_ranges, total)
    group = torch.full((total,), -1)
    group[matching:] = torch.arange(total - matching) // noisy.denoising.group_size
    present = torch.cat([torch.ones(3, matching, dtype=torch.bool), noisy.denoising.present], 1)
    allowed = (group == -1) | (group[:, None] == group)
    assert torch.equal(sees, allowed & present[:, :, None] & present[:, None])


@pytest.mark.parametrize("routed_queries", ["matching", "denoising", "both"])
def test_matching_queries_see_nothing_of_denoising(routed_queries):
    detector = small_detector(**DINO, routed_queries=routed_queries, routed_layers="all")
    alone = small_detector(**{**DINO, "denoising_pairs": 0}, routed_layers="all")
    weights = {name: value for name, value in detector.state_dict().items() if not name.startswith("denoising.")}
    alone.load_state_dict(weights)
    output, _, _ = trained_step(detector, small_batch(), 1.0, 0.6)
    expected, _, _ = trained_step(alone, small_batch(), 1.0, 0.6)
    assert output.denoising is not None and expected.denoising is None
    for index, (ours, theirs) in enumerate(zip(output.layers, expected.layers, strict=True)):
        main, aux = ours.boxes.unbind(1)
        assert_close(main, theirs.boxes[:, 0])
        if routed_queries == "denoising":
            assert_close(aux, main)  # their rows carry no bias
        else:
            assert_close(aux, theirs.boxes[:, 1])
            assert (aux - main).abs().max() > 1e-6, index


@pytest.mark.parametrize("changed", ["first group", "absent"])
def test_a_denoising_query_reaches_its_own_group_only(changed):
    detector, memory, queries, noisy = noisy_queries(routed_queries="both", routed_layers="all")
    detector.set_routing(1.0, 0.5)
    matching, known = queries.content.shape[2], noisy.denoising
    slots = torch.arange(known.target.shape[1])
    touched = (slots < known.group_size if changed == "first group" else slots >= 0).expand_as(known.present)
    touched = touched & (known.present if changed == "first group" else ~known.present)
    content = noisy.content.clone()
    content[:, 0, matching:] += touched[..., None] * torch.randn_like(content[:, 0, matching:])
    before, after = (
        detector.decoder(start, memory, detector.routing.read())[-1].boxes
        for start in (noisy, noisy._replace(content=content))
    )
    moved = ((after - before).abs().amax((1, 3)) > 1e-9)[:, matching:]
    assert torch.equal(before[:, :, :matching], after[:, :, :matching])
    assert torch.equal(moved & known.present, touched & known.present)


@pytest.mark.parametrize(
    ("routed_queries", "rows"), [("matching", "matching"), ("denoising", "denoising"), ("both", "all")]
)
def test_which_pairs_get_bias(routed_queries, rows, monkeypatch):
    detector, memory, queries, noisy = noisy_queries(routed_queries=routed_queries, routed_layers="all")
    detector.set_routing(1.0, 0.5)
    matching, biases = queries.content.shape[2], []
    original = RoutedSelfAttention.forward

    def watched(self, query, position, routing=None, **masks):
        if routing is not None:
            sees = visible(masks["key_ranges"], query.shape[1])
            biases.append((rk.routing_bias(routing) != 0) & sees)
        return original(self, query, position, routing, **masks)

    monkeypatch.setattr(RoutedSelfAttention, "forward", watched)
    detector.decoder(noisy, memory, detector.routing.read())
    sees = visible(noisy.key_ranges, noisy.content.shape[2])
    is_denoising = torch.arange(sees.shape[1]) >= matching
    routed = {"matching": ~is_denoising, "denoising": is_denoising, "all": is_denoising | ~is_denoising}[rows]
    assert len(biases) == 3
    for biased in biases:
        assert torch.equal(biased, sees & routed[:, None])


def test_denoising_follows_the_branches():
    for branches in ("packed", "two_pass"):
        detector = small_detector(**DINO, routed_queries="both", branches=branches)
        output, losses, _ = trained_step(detector, small_batch(), 0.3, 0.6)
        counts = [layer.boxes.shape[1] for layer in output.denoising.layers]
        assert counts == ([1, 2, 2] if branches == "packed" else [2, 2, 2])
        assert losses["layer2.aux.denoising/class"] > 0


def test_without_targets_there_is_nothing_to_denoise_and_without_any_given_an_error():
    detector = small_detector(**DINO)
    output, losses, gradients = trained_step(detector, small_batch(counts=(0, 0)), 0.3, 0.6)
    assert losses["loss"].isfinite() and output.denoising.layers[0].boxes.shape[2] == 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    with pytest.raises(ValueError, match="targets: expected those of the images"):
        detector(*small_batch()[:2])
    assert detector.eval()(*small_batch()[:2]).denoising is None


def noise(label_noise=0.0, box_noise=0.0):
    """Targets, and the labels and boxes that 4000 pairs start from."""
    config = DetectorConfig(
        **{"num_classes": 50, "query_position": "anchor", "denoising_pairs": 4000, "embed_dim": 8},
    )
    torch.manual_seed(0)
    module = Denoising(config)
    module.label_noise, module.box_noise = label_noise, box_noise
    labels, boxes = torch.randint(50, (2, 4000)), torch.rand(2, 4000, 4) * 0.1 + 0.4
    negative = (torch.arange(4000) % 2 == 1).expand(2, -1)
    return labels, boxes, negative, module._noisy_labels(labels), module._noisy_boxes(boxes, negative)


def test_without_noise_queries_start_from_their_targets():
    labels, boxes, _, noisy_labels, noisy_boxes = noise()
    assert torch.equal(labels, noisy_labels)
    torch.testing.assert_close(boxes, noisy_boxes)


def test_noise_moves_positives_less_than_negatives_and_draws_labels_anew():
    labels, boxes, negative, noisy_labels, noisy_boxes = noise(label_noise=0.5, box_noise=0.4)
    assert (labels != noisy_labels).float().mean() == pytest.approx(0.25 * 49 / 50, abs=0.03)
    moved = (corners(noisy_boxes) - corners(boxes)).abs() / boxes[..., 2:].repeat(1, 1, 2) / (0.4 * 0.5)
    assert moved[~negative].max() <= 1.001 and moved[~negative].mean() == pytest.approx(0.5, abs=0.02)
    assert moved[negative].min() >= 0.999 and moved[negative].max() <= 2.001


def test_far_noise_gives_boxes_without_negative_extent():
    *_, noisy_boxes = noise(box_noise=3.0)
    assert noisy_boxes.min() >= 0 and noisy_boxes.max() <= 1


def test_similarity_of_a_group_counts_its_present_queries_only():
    noisy = noisy_queries(counts=(3, 1))[-1]
    known = noisy.denoising
    content = torch.randn(2, known.target.shape[1], 16, dtype=torch.float64)
    similarity = group_similarity(content, known)
    for image, group in ((0, 1), (1, 0)):
        start, count = group * known.group_size, int(known.group_counts[image])
        alone = rk.query_similarity(content[image : image + 1, start : start + count])[0]
        assert_close(similarity[image, start : start + count], alone)
