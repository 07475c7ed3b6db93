"""A small detector, a batch for it and one training step, for the detector's tests."""

from types import SimpleNamespace

import torch
from torch import nn

from route_detr.config import BackboneConfig, DetectorConfig, TrainConfig, preset
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector


def resnet(stem, channels):
    """Settings of a ResNet with one basic block a stage."""
    return {"layer_type": "basic", "embedding_size": stem, "hidden_sizes": channels, "depths": [1] * len(channels)}


SMALL = {
    "backbone": BackboneConfig(settings=resnet(4, [4, 8, 8, 12])),
    "num_classes": 3,
    "embed_dim": 16,
    "num_heads": 2,
    "num_points": 2,
    "num_levels": 4,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_queries": 7,
    "ffn_dim": 16,
    "router_rank": 4,
}


def small_detector(seed=0, dtype=torch.float64, **changes):
    """A small detector whose zero-initialised layers are perturbed, so that every gradient path is alive."""
    torch.manual_seed(seed)
    detector = Detector(DetectorConfig(**{**SMALL, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return detector


def small_batch(seed=0, size=(70, 45), counts=(3, 0), dtype=torch.float64, padded=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=dtype)
    padding_mask = torch.zeros(len(counts), *size, dtype=torch.bool)
    if padded:
        padding_mask[0, 50:], padding_mask[1, :, 33:] = True, True
        images = images.masked_fill(padding_mask[:, None], 0)
    targets = [
        SimpleNamespace(
            boxes=torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
            labels=torch.randint(3, (count,), generator=generator),
        )
        for count in counts
    ]
    return images, padding_mask, targets


TINY = preset("tiny").detector
VARIANTS = {
    name: {field: value for field, value in vars(preset(name).detector).items() if value != getattr(TINY, field)}
    for name in ("tiny", "tiny-dab", "tiny-dino")
}


def trained_step(detector, batch, strength, aux_weight):
    """Losses and gradients of one training step; the running statistics of the norms are left as they were."""
    images, padding_mask, targets = batch
    if detector.config.route:
        detector.set_routing(strength, aux_weight)
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    detector.zero_grad()
    torch.manual_seed(0)
    output = detector(images, padding_mask, targets)
    losses = Criterion(TrainConfig())(output, targets)
    losses["loss"].backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in detector.named_parameters()
    }
    return output, losses, gradients


def assert_close(actual, expected, relative=1e-9):
    assert (actual - expected).abs().max() <= relative * expected.abs().max().clamp_min(1e-6)
