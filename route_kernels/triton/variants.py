"""Every kernel that the ops can launch, for an architecture that need not be here: ahead of time, from real calls.

An op's file offers `variants(architecture)`: it calls its own forward and backward on tensors of the meta device, and
the launches that come of it, as they would be specialized on that architecture, are its variants.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from . import launch
from .availability import DTYPES

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FILES = {op: op for op in DTYPES}
"""The file of this folder that has `variants` for the op."""


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


def recorded(op: str, direction: str, label: str, architecture: str, call: Callable[[], Any]) -> list[Variant]:
    """The variants that `call`, on tensors of the meta device, would launch on this architecture."""
    with launch.recording(architecture) as record:
        call()
    return [_variant(op, direction, label, architecture, item) for item in record.launches]


def of_op(op: str, architecture: str) -> Iterator[Variant]:
    """Every variant of one op, each once: launches that specialize alike are one."""
    module = importlib.import_module(f".{FILES[op]}", __package__)
    seen = set()
    for variant in module.variants(architecture):
        if variant.op != op:
            continue
        alike = repr((variant.kernel, variant.signature, variant.constexprs, variant.attributes, variant.options))
        if alike not in seen:
            seen.add(alike)
            yield variant


def _variant(op: str, direction: str, label: str, architecture: str, item: launch.Launch) -> Variant:
    kernel, backend = item.kernel, make_backend(TARGETS[architecture])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = {**item.settings, "debug": False}
    bound, specialization, options = bind(*item.arguments, **settings)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, settings, bound, specialization, options)
    return Variant(
        op, direction, f"{kernel.fn.__name__} {label}", architecture, kernel, item.grid, signature, constexprs,
        attributes, dict(parsed.__dict__), item.entries,
    )  # fmt: skip
