"""The tensors that autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def kept_tensors(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result of `run`, and what is saved for its backward."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        return run(), kept


def kept_bytes(run: Callable[[], torch.Tensor], but: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages that `run` keeps for backward, each counted once, without those of `but` and its result."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in (*but, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())
