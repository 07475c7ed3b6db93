"""The host half of the CUDA kernels on the CPU: the public ops through cuda_op.cpp, its launches over emulated threads.

Its kernel arguments, workspaces, sorts and sums are those of a GPU; devices, streams and memory are not.
"""

import hashlib
import os
import shutil
import subprocess

import gpu_checks
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import route_kernels as rk
from benchmarks.cuda_machine_code import ROOT, build
from route_kernels import backends, cuda, native
from route_kernels.testing import (
    check_accuracy,
    map_tensors,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    named_tensors,
    sample_arguments,
)

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))

MAKE = {"ms_deform_attn": ms_deform_attn_arguments, "ms_deform_attn_fused": ms_deform_attn_fused_arguments}
SOURCES = ("tests/simt/cuda_op.cpp", "tests/simt/block.cpp", "csrc/ms_deform_attn/cuda_op.cpp")
FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-Wl,-Bsymbolic")
SMALL = dict(levels=((3, 4), (1, 1)), batch=2, queries=3, heads=2, channels=8, points=2)

each_op = pytest.mark.parametrize("op", cuda.OPS)
each_order = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["f64", "f32", "f16", "bf16"]
)


def compiled():
    """The library, compiled once for its content."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation with")
    torch_flags = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    libraries = [f"-l{name}" for name in ("torch_cpu", "torch", "c10")]
    command = [compiler, *FLAGS, *build().HOST_FLAGS, "-Itests/simt", *torch_flags, *SOURCES, *libraries]
    content = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in sorted([*(ROOT / "tests/simt").iterdir(), *(ROOT / "csrc").rglob("*.*")]):
        content.update(path.read_bytes())
    made = ROOT / "build" / "simt" / f"cuda_op-{content.hexdigest()[:24]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", unfinished], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(unfinished, made)
    return made


@pytest.fixture(scope="module")
def emulated():
    """torch.ops.route_kernels_emulated: the CUDA library's ops, with its schemas, for CPU tensors."""
    schemas = torch.library.Library("route_kernels_emulated", "DEF")
    for op in cuda.OPS:
        for direction in ("forward", "backward"):
            packet = getattr(torch.ops.route_kernels_native, f"{op}_{direction}")
            schemas.define(str(packet.default._schema).partition("::")[2])
    torch.ops.load_library(compiled())
    yield torch.ops.route_kernels_emulated
    schemas._destroy()


@pytest.fixture(autouse=True)
def as_cuda(emulated, monkeypatch):
    """The public ops take the CUDA library's way for CPU tensors."""
    monkeypatch.setattr(backends, "kernel", lambda op, direction, backend: getattr(emulated, f"{op}_{direction}"))


@pytest.fixture
def mode(deterministic):
    torch.use_deterministic_algorithms(deterministic)  # and what is empty is filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


@each_op
@each_dtype
@each_order
def test_as_accurate_as_eager_for_every_kind_of_argument(op, dtype, deterministic, mode):
    for arguments in sample_arguments(op, dtype, queries=4, batch=2).values():
        check_accuracy(op, arguments)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("reference_levels", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@each_order
def test_references_of_every_shape(coordinates, reference_levels, masked, deterministic, mode):
    sizes = SMALL | dict(coordinates=coordinates, reference_levels=reference_levels, masked=masked)
    check_accuracy("ms_deform_attn_fused", ms_deform_attn_fused_arguments(dtype=torch.bfloat16, **sizes))
    check_accuracy("ms_deform_attn_fused", ms_deform_attn_fused_arguments(dtype=torch.float32, **sizes))


EMPTY = [
    dict(batch=0),
    dict(queries=0),
    dict(points=0),
    dict(channels=0),
    dict(levels=((0, 3), (2, 0))),
    dict(levels=()),
]


@pytest.mark.parametrize("empty", EMPTY, ids=str)
@each_order
def test_empty_dimensions_give_zeros(empty, deterministic, mode):
    for op, make in MAKE.items():
        results = gpu_checks.results_of(getattr(rk, op), make(**SMALL | empty))
        assert len(results) >= 4 and [name for name, tensor in results.items() if (tensor != 0).any()] == []


@each_op
@each_order
def test_views(op, deterministic, mode):
    """Projections hand tensors over as rows of a wider one."""

    def of_a_wider_one(tensor):
        wider = torch.cat([tensor.detach(), torch.full_like(tensor.detach(), float("nan"))], dim=1)
        return wider[:, : tensor.shape[1]].requires_grad_(tensor.requires_grad)

    arguments = sample_arguments(op, torch.float32, queries=4, batch=2)
    for whole in arguments.values():
        viewed = map_tensors(whole, lambda x: of_a_wider_one(x) if x.is_floating_point() else x)
        assert not all(tensor.is_contiguous() for _, tensor in named_tensors(viewed))
        check_accuracy(op, viewed)


@each_op
def test_deterministic_sums_are_the_same_every_time(op):
    arguments = next(iter(sample_arguments(op, torch.bfloat16, queries=20, batch=1).values()))
    gpu_checks.check_deterministic_mode(op, getattr(rk, op), arguments)


@pytest.mark.parametrize("channels, levels, points, what", [
    (1, 33, 1, "32 levels, got 33"), (1, 1, 4097, "4096 points of a query and head, got 4097"),
])  # fmt: skip
def test_what_the_kernels_do_not_take_is_refused_before_a_launch(channels, levels, points, what):
    arguments = ms_deform_attn_arguments(
        levels=((1, 1),) * levels, batch=1, heads=1, queries=1, channels=channels, points=points
    )
    with pytest.raises(RuntimeError, match=f"the CUDA kernel takes at most {what}"):
        rk.ms_deform_attn(**arguments)
