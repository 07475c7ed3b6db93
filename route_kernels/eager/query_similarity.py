"""Mean cosine similarity of each query to the others, from the N x N matrix."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def query_similarity(x: torch.Tensor, mode: str) -> torch.Tensor:
    """The rows of the [B, N, N] cosines without their diagonal, rectified or not, averaged: x [B, N, C] -> [B, N]."""
    queries = x.shape[1]
    unit = F.normalize(x, dim=-1, eps=1e-12 if x.dtype != torch.float16 else 1e-6)
    cosine = unit @ unit.mT
    others = ~torch.eye(queries, dtype=torch.bool, device=x.device)
    if mode == "mean":
        return ((cosine * others).sum(dim=-1) / max(queries - 1, 1)).to(x.dtype)
    return ((cosine.relu() * others).sum(dim=-1).detach() / max(queries, 1)).to(x.dtype)
