"""Every byte that is alive while a step runs, by label, and the most there ever was.

Works on fake tensors (`torch._subclasses.FakeTensorMode`), whose storages have a size and no memory, and on real ones.
A tensor counts from the operator that made it until its storage is freed; views count once. Memory that an operator of
ours allocates inside is added while it runs (`workspace_bytes`); that of PyTorch's own operators is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from route_kernels.ops.levels import level_count
from route_kernels.precision import accumulate_dtype

WORKSPACES = "workspaces"


@dataclass
class _Storage:
    label: str
    size: int


class Ledger(TorchDispatchMode):
    """Inside `with ledger:` every new storage is counted under the label at hand.

    Attributes:
        live: bytes alive now, by label.
        peak: the most bytes that were alive at once.
        at_peak: `live` of that moment, with the workspace of the operator that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._storages = WeakIdKeyDictionary()
        self._labels = ["other"]

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """New storages count under `label` inside the `with` block."""
        self.push(label)
        try:
            yield
        finally:
            self.pop()

    def push(self, label: str) -> None:
        """Does as `labelled`, for hooks: until `pop`."""
        self._labels.append(label)

    def pop(self) -> None:
        """Back to the label before the last `push`."""
        self._labels.pop()

    def label_calls(self, module: nn.Module, label: str) -> None:
        """Count the tensors that `module` makes in its forward under `label`."""
        module.register_forward_pre_hook(lambda *_: self.push(label))
        module.register_forward_hook(lambda *_: self.pop(), always_call=True)

    def count(self, label: str, *tensors: torch.Tensor | None) -> None:
        """Count tensors made elsewhere, or move those that are counted already to `label`."""
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor, label, move=True)
        self._note_peak(0)

    def count_gradients(self, parameters: list[nn.Parameter], label: str) -> None:
        """The gradients that backward will leave in `parameters` count under `label`."""
        for parameter in (p for p in parameters if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: self._count(p.grad, label, move=True))

    def _count(self, tensor: torch.Tensor, label: str, move: bool = False) -> None:
        storage = tensor.untyped_storage()
        entry = self._storages.get(storage)
        if entry is None:
            entry = self._storages[storage] = _Storage(label, storage.nbytes())
            weakref.finalize(storage, self._release, entry).atexit = False
        elif move and entry.label != label:
            self._release(entry)
            entry.label = label
        else:
            return
        self.live[label] += entry.size
        self.total += entry.size

    def _release(self, entry: _Storage) -> None:
        self.live[entry.label] -= entry.size
        self.total -= entry.size

    def _note_peak(self, workspace: int) -> None:
        if self.total + workspace > self.peak:
            self.peak = self.total + workspace
            self.at_peak = {label: size for label, size in self.live.items() if size}
            if workspace:
                self.at_peak[WORKSPACES] = workspace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._count(result, self._labels[-1])
        self._note_peak(workspace_bytes(func, args))
        return results


def workspace_bytes(op: Any, arguments: Sequence[Any]) -> int:
    """Bytes that Triton's launches allocate inside one call of `op` (an overload such as `torch.ops.aten.mm.default`).

    arguments: positional, as a dispatch mode gets them. 0 for ops that are not ours, and for those that return their
        workspace as an output.
    """
    if getattr(op, "namespace", None) != "route_kernels":
        return 0
    formula = _WORKSPACES.get(op._schema.name.partition("::")[2])
    return 0 if formula is None else formula(*arguments)


def _sums(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes that a gradient is summed in, where that is another dtype than its own."""
    return 0 if tensor.dtype == dtype else tensor.numel() * dtype.itemsize


def _ms_deform_attn_backward(grad_output, value, *_) -> int:
    return _sums(value, accumulate_dtype(value.dtype))


def _ms_deform_attn_fused_backward(
    grad_output, value, sizes, reference_points, offsets, logits, points, value_mask, reference_grad, *_
) -> int:
    dtype = accumulate_dtype(value.dtype)
    of_heads = logits.shape[:3].numel() * level_count(sizes) * reference_points.shape[3] * dtype.itemsize
    return _sums(value, dtype) + _sums(logits, dtype) + (of_heads if reference_grad else 0)


def _routed_attention_backward(
    grad_output, output, lse, query, key, value, routing, strength, limit, attn_mask, *_
) -> int:
    """dO . O, with a float mask maxima and sums of rows, and what groups of heads add to three factors' gradients: at
    most a group for every head."""
    of_queries, of_keys = (sum(factor.numel() for factor in routing[side:6:2]) for side in (0, 1))
    of_rows = 3 if attn_mask is not None and attn_mask.dtype != torch.bool else 1
    return 4 * (of_rows * lse.numel() + query.shape[1] * max(of_queries, of_keys))


def _query_similarity(x, *_) -> int:
    return 4 * x.shape[0] * x.shape[1]  # 1 / |x|


_WORKSPACES: dict[str, Callable[..., int]] = {
    "ms_deform_attn_backward": _ms_deform_attn_backward,
    "ms_deform_attn_fused_backward": _ms_deform_attn_fused_backward,
    "routed_attention_backward": _routed_attention_backward,
    "query_similarity": _query_similarity,
}
