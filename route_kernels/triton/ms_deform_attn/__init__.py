"""Deformable attention in Triton: host code in host.py, the formulas of one point in tile.py, kernels beside them."""

from .host import backward, forward

__all__ = ["backward", "forward"]
