"""What a compiled Triton kernel is made of: registers, spills, and its instructions, read from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Of one kernel. Instructions by their full mnemonic, once each however often they run."""

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
    """Of a `triton.compile` result for any target; takes NVIDIA's tools from the Triton package."""
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
    """Of every kernel of a cubin, by its symbol; takes NVIDIA's tools from the Triton package."""
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
    """Of the tile in a load's or store's type, `tensor<64x32x!tt.ptr<bf16>>`, or a single element, `!tt.ptr<f32>`."""
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
