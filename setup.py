"""Describes the native kernels, two shared libraries, to ninja: the CPU's always, CUDA's with nvcc and a CUDA PyTorch.

Both use PyTorch's stable ABI and hold no Python, so one build serves PyTorch 2.10 and every later one. Where none can
be compiled the installation goes on and the reference backend is used; what is skipped, and why, is one line. The build
reads ROUTE_KERNELS_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME and MAX_JOBS: docs/cuda.md says how.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fPIC", "-Wall", "-g0"]
SIMD_LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SIMD_LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    wider = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    SIMD_LEVELS["avx512"] = SIMD_LEVELS["avx2"] + wider
HOST_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
STORAGE_TYPES = ("float64", "float32", "float16", "bfloat16")
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
NINJA = shutil.which("ninja", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
RULES = """
rule compile
  command = $words -MMD -MF $out.d -c -o $out $in
  depfile = $out.d
  deps = gcc
rule link
  command = $words -o $out $in $libraries
"""


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def nvcc():
    """The CUDA compiler, or None."""
    named = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{named}/bin" if named else f"{os.environ['PATH']}:/usr/local/cuda/bin")


def architectures(listed, capabilities, supported):
    """The listed ones, else those of the GPUs here, else the usual that nvcc supports: [("compute_90", "sm_90")]."""
    here = ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities)))
    usual = [name for name in ("8.0", "9.0", "10.0+PTX") if "sm_" + re.sub(r"\D", "", name) in supported]
    listed = listed or (here + "+PTX" if here else ";".join(usual))
    pairs = []
    for name in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST: expected a list like '8.0;9.0a 10.0+PTX', got {listed!r}")
        if int(match[1]) >= 8:
            kinds = ("sm_", "compute_") if match[3] else ("sm_",)
            pairs += [(f"compute_{match[1]}{match[2]}", f"{kind}{match[1]}{match[2]}") for kind in kinds]
    if not pairs:
        raise PlatformError(f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need compute capability 8.0, got {listed!r}")
    return list(dict.fromkeys(pairs))


def why_not(compiler):
    """Why no kernels can be compiled, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported at build time ({error})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise PlatformError(f"route-kernels needs PyTorch >= 2.10 to build, found {torch.__version__}")
    probe = f"echo '#include <vector>' | {shlex.join(compiler)} -fsyntax-only -x c++ -"
    if subprocess.run(probe, shell=True, capture_output=True).returncode != 0:
        return f"no working C++ compiler ({compiler[0]})"
    return "no ninja (pip install ninja)" if NINJA is None else None


def why_no_cuda(reason):
    """Why the CUDA kernels are not compiled, or None; `reason`: why no kernels can be."""
    wanted = os.environ.get("ROUTE_KERNELS_CUDA") or None
    if wanted not in (None, "0", "1"):
        raise PlatformError(f"ROUTE_KERNELS_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "ROUTE_KERNELS_CUDA=0"
    if reason is None:
        import torch

        if torch.version.cuda is None and wanted is None:
            return f"PyTorch {torch.__version__} has no CUDA"
        reason = None if nvcc() else "no nvcc (on PATH, in CUDA_HOME or in /usr/local/cuda)"
    if reason is not None and wanted == "1":
        raise PlatformError(f"ROUTE_KERNELS_CUDA=1, but the CUDA kernels cannot be compiled: {reason}")
    return reason


def cpu_objects(compiler, includes):
    """(folder, source, command that compiles it) of each object of the CPU's library."""
    for source in ["csrc/registration.cpp", *sources("common/*.cpp"), *sources("op.cpp")]:
        yield "once", source, [*compiler, *FLAGS, *HOST_FLAGS, *includes]
    for level, flags in SIMD_LEVELS.items():
        for source in sources("cpu.cpp"):
            yield level, source, [*compiler, *FLAGS, f"-DRK_SIMD={level}", *flags]


def cuda_objects(pairs, includes):
    """The same of the CUDA library; nvcc compiles its host code too because it knows where CUDA's headers are."""
    version = re.search(r"release ([\d.]+)", subprocess.getoutput(f"{nvcc()} --version"))[1]
    content, compiler = f"{' '.join(real for _, real in pairs)}, nvcc {version}", [nvcc(), *NVCC_FLAGS]
    for source in ["csrc/registration_cuda.cpp", *sources("cuda_op.cpp")]:
        yield "cuda", source, [*compiler, *HOST_FLAGS, *includes, f'-DRK_CUDA_BUILD="{content}"']
    targets = [f"-gencode=arch={virtual},code={real}" for virtual, real in pairs]
    for storage in STORAGE_TYPES:
        for source in sources("cuda.cu"):
            yield storage, source, [*compiler, *targets, f"-DRK_STORAGE={storage}"]


class BuildKernels(build_ext):
    """Has ninja make the libraries beside their description, then replaces each where it belongs."""

    def build_extensions(self):
        (cpu, cuda), compiler, folder = self.extensions, self.compiler.compiler_so_cxx, self.build_temp
        skipped = {"native kernels skipped, the reference backend will be used": why_not(compiler)}
        skipped["CUDA kernels skipped"] = why_no_cuda(*skipped.values())
        for extension, (what, reason) in zip(self.extensions, skipped.items(), strict=True):
            extension.optional = reason is not None  # nothing to copy is then no error
            if reason is not None:
                print(f"route-kernels: {what}: {reason}", file=sys.stderr)
        if cpu.optional:
            return
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [f"-I{path}" for path in include_paths()]
        libraries = [(cpu, cpu_objects(compiler, includes), [*compiler, *self.compiler.linker_so_cxx[1:]])]
        if not cuda.optional:
            capabilities = [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]
            known = subprocess.getoutput(f"{nvcc()} --list-gpu-code").split()
            pairs = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), capabilities, known)
            # nvcc adds a CUDA runtime of the library's own: PyTorch may have another one. libtorch brings torch_cuda.
            link = [nvcc(), "-shared", "--no-device-link", "-cudart=static", "-Xlinker=--no-as-needed"]
            libraries.append((cuda, cuda_objects(pairs, includes), link))
        lines = [RULES, f"builddir = {folder}", "libraries = -ltorch_cpu -ltorch -lc10 -lpthread"]
        lines[-1] += "".join(f" -L{shlex.quote(path)}" for path in library_paths())
        for extension, objects, link in libraries:
            made = {f"{folder}/{part}/{source}.o": (source, shlex.join(words)) for part, source, words in objects}
            lines += [f"build {path}: compile {source}\n  words = {words}" for path, (source, words) in made.items()]
            lines.append(f"build {folder}/{extension.name}: link {' '.join(made)}\n  words = {shlex.join(link)}")
        os.makedirs(folder, exist_ok=True)
        Path(folder, "build.ninja").write_text("\n".join([*lines, ""]))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        os.environ["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads={max(1, jobs // 4)}"
        if subprocess.run([NINJA, "-f", f"{folder}/build.ninja", f"-j{jobs}"]).returncode != 0:
            raise CompileError("ninja failed; to install without the CUDA kernels, set ROUTE_KERNELS_CUDA=0")
        for extension, *_ in libraries:
            target = self.get_ext_fullpath(extension.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(f"{folder}/{extension.name}", f"{target}.unfinished")
            os.replace(f"{target}.unfinished", target)  # a process that has the old library loaded keeps it whole


if __name__ == "__main__":  # otherwise read for how the kernels are compiled
    modules = [Extension(f"route_kernels.{name}", sources("*.*"), py_limited_api=True) for name in ("_C", "_C_cuda")]
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    setup(ext_modules=modules, cmdclass={"build_ext": BuildKernels}, options=options)
