"""How queries compete for objects, measured on a whole validation set.

- claims: a query claims the object that its box overlaps most, if by `OVERLAP` of their union or more and with a score
  above a threshold. Several claims of one object are what routing is to prevent.
- duplicates: a detection of an object that a better one has found already, at the same threshold of IoU. The AP lost to
  them is the AP with all of them forgiven (neither right nor wrong), minus the AP (as TIDE, arXiv 2008.08115).
- winners: in each decoder layer the claimant (of any score) that gives the object's class the highest probability wins
  it. The entropy of the winners over the layers is 0 where one query wins in all of them, log2 of their number where
  each has another.
- routing: over all pairs of different queries of a routed layer, how bias and gate go with the overlap of the two
  boxes, with whether both queries' most probable class is the same, and with the lower of both scores, all as they
  enter the layer (Pearson's correlation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import route_kernels as rk
from route_detr.compare.statistics import metrics, rankings
from route_detr.data.batches import Batch, batch_loader
from route_detr.data.coco import CocoDetection
from route_detr.evaluation import check_ground_truth, coco_results, detections, matched
from route_detr.model.structures import DetectorOutput, Predictions, Queries
from route_detr.predict import Trained

OVERLAP = 0.5
SCORE = 0.3
PAIRS = ("bias", "gate", "overlap", "agreement", "score")


@torch.no_grad()
def measure(
    trained: Trained,
    dataset: CocoDetection,
    score: float = SCORE,
    after_batch: Callable[[int], object] = lambda n: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measures, ready for JSON, and the detections (COCO's results of boxes) from which the AP is.

    after_batch is told how many images are done.

    Raises NoGroundTruth for a data set without an object, FloatingPointError where the detector computes NaN.
    """
    check_ground_truth(dataset.coco, dataset.image_ids)
    detector, size = trained.detector.eval(), trained.config.train.batch_size
    claims, entropies, results = [], [], []
    moments = {layer: Moments() for layer in detector.config.routed_layer_indices}
    batches = [list(range(start, min(start + size, len(dataset)))) for start in range(0, len(dataset), size)]
    for batch in batch_loader(dataset, batches, trained.config.train.workers):
        batch = batch.to(trained.device)
        output, entering = _layers(trained, batch)
        ids = [target.image_id for target in batch.targets]
        sizes, seen = zip(*((target.original_size, target.size) for target in batch.targets), strict=True)
        found = detections(output, sizes, trained.config.train.top_k, seen)
        results += coco_results([{k: v for k, v in each.items() if k != "masks"} for each in found], ids,
                                trained.category_ids)  # fmt: skip
        for image, target in enumerate(batch.targets):
            boxes, labels = _xywh(target.boxes), target.labels.cpu().numpy()
            layers = [_Layer(*_of_image(layer, image), boxes, labels) for layer in output.layers]
            claims.append(layers[-1].claims(score))
            entropies += _entropies([layer.winners() for layer in layers])
        for layer, sums in moments.items():
            _add_pairs(sums, trained, layer, entering[layer])
        after_batch(len(claims))
    truth = [each for number in dataset.image_ids for each in dataset.coco.imgToAnns.get(number, ())]
    evaluation = matched(dataset.coco, [dict(each) for each in truth], results, dataset.image_ids)
    counts = np.concatenate(claims)
    measures = {
        "images": len(dataset),
        "objects": len(counts),
        "score_threshold": score,
        "claims": {
            "mean": float(counts.mean()),
            **{name: float(share.mean()) for name, share in (("none", counts == 0), ("one", counts == 1))},
            "several": float((counts > 1).mean()),
        },
        **lost_to_duplicates(evaluation),
        "winner_entropy": float(np.mean(entropies)) if entropies else None,
        "winner_entropy_at_most": float(np.log2(detector.config.decoder_layers)),
        "routing": {str(layer): sums.correlations() for layer, sums in moments.items()},
    }
    return measures, results


def _layers(trained: Trained, batch: Batch) -> tuple[DetectorOutput, list[Queries]]:
    """The main branch's predictions, and the queries that enter each layer."""
    detector = trained.detector
    features = detector.checked_features(batch.images, batch.padding_mask)
    with detector.blocks.backend():
        memory = detector.encoded(features, batch.padding_mask)
        proposals, queries = detector.proposals(memory)
        entering, layers = zip(*detector.decoder.steps(queries, memory), strict=True)
        pixels = None if detector.pixel_embedding is None else detector.pixel_embedding(features[0], memory)
    return DetectorOutput(list(layers), proposals, torch.zeros(()), None, pixels), list(entering)


def _xywh(boxes: Tensor) -> np.ndarray:
    """(cx, cy, w, h) -> (x, y, w, h) as pycocotools takes them."""
    boxes = boxes.double().cpu().numpy()
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)


def _of_image(layer: Predictions, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] as (x, y, w, h) and class probabilities [N, K] of the main branch."""
    return _xywh(layer.boxes[image, 0]), layer.logits[image, 0].sigmoid().double().cpu().numpy()


class _Layer:
    """A layer's predictions for an image beside its T objects."""

    def __init__(self, boxes: np.ndarray, probabilities: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> None:
        self.probabilities, self.labels = probabilities, labels
        overlap = overlaps(boxes, truth)  # [N, T]
        self.object = overlap.argmax(1) if len(truth) else np.zeros(len(boxes), dtype=np.int64)
        self.claims_it = overlap.max(1, initial=0.0) >= OVERLAP

    def claims(self, score: float) -> np.ndarray:
        """[T] how many queries claim each object with at least this score."""
        claimed = self.object[self.claims_it & (self.probabilities.max(1) >= score)]
        return np.bincount(claimed, minlength=len(self.labels))

    def winners(self) -> np.ndarray:
        """[T] the query that wins each object, -1 where none claims it."""
        winners = np.full(len(self.labels), -1)
        for number, label in enumerate(self.labels):
            claimants = np.flatnonzero(self.claims_it & (self.object == number))
            if len(claimants):
                winners[number] = claimants[self.probabilities[claimants, label].argmax()]
        return winners


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU [N, M] of boxes (x, y, w, h)."""
    if not (len(boxes) and len(others)):
        return np.zeros((len(boxes), len(others)))
    return rle.iou(boxes, others, np.zeros(len(others), dtype=np.uint8))


def _entropies(winners: list[np.ndarray]) -> list[float]:
    """In bits, of the queries that win an object in the layers; of each object that two layers or more give to one."""
    found = []
    for each in np.stack(winners, 1):
        _, times = np.unique(each[each >= 0], return_counts=True)
        if times.sum() > 1:
            shares = times / times.sum()
            found.append(float(-(shares * np.log2(shares)).sum()))
    return found


def lost_to_duplicates(evaluation: COCOeval) -> dict[str, float]:
    """AP and AP50, and how much more each is with duplicates forgiven."""
    everything = np.ones((1, len(evaluation.params.imgIds)), dtype=np.int64)
    before = metrics(rankings(evaluation), everything)[0]
    marks = [entry and entry["dtIgnore"] for entry in evaluation.evalImgs]
    for entry in filter(None, evaluation.evalImgs):
        if entry["aRng"] == evaluation.params.areaRng[0] and len(entry["dtIds"]):
            objects = evaluation._gts[entry["image_id"], entry["category_id"]]
            real = [number for number, each in enumerate(objects) if not each["ignore"]]
            overlap = evaluation.ious[entry["image_id"], entry["category_id"]]
            best = overlap[:, real].max(1, initial=0.0) if real else np.zeros(len(entry["dtIds"]))
            duplicate = (entry["dtMatches"] == 0) & (best >= evaluation.params.iouThrs[:, None])
            entry["dtIgnore"] = entry["dtIgnore"] | duplicate
    forgiven = metrics(rankings(evaluation), everything)[0]
    for entry, mark in zip(evaluation.evalImgs, marks, strict=True):
        if entry is not None:
            entry["dtIgnore"] = mark
    return {
        **{name: float(value) for name, value in zip(("AP", "AP50"), before, strict=False)},
        **{f"{name}_lost_to_duplicates": float(forgiven[n] - before[n]) for n, name in enumerate(("AP", "AP50"))},
    }


class Moments:
    """Sums over pairs of queries, from which their correlations follow."""

    def __init__(self) -> None:
        self.count, self.sums, self.products = 0, np.zeros(len(PAIRS)), np.zeros((len(PAIRS), len(PAIRS)))
        self.competing = np.zeros(2)  # how many pairs compete, and the sum of their biases

    def add(self, values: np.ndarray) -> None:
        """values: [pairs, 5], in the order of `PAIRS`."""
        self.count += len(values)
        self.sums += values.sum(0)
        self.products += values.T @ values
        competing = values[(values[:, 2] >= OVERLAP) & (values[:, 3] > 0), 0]
        self.competing += len(competing), competing.sum()

    def correlations(self) -> dict[str, Any]:
        """The correlations of bias and gate with the others; None where one of the two never changes."""
        mean = self.sums / max(self.count, 1)
        covariance = self.products / max(self.count, 1) - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0))
        table: dict[str, Any] = {"pairs": self.count, "bias_mean": float(mean[0])}
        table["bias_mean_competing"] = float(self.competing[1] / self.competing[0]) if self.competing[0] else None
        for row in (0, 1):
            for column in (2, 3, 4):
                scale = spread[row] * spread[column]
                known = scale > 1e-9 * max(1.0, float(np.abs(mean).max()))
                table[f"{PAIRS[row]}_{PAIRS[column]}"] = float(covariance[row, column] / scale) if known else None
        return table


def _add_pairs(sums: Moments, trained: Trained, layer: int, queries: Queries) -> None:
    """All pairs of different queries that enter a routed layer."""
    factors = trained.detector.decoder.routing(layer, queries, strength=1.0, route_type="gated")
    bias, gate = rk.routing_bias(factors), (factors.gate_q @ factors.gate_k.mT).sigmoid()
    for image in range(len(bias)):
        boxes = _xywh(queries.boxes[image, 0])
        score = queries.confidence[image, 0].double().cpu().numpy()
        classes = np.zeros(len(score)) if queries.logits is None else queries.logits[image, 0].argmax(-1).cpu().numpy()
        pairs = [bias[image].double().cpu().numpy(), gate[image].double().cpu().numpy(), overlaps(boxes, boxes)]
        pairs += [(classes[:, None] == classes).astype(float), np.minimum(score[:, None], score)]
        sums.add(np.stack(pairs, -1)[~np.eye(len(score), dtype=bool)])


def as_text(measures: dict[str, Any]) -> str:
    """The measures in lines."""
    claims, entropy = measures["claims"], measures["winner_entropy"]
    lines = [
        f"{measures['objects']} objects in {measures['images']} images",
        f"claims an object (IoU {OVERLAP}, score {measures['score_threshold']}): {claims['mean']:.2f}; "
        f"none {claims['none']:.1%}, one {claims['one']:.1%}, several {claims['several']:.1%}",
        f"AP {measures['AP']:.3f}, lost to duplicates {measures['AP_lost_to_duplicates']:.3f}; "
        f"AP50 {measures['AP50']:.3f}, lost {measures['AP50_lost_to_duplicates']:.3f}",
        f"entropy of an object's winners over the layers: {'-' if entropy is None else format(entropy, '.2f')} "
        f"of at most {measures['winner_entropy_at_most']:.2f} bits",
    ]
    for layer, table in measures["routing"].items():
        rows = {key: "-" if value is None else f"{value:+.3f}" for key, value in table.items() if key != "pairs"}
        lines.append(
            f"decoder layer {layer}, {table['pairs']} pairs: mean bias {rows['bias_mean']}, "
            f"of pairs that compete {rows['bias_mean_competing']}; correlation of"
        )
        for name in PAIRS[:2]:
            lines.append(f"  the {name} with " + ", ".join(f"{other} {rows[f'{name}_{other}']}" for other in PAIRS[2:]))
    return "\n".join(lines)
