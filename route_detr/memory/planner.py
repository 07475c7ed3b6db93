"""Peak memory of a training step of the detector, counted on fake tensors: seconds, no GPU, the same bytes every time.

The step is the real one (model, matching costs, losses, backward, clipping, AdamW) with fake tensors in place of real
ones; only the assignment of boxes to queries, which has no size, is left out.
"""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import route_kernels as rk
from route_detr.config import Config, MemoryLevel
from route_detr.data.annotations import without_collections
from route_detr.data.batches import Target
from route_detr.errors import RunFailed
from route_detr.model.blocks import PredictionHead
from route_detr.model.criterion import Criterion
from route_detr.model.decoder import DecoderLayer
from route_detr.model.detector import Detector
from route_kernels.backends import assumed
from route_kernels.nn import BoxTargets, HungarianMatcher, Matches

from .ledger import WORKSPACES, Ledger
from .precision import mixed_precision
from .public_form import PublicCriterion, make_public, public_config

LEVELS = get_args(MemoryLevel)
SCOPES = ("step", "transformer")
PARTS = (
    *("parameters", "gradients", "optimiser", "inputs", "backbone", "encoder", "decoder main", "decoder aux", "heads"),
    *("losses", "backward", WORKSPACES),
)
"""Parts of a peak: `backward` is made there beside parameters' gradients, our kernels allocate `workspaces`."""

GPU_BACKEND = "triton"  # whose workspaces are counted
STRENGTH, AUX_WEIGHT = 0.3, 0.5  # of a run past its warm-up: both branches run


@dataclass(frozen=True)
class Request:
    """A step to plan.

    scope: "step" is everything; "transformer" is transformer and criterion on the neck's outputs (parameters, gradients
        and these inputs counted; backbone and optimizer not).
    public: the public formulation instead of ours, whatever `config.detector.memory` says.
    """

    config: Config
    batch: int = 16
    image: tuple[int, int] = (800, 1333)  # height, width of the padded batch
    dtype: torch.dtype = torch.bfloat16  # of autocast; float32: none
    scope: str = "step"
    public: bool = False
    boxes: int = 20  # an image

    def __post_init__(self) -> None:
        if self.boxes < 0:
            raise ValueError(f"boxes: expected a number >= 0, got {self.boxes}")
        for name, value in (("batch", self.batch), ("image height", self.image[0]), ("image width", self.image[1])):
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.public and self.config.detector.masks:
            raise ValueError("detector.masks: expected false for the public formulation, which has none, got true")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype}")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        height, width = self.image
        return f"{self.scope}: batch {self.batch}, {height} x {width}, {self.boxes} boxes, {self.dtype_name}"

    def at(self, level: str) -> Request:
        """The same step at another memory level."""
        return dataclasses.replace(self, config=self.config.updated({"detector.memory": level}))


@dataclass(frozen=True)
class Plan:
    """Bytes: the peak, and of what it consists (by `PARTS`; the parts sum to it)."""

    peak: int
    parts: dict[str, int]


def plan(request: Request, counter: FlopCounterMode | None = None) -> Plan:
    """The peak of the requested step; a counter counts its FLOPs as well, whose hooks keep tensors alive."""
    ledger = Ledger()
    detector, criterion = _built(request, "meta", GPU_BACKEND)
    kernels = rk.backend("reference") if detector.config.memory == "none" else assumed(GPU_BACKEND)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels, mixed_precision(request.dtype) as autocast:
        detector.to_empty(device="cpu")  # fake tensors of the same strides in place of those on the meta device
        criterion.boxes.matcher = _UnsolvedMatcher()
        shares = _label(detector, ledger)
        images, padding_mask, targets, optimizer = _inputs(request, detector, ledger)
        gc.collect()  # what a cycle holds would be alive in one run and not in the next
        with without_collections(), nullcontext() if counter is None else counter, ledger:
            with autocast:
                output = detector(images, padding_mask, targets)
            with ledger.labelled("losses"), autocast if request.public else nullcontext():
                loss = criterion(output, targets)["loss"]
            del output
            with ledger.labelled("backward"):
                loss.backward()
            if optimizer is not None:
                with ledger.labelled("optimiser"):
                    nn.utils.clip_grad_norm_(detector.parameters(), 0.1, foreach=True)
                    optimizer.step()
    parts = dict.fromkeys(PARTS, 0)
    for label, size in sorted(ledger.at_peak.items()):
        share = shares[label]
        for index, part in enumerate(share):
            parts[part] += (size + len(share) - 1 - index) // len(share)
    return Plan(ledger.peak, parts)


def products(request: Request) -> int:
    """FLOPs of the step's matrix products and convolutions, those in backward and in our ops too (ops/flop.py)."""
    counter = FlopCounterMode(display=False)
    plan(request, counter)
    return counter.get_total_flops()


def _built(request: Request, device: str, backend: str | None = None) -> tuple[Detector, Criterion]:
    """The detector on `device`, without its backbone's weights, past its warm-up, and its criterion.

    backend: assumed of the public form's sampling.
    """
    config = public_config(request.config.detector) if request.public else request.config.detector
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))
    with torch.device(device):
        detector = Detector(config).train()
    if request.public:
        make_public(detector, backend)
    if config.route:
        detector.set_routing(STRENGTH, AUX_WEIGHT)
    return detector, (PublicCriterion if request.public else Criterion)(request.config.train)


def _inputs(
    request: Request, detector: Detector, ledger: Ledger
) -> tuple[Tensor, Tensor, list[Target], torch.optim.Optimizer | None]:
    """Images, their padding mask and targets; in a whole step the optimizer, which has its state already. Counts what
    is there before a step, and has the ledger count gradients."""
    height, width = request.image
    images = torch.empty(request.batch, 3, height, width)
    padding_mask = torch.zeros(request.batch, height, width, dtype=torch.bool)
    targets = [_target(request) for _ in range(request.batch)]
    optimizer = None
    if request.scope == "transformer":
        features = detector.backbone(images[:1])
        finest, used = features[: detector.config.masks], features[-detector.config.backbone.used_stages :]
        finest, levels = (
            [torch.empty(request.batch, *each.shape[1:]) for each in maps]
            for maps in (finest, detector.feature_levels(used))
        )
        detector.backbone, detector.feature_levels = _Given(finest), _Given(levels)
        ledger.count("inputs", *levels, *finest)
    else:
        ledger.count("inputs", images, padding_mask)
        optimizer = _adamw_with_state(detector)
        for state in optimizer.state.values():
            ledger.count("optimiser", *(value for value in state.values() if isinstance(value, Tensor)))
    ledger.count("inputs", *(target.masks for target in targets))
    parameters = list(detector.parameters())
    ledger.count("parameters", *parameters, *detector.buffers())
    ledger.count_gradients(parameters, "gradients")
    return images, padding_mask, targets, optimizer


class _Given(nn.Module):
    """Stands for a module that has run already."""

    def __init__(self, levels: list[Tensor]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, inputs: Tensor | list[Tensor]) -> list[Tensor]:
        return self.levels


class _UnsolvedMatcher(HungarianMatcher):
    """Costs as in `HungarianMatcher`, each gone once the host has it, then matches without values: one for each box."""

    def __call__(self, sets, targets: BoxTargets, names=None, more=None) -> list[Matches]:
        with torch.no_grad():
            for index, (logits, boxes) in enumerate(sets):
                for _ in self._tables(index, logits, boxes, targets, more[index] if more else None):
                    pass
        matches = []
        for _, boxes in sets:
            counts = [min(boxes.shape[2], count) for count in targets.counts]
            query, own = torch.empty(2, boxes.shape[1] * sum(counts), dtype=torch.int64)
            matches.append(Matches(torch.empty(boxes.shape[:3], dtype=torch.int64), query, own, counts))
        return matches

    @staticmethod
    def on_host(x: Tensor) -> Tensor:
        """Nothing on the device."""
        return x.to("meta")


def _target(request: Request) -> Target:
    """Boxes and labels on a device that is not the host, whose labels nobody reads; masks where the step runs."""
    boxes = torch.empty(request.boxes, 4, device="meta")
    labels = torch.empty(request.boxes, dtype=torch.int64, device="meta")
    masks = None
    if request.config.detector.masks:
        masks = torch.empty(request.boxes, *request.image, dtype=torch.bool)
    return Target(0, boxes, labels, request.image, request.image, masks=masks)


def _adamw_with_state(detector: Detector) -> torch.optim.AdamW:
    """The optimizer of a GPU (foreach), with the state that a first step leaves."""
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _label(detector: Detector, ledger: Ledger) -> dict[str, tuple[str, ...]]:
    """Labels what each module makes; returns by label the parts that share it evenly, complete after the forward.

    A decoder layer's call belongs to both branches where they are packed, and to the auxiliary one where the layer has
    been called before.
    """
    shares = {part: (part,) for part in PARTS}
    shares["other"] = ("encoder",)  # between the modules: flattened levels, positions
    for name, module in detector.named_modules():
        if module in (detector.backbone, detector.feature_levels):
            ledger.label_calls(module, "backbone")
        elif module is detector.encoder:
            ledger.label_calls(module, "encoder")
        elif module is detector.decoder:
            ledger.label_calls(module, "decoder main")
        elif module in (detector.proposals, detector.pixel_embedding) or isinstance(module, PredictionHead):
            ledger.label_calls(module, "heads")
        elif module in detector.decoder.routers.values():
            ledger.label_calls(module, "decoder aux")
        elif isinstance(module, DecoderLayer):
            _label_layer(module, name, ledger, shares)
    return shares


def _label_layer(layer: DecoderLayer, name: str, ledger: Ledger, shares: dict[str, tuple[str, ...]]) -> None:
    calls: Counter[str] = Counter()

    def before(*_) -> None:
        calls[name] += 1
        ledger.push(f"{name} call {calls[name]}")

    def after(_module, _inputs, content: Tensor) -> None:
        ledger.pop()
        main, aux = "decoder main", "decoder aux"
        packed = content.shape[1] == 2
        shares[f"{name} call {calls[name]}"] = (main, aux) if packed else (main,) if calls[name] == 1 else (aux,)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def measured_peak(request: Request) -> int:
    """The peak of the second of two real steps on this GPU, in bytes, as PyTorch's allocator counts.

    Raises RunFailed without a GPU, or for a scope that is no whole step.
    """
    if not torch.cuda.is_available():
        raise RunFailed("measuring needs a GPU: none was found")
    if request.scope != "step":
        raise RunFailed(f"scope: only a whole step can be measured, got {request.scope!r}")
    device, (detector, criterion) = torch.device("cuda"), _built(request, "cpu")
    detector.to(device)
    optimizer = torch.optim.AdamW([parameter for parameter in detector.parameters() if parameter.requires_grad])
    images = torch.randn(request.batch, 3, *request.image, device=device)
    padding_mask = torch.zeros(request.batch, *request.image, dtype=torch.bool, device=device)
    sides = torch.rand(request.batch, request.boxes, 2) * 0.3 + 0.05
    boxes = torch.cat([sides / 2 + torch.rand_like(sides) * (1 - sides), sides], -1).to(device)
    labels = torch.randint(detector.config.num_classes, (request.batch, request.boxes)).to(device)
    masks = [None] * request.batch
    if detector.config.masks:
        masks = torch.rand(request.batch, request.boxes, *request.image, device=device) < 0.5
    targets = [
        Target(0, *each, request.image, request.image, mask) for *each, mask in zip(boxes, labels, masks, strict=True)
    ]
    autocast = torch.autocast("cuda", request.dtype, enabled=request.dtype != torch.float32)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with autocast:
            output = detector(images, padding_mask, targets)
        with autocast if request.public else nullcontext():
            loss = criterion(output, targets)["loss"]
        del output
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), request.config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    return torch.cuda.max_memory_allocated()


def largest_batch(
    request: Request, limit: int, peak: Callable[[Request], int] = lambda request: plan(request).peak
) -> int:
    """The most images that fit in `limit` bytes; 0 where one does not. A peak grows with every image of the batch.

    peak: of a request, in bytes.
    """
    sizes = {0: 0}

    def fits(batch: int) -> bool:
        sizes[batch] = peak(dataclasses.replace(request, batch=batch))
        return sizes[batch] <= limit

    low, high = 0, 1
    while fits(high):
        slope = (sizes[high] - sizes[low]) / (high - low)
        low, high = high, high + 1 + int((limit - sizes[high]) / slope)
    while high - low > 1:  # low fits, high does not; nearly a straight line between them
        share = (limit - sizes[low]) / (sizes[high] - sizes[low])
        guess = min(max(low + int((high - low) * share), low + 1), high - 1)
        low, high = (guess, high) if fits(guess) else (low, guess)
    return low
