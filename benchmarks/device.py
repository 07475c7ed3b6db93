"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import route_kernels as rk
from route_kernels import native

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "transformers", "torch-ms-deform-attn", "deformops", "ultralytics", "rfdetr")


def cpu_model() -> str:
    """The processor's name as its maker gives it, or the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except FileNotFoundError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_name() -> str:
    """A folder name: the processor and the number of threads."""
    words = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", cpu_model(), flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9.]+", words.lower())) + f"-{torch.get_num_threads()}-threads"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # not a checkout
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def circumstances() -> dict[str, Any]:
    """The beginning of every result file. `dirty`: something but the results differs from the commit."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "route-kernels": rk.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "device": {
            "name": device_name(),
            "cpu": cpu_model(),
            "system": f"{platform.system()} {platform.machine()}",
            "simd_level": native.simd_level(),
            "native_kernels": native.load_error or "loaded",
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
        },
    }
