"""Whether the CUDA kernels can run, and every reason why not; without a GPU, or as if there were one."""

import re
import types

import pytest
import torch

import route_kernels as rk
from route_kernels import backends, cli, cuda, native
from route_kernels.backends import OPS
from route_kernels.testing import call, sample_arguments

OTHERS = [op for op in OPS if op not in cuda.OPS]
BUILT = "sm_80 sm_90 compute_90, nvcc 12.8"


def tensor(device="cuda", dtype=torch.float32):
    """The attributes that a backend asks of a tensor before it takes it; needs no GPU."""
    is_floating = torch.empty(0, dtype=dtype).is_floating_point
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype, is_floating_point=is_floating)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the CUDA kernels are built and loaded, and that this GPU is here."""

    def present(capability=(9, 0), built=BUILT, driver=(13, 0), available=True):
        monkeypatch.setattr(native, "cuda_load_error", None)
        monkeypatch.setattr(native, "cuda_build", lambda: built)
        monkeypatch.setattr(native, "cuda_driver", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        cuda._known_obstacle.cache_clear()

    yield present
    cuda._known_obstacle.cache_clear()


@pytest.mark.parametrize("op", OTHERS)
def test_the_other_ops_have_no_cuda_kernel(op):
    assert rk.can_run(op, "cuda") == (False, f"this version has no cuda kernel for {op}")


@pytest.mark.parametrize("op", cuda.OPS)
def test_a_library_that_is_not_there_is_the_reason(op, monkeypatch):
    monkeypatch.setattr(native, "cuda_load_error", "this build has no CUDA kernels")
    assert rk.can_run(op, "cuda") == (False, "this build has no CUDA kernels")
    arguments = next(iter(sample_arguments(op).values()))
    message = f"^{op}: backend 'cuda' was requested but cannot run: this build has no CUDA kernels$"
    with rk.backend("cuda"), pytest.raises(rk.BackendUnavailableError, match=message):
        call(op, arguments)


@pytest.mark.parametrize(
    "version, cpu_error, reason",
    [
        (None, None, "PyTorch .* has no CUDA$"),
        ("12.8", "the native library was not built", "the native library was not built$"),
        (
            "12.8",
            None,
            "this build has no CUDA kernels .no nvcc, or a PyTorch without CUDA, at",
        ),
    ],
)
def test_why_the_library_was_not_loaded(monkeypatch, tmp_path, version, cpu_error, reason):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(native, "load_error", cpu_error)
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_C_cuda.abi3.so")
    assert re.match(reason, native._load_cuda())


def test_a_broken_library_is_a_reason_and_not_a_crash(monkeypatch, tmp_path):
    library = tmp_path / "_C_cuda.abi3.so"
    library.write_bytes(b"not a shared object")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(native, "load_error", None)
    monkeypatch.setattr(native, "CUDA_LIBRARY", library)
    assert native._load_cuda().startswith("the CUDA library could not be loaded: ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_that_it_was_built_for_the_cuda_kernel_is_the_fastest(gpu, dtype):
    gpu()
    for op in cuda.OPS:
        assert rk.can_run(op, "cuda", tensor(dtype=dtype)) == (True, f"CUDA kernel, {BUILT}")
    assert rk.backends._FASTEST_FIRST["cuda"] == ("cuda", "triton", "reference")


@pytest.mark.parametrize(
    "given, reason",
    [
        (tensor("cpu"), "the cuda kernel takes CUDA tensors, got one on cpu"),
        (tensor("meta"), "the cuda kernel takes CUDA tensors, got one on meta"),
        (tensor(dtype=torch.float8_e4m3fn),
         "the cuda kernel takes float16, bfloat16, float32 and float64, got torch.float8_e4m3fn"),
    ],
    ids=["cpu", "meta", "float8"],
)  # fmt: skip
def test_what_the_kernel_does_not_take(gpu, given, reason):
    gpu()
    assert cuda.can_run("ms_deform_attn", tensor(), given) == (False, reason)
    assert cuda.can_run("ms_deform_attn", tensor(), tensor(dtype=torch.bool))[0]


@pytest.mark.parametrize(
    "there, reason",
    [
        (dict(available=False), "the cuda kernels take CUDA tensors, and PyTorch finds no GPU here"),
        (dict(capability=(7, 5)), "the cuda kernels need compute capability 8.0 or newer, this GPU has 7.5"),
        (dict(capability=(8, 9), built="sm_90, nvcc 12.8"),
         "the cuda kernels were built for sm_90, this GPU has compute capability 8.9; set TORCH_CUDA_ARCH_LIST=8.9 and "
         "install again"),
        (dict(driver=(12, 4), built="sm_90, nvcc 13.0"),
         "the cuda kernels were built by nvcc 13.0, this GPU's driver runs CUDA 12.4; update the driver, or install "
         "again with a CUDA toolkit that is not newer"),
    ],
)  # fmt: skip
def test_what_a_gpu_may_lack(gpu, there, reason):
    gpu(**there)
    assert rk.can_run("ms_deform_attn", "cuda") == (False, reason)
    assert rk.can_run("ms_deform_attn_fused", "cuda", tensor()) == (False, reason)


@pytest.mark.parametrize(
    "targets, runs, does_not",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_80", [(8, 0), (8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("sm_80 sm_90 compute_90", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0)]),
    ],
)  # fmt: skip
def test_which_gpus_a_build_has_code_for(targets, runs, does_not):
    assert [capability for capability in runs if not cuda.has_code_for(capability, targets.split())] == []
    assert [capability for capability in does_not if cuda.has_code_for(capability, targets.split())] == []


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("op", cuda.OPS)
def test_backward_asks_for_pytorchs_determinism(op, deterministic, monkeypatch):
    asked = []
    run = {"forward": lambda *inputs: None, "backward": lambda *inputs: asked.append(inputs[-2])}
    monkeypatch.setattr(backends, "kernel", lambda op, direction, backend: run[direction])
    torch.use_deterministic_algorithms(deterministic)
    try:
        call(op, next(iter(sample_arguments(op).values()))).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [deterministic]


def test_info_tells_what_the_kernels_were_built_for(gpu):
    gpu()
    assert f"CUDA kernels    loaded, built for {BUILT}" in list(cli.info())


def test_info_tells_why_there_are_none(monkeypatch):
    monkeypatch.setattr(native, "cuda_load_error", "this build has no CUDA kernels")
    lines = list(cli.info())
    assert "CUDA kernels    none: this build has no CUDA kernels" in lines
    assert "cuda       this build has no CUDA kernels (ms_deform_attn, ms_deform_attn_fused)" in lines
    assert f"cuda       this version has no cuda kernel ({', '.join(OTHERS)})" in lines
