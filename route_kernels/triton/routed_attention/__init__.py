"""Routed attention in Triton: host code in host.py, one tile of its bias in tile.py, a kernel a file."""

from .host import backward, forward

__all__ = ["backward", "forward"]
