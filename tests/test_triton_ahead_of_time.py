"""Every Triton kernel that an op can launch compiles for every chip, spills no register and fits. No GPU is needed.

The interpreter has no machine code, so the compiling is done by `benchmarks.static_report` in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.processors import PROCESSORS
from benchmarks.static_report import CHIPS
from route_kernels.triton.block_sizes import ARCHITECTURES, INTERPRETER, TABLE

ROOT = Path(__file__).parents[1]


def compiled_rows(folder, *options):
    """The report's rows, or the error."""
    file = folder / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "static-report",
        "--backend",
        "triton",
        "--json",
        str(file),
        *options,
    ]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert file.exists(), f"{finished.stdout[-2000:]}{finished.stderr[-4000:]}"
    return json.loads(file.read_text())["rows"]


def faults(rows):
    return [f"{row['chip']}: {row['variant']}, {row['blocks']}: {fault}" for row in rows for fault in row["faults"]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The fewest variants that reach every kernel on every chip, and every dtype and table entry on some chip."""
    return compiled_rows(tmp_path_factory.mktemp("compiled"), "--few")


def test_nothing_spills_and_everything_fits(rows):
    assert not faults(rows)
    assert {row["chip"] for row in rows} == set(CHIPS)


def test_every_entry_of_the_table_is_compiled(rows):
    used = {tuple(entry) for row in rows for entry in row["entries"]}
    left_out = [
        f"{kernel}: entry {place} {entry}"
        for kernel, entries in TABLE.items()
        for place, entry in enumerate(entries)
        if (entry.architectures is None or set(entry.architectures) & set(CHIPS)) and (kernel, place) not in used
    ]
    assert not left_out, "\n".join(left_out)


def test_the_table_names_what_there_is():
    for kernel, entries in TABLE.items():
        assert entries[0].architectures == (INTERPRETER,), f"{kernel}: the interpreter's tiny blocks come first"
        for entry in entries:
            assert set(entry.architectures or ()) <= {INTERPRETER, *ARCHITECTURES}, kernel
            assert {"num_warps", "num_stages"} <= set(entry.settings), kernel
    assert set(ARCHITECTURES) == set(PROCESSORS)


def test_float32_takes_no_tensor_core_that_rounds(rows):
    """NVIDIA's multiply float32 in TF32; AMD's (v_mfma_f32_*_f32) do not round."""
    products = [row for row in of_similarities(rows) if "float32" in row["variant"] and row["chip"] != "gfx942"]
    assert products and not any(row["tensor_core"] for row in products)


def test_products_of_short_floats_take_the_tensor_cores(rows):
    products = [row for row in of_similarities(rows) if "float32" not in row["variant"]]
    assert products and all(row["tensor_core_in_loops"] for row in products)


def of_similarities(rows):
    return [row for row in rows if "similarity_relu" in row["variant"]]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_no_variant_at_all_spills(tmp_path, chip):
    """Every dtype and every entry of the table, on each chip."""
    rows = compiled_rows(tmp_path, "--chip", chip)
    assert not faults(rows)
    if chip != "gfx942":
        test_float32_takes_no_tensor_core_that_rounds(rows)
    test_products_of_short_floats_take_the_tensor_cores(rows)
