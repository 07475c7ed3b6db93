"""Builds the native kernels: each op's cpu.cpp once for every SIMD level, the rest once, into one shared library.

The library uses PyTorch's stable ABI (2.10 and newer) and holds no Python, so one build serves every later PyTorch.
Without a working C++ compiler the installation goes on and the reference backend is used.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, PlatformError

MINIMUM_TORCH = (2, 10)
ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
SIMD_LEVELS = {"baseline": []}
if X86:
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    SIMD_LEVELS |= {"avx2": AVX2, "avx512": AVX2 + AVX512}
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fPIC", "-Wall", "-g0"]
ONCE = ["csrc/registration.cpp", "csrc/common/dispatch.cpp", *sorted(map(str, Path("csrc").glob("*/op.cpp")))]
EVERY_LEVEL = sorted(map(str, Path("csrc").glob("*/cpu.cpp")))
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))


class BuildKernels(build_ext):
    """One object a source and SIMD level, compiled side by side; only what is older than its sources."""

    def build_extension(self, ext):
        reason = self._why_not()
        if reason is not None:
            print(
                f"route-kernels: native kernels skipped, the reference backend will be used: {reason}", file=sys.stderr
            )
            ext.optional = True  # nothing to copy is then no error
            return
        from torch.utils.cpp_extension import include_paths, library_paths

        jobs = [(source, "once", []) for source in ONCE]
        jobs += [
            (source, level, [f"-DRK_SIMD={level}", *flags])
            for level, flags in SIMD_LEVELS.items()
            for source in EVERY_LEVEL
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self._compile(*job, include_paths()), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".unfinished")
        self.compiler.link_shared_object(
            objects,
            str(unfinished),
            libraries=["torch_cpu", "torch", "c10"],
            library_dirs=library_paths(),
            target_lang="c++",
        )
        os.replace(unfinished, target)  # a process that has the old library loaded keeps it whole

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def _compile(self, source, level, flags, torch_includes):
        directory = Path(self.build_temp) / level
        made = directory / Path(source).with_suffix(".o")
        inputs = [source, *HEADERS, "setup.py"]
        if made.exists() and made.stat().st_mtime > max(os.path.getmtime(path) for path in inputs):
            return str(made)
        includes = torch_includes if level == "once" else []
        macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")] if level == "once" else []
        (compiled,) = self.compiler.compile(
            [source], output_dir=str(directory), macros=macros, include_dirs=includes, extra_postargs=FLAGS + flags
        )
        return compiled

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


setup(
    ext_modules=[Extension("route_kernels._C", sources=[*ONCE, *EVERY_LEVEL], depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
