"""Detection data: COCO-format sets, their transforms and batches."""

from route_detr.data.batch import Batch, Target, collate
from route_detr.data.coco import CocoDetection
from route_detr.data.images import read_rgb
from route_detr.data.layout import coco_layout, open_splits
from route_detr.data.loader import batch_loader, epoch_batches, killed_worker, micro_batches, shuffled
from route_detr.data.report import DatasetError, DatasetWarning
from route_detr.data.transforms import TransformConfig, View, eval_view, image_pixels, normalised, train_view

__all__ = [
    "Batch",
    "CocoDetection",
    "DatasetError",
    "DatasetWarning",
    "Target",
    "TransformConfig",
    "View",
    "batch_loader",
    "coco_layout",
    "collate",
    "epoch_batches",
    "eval_view",
    "image_pixels",
    "killed_worker",
    "micro_batches",
    "normalised",
    "open_splits",
    "read_rgb",
    "shuffled",
    "train_view",
]
