"""Memory of GPUs, and how much of it a training step may plan with."""

from __future__ import annotations

from typing import NamedTuple

MIB = 2**20
CONTEXT = 1024 * MIB
"""Of CUDA's context, loaded kernels and cuBLAS's workspaces: an allowance, not a measurement."""
FRAGMENTATION = 0.05
"""Share of the rest that PyTorch's caching allocator may hold without using it: an allowance likewise."""


class Card(NamedTuple):
    """A GPU by the total memory that `nvidia-smi` shows, in bytes."""

    name: str
    total: int

    @property
    def usable(self) -> int:
        """Bytes for the tensors of a step: the total less `CONTEXT`, less the share `FRAGMENTATION` of what is left."""
        return int((self.total - CONTEXT) * (1 - FRAGMENTATION))


CARDS = {
    name: Card(name, mebibytes * MIB)
    for name, mebibytes in {
        "t4-16g": 15360,
        "v100-16g": 16384,
        "l4-24g": 23034,
        "a10-24g": 23028,
        "rtx3090-24g": 24576,
        "rtx4090-24g": 24564,
        "rtx5090-32g": 32607,
        "v100-32g": 32768,
        "a100-40g": 40960,
        "l40s-48g": 46068,
        "a6000-48g": 49140,
        "a100-80g": 81920,
        "h100-80g": 81559,
        "h200-141g": 143771,
        "b200-180g": 183359,
    }.items()
}


def card(name: str) -> Card:
    """The named card; ValueError lists the names that exist."""
    if name not in CARDS:
        raise ValueError(f"card: expected one of {', '.join(CARDS)}, got {name!r}")
    return CARDS[name]
