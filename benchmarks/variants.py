"""Every kernel that the ops can launch, for an architecture that need not be here: ahead of time, from real calls.

Each op's file in `ops` says how its kernels are called (`kernel_calls`), on tensors of the meta device; the launches
that come of it, as they would be specialized on that architecture, are the op's variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from . import ops
from .launches import Launch, Recording, recording

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one launch."""

    op: str
    direction: str  # "forward" or "backward"
    name: str  # kernel, dtype, what is peculiar: unique within op and architecture
    architecture: str
    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]  # by parameter: "*bf16", "i32", "constexpr"
    constexprs: dict[tuple[int, ...], Any]  # by place of the parameter
    attributes: dict[tuple[int, ...], Any]  # divisibility by 16, likewise
    options: dict[str, Any]  # num_warps, num_stages, ...
    entries: frozenset[tuple[str, int]]  # (kernel name, place) of the table's entries that the settings are
    spilled_bytes: int = 0  # of a lane, at most: known, and no block size was found without

    def compile(self) -> CompiledKernel:
        """The machine code, from Triton's cache where it has it."""
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return compile_source(source, target=TARGETS[self.architecture], options=self.options)


def recorded(op: str, direction: str, label: str, architecture: str, *arguments: Any) -> list[Variant]:
    """The variants that a kernel's entry point would launch on this architecture, of tensors of the meta device."""
    entry_point = getattr(import_module(f"route_kernels.triton.{op}"), direction)
    with recording(architecture) as record:
        entry_point(*arguments)
    return [_variant(op, direction, label, item, record) for item in record.launches]


def of_op(op: str, architecture: str) -> Iterator[Variant]:
    """Every variant of one op, each once: launches that specialize alike are one."""
    seen = set()
    for variant in _launched(op, architecture):
        alike = repr((variant.kernel, variant.signature, variant.constexprs, variant.attributes, variant.options))
        if alike not in seen:
            seen.add(alike)
            yield variant


def _launched(op: str, architecture: str) -> Iterator[Variant]:
    for call in ops.declaration(op).kernel_calls():
        for variant in recorded(op, call.direction, call.label, architecture, *call.arguments):
            key = (variant.kernel.fn.__name__, architecture, *call.family)
            yield replace(variant, spilled_bytes=SPILLED.get(key, 0))


def _variant(op: str, direction: str, label: str, item: Launch, record: Recording) -> Variant:
    kernel, backend, name = item.function, make_backend(TARGETS[record.architecture]), item.function.fn.__name__
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = {**item.constants, "debug": False}
    bound, specialization, options = bind(*item.arguments, **settings)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, settings, bound, specialization, options)
    entries = frozenset(entry for entry in record.entries.items() if entry[0].endswith(name))
    return Variant(
        op, direction, f"{name} {label}", record.architecture, kernel, item.grid, signature, constexprs, attributes,
        dict(parsed.__dict__), entries,
    )  # fmt: skip


SPILLED = {
    ("attention_backward_keys", "sm80", torch.bfloat16, 128, 32, False): 40,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 32, False): 56,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 32, False): 96,
    ("attention_backward_keys", "sm80", torch.bfloat16, 128, 32, True): 72,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 32, True): 72,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 32, True): 128,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 16, True): 8,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 16, True): 16,
    ("attention_backward_keys", "sm86", torch.bfloat16, 16, 32, True): 8,
    ("attention_backward_keys", "sm80", torch.float32, 64, 32, True): 8,
    ("attention_backward_keys", "sm86", torch.float32, 64, 32, True): 8,
    ("attention_backward_keys", "sm90", torch.float32, 128, 64, True): 40,
    ("attention_backward_queries", "sm86", torch.bfloat16, 128, 32, True): 16,
    ("attention_backward_queries", "sm120", torch.bfloat16, 128, 32, True): 24,
    ("attention_backward_queries", "sm86", torch.float32, 16, 16, True): 8,
    ("attention_backward_queries", "sm86", torch.float32, 16, 32, True): 8,
    ("attention_backward_queries", "sm80", torch.bfloat16, 32, 16, "strength"): 8,
    ("attention_forward", "sm80", torch.float32, 64, 32, True): 8,
    ("attention_forward", "sm80", torch.float32, 128, 32, True): 8,
    ("attention_forward", "sm86", torch.float32, 64, 32, True): 8,
    ("attention_forward", "sm120", torch.bfloat16, 32, 64, True): 8,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 64, 32, True): 8,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 128, 32, True): 4,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 64, 16, True): 16,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 128, 64, True): 8,
    ("attention_backward_keys", "gfx942", torch.float32, 16, 16, True): 4,
    ("attention_backward_keys", "gfx942", torch.float32, 32, 16, True): 24,
    ("attention_backward_keys", "gfx942", torch.float32, 32, 32, True): 4,
    ("attention_backward_keys", "gfx942", torch.float32, 64, 64, True): 20,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 16, True): 24,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 32, True): 20,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 64, True): 8,
}
"""By kernel, chip, dtype, D, R and whether masked, or with the gradient of a strength: bytes a lane that are known.

docs/triton.md says more of them. On gfx942 they are scalar registers, kept in lanes of vector registers: no instruction
goes to memory.
"""
