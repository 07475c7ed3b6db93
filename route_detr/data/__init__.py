"""Detection data: sets in COCO's format, their checks, their transforms and batches."""
