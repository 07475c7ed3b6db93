"""One training step of somebody's model: its results, how far two are apart, what it costs."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import backends

SAMPLING = ("sampling_offsets", "attention_weights")
"""The linear layers of a deformable attention module that decide where and how much it samples."""

Step = dict[str, torch.Tensor | None]
"""`output PATH`, `grad PARAMETER` and `grad input PATH` of a step; None where PyTorch left no gradient."""


def perturb_sampling(module: nn.Module, scale: float = 0.1, seed: int = 0) -> int:
    """Normal noise on the parameters of `SAMPLING` layers: as initialised, they hide a wrong op. Returns how many."""
    generator = torch.Generator().manual_seed(seed)
    perturbed = 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(layer in name.split(".") for layer in SAMPLING):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((scale * noise).to(parameter))
                perturbed += 1
    return perturbed


def training_step(
    function: Callable[..., Any], inputs: Mapping[str, Any] | tuple, *, module: nn.Module | None = None, seed: int = 0
) -> Step:
    """Forward, and backward of a fixed random weighting of every differentiable output.

    Args:
        function: what is called; a module, or a function around `module`.
        inputs: its positional (tuple) or keyword arguments (mapping).
        module: whose parameters get gradients; None is `function`, if that is a module.
        seed: of the weighting, and of PyTorch's generator during the forward (dropout, denoising queries).

    Returns:
        Every output tensor, and the gradient of every parameter and input tensor that requires one.
    """
    module = function if module is None and isinstance(function, nn.Module) else module
    leaves = {f"grad {name}": p for name, p in module.named_parameters()} if module is not None else {}
    leaves |= {f"grad input {name}": tensor for name, tensor in tensors_in(inputs)}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    torch.manual_seed(seed)
    outputs = dict(tensors_in(function(**inputs) if isinstance(inputs, Mapping) else function(*inputs)))
    generator = torch.Generator().manual_seed(seed)
    weighted = [
        (output, torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
        for output in outputs.values()
        if output.requires_grad
    ]
    if not weighted:
        raise ValueError("training_step: expected an output that requires a gradient, got none")
    grads = torch.autograd.grad(
        [output for output, _ in weighted],
        list(leaves.values()),
        [weighting for _, weighting in weighted],
        allow_unused=True,
    )
    results: Step = {f"output {name}": output.detach() for name, output in outputs.items()}
    return results | dict(zip(leaves, grads, strict=True))


def tensors_in(structure: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """("logits", ...), ("hidden_states.0", ...): every tensor in nested mappings, sequences and dataclasses."""
    if isinstance(structure, torch.Tensor):
        yield path or "0", structure
        return
    if isinstance(structure, Mapping):
        items = structure.items()
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        items = ((field.name, getattr(structure, field.name)) for field in dataclasses.fields(structure))
    elif isinstance(structure, tuple) and hasattr(structure, "_asdict"):
        items = structure._asdict().items()
    elif isinstance(structure, list | tuple):
        items = enumerate(structure)
    else:
        return
    for name, item in items:
        yield from tensors_in(item, f"{path}.{name}" if path else str(name))


def relative_errors(found: Step, expected: Step) -> dict[str, float]:
    """For each result of `expected`, and each that only `found` has, the largest error over the largest number.

    A gradient counts as at least 1e-4 of the largest of all: one that cancels to zero is nothing but rounding. A
    missing result, one of another shape, not finite where expected is, or (integers) not equal is infinitely wrong. A
    gradient of zeros where none is expected is right.
    """
    largest = max((_largest(x) for name, x in expected.items() if x is not None and "grad" in name), default=0.0)
    errors = {}
    for name in dict.fromkeys([*expected, *found]):
        ours, theirs = found.get(name), expected.get(name)
        if theirs is None:
            errors[name] = 0.0 if ours is None or not ours.any() else float("inf")
        elif ours is None or ours.shape != theirs.shape:
            errors[name] = float("inf")
        else:
            floor = 1e-4 * largest if name.startswith("grad ") else 0.0
            errors[name] = _error(ours, theirs, floor)
    return errors


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
    return finite.max().item() if finite.numel() else 0.0


def _error(ours: torch.Tensor, theirs: torch.Tensor, floor: float) -> float:
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    ours, exact = ours.detach().double(), theirs.detach().double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (ours - exact).abs())
    if not difference.numel() or not difference.any():
        return 0.0
    if not difference.isfinite().all():
        return float("inf")
    scale = _largest(exact) + floor
    return difference.max().item() / scale if scale else float("inf")


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """How often each public op is called inside the `with` block, on whatever backend: Counter(ms_deform_attn=6).

    Backward passes are not calls; what torch.compile has compiled is not seen.
    """
    counts: Counter[str] = Counter()
    choose = backends.choose

    def choose_and_count(op: str, *tensors: torch.Tensor | None) -> str:
        counts[op] += 1
        return choose(op, *tensors)

    backends.choose = choose_and_count
    try:
        yield counts
    finally:
        backends.choose = choose


# ---- cost ------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, inputs: tuple | Mapping[str, Any]) -> None:
    """Forward and backward of the loss, or of the sum of the outputs where there is none; gradients are dropped."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    loss_of(output).backward()
    model.zero_grad(set_to_none=True)


def loss_of(output: Any) -> torch.Tensor:
    """`output.loss` or `output["loss"]` if there is one, else the sum of every differentiable output.

    Raises:
        ValueError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss
    sums = [x.float().sum() for _, x in tensors_in(output) if x.requires_grad]
    if not sums:
        raise ValueError("expected a loss or an output that requires a gradient, got none; is every parameter frozen?")
    return torch.stack(sums).sum()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run, until a GPU has finished it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


MEASURED = {
    "cuda": "what PyTorch's allocator held at most beyond what it held before",
    "cpu": "the most that tensors and kernels' workspaces held, beyond what was held before (PyTorch's profiler)",
}


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that PyTorch's allocators held during one run, beyond what they held before it: see `MEASURED`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for size in _allocations(profile):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    """Bytes of each allocation (positive) and release (negative), in their order."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
