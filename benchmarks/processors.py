"""Limits of one multiprocessor (NVIDIA) or compute unit (AMD), which decide how many programs share it."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
GUIDE = "CUDA C++ Programming Guide, technical specifications per compute capability"


@dataclass(frozen=True)
class Processor:
    """Registers and shared memory of one multiprocessor; warps of `warp_size` lanes."""

    shared_bytes: int  # of all programs on it
    shared_bytes_of_program: int  # the most that one may ask for
    warps: int
    programs: int
    source: str
    warp_size: int = 32
    registers: int = 65536  # 32-bit, of all lanes
    registers_of_lane: int = 255
    register_step: int = 8  # registers of a lane are given out in steps of
    shared_reserved: int = KIB  # beside what a program asks for
    schedulers: int = 4

    def programs_at_once(self, registers: int, shared: int, num_warps: int) -> int:
        """How many programs fit, by registers of a lane, shared bytes and warps of each."""
        step = self.register_step
        by_lane = max(-(-registers // step) * step, step) * self.warp_size
        warps_by_registers = self.registers // self.schedulers // by_lane * self.schedulers
        by_shared = self.shared_bytes // (shared + self.shared_reserved) if shared or self.shared_reserved else None
        bounds = [self.programs, self.warps // num_warps, warps_by_registers // num_warps]
        return min(bounds if by_shared is None else [*bounds, by_shared])

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """Warps that run at once, of those that could."""
        return self.programs_at_once(registers, shared, num_warps) * num_warps / self.warps


PROCESSORS = {
    "sm80": Processor(164 * KIB, 163 * KIB, 64, 32, f"{GUIDE}, 8.0"),
    "sm86": Processor(100 * KIB, 99 * KIB, 48, 16, f"{GUIDE}, 8.6 (8.9: 24 programs)"),
    "sm90": Processor(228 * KIB, 227 * KIB, 64, 32, f"{GUIDE}, 9.0"),
    "sm100": Processor(228 * KIB, 227 * KIB, 64, 32, f"{GUIDE}, 10.0"),
    "sm120": Processor(100 * KIB, 99 * KIB, 48, 24, f"{GUIDE}, 12.0"),
    "gfx942": Processor(
        64 * KIB, 64 * KIB, 32, 32, "AMD Instinct MI300 (CDNA 3) instruction set reference; LLVM AMDGPU backend guide",
        warp_size=64, registers=4 * 512 * 64, registers_of_lane=512, shared_reserved=0,
    ),
}  # fmt: skip
"""By the names of `route_kernels.triton.block_sizes.ARCHITECTURES`."""

TENSOR_MEMORY_COLUMNS = 512
"""Columns in a multiprocessor of sm100; `tcgen05.alloc` in the PTX instruction set reference."""
