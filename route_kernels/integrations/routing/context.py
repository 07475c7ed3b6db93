"""Where the attention modules of `add_routing` learn whether to route, and how strongly."""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from ...ops.contract import number_or_tensor


class RoutingSettings(NamedTuple):
    """The settings of one `with rk.routing(...)`; the number 0 as strength is plain attention."""

    strength: float | torch.Tensor
    confidence: torch.Tensor | None  # [B, N]
    geometry: torch.Tensor | None  # [B, N]

    @property
    def is_plain(self) -> bool:
        """Whether no router runs; a tensor is not read for that."""
        return not isinstance(self.strength, torch.Tensor) and self.strength == 0


PLAIN = RoutingSettings(0.0, None, None)


class _ThreadState(threading.local):
    settings: RoutingSettings = PLAIN
    recomputing: bool = False  # inside a recomputation that knows what its forward did


_state = _ThreadState()


def active_settings() -> RoutingSettings:
    """The settings of the innermost `routing` block of this thread; `PLAIN` outside every block."""
    return _state.settings


def in_unknown_recomputation() -> bool:
    """Whether autograd recomputes a checkpointed forward and nobody kept the settings it ran under."""
    return torch._C._current_graph_task_id() != -1 and not _state.recomputing


class routing:
    """Modules given to `rk.integrations.add_routing` add their routing bias inside the block, and only there.

        with rk.routing(strength=0.3):
            auxiliary = model(images)

    Blocks nest, the innermost counts; they hold for the thread that enters them.

    Args:
        strength: lambda >= 0, the factor of the bias (after its clamp); 0 is the plain attention, without routers.
            The kernels alone read a tensor without dimensions: one compiled graph has all its values, and it may have
            a gradient.
        confidence: [B, N], highest class probability of each query; None is 0. Without gradient.
        geometry: [B, N], log of the area of each query's reference box; None is 0. Without gradient.

    Raises:
        ValueError: strength is not a finite number >= 0, or confidence or geometry is not [B, N].
        TypeError: strength is a tensor of more than one number, or confidence or geometry is no floating-point tensor.

    Source: Route-DETR, arXiv 2512.13876.
    """

    def __init__(
        self,
        strength: float | torch.Tensor = 1.0,
        *,
        confidence: torch.Tensor | None = None,
        geometry: torch.Tensor | None = None,
    ):
        if isinstance(strength, torch.Tensor):
            strength = number_or_tensor("routing", "strength", strength, differentiable=True)
        elif isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise ValueError(f"routing: strength: expected a finite number >= 0, got {strength!r}")
        for name, feature in (("confidence", confidence), ("geometry", geometry)):
            _expect_feature(name, feature)
        self._settings = RoutingSettings(strength, confidence, geometry)
        self._previous: list[RoutingSettings] = []

    def __enter__(self) -> None:
        self._previous.append(_state.settings)
        _state.settings = self._settings

    def __exit__(self, *exception: object) -> None:
        _state.settings = self._previous.pop()

    @staticmethod
    def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: recomputes what was computed.

        Autograd recomputes during backward, after the `routing` block, and on a GPU in another thread.
        """
        return nullcontext(), _Recomputation(_state.settings)


class _Recomputation:
    def __init__(self, settings: RoutingSettings):
        self._settings = settings
        self._previous: list[tuple[RoutingSettings, bool]] = []

    def __enter__(self) -> None:
        self._previous.append((_state.settings, _state.recomputing))
        _state.settings, _state.recomputing = self._settings, True

    def __exit__(self, *exception: object) -> None:
        _state.settings, _state.recomputing = self._previous.pop()


def _expect_feature(name: str, feature: torch.Tensor | None) -> None:
    if feature is None:
        return
    if not isinstance(feature, torch.Tensor) or not feature.is_floating_point():
        found = feature.dtype if isinstance(feature, torch.Tensor) else type(feature).__name__
        raise TypeError(f"routing: {name}: expected a floating-point tensor [B, N] or None, got {found}")
    if feature.dim() != 2:
        raise ValueError(f"routing: {name}: expected shape [B, N], got {list(feature.shape)}")
