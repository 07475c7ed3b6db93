"""benchmarks.kernel_time: the native library with a clock around its kernels."""

import subprocess
import sys

import pytest

from benchmarks.cuda_machine_code import ROOT
from route_kernels import native


@pytest.mark.slow
@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
def test_kernels_take_less_than_their_call():
    command = [sys.executable, "-m", "benchmarks", "kernel-time", "--op", "add_layer_norm", "--repeat", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("add_layer_norm")]
    assert rows
    for *_, call, kernels, beyond in rows:
        assert 0 < float(kernels) < float(call)
        assert float(beyond) == pytest.approx(float(call) - float(kernels), abs=0.2)
