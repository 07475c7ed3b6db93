"""Machine code of the CUDA kernels as nvcc compiles them, and decisions of the build. Needs no GPU."""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import product

import pytest
import torch
from setuptools.errors import PlatformError

from benchmarks import cuda_machine_code, static_report
from benchmarks.cuda_machine_code import ROOT, build, kernels
from benchmarks.machine_code import SPILL
from route_kernels import native

needs_nvcc = pytest.mark.skipif(build().nvcc() is None, reason="no nvcc (on PATH, in CUDA_HOME or in /usr/local/cuda)")
CHIPS = ("sm80", "sm90", "sm100")
QUICK = [("bfloat16", "sm90")]
SLOW = [pair for pair in product(build().STORAGE_TYPES, CHIPS) if pair not in QUICK]
each_compiled = pytest.mark.parametrize(
    "storage, chip", [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
VECTOR = {"float64": 2, "float32": 4, "float16": 8, "bfloat16": 8}  # values of 16 bytes


# ---- machine code --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """The kernels of a storage type on a chip."""
    pytest.importorskip("triton", reason="the tools that read machine code are in Triton's package")
    return cache(lambda storage, chip: list(kernels(storage, chip)))


def of(found, name):
    return [kernel for kernel in found if kernel.name == name]


@needs_nvcc
@each_compiled
def test_every_kernel_compiles_without_spills_or_local_memory(compiled, storage, chip):
    found = compiled(storage, chip)
    assert {kernel.name for kernel in found} == {"deform_forward", "deform_backward", "deform_gather"}
    faults = {str(kernel): kernel.code.spilled_bytes for kernel in found if kernel.code.spilled_bytes}
    assert not faults, f"bytes of local memory of a thread: {faults}"
    assert not any(kernel.code.count(SPILL) for kernel in found)


@needs_nvcc
@each_compiled
def test_there_is_a_kernel_for_rows_of_every_width_up_to_256_channels(compiled, storage, chip):
    for name in ("deform_forward", "deform_backward"):
        arguments = [kernel.arguments for kernel in of(compiled(storage, chip), name)]
        widths = sorted(vector * lanes * vectors for vector, lanes, vectors in arguments if vector > 1)
        assert widths == [8 * 2**i for i in range(6)], name
        assert [lanes for vector, lanes, _ in arguments if vector == 1] == [32], "one for any other row"


@needs_nvcc
@each_compiled
def test_rows_are_read_by_16_bytes(compiled, storage, chip):
    for kernel in compiled(storage, chip):
        wide = matching(kernel.code.instructions, r"LDG\.E\.(?:\w+\.)*128\b")
        if kernel.arguments[0] == VECTOR[storage]:
            vectors = 1 if kernel.name == "deform_gather" else kernel.arguments[2]
            assert wide >= 4 * vectors, f"{kernel}: {wide} loads of 16 bytes, 4 corners have {4 * vectors}"
        else:
            assert kernel.arguments[0] == 1, "16 bytes or one value, nothing between"


@needs_nvcc
@each_compiled
def test_sums_by_vector_reductions_from_hopper_on(compiled, storage, chip):
    for kernel in of(compiled(storage, chip), "deform_backward"):
        found = {name: count for name, count in kernel.code.instructions.items() if re.match("(RED|ATOM)", name)}
        vectors = matching(found, r"REDG?\.E\.ADD\.F32x4\b")
        wide = chip != "sm80" and storage != "float64" and kernel.arguments[0] > 1
        assert found and not matching(found, "ATOM"), f"{kernel}: {found}"  # ATOM: whose result is waited for
        assert (vectors > 0) == wide, f"{kernel}: {found}"


@needs_nvcc
@each_compiled
def test_neither_forward_nor_the_sums_in_order_use_atomics(compiled, storage, chip):
    for name in ("deform_forward", "deform_gather"):
        for kernel in of(compiled(storage, chip), name):
            assert not matching(kernel.code.instructions, "RED|ATOM"), kernel


def test_the_static_report_knows_the_size_of_a_block():
    sources = "".join((ROOT / path).read_text() for path in build().sources("*.cuh"))
    found = {name: int(threads) // 32 for name, threads in re.findall(r"constexpr int (\w*THREADS) = (\d+);", sources)}
    expected = {"deform_forward": "THREADS", "deform_backward": "BACKWARD_THREADS", "deform_gather": "THREADS"}
    assert {name: found[constant] for name, constant in expected.items()} == cuda_machine_code.WARPS


@needs_nvcc
def test_the_static_report_has_them(compiled):
    (row,) = (
        row
        for row in cuda_machine_code.rows(["sm90", "gfx942"], "deform_forward", few=True)
        if row.blocks == {"VEC": 8, "LANES": 4, "VECTORS": 1}
    )
    assert (row.op, row.direction, row.chip) == ("ms_deform_attn", "forward", "sm90")
    assert row.variant == "cuda deform_forward bfloat16" and not row.faults()
    assert row.registers > 0 and row.loads["LDG.E.128.CONSTANT"] >= 4 and row.programs_at_once >= 2
    assert row.variant in list(static_report.table([row]))[1]


def test_without_nvcc_the_static_report_says_what_it_leaves_out(monkeypatch, capsys):
    monkeypatch.setattr(build(), "nvcc", lambda: None)
    assert list(cuda_machine_code.rows(["sm90"])) == []
    assert capsys.readouterr().err == "no CUDA kernels in this report: there is no nvcc\n"


def matching(instructions, pattern):
    return sum(count for name, count in Counter(instructions).items() if re.match(pattern, name))


# ---- the library ---------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from route_kernels import native
assert native.load_error is None, native.load_error
torch.ops.load_library(sys.argv[1])
kernels = torch.ops.route_kernels_native
print(kernels.cuda_build())
assert kernels.cuda_driver() >= 0
for name in ("ms_deform_attn", "ms_deform_attn_fused"):
    for direction in ("forward", "backward"):
        for device in ("CPU", "CUDA"):
            op = f"route_kernels_native::{name}_{direction}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, device), (op, device)
"""


@needs_nvcc
@pytest.mark.parametrize("source", ["csrc/registration_cuda.cpp", *build().sources("cuda_op.cpp")])
def test_host_code_compiles_for_the_oldest_pytorch_without_a_warning(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    objects = build().cuda_objects([("compute_90", "sm_90")], [f"-I{path}" for path in include_paths()])
    (command,) = (command for _, name, command in objects if name == source)
    command = [*command, source, "-Xcompiler=-Werror=all,-fsyntax-only", "-c", "-o", tmp_path / "object"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "error" not in done.stderr, done.stderr
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in command


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
def test_the_library_builds_and_loads_without_a_gpu(tmp_path):
    """With a PyTorch without CUDA too: its one symbol of CUDA is weak."""
    environment = {**os.environ, "ROUTE_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    folders = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    library = tmp_path / "lib" / "route_kernels" / "_C_cuda.abi3.so"
    loaded = subprocess.run([sys.executable, "-c", LOAD, library], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert re.fullmatch(r"sm_90, nvcc \d+\.\d+\n", loaded.stdout)


# ---- what is built -------------------------------------------------------------------------------------------------

KNOWN = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    "listed, capabilities, known, expected",
    [
        ("8.0;9.0a", [], KNOWN, "compute_80/sm_80 compute_90a/sm_90a"),
        ("8.0 9.0+PTX", [(8, 6)], KNOWN, "compute_80/sm_80 compute_90/sm_90 compute_90/compute_90"),
        ("9.0, 10.0f,9.0", [], KNOWN, "compute_90/sm_90 compute_100f/sm_100f"),
        ("7.5;8.0", [], KNOWN, "compute_80/sm_80"),  # the kernels need 8.0
        (None, [(9, 0), (8, 6), (9, 0)], KNOWN, "compute_86/sm_86 compute_90/sm_90 compute_90/compute_90"),
        ("", [(10, 0)], KNOWN, "compute_100/sm_100 compute_100/compute_100"),
        (None, [], KNOWN, "compute_80/sm_80 compute_90/sm_90 compute_100/sm_100 compute_100/compute_100"),
        (None, [], KNOWN[:4], "compute_80/sm_80 compute_90/sm_90"),  # an nvcc before sm_100
    ],
)
def test_architectures(listed, capabilities, known, expected):
    assert " ".join(map("/".join, build().architectures(listed, capabilities, known))) == expected


@pytest.mark.parametrize("listed", ["Hopper", "sm_90", "9", "9.0b"])
def test_a_list_of_architectures_that_is_none(listed):
    with pytest.raises(PlatformError, match=f"expected a list like '8.0;9.0a 10.0.PTX', got '{listed}'"):
        build().architectures(listed, [], KNOWN)


def test_only_architectures_that_the_kernels_do_not_run_on():
    with pytest.raises(PlatformError, match=r"the CUDA kernels need compute capability 8\.0, got '7\.5'"):
        build().architectures("7.5", [], KNOWN)


@pytest.fixture
def machine(monkeypatch):
    """With this PyTorch and this nvcc."""

    def present(wanted, cuda, nvcc):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(build(), "nvcc", lambda: nvcc)
        monkeypatch.setenv("ROUTE_KERNELS_CUDA", wanted)

    return present


@pytest.mark.parametrize(
    "wanted, cuda, nvcc, reason",
    [
        ("", "12.8", "/cuda/bin/nvcc", None),
        ("1", None, "/cuda/bin/nvcc", None),
        ("0", "12.8", "/cuda/bin/nvcc", "ROUTE_KERNELS_CUDA=0"),
        ("", None, "/cuda/bin/nvcc", f"PyTorch {torch.__version__} has no CUDA"),
        ("", "12.8", None, "no nvcc (on PATH, in CUDA_HOME or in /usr/local/cuda)"),
    ],
)
def test_cuda_kernels_are_built_or_skipped_for_one_reason(machine, wanted, cuda, nvcc, reason):
    machine(wanted, cuda, nvcc)
    assert build().why_no_cuda(None) == reason


@pytest.mark.parametrize(
    "wanted, nvcc, obstacle, message",
    [
        ("1", None, None, "ROUTE_KERNELS_CUDA=1, but the CUDA kernels cannot be compiled: no nvcc"),
        ("1", "/cuda/bin/nvcc", "no working C.. compiler", "cannot be compiled: no working C.. compiler"),
        ("yes", "/cuda/bin/nvcc", None, "ROUTE_KERNELS_CUDA: expected 0 or 1, got 'yes'"),
    ],
)
def test_cuda_kernels_that_are_asked_for_are_built_or_an_error(machine, wanted, nvcc, obstacle, message):
    machine(wanted, None, nvcc)
    with pytest.raises(PlatformError, match=message):
        build().why_no_cuda(obstacle)


def test_nvcc_is_the_one_of_cuda_home(monkeypatch, tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build().nvcc() == str(compiler)
    compiler.unlink()
    assert build().nvcc() is None, "what is named and not there is not replaced by another"
