"""The CUDA kernels of deformable attention on the CPU, over the emulated threads of `simt/`, for tests.

Every access of a kernel is checked there; whatever is wrong raises EmulationError with the thread and the reason.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from benchmarks.cuda_machine_code import build
from route_kernels import cuda
from route_kernels.ops.contract import last_dim_contiguous
from route_kernels.ops.levels import flat_integers, level_pairs, level_starts
from route_kernels.precision import accumulate_dtype

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++17", "-O0", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int32, torch.int64)
INPUT, OUTPUT, SUMS = range(3)


class EmulationError(Exception):
    """A kernel did what it must not do."""


def built(name: str, command: Sequence[object], sources: Sequence[Path]) -> Path:
    """The library that `command` makes, compiled once for its content; `NAME` in the command is that of the module."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation with")
    content = hashlib.sha256(repr((compiler, command, torch.__version__)).encode())
    for path in sources:
        content.update(path.name.encode() + path.read_bytes())
    made = ROOT / "build" / "simt" / f"{name}_{content.hexdigest()[:24]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        command = [compiler, *(str(part).replace("NAME", made.stem) for part in command), "-o", unfinished]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise EmulationError(f"the kernels do not compile over the emulation:\n{done.stderr}")
        os.replace(unfinished, made)
    return made


def sources_in(root: Path) -> list[Path]:
    folders = (root / "tests/simt", root / "csrc")
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


@functools.lru_cache
def library(*flags: str, root: Path = ROOT) -> ModuleType:
    """The kernels and the emulation in `root`, a module, compiled for `flags`."""
    simt = root / "tests/simt"
    includes = [f"-I{path}" for path in (simt, sysconfig.get_path("include"), pybind11.get_include())]
    command = [*FLAGS, *flags, *includes, "-DSIMT_MODULE=NAME", simt / "ms_deform_attn.cpp", simt / "block.cpp"]
    made = built("emulated", command, sources_in(root))
    specification = importlib.util.spec_from_file_location(made.stem, made)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


HOST_FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-Wl,-Bsymbolic")
HOST_SOURCES = ("tests/simt/cuda_op.cpp", "tests/simt/block.cpp", "csrc/ms_deform_attn/cuda_op.cpp")
_schemas: list[torch.library.Library] = []


@functools.lru_cache
def host_library() -> Any:
    """torch.ops.route_kernels_emulated: the CUDA library's ops, with its schemas and host half, for CPU tensors.

    Inputs of the kernels, workspaces, sorts and sums are those of a GPU; devices and streams are not.
    """
    torch_flags = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = [f"-l{name}" for name in ("torch_cpu", "torch", "c10")]
    command = [*HOST_FLAGS, *build().HOST_FLAGS, "-Itests/simt", *torch_flags, *HOST_SOURCES, *libraries]
    made = built("cuda_op", command, sources_in(ROOT))
    _schemas.append(torch.library.Library("route_kernels_emulated", "DEF"))
    for op in cuda.OPS:
        for direction in ("forward", "backward"):
            packet = getattr(torch.ops.route_kernels_native, f"{op}_{direction}")
            _schemas[0].define(str(packet.default._schema).partition("::")[2])
    torch.ops.load_library(made)
    return torch.ops.route_kernels_emulated


class Kernels:
    """The launches of one call, as the host makes them.

    `backwards` runs the blocks, and the threads of each, in the opposite order. `launches` counts kernels, `reductions`
    what their threads added to sums. `cell_dtype` is int64 where there are 2^31 cells or more.
    """

    def __init__(self, emulation: ModuleType | None = None, *, deterministic: bool = False, backwards: bool = False):
        self.emulation = library() if emulation is None else emulation
        self.deterministic, self.backwards = deterministic, backwards
        self.launches = self.reductions = 0
        self.cell_dtype = torch.int32

    def ms_deform_attn(
        self, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *, points=None
    ) -> torch.Tensor:
        """With the signature, and autograd, of the public op."""
        sizes = flat_integers("ms_deform_attn", "spatial_shapes", spatial_shapes)
        levels, last = len(sizes) // 2, sampling_locations.shape[-2]
        starts = level_starts(sizes, level_start_index)
        counts = (last,) * levels if points is None else tuple(points)
        if points is None:
            sampling_locations, attention_weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4)
        levels = _levels(sizes, starts, counts)
        return _Call.apply(self, levels, value, sampling_locations, attention_weights, None, None)

    def ms_deform_attn_fused(
        self, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, *, points=None,
        value_mask=None,
    ) -> torch.Tensor:  # fmt: skip
        """With the signature, and autograd, of the public op."""
        sizes = flat_integers("ms_deform_attn_fused", "spatial_shapes", spatial_shapes)
        count = len(sizes) // 2
        counts = (attention_logits.shape[3] // count,) * count if points is None else tuple(points)
        levels = _levels(sizes, level_starts(sizes, None), counts)
        return _Call.apply(self, levels, value, sampling_offsets, attention_logits, reference_points, value_mask)

    def forward(self, levels, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
        value, weights = inputs["value"], inputs["weights"]
        output = _poisoned(value, value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])
        self.launch("f", levels, inputs, output=output)
        return output

    def backward(
        self, levels, inputs: dict[str, torch.Tensor | None], grad_output: torch.Tensor, reference_grad: bool
    ) -> list[torch.Tensor | None]:
        """The gradients of value, places, weights and reference."""
        value, places, weights, reference = (inputs[name] for name in ("value", "places", "weights", "reference"))
        accumulate = accumulate_dtype(value.dtype)
        batch, _, heads, _ = value.shape
        made = {
            "grad_places": _poisoned(places, *places.shape),
            "grad_weights": _poisoned(weights, *weights.shape),
            "grad_reference": None,
        }
        if reference_grad:
            of_heads = (*weights.shape[:3], len(levels), reference.shape[3])
            made["grad_reference"] = _poisoned(value, *of_heads, dtype=accumulate)
        inputs = {**inputs, "grad_output": last_dim_contiguous(grad_output)}
        cells = 1 + sum((height + 1) * (width + 1) for _, height, width, _, _ in levels)
        if self.deterministic:
            made["cell"] = _poisoned(weights, *weights.shape, dtype=self.cell_dtype)
            made["corner_weight"] = _poisoned(weights, *weights.shape, 4, dtype=accumulate)
            self.launch("b", levels, inputs, cells=cells, **made)
            sorted_cells, order = torch.sort(made["cell"].flatten(), stable=True)
            bounds = torch.searchsorted(sorted_cells, torch.arange(batch * heads * cells + 1, dtype=self.cell_dtype))
            grad_value = _poisoned(value, *value.shape)
            inputs |= {"corner_weight": made["corner_weight"], "order": order, "bounds": bounds}
            self.launch("g", levels, inputs, cells=cells, grad_value=grad_value)
        else:
            sums = torch.zeros(value.shape, dtype=accumulate)
            self.launch("b", levels, inputs, cells=cells, grad_value_sums=sums, **made)
            grad_value = sums.to(value.dtype)
        grad_reference = made["grad_reference"]
        if grad_reference is not None:
            dims = (2, 3) if reference.shape[2] == 1 else (2,)
            grad_reference = grad_reference.sum(dim=dims).view(reference.shape).to(reference.dtype)
        return [grad_value, made["grad_places"], made["grad_weights"], grad_reference]

    def launch(self, kernel: str, levels, inputs: dict[str, torch.Tensor | None], cells: int = 0, **made) -> None:
        value, weights, reference = inputs["value"], inputs["weights"], inputs["reference"]
        sizes = dict(zip("BSHD", value.shape, strict=True), N=weights.shape[1], K=weights.shape[3], cells=cells)
        sizes["fused"] = reference is not None
        sizes["reference_levels"], sizes["reference_size"] = reference.shape[2:] if reference is not None else (0, 0)
        tensors, kept = {}, []
        for name, tensor in (inputs | made).items():
            if tensor is None:
                continue
            access = INPUT if name not in made else SUMS if name == "grad_value_sums" else OUTPUT
            tensors[name], marks = _described(tensor.detach(), access)
            kept.append(marks)
        try:
            launches, reductions = self.emulation.launch(kernel, sizes, levels, tensors, self.backwards)
        except RuntimeError as error:
            raise EmulationError(str(error)) from None
        self.launches += launches
        self.reductions += reductions


def _levels(sizes: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    """(start, height, width, first point, points) of each level."""
    rows, first = [], 0
    for (height, width), start, count in zip(level_pairs(sizes), starts, counts, strict=True):
        rows.append((start, height, width, first, count))
        first += count
    return rows


def _poisoned(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    made = torch.empty(shape, dtype=like.dtype if dtype is None else dtype)
    made.view(-1).view(torch.uint8).fill_(0xFF)
    return made


def _described(tensor: torch.Tensor, access: int) -> tuple[tuple, torch.Tensor]:
    """A tensor for the emulation, and which bytes of its storage belong to it."""
    storage, width = tensor.untyped_storage(), tensor.element_size()
    marks = torch.zeros(storage.nbytes() + 1, dtype=torch.uint8)
    offset = tensor.storage_offset() * width
    strides = [stride * width for stride in tensor.stride()]
    marks.as_strided((*tensor.shape, width), (*strides, 1), offset).fill_(1)
    address = storage.data_ptr() or marks.data_ptr()
    dtype = DTYPES.index(tensor.dtype)
    return (address, storage.nbytes(), offset, marks.data_ptr(), tensor.stride(), dtype, access), marks


class _Call(torch.autograd.Function):
    INPUTS = ("value", "places", "weights", "reference", "value_mask")

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, levels, *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.kernels, ctx.levels = kernels, levels
        ctx.save_for_backward(*inputs)
        return kernels.forward(levels, dict(zip(_Call.INPUTS, inputs, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor):
        inputs = dict(zip(_Call.INPUTS, ctx.saved_tensors, strict=True))
        grads = ctx.kernels.backward(ctx.levels, inputs, grad_output, ctx.needs_input_grad[5])
        return None, None, *grads, None
