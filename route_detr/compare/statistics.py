"""How sure a difference between two arms is: paired by seed and by image, with an interval over both.

An arm's AP depends on the seed of the run and on which images happen to be in the validation set. Two variances of the
mean difference are found separately and added:

- seeds: the variance of the differences between the two runs of a seed, divided by the number of seeds S. A bootstrap
  over so few seeds would tend to (S - 1) / S of it, so that the formula takes its place;
- images: a bootstrap. The same `RESAMPLES` draws of the images, with replacement, are scored again by COCO's protocol
  for every run, and the mean difference over the seeds is taken of each draw.

The interval is the mean difference -+ t sqrt(seeds + images), t being Student's quantile for Satterthwaite's degrees of
freedom. Noise of a run on an image is in both variances, so that the interval covers rather too much: 95 % where seeds
or images alone make the difference, up to 99 % where that noise does (tests/test_compare_statistics.py). One seed tells
nothing of other seeds: it has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval
from scipy.stats import t as student

RESAMPLES, RESAMPLES_SEED, AT_ONCE = 500, 0, 100
CONFIDENCE = 0.95


class Ranking(NamedTuple):
    """Detections of one category and range of areas in all images, the most certain first, at T thresholds of IoU."""

    hit: np.ndarray  # [T, D] bool: finds an object
    counted: np.ndarray  # [T, D] bool: counts as right or wrong
    image: np.ndarray  # [D] number of the image
    objects: np.ndarray  # [I] objects to find in each image


class Interval(NamedTuple):
    """A mean difference and where the true one lies (95 %); None where one seed cannot tell."""

    difference: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else self.difference - self.low


def rankings(evaluation: COCOeval) -> list[list[Ranking]]:
    """From an evaluation whose matching is done: for each range of areas (all, small, medium, large) each category."""
    parameters = evaluation.params
    images, areas = len(parameters.imgIds), len(parameters.areaRng)
    thresholds = len(parameters.iouThrs)
    found: list[list[Ranking]] = [[] for _ in range(areas)]
    for group, start in enumerate(range(0, len(evaluation.evalImgs), images)):
        entries = [
            (number, entry)
            for number, entry in enumerate(evaluation.evalImgs[start : start + images])
            if entry is not None
        ]
        objects = np.zeros(images)
        for number, entry in entries:
            objects[number] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        empty = np.zeros((thresholds, 0))
        matches = np.concatenate([empty, *(entry["dtMatches"] for _, entry in entries)], 1) != 0
        ignored = np.concatenate([empty, *(entry["dtIgnore"] for _, entry in entries)], 1) != 0
        scores = np.concatenate([[], *(entry["dtScores"] for _, entry in entries)])
        image = np.repeat([number for number, _ in entries], [len(entry["dtScores"]) for _, entry in entries])
        order = np.argsort(-scores, kind="stable")
        ranked = (matches & ~ignored)[:, order], ~ignored[:, order], image.astype(np.int64)[order], objects
        found[group % areas].append(Ranking(*ranked))
    return found


def draws(images: int) -> np.ndarray:
    """[RESAMPLES, images]: how often each image is in each draw; the same for every run of that many images."""
    generator = np.random.default_rng(RESAMPLES_SEED)
    return generator.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)


def precisions(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """[B, T] average precision where image i counts weights[:, i] times ([B, I]); NaN where no object is left."""
    rows, objects = len(weights), weights @ ranking.objects
    levels = np.linspace(0, 1, 101) + 2.0 * np.arange(rows)[:, None]  # of recall; each row lies above the one before
    of_detection = weights[:, ranking.image]  # [B, D]
    result = np.full((rows, len(ranking.hit)), np.nan)
    for threshold, (hit, counted) in enumerate(zip(ranking.hit, ranking.counted, strict=True)):
        hit = hit[counted]
        seen = of_detection[:, counted]
        true, seen = seen[:, hit].cumsum(1), seen.cumsum(1)[:, hit]  # at each hit: precision rises nowhere else
        precision = np.maximum.accumulate((true / np.maximum(seen, 1))[:, ::-1], 1)[:, ::-1]
        recall = true / np.maximum(objects, 1)[:, None] + 2.0 * np.arange(rows)[:, None]
        first = np.searchsorted(recall.ravel(), levels.ravel()).reshape(levels.shape)
        inside = first < (np.arange(rows)[:, None] + 1) * hit.sum()
        known = np.append(precision.ravel(), 0.0)
        result[:, threshold] = np.where(inside, known[np.where(inside, first, -1)], 0.0).mean(1)
    result[objects == 0] = np.nan
    return result


def metrics(ranked: Sequence[Sequence[Ranking]], weights: np.ndarray) -> np.ndarray:
    """[B, 6]: `evaluation.METRICS` under B weights of the images [B, I]; NaN where no object has the size."""
    values = [np.stack([precisions(each, weights) for each in area]) for area in ranked]  # [categories, B, T] each
    chosen = [values[0], values[0][..., :1], values[0][..., 5:6], *values[1:]]
    return np.stack([_mean(each.transpose(1, 0, 2).reshape(len(weights), -1)) for each in chosen], 1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is no NaN."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def resampled_metrics(evaluation: COCOeval) -> np.ndarray:
    """[RESAMPLES, 6]: the metrics of a run under `draws` of its images."""
    ranked = rankings(evaluation)
    weights = draws(len(evaluation.params.imgIds))
    return np.concatenate([metrics(ranked, weights[start : start + AT_ONCE]) for start in range(0, RESAMPLES, AT_ONCE)])


def interval(differences: np.ndarray, resampled: np.ndarray, images: int) -> Interval:
    """The mean of paired differences [S], one a seed, from what draws of the images made of them [S, B].

    images: how many the validation set has.
    """
    mean, seeds = float(np.mean(differences)), len(differences)
    if seeds < 2:
        return Interval(mean, None, None)
    of_seeds = float(np.var(differences, ddof=1)) / seeds
    of_images = float(np.var(resampled.mean(0), ddof=1))
    variance = of_seeds + of_images
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / max(images - 1, 1))
    half = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def verdict(found: Interval, seeds: int) -> str:
    """The meaning of an interval, as a sentence without its full stop."""
    with_seeds = f"with {seeds} seed{'s' * (seeds != 1)}"
    if found.low is None:
        return f"cannot tell {with_seeds}: one run of each arm says nothing of other seeds"
    if found.low == found.high == 0:
        return f"makes no difference {with_seeds}: AP is the same in every run"
    if found.low > 0 or found.high < 0:
        return (
            f"{'helps' if found.low > 0 else 'hurts'} ({found.difference:+.3f}, {found.low:+.3f} to {found.high:+.3f})"
        )
    return f"cannot tell {with_seeds}: differences below {found.half_width:.3f} would not be seen"
