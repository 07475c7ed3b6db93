"""Every SIMD level of this machine computes the same ops: one process a level, as the level is read once."""

import os
import subprocess
import sys

import pytest

from route_kernels import native

LEVELS = ("baseline", "avx2", "avx512")

pytestmark = [
    pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error)),
    pytest.mark.skipif(native.simd_level() == "neon", reason="arm64 has one level"),
]

CHECK_EVERY_OP = """
import torch
from route_kernels import native
from route_kernels.testing import (
    EAGER, check_accuracy, ms_deform_attn_arguments, ms_deform_attn_fused_arguments, routed_attention_arguments,
    sample_arguments,
)

torch.set_num_threads(1)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for op in EAGER:
        for label, arguments in sample_arguments(op, dtype).items():
            check_accuracy(op, arguments)
    check_accuracy("routed_attention", routed_attention_arguments(queries=67, keys=261, channels=13, dtype=dtype))
    for channels in (1, 2, 4, 16, 23, 32, 48, 100):  # rows of every width
        for queries in (2, 30):
            sizes = dict(channels=channels, queries=queries, points=6, dtype=dtype, seed=3)
            check_accuracy("ms_deform_attn", ms_deform_attn_arguments(**sizes))
            check_accuracy("ms_deform_attn_fused", ms_deform_attn_fused_arguments(coordinates=4, masked=True, **sizes))
print(native.simd_level())
"""


def run(level: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ROUTE_KERNELS_SIMD": level, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if "ROUTE_KERNELS_SIMD" in os.environ:
        pytest.skip("the level of this machine is hidden by ROUTE_KERNELS_SIMD")
    finished = run(level, CHECK_EVERY_OP)
    if LEVELS.index(level) > LEVELS.index(native.simd_level()):
        assert finished.returncode != 0
        assert f"ROUTE_KERNELS_SIMD={level}: this machine does not have it" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.split() == [level]


def test_unknown_level_is_an_error():
    finished = run("sse9", "import torch, route_kernels as rk; rk.query_similarity(torch.ones(1, 2, 3))")
    assert finished.returncode != 0
    assert "ROUTE_KERNELS_SIMD: expected baseline, avx2 or avx512, got 'sse9'" in finished.stderr
