"""Detection data: COCO-format sets, their transforms, the bundled crowded digits, and Cityscapes as a COCO folder."""

from route_detr.data.batch import Batch, Target, collate, shuffled
from route_detr.data.cityscapes import write_cityscapes
from route_detr.data.coco import CocoDetection
from route_detr.data.digits import DigitsParameters, is_digits_folder, write_digits
from route_detr.data.images import read_rgb
from route_detr.data.layout import CocoLayout, SplitPaths, coco_layout, open_splits, require_same_categories
from route_detr.data.report import DatasetError, DatasetWarning, Report
from route_detr.data.transforms import TransformConfig, View, eval_view, image_pixels, normalised, train_view

__all__ = [
    "Batch",
    "CocoDetection",
    "CocoLayout",
    "DatasetError",
    "DatasetWarning",
    "DigitsParameters",
    "Report",
    "SplitPaths",
    "Target",
    "TransformConfig",
    "View",
    "coco_layout",
    "collate",
    "eval_view",
    "image_pixels",
    "is_digits_folder",
    "normalised",
    "open_splits",
    "read_rgb",
    "require_same_categories",
    "shuffled",
    "train_view",
    "write_cityscapes",
    "write_digits",
]
