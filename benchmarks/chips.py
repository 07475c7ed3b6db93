"""Peak rates of GPUs, as their makers state them: dense, without sparsity, at the boost clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One GPU. Rates of a multiprocessor are for each clock; a multiply-add is two FLOP and one operation."""

    name: str
    processors: int  # streaming multiprocessors
    clock_hz: float  # the boost clock at which `processors` x lanes x 2 is the stated float32 rate
    memory_bytes_per_s: float
    half_flop_per_s: float  # bfloat16 and float16 matrix products, float32 sums
    tf32_flop_per_s: float
    lanes: int  # float32 operations of a multiprocessor a clock
    source: str
    special_functions: int = 16  # ex2, tanh, rcp, rsqrt, lg2 of a multiprocessor a clock
    l1_bytes: int = 128  # that a multiprocessor reads from its L1 cache a clock

    @property
    def operations_per_s(self) -> float:
        """float32 additions, multiplications, multiply-adds, comparisons."""
        return self.processors * self.lanes * self.clock_hz

    @property
    def special_functions_per_s(self) -> float:
        return self.processors * self.special_functions * self.clock_hz

    @property
    def l1_bytes_per_s(self) -> float:
        return self.processors * self.l1_bytes * self.clock_hz

    def matrix_flop_per_s(self, dtype: str) -> float:
        """FLOP/s of matrix products in "bfloat16", "float16", "tf32" or "float32" (lanes' multiply-adds, no TF32).

        Raises:
            KeyError: another dtype.
        """
        half, lanes = self.half_flop_per_s, 2 * self.operations_per_s
        return {"bfloat16": half, "float16": half, "tf32": self.tf32_flop_per_s, "float32": lanes}[dtype]


GUIDE = "special functions and L1: CUDA C++ Programming Guide, throughput of native arithmetic instructions"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "A100", 108, 1.41e9, 2.039e12, 312e12, 156e12, 64,
            f"NVIDIA A100 80GB SXM datasheet (2021) and A100 architecture whitepaper; {GUIDE}, 8.0",
        ),
        Chip(
            "H100", 132, 1.98e9, 3.35e12, 989.4e12, 494.7e12, 128,
            f"NVIDIA H100 SXM5 datasheet (2023) and H100 architecture whitepaper; {GUIDE}, 9.0",
        ),
        Chip(
            "H200", 132, 1.98e9, 4.8e12, 989.4e12, 494.7e12, 128,
            f"NVIDIA H200 SXM datasheet (2024): an H100 with other memory; {GUIDE}, 9.0",
        ),
        Chip(
            "B200", 148, 1.98e9, 8.0e12, 2250e12, 1125e12, 128,
            f"NVIDIA HGX B200 datasheet (2024), a GPU's eighth; float32 75 TFLOP/s; {GUIDE}, 10.0",
        ),
    )
}  # fmt: skip


def chip_of(device_name: str) -> Chip | None:
    """The chip of `torch.cuda.get_device_name()`, "NVIDIA H100 80GB HBM3"; None where its rates are not listed.

    PCIe boards and other parts of a family have lower rates than the SXM modules listed here.
    """
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((chip for name, chip in CHIPS.items() if name in device_name.replace("-", " ").split()), None)
