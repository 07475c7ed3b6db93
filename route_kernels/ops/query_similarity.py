"""How similar each query is to the others: the first entry of the gate's input in Route-DETR (arXiv 2512.13876).

    x^ = x / max(|x|, eps)
    relu: s_i = (1/N) sum_{j != i} relu(x^_i . x^_j)                       no gradient; what the public code computes
    mean: s_i = (1/(N-1)) sum_{j != i} x^_i . x^_j                         differentiable, O(N C); the paper's wording

B batch, N queries, C channels.
"""

from __future__ import annotations

import torch

from .. import backends, reference
from ..precision import FLOATING
from ..triton.availability import LIMITS, Limits
from .contract import expect_choice, expect_floating, expect_shape, expect_tensors, last_dim_contiguous
from .flop import count_flop
from .registry import register
from .workspace import count_workspace

OP = "query_similarity"
MODES = ("relu", "mean")
LIMITS[OP] = Limits(FLOATING[:3])


def query_similarity(x: torch.Tensor, mode: str = "relu") -> torch.Tensor:
    """Mean cosine similarity of each query to the others, without an N x N tensor.

    Args:
        x: [B, N, C], float16, bfloat16, float32 or float64.
        mode: "relu" (rectified, over N, no gradient) or "mean" (over N - 1, differentiable).

    Returns:
        [B, N] in the dtype of x; N = 1 gives 0.

    Raises:
        ValueError: x is not [B, N, C], or the mode is unknown.
        TypeError: x is not floating.
        BackendUnavailableError: an explicitly requested backend cannot run.
    """
    expect_tensors(OP, x=x)
    expect_choice(OP, "mode", mode, MODES)
    chosen = backends.choose(OP, x)
    plain = backends.plain(OP, chosen)
    if mode == "mean" and plain is None:
        plain = reference.query_similarity  # O(N C): nothing to fuse, on any backend
    if plain is not None:
        check(x, mode)
        return plain(x, mode)
    return torch.ops.route_kernels.query_similarity(x.detach(), mode, chosen)


def check(x: torch.Tensor, mode: str) -> None:
    """The contract, for real and fake tensors alike."""
    expect_shape(OP, "x", x, "B", "N", "C")
    expect_floating(OP, "x", x)
    expect_choice(OP, "mode", mode, MODES)


def _kernel(x: torch.Tensor, mode: str, backend: str) -> torch.Tensor:
    output = _new_output(x, mode)
    backends.kernel(OP, "forward", backend)(last_dim_contiguous(x), output)
    return output


def _new_output(x: torch.Tensor, mode: str, backend: str | None = None) -> torch.Tensor:
    check(x, mode)
    return x.new_empty(x.shape[:2])


register("query_similarity(Tensor x, str mode, str backend) -> Tensor", _kernel, _new_output)


def _flop(x, *_, **__) -> int:
    """The cosines of all pairs."""
    batch, queries, channels = x
    return 2 * batch * queries * queries * channels


count_flop(OP, _flop)


def _workspace(x, *_) -> int:
    """1 / |x|."""
    return 4 * x.shape[0] * x.shape[1]


count_workspace(OP, _workspace)
