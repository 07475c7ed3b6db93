"""Which backend runs, and that an explicit request never falls back."""

import re
import shutil
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import route_kernels as rk
from route_kernels import backends, native
from route_kernels.backends import BACKENDS, OPS
from route_kernels.testing import call, named_tensors, sample_arguments

needs_native = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
FIRST_SAMPLES = [(op, next(iter(sample_arguments(op)))) for op in OPS]
MISSING = ["cuda"]


def runs_native(op, arguments):
    """Whether the call goes through the registered torch op."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(op, arguments)
    return any(event.name.startswith("route_kernels_native::") for event in profile.events())


@needs_native
@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_the_fastest_runs_unless_another_is_asked_for(op, label):
    arguments = sample_arguments(op)[label]
    assert runs_native(op, arguments)
    with rk.backend("cpu"):
        assert runs_native(op, arguments)
        with rk.backend("reference"):
            assert not runs_native(op, arguments)
        assert rk.requested_backend() == "cpu"
        with rk.backend(None):
            assert rk.requested_backend() is None and runs_native(op, arguments)
    assert rk.requested_backend() is None


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
@pytest.mark.parametrize("backend", MISSING)
def test_a_request_that_cannot_run_raises_with_the_reason(op, label, backend):
    arguments = sample_arguments(op)[label]
    reason = re.escape(rk.can_run(op, backend, *(tensor for _, tensor in named_tensors(arguments)))[1])
    message = f"^{op}: backend '{backend}' was requested but cannot run: {reason}$"
    with rk.backend(backend), pytest.raises(rk.BackendUnavailableError, match=message):
        call(op, arguments)
    call(op, arguments)


@pytest.mark.parametrize("backend", MISSING)
def test_a_request_reaches_every_mode_of_an_op(backend):
    with rk.backend(backend), pytest.raises(rk.BackendUnavailableError):
        rk.query_similarity(torch.randn(1, 3, 2), "mean")


def test_set_backend_lasts_until_the_next_request():
    try:
        rk.set_backend("reference")
        assert rk.requested_backend() == "reference"
        with rk.backend("cpu"):
            assert rk.requested_backend() == "cpu"
        assert rk.requested_backend() == "reference"
        rk.set_backend("cuda")
        with pytest.raises(rk.BackendUnavailableError):
            rk.query_similarity(torch.randn(1, 3, 2))
    finally:
        rk.set_backend(None)
    assert rk.requested_backend() is None


def in_a_thread(function):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def test_blocks_of_two_threads_do_not_meet():
    inside, left = threading.Barrier(2, timeout=10), threading.Event()
    seen = {}

    def first():
        with rk.backend("reference"):
            inside.wait()
            seen["first"] = rk.requested_backend()
        left.set()

    def second():
        with rk.backend("cpu"):
            inside.wait()
            left.wait(10)
            seen["second"] = rk.requested_backend()

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(first), threads.submit(second)]:
            future.result()
    assert seen == {"first": "reference", "second": "cpu"} and rk.requested_backend() is None


def test_blocks_may_end_in_any_order():
    """Tasks of asyncio and generators share a thread."""
    first, second, third = (rk.backend(name) for name in ("reference", "cpu", None))
    for block in (first, second, third):
        block.__enter__()
    seen = []
    for block in (first, third, second):
        block.__exit__(None, None, None)
        seen.append(rk.requested_backend())
    assert seen == [None, "cpu", None]
    try:
        rk.set_backend("reference")
        assert rk.requested_backend() == "reference"
    finally:
        rk.set_backend(None)


def test_threads_without_a_block_see_the_request_for_the_process():
    try:
        with rk.backend("cpu"), backends.assumed("cuda"):
            rk.set_backend("reference")
            assert in_a_thread(rk.requested_backend) == "reference"
            assert in_a_thread(lambda: backends.choose("query_similarity", torch.empty(1, 2, 3))) == "reference"
            assert rk.requested_backend() == "cpu"
            with rk.backend(None):
                assert rk.requested_backend() is None
        assert rk.requested_backend() == "reference"
    finally:
        rk.set_backend(None)


@needs_native
def test_what_is_computed_again_runs_on_the_backend_of_its_first_run():
    arguments = sample_arguments("routed_attention")["routed"]
    with rk.backend("reference"):
        output = rk.recomputed(lambda query: rk.routed_attention(**{**arguments, "query": query}), arguments["query"])
        expected = torch.autograd.grad(rk.routed_attention(**arguments).sum(), arguments["query"])
    found = in_a_thread(lambda: torch.autograd.grad(output.sum(), arguments["query"]))
    assert torch.equal(found[0], expected[0])


def test_an_exception_ends_the_request():
    with pytest.raises(KeyError), rk.backend("reference"):
        raise KeyError
    assert rk.requested_backend() is None


@pytest.mark.parametrize("name", ["gpu", "", "Reference", 3])
def test_unknown_backends(name):
    message = f"backend: expected one of reference, eager, cpu, triton, cuda or None, got {name!r}"
    with pytest.raises(ValueError, match=message):
        rk.set_backend(name)
    with pytest.raises(ValueError, match=message), rk.backend(name):
        pass
    with pytest.raises(ValueError, match=message):
        rk.can_run("routed_attention", name)


def test_unknown_ops():
    message = "op: expected one of add_layer_norm, .*, routed_attention, sigmoid_focal_loss, got 'attention'"
    with pytest.raises(ValueError, match=message):
        rk.available_backends("attention")
    with pytest.raises(ValueError, match=message):
        rk.can_run("attention", "cpu")


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_available_backends_says_what_runs_and_why_not(op, label):
    for inputs in ((), tuple(sample_arguments(op)[label].values())):
        available = rk.available_backends(op, *inputs)
        assert tuple(available) == BACKENDS
        assert available["reference"] == (True, "plain PyTorch")
        assert available["eager"] == (True, "PyTorch's own operators, as its users write the op")
        assert available["cpu"] == (
            (True, "native C++ kernel") if native.load_error is None else (False, native.load_error)
        )
        tensors = [tensor for _, tensor in named_tensors(sample_arguments(op)[label])] if inputs else []
        for name in MISSING:
            assert available[name] == rk.can_run(op, name, *tensors)
    for name, (runs, _) in available.items():
        with rk.backend(name):
            if runs:
                call(op, sample_arguments(op)[label])
            else:
                with pytest.raises(rk.BackendUnavailableError):
                    call(op, sample_arguments(op)[label])


@needs_native
@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_the_cpu_kernel_says_what_it_does_not_take(op, label):
    arguments = sample_arguments(op)[label]
    _, first = next(named_tensors(arguments))
    elsewhere = first.detach().to("meta")
    runs, reason = rk.can_run(op, "cpu", elsewhere)
    assert not runs and reason == "the cpu kernel takes CPU tensors, got one on meta"
    runs, reason = rk.can_run(op, "cpu", first.detach().to(torch.float8_e4m3fn))
    assert not runs and "got torch.float8_e4m3fn" in reason


@needs_native
def test_backward_stays_on_the_backend_of_forward():
    arguments = sample_arguments("routed_attention")["routed"]
    with rk.backend("cpu"):
        output = rk.routed_attention(**arguments)
    with (
        rk.backend("reference"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        output.sum().backward()
    assert any(event.name == "route_kernels_native::routed_attention_backward" for event in profile.events())


@needs_native
@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_four_functions_of_ours_stand_between_a_call_and_its_kernel(op, label, monkeypatch):
    """The public op, the op's rule for autograd, its Function and its kernel; what they call in passing is no hop."""
    folder, stacks = Path(rk.__file__).parent, []
    monkeypatch.setattr(backends, "kernel", lambda *_: lambda *inputs: stacks.append(traceback.extract_stack()[:-1]))
    call(op, sample_arguments(op)[label])
    (stack,) = stacks
    files = [Path(frame.filename).relative_to(folder) for frame in stack if folder in Path(frame.filename).parents]
    hops = [file for file in files if file.parts[0] == "ops"]
    assert 2 <= len(hops) <= 4, hops


# ---- without the native library ------------------------------------------------------------------------------------

WITHOUT_KERNELS = """
import torch
import route_kernels as rk
from route_kernels import backends, native
from route_kernels.backends import OPS
from route_kernels.testing import check_accuracy, call, sample_arguments

torch.set_num_threads(1)
assert native.load_error is not None and native.simd_level() is None
for op in OPS:
    for arguments in sample_arguments(op).values():
        check_accuracy(op, arguments)
    assert rk.available_backends(op)["cpu"] == (False, native.load_error)
    try:
        with rk.backend("cpu"):
            call(op, arguments)
        raise AssertionError("cpu ran")
    except rk.BackendUnavailableError as error:
        assert str(error) == f"{op}: backend 'cpu' was requested but cannot run: {native.load_error}"
print(native.load_error)
"""


def copied_package(folder: Path) -> Path:
    """The package without its kernels, as an installation without a compiler leaves it."""
    package = Path(rk.__file__).parent
    shutil.copytree(package, folder / "route_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def without_kernels(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_without_the_library_the_reference_runs_and_says_why(tmp_path):
    finished = without_kernels(copied_package(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "the native library was not built" in finished.stdout and "pip install" in finished.stdout


def test_a_broken_library_is_a_reason_and_not_a_crash(tmp_path):
    folder = copied_package(tmp_path)
    (folder / "route_kernels" / native.LIBRARY.name).write_bytes(b"not a shared object")
    finished = without_kernels(folder)
    assert finished.returncode == 0, finished.stderr
    assert "the native library could not be loaded" in finished.stdout


def test_import_prints_nothing_and_loads_no_compiler():
    code = (
        "import sys, route_kernels; print([m for m in ('triton', 'setuptools', 'torch._inductor') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert (finished.returncode, finished.stderr) == (0, "")
    before = subprocess.run(
        [sys.executable, "-c", code.replace("route_kernels", "torch")], capture_output=True, text=True, timeout=300
    )
    assert finished.stdout == before.stdout
