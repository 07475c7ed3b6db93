"""The static report and the launch cost: what they count, on machine code written out here and on one kernel."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import machine_code, static_report
from benchmarks.machine_code import ATOMIC, LOAD, SPECIAL_FUNCTION, SPILL, STORE, TENSOR_CORE
from benchmarks.processors import KIB, PROCESSORS

ROOT = Path(__file__).parents[1]

SASS = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0040*/                   MUFU.EX2 R5, R6 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/              @!P3 BRA `(.L_x_0) ;
.L_x_1:
        /*0070*/                   MUFU.RCP R5, R6 ;
        /*0080*/                   STL [R1], R5 ;
        /*0090*/                   RED.E.ADD.F32x4.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   NOP ;
        /*00d0*/                   BRA `(.L_x_1) ;
"""

GCN = """
kernel:
\ts_load_dwordx4 s[4:7], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop
\tbuffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[4:5], v[6:7], v[0:15]
\tv_exp_f32_e32 v3, v2
\ts_cbranch_scc1 .LBB0_1
\tglobal_atomic_add_f32 v0, v1, s[2:3]
\tscratch_store_dword off, v1, off
\tglobal_store_short v0, v1, s[2:3]
\ts_endpgm
"""

TTIR = """
module {
  tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc))) attributes {noinline = false} {
    %a = tt.load %p, %m, %z : tensor<64x32x!tt.ptr<bf16>> loc(#loc1)
    %s = "tt.reduce"(%a) <{axis = 1 : i32}> ({
    ^bb0(%u: f32, %v: f32):
      tt.reduce.return %u : f32 loc(#loc2)
    }) : (tensor<64x32xf32>) -> tensor<64xf32> loc(#loc2)
    %t = scf.for %c = %lo to %n step %k iter_args(%o = %s) -> (tensor<64xf32>)  : i32 {
      %b = tt.load %q : tensor<16x!tt.ptr<f32>> loc(#loc3)
      %i = scf.if %h -> (f32) {
        %w = tt.load %r : !tt.ptr<f32> loc(#loc3)
        scf.yield %w : f32
      }
      scf.yield %o : tensor<64xf32>
    } loc(#loc4)
    %old = tt.atomic_rmw fadd, relaxed, gpu, %y, %t, %m : (tensor<8x!tt.ptr<f32>>, tensor<8xf32>, tensor<8xi1>) -> tensor<8xf32>
    tt.store %y, %t, %m : tensor<64x!tt.ptr<f16>> loc(#loc5)
    tt.return
  }
}
"""  # noqa: E501


def code(pattern, text):
    return machine_code.MachineCode(32, 0, *machine_code.counted(pattern, text))


@pytest.mark.parametrize(
    "pattern, text, total, in_loops",
    [(machine_code._SASS_LINE, SASS, (1, 2, 1, 1, 2, 1), (1, 1, 0, 0, 1, 0)),
     (machine_code._GCN_LINE, GCN, (1, 1, 1, 1, 1, 1), (1, 1, 0, 0, 1, 0))],
    ids=["NVIDIA", "AMD"],
)  # fmt: skip
def test_instructions_are_counted_in_all_and_in_loops(pattern, text, total, in_loops):
    kinds = (TENSOR_CORE, SPECIAL_FUNCTION, SPILL, ATOMIC, LOAD, STORE)
    found = code(pattern, text)
    assert tuple(map(found.count, kinds)) == total
    assert tuple(map(found.count_in_loops, kinds)) == in_loops


def test_bytes_of_tiles_once_and_in_loops():
    assert machine_code.tile_bytes(TTIR) == {
        "loaded_once": 64 * 32 * 2, "loaded_in_loops": 16 * 4 + 4, "stored_once": 8 * 4 + 64 * 2, "stored_in_loops": 0,
    }  # fmt: skip


def test_strides_that_are_multiplied_in_32_bits():
    ttir = """
    tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %stride_x: i32 loc("x"(#loc))) {
    %a = arith.extsi %stride_b : i32 to i64 loc(#loc1)
    %b = arith.muli %image, %stride_h : i64 loc(#loc1)
    %c = tt.splat %stride_n : i32 -> tensor<64x1xi32> loc(#loc2)
    %d = arith.muli %n, %stride_m : i32
    """
    assert machine_code.narrow_strides(ttir) == ["stride_m", "stride_n"]


@pytest.mark.parametrize(
    "chip, registers, shared, num_warps, expected",
    [
        ("sm90", 32, 0, 4, 16),  # 64 warps
        ("sm90", 168, 0, 4, 3),  # 168 x 32 x 4 x 3 of 65536 registers
        ("sm90", 128, 98304, 8, 2),  # registers and shared memory alike
        ("sm90", 255, 0, 8, 1),
        ("sm80", 64, 163 * KIB, 4, 1),
        ("sm120", 64, 49 * KIB, 4, 2),  # 1 KiB of each is the system's
        ("sm86", 16, 0, 1, 16),
        ("gfx942", 128, 0, 4, 4),  # 512 of a lane over 128: 4 waves on each of 4 schedulers
        ("gfx942", 129, 32 * KIB, 4, 2),
        ("gfx942", 512, 65 * KIB, 4, 0),
    ],
)
def test_programs_at_once(chip, registers, shared, num_warps, expected):
    processor = PROCESSORS[chip]
    assert processor.programs_at_once(registers, shared, num_warps) == expected
    assert processor.occupancy(registers, shared, num_warps) == expected * num_warps / processor.warps


ROW = machine_code.Row(
    "op", "forward", "kernel bfloat16", "sm90", {"BLOCK_N": 64}, 4, 2, 100, 0, 0, 1024, 0, 4, 0.25, 900, 700, 8, 8, 9,
    4, {"LDG.E.128": 2}, {"STG.E": 1}, {},
    {"loaded_once": 1, "loaded_in_loops": 2, "stored_once": 3, "stored_in_loops": 4}, [],
)  # fmt: skip


def test_faults_stand_under_their_row():
    assert not ROW.faults()
    bad = replace(ROW, spilled_bytes=8, spill_instructions=2, shared_bytes=2**18, programs_at_once=0,
                  tensor_memory_columns=1024, narrow_strides=["stride_b"])  # fmt: skip
    lines = list(static_report.table([ROW, bad]))
    assert lines[0].startswith("chip") and "kernel bfloat16" in lines[1]
    assert lines[3:] == [
        "  ! 8 bytes of registers spilled, 2 instructions",
        "  ! 262144 bytes of shared memory, at most 232448",
        "  ! 1024 columns of tensor memory, at most 512",
        "  ! no program fits on a multiprocessor",
        "  ! multiplied in 32 bits: stride_b",
    ]


def test_a_known_spill_may_not_grow():
    spilling = replace(ROW, spilled_bytes=8, spill_instructions=2)
    assert not replace(spilling, known_spill=8).faults()
    assert replace(spilling, known_spill=4).faults() == ["8 bytes of registers spilled, 2 instructions"]


def test_a_few_variants_reach_every_chip_dtype_and_entry():
    def variant(dtype, place, chip):
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"))
        return SimpleNamespace(
            kernel=kernel, signature={"n": "i32", "x_ptr": f"*{dtype}"}, architecture=chip,
            entries=frozenset({("kernel", place)}),
        )  # fmt: skip

    chips, dtypes, places = ("sm80", "sm90"), ("fp16", "bf16", "fp32"), (1, 2, 3, 4)
    found = [variant(dtype, place, chip) for chip in chips for dtype in dtypes for place in places]
    few = list(static_report.covering(found))
    assert len(few) < 7 and {one.architecture for one in few} == set(chips)
    assert {static_report._dtype(one) for one in few} == set(dtypes)
    assert {place for one in few for _, place in one.entries} == set(places)


def without_interpreter(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_command_prints_a_table_and_writes_every_count(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "report.json"
    finished = without_interpreter(
        "static-report", "--op", "query_similarity", "--chip", "sm90", "--match", "norms bfloat16 C=32",
        "--json", str(file),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert row["variant"] == "query_inverse_norms bfloat16 C=32"
    assert row["special_function"] == 3  # a root, a reciprocal, and one to divide the number of a program
    assert row["registers"] > 0 and row["instructions"] > 0 and not row["faults"]
    assert row["tile_bytes"]["loaded_in_loops"] == 16 * 32 * 2 and row["tile_bytes"]["stored_once"] == 16 * 4
    assert "1 variants, none with faults" in finished.stdout


def test_heads_that_share_a_bias_take_fewer_instructions(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "heads.json"
    finished = without_interpreter(
        "static-report", "--heads", "--chip", "sm90", "--match", "forward D=32", "--json", str(file)
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    groups = {row["heads"]: row for row in json.loads(file.read_text())["rows"]}
    assert groups[1]["instructions"] > groups[2]["instructions"] > groups[4]["instructions"] > 0
    assert [heads for heads, row in groups.items() if row["chosen"]] == [4] and not groups[4]["spilled_bytes"]
    (line,) = finished.stdout.splitlines()[1:]
    assert line.startswith("sm90    forward D=32") and f"{groups[4]['instructions']}*" in line


def test_the_cost_of_a_launch_is_measured_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "cost.json"
    finished = without_interpreter("launch-cost", "--op", "query_similarity", "--repeat", "1", "--json", str(file))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (cost,) = json.loads(file.read_text())["costs"]
    assert (cost["op"], cost["direction"], cost["launches"]) == ("query_similarity", "forward", 2)
    assert cost["wrapper"] > 0 and cost["microseconds"] > 0
