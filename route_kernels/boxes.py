"""Boxes: two forms and the generalised intersection over union (Rezatofighi et al., arXiv 1902.09630)."""

from __future__ import annotations

import torch


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1); any leading shape, [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """GIoU of boxes given by corners, [..., 4] and [..., 4] broadcast to [...]; in (-1, 1], 0 / 0 counts as 0.

    GIoU = |A n B| / |A u B| - |C \\ (A u B)| / |C|, C the smallest box around both.
    """
    area_a, area_b = _area(a[..., :2], a[..., 2:]), _area(b[..., :2], b[..., 2:])
    overlap = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area_a + area_b - overlap
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp_min(tiny) - (hull - union) / hull.clamp_min(tiny)


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    width, height = (high - low).clamp_min(0).unbind(-1)
    return width * height
