"""Route-DETR: an object detector whose decoder learns which queries compete and which share the work."""
