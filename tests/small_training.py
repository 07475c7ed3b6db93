"""A detector and COCO sets small enough to train for many steps within a second or two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "square"}, {"id": 90, "name": "bar"}]
SMALL = {
    "detector.embed_dim": 16,
    "detector.num_heads": 2,
    "detector.num_points": 2,
    "detector.num_levels": 2,
    "detector.encoder_layers": 1,
    "detector.decoder_layers": 2,
    "detector.num_queries": 12,
    "detector.ffn_dim": 32,
    "detector.backbone.settings": {
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "detector.backbone.used_stages": 2,
    "train.epochs": 3,
    "train.batch_size": 2,
    "train.learning_rate": 1e-3,
    "schedule.warmup": 0.5,
    "schedule.ramp": 1.0,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "transforms.scales": [48, 64],
    "transforms.max_size": 96,
    "transforms.eval_scale": 64,
}


def options(changes: dict | None = None) -> list[str]:
    """`SMALL`, with changes, as words of the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in {**SMALL, **(changes or {})}.items()]


def write_split(root: Path, split: str, images: int, seed: int, boxes_per_image: int = 3) -> None:
    rng = np.random.default_rng(seed)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    entries, annotations = [], []
    for number in range(1, images + 1):
        pixels = rng.integers(60, 120, (64, 64, 3), dtype=np.uint8)
        for _ in range(boxes_per_image):
            category = int(rng.integers(2))
            w, h = (14, 14) if category == 0 else (24, 8)
            x, y = int(rng.integers(64 - w)), int(rng.integers(64 - h))
            pixels[y : y + h, x : x + w] = rng.integers(150, 255, 3)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORIES[category]["id"]}
                | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entries.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
    content = {"images": entries, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_data(root: Path, train_images: int = 7, val_images: int = 3) -> Path:
    """A COCO folder of 64 x 64 images with two categories whose ids are neither contiguous nor from 0."""
    write_split(root, "train", train_images, seed=1)
    write_split(root, "val", val_images, seed=2)
    return root
