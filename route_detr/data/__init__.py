"""Detection data: COCO-format sets, their transforms, and the bundled crowded digits."""

from route_detr.data.batch import Batch, Target, collate
from route_detr.data.coco import CocoDetection
from route_detr.data.digits import DigitsParameters, is_digits_folder, write_digits
from route_detr.data.images import read_rgb
from route_detr.data.layout import CocoLayout, SplitPaths, coco_layout, open_splits, require_same_categories
from route_detr.data.report import DatasetError, DatasetWarning, Report
from route_detr.data.transforms import (
    Scene,
    TransformConfig,
    eval_transforms,
    normalised,
    train_transforms,
)

__all__ = [
    "Batch",
    "CocoDetection",
    "CocoLayout",
    "DatasetError",
    "DatasetWarning",
    "DigitsParameters",
    "Report",
    "Scene",
    "SplitPaths",
    "Target",
    "TransformConfig",
    "coco_layout",
    "collate",
    "eval_transforms",
    "is_digits_folder",
    "normalised",
    "open_splits",
    "read_rgb",
    "require_same_categories",
    "train_transforms",
    "write_digits",
]
