"""One detector in a process of its own, see `worker.py`: every step gives its seconds, loss and gradient norm.

For `train-step` and `memory-levels`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

import route_kernels as rk
from route_detr.config import preset as named_config
from route_detr.data.batches import Target
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector

from .worker import serve

STRENGTH, AUX_WEIGHT = 0.3, 0.7  # lambda and alpha at the end of their schedules
BOXES = 15  # an image


class Stepper:
    """A preset's detector, its last two layers routed or none, on one batch of noise with boxes; all seeded."""

    def __init__(
        self, *, route: bool, fused: bool, preset: str, batch: int, height: int, width: int, queries: int,
        memory: str = "lean", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.backend = None if fused else "eager"
        config = named_config(preset).updated(
            {
                "detector.route": route,
                "detector.routed_layers": "last:2",
                "detector.num_queries": queries,
                "detector.branches": "packed" if fused else "two_pass",
                "detector.memory": memory,
            }
        )
        torch.manual_seed(0)
        self.detector = Detector(config.detector).train().to(device)
        self.autocast = partial(torch.autocast, torch.device(device).type, dtype, enabled=dtype != torch.float32)
        if route:
            self.detector.set_routing(STRENGTH, AUX_WEIGHT)
        self.criterion = Criterion(config.train)
        trained = [parameter for parameter in self.detector.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate)
        self.clip_norm = config.train.clip_norm
        self.images = torch.randn(batch, 3, height, width).to(device)
        self.targets = [
            Target(
                image_id=index,
                boxes=torch.cat([torch.rand(BOXES, 2) * 0.6 + 0.2, torch.rand(BOXES, 2) * 0.2 + 0.1], dim=1).to(device),
                labels=torch.randint(config.detector.num_classes, (BOXES,)).to(device),
                size=(height, width),
                original_size=(height, width),
            )
            for index in range(batch)
        ]
        torch.manual_seed(1)  # routers have drawn numbers of their own: now all contenders draw the same

    def step(self) -> dict[str, float]:
        """Everything that a step of `route-detr train` does but reading images."""
        started = perf_counter()
        with rk.backend(self.backend), self.autocast():
            losses = self.criterion(self.detector(self.images, None, self.targets), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip_norm)
        self.optimizer.step()
        answer = {"loss": losses["loss"].item(), "gradient_norm": norm.item()}  # waits for a GPU
        return {"seconds": perf_counter() - started, **answer}


def main(argv: Sequence[str]) -> int:
    settings: dict[str, Any] = json.loads(argv[0])
    torch.set_num_threads(settings.pop("threads"))
    serve(Stepper(**settings).step, sys.stdout)
    return 0
