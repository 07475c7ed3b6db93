"""The build that setup.py describes, by ninja with a compiler that only preprocesses: that takes seconds."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.cuda_machine_code import ROOT, build

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(build().NINJA is None, reason="no ninja"),
]
LEVELS = len(build().SIMD_LEVELS)
PREPROCESSOR = """#!/bin/sh
case "$*" in
    *-shared*) for made; do [ "$last" = -o ] && touch "$made"; last=$made; done ;;
    *) exec g++ "$@" -E ;;
esac
"""


def setup(folder, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", "made", "--build-lib", "libraries"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "ROUTE_KERNELS_CUDA": "0", **environment},
    )  # fmt: skip


def would_run(folder):
    """The files that a second build would make."""
    command = [build().NINJA, "-n", "-v", "-d", "explain", "-f", "made/build.ninja"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return sorted(re.findall(r"-o made/(\S+)", done.stdout))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, built."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "route_kernels").mkdir()
    (folder / "route_kernels" / "__init__.py").touch()
    compiler = folder / "preprocessor"
    compiler.write_text(PREPROCESSOR)
    compiler.chmod(0o755)
    done = setup(folder, CXX=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "route-kernels: CUDA kernels skipped: ROUTE_KERNELS_CUDA=0" in done.stderr
    assert [path.name for path in (folder / "libraries/route_kernels").iterdir()] == ["_C.abi3.so"]
    return folder


@pytest.mark.parametrize(
    "changed, levels, once",
    [
        ("csrc/routed_attention/tiles.h", ["routed_attention/cpu.cpp"], []),
        ("csrc/common/gemm.h", ["query_similarity/cpu.cpp", "routed_attention/cpu.cpp"], []),
        ("csrc/sigmoid_focal_loss/args.h", ["sigmoid_focal_loss/cpu.cpp"], ["sigmoid_focal_loss/op.cpp"]),
        ("csrc/registration.cpp", [], ["registration.cpp"]),
        ("csrc/ms_deform_attn/points.cuh", None, None),
    ],
)
def test_a_change_of_one_file_builds_what_includes_it_and_nothing_else(checkout, changed, levels, once):
    assert would_run(checkout) == []
    before = (checkout / changed).stat()
    os.utime(checkout / changed)
    names = would_run(checkout)
    os.utime(checkout / changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    if levels is None:
        assert names == [], "not of this library"
        return
    expected = [f"{level}/csrc/{name}.o" for level in build().SIMD_LEVELS for name in levels]
    assert names == sorted([*expected, *(f"once/csrc/{name}.o" for name in once), "route_kernels._C"])


def test_a_new_op_needs_no_edit(checkout):
    folder = checkout / "csrc" / "new_op"
    folder.mkdir()
    for name in ("cpu.cpp", "op.cpp"):
        (folder / name).write_text("int nothing;\n")
    done = setup(checkout, CXX=str(checkout / "preprocessor"))
    made = sorted(str(path.relative_to(checkout / "made")) for path in (checkout / "made").rglob("new_op/*.o"))
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    assert made == sorted(
        [*(f"{level}/csrc/new_op/cpu.cpp.o" for level in build().SIMD_LEVELS), "once/csrc/new_op/op.cpp.o"]
    )
    assert setup(checkout, CXX=str(checkout / "preprocessor")).returncode == 0


def test_a_command_that_fails_is_shown_with_the_way_out(checkout):
    source = checkout / "csrc" / "registration.cpp"
    right = source.read_text()
    source.write_text("#error why\n")
    done = setup(checkout, CXX=str(checkout / "preprocessor"))
    source.write_text(right)
    assert done.returncode != 0
    assert re.search(r"-o made/once/csrc/registration.cpp.o", done.stdout) and "#error why" in done.stdout
    assert "set ROUTE_KERNELS_CUDA=0" in done.stderr
    assert setup(checkout, CXX=str(checkout / "preprocessor")).returncode == 0


def test_without_a_compiler_the_package_installs_and_says_why(checkout):
    done = setup(checkout, CXX="/nowhere/g++")
    assert done.returncode == 0, done.stderr
    reason = "native kernels skipped, the reference backend will be used: no working C++ compiler (/nowhere/g++)"
    assert f"route-kernels: {reason}\n" in done.stderr


def test_without_ninja_the_package_installs_and_says_why(monkeypatch):
    monkeypatch.setattr(build(), "NINJA", None)
    assert build().why_not(["g++"]) == "no ninja (pip install ninja)"


def test_a_pytorch_that_is_too_old_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.9.1")
    with pytest.raises(build().PlatformError, match=r"needs PyTorch >= 2\.10 to build, found 2\.9\.1"):
        build().why_not(["g++"])


def test_without_pytorch_the_package_installs_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "PyTorch cannot be imported at build time" in build().why_not(["g++"])
