"""Route-DETR's learned bias for the decoders of other codebases: `add_routing` and `with rk.routing(...)`."""
