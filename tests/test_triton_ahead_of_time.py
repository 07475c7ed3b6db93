"""Every Triton kernel that an op can launch compiles for every chip, spills no register and fits. No GPU is needed.

The interpreter has no machine code, so the compiling is done by `benchmarks.static_report` in processes of their own.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.processors import PROCESSORS
from benchmarks.static_report import CHIPS
from route_kernels.triton.table import ARCHITECTURES, INTERPRETER, TABLE

ROOT = Path(__file__).parents[1]


def compiled_rows(folder, chip, *options):
    """The report's rows of one chip, or the error."""
    file = folder / f"{chip}.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.static_report", "--chip", chip, "--json", str(file), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert file.exists(), f"{chip}: {finished.stdout[-2000:]}{finished.stderr[-4000:]}"
    return json.loads(file.read_text())["rows"]


def faults(rows):
    return [f"{row['variant']}, {row['blocks']}: {fault}" for row in rows for fault in row["faults"]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """By chip, as few variants as reach every kernel in every dtype and every table entry; two chips at a time."""
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CHIPS, pool.map(lambda chip: compiled_rows(folder, chip, "--few"), CHIPS), strict=True))


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_spills_and_everything_fits(rows, chip):
    assert rows[chip] and not faults(rows[chip])


def test_every_entry_of_the_table_is_compiled(rows):
    used = {tuple(entry) for of_chip in rows.values() for row in of_chip for entry in row["entries"]}
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
    for chip in set(CHIPS) - {"gfx942"}:
        products = [row for row in rows[chip] if "query_similarity_relu float32" in row["variant"]]
        assert products and not any(row["tensor_core"] for row in products)


@pytest.mark.parametrize("chip", CHIPS)
def test_products_of_short_floats_take_the_tensor_cores(rows, chip):
    products = [row for row in rows[chip] if "similarity_relu" in row["variant"] and "float32" not in row["variant"]]
    assert products and all(row["tensor_core_in_loops"] for row in products)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_no_variant_at_all_spills(tmp_path, chip):
    assert not faults(compiled_rows(tmp_path, chip))
