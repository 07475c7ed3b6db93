"""A trained detector from a checkpoint, and what it finds in image files."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import route_kernels as rk
from route_detr.config import Config
from route_detr.data.images import read_rgb
from route_detr.data.report import DatasetError
from route_detr.data.transforms import eval_view, image_pixels, normalised
from route_detr.errors import CheckpointError
from route_detr.evaluation import coco_results, detections
from route_detr.files import SOFTWARE, check_replaceable, remove_abandoned, write_atomically, write_text
from route_detr.model.detector import Detector
from route_detr.run import load_checkpoint
from route_kernels.boxes import corners

PALETTE = ("#0072B2", "#D55E00", "#117733", "#882255", "#332288", "#555555")  # white text is legible on each
PREDICTIONS = "predictions.json"
MASK_OPACITY = 100  # of 255


class RoutedLayerView(NamedTuple):
    """The parts of a routed layer's bias, for inspection."""

    factors: rk.RoutingFactors  # at strength 1
    boxes: Tensor  # [B, N, 4] reference boxes that enter the layer
    confidence: Tensor  # [B, N] highest class probability of the layer before; 0 in the first layer


@torch.no_grad()
def routing_factors(
    detector: Detector, images: Tensor, padding_mask: Tensor | None = None
) -> dict[int, RoutedLayerView]:
    """Each routed layer's bias, seen on the main branch's queries in eval mode; {} without routing."""
    was_training = detector.training
    detector.eval()
    try:
        memory = detector.encoded(detector.checked_features(images, padding_mask), padding_mask)
        return {
            index: RoutedLayerView(
                detector.decoder.routing(index, queries, strength=1.0, route_type="gated"),
                queries.boxes[:, 0],
                queries.confidence[:, 0],
            )
            for index, (queries, _) in enumerate(detector.decoder.steps(detector.proposals(memory)[1], memory))
            if index in detector.config.routed_layer_indices
        }
    finally:
        detector.train(was_training)


@dataclass(frozen=True)
class Trained:
    """A detector in evaluation mode with all that inference needs; no data set is asked for."""

    detector: Detector
    config: Config
    category_ids: list[int]
    category_names: list[str]
    data: dict[str, str]
    device: torch.device

    def input_of(self, image: Image.Image) -> Tensor:
        """[1, 3, h, w] float32: the image as in evaluation."""
        seen = eval_view(image.size, self.config.transforms).image(image)
        return normalised(image_pixels(seen)[None].to(self.device))

    @torch.no_grad()
    def detect(self, image: Image.Image, score_threshold: float = 0.0) -> dict[str, Tensor]:
        """scores [K], labels [K], boxes [K, 4] (xyxy, pixels of ``image``), the best first, on the CPU; and masks
        [K, H, W] bool of a detector that has them."""
        self.detector.eval()
        output = self.detector(self.input_of(image), None)
        found = detections(output, [(image.height, image.width)], self.config.train.top_k)[0]
        kept = found["scores"] >= score_threshold
        return {name: value[kept].cpu() for name, value in found.items()}

    def routing(self, image: Image.Image) -> dict[int, dict[str, Tensor]]:
        """For each routed layer bias and gate [N, N] (strength 1), boxes [N, 4] xyxy in pixels, confidence [N]."""
        size = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
        layers = {}
        for layer, view in routing_factors(self.detector, self.input_of(image)).items():
            gate = (view.factors.gate_q @ view.factors.gate_k.transpose(-1, -2)).sigmoid()
            bias = rk.routing_bias(view.factors)
            if not bias.isfinite().all():
                raise FloatingPointError(f"the routing bias of decoder layer {layer} is not finite")
            layers[layer] = {
                "bias": bias[0].cpu(),
                "gate": gate[0].cpu(),
                "boxes": corners(view.boxes[0]).cpu() * size,
                "confidence": view.confidence[0].cpu(),
            }
        return layers


def load_trained(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """The detector that a checkpoint holds.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or does not fit the configuration in it.
    """
    state = load_checkpoint(path)
    config = stored_config(state, path)
    try:
        weights_are_here = config.updated({"detector.backbone.weights": None})
        detector = Detector(weights_are_here.detector).to(device)
        detector.load_state_dict(state["model"])
        ids = [int(category["id"]) for category in state["categories"]]
        names = [str(category["name"]) for category in state["categories"]]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this version of the detector: {error}") from error
    return Trained(detector.eval(), config, ids, names, state.get("data", {}), torch.device(device))


def stored_config(state: dict[str, Any], path: str | Path) -> Config:
    """The configuration in the checkpoint ``path``; settings that its backbone never had are left out.

    Raises CheckpointError for one that this version does not know.
    """
    try:
        config = Config.from_dict(state["config"])
        return config.updated({"detector.backbone": vars(config.detector.backbone.known())})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this version of the detector: {error}") from error


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files named, and the images in the folders named (their ending decides), in order.

    Raises:
        FileNotFoundError: nothing has that name, or a folder holds no image.
    """
    endings = set(Image.registered_extensions())
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            named = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
            inside = [file for file in named if file.is_file() or not file.exists()]  # a link to nothing is told
            if not inside:
                raise FileNotFoundError(f"{path}: a folder without images")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
    return files


def pictures_of(files: Sequence[Path], out: Path) -> list[Path]:
    """The picture of each file in the folder ``out``; where two files have one name, all but the first get a number."""
    taken: set[str] = set()
    pictures = []
    for file in files:
        stem, repeat = file.stem, 2
        while (key := unicodedata.normalize("NFC", stem).casefold()) in taken:  # one name for some file systems
            stem, repeat = f"{file.stem}-{repeat}", repeat + 1
        taken.add(key)
        pictures.append(out / f"{stem}.png")
    return pictures


def predict_files(
    trained: Trained, files: Sequence[Path], out: Path, score_threshold: float
) -> Iterator[DatasetError | None]:
    """Write a picture with boxes (and masks) for each file; yields None for each, or why it cannot be read.

    ``predictions.json`` is written whatever happens. It is a list of COCO results (``image_id`` counts the files from
    1), each with its ``file_name`` and ``category_name``.

    Raises:
        UsageError: another program wrote a file of such a name.
        FloatingPointError: what the detector computes for a file is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    names = dict(zip(trained.category_ids, trained.category_names, strict=True))
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    results: list[dict[str, Any]] = []
    check_replaceable("predictions", out / PREDICTIONS)
    try:
        for number, (file, path) in enumerate(zip(files, pictures_of(files, out), strict=True), start=1):
            check_replaceable("picture", path)
            try:
                image = read_rgb(file)
            except DatasetError as error:
                yield error
                continue
            try:
                found = trained.detect(image, score_threshold)
            except FloatingPointError as error:
                raise FloatingPointError(f"{file}: {error}") from error
            for result in coco_results([found], [number], trained.category_ids):
                category = result.pop("category_id")
                named = {"file_name": str(file), "category_id": category, "category_name": names[category]}
                results.append({"image_id": result.pop("image_id"), **named, **result})
            picture = draw_detections(image, found, trained.category_names)
            write_atomically(path, lambda stream, picture=picture: picture.save(stream, format="PNG", pnginfo=mark))
            yield None
    finally:
        write_text(out / PREDICTIONS, json.dumps(results, indent=1) + "\n")


def draw_detections(image: Image.Image, found: dict[str, Tensor], names: Sequence[str]) -> Image.Image:
    """The image with masks, boxes and labels, enlarged when it is too small for legible labels; the best drawn last."""
    enlarged = max(1, -(-512 // max(image.size)))
    picture = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    line = max(2, max(picture.size) // 400)
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=max(12, max(picture.size) // 55))
    for label, mask in reversed(list(zip(found["labels"].tolist(), found.get("masks", ()), strict=False))):
        opacity = Image.fromarray(mask.numpy().astype(np.uint8) * MASK_OPACITY)
        picture.paste(PALETTE[label % len(PALETTE)], mask=opacity.resize(picture.size))
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    for score, label, box in reversed(list(rows)):
        colour = PALETTE[label % len(PALETTE)]
        x0, y0, x1, y1 = (coordinate * enlarged for coordinate in box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=line)
        text = f"{names[label]} {score:.2f}"
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        x, y = max(0.0, min(x0, picture.width - (right + 6))), max(0.0, y0 - (bottom + 4))
        draw.rectangle((x, y, x + right + 6, y + bottom + 4), fill=colour)
        draw.text((x + 3, y + 1), text, fill="white", font=font)
    return picture
