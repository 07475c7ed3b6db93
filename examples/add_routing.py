"""Route-DETR's dual-branch training (arXiv 2512.13876) for transformers' Deformable DETR and RT-DETR, as they are.

    python examples/add_routing.py

Tiny random models learn the boxes of a few synthetic images. The main branch has plain self-attention, the auxiliary
branch the routing bias; both decode one memory with the same weights. At the end the routers go: the detector is
transformers' own again, at no cost at inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import route_kernels as rk

IMAGE_SIZE = 64
AUX_WEIGHT = 0.5  # alpha, the weight of the auxiliary branch's loss
MAX_STRENGTH = 0.3  # lambda after its ramp
RAMP_STEPS = 10


class Call(NamedTuple):
    args: tuple
    kwargs: dict
    output: Any


class DualBranch(nn.Module):
    """A detector of transformers, trained with a routed auxiliary branch over the memory of its main branch.

    Both branches in one forward: with a strength above 0 DistributedDataParallel finds every parameter used.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.routing = rk.integrations.add_routing(detector, "model.decoder.layers.[12].self_attn")  # the last 2 of 3

    def forward(self, images: Tensor, labels: list[dict], strength: float) -> tuple[Any, Any]:
        """The detector's outputs, loss included, of the main and of the auxiliary branch."""
        base, decoder = self.detector.model, self.detector.model.decoder
        with recorded(base) as base_calls, recorded(decoder) as decoder_calls:
            main = self.detector(images, labels=labels)
        (base_call,), (decoder_call,) = base_calls, decoder_calls

        with rk.routing(strength, **gate_features(main)):
            routed = decoder(*decoder_call.args, **decoder_call.kwargs)
        with answering(base, dataclasses.replace(base_call.output, **routed)):
            auxiliary = self.detector(images, labels=labels)  # the heads and the loss alone
        return main, auxiliary


def gate_features(main: Any) -> dict[str, Tensor]:
    """Confidence and log area [B, N] of the queries that enter the routed layers, as the first layer predicts them."""
    if "intermediate_logits" in main:  # RT-DETR: the decoder predicts, denoising queries included
        logits, boxes = main.intermediate_logits[:, 0], main.intermediate_reference_points[:, 0]
    else:
        logits, boxes = main.auxiliary_outputs[0]["logits"], main.auxiliary_outputs[0]["pred_boxes"]
    area = boxes[..., 2] * boxes[..., 3]
    return {"confidence": logits.sigmoid().amax(-1), "geometry": area.clamp_min(1e-6).log()}


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of `module` inside the block."""
    calls: list[Call] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append(Call(args, kwargs, output)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block `module` computes nothing and returns `output`."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward


def deformable_detr() -> nn.Module:
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 16, 32, 32],
            depths=[1] * 4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=12,
        num_labels=2,
        dropout=0.0,
        with_box_refine=True,
        auxiliary_loss=True,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 16, 32, 32],
            depths=[1] * 4,
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[16, 32, 32],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=3,
        num_queries=12,
        num_denoising=6,
        num_labels=2,
    )
    return transformers.RTDetrForObjectDetection(config)


DETECTORS = {"Deformable DETR": deformable_detr, "RT-DETR": rt_detr}


def synthetic_images(count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images [count, 3, H, W] with a red (0) and a green (1) rectangle each, boxes (cx, cy, w, h) in [0, 1]."""
    images = 0.1 * torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = []
    for image in images:
        size = torch.randint(12, 28, (2, 2))
        corner = (torch.rand(2, 2) * (IMAGE_SIZE - size)).long()
        for colour, ((x, y), (width, height)) in enumerate(zip(corner.tolist(), size.tolist(), strict=True)):
            image[colour, y : y + height, x : x + width] += 2.0
        boxes = torch.cat([corner + size / 2, size], 1) / IMAGE_SIZE
        labels.append({"class_labels": torch.tensor([0, 1]), "boxes": boxes})
    return images, labels


def train(branches: DualBranch, images: Tensor, labels: list[dict], steps: int) -> list[tuple[float, float]]:
    """(main, auxiliary) loss of every step."""
    optimizer = torch.optim.AdamW(branches.parameters(), lr=1e-3)  # the routers are among the parameters
    losses = []
    for step in range(steps):
        strength = MAX_STRENGTH * min(1.0, (step + 1) / RAMP_STEPS)
        main, auxiliary = branches.train()(images, labels, strength)
        optimizer.zero_grad()
        (main.loss + AUX_WEIGHT * auxiliary.loss).backward()
        nn.utils.clip_grad_norm_(branches.parameters(), 1.0)
        optimizer.step()
        losses.append((main.loss.item(), auxiliary.loss.item()))
    return losses


def main(steps: int = 30) -> None:
    for name, build in DETECTORS.items():
        torch.manual_seed(0)
        detector = build()
        images, labels = synthetic_images(4)
        branches = DualBranch(detector)
        for step, (main_loss, auxiliary_loss) in enumerate(train(branches, images, labels, steps)):
            if step % 10 == 0 or step == steps - 1:
                print(f"{name}, step {step:2}: loss {main_loss:6.3f}, auxiliary branch {auxiliary_loss:6.3f}")

        with torch.no_grad():
            boxes = detector.eval()(images).pred_boxes  # outside rk.routing: plain attention
            branches.routing.revert()
            same = torch.equal(detector(images).pred_boxes, boxes)
        print(f"{name}: inference without the routers is the same: {same}\n")


if __name__ == "__main__":
    main()
