"""Every byte that is alive while a step runs, by label, and the most there ever was.

Works on fake tensors (`torch._subclasses.FakeTensorMode`), whose storages have a size and no memory, and on real ones.
A tensor counts from the operator that made it until its storage is freed; views count once. Memory that an operator of
ours allocates inside is added while it runs (`workspace_bytes`); that of PyTorch's own operators is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from route_kernels.ops.workspace import workspace_bytes

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
