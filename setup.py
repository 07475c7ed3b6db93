"""Builds the native kernels, two shared libraries: the CPU's always, CUDA's where nvcc and a CUDA PyTorch are found.

Both use PyTorch's stable ABI (2.10 and newer) and hold no Python, so one build serves every later PyTorch. Without a
working C++ compiler the installation goes on and the reference backend is used; what is skipped, and why, is one line.

Environment:
    ROUTE_KERNELS_CUDA: 0 skips the CUDA kernels. 1 compiles them for a PyTorch without CUDA as well, to see that they
        compile. Unset: where nvcc and a CUDA PyTorch are found.
    TORCH_CUDA_ARCH_LIST: as PyTorch's own extensions read it, "8.0;9.0a 10.0+PTX". Unset: the GPUs that are there and
        PTX of the newest; where there is none, 8.0, 9.0 and 10.0 with PTX, as far as nvcc knows them.
    CUDA_HOME: the CUDA toolkit. Unset: the one of the nvcc on PATH, or /usr/local/cuda.
    MAX_JOBS: how many compilers run side by side. Unset: one for each core.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

MINIMUM_TORCH = (2, 10)
ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
SIMD_LEVELS = {"baseline": []}
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    SIMD_LEVELS |= {"avx2": AVX2, "avx512": AVX2 + AVX512}
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fPIC", "-Wall", "-g0"]
HOST_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
TORCH_LIBRARIES = ["torch_cpu", "torch", "c10"]

OLDEST_ARCHITECTURE = (8, 0)
ARCHITECTURES_WITHOUT_A_GPU = "8.0;9.0;10.0+PTX"
STORAGE_TYPES = ("float64", "float32", "float16", "bfloat16")
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


HEADERS = sources("*.h")
ONCE = ["csrc/registration.cpp", *sources("common/*.cpp"), *sources("op.cpp")]
EVERY_LEVEL = sources("cpu.cpp")
CUDA_ONCE = ["csrc/registration_cuda.cpp", *sources("cuda_op.cpp")]
EVERY_STORAGE_TYPE = sources("cuda.cu")
CUDA_HEADERS = [*HEADERS, *sources("*.cuh")]


def nvcc():
    """The CUDA compiler, or None."""
    named = os.environ.get("CUDA_HOME")
    found = [Path(named, "bin", "nvcc")] if named else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(path) for path in found if path and Path(path).exists()), None)


def nvcc_says(option):
    return subprocess.run([nvcc(), option], capture_output=True, text=True, check=True).stdout


def architectures(listed, capabilities, supported):
    """What to compile for, as pairs of nvcc's: ("compute_90a", "sm_90a"), for PTX ("compute_90", "compute_90").

    `listed` is TORCH_CUDA_ARCH_LIST or None; `capabilities` are those of the GPUs that are there; `supported`, what
    nvcc knows as "sm_90", limits what is compiled where neither says anything.
    """
    if not listed and capabilities:
        listed = ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities))) + "+PTX"
    elif not listed:
        names = ARCHITECTURES_WITHOUT_A_GPU.split(";")
        listed = ";".join(name for name in names if "sm_" + re.sub(r"\D", "", name) in supported)
    pairs = []
    for name in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST: expected a list like '8.0;9.0a 10.0+PTX', got {listed!r}")
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCHITECTURE:
            continue
        number = major + minor + suffix
        pairs += [(f"compute_{number}", kind + number) for kind in ("sm_", *(("compute_",) if ptx else ()))]
    if not pairs:
        raise PlatformError(f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need compute capability 8.0, got {listed!r}")
    return list(dict.fromkeys(pairs))


def device_command(source, storage, pairs):
    """Compiles the kernels of one cuda.cu that store `storage`; what to make of them, -c or -cubin, is to be added."""
    targets = [f"-gencode=arch={virtual},code={real}" for virtual, real in pairs]
    return [nvcc(), *NVCC_FLAGS, *targets, f"-DRK_STORAGE={storage}", source]


def glue_command(source, content, torch_includes):
    """Compiles what hands tensors to the kernels, by nvcc because it knows where CUDA's headers are."""
    includes = [f"-I{folder}" for folder in torch_includes]
    return [nvcc(), *NVCC_FLAGS, *HOST_FLAGS, *includes, f'-DRK_CUDA_BUILD="{content}"', source]


def most_jobs():
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def up_to_date(made, inputs):
    return made.exists() and made.stat().st_mtime > max(os.path.getmtime(path) for path in inputs)


def run(command, error):
    """A compiler of the CUDA toolkit; what it prints is shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        raise error(f"{said}\nroute-kernels: to install without the CUDA kernels, set ROUTE_KERNELS_CUDA=0")


def cuda_object(folder, source, command):
    """The object of `source` in `folder`, compiled where older than what it is made of."""
    made = (folder / source).with_suffix(".o")
    if not up_to_date(made, [source, *CUDA_HEADERS, "setup.py"]):
        made.parent.mkdir(parents=True, exist_ok=True)
        run([*command, "-c", "-o", str(made)], CompileError)
    return str(made)


class BuildKernels(build_ext):
    """Objects are compiled side by side, and only what is older than its sources; then each library is replaced."""

    def build_extension(self, ext):
        in_cuda = ext.name.endswith("_cuda")
        reason = self._why_no_cuda() if in_cuda else self._why_not()
        if reason is not None:
            skipped = (
                "CUDA kernels skipped" if in_cuda else "native kernels skipped, the reference backend will be used"
            )
            print(f"route-kernels: {skipped}: {reason}", file=sys.stderr)
            ext.optional = True  # nothing to copy is then no error
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".unfinished")
        (self._build_cuda if in_cuda else self._build_cpu)(str(unfinished))
        os.replace(unfinished, target)  # a process that has the old library loaded keeps it whole

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def _build_cpu(self, library):
        from torch.utils.cpp_extension import include_paths, library_paths

        jobs = [(source, "once", HOST_FLAGS, include_paths()) for source in ONCE]
        jobs += [
            (source, level, [f"-DRK_SIMD={level}", *flags], [])
            for level, flags in SIMD_LEVELS.items()
            for source in EVERY_LEVEL
        ]
        with ThreadPoolExecutor(most_jobs()) as pool:
            objects = list(pool.map(lambda job: self._compile(*job), jobs))
        self.compiler.link_shared_object(
            objects, library, libraries=[*TORCH_LIBRARIES, "pthread"], library_dirs=library_paths(), target_lang="c++"
        )

    def _build_cuda(self, library):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        capabilities = [torch.cuda.get_device_capability(device) for device in devices]
        known = nvcc_says("--list-gpu-code").split()
        pairs = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), capabilities, known)
        version = re.search(r"release ([\d.]+)", nvcc_says("--version"))[1]
        content = f"{' '.join(real for _, real in pairs)}, nvcc {version}"
        folder = Path(self.build_temp, "cuda_" + re.sub(r"\W+", "_", content))  # other architectures have theirs
        kernels = [(source, storage) for source in EVERY_STORAGE_TYPE for storage in STORAGE_TYPES]
        threads = f"--threads={max(1, most_jobs() // len(kernels))}"  # of one nvcc, over its architectures
        jobs = [
            (folder / storage, source, [*device_command(source, storage, pairs), threads])
            for source, storage in kernels
        ]
        jobs += [(folder, source, glue_command(source, content, include_paths())) for source in CUDA_ONCE]
        with ThreadPoolExecutor(most_jobs()) as pool:
            objects = list(pool.map(lambda job: cuda_object(*job), jobs))
        # nvcc adds a CUDA runtime of the library's own: PyTorch may have another one. libtorch brings torch_cuda.
        options = ["-shared", "--no-device-link", "-cudart=static", "-Xlinker=--no-as-needed"]
        libraries = [*(f"-L{path}" for path in library_paths()), *(f"-l{name}" for name in TORCH_LIBRARIES)]
        run([nvcc(), *options, *objects, *libraries, "-o", library], LinkError)

    def _compile(self, source, folder, flags, includes):
        directory = Path(self.build_temp) / folder
        made = directory / Path(source).with_suffix(".o")
        if not up_to_date(made, [source, *HEADERS, "setup.py"]):
            self.compiler.compile(
                [source], output_dir=str(directory), include_dirs=includes, extra_postargs=[*FLAGS, *flags]
            )
        return str(made)

    def _why_not(self):
        try:
            import torch
        except ImportError as error:
            return f"PyTorch cannot be imported at build time ({error})"
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
            raise PlatformError(f"route-kernels needs PyTorch >= 2.10 to build, found {torch.__version__}")
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-std=c++17"])
            except (CompileError, ExecError, PlatformError) as error:
                return f"no working C++ compiler ({error})"
        return None

    def _why_no_cuda(self):
        wanted = os.environ.get("ROUTE_KERNELS_CUDA") or None
        if wanted not in (None, "0", "1"):
            raise PlatformError(f"ROUTE_KERNELS_CUDA: expected 0 or 1, got {wanted!r}")
        if wanted == "0":
            return "ROUTE_KERNELS_CUDA=0"
        reason = self._why_not()
        if reason is None:
            import torch

            if torch.version.cuda is None and wanted != "1":
                return f"PyTorch {torch.__version__} has no CUDA"
            if nvcc() is None:
                reason = "no nvcc (on PATH, in CUDA_HOME or in /usr/local/cuda)"
        if reason is not None and wanted == "1":
            raise PlatformError(f"ROUTE_KERNELS_CUDA=1, but the CUDA kernels cannot be compiled: {reason}")
        return reason


if __name__ == "__main__":  # otherwise read for how the kernels are compiled
    cpu, cuda = [*ONCE, *EVERY_LEVEL], [*CUDA_ONCE, *EVERY_STORAGE_TYPE]
    setup(
        ext_modules=[
            Extension("route_kernels._C", sources=cpu, depends=HEADERS, language="c++"),
            Extension("route_kernels._C_cuda", sources=cuda, depends=CUDA_HEADERS, language="c++"),
        ],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
