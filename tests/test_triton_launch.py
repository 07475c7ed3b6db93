"""Launches that are found again: what reaches the driver is what Triton itself would launch. No GPU is needed.

Driver and device are stand-ins, Triton's compiler and launch path are real, so this runs in processes that do not
interpret the kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

PREAMBLE = """
import json
import torch
import route_kernels as rk
from benchmarks.launch_cost import stubbed
from route_kernels.testing import call, named_tensors, query_similarity_arguments, ms_deform_attn_fused_arguments
driver = stubbed()
from route_kernels.triton import launch, query_similarity

launched = []  # of each launch: kernel, grid, arguments

def launcher_cls(source, metadata):
    def launched_one(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        known = [(type(a).__name__, a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in arguments]
        launched.append((source.name, metadata.hash, (x, y, z), known))
    return launched_one

driver.launcher_cls = launcher_cls
"""

SAME_AS_TRITON = """
x = torch.randn(3, 70, 32, dtype=torch.bfloat16)
similarity = query_similarity_arguments(queries=70, dtype=torch.bfloat16)
fused = ms_deform_attn_fused_arguments(queries=9, dtype=torch.bfloat16)
inputs, settings = (), {}

def first_launch(op, arguments):
    with rk.backend("triton"), torch.no_grad():
        call(op, arguments)

for op, arguments in (("query_similarity", similarity), ("ms_deform_attn_fused", fused)):
    results = []
    for times in range(3):
        launched.clear()
        if times == 1:
            launch._plans.clear()
        first_launch(op, arguments)
        results.append([(name, kind, grid, [a for a in known]) for name, kind, grid, known in launched])
    def shape_of(result):  # outputs are new tensors each time
        return [(n, k, g, [(t, v if t != "Tensor" else None) for t, v in known]) for n, k, g, known in result]
    assert shape_of(results[0]) == shape_of(results[1]) == shape_of(results[2]), op
    assert len(results[2]) == len(results[0]) > 0
assert 0 < len(launch._plans) <= 2
print(json.dumps("same"))
"""

SPECIALIZED = """
buffer = torch.randn(4 * 70 * 32 + 8)
def hashes(x):
    launched.clear()
    query_similarity.forward(x, x.new_empty(x.shape[:2]))
    return [kind for _, kind, _, _ in launched]

aligned = buffer[: 3 * 70 * 32].view(3, 70, 32)
shifted = buffer[1 : 1 + 3 * 70 * 32].view(3, 70, 32)  # 4 bytes on: no vector loads
first = hashes(aligned)
assert hashes(aligned) == first
assert all(a != b for a, b in zip(first, hashes(shifted)))
assert all(a != b for a, b in zip(first, hashes(aligned.bfloat16())))
assert hashes(aligned) == first
launch.MOST_PLANS = 2
assert hashes(aligned[:, :64]) and hashes(aligned[:, :48]) and hashes(aligned) == first and len(launch._plans) <= 2
print(json.dumps("specialized"))
"""


@pytest.mark.parametrize("code", [SAME_AS_TRITON, SPECIALIZED], ids=["same as Triton", "specialized"])
def test_launches_found_again(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout) in ("same", "specialized")
