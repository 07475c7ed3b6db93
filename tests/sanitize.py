"""The CPU kernels under the sanitizers of GCC: `python tests/sanitize.py [--quick]`.

A copy of the tree is built in build/sanitize with AddressSanitizer and UndefinedBehaviorSanitizer, and tests run there
on every SIMD level of this machine; another with ThreadSanitizer, for 4 threads. Python and PyTorch are not
instrumented: the sanitizer's library is loaded before them, so that it knows the bounds of PyTorch's tensors.
ThreadSanitizer does not see how GNU OpenMP synchronises; with RK_NEW_THREADS the kernels start threads of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("csrc", "route_kernels", "benchmarks", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -DRK_NEW_THREADS",
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python's own memory is never given back
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
QUICK = ["tests/test_fuzz.py"]
FULL = [
    *QUICK,
    *("tests/test_routed_attention_kernel.py", "tests/test_ms_deform_attn_kernel.py", "tests/test_properties.py"),
    *("tests/test_routed_attention.py", "tests/test_ms_deform_attn.py", "tests/test_ms_deform_attn_fused.py"),
    *("tests/test_add_layer_norm.py", "tests/test_query_similarity.py", "tests/test_sigmoid_focal_loss.py"),
]
SKIPPED = "not compile and not gradcheck and not memory and not subprocess"


def levels() -> list[str]:
    """The SIMD levels that this machine has."""
    flags = Path("/proc/cpuinfo").read_text().split()
    wanted = {
        "baseline": (),
        "avx2": ("avx2", "fma", "f16c"),
        "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    }
    return [level for level, needs in wanted.items() if all(need in flags for need in needs)]


def library(name: str) -> str:
    return subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip()


def build(kind: str) -> Path:
    """A copy of the tree with instrumented kernels; ninja compiles what changed."""
    tree = ROOT / "build" / "sanitize" / kind
    for name in COPIED:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    environment = {**os.environ, "CXXFLAGS": FLAGS[kind], "LDFLAGS": FLAGS[kind], "ROUTE_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return tree


def tested(kind: str, tree: Path, tests: list[str], level: str, threads: int) -> int:
    """The exit code of the tests in a process that has the sanitizer's library first."""
    first = " ".join(
        library(name) for name in ({"address": "libasan.so", "thread": "libtsan.so"}[kind], "libstdc++.so.6")
    )
    environment = {
        **{**os.environ, **OPTIONS, "LD_PRELOAD": first, "ROUTE_KERNELS_SIMD": level, "OMP_NUM_THREADS": str(threads)},
        "PYTHONMALLOC": "malloc",
    }
    print(f"== {kind}, {level}, {threads} threads: {' '.join(tests)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SKIPPED, *tests]
    return subprocess.run(command, cwd=tree, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fuzzer alone, and no ThreadSanitizer")
    quick = parser.parse_args().quick
    tree = build("address")
    failed = [level for level in levels() if tested("address", tree, QUICK if quick else FULL, level, 2)]
    if not quick:
        failed += ["threads"] * (tested("thread", build("thread"), QUICK, levels()[-1], 4) != 0)
    print(f"sanitize: {'failed: ' + ', '.join(failed) if failed else 'nothing found'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
