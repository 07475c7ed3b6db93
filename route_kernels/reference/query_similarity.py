"""Mean cosine similarity of each query to the others: the first entry of the gate's input (arXiv 2512.13876)."""

from __future__ import annotations

import torch

from ..precision import accumulate_dtype, without_autocast

EPS = 1e-12


def query_similarity(x: torch.Tensor, mode: str) -> torch.Tensor:
    """x [B, N, C] -> [B, N].

    relu: s_i = (1/N) sum_{j != i} relu(x^_i . x^_j), without gradient.
    mean: s_i = (1/(N-1)) sum_{j != i} x^_i . x^_j = x^_i . (sum_j x^_j - x^_i) / (N-1), differentiable, O(N C).
    """
    queries = x.shape[1]
    with without_autocast(x.device):
        unit = torch.nn.functional.normalize(x.to(accumulate_dtype(x.dtype)), dim=-1, eps=EPS)
        if mode == "mean":
            others = unit.sum(dim=1, keepdim=True) - unit
            return ((unit * others).sum(dim=-1) / max(queries - 1, 1)).to(x.dtype)
        unit = unit.detach()
        cosine = torch.relu(unit @ unit.mT)
        return ((cosine.sum(dim=-1) - cosine.diagonal(dim1=-2, dim2=-1)) / max(queries, 1)).to(x.dtype)
