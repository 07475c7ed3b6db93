"""Registers, spills and instructions of a compiled Triton kernel, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processors import PROCESSORS, TENSOR_MEMORY_COLUMNS

if TYPE_CHECKING:
    from .variants import Variant

TENSOR_CORE = re.compile(r"(U?[A-Z]*MMA\b)|v_mfma_|v_smfmac_|v_wmma_")
SPECIAL_FUNCTION = re.compile(r"MUFU\b|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
SPILL = re.compile(r"(LDL|STL)\b|scratch_(load|store)_")
ATOMIC = re.compile(r"(RED|REDG|ATOM|ATOMG)\b|(global|buffer|flat)_atomic_")
LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG)\b|(global|buffer|flat)_load_")
STORE = re.compile(r"(STG|UTMASTG)\b|(global|buffer|flat)_store_")

_SASS_LINE = re.compile(
    r"^\s*(?P<label>\.L\w+):"
    r"|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<operation>[A-Z][A-Za-z0-9_.]*)(?P<operands>[^;]*);"
)
_GCN_LINE = re.compile(
    r"^(?P<label>\.LBB\w+):|^\s+(?P<operation>(?:v|s|ds|global|buffer|flat|scratch)_\w+)(?P<operands>.*)$"
)
_JUMP_TARGET = re.compile(r"(\.L\w+)")


@dataclass(frozen=True)
class MachineCode:
    """Machine code of one kernel. Instructions by their full mnemonic, once each however often they run."""

    registers: int  # of a lane
    spilled_bytes: int  # of a lane, in local memory
    instructions: Counter[str]
    in_loops: Counter[str]  # between a jump backwards and its target

    def count(self, kind: re.Pattern[str]) -> int:
        return _count(kind, self.instructions)

    def count_in_loops(self, kind: re.Pattern[str]) -> int:
        return _count(kind, self.in_loops)

    def those(self, kind: re.Pattern[str]) -> dict[str, int]:
        """Each instruction of a kind and how often it is there, by name."""
        return {name: count for name, count in sorted(self.instructions.items()) if kind.match(name)}


def machine_code(compiled: Any) -> MachineCode:
    """Read a `triton.compile` result for any target; takes NVIDIA's tools from the Triton package."""
    if "hsaco" in compiled.asm:
        return _of_amd(compiled.asm["amdgcn"])
    return _of_nvidia(compiled.asm["cubin"])


def _of_nvidia(cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = nvidia_machine_code(file.name).values()
    return code


def nvidia_machine_code(cubin: str | Path) -> dict[str, MachineCode]:
    """Read every kernel of a cubin, by its symbol; takes NVIDIA's tools from the Triton package."""
    from triton import knobs

    usage = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
    sass = _output_of(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    texts = dict(re.findall(r"^//-+ \.text\.(\S+) +-+$(.*?)(?=^//---|\Z)", sass, re.MULTILINE | re.DOTALL))
    found = {}
    for symbol, resources in re.findall(r"^ *Function (\S+):\s+(REG:.*)$", usage, re.MULTILINE):
        used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
        spilled = used["STACK"] + used["LOCAL"]
        found[symbol] = MachineCode(used["REG"], spilled, *counted(_SASS_LINE, texts[symbol]))
    return found


def _of_amd(assembly: str) -> MachineCode:
    fields = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    registers, private, vector_spills, scalar_spills = (
        int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1]) for field in fields
    )
    # Scalar registers are spilled to lanes of a vector register, or to memory, which is then private.
    spilled = max(private, 4 * vector_spills, 4 * scalar_spills)
    return MachineCode(registers, spilled, *counted(_GCN_LINE, assembly))


def counted(line_pattern: re.Pattern[str], text: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions by mnemonic: all, and those in loops."""
    operations: list[str] = []
    starts: dict[str, int] = {}  # by label: the first instruction after it
    loops: list[range] = []
    for line in text.splitlines():
        found = line_pattern.search(line)
        if found is None:
            continue
        if found["label"]:
            starts[found["label"]] = len(operations)
            continue
        operations.append(found["operation"])
        jump = _JUMP_TARGET.search(found["operands"]) if _is_jump(found["operation"]) else None
        if jump and jump[1] in starts:  # a label that came before
            body = range(starts[jump[1]], len(operations))
            if not any(operations[place] in ("EXIT", "s_endpgm") for place in body):  # else the way back from a detour
                loops.append(body)
    inside = set().union(*loops)
    return Counter(operations), Counter(operations[place] for place in inside)


def _is_jump(operation: str) -> bool:
    return operation.startswith(("BRA", "s_cbranch", "s_branch"))


def _count(kind: re.Pattern[str], instructions: Counter[str]) -> int:
    return sum(number for operation, number in instructions.items() if kind.match(operation))


def tile_bytes(ttir: str) -> dict[str, int]:
    """Bytes of the tiles that a program loads and stores once, and in each turn of its loops: from Triton's own code.

    Masked lanes count; what the caches or registers keep is not known here.
    """
    found = Counter({"loaded_once": 0, "loaded_in_loops": 0, "stored_once": 0, "stored_in_loops": 0})
    for depth, line in _with_loop_depth(ttir.splitlines()):
        access = re.search(r"= tt\.(?P<load>load|descriptor_load)\b|\btt\.(store|descriptor_store|atomic_rmw)\b", line)
        if access is None:
            continue
        name = "loaded" if access["load"] else "stored"
        found[f"{name}_in_loops" if depth else f"{name}_once"] += _bytes_of(line)
    return dict(found)


def narrow_strides(ttir: str) -> list[str]:
    """Strides that a program multiplies in 32 bits, in Triton's own code: their products overflow in large tensors."""
    pattern = re.compile(r"\s*%\S+ = (?P<operation>[\w.]+) .*%(?P<stride>stride_\w+).*: (?P<type>[^:]*?)(?: loc\(|$)")
    found = []
    for line in ttir.splitlines():
        used = pattern.match(line)
        if used and used["operation"] != "arith.extsi" and "i64" not in used["type"]:
            found.append(used["stride"])
    return sorted(set(found))


def _with_loop_depth(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Each line with the number of loops around it; what else opens a brace is no loop."""
    blocks: list[bool] = []
    for line in lines:
        code = re.sub(r'loc\([^)]*\)+|"[^"]*"', "", line)
        is_loop = re.search(r"\b(scf\.for|scf\.while)\b", line) is not None
        for brace in re.findall(r"[{}]", code):
            if brace == "{":
                blocks.append(is_loop)
            elif blocks:
                blocks.pop()
        yield sum(blocks), line


def _bytes_of(line: str) -> int:
    """Bytes of a load's or store's tile, `tensor<64x32x!tt.ptr<bf16>>`, or of its single element, `!tt.ptr<f32>`."""
    tile = re.search(r"tensor<((?:\d+x)*)!tt\.ptr<[a-z]+(\d+)", line)
    if tile is None:
        single = re.search(r"!tt\.ptr<[a-z]+(\d+)", line)
        return 0 if single is None else -(-int(single[1]) // 8)
    elements = 1
    for size in re.findall(r"\d+", tile[1]):
        elements *= int(size)
    return elements * -(-int(tile[2]) // 8)


def _output_of(tool: str | Path, *options: str) -> str:
    return subprocess.run([str(tool), *options], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Row:
    """One kernel with the types and block sizes of one launch, compiled for one chip."""

    op: str
    direction: str
    variant: str
    chip: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int  # of a lane
    spilled_bytes: int  # of a lane
    spill_instructions: int
    shared_bytes: int  # of a program
    tensor_memory_columns: int  # of a program, sm100 only
    programs_at_once: int  # on a multiprocessor
    occupancy: float  # theoretical
    instructions: int
    instructions_in_loops: int
    tensor_core: int
    tensor_core_in_loops: int
    special_function: int
    special_function_in_loops: int
    loads: dict[str, int]  # by mnemonic: what reads device memory
    stores: dict[str, int]
    atomics: dict[str, int]
    tile_bytes: dict[str, int]  # loaded and stored by a program, once and in each turn of its loops
    entries: list[list[Any]]  # (kernel name, place) of the table's entries
    narrow_strides: Sequence[str] = ()  # multiplied in 32 bits
    known_spill: int = 0  # bytes of a lane that no block size was found to avoid: no fault

    def faults(self) -> list[str]:
        """Why it would be slow or could not be launched."""
        processor, found = PROCESSORS[self.chip], []
        if self.spilled_bytes > self.known_spill or (self.spill_instructions and not self.known_spill):
            found.append(f"{self.spilled_bytes} bytes of registers spilled, {self.spill_instructions} instructions")
        if self.shared_bytes > processor.shared_bytes_of_program:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {processor.shared_bytes_of_program}")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory, at most {TENSOR_MEMORY_COLUMNS}")
        if self.programs_at_once < 1:
            found.append("no program fits on a multiprocessor")
        if self.narrow_strides:
            found.append(f"multiplied in 32 bits: {', '.join(self.narrow_strides)}")
        return found


def row(variant: Variant) -> Row:
    """Compiles the variant, or takes it from Triton's cache, and reads what came of it."""
    compiled = variant.compile()
    code = machine_code(compiled)
    parameters = [parameter.name for parameter in variant.kernel.params]
    constants = {parameters[place[0]]: value for place, value in variant.constexprs.items() if len(place) == 1}
    metadata = compiled.metadata
    return Row(
        op=variant.op,
        direction=variant.direction,
        variant=variant.name,
        chip=variant.architecture,
        blocks={name: value for name, value in constants.items() if name.startswith(("BLOCK_", "HEADS_PER"))},
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        tile_bytes=tile_bytes(compiled.asm["ttir"]),
        entries=sorted(map(list, variant.entries)),
        narrow_strides=narrow_strides(compiled.asm["ttir"]),
        known_spill=variant.spilled_bytes,
        **counts(code, variant.architecture, metadata.shared, metadata.num_warps),
    )


def counts(code: MachineCode, chip: str, shared: int, num_warps: int) -> dict[str, Any]:
    """Columns of a row: counts of its machine code, and how many such programs a multiprocessor holds."""
    processor, occupied = PROCESSORS[chip], (code.registers, shared, num_warps)
    return {
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "spill_instructions": code.count(SPILL),
        "programs_at_once": processor.programs_at_once(*occupied),
        "occupancy": round(processor.occupancy(*occupied), 3),
        "instructions": sum(code.instructions.values()),
        "instructions_in_loops": sum(code.in_loops.values()),
        "tensor_core": code.count(TENSOR_CORE),
        "tensor_core_in_loops": code.count_in_loops(TENSOR_CORE),
        "special_function": code.count(SPECIAL_FUNCTION),
        "special_function_in_loops": code.count_in_loops(SPECIAL_FUNCTION),
        "loads": code.those(LOAD),
        "stores": code.those(STORE),
        "atomics": code.those(ATOMIC),
    }
