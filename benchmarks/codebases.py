"""Other people's code whose training step is measured before and after an `apply()`: models, sizes, inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

import route_kernels as rk
from route_kernels.doctor.fitting import Apply
from route_kernels.testing import perturb_sampling

from .registry import Unavailable

Built = tuple[nn.Module, tuple | Mapping[str, Any]]
BEFORE = "before"  # the side that no `apply()` has touched
BOXES = 7  # an image


@dataclass(frozen=True)
class Codebase:
    """One row for each of `afters`; all start from the same code, weights and inputs.

    Attributes:
        codebase, model: their names, for a reader.
        inputs: what a step sees; `{side}` and `{width}` (half as much again) are pixels.
        build: of the side of the images: the model, and the arguments of a call, which returns a loss.
        afters: by the line that a user writes: the `apply()`s that it makes of a model.
        side, quick_side: pixels.
    """

    codebase: str
    model: str
    inputs: str
    build: Callable[[int], Built]
    afters: Mapping[str, Callable[[nn.Module], list[Apply]]]
    side: int
    quick_side: int

    def described_inputs(self, side: int) -> str:
        """`inputs`, filled in."""
        return self.inputs.format(side=side, width=side * 3 // 2)

    def built(self, side: int) -> Built:
        """The model and its arguments, seeded; its sampling layers are perturbed: as initialised, they look at a grid.

        Raises:
            Unavailable: a package is missing.
        """
        torch.manual_seed(0)
        model, arguments = self.build(side)
        perturb_sampling(model)
        return model.train(), arguments


class WithLoss(nn.Module):
    """A model of images and targets, and the weighted sum of its criterion's losses."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, images: torch.Tensor, targets: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        losses, weights = self.criterion(self.model(images, targets), targets), self.criterion.weight_dict
        return {"loss": sum(losses[name] * weights[name] for name in losses if name in weights)}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # torchvision of another PyTorch is a RuntimeError
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def _boxes(*shape: int) -> torch.Tensor:
    """[*shape, 4]: (cx, cy, w, h) inside the image."""
    sizes = 0.1 + 0.3 * torch.rand(*shape, 2)
    return torch.cat([sizes / 2 + (1 - sizes) * torch.rand(*shape, 2), sizes], -1)


def _images_and_labels(batch: int, height: int, width: int, classes: int) -> dict[str, Any]:
    labels = [{"class_labels": torch.randint(0, classes, (BOXES,)), "boxes": _boxes(BOXES)} for _ in range(batch)]
    return {"pixel_values": torch.randn(batch, 3, height, width), "labels": labels}


def _deformable_detr(side: int) -> Built:
    transformers = _import("transformers")
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        with_box_refine=True,
        auxiliary_loss=True,
    )
    model = transformers.DeformableDetrForObjectDetection(config)
    return model, _images_and_labels(1, side, side * 3 // 2, config.num_labels)


def _rt_detr(side: int) -> Built:
    transformers = _import("transformers")
    model = transformers.RTDetrForObjectDetection(transformers.RTDetrConfig())
    return model, _images_and_labels(2, side, side, model.config.num_labels)


def _level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]


def _research_code(side: int) -> Built:
    model = _import("benchmarks.research_code").DeformableTransformer()
    shapes = _level_shapes(side, side * 3 // 2)
    features = [
        torch.randn(1, channels, *shape) for channels, shape in zip((512, 1024, 2048, 2048), shapes, strict=True)
    ]
    queries = model.query_embed.num_embeddings
    return model, {"features": features, "labels": torch.randint(0, 91, (1, queries)), "boxes": _boxes(1, queries)}


def _dual_r_detr(side: int) -> Built:
    research_code = _import("benchmarks.research_code")
    research_code.provide_bricks()
    model = research_code.RoutedDecoder()
    shapes = torch.tensor(_level_shapes(side, side * 3 // 2))
    queries = model.query_embed.num_embeddings
    return model, {
        "memory": torch.randn(2, int(shapes.prod(1).sum()), 256),
        "boxes": _boxes(2, queries),
        "shapes": shapes,
        "labels": torch.randint(0, 91, (2, queries)),
    }


def _ultralytics(side: int) -> Built:
    images, classes = 2, 80
    model = _import("ultralytics.nn.tasks").RTDETRDetectionModel("rtdetr-l.yaml", nc=classes, verbose=False)
    model.nc = classes  # as its trainer does
    batch = {
        "img": torch.randn(images, 3, side, side),
        "cls": torch.randint(0, classes, (images * BOXES, 1)),
        "bboxes": _boxes(images * BOXES),
        "batch_idx": torch.arange(images).repeat_interleave(BOXES),
    }
    return model, (batch,)


def _rfdetr(side: int) -> Built:
    configs, lwdetr = _import("rfdetr.config"), _import("rfdetr.models.lwdetr")
    config = configs.RFDETRNanoConfig(
        pretrain_weights=None, device="cpu", resolution=side, positional_encoding_size=side // 16
    )
    criterion, _ = lwdetr.build_criterion_from_config(config, configs.TrainConfig(dataset_dir="."))
    targets = [{"labels": torch.randint(0, config.num_classes, (BOXES,)), "boxes": _boxes(BOXES)}]
    model = WithLoss(lwdetr.build_model_from_config(config), criterion)
    return model, {"images": torch.randn(1, 3, side, side), "targets": targets}


def _applying(*codebases: str, to_model: bool = True) -> Callable[[nn.Module], list[Apply]]:
    """The `apply()` of those integrations, given the model or (`to_model=False`) nothing."""

    def appliers(model: nn.Module) -> list[Apply]:
        integrations = [getattr(rk.integrations, codebase) for codebase in codebases]
        for integration in integrations:
            integration.revert()  # some apply themselves when they are imported
        given = (model,) if to_model else ()
        return [partial(integration.apply, *given, verbose=False) for integration in integrations]

    return appliers


CODEBASES = {
    "transformers_deformable_detr": Codebase(
        "transformers",
        "Deformable DETR, ResNet-50",
        "1 image, {side} x {width}",
        _deformable_detr,
        {"apply(model)": _applying("transformers")},
        side=320,
        quick_side=64,
    ),
    "transformers_rt_detr": Codebase(
        "transformers",
        "RT-DETR, ResNet-50",
        "2 images, {side} x {side}",
        _rt_detr,
        {"apply(model)": _applying("transformers")},
        side=320,
        quick_side=128,
    ),
    "research_code": Codebase(
        "research code",
        "Deformable-DETR without its backbone",
        "1 image, {side} x {width}",
        _research_code,
        {
            "route_kernels.shim": _applying("deformable_detr", to_model=False),
            "apply(model)": _applying("deformable_detr"),
        },
        side=384,
        quick_side=64,
    ),
    "dual_r_detr": Codebase(
        "Dual-R-DETR",
        "decoder, auxiliary branch, 900 queries",
        "2 images, {side} x {width}",
        _dual_r_detr,
        {"apply(model)": _applying("dual_r_detr", "bricks")},
        side=320,
        quick_side=64,
    ),
    "ultralytics": Codebase(
        "ultralytics",
        "RT-DETR-l",
        "2 images, {side} x {side}",
        _ultralytics,
        {"apply(model)": _applying("ultralytics")},
        side=320,
        quick_side=128,
    ),
    "rfdetr": Codebase(
        "rfdetr",
        "RF-DETR Nano",
        "1 image, {side} x {side}",
        _rfdetr,
        {"apply(model)": _applying("rfdetr")},
        side=384,
        quick_side=320,
    ),
}
